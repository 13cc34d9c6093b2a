"""Bags of boxes around boxes, with everything that is asked for about them. For GPUs without the CUDA kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._boxes import IOU, MAX
from ..ops.box_deltas import MIN_SIZE
from ..ops.neighborhood_boxes import MIN_AREA, Outputs
from ._bags import clip, factor, image_of_rows, image_size, inside_share, store_box
from ._boxes import NO_FMA, XYXY_, overlap, planes
from ._common import at_least, cdiv, on_device, true_div

BLOCK = 256
AREA_FLOOR, SIZE_FLOOR = tl.constexpr(MIN_AREA), tl.constexpr(MIN_SIZE)
IOU_, MAX_ = tl.constexpr(IOU), tl.constexpr(MAX)


@triton.jit
def _shake(i, FIRST: tl.constexpr, SHAKES: tl.constexpr, COUNT: tl.constexpr, zero):
    """Shift of member i of a bag along an axis in units of its size: of 1 + 4 k + (0 left, 1 right, 2 up, 3 down), two move it."""
    shift = zero
    for k in tl.static_range(COUNT):
        shift = tl.where(i == 1 + 4 * k + FIRST, zero - SHAKES[k], shift)
        shift = tl.where(i == 2 + 4 * k + FIRST, zero + SHAKES[k], shift)
    return shift


@triton.jit
def _axis(low, high, poison, ratio, shake):
    """One axis of the scaled and moved boxes: its ends, its size and what moved it. `poison` makes boxes that are not finite NaN."""
    size = (high - low) * ratio
    shift = size * shake
    moved = (low + high) * 0.5 + poison + shift
    return moved - size * 0.5, moved + size * 0.5, size, shift


@triton.jit
def _deltas(size, shift, source, poison, centre_std, size_std):
    """Deltas of centre and size along one axis from boxes to their source. The difference of the centres is what the shake added."""
    scaled = at_least(size, SIZE_FLOOR)
    centre = true_div(true_div(-shift, scaled), centre_std)
    return centre + poison, true_div(tl.log(true_div(at_least(source, SIZE_FLOOR), scaled)), size_std) + poison


@triton.jit
def neighborhood_boxes_kernel(
    p_boxes,  # [G, 4]
    p_image,  # int64 [G], out of range where a box has no image
    p_hw,  # [B, 2] contiguous
    p_bags,  # [G, P, 4] contiguous, as all that follow
    p_valid,  # bool [G, P]
    p_rois,  # [G * P, 5], written under ROIS
    p_iof,  # [G, P], written under IOF
    p_iou,  # [G, P], written under IOU
    p_targets,  # [G, P, 4], written under STD
    p_clipped,  # [G, P, 4], written under CLIPPED
    rows,  # G * P
    batch,
    stride_row,
    RATIOS: tl.constexpr,  # tuple of R
    SHAKES: tl.constexpr,  # tuple of K
    R: tl.constexpr,
    K: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROIS: tl.constexpr,
    IOF: tl.constexpr,
    IOU: tl.constexpr,
    STD: tl.constexpr,  # tuple of 4, or empty
    TARGETS: tl.constexpr,
    CLIPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One member of a bag per lane."""
    S: tl.constexpr = 1 + 4 * K
    i_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i_row < rows
    i_box, i_bag = i_row // (R * R * S), i_row % (R * R * S)
    p_box = p_boxes + i_box * stride_row
    x1, y1 = tl.load(p_box, mask=mask, other=0.0), tl.load(p_box + 1, mask=mask, other=0.0)
    x2, y2 = tl.load(p_box + 2, mask=mask, other=0.0), tl.load(p_box + 3, mask=mask, other=0.0)
    image, height, width = image_size(p_image, p_hw, i_box, batch, mask)
    zero = tl.zeros((BLOCK,), p_boxes.dtype.element_ty)
    poison = (x1 - x1) + (y1 - y1) + (x2 - x2) + (y2 - y2)
    i_width, i_height, i_shake = i_bag // (R * S), i_bag // S % R, i_bag % S
    a1, a2, a_size, a_shift = _axis(x1, x2, poison, factor(i_width, RATIOS, R, zero), _shake(i_shake, 0, SHAKES, K, zero))
    b1, b2, b_size, b_shift = _axis(y1, y2, poison, factor(i_height, RATIOS, R, zero), _shake(i_shake, 2, SHAKES, K, zero))
    store_box(p_bags + i_row * 4, a1, b1, a2, b2, mask)
    iof = inside_share(a1, b1, a2, b2, width, height, AREA_FLOOR)
    tl.store(p_valid + i_row, iof > THRESHOLD, mask=mask)
    if ROIS:
        tl.store(p_rois + i_row * 5, image.to(zero.dtype), mask=mask)
        store_box(p_rois + i_row * 5 + 1, a1, b1, a2, b2, mask)
    if IOF:
        tl.store(p_iof + i_row, iof, mask=mask)
    if IOU:
        iou = overlap(planes(a1, b1, a2, b2, XYXY_, MAX_), planes(x1, y1, x2, y2, XYXY_, MAX_), IOU_, MAX_, AREA_FLOOR)
        tl.store(p_iou + i_row, iou, mask=mask)
    if TARGETS:
        dx, dw = _deltas(a_size, a_shift, x2 - x1, poison, zero + STD[0], zero + STD[2])
        dy, dh = _deltas(b_size, b_shift, y2 - y1, poison, zero + STD[1], zero + STD[3])
        store_box(p_targets + i_row * 4, dx, dy, dw, dh, mask)
    if CLIPPED:
        store_box(p_clipped + i_row * 4, clip(a1, width), clip(b1, height), clip(a2, width), clip(b2, height), mask)


def neighborhood_boxes(
    boxes: Tensor,
    image_index: Tensor | None,
    offsets: Tensor | None,
    image_hw: Tensor,
    ratios: list[float],
    shakes: list[float],
    iof_threshold: float,
    want_rois: bool,
    want_iof: bool,
    want_iou: bool,
    targets_std: list[float],
    want_clipped: bool,
) -> Outputs:
    """`ssod_fast::neighborhood_boxes`: boxes, valid, rois, iof, iou, targets and clipped boxes; [0] where not asked for."""
    count, size = boxes.shape[0], len(ratios) ** 2 * (1 + 4 * len(shakes))

    def make(wanted: bool, *shape: int) -> Tensor:
        return boxes.new_empty(shape if wanted else (0,))

    bags, valid = make(True, count, size, 4), boxes.new_empty((count, size), dtype=torch.bool)
    extras = (
        make(want_rois, count * size, 5),
        make(want_iof, count, size),
        make(want_iou, count, size),
        make(bool(targets_std), count, size, 4),
        make(want_clipped, count, size, 4),
    )
    if count == 0:
        return bags, valid, *extras
    image = image_of_rows(image_index, offsets, count)
    factors, std = (tuple(ratios), tuple(shakes), len(ratios), len(shakes)), (tuple(targets_std), bool(targets_std))
    with on_device(boxes):
        neighborhood_boxes_kernel[(cdiv(count * size, BLOCK),)](
            *(boxes, image, image_hw, bags, valid, *extras),
            *(count * size, image_hw.shape[0], boxes.stride(0)),
            *(*factors, iof_threshold, want_rois, want_iof, want_iou, *std, want_clipped, BLOCK),
            **NO_FMA,
        )
    return bags, valid, *extras
