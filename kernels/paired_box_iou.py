"""Overlap of matched pairs of boxes and its gradients. For GPUs without the CUDA kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._boxes import Rule
from ._boxes import NO_FMA, angles, gradient_like, load_box, overlap, overlap_gradients, store_gradient, two_dims
from ._common import cdiv, on_device

BLOCK = 256


@triton.jit
def paired_box_iou_fwd_kernel(
    p_boxes1,  # [G, P, 4], any strides (0 where a box is repeated)
    p_boxes2,  # [G, P, 4]
    p_angle1,  # [G, P], read for CIoU only
    p_angle2,  # [G, P]
    p_out,  # [G, P] contiguous
    count,  # G * P
    inner,  # P
    stride1_outer,
    stride1_inner,
    stride2_outer,
    stride2_inner,
    MODE: tl.constexpr,
    FMT: tl.constexpr,
    EPS_MODE: tl.constexpr,
    EPS: tl.constexpr,
    NAN_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pair per lane."""
    i_pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pairs = i_pair < count
    i_outer, i_inner = i_pair // inner, i_pair % inner
    a = load_box(p_boxes1, p_angle1, i_outer * stride1_outer + i_inner * stride1_inner, i_pair, pairs, FMT, EPS_MODE, MODE)
    b = load_box(p_boxes2, p_angle2, i_outer * stride2_outer + i_inner * stride2_inner, i_pair, pairs, FMT, EPS_MODE, MODE)
    value = overlap(a, b, MODE, EPS_MODE, EPS)
    if NAN_ZERO:
        value = tl.where(value == value, value, 0.0)
    tl.store(p_out + i_pair, value, mask=pairs)


@triton.jit
def paired_box_iou_bwd_kernel(
    p_grad,  # [G, P], any strides
    p_boxes1,  # [G, P, 4], any strides
    p_boxes2,  # [G, P, 4]
    p_angle1,  # [G, P], read for CIoU only
    p_angle2,  # [G, P]
    p_grad1,  # [G, P, 4] contiguous, written under NEED1
    p_grad2,  # [G, P, 4] contiguous, written under NEED2
    count,
    inner,
    stride_outer,  # of the gradient
    stride_inner,
    stride1_outer,
    stride1_inner,
    stride2_outer,
    stride2_inner,
    MODE: tl.constexpr,
    FMT: tl.constexpr,
    EPS_MODE: tl.constexpr,
    EPS: tl.constexpr,
    NAN_ZERO: tl.constexpr,
    NEED1: tl.constexpr,
    NEED2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pair per lane."""
    i_pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pairs = i_pair < count
    i_outer, i_inner = i_pair // inner, i_pair % inner
    a = load_box(p_boxes1, p_angle1, i_outer * stride1_outer + i_inner * stride1_inner, i_pair, pairs, FMT, EPS_MODE, MODE)
    b = load_box(p_boxes2, p_angle2, i_outer * stride2_outer + i_inner * stride2_inner, i_pair, pairs, FMT, EPS_MODE, MODE)
    grad = tl.load(p_grad + i_outer * stride_outer + i_inner * stride_inner, mask=pairs, other=0.0).to(p_boxes1.dtype.element_ty)
    ax1, ay1, ax2, ay2, bx1, by1, bx2, by2 = overlap_gradients(a, b, grad, MODE, EPS_MODE, EPS, NAN_ZERO)
    if NEED1:
        store_gradient(p_grad1, i_pair * 4, ax1, ay1, ax2, ay2, pairs, FMT)
    if NEED2:
        store_gradient(p_grad2, i_pair * 4, bx1, by1, bx2, by2, pairs, FMT)


def paired_box_iou(boxes1: Tensor, boxes2: Tensor, mode: int, fmt: int, eps_mode: int, eps: float, nan_zero: bool) -> Tensor:
    """`ssod_fast::paired_box_iou`: [..., 4], [..., 4] of one shape -> [...]."""
    rule = Rule(mode, fmt, eps_mode, eps)
    out = torch.empty(boxes1.shape[:-1], dtype=boxes1.dtype, device=boxes1.device)
    if out.numel() == 0:
        return out
    (flat1, flat2), inner = two_dims(out.dim(), boxes1, boxes2)
    with on_device(out):
        paired_box_iou_fwd_kernel[(cdiv(out.numel(), BLOCK),)](
            flat1,
            flat2,
            angles(flat1, rule),
            angles(flat2, rule),
            out,
            out.numel(),
            inner,
            *flat1.stride()[:2],
            *flat2.stride()[:2],
            *rule,
            nan_zero,
            BLOCK,
            **NO_FMA,
        )
    return out


def paired_box_iou_backward(
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
    """`ssod_fast::paired_box_iou_backward`: gradients [..., 4] of both boxes; an empty tensor where one is not needed."""
    rule = Rule(mode, fmt, eps_mode, eps)
    grad1, grad2 = gradient_like(boxes1, need1), gradient_like(boxes2, need2)
    if grad.numel() == 0 or not (need1 or need2):
        return grad1, grad2
    (flat, flat1, flat2), inner = two_dims(grad.dim(), grad, boxes1, boxes2)
    with on_device(grad):
        paired_box_iou_bwd_kernel[(cdiv(grad.numel(), BLOCK),)](
            flat,
            flat1,
            flat2,
            angles(flat1, rule),
            angles(flat2, rule),
            grad1,
            grad2,
            grad.numel(),
            inner,
            *flat.stride()[:2],
            *flat1.stride()[:2],
            *flat2.stride()[:2],
            *rule,
            nan_zero,
            need1,
            need2,
            BLOCK,
            **NO_FMA,
        )
    return grad1, grad2
