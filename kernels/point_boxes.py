"""Bags of boxes around points. For GPUs without the CUDA kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.point_boxes import CLAMP, IGNORE, MIN_AREA, SYMMETRY
from ._bags import clip, factor, image_of_rows, image_size, inside_share, lower_or_nan, store_box
from ._boxes import NO_FMA
from ._common import at_least, cdiv, on_device, true_div

BLOCK = 256
SYMMETRY_, CLAMP_, IGNORE_ = tl.constexpr(SYMMETRY), tl.constexpr(CLAMP), tl.constexpr(IGNORE)
AREA_FLOOR = tl.constexpr(MIN_AREA)


@triton.jit
def _axis(centre, side, limit, CUT: tl.constexpr):
    """Both ends along one axis of boxes around `centre`, cut at the image's edges 0 and `limit`."""
    if CUT == SYMMETRY_:
        side = at_least(lower_or_nan(side, lower_or_nan(2.0 * centre, 2.0 * (limit - centre))), 0.0)
    low, high = centre - side * 0.5, centre + side * 0.5
    if CUT == CLAMP_:
        low, high = clip(low, limit), clip(high, limit)
    return low, high


@triton.jit
def point_boxes_kernel(
    p_points,  # [G, 2]
    p_image,  # int64 [G], out of range where a point has no image
    p_hw,  # [B, 2] contiguous
    p_boxes,  # [G, M, 4] contiguous
    p_valid,  # bool [G, M] contiguous
    rows,  # G * M
    batch,
    stride_row,
    SCALES: tl.constexpr,  # tuple of S
    RATIOS: tl.constexpr,  # tuple of R
    S: tl.constexpr,
    R: tl.constexpr,
    CUT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One box per lane."""
    i_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i_row < rows
    i_point, i_bag = i_row // (S * R), i_row % (S * R)
    x = tl.load(p_points + i_point * stride_row, mask=mask, other=0.0)
    y = tl.load(p_points + i_point * stride_row + 1, mask=mask, other=0.0)
    poison = (x - x) + (y - y)  # NaN where the point is not finite
    _, height, width = image_size(p_image, p_hw, i_point, batch, mask)
    zero = tl.zeros((BLOCK,), p_points.dtype.element_ty)
    size = factor(i_bag // R, SCALES, S, zero) * true_div(lower_or_nan(width, height), zero + 100.0)
    ratio = factor(i_bag % R, RATIOS, R, zero)
    x1, x2 = _axis(x + poison, size * ratio, width, CUT)
    y1, y2 = _axis(y + poison, true_div(size, tl.where(mask, ratio, 1.0)), height, CUT)
    store_box(p_boxes + i_row * 4, x1, y1, x2, y2, mask)
    if CUT == IGNORE_:
        valid = inside_share(x1, y1, x2, y2, width, height, AREA_FLOOR) > THRESHOLD
    else:
        valid = (x2 - x1) * (y2 - y1) > 0
    tl.store(p_valid + i_row, valid, mask=mask)


def point_boxes(
    points: Tensor,
    image_index: Tensor | None,
    offsets: Tensor | None,
    image_hw: Tensor,
    scales: list[float],
    ratios: list[float],
    cut: int,
    iof_threshold: float,
) -> tuple[Tensor, Tensor]:
    """`ssod_fast::point_boxes`: boxes [G, M, 4] and valid bool [G, M]."""
    count, size = points.shape[0], len(scales) * len(ratios)
    boxes, valid = points.new_empty((count, size, 4)), points.new_empty((count, size), dtype=torch.bool)
    if count == 0:
        return boxes, valid
    image = image_of_rows(image_index, offsets, count)
    with on_device(points):
        point_boxes_kernel[(cdiv(count * size, BLOCK),)](
            *(points, image, image_hw, boxes, valid, count * size, image_hw.shape[0], points.stride(0)),
            *(tuple(scales), tuple(ratios), len(scales), len(ratios), cut, iof_threshold, BLOCK),
            **NO_FMA,
        )
    return boxes, valid
