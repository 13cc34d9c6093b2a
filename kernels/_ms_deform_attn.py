"""What both directions of deformable attention need: order of the queries, tables of the levels, positions of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv

STRIP: tl.constexpr = tl.constexpr(8)  # rows of a level that are walked side by side
INFINITY: tl.constexpr = tl.constexpr(float("inf"))
INT32_END: tl.constexpr = tl.constexpr(2**31)
WARPS = 4
LANE_BYTES = 16  # what one lane loads at once
TILE = 64  # most queries of a program: 8 x 8 where queries are the pixels
TILE_WARPS = 8
EXACT_FLOATS = 2**24  # sizes travel to the kernel as float32, which compiles no variant per value
INT32 = 2**31
STRIP_END = 2**28  # queries: 8 times a width stays an int32


class Options(NamedTuple):
    """What the kernels are compiled for."""

    heads: int
    points: tuple[int, ...]  # samples of each level
    shares: tuple[float, ...]  # share of a box that an offset of 1 spans in each level
    method: int
    references: int  # per query; 0: the samples are locations and weights
    box: bool  # references of four numbers
    host: bool  # sizes come with the launch, not from the device
    starts: bool  # first tokens of the levels are given
    strips: bool  # queries are the pixels
    wide: bool  # offsets inside an image need int64
    levels: int
    samples: int  # of a head: K
    channels: int  # of a head: C
    rows: int  # queries of a program
    block_c: int
    block_k: int


@triton.jit
def _size(p_shapes, sizes, i: tl.constexpr, o: tl.constexpr):
    """int64: entry i of (height, width) of the levels, from the host's list or from the device."""
    if o.host:
        size = tl.full((), sizes[i], tl.float32).to(tl.int64)
    else:
        size = tl.load(p_shapes + i)
    return size


@triton.jit
def strip_order(position, p_shapes, sizes, queries, o: tl.constexpr):
    """The query at a position of the order in which queries that are pixels are worked on, so that neighbours share what they read.

    Every level is cut into strips of 8 rows, which are walked column by column. A permutation of 0 ... queries - 1 whatever the sizes: from
    the first level that does not fit onwards it changes nothing.
    """
    i_query = position
    begin, fits = tl.full((), 0, tl.int64), tl.full((), 1, tl.int1)
    LEVELS: tl.constexpr = o.levels
    for i in tl.static_range(LEVELS):
        height, width = _size(p_shapes, sizes, 2 * i, o), _size(p_shapes, sizes, 2 * i + 1, o)
        fits = fits & (height > 0) & (width > 0) & (height <= queries) & (width <= queries)
        area = tl.where(fits, height * width, 0)
        fits = fits & (area <= queries - begin)
        rows, columns = tl.where(fits, height, 1).to(tl.int32), tl.where(fits, width, 1).to(tl.int32)
        local = position - begin.to(tl.int32)
        i_strip = local // (STRIP * columns)
        rest = local - i_strip * (STRIP * columns)
        depth = tl.minimum(tl.maximum(rows - STRIP * i_strip, 1), STRIP)
        x = rest // depth
        y = STRIP * i_strip + rest - x * depth
        inside = fits & (local >= 0) & (local < area)
        i_query = tl.where(inside, begin.to(tl.int32) + y * columns + x, i_query)
        begin = tl.where(fits, begin + area, begin)
    return i_query


@triton.jit
def tile_of_program(p_shapes, sizes, queries, o: tl.constexpr):
    """Rows (b, q) of this program, int64 [rows], which of them exist, and its image (int64) and head. Tiles of a head follow each other."""
    tiles = tl.cdiv(queries, o.rows)
    i_tile, i_plane = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_head, i_image = i_plane % o.heads, (i_plane // o.heads).to(tl.int64)
    i_query = i_tile * o.rows + tl.arange(0, o.rows)
    used = i_query < queries
    if o.strips:
        i_query = strip_order(i_query, p_shapes, sizes, queries, o)
    return i_image * queries + i_query, used, i_image, i_head


@triton.jit
def load_level(p_shapes, sizes, p_starts, first, i: tl.constexpr, o: tl.constexpr):
    """Height, width and first token of a level, int32, and the first token of the next, int64.

    Sizes and starts on the device may be anything: a level whose tokens int32 cannot count has size 0, and no pixel.
    """
    height, width = _size(p_shapes, sizes, 2 * i, o), _size(p_shapes, sizes, 2 * i + 1, o)
    if o.starts:
        first = tl.load(p_starts + i)
    fits = (height >= 0) & (width >= 0) & (height < INT32_END) & (width < INT32_END) & (first >= -INT32_END) & (first < INT32_END)
    fits = fits & (height * width < INT32_END)
    level = tl.where(fits, height, 0).to(tl.int32), tl.where(fits, width, 0).to(tl.int32), tl.where(fits, first, 0).to(tl.int32)
    return level, first + height * width


@triton.jit
def token_at(x, y, live, level, tokens):
    """Token of pixel (x, y), int32, and whether it counts. The level may promise more tokens than there are."""
    height, width, start = level
    token = start + y * width + x
    return token, live & (x >= 0) & (y >= 0) & (x < width) & (y < height) & (token >= 0) & (token < tokens)


@triton.jit
def bilinear_corner(x, y, weights, live, level, tokens, DX: tl.constexpr, DY: tl.constexpr):
    """Token of one of the four pixels around (x, y), whether it counts, and its linear weights along y and x."""
    token, inside = token_at(x.to(tl.int32) + DX, y.to(tl.int32) + DY, live, level, tokens)
    fx, fy = weights
    return token, inside, fy if DY else 1 - fy, fx if DX else 1 - fx


@triton.jit
def nearest_pixel(position, size):
    """Method "discrete" along one axis: truncated, clamped to the map."""
    last = tl.maximum(size - 1, 0).to(position.dtype)
    pixel = position * size.to(position.dtype) + 0.5
    return tl.minimum(tl.maximum(pixel, 0.0), last).to(tl.int32)


@triton.jit
def frame_of_level(p_reference, i_row, used, level, i: tl.constexpr, o: tl.constexpr, dtype: tl.constexpr):
    """Where samples of a level lie: centre [rows] (x, y) in pixels and what an offset of 1 moves them; without references: locations."""
    height, width, _ = level
    width, height = width.to(dtype), height.to(dtype)
    center_x, center_y = tl.zeros(i_row.shape, dtype), tl.zeros(i_row.shape, dtype)
    scale_x, scale_y = center_x + width, center_y + height
    if o.references > 0:
        p = p_reference + (i_row * o.references + (i if o.references > 1 else 0)) * (4 if o.box else 2)
        center_x = tl.load(p, mask=used, other=0.0) * width
        center_y = tl.load(p + 1, mask=used, other=0.0) * height
        if o.box:
            scale_x = o.shares[i] * tl.load(p + 2, mask=used, other=0.0) * width
            scale_y = o.shares[i] * tl.load(p + 3, mask=used, other=0.0) * height
        else:
            scale_x, scale_y = tl.full(i_row.shape, 1.0, dtype), tl.full(i_row.shape, 1.0, dtype)
    return center_x, center_y, scale_x, scale_y


@triton.jit
def live_position(x, y, frame, level):
    """Floor and fraction of a sample's position in pixels, and whether it is live; at 0 where it is not, NaN included."""
    height, width, _ = level
    center_x, center_y, scale_x, scale_y = frame
    px, py = center_x + x * scale_x - 0.5, center_y + y * scale_y - 0.5
    live = (px > -1) & (py > -1) & (px < width.to(px.dtype)) & (py < height.to(py.dtype))
    px, py = tl.where(live, px, 0.0), tl.where(live, py, 0.0)
    x0, y0 = tl.floor(px), tl.floor(py)
    return x0, y0, (px - x0, py - y0), live


class Problem(NamedTuple):
    """What both ops tell their kernels."""

    value: Tensor
    shapes: Tensor | None
    starts: Tensor | None
    reference: Tensor | None  # None: the samples are locations and weights
    xy: Tensor
    weights: Tensor
    hw: Sequence[int] | None
    num_points: Sequence[int] | None
    method: int
    offset_scale: float

    @property
    def is_degenerate(self) -> bool:
        """Nothing to sample, or sizes beyond what the kernels count: left to the reference."""
        too_large = self.value.shape[1] >= INT32 or (self.hw is not None and max(self.hw, default=0) >= EXACT_FLOATS)
        return too_large or 0 in (*self.value.shape, *self.weights.shape)

    @property
    def references(self) -> int:
        return 0 if self.reference is None else self.reference.shape[2]

    @property
    def numbers(self) -> int:
        """Numbers of a reference."""
        return 2 if self.reference is None else self.reference.shape[3]

    def inputs(self) -> tuple[Tensor, ...]:
        """Pointers of the kernels; the value stands in for a table that is not read."""
        tables = [self.value if table is None else table for table in (self.shapes, self.starts, self.reference)]
        return self.value, *tables, self.xy, self.weights

    def rows(self, dtype: torch.dtype, tile: int = 0) -> int:
        """Queries of a program: `tile` where queries are the pixels, else (and by default) as many as lanes of `dtype` serve at once."""
        lanes = cdiv(triton.next_power_of_2(self.value.shape[3]) * dtype.itemsize, LANE_BYTES)
        return tile if tile and self._in_strips() else min(max(WARPS * 32 // lanes, 1), TILE)

    def grid(self, rows: int) -> tuple[int]:
        batch, queries, heads, _ = self.weights.shape
        return (cdiv(queries, rows) * batch * heads,)

    def arguments(self) -> tuple[Any, ...]:
        """Of both kernels: from `sizes` to the strides."""
        queries, tokens, strides = self.weights.shape[1], self.value.shape[1], self.value.stride()[:2]
        return self._sizes(), queries, tokens, *strides, _row_stride(self.xy), _row_stride(self.weights)

    def options(self, rows: int) -> Options:
        _, tokens, heads, channels = self.value.shape
        points, samples = self._points(), self.weights.shape[3]
        return Options(
            heads,
            points,
            shares=tuple(self.offset_scale / max(count, 1) for count in points),
            method=self.method,
            references=self.references,
            box=self.numbers == 4,
            host=self.hw is not None,
            starts=self.starts is not None,
            strips=self._in_strips(),
            wide=tokens * max(self.value.stride(1), heads * channels) >= INT32,
            levels=len(points),
            samples=samples,
            channels=channels,
            rows=rows,
            block_c=triton.next_power_of_2(channels),
            block_k=triton.next_power_of_2(samples),
        )

    def _in_strips(self) -> bool:
        queries = self.weights.shape[1]
        return queries == self.value.shape[1] and queries < STRIP_END

    def _sizes(self) -> tuple[float, ...]:
        """As floats, of which Triton compiles no variants for 1 and for multiples of 16."""
        return (0.0,) if self.hw is None else tuple(map(float, self.hw))

    def _points(self) -> tuple[int, ...]:
        """Samples of each level."""
        if self.num_points is not None:
            return tuple(self.num_points)
        if self.hw is not None:
            levels = len(self.hw) // 2
        else:
            levels = 0 if self.shapes is None else self.shapes.shape[0]
        return (self.weights.shape[3] // max(levels, 1),) * levels


def _row_stride(samples: Tensor) -> int:
    """Elements from one query to the next; images follow at the same distance."""
    return samples.stride(0) if samples.shape[1] == 1 else samples.stride(1)
