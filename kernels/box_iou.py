"""All pairs of two sets of boxes: overlaps, dense and ragged, and the gradients of the dense form. For GPUs without the CUDA kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._boxes import Rule
from ._boxes import NO_FMA, angles, batched, column_ranges, gradient_like, load_box, overlap, overlap_gradients, store_gradient
from ._common import cdiv, on_device

ROWS, COLUMNS = 8, 128  # pairs of one tile: 8 per thread of 4 warps


@triton.jit
def box_iou_fwd_kernel(
    p_boxes1,  # [B, N, 4]
    p_boxes2,  # [B, M, 4]
    p_angle1,  # [B, N], read for CIoU only
    p_angle2,  # [B, M]
    p_out,  # [B, N, M] contiguous
    n_rows,
    n_columns,
    stride1_batch,
    stride1_row,
    stride2_batch,
    stride2_row,
    MODE: tl.constexpr,
    FMT: tl.constexpr,
    EPS_MODE: tl.constexpr,
    EPS: tl.constexpr,
    NAN_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program computes one tile of ROWS x COLUMNS pairs of one batch item."""
    tiles = tl.cdiv(n_columns, COLUMNS)
    i_tile, i_strip = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    strips = tl.cdiv(n_rows, ROWS)
    i_batch = (i_strip // strips).to(tl.int64)
    i_row = ((i_strip % strips) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    i_column = (i_tile * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    rows, columns = i_row < n_rows, i_column < n_columns
    i_box1, i_angle1 = i_batch * stride1_batch + i_row * stride1_row, i_batch * n_rows + i_row
    i_box2, i_angle2 = i_batch * stride2_batch + i_column * stride2_row, i_batch * n_columns + i_column
    a = load_box(p_boxes1, p_angle1, i_box1, i_angle1, rows, FMT, EPS_MODE, MODE)
    b = load_box(p_boxes2, p_angle2, i_box2, i_angle2, columns, FMT, EPS_MODE, MODE)
    value = overlap(a, b, MODE, EPS_MODE, EPS)
    if NAN_ZERO:
        value = tl.where(value == value, value, 0.0)
    tl.store(p_out + (i_batch * n_rows + i_row) * n_columns + i_column, value, mask=rows & columns)


@triton.jit
def box_iou_bwd_kernel(
    p_grad,  # [B, N, M] contiguous, any floating dtype
    p_boxes1,  # [B, N, 4]
    p_boxes2,  # [B, M, 4]
    p_angle1,  # [B, N], read for CIoU only
    p_angle2,  # [B, M]
    p_grad_boxes,  # [B, own, 4] contiguous: gradient of the own side, boxes1, or boxes2 under SECOND
    n_own,
    n_others,
    stride_own,  # of the matrix
    stride_other,
    stride1_batch,
    stride1_row,
    stride2_batch,
    stride2_row,
    SECOND: tl.constexpr,
    MODE: tl.constexpr,
    FMT: tl.constexpr,
    EPS_MODE: tl.constexpr,
    EPS: tl.constexpr,
    NAN_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program sums the gradients of ROWS boxes of one side over all boxes of the other: no atomics, so the result is deterministic."""
    strips = tl.cdiv(n_own, ROWS)
    i_batch = (tl.program_id(0) // strips).to(tl.int64)
    i_own = ((tl.program_id(0) % strips) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    own = i_own < n_own
    dtype = p_boxes1.dtype.element_ty
    dx1, dy1 = tl.zeros((ROWS,), dtype), tl.zeros((ROWS,), dtype)
    dx2, dy2 = tl.zeros((ROWS,), dtype), tl.zeros((ROWS,), dtype)
    p_plane = p_grad + i_batch * n_own * n_others
    start = 0
    while start < n_others:  # a range over a runtime bound does not run in the interpreter
        i_other = (start + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        others = i_other < n_others
        if SECOND:
            i_row, rows, n_rows, i_column, columns, n_columns = i_other, others, n_others, i_own, own, n_own
        else:
            i_row, rows, n_rows, i_column, columns, n_columns = i_own, own, n_own, i_other, others, n_others
        i_box1, i_angle1 = i_batch * stride1_batch + i_row * stride1_row, i_batch * n_rows + i_row
        i_box2, i_angle2 = i_batch * stride2_batch + i_column * stride2_row, i_batch * n_columns + i_column
        a = load_box(p_boxes1, p_angle1, i_box1, i_angle1, rows, FMT, EPS_MODE, MODE)
        b = load_box(p_boxes2, p_angle2, i_box2, i_angle2, columns, FMT, EPS_MODE, MODE)
        pairs = own & others
        grad = tl.load(p_plane + i_own * stride_own + i_other * stride_other, mask=pairs, other=0.0).to(dtype)
        ax1, ay1, ax2, ay2, bx1, by1, bx2, by2 = overlap_gradients(a, b, grad, MODE, EPS_MODE, EPS, NAN_ZERO)
        if SECOND:
            ax1, ay1, ax2, ay2 = bx1, by1, bx2, by2
        dx1 += tl.sum(tl.where(pairs, ax1, 0.0), axis=1)  # a masked box is a point, whose gradient can be NaN
        dy1 += tl.sum(tl.where(pairs, ay1, 0.0), axis=1)
        dx2 += tl.sum(tl.where(pairs, ax2, 0.0), axis=1)
        dy2 += tl.sum(tl.where(pairs, ay2, 0.0), axis=1)
        start += COLUMNS
    i_box = (i_batch * n_own + i_own) * 4
    store_gradient(p_grad_boxes, i_box, dx1[:, None], dy1[:, None], dx2[:, None], dy2[:, None], own, FMT)


@triton.jit
def ragged_box_iou_fwd_kernel(
    p_boxes1,  # [ΣN, 4]
    p_boxes2,  # [ΣM, 4]
    p_angle1,  # [ΣN], read for CIoU only
    p_angle2,  # [ΣM]
    p_begin,  # int64 [ΣN]: first partner of a row
    p_end,  # int64 [ΣN]: last partner + 1
    p_out,  # [ΣN, width] contiguous, filled with the pad value
    n_rows,
    width,
    stride1_row,
    stride2_row,
    MODE: tl.constexpr,
    FMT: tl.constexpr,
    EPS_MODE: tl.constexpr,
    EPS: tl.constexpr,
    NAN_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program computes one tile of the padded result; columns beyond a row's partners are left alone."""
    tiles = tl.cdiv(width, COLUMNS)
    i_row = ((tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    i_column = ((tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    rows = i_row < n_rows
    i_partner = tl.load(p_begin + i_row, mask=rows, other=0) + i_column
    pairs = rows & (i_partner < tl.load(p_end + i_row, mask=rows, other=0)) & (i_column < width)
    a = load_box(p_boxes1, p_angle1, i_row * stride1_row, i_row, rows, FMT, EPS_MODE, MODE)
    b = load_box(p_boxes2, p_angle2, i_partner * stride2_row, i_partner, pairs, FMT, EPS_MODE, MODE)
    value = overlap(a, b, MODE, EPS_MODE, EPS)
    if NAN_ZERO:
        value = tl.where(value == value, value, 0.0)
    tl.store(p_out + i_row * width + i_column, value, mask=pairs)


def box_iou(boxes1: Tensor, boxes2: Tensor, mode: int, fmt: int, eps_mode: int, eps: float, nan_zero: bool, dtype: torch.dtype) -> Tensor:
    """`ssod_fast::box_iou`: [..., N, 4], [..., M, 4] -> [..., N, M] of `dtype`."""
    out = torch.empty((*boxes1.shape[:-1], boxes2.shape[-2]), dtype=dtype, device=boxes1.device)
    box_iou_out(boxes1, boxes2, mode, fmt, eps_mode, eps, nan_zero, out)
    return out


def box_iou_out(boxes1: Tensor, boxes2: Tensor, mode: int, fmt: int, eps_mode: int, eps: float, nan_zero: bool, out: Tensor) -> None:
    """`ssod_fast::box_iou.out`: the same into a contiguous tensor."""
    if out.numel() == 0:
        return
    rule = Rule(mode, fmt, eps_mode, eps)
    flat1, flat2 = batched(boxes1), batched(boxes2)
    batch, rows, columns = flat1.shape[0], flat1.shape[1], flat2.shape[1]
    grid = (batch * cdiv(rows, ROWS) * cdiv(columns, COLUMNS),)
    with on_device(out):
        box_iou_fwd_kernel[grid](
            flat1,
            flat2,
            angles(flat1, rule),
            angles(flat2, rule),
            out,
            rows,
            columns,
            *flat1.stride()[:2],
            *flat2.stride()[:2],
            *rule,
            nan_zero,
            ROWS,
            COLUMNS,
            **NO_FMA,
        )


def box_iou_backward(
    grad: Tensor,
    boxes1: Tensor,
    boxes2: Tensor,
    mode: int,
    fmt: int,
    eps_mode: int,
    eps: float,
    nan_zero: bool,
    need1: bool,
    need2: bool,
) -> tuple[Tensor, Tensor]:
    """`ssod_fast::box_iou_backward`: gradients [..., N, 4] and [..., M, 4]; an empty tensor where one is not needed."""
    rule = Rule(mode, fmt, eps_mode, eps)
    flat1, flat2 = batched(boxes1), batched(boxes2)
    planes = angles(flat1, rule), angles(flat2, rule)
    grad, rows, columns = grad.contiguous(), flat1.shape[1], flat2.shape[1]
    grads = gradient_like(boxes1, need1), gradient_like(boxes2, need2)
    sides = (need1, rows, columns, (columns, 1)), (need2, columns, rows, (1, columns))
    for second, (needed, own, others, strides) in enumerate(sides):
        if not needed or grads[second].numel() == 0:
            continue
        with on_device(grad):
            box_iou_bwd_kernel[(flat1.shape[0] * cdiv(own, ROWS),)](
                grad,
                flat1,
                flat2,
                *planes,
                grads[second],
                own,
                others,
                *strides,
                *flat1.stride()[:2],
                *flat2.stride()[:2],
                bool(second),
                *rule,
                nan_zero,
                ROWS,
                COLUMNS,
                **NO_FMA,
            )
    return grads


def ragged_box_iou(
    boxes1: Tensor,
    offsets1: Tensor,
    boxes2: Tensor,
    offsets2: Tensor,
    max_boxes2: int,
    pad_value: float,
    mode: int,
    fmt: int,
    eps_mode: int,
    eps: float,
    nan_zero: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`ssod_fast::ragged_box_iou`: [ΣN, 4], [B + 1], [ΣM, 4], [B + 1] -> [ΣN, max_boxes2] of `dtype`."""
    rule = Rule(mode, fmt, eps_mode, eps)
    rows = boxes1.shape[0]
    out = torch.full((rows, max_boxes2), pad_value, dtype=dtype, device=boxes1.device)
    if out.numel() == 0 or boxes2.shape[0] == 0:
        return out
    ranges = column_ranges(offsets1, offsets2, rows, boxes2.shape[0])
    with on_device(out):
        ragged_box_iou_fwd_kernel[(cdiv(rows, ROWS) * cdiv(max_boxes2, COLUMNS),)](
            boxes1,
            boxes2,
            angles(boxes1, rule),
            angles(boxes2, rule),
            *ranges,
            out,
            rows,
            max_boxes2,
            boxes1.stride(0),
            boxes2.stride(0),
            *rule,
            nan_zero,
            ROWS,
            COLUMNS,
            **NO_FMA,
        )
    return out
