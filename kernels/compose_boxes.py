"""compose_boxes: one program per canvas, all boxes of a placement at once, a prefix sum for their rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssod_fast.ops.compose_boxes import Outputs, reference

from ._common import on_device, true_div

AREA_EPS = tl.constexpr(1e-7)  # added to areas that divide, as in MixPL's erase filter
FLIP_X, FLIP_Y = tl.constexpr(1), tl.constexpr(2)
PLACE_I, PLACE_F = tl.constexpr(11), tl.constexpr(5)  # columns of the plan's tables


@triton.jit
def _area(x1, y1, x2, y2):
    return tl.maximum(x2 - x1, 0.0) * tl.maximum(y2 - y1, 0.0)


@triton.jit
def _rect(p_rect):
    """The corners of an integer rectangle as floats."""
    x0, y0, x1, y1 = tl.load(p_rect), tl.load(p_rect + 1), tl.load(p_rect + 2), tl.load(p_rect + 3)
    return x0.to(tl.float32), y0.to(tl.float32), x1.to(tl.float32), y1.to(tl.float32)


@triton.jit
def _overlap(x1, y1, x2, y2, p_rect):
    r_x1, r_y1, r_x2, r_y2 = _rect(p_rect)
    return _area(tl.maximum(x1, r_x1), tl.maximum(y1, r_y1), tl.minimum(x2, r_x2), tl.minimum(y2, r_y2))


@triton.jit
def _clamp(v, low, high):
    return tl.minimum(tl.maximum(v, low), high)


@triton.jit
def _is_finite(v):
    return tl.abs(v) < float("inf")  # False for NaN


@triton.jit
def _source_boxes(p_boxes, p_labels, row, keep):
    """Corners and labels of a source's rows, and which rows are kept: those that hold a finite box with a label."""
    label = tl.load(p_labels + row, mask=keep, other=-1)
    x1 = tl.load(p_boxes + 4 * row, mask=keep, other=0)
    y1 = tl.load(p_boxes + 4 * row + 1, mask=keep, other=0)
    x2 = tl.load(p_boxes + 4 * row + 2, mask=keep, other=0)
    y2 = tl.load(p_boxes + 4 * row + 3, mask=keep, other=0)
    keep = keep & (label >= 0) & _is_finite(x1) & _is_finite(y1) & _is_finite(x2) & _is_finite(y2)
    return x1, y1, x2, y2, label, keep


@triton.jit
def _resized(box, p_place, p_scale):
    """Scales boxes to the resized source, clamps them to it and flips them with it."""
    x1, y1, x2, y2 = box
    flip = tl.load(p_place + 1)
    out_w, out_h = tl.load(p_place + 8).to(tl.float32), tl.load(p_place + 9).to(tl.float32)
    scale_x, scale_y = tl.load(p_scale + 2), tl.load(p_scale + 3)
    x1, x2 = _clamp(x1 * scale_x, 0.0, out_w), _clamp(x2 * scale_x, 0.0, out_w)
    y1, y2 = _clamp(y1 * scale_y, 0.0, out_h), _clamp(y2 * scale_y, 0.0, out_h)
    flip_x, flip_y = (flip & FLIP_X) > 0, (flip & FLIP_Y) > 0
    x1, x2 = tl.where(flip_x, out_w - x2, x1), tl.where(flip_x, out_w - x1, x2)
    y1, y2 = tl.where(flip_y, out_h - y2, y1), tl.where(flip_y, out_h - y1, y2)
    return x1, y1, x2, y2


@triton.jit
def _covered(box, p_rects, count):
    """Area of the boxes under each of `count` rectangles, summed."""
    x1, y1, x2, y2 = box
    covered = tl.zeros_like(x1)
    e = 0
    while e < count:
        covered += _overlap(x1, y1, x2, y2, p_rects + 4 * e)
        e += 1
    return covered


@triton.jit
def _hidden(box, p_later, count):
    """Area of the boxes under each of the `count` placements that come later, summed."""
    x1, y1, x2, y2 = box
    hidden = tl.zeros_like(x1)
    k = 0
    while k < count:
        p_place = p_later + k * PLACE_I
        hidden += tl.where(tl.load(p_place) >= 0, _overlap(x1, y1, x2, y2, p_place + 4), 0.0)
        k += 1
    return hidden


@triton.jit
def _visible(box, p_place, later, min_visibility, min_wh, OVER: tl.constexpr):
    """Shifts boxes to the canvas and clips them to what is visible; whether enough is left of them."""
    x1, y1, x2, y2 = box
    off_x, off_y = tl.load(p_place + 2).to(tl.float32), tl.load(p_place + 3).to(tl.float32)
    x1, y1, x2, y2 = x1 + off_x, y1 + off_y, x2 + off_x, y2 + off_y
    area = _area(x1, y1, x2, y2) + AREA_EPS
    v_x1, v_y1, v_x2, v_y2 = _rect(p_place + 4)
    x1, x2 = _clamp(x1, v_x1, v_x2), _clamp(x2, v_x1, v_x2)
    y1, y2 = _clamp(y1, v_y1, v_y2), _clamp(y2, v_y1, v_y2)
    visible = _area(x1, y1, x2, y2)
    if OVER:
        visible = visible - _hidden((x1, y1, x2, y2), p_place + PLACE_I, later)
    enough = ~(true_div(tl.maximum(visible, 0.0), area) < min_visibility) & (x2 - x1 > min_wh) & (y2 - y1 > min_wh)
    return x1, y1, x2, y2, enough


@triton.jit
def _store_rows(p_rows, at, box, label, score, weight, placement, index, mask):
    """Stores rows of all six outputs."""
    p_boxes, p_labels, p_scores, p_weights, p_placement, p_index = p_rows
    for c in tl.static_range(4):
        tl.store(p_boxes + 4 * at + c, box[c], mask=mask)
    tl.store(p_labels + at, label, mask=mask)
    tl.store(p_scores + at, score, mask=mask)
    tl.store(p_weights + at, weight, mask=mask)
    tl.store(p_placement + at, placement, mask=mask)
    tl.store(p_index + at, index, mask=mask)


@triton.jit
def compose_boxes_kernel(
    p_boxes,  # [S, P, 4] xyxy, source pixels
    p_labels,  # int64 [S, P]
    p_scores,  # [S, P]
    p_weights,  # [S, P]
    p_count,  # int32 [S]
    p_place_i,  # int32 [B, K, 11]
    p_place_f,  # float32 [B, K, 5]
    p_erase,  # int32 [B, K, E, 4]
    p_out_boxes,  # [B, N, 4]
    p_out_labels,
    p_out_scores,
    p_out_weights,
    p_placement,
    p_index,
    p_out_count,
    p_overflow,
    places,
    patches,
    per_source,
    nmax,
    erase_thr,
    min_visibility,
    min_wh,
    PROPAGATE_WEIGHT: tl.constexpr,
    OVER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program collects the boxes of one canvas; BLOCK holds all boxes of a source."""
    i_b = tl.program_id(0)
    i_p = tl.arange(0, BLOCK)
    p_rows = (p_out_boxes, p_out_labels, p_out_scores, p_out_weights, p_placement, p_index)
    first_row = i_b.to(tl.int64) * nmax
    total = 0
    k = 0
    while k < places:
        place = (i_b * places + k).to(tl.int64)
        p_place, p_scale = p_place_i + place * PLACE_I, p_place_f + place * PLACE_F
        src = tl.load(p_place)
        v_x1, v_y1, v_x2, v_y2 = _rect(p_place + 4)
        if (src >= 0) & (v_x2 > v_x1) & (v_y2 > v_y1):
            row = src.to(tl.int64) * per_source + i_p
            x1, y1, x2, y2, label, keep = _source_boxes(p_boxes, p_labels, row, i_p < tl.minimum(tl.load(p_count + src), per_source))
            x1, y1, x2, y2 = _resized((x1, y1, x2, y2), p_place, p_scale)
            erased = _covered((x1, y1, x2, y2), p_erase + place * patches * 4, tl.load(p_place + 10))
            keep = keep & ~(true_div(erased, _area(x1, y1, x2, y2) + AREA_EPS) >= erase_thr)
            x1, y1, x2, y2, enough = _visible((x1, y1, x2, y2), p_place, places - 1 - k, min_visibility, min_wh, OVER)
            ones = (keep & enough).to(tl.int32)
            rank = total + tl.cumsum(ones, 0) - 1
            stored = keep & enough & (rank < nmax)
            score = tl.load(p_scores + row, mask=stored, other=0)
            weight = tl.load(p_weights + row, mask=stored, other=0)
            if PROPAGATE_WEIGHT:
                weight = weight * tl.load(p_scale + 4)
            _store_rows(p_rows, first_row + rank, (x1, y1, x2, y2), label, score, weight, k, i_p, stored)
            total += tl.sum(ones, 0)
        k += 1
    count = tl.minimum(total, nmax)
    tl.store(p_out_count + i_b, count)
    tl.store(p_overflow + i_b, total - count)
    start = count
    while start < nmax:
        _store_rows(p_rows, first_row + start + i_p, (0.0, 0.0, 0.0, 0.0), -1, 0.0, 0.0, 0, 0, start + i_p < nmax)
        start += BLOCK


def compose_boxes(
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor,
    weights: Tensor,
    count: Tensor,
    place_i: Tensor,
    place_f: Tensor,
    erase: Tensor,
    nmax: int,
    erase_thr: float,
    union: bool,
    min_visibility: float,
    min_wh: float | None,
    propagate_weight: bool,
    over: bool,
) -> Outputs:
    """Launches the kernel; arguments as in the schema of `ssod_fast::compose_boxes`.

    The union of patches needs sorting, which is no work for one program: the reference, which does not sync either, serves it.
    """
    inputs = (boxes, labels, scores, weights, count, place_i, place_f, erase)
    if union and erase.shape[2]:
        options = (nmax, erase_thr, union, min_visibility, min_wh, propagate_weight, over)
        return reference(*inputs, *options)
    batch, places = place_i.shape[:2]

    def make(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=boxes.device)

    floats, ints = torch.float32, torch.int32
    rows = (make(floats, batch, nmax, 4), make(torch.int64, batch, nmax), make(floats, batch, nmax), make(floats, batch, nmax))
    outputs = (*rows, make(ints, batch, nmax), make(ints, batch, nmax), make(ints, batch), make(ints, batch))
    if batch == 0:
        return outputs
    with on_device(boxes):
        compose_boxes_kernel[(batch,)](
            *(t.contiguous() for t in inputs),
            *outputs,
            *(places, erase.shape[2], boxes.shape[1], nmax),
            *(erase_thr, min_visibility, -float("inf") if min_wh is None else min_wh),
            PROPAGATE_WEIGHT=propagate_weight,
            OVER=over,
            BLOCK=max(16, triton.next_power_of_2(boxes.shape[1])),
            enable_fp_fusion=False,
        )
    return outputs
