"""Whether every overlap of a box with a set stays below a threshold, without the matrix. For GPUs without the CUDA kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._boxes import Rule
from ._boxes import NO_FMA, angles, batched, column_ranges, load_box, overlap
from ._common import cdiv, on_device

ROWS, COLUMNS = 8, 128


@triton.jit
def box_iou_below_kernel(
    p_boxes,  # [B, N, 4]
    p_others,  # [B, M, 4]
    p_angle,  # [B, N], read for CIoU only
    p_others_angle,  # [B, M]
    p_threshold,  # [] in the dtype of the boxes
    p_begin,  # int64 [N]: first partner, read under RAGGED
    p_end,  # int64 [N]: last partner + 1
    p_below,  # bool [B, N]
    p_maxima,  # [B, N], written under RETURN_MAX
    n_rows,
    n_columns,
    stride_batch,
    stride_row,
    stride_others_batch,
    stride_others_row,
    RAGGED: tl.constexpr,
    RETURN_MAX: tl.constexpr,
    MODE: tl.constexpr,
    FMT: tl.constexpr,
    EPS_MODE: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program decides for ROWS boxes; without RETURN_MAX it stops when all of them have been hit."""
    strips = tl.cdiv(n_rows, ROWS)
    i_batch = (tl.program_id(0) // strips).to(tl.int64)
    i_row = ((tl.program_id(0) % strips) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    rows = i_row < n_rows
    if RAGGED:
        begin, end = tl.load(p_begin + i_row, mask=rows, other=n_columns), tl.load(p_end + i_row, mask=rows, other=0)
    else:
        begin, end = tl.zeros((ROWS, 1), tl.int64), tl.zeros((ROWS, 1), tl.int64) + n_columns
    threshold = tl.load(p_threshold)
    a = load_box(p_boxes, p_angle, i_batch * stride_batch + i_row * stride_row, i_batch * n_rows + i_row, rows, FMT, EPS_MODE, MODE)
    below = tl.full((ROWS,), 1, tl.int32)
    best = tl.full((ROWS,), float("-inf"), p_boxes.dtype.element_ty)
    open_rows = tl.sum(rows.to(tl.int32), axis=1)
    start, stop = tl.min(begin), tl.max(end)
    while start < stop:
        i_column = start + tl.arange(0, COLUMNS).to(tl.int64)[None, :]
        pairs = rows & (i_column >= begin) & (i_column < end)
        i_box = i_batch * stride_others_batch + i_column * stride_others_row
        b = load_box(p_others, p_others_angle, i_box, i_batch * n_columns + i_column, i_column < n_columns, FMT, EPS_MODE, MODE)
        value = overlap(a, b, MODE, EPS_MODE, EPS)
        clear = (value < threshold) | (pairs == 0)  # NaN is not below
        below = below & tl.min(clear.to(tl.int32), axis=1)
        start += COLUMNS
        if RETURN_MAX:
            best = tl.maximum(best, tl.max(tl.where(pairs & (value == value), value, float("-inf")), axis=1))
        else:
            start = tl.where(tl.sum(below & open_rows) == 0, stop, start)
    i_out = i_batch * n_rows + tl.sum(i_row, axis=1)
    tl.store(p_below + i_out, below != 0, mask=open_rows > 0)
    if RETURN_MAX:
        tl.store(p_maxima + i_out, tl.where(best == float("-inf"), 0.0, best), mask=open_rows > 0)


def box_iou_below(
    boxes: Tensor,
    others: Tensor,
    offsets1: Tensor | None,
    offsets2: Tensor | None,
    threshold: float,
    mode: int,
    fmt: int,
    eps_mode: int,
    eps: float,
    return_max: bool,
) -> tuple[Tensor, Tensor]:
    """`ssod_fast::box_iou_below`: bool [..., N], and the maxima [..., N] or an empty tensor."""
    rule = Rule(mode, fmt, eps_mode, eps)
    below = torch.empty(boxes.shape[:-1], dtype=torch.bool, device=boxes.device)
    maxima = torch.empty(boxes.shape[:-1] if return_max else (0,), dtype=boxes.dtype, device=boxes.device)
    if below.numel() == 0:
        return below, maxima
    ranges = None
    if offsets1 is not None and offsets2 is not None:
        ranges = column_ranges(offsets1, offsets2, boxes.shape[0], others.shape[0])
    flat, flat_others = batched(boxes), batched(others)
    limit = torch.full((), threshold, dtype=boxes.dtype, device=boxes.device)  # a float argument would reach the kernel as float32
    with on_device(boxes):
        box_iou_below_kernel[(flat.shape[0] * cdiv(flat.shape[1], ROWS),)](
            flat,
            flat_others,
            angles(flat, rule),
            angles(flat_others, rule),
            limit,
            *(ranges or (limit, limit)),
            below,
            maxima,
            flat.shape[1],
            flat_others.shape[1],
            *flat.stride()[:2],
            *flat_others.stride()[:2],
            ranges is not None,
            return_max,
            *rule,
            ROWS,
            COLUMNS,
            **NO_FMA,
        )
    return below, maxima
