"""compose_images and cache_write: one program per tile of a canvas, all channels, every pixel written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssod_fast.structures import upload

from ._common import cdiv, on_device, true_div

BLOCK_Y, BLOCK_X = 8, 128  # a warp covers one row of a float32 tile with 16-byte stores
COPY_BLOCK = 4096
BILINEAR, BILINEAR_AA = tl.constexpr(1), tl.constexpr(2)
FLIP_X, FLIP_Y = tl.constexpr(1), tl.constexpr(2)
PLACE_I, PLACE_F = tl.constexpr(11), tl.constexpr(5)  # columns of the plan's tables
TABLE = tl.constexpr(6)  # columns of the source table: address, strides of channel, row and column (elements), height, width

TRITON_TYPES = {torch.uint8: tl.uint8, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# Integers that differ from call to call: no kernel variant for each of their values.
BLOCK_FIELDS = ("address", "image", "channel", "row", "column", "height", "width")
PER_CALL = ["places", "patches", "patches_canvas", "n0", *(f"{name}{i}" for i in range(2) for name in BLOCK_FIELDS)]


@triton.jit
def _listed_source(p_table, src):
    """Address, strides and size of a source of its own."""
    row = p_table + src.to(tl.int64) * TABLE
    height, width = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), height, width


@triton.jit
def _block_source(p_sizes, src, first, block):
    """The same for image `src - first` of a dense block; its `stride_n` counts bytes."""
    address, stride_n, stride_c, stride_y, stride_x, block_h, block_w = block
    height = tl.minimum(tl.maximum(tl.load(p_sizes + 2 * src), 1), block_h)
    width = tl.minimum(tl.maximum(tl.load(p_sizes + 2 * src + 1), 1), block_w)
    address = tl.cast(address, tl.int64) + (src - first).to(tl.int64) * stride_n
    return address, tl.cast(stride_c, tl.int64), tl.cast(stride_y, tl.int64), tl.cast(stride_x, tl.int64), height, width


@triton.jit
def _linear_taps(u, inv, size):
    """Two neighbours and the weight of the second; pixel centres at half integers."""
    f = tl.maximum((u.to(tl.float32) + 0.5) * inv - 0.5, 0.0)
    floor_f = tl.floor(f)
    i0 = floor_f.to(tl.int32)
    return tl.minimum(i0, size - 1), tl.minimum(i0 + 1, size - 1), f - floor_f


@triton.jit
def _triangle_taps(u, radius, inv, size):
    """First and last + 1 source index under a triangle of that radius, and its centre; low >= high where it lies beyond the source."""
    centre = inv * (u.to(tl.float32) + 0.5)
    centre = tl.where(inv > 1.0, centre, tl.minimum(centre, size - 0.5))  # bilinear repeats the border beyond the source
    low = tl.maximum(centre - radius + 0.5, 0.0).to(tl.int32)
    high = tl.minimum((centre + radius + 0.5).to(tl.int32), size)
    return low, high, centre


@triton.jit
def _triangle_weight(j, low, high, centre, radius):
    weight = tl.maximum(1.0 - tl.abs(true_div(j.to(tl.float32) - centre + 0.5, radius)), 0.0)
    return tl.where((j >= low) & (j < high), weight, 0.0)


@triton.jit
def _triangle_total(low, high, centre, radius):
    total = tl.zeros_like(centre)
    tap = 0
    while tap < (2.0 * radius).to(tl.int32) + 2:
        total += _triangle_weight(low + tap, low, high, centre, radius)
        tap += 1
    return tl.where(total > 0, total, 1.0)  # no tap at all: beyond the source, the sample is 0


@triton.jit
def _read(p_source, rows, cols, stride_c, c0, c1, c2, seen):
    """The three output channels of the source pixels (rows, cols), given as offsets."""
    p_pixel = p_source + (rows + cols)
    v0 = tl.load(p_pixel + c0 * stride_c, mask=seen, other=0).to(tl.float32)
    v1 = tl.load(p_pixel + c1 * stride_c, mask=seen, other=0).to(tl.float32)
    v2 = tl.load(p_pixel + c2 * stride_c, mask=seen, other=0).to(tl.float32)
    return v0, v1, v2


@triton.jit
def _lerp(a0, a1, a2, b0, b1, b2, t):
    return a0 + t * (b0 - a0), a1 + t * (b1 - a1), a2 + t * (b2 - a2)


@triton.jit
def _sample_nearest(p_source, v, u, inv_y, inv_x, height, width, stride_c, stride_y, stride_x, c0, c1, c2, seen):
    rows = tl.minimum((v.to(tl.float32) * inv_y).to(tl.int32), height - 1).to(tl.int64) * stride_y
    cols = tl.minimum((u.to(tl.float32) * inv_x).to(tl.int32), width - 1).to(tl.int64) * stride_x
    return _read(p_source, rows, cols, stride_c, c0, c1, c2, seen)


@triton.jit
def _sample_linear(p_source, v, u, inv_y, inv_x, height, width, stride_c, stride_y, stride_x, c0, c1, c2, seen):
    y0, y1, ty = _linear_taps(v, inv_y, height)
    x0, x1, tx = _linear_taps(u, inv_x, width)
    y0, y1 = y0.to(tl.int64) * stride_y, y1.to(tl.int64) * stride_y
    x0, x1 = x0.to(tl.int64) * stride_x, x1.to(tl.int64) * stride_x
    a0, a1, a2 = _read(p_source, y0, x0, stride_c, c0, c1, c2, seen)
    right, below = seen & (tx > 0), seen & (ty > 0)  # without weight a neighbour is not read: its NaN stays where it is
    b0, b1, b2 = _read(p_source, y0, x1, stride_c, c0, c1, c2, right)
    a0, a1, a2 = _lerp(a0, a1, a2, b0, b1, b2, tx)
    d0, d1, d2 = _read(p_source, y1, x0, stride_c, c0, c1, c2, below)
    e0, e1, e2 = _read(p_source, y1, x1, stride_c, c0, c1, c2, below & right)
    d0, d1, d2 = _lerp(d0, d1, d2, e0, e1, e2, tx)
    return _lerp(a0, a1, a2, d0, d1, d2, ty)


@triton.jit
def _sample_triangle(p_source, v, u, inv_y, inv_x, height, width, stride_c, stride_y, stride_x, c0, c1, c2, seen):
    """Antialiased; an axis that does not shrink has radius 1, which is bilinear."""
    radius_y, radius_x = tl.maximum(inv_y, 1.0), tl.maximum(inv_x, 1.0)
    low_y, high_y, centre_y = _triangle_taps(v, radius_y, inv_y, height)
    low_x, high_x, centre_x = _triangle_taps(u, radius_x, inv_x, width)
    total_y = _triangle_total(low_y, high_y, centre_y, radius_y)
    total_x = _triangle_total(low_x, high_x, centre_x, radius_x)
    s0 = tl.zeros(seen.shape, tl.float32)
    s1, s2 = s0, s0
    tap_y = 0
    while tap_y < (2.0 * radius_y).to(tl.int32) + 2:
        j_y = low_y + tap_y
        w_y = true_div(_triangle_weight(j_y, low_y, high_y, centre_y, radius_y), total_y)
        rows = tl.minimum(j_y, height - 1).to(tl.int64) * stride_y
        tap_x = 0
        while tap_x < (2.0 * radius_x).to(tl.int32) + 2:
            j_x = low_x + tap_x
            weight = w_y * true_div(_triangle_weight(j_x, low_x, high_x, centre_x, radius_x), total_x)
            cols = tl.minimum(j_x, width - 1).to(tl.int64) * stride_x
            v0, v1, v2 = _read(p_source, rows, cols, stride_c, c0, c1, c2, seen & (weight > 0))
            s0, s1, s2 = s0 + weight * v0, s1 + weight * v1, s2 + weight * v2
            tap_x += 1
        tap_y += 1
    return s0, s1, s2


@triton.jit
def _sample(p_source, v, u, inv_y, inv_x, height, width, stride_c, stride_y, stride_x, c0, c1, c2, seen, INTERP: tl.constexpr):
    """The three channels at positions (v, u) of the resized source, by one of the rules."""
    if INTERP == BILINEAR_AA:
        if (inv_x > 1.0) | (inv_y > 1.0):
            s0, s1, s2 = _sample_triangle(p_source, v, u, inv_y, inv_x, height, width, stride_c, stride_y, stride_x, c0, c1, c2, seen)
        else:
            s0, s1, s2 = _sample_linear(p_source, v, u, inv_y, inv_x, height, width, stride_c, stride_y, stride_x, c0, c1, c2, seen)
    elif INTERP == BILINEAR:
        s0, s1, s2 = _sample_linear(p_source, v, u, inv_y, inv_x, height, width, stride_c, stride_y, stride_x, c0, c1, c2, seen)
    else:
        s0, s1, s2 = _sample_nearest(p_source, v, u, inv_y, inv_x, height, width, stride_c, stride_y, stride_x, c0, c1, c2, seen)
    return s0, s1, s2


@triton.jit
def _inside(p_rect, y, x, dy, dx):
    """Pixels in a half-open rectangle moved by (dx, dy)."""
    x0, y0, x1, y1 = tl.load(p_rect), tl.load(p_rect + 1), tl.load(p_rect + 2), tl.load(p_rect + 3)
    return (x >= x0 + dx) & (x < x1 + dx) & (y >= y0 + dy) & (y < y1 + dy)


@triton.jit
def _touches(p_rect, tile_y, tile_x, dy, dx, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Whether the moved rectangle meets the tile: the same answer for all of its pixels."""
    x0, y0, x1, y1 = tl.load(p_rect), tl.load(p_rect + 1), tl.load(p_rect + 2), tl.load(p_rect + 3)
    in_x = (x0 + dx < tile_x + BLOCK_X) & (x1 + dx > tile_x)
    return in_x & (y0 + dy < tile_y + BLOCK_Y) & (y1 + dy > tile_y)


@triton.jit
def _erased(p_rects, count, y, x, tile_y, tile_x, dy, dx, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Pixels of the tile in any of `count` rectangles."""
    erased = (y < 0) & (x < 0)  # nothing, in the tile's shape
    e = 0
    while e < count:
        if _touches(p_rects + 4 * e, tile_y, tile_x, dy, dx, BLOCK_Y, BLOCK_X):
            erased = erased | _inside(p_rects + 4 * e, y, x, dy, dx)
        e += 1
    return erased


@triton.jit
def _source(p_table, p_sizes, src, n0, block0, block1, RAGGED: tl.constexpr):
    """Address, strides and size of source `src`: one of a list, or an image of one of two dense blocks."""
    if RAGGED:
        address, stride_c, stride_y, stride_x, height, width = _listed_source(p_table, src)
    else:
        if src < n0:
            address, stride_c, stride_y, stride_x, height, width = _block_source(p_sizes, src, 0, block0)
        else:
            address, stride_c, stride_y, stride_x, height, width = _block_source(p_sizes, src, n0, block1)
    return address, stride_c, stride_y, stride_x, height, width


@triton.jit
def _placed(p_place, p_scale, source, y, x, SOURCE: tl.constexpr, INTERP: tl.constexpr, SWAP_RB: tl.constexpr):
    """The three channels of a placement at the canvas pixels (y, x), and which of them it covers."""
    address, stride_c, stride_y, stride_x, height, width = source
    flip, off_x, off_y = tl.load(p_place + 1), tl.load(p_place + 2), tl.load(p_place + 3)
    out_size_x, out_size_y = tl.load(p_place + 8), tl.load(p_place + 9)
    inv_x, inv_y = tl.load(p_scale), tl.load(p_scale + 1)
    seen = _inside(p_place + 4, y, x, 0, 0)
    u = tl.where((flip & FLIP_X) > 0, out_size_x - 1 - (x - off_x), x - off_x)
    v = tl.where((flip & FLIP_Y) > 0, out_size_y - 1 - (y - off_y), y - off_y)
    c0, c2 = 2 * SWAP_RB, 2 - 2 * SWAP_RB
    p_source = address.to(tl.pointer_type(SOURCE))
    s0, s1, s2 = _sample(p_source, v, u, inv_y, inv_x, height, width, stride_c, stride_y, stride_x, c0, 1, c2, seen, INTERP)
    return s0, s1, s2, seen


@triton.jit
def _blend(b, s, weight, seen, OVER: tl.constexpr):
    """What lies below, with a placement over it or mixed into it."""
    if OVER:
        b = tl.where(seen, s, b)
    else:
        b = tl.where(seen, b + weight * s, b)
    return b


@triton.jit
def _write_channel(p, value, mask, BYTES: tl.constexpr):
    if BYTES:
        value = tl.where(value > 0, tl.minimum(value, 255.0), 0.0)  # NaN becomes 0
        value = (value + 8388608.0) - 8388608.0  # 2^23: rounds to an integer, half to even
        value = value.to(tl.int32)
    tl.store(p, value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def _write(p_out, b_0, b_1, b_2, y, x, out_h, out_w, CHANNELS_LAST: tl.constexpr, BYTES: tl.constexpr):
    """Stores the pixels of a tile that lie in the output."""
    inside = (y < out_h) & (x < out_w)
    if CHANNELS_LAST:
        p_pixel = p_out + (y.to(tl.int64) * out_w + x) * 3
        step = tl.cast(1, tl.int64)
    else:
        p_pixel = p_out + (y.to(tl.int64) * out_w + x)
        step = tl.cast(out_h, tl.int64) * out_w
    _write_channel(p_pixel, b_0, inside, BYTES)
    _write_channel(p_pixel + step, b_1, inside, BYTES)
    _write_channel(p_pixel + 2 * step, b_2, inside, BYTES)


@triton.jit(do_not_specialize=PER_CALL)
def compose_images_kernel(
    p_out,  # [B, 3, out_h, out_w], planar or channels last
    p_table,  # int64 [S, 6], RAGGED only
    p_sizes,  # int32 [S, 2], dense blocks only
    p_canvas,  # int32 [B, 2]
    p_place_i,  # int32 [B, K, 11]
    p_place_f,  # float32 [B, K, 5]
    p_erase,  # int32 [B, K, E, 4]
    p_erase_canvas,  # int32 [B, Ec, 4]
    places,
    patches,
    patches_canvas,
    n0,  # images in the first dense block
    address0,
    image0,
    channel0,
    row0,
    column0,
    height0,
    width0,
    address1,
    image1,
    channel1,
    row1,
    column1,
    height1,
    width1,
    out_h,
    out_w,
    mean0,
    mean1,
    mean2,
    std0,
    std1,
    std2,
    blank0,  # the normalised fill colour
    blank1,
    blank2,
    pad_value,
    RAGGED: tl.constexpr,
    SOURCE: tl.constexpr,  # dtype of the sources
    INTERP: tl.constexpr,
    OVER: tl.constexpr,
    SWAP_RB: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One program writes one BLOCK_Y x BLOCK_X tile of one canvas; placements and patches that miss the tile cost one test."""
    i_b = tl.program_id(2)
    tile_y, tile_x = tl.program_id(1) * BLOCK_Y, tl.program_id(0) * BLOCK_X
    y = tile_y + tl.arange(0, BLOCK_Y)[:, None]
    x = tile_x + tl.arange(0, BLOCK_X)[None, :]
    block0 = (address0, image0, channel0, row0, column0, height0, width0)
    block1 = (address1, image1, channel1, row1, column1, height1, width1)
    b_0 = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    b_1, b_2, b_weight = b_0, b_0, b_0
    k = 0
    while k < places:
        place = i_b * places + k
        p_place, p_scale = p_place_i + place * PLACE_I, p_place_f + place * PLACE_F
        src = tl.load(p_place)
        if (src >= 0) & _touches(p_place + 4, tile_y, tile_x, 0, 0, BLOCK_Y, BLOCK_X):
            source = _source(p_table, p_sizes, src, n0, block0, block1, RAGGED)
            s0, s1, s2, seen = _placed(p_place, p_scale, source, y, x, SOURCE, INTERP, SWAP_RB)
            p_patches, n_erase = p_erase + place.to(tl.int64) * patches * 4, tl.load(p_place + 10)
            off_x, off_y = tl.load(p_place + 2), tl.load(p_place + 3)
            erased = _erased(p_patches, n_erase, y, x, tile_y, tile_x, off_y, off_x, BLOCK_Y, BLOCK_X)
            s0 = tl.where(erased, blank0, true_div(s0 - mean0, std0))
            s1 = tl.where(erased, blank1, true_div(s1 - mean1, std1))
            s2 = tl.where(erased, blank2, true_div(s2 - mean2, std2))
            weight = tl.load(p_scale + 4)
            b_0, b_1, b_2 = _blend(b_0, s0, weight, seen, OVER), _blend(b_1, s1, weight, seen, OVER), _blend(b_2, s2, weight, seen, OVER)
            b_weight = _blend(b_weight, tl.full(seen.shape, 1.0, tl.float32), weight, seen, OVER)
        k += 1
    erased = _erased(p_erase_canvas + i_b * patches_canvas * 4, patches_canvas, y, x, tile_y, tile_x, 0, 0, BLOCK_Y, BLOCK_X)
    b_0 = tl.where(erased, blank0, b_0 + (1.0 - b_weight) * blank0)
    b_1 = tl.where(erased, blank1, b_1 + (1.0 - b_weight) * blank1)
    b_2 = tl.where(erased, blank2, b_2 + (1.0 - b_weight) * blank2)
    image = (y < tl.load(p_canvas + 2 * i_b)) & (x < tl.load(p_canvas + 2 * i_b + 1))
    b_0, b_1, b_2 = tl.where(image, b_0, pad_value), tl.where(image, b_1, pad_value), tl.where(image, b_2, pad_value)
    p_canvas_out = p_out + i_b.to(tl.int64) * 3 * tl.cast(out_h, tl.int64) * out_w
    _write(p_canvas_out, b_0, b_1, b_2, y, x, out_h, out_w, CHANNELS_LAST, BYTES)


@triton.jit(do_not_specialize=["capacity"])
def cache_write_kernel(p_ring, p_table, p_slots, capacity, SOURCE: tl.constexpr, BLOCK: tl.constexpr):
    """One program packs BLOCK values of one image into its slot, whatever the strides of the image."""
    i_image = tl.program_id(1)
    address, stride_c, stride_y, stride_x, height, width = _listed_source(p_table, i_image)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < 3 * height * width
    row, column = i // width, i % width
    offset = (row // height) * stride_c + (row % height) * stride_y + column * stride_x
    value = tl.load(address.to(tl.pointer_type(SOURCE)) + offset, mask=inside, other=0)
    tl.store(p_ring + tl.load(p_slots + i_image) * capacity + i, value, mask=inside)


def compose_images(
    sources: list[Tensor],
    sizes: Tensor | None,
    canvas: Tensor,
    place_i: Tensor,
    place_f: Tensor,
    erase: Tensor,
    erase_canvas: Tensor,
    out_h: int,
    out_w: int,
    mean: list[float],
    std: list[float],
    fill: list[float],
    interp: int,
    over: bool,
    out_dtype: torch.dtype,
    pad_value: float,
    channels_last: bool,
    swap_rb: bool,
) -> Tensor:
    """Launches the kernel; arguments as in the schema of `ssod_fast::compose_images`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((canvas.shape[0], 3, out_h, out_w), dtype=out_dtype, device=canvas.device, memory_format=layout)
    if out.numel() == 0:
        return out
    ragged = sizes is None
    table = source_table(sources, canvas.device) if ragged else canvas  # a pointer that is not read
    blocks = [] if ragged else list(sources)
    grid = (cdiv(out_w, BLOCK_X), cdiv(out_h, BLOCK_Y), canvas.shape[0])
    with on_device(canvas):
        compose_images_kernel[grid](
            *(out, table, canvas if sizes is None else sizes.contiguous(), canvas.contiguous()),
            *(place_i.contiguous(), place_f.contiguous(), erase.contiguous(), erase_canvas.contiguous()),
            *(place_i.shape[1], erase.shape[2], erase_canvas.shape[1]),
            *(blocks[0].shape[0] if blocks else 0, *_block_args(blocks[:1]), *_block_args(blocks[1:])),
            *(out_h, out_w),
            *(mean + std + _blank(mean, std, fill)),
            pad_value,
            RAGGED=ragged,
            SOURCE=TRITON_TYPES[sources[0].dtype] if sources else tl.float32,
            INTERP=interp,
            OVER=over,
            SWAP_RB=int(swap_rb),
            CHANNELS_LAST=channels_last,
            BYTES=out_dtype == torch.uint8,
            BLOCK_Y=BLOCK_Y,
            BLOCK_X=BLOCK_X,
            num_warps=4,
            enable_fp_fusion=False,  # the rounding of the index arithmetic decides which pixel is read
        )
    return out


def cache_write(ring: Tensor, images: list[Tensor], slots: list[int]) -> None:
    """Launches the kernel; arguments as in the schema of `ssod_fast::cache_write`."""
    table = source_table(images, ring.device)
    p_slots = upload(torch.tensor(slots, dtype=torch.int64), ring.device)
    grid = (cdiv(max(image.numel() for image in images), COPY_BLOCK), len(images))
    with on_device(ring):
        cache_write_kernel[grid](ring, table, p_slots, ring.stride(0), SOURCE=TRITON_TYPES[ring.dtype], BLOCK=COPY_BLOCK)


def source_table(sources: list[Tensor], device: torch.device) -> Tensor:
    """int64 [S, 6]: where each [3, h, w] source lies. Its addresses hold for this call only, so a CUDA graph must not record it."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a list of sources cannot be captured in a CUDA graph: its addresses change; pass dense blocks and sizes")
    rows = [(s.data_ptr(), *s.stride(), s.shape[1], s.shape[2]) for s in sources]
    return upload(torch.tensor(rows, dtype=torch.int64).view(-1, TABLE.value), device)


def _block_args(blocks: list[Tensor]) -> tuple[int, ...]:
    """Address, strides (that of an image in bytes) and size of a dense block; zeros where there is none."""
    if not blocks:
        return (0,) * 7
    (block,) = blocks
    stride_n, *strides = block.stride()
    return (block.data_ptr(), stride_n * block.element_size(), *strides, *block.shape[2:])


def _blank(mean: list[float], std: list[float], fill: list[float]) -> list[Any]:
    """The fill colour in float32 arithmetic, as in the other implementations."""
    f, m, s = (torch.tensor(values, dtype=torch.float32) for values in (fill, mean, std))
    return ((f - m) / s).tolist()
