"""Best partner of each box without the matrix of overlaps. For GPUs without the CUDA kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._boxes import Rule
from ._boxes import NO_FMA, angles, batched, column_ranges, load_box, overlap
from ._common import cdiv, on_device

TILES = ((8, 128), (1, 1024))  # own boxes x partners of a tile: many boxes, or few boxes with many partners
FEW = 1024


@triton.jit
def box_iou_max_kernel(
    p_own,  # [B, own, 4]
    p_others,  # [B, others, 4]
    p_own_angle,  # [B, own], read for CIoU only
    p_others_angle,  # [B, others]
    p_begin,  # int64 [own]: first partner, read under RAGGED
    p_end,  # int64 [own]: last partner + 1
    p_values,  # [B, own]
    p_indices,  # int64 [B, own]
    n_own,
    n_others,
    stride_own_batch,
    stride_own_row,
    stride_others_batch,
    stride_others_row,
    RAGGED: tl.constexpr,
    SECOND: tl.constexpr,
    MODE: tl.constexpr,
    FMT: tl.constexpr,
    EPS_MODE: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program finds the best partners of ROWS boxes. SECOND: the own boxes are the op's second set."""
    strips = tl.cdiv(n_own, ROWS)
    i_batch = (tl.program_id(0) // strips).to(tl.int64)
    i_own = ((tl.program_id(0) % strips) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    own = i_own < n_own
    dtype = p_own.dtype.element_ty
    if RAGGED:
        begin, end = tl.load(p_begin + i_own, mask=own, other=n_others), tl.load(p_end + i_own, mask=own, other=0)
    else:
        begin, end = tl.zeros((ROWS, 1), tl.int64), tl.zeros((ROWS, 1), tl.int64) + n_others
    mine = load_box(
        p_own, p_own_angle, i_batch * stride_own_batch + i_own * stride_own_row, i_batch * n_own + i_own, own, FMT, EPS_MODE, MODE
    )
    best = tl.full((ROWS,), float("-inf"), dtype)
    where = tl.full((ROWS,), -1, tl.int64)
    start, stop = tl.min(begin), tl.max(end)
    while start < stop:  # a range over a runtime bound does not run in the interpreter
        i_other = start + tl.arange(0, COLUMNS).to(tl.int64)[None, :]
        pairs = own & (i_other >= begin) & (i_other < end)
        i_box = i_batch * stride_others_batch + i_other * stride_others_row
        theirs = load_box(p_others, p_others_angle, i_box, i_batch * n_others + i_other, i_other < n_others, FMT, EPS_MODE, MODE)
        if SECOND:
            value = overlap(theirs, mine, MODE, EPS_MODE, EPS)
        else:
            value = overlap(mine, theirs, MODE, EPS_MODE, EPS)
        pairs = pairs & (value > float("-inf"))  # neither NaN nor -inf is anybody's best partner
        value = tl.where(pairs, value, float("-inf"))
        top = tl.max(value, axis=1)
        found = tl.min(tl.where(pairs & (value == top[:, None]), i_other, n_others), axis=1)  # ties: the lowest index
        better = top > best
        best, where = tl.where(better, top, best), tl.where(better, found, where)
        start += COLUMNS
    none = where < 0
    first = tl.sum(begin, axis=1)  # indices count from the first box of the image
    i_out = i_batch * n_own + tl.sum(i_own, axis=1)
    mask = tl.sum(own.to(tl.int32), axis=1) > 0
    tl.store(p_values + i_out, tl.where(none, 0.0, best), mask=mask)
    tl.store(p_indices + i_out, tl.where(none, where, where - first), mask=mask)


def _best(own: Tensor, others: Tensor, ranges: tuple[Tensor, Tensor] | None, rule: Rule, second: bool) -> tuple[Tensor, Tensor]:
    """Values and indices [..., own] of the best partners among `others`."""
    values = torch.empty(own.shape[:-1], dtype=own.dtype, device=own.device)
    indices = torch.empty(own.shape[:-1], dtype=torch.int64, device=own.device)
    if values.numel() == 0:
        return values, indices
    flat, flat_others = batched(own), batched(others)
    rows, columns = TILES[flat.shape[1] < FEW]
    with on_device(own):
        box_iou_max_kernel[(flat.shape[0] * cdiv(flat.shape[1], rows),)](
            flat,
            flat_others,
            angles(flat, rule),
            angles(flat_others, rule),
            *(ranges or (indices, indices)),
            values,
            indices,
            flat.shape[1],
            flat_others.shape[1],
            *flat.stride()[:2],
            *flat_others.stride()[:2],
            ranges is not None,
            second,
            *rule,
            rows,
            columns,
            **NO_FMA,
        )
    return values, indices


def box_iou_max(
    boxes1: Tensor,
    boxes2: Tensor,
    offsets1: Tensor | None,
    offsets2: Tensor | None,
    mode: int,
    fmt: int,
    eps_mode: int,
    eps: float,
    rows: bool,
    cols: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ssod_fast::box_iou_max`: values and indices per box of boxes1, then per box of boxes2; [0] where not asked for.

    Both directions take two launches: each computes the pairs again, which costs less than a matrix or an atomic per pair.
    """
    rule = Rule(mode, fmt, eps_mode, eps)
    results = [boxes1.new_empty(0), boxes1.new_empty(0, dtype=torch.int64), boxes1.new_empty(0), boxes1.new_empty(0, dtype=torch.int64)]
    ranges1 = ranges2 = None
    if offsets1 is not None and offsets2 is not None:
        ranges1 = column_ranges(offsets1, offsets2, boxes1.shape[0], boxes2.shape[0])
        ranges2 = column_ranges(offsets2, offsets1, boxes2.shape[0], boxes1.shape[0])
    if rows:
        results[:2] = _best(boxes1, boxes2, ranges1, rule, second=False)
    if cols:
        results[2:] = _best(boxes2, boxes1, ranges2, rule, second=True)
    return results[0], results[1], results[2], results[3]
