"""Class-aware non-maximum suppression, one program per image. For GPUs without the CUDA kernels."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import on_device, true_div

MIN_BLOCK, MAX_BLOCK = 16, 1024


@triton.jit
def _corners(p_boxes, i_box, mask):
    x1, y1 = tl.load(p_boxes + 4 * i_box, mask=mask, other=0.0), tl.load(p_boxes + 4 * i_box + 1, mask=mask, other=0.0)
    x2, y2 = tl.load(p_boxes + 4 * i_box + 2, mask=mask, other=0.0), tl.load(p_boxes + 4 * i_box + 3, mask=mask, other=0.0)
    return x1, y1, x2, y2


@triton.jit
def _iou(a, b):
    """IoU in torchvision's order of operations; NaN where both areas are 0."""
    w = tl.maximum(tl.minimum(a[2], b[2]) - tl.maximum(a[0], b[0]), 0.0)
    h = tl.maximum(tl.minimum(a[3], b[3]) - tl.maximum(a[1], b[1]), 0.0)
    inter = w * h
    area, areas = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return true_div(inter, area + areas - inter)


@triton.jit(do_not_specialize=["boxes", "slots"])
def batched_nms_kernel(
    p_boxes,  # [B, N, 4], best score first
    p_labels,  # int64 [B, N], in the same order
    p_order,  # int64 [B, N]: index of each of them in the input
    p_alive,  # uint8 [B, N]: whether it takes part; whether it may still be kept
    p_index,  # int64 [B, K], filled with -1
    p_count,  # int64 [B]
    boxes,  # N
    slots,  # K
    IOU_THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program keeps the best box of an image that is alive, ends what it suppresses, and goes on to the next one alive."""
    i_image = tl.program_id(0).to(tl.int64)
    first = i_image * boxes
    p_boxes, p_labels, p_order, p_alive = p_boxes + 4 * first, p_labels + first, p_order + first, p_alive + first
    threshold = tl.full((), IOU_THRESHOLD, tl.float64)  # a comparison with the constant itself would round it to float32
    kept = tl.full((), 0, tl.int32)
    current = tl.where(tl.load(p_alive) > 0, 0, boxes)  # those that take part come first
    while (current < boxes) & (kept < slots):
        tl.store(p_index + i_image * slots + kept, tl.load(p_order + current))
        box, label = _corners(p_boxes, current, True), tl.load(p_labels + current)
        following, start = tl.zeros_like(current) + boxes, current + 1
        while start < boxes:  # a range over a runtime bound does not run in the interpreter
            i_box = start + tl.arange(0, BLOCK)
            alive = tl.load(p_alive + i_box, mask=i_box < boxes, other=0) > 0
            rivals = alive & (tl.load(p_labels + i_box, mask=alive, other=0) == label)
            overlap = _iou(box, _corners(p_boxes, i_box, rivals)).to(tl.float64)
            ended = rivals & (overlap > threshold)
            following = tl.minimum(following, tl.min(tl.where(alive & ~ended, i_box, boxes), 0))
            tl.debug_barrier()
            tl.store(p_alive + i_box, tl.zeros((BLOCK,), tl.uint8), mask=ended)
            start += BLOCK
        tl.debug_barrier()  # the next sweep reads what this one wrote
        current = following
        kept += 1
    tl.store(p_count + i_image, kept.to(tl.int64))


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    counts: Tensor | None,
    iou_threshold: float,
    score_threshold: float,
    max_keep: int,
) -> tuple[Tensor, Tensor]:
    """`ssod_fast::batched_nms`: index int64 [B, K] with -1 in padding, count int64 [B]."""
    batch, n = scores.shape
    index = torch.full((batch, min(max_keep, n)), -1, dtype=torch.int64, device=scores.device)
    count = torch.zeros(batch, dtype=torch.int64, device=scores.device)
    if index.numel() == 0:
        return index, count
    alive = (scores > score_threshold) & boxes.isfinite().all(-1)
    if counts is not None:
        alive &= torch.arange(n, device=scores.device) < counts[:, None]
    order = scores.where(alive, -math.inf).sort(dim=1, descending=True, stable=True).indices  # what takes part comes first: > -inf
    with on_device(scores):
        batched_nms_kernel[(batch,)](
            boxes.gather(1, order[..., None].expand(-1, -1, 4)),
            labels.gather(1, order),
            order,
            alive.gather(1, order).to(torch.uint8),
            *(index, count, n, index.shape[1], iou_threshold),
            BLOCK=min(max(triton.next_power_of_2(n), MIN_BLOCK), MAX_BLOCK),
            enable_fp_fusion=False,  # a contracted product could move an overlap across the threshold
        )
    return index, count
