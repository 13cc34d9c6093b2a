"""The plan of a mix: which source goes where on which canvas. Drawn on the host, checked there, uploaded in one copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssod_fast.structures import upload

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

FLIP_X = 1
FLIP_Y = 2
WEIGHT_SLACK = 1e-6


class PlaceI(IntEnum):
    """Columns of `ComposePlan.place_i`."""

    SRC = 0
    FLIP = 1
    OFF_X = 2
    OFF_Y = 3
    X0 = 4
    Y0 = 5
    X1 = 6
    Y1 = 7
    OUT_W = 8
    OUT_H = 9
    N_ERASE = 10


class PlaceF(IntEnum):
    """Columns of `ComposePlan.place_f`."""

    INV_X = 0
    INV_Y = 1
    BOX_SX = 2
    BOX_SY = 3
    WEIGHT = 4


@dataclass(frozen=True)
class Placement:
    """One resized source on one canvas.

    Attributes:
        src: index of the source.
        out_hw: (height, width) of the source after resizing.
        offset: (x, y) of its top left corner on the canvas; may be negative.
        inv: (x, y) source pixels per output pixel; rounded to float32, as samplers with a given scale do.
        box_scale: (x, y) factors of the boxes. Apart from `inv` because a size of floor(h * s) goes with boxes times s.
        weight: factor of the pixels in a blend.
        flip: `FLIP_X`, `FLIP_Y`, their sum, or 0; applied after resizing.
        rect: (x0, y0, x1, y1), the visible part on the canvas, half open; by default all of the source that lies on it.
        erase: rectangles (x0, y0, x1, y1), half open, in the frame of the resized and flipped source, painted in the fill colour.
    """

    src: int
    out_hw: tuple[int, int]
    offset: tuple[int, int] = (0, 0)
    inv: tuple[float, float] = (1.0, 1.0)
    box_scale: tuple[float, float] = (1.0, 1.0)
    weight: float = 1.0
    flip: int = 0
    rect: tuple[int, int, int, int] | None = None
    erase: Sequence[tuple[int, int, int, int]] | IntArray = ()

    @classmethod
    def scaled(cls, src: int, src_hw: tuple[int, int], scale: float, **options: Any) -> Placement:
        """Resizes by one factor: size floor(h * s) and at least 1, sampled at 1 / s, boxes times s."""
        height, width = (max(1, math.floor(side * scale)) for side in src_hw)
        return cls(src, (height, width), inv=(1 / scale, 1 / scale), box_scale=(scale, scale), **options)

    @classmethod
    def resized(cls, src: int, src_hw: tuple[int, int], out_hw: tuple[int, int], **options: Any) -> Placement:
        """Resizes to a given size: sampled at in / out, boxes times out / in."""
        inv = (src_hw[1] / out_hw[1], src_hw[0] / out_hw[0])
        return cls(src, out_hw, inv=inv, box_scale=(1 / inv[0], 1 / inv[1]), **options)

    def visible(self, canvas_hw: tuple[int, int]) -> tuple[int, int, int, int]:
        """The visible rectangle on a canvas; all zero if nothing lies on it."""
        if self.rect is not None:
            return self.rect
        (x, y), (height, width) = self.offset, self.out_hw
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, canvas_hw[1]), min(y + height, canvas_hw[0])
        return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else (0, 0, 0, 0)


@dataclass(frozen=True)
class PlanTables:
    """The tables of a plan as tensors on one device, views of one buffer, and the plan that they came from.

    Attributes:
        canvas: int32 [B, 2].
        place_i: int32 [B, K, 11].
        place_f: float32 [B, K, 5].
        erase: int32 [B, K, E, 4].
        erase_canvas: int32 [B, Ec, 4].
        host: the plan.
    """

    canvas: Tensor
    place_i: Tensor
    place_f: Tensor
    erase: Tensor
    erase_canvas: Tensor
    host: ComposePlan


@dataclass(frozen=True, init=False, eq=False)
class ComposePlan:
    """B canvases with K placements each. Checked when it is made, so that the kernels need not check.

    Attributes:
        canvas: int32 [B, 2], true canvas height and width.
        place_i: int32 [B, K, 11], columns :class:`PlaceI`; `src` is -1 where a placement is unused.
        place_f: float32 [B, K, 5], columns :class:`PlaceF`.
        erase: int32 [B, K, E, 4], rectangles x0, y0, x1, y1 per placement, in its own frame after resize and flip.
        erase_canvas: int32 [B, Ec, 4], rectangles per canvas, over everything; pixels only, boxes do not see them.
        max_src: the highest source index, -1 without any.
        reads: (source, height, width) of every visible placement in order: the least size of the source in which each pixel of the resized
            source begins.
        max_canvas: (height, width) that hold every canvas.
        sums_to_one: whether overlapping placements nowhere weigh more than 1 together.

    Raises:
        ValueError: names the table, or the canvas and the placement, that is wrong.
        TypeError: a table has a dtype that does not convert.
    """

    canvas: IntArray
    place_i: IntArray
    place_f: FloatArray
    erase: IntArray
    erase_canvas: IntArray
    max_src: int
    reads: tuple[tuple[int, int, int], ...]
    max_canvas: tuple[int, int]
    sums_to_one: bool

    def __init__(
        self,
        canvas: npt.ArrayLike,
        place_i: npt.ArrayLike,
        place_f: npt.ArrayLike,
        erase: npt.ArrayLike | None = None,
        erase_canvas: npt.ArrayLike | None = None,
    ) -> None:
        canvas_table: IntArray = _table("canvas", canvas, np.int32, (None, 2))
        batch = canvas_table.shape[0]
        int_table: IntArray = _table("place_i", place_i, np.int32, (batch, None, len(PlaceI)))
        places = int_table.shape[1]
        erase = np.zeros((batch, places, 0, 4), np.int32) if erase is None else erase
        erase_canvas = np.zeros((batch, 0, 4), np.int32) if erase_canvas is None else erase_canvas
        self._set("canvas", canvas_table)
        self._set("place_i", int_table)
        self._set("place_f", _table("place_f", place_f, np.float32, (batch, places, len(PlaceF))))
        self._set("erase", _table("erase", erase, np.int32, (batch, places, None, 4)))
        self._set("erase_canvas", _table("erase_canvas", erase_canvas, np.int32, (batch, None, 4)))
        self._check()
        self._set("max_src", int(int_table[..., PlaceI.SRC].max(initial=-1)))
        self._set("reads", self._least_sizes())
        self._set("max_canvas", (int(canvas_table[:, 0].max(initial=0)), int(canvas_table[:, 1].max(initial=0))))
        self._set("sums_to_one", bool((self._weight_sums() <= 1 + WEIGHT_SLACK).all()))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # how a frozen dataclass fills itself

    @classmethod
    def from_placements(
        cls,
        canvas: Sequence[tuple[int, int]],
        placements: Sequence[Sequence[Placement]],
        erase_canvas: npt.ArrayLike | None = None,
    ) -> ComposePlan:
        """Builds the tables from lists.

        Args:
            canvas: (height, width) of each canvas.
            placements: those of each canvas, in drawing order; canvases may have different numbers of them.
            erase_canvas: int32 [B, Ec, 4].
        """
        if len(canvas) != len(placements):
            raise ValueError(f"placements must have one list per canvas, got {len(placements)} for {len(canvas)} canvases")
        places = max((len(row) for row in placements), default=0)
        patches = max((len(p.erase) for row in placements for p in row), default=0)
        tables = blank_tables(len(canvas), places, patches)
        tables["canvas"][:] = np.asarray(canvas, np.int32).reshape(-1, 2)
        for b, row in enumerate(placements):
            for k, placement in enumerate(row):
                _fill(tables, b, k, placement, canvas[b])
        return cls(**tables, erase_canvas=erase_canvas)

    @property
    def batch(self) -> int:
        """Number of canvases."""
        return int(self.canvas.shape[0])

    @property
    def places(self) -> int:
        """Placements per canvas, used or not."""
        return int(self.place_i.shape[1])

    def padded_hw(self, stride: int = 32) -> tuple[int, int]:
        """Height and width that hold every canvas, rounded up to a multiple of `stride`."""
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        height, width = (-(-side // stride) * stride for side in self.max_canvas)
        return height, width

    def pack(self, pin: bool = False) -> Tensor:
        """All tables in one int32 buffer (floats by their bits), in the order of the attributes."""
        parts = [self.canvas, self.place_i, self.place_f.view(np.int32), self.erase, self.erase_canvas]
        buffer = torch.from_numpy(np.concatenate([part.reshape(-1) for part in parts]))
        return buffer.pin_memory() if pin else buffer

    def to(self, device: torch.device | str) -> PlanTables:
        """The tables on `device`: one pinned copy that does not block."""
        buffer = upload(self.pack(), torch.device(device))
        shapes = [t.shape for t in (self.canvas, self.place_i, self.place_f, self.erase, self.erase_canvas)]
        parts = buffer.split([math.prod(shape) for shape in shapes])
        canvas, place_i, place_f, erase, erase_canvas = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        return PlanTables(canvas, place_i, place_f.view(torch.float32), erase, erase_canvas, self)

    def check_weights(self) -> None:
        """Raises ValueError where overlapping placements weigh more than 1 together."""
        if self.sums_to_one:
            return
        sums = self._weight_sums()
        b, k = np.argwhere(sums > 1 + WEIGHT_SLACK)[0]
        total = f"{sums[b, k]:.6g}"
        raise ValueError(f"canvas {b}, placement {k}: its weight and those of what it overlaps sum to {total}, expected at most 1")

    def check_sources(self, n: int) -> None:
        """Raises ValueError where a placement names a source that is not among the `n` given ones."""
        if self.max_src >= n:
            b, k = np.argwhere(self.place_i[..., PlaceI.SRC] >= n)[0]
            raise ValueError(f"canvas {b}, placement {k}: src is {self.place_i[b, k, PlaceI.SRC]}, but there are {n} sources")

    def check_sizes(self, sizes: Sequence[Sequence[int]]) -> None:
        """Raises ValueError where a placement reaches beyond its source; `sizes` are the (height, width) of all sources.

        A source that is larger than the plan was made for passes: only the part that the plan knows is read.
        """
        for i, (src, height, width) in enumerate(self.reads):
            if sizes[src][0] < height or sizes[src][1] < width:
                b, k = np.argwhere(self._used())[i]
                raise ValueError(
                    f"canvas {b}, placement {k}: out_w, out_h and inv need a source of at least {(height, width)} (height, width), "
                    f"but source {src} is {tuple(sizes[src])}"
                )

    def check_out_hw(self, out_hw: tuple[int, int]) -> None:
        """Raises ValueError where a canvas does not fit into the output."""
        if self.max_canvas[0] > out_hw[0] or self.max_canvas[1] > out_hw[1]:
            b = int(np.argwhere((self.canvas > np.asarray(out_hw)).any(1))[0, 0])
            raise ValueError(f"out_hw must hold every canvas, got {out_hw}, but canvas {b} is {tuple(self.canvas[b].tolist())}")

    def _least_sizes(self) -> tuple[tuple[int, int, int], ...]:
        used = self._used()
        place_i, place_f = self.place_i[used], self.place_f[used]
        last = (place_i[:, [PlaceI.OUT_H, PlaceI.OUT_W]] - 1) * place_f[:, [PlaceF.INV_Y, PlaceF.INV_X]].astype(np.float64)
        least = np.minimum(last, np.iinfo(np.int32).max).astype(np.int64) + 1  # where the last output pixel begins, and that pixel
        rows = zip(place_i[:, PlaceI.SRC].tolist(), *least.T.tolist(), strict=True)
        return tuple(rows)

    def _weight_sums(self) -> FloatArray:
        """[B, K]: the largest sum of weights over the points of placement k.

        A sum of half-open rectangles peaks at a point whose x is a left edge and whose y is a top edge, so K*K points per canvas suffice.
        """
        x0, y0, x1, y1 = (self.place_i[..., c] for c in (PlaceI.X0, PlaceI.Y0, PlaceI.X1, PlaceI.Y1))
        weight = np.where(self._used(), self.place_f[..., PlaceF.WEIGHT], 0).astype(np.float64)
        in_x = (x0[:, :, None] >= x0[:, None]) & (x0[:, :, None] < x1[:, None])  # [B, i, k]: left edge of i inside k
        in_y = (y0[:, :, None] >= y0[:, None]) & (y0[:, :, None] < y1[:, None])
        inside = in_x[:, :, None] & in_y[:, None]  # [B, i, j, k]: point (x0_i, y0_j) inside k
        sums = np.einsum("bijk,bk->bij", inside, weight)
        peak: FloatArray = np.where(inside, sums[..., None], 0).max(axis=(1, 2), initial=0)
        return peak

    def _used(self) -> npt.NDArray[np.bool_]:
        x0, y0, x1, y1 = (self.place_i[..., c] for c in (PlaceI.X0, PlaceI.Y0, PlaceI.X1, PlaceI.Y1))
        used: npt.NDArray[np.bool_] = (self.place_i[..., PlaceI.SRC] >= 0) & (x1 > x0) & (y1 > y0)
        return used

    def _check(self) -> None:
        if (self.canvas < 0).any():
            b = int(np.argwhere((self.canvas < 0).any(1))[0, 0])
            raise ValueError(f"canvas {b}: height and width must not be negative, got {tuple(self.canvas[b].tolist())}")
        column = self.place_i.transpose(2, 0, 1)  # [11, B, K]
        used = self._used()
        height, width = self.canvas[:, :1], self.canvas[:, 1:]
        x0, y0, x1, y1 = column[PlaceI.X0], column[PlaceI.Y0], column[PlaceI.X1], column[PlaceI.Y1]
        left, top = column[PlaceI.OFF_X], column[PlaceI.OFF_Y]
        right, bottom = left + column[PlaceI.OUT_W], top + column[PlaceI.OUT_H]
        on_canvas = (x0 >= 0) & (y0 >= 0) & (x1 <= width) & (y1 <= height)
        on_source = (x0 >= left) & (y0 >= top) & (x1 <= right) & (y1 <= bottom)
        n_erase = column[PlaceI.N_ERASE]
        self._require(used, on_canvas, "its visible rectangle leaves the canvas")
        self._require(used, on_source, "its visible rectangle leaves the resized source")
        self._require(used, (column[PlaceI.FLIP] & ~(FLIP_X | FLIP_Y)) == 0, "its flip bits must be 0, 1, 2 or 3")
        self._require(used, (n_erase >= 0) & (n_erase <= self.erase.shape[2]), f"n_erase must lie in [0, {self.erase.shape[2]}]")
        scales = self.place_f[..., : PlaceF.WEIGHT]
        self._require(used, np.all(np.isfinite(scales) & (scales > 0), axis=-1), "inv and box scale must be positive and finite")
        weight = self.place_f[..., PlaceF.WEIGHT]
        self._require(used, np.isfinite(weight) & (weight >= 0), "its weight must be finite and not negative")

    def _require(self, used: npt.NDArray[np.bool_], good: npt.NDArray[np.bool_], message: str) -> None:
        bad = used & ~good
        if bad.any():
            b, k = np.argwhere(bad)[0]
            values = dict(zip((c.name.lower() for c in PlaceI), self.place_i[b, k].tolist(), strict=True))
            floats = dict(zip((c.name.lower() for c in PlaceF), self.place_f[b, k].tolist(), strict=True))
            canvas = tuple(self.canvas[b].tolist())
            raise ValueError(f"canvas {b} {canvas}, placement {k}: {message}, got {values | floats}")


def host_plan(plan: ComposePlan | PlanTables) -> ComposePlan:
    """The plan, or the one that tables came from."""
    if isinstance(plan, PlanTables):
        return plan.host
    if not isinstance(plan, ComposePlan):
        raise TypeError(f"plan must be a ComposePlan or its PlanTables, got {type(plan).__name__}")
    return plan


def blank_tables(batch: int, places: int, patches: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Tables of 1x1 canvases with nothing on them, to be filled and passed on: `ComposePlan(**tables)`."""
    place_i = np.zeros((batch, places, len(PlaceI)), np.int32)
    place_i[..., PlaceI.SRC] = -1
    place_f = np.zeros((batch, places, len(PlaceF)), np.float32)
    erase = np.zeros((batch, places, patches, 4), np.int32)
    return {"canvas": np.ones((batch, 2), np.int32), "place_i": place_i, "place_f": place_f, "erase": erase}


def _fill(tables: dict[str, npt.NDArray[Any]], b: int, k: int, placement: Placement, canvas_hw: tuple[int, int]) -> None:
    """Writes one placement into blank tables."""
    (out_h, out_w), patches = placement.out_hw, len(placement.erase)
    rect = placement.visible(canvas_hw)
    tables["place_i"][b, k] = (placement.src, placement.flip, *placement.offset, *rect, out_w, out_h, patches)
    tables["place_f"][b, k] = (*placement.inv, *placement.box_scale, placement.weight)
    if patches:
        tables["erase"][b, k, :patches] = placement.erase


def _table(name: str, value: npt.ArrayLike, dtype: type, shape: tuple[int | None, ...]) -> Any:
    """`value` as a contiguous array of `dtype`, its shape checked; None matches any length."""
    array = np.asarray(value)
    matches = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=False))
    if not matches:
        expected = ["*" if want is None else want for want in shape]
        raise ValueError(f"{name} must have the shape {expected}, got {list(array.shape)}")
    if not np.can_cast(array.dtype, dtype, casting="same_kind"):
        raise TypeError(f"{name} must be {np.dtype(dtype)}, got {array.dtype}")
    return np.ascontiguousarray(array, dtype)


@dataclass(frozen=True)
class BoxRule:
    """Which boxes survive the mix, and how much they count.

    Attributes:
        erase_thr: a box is dropped when this share of it or more is erased.
        erase_overlap: "sum" counts patches that overlap each other twice, "union" once.
        min_visibility: least share of a box that must stay visible.
        min_wh: width and height must be greater than this many pixels; None keeps boxes of any size.
        propagate_weight: multiply the weight of a box by the weight of its placement.
    """

    erase_thr: float = 0.7
    erase_overlap: Literal["sum", "union"] = "sum"
    min_visibility: float = 0.1
    min_wh: float | None = 1.0  # torchvision detectors refuse degenerate boxes
    propagate_weight: bool = False

    def __post_init__(self) -> None:
        if not self.erase_thr > 0:
            raise ValueError(f"erase_thr must be positive, got {self.erase_thr}")
        if self.erase_overlap not in ("sum", "union"):
            raise ValueError(f"erase_overlap must be 'sum' or 'union', got {self.erase_overlap!r}")
        if not 0 <= self.min_visibility <= 1:
            raise ValueError(f"min_visibility must lie in [0, 1], got {self.min_visibility}")
        if self.min_wh is not None and not self.min_wh >= 0:
            raise ValueError(f"min_wh must not be negative, got {self.min_wh}")

    @classmethod
    def mixpl(cls) -> BoxRule:
        """MixPL's own rule: only the erased share counts (arXiv 2312.07006, official code)."""
        return cls(erase_thr=0.7, erase_overlap="sum", min_visibility=0.0, min_wh=None)
