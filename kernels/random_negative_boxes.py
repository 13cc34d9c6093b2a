"""Random boxes and whether they overlap no positive, without the matrix of overlaps. For GPUs without the CUDA kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._boxes import IOU, MAX
from ..ops.random_negative_boxes import _IOU, MARGIN
from ._bags import store_box
from ._boxes import NO_FMA, XYXY_, load_box, overlap, planes
from ._common import cdiv, on_device

ROWS, COLUMNS = 8, 128
IOU_, MAX_, EPS_ = tl.constexpr(IOU), tl.constexpr(MAX), tl.constexpr(_IOU.eps)
BEFORE, WHOLE = tl.constexpr(-MARGIN), tl.constexpr(1 + MARGIN)


@triton.jit
def _spread(size, u_low, u_high):
    """Both ends along one axis of boxes that may start a margin before an image of that size and end a margin behind it."""
    whole = size * WHOLE
    low = size * BEFORE + whole * u_low
    return low, low + (whole - low) * u_high


@triton.jit
def random_negative_boxes_kernel(
    p_uniforms,  # [B, N, 4]
    p_hw,  # [B, 2] contiguous
    p_positives,  # [G, 4] contiguous
    p_offsets,  # int64 [B + 1], of bags of `per_bag` positives
    p_boxes,  # [B, N, 4] contiguous
    p_keep,  # bool [B, N] contiguous
    p_maxima,  # [B, N] contiguous, written under RETURN_MAX
    count,  # N
    bags,
    per_bag,
    stride_batch,
    stride_row,
    THRESHOLD: tl.constexpr,
    RETURN_MAX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program makes and judges ROWS boxes of one image; without RETURN_MAX it stops when all of them have been hit."""
    blocks = tl.cdiv(count, ROWS)  # all along the first axis of the grid: the others end at 65535
    i_image = (tl.program_id(0) // blocks).to(tl.int64)
    i_row = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    rows = i_row < count
    p_u = p_uniforms + i_image * stride_batch + i_row * stride_row
    x1, x2 = _spread(tl.load(p_hw + i_image * 2 + 1), tl.load(p_u, mask=rows, other=0.0), tl.load(p_u + 2, mask=rows, other=0.0))
    y1, y2 = _spread(tl.load(p_hw + i_image * 2), tl.load(p_u + 1, mask=rows, other=0.0), tl.load(p_u + 3, mask=rows, other=0.0))
    i_out = i_image * count + i_row
    store_box(p_boxes + i_out * 4, x1, y1, x2, y2, rows)
    mine = planes(x1, y1, x2, y2, XYXY_, MAX_)
    start = tl.minimum(tl.maximum(tl.load(p_offsets + i_image), 0), bags) * per_bag
    stop = tl.minimum(tl.maximum(tl.load(p_offsets + i_image + 1), 0), bags) * per_bag
    keep = rows | (rows == 0)
    best = tl.zeros((ROWS, 1), p_uniforms.dtype.element_ty)
    while start < stop:
        i_column = start + tl.arange(0, COLUMNS).to(tl.int64)[None, :]
        columns = i_column < stop
        theirs = load_box(p_positives, p_positives, i_column * 4, i_column, columns, XYXY_, MAX_, IOU_)
        value = overlap(mine, theirs, IOU_, MAX_, EPS_)
        hit = columns & ((value < THRESHOLD) == 0)  # NaN is not below
        keep = keep & (tl.max(hit.to(tl.int32), axis=1) == 0)[:, None]
        start += COLUMNS
        if RETURN_MAX:
            best = tl.maximum(best, tl.max(tl.where(columns & (value > 0), value, 0.0), axis=1)[:, None])
        else:
            start = tl.where(tl.sum((keep & rows).to(tl.int32)) == 0, stop, start)
    tl.store(p_keep + i_out, keep, mask=rows)
    if RETURN_MAX:
        tl.store(p_maxima + i_out, best, mask=rows)


def random_negative_boxes(
    uniforms: Tensor, image_hw: Tensor, positives: Tensor, offsets: Tensor, threshold: float, return_max: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`ssod_fast::random_negative_boxes`: boxes [B, N, 4], keep bool [B, N], and maxima [B, N] or an empty tensor."""
    batch, count = uniforms.shape[:2]
    boxes, keep = uniforms.new_empty((batch, count, 4)), uniforms.new_empty((batch, count), dtype=torch.bool)
    maxima = uniforms.new_empty((batch, count) if return_max else (0,))
    if keep.numel() == 0:
        return boxes, keep, maxima
    with on_device(uniforms):
        random_negative_boxes_kernel[(cdiv(count, ROWS) * batch,)](
            *(uniforms, image_hw, positives.contiguous(), offsets, boxes, keep, maxima),
            *(count, positives.shape[0], positives.shape[1], *uniforms.stride()[:2]),
            *(threshold, return_max, ROWS, COLUMNS),
            **NO_FMA,
        )
    return boxes, keep, maxima
