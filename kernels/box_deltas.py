"""The codec of boxes relative to proposals and its gradients. For GPUs without the CUDA kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.box_deltas import MIN_SIZE
from ._bags import store_box
from ._boxes import NO_FMA, gradient_like, passes_clamp, two_dims
from ._common import at_least, cdiv, on_device, true_div

BLOCK = 256
SIZE_FLOOR = tl.constexpr(MIN_SIZE)


@triton.jit
def _load(p, mask):
    """The four numbers that stand at each pointer."""
    a, b = tl.load(p, mask=mask, other=0.0), tl.load(p + 1, mask=mask, other=0.0)
    return a, b, tl.load(p + 2, mask=mask, other=0.0), tl.load(p + 3, mask=mask, other=0.0)


@triton.jit
def _centres(p, mask):
    """Centre and size of the xyxy boxes at each pointer: cx, cy, w, h."""
    x1, y1, x2, y2 = _load(p, mask)
    return (x1 + x2) * 0.5, (y1 + y2) * 0.5, x2 - x1, y2 - y1


@triton.jit
def _store_corners(p, cx, cy, w, h, mask):
    """Stores gradients of centre and size as gradients of the corners."""
    store_box(p, cx * 0.5 - w, cy * 0.5 - h, cx * 0.5 + w, cy * 0.5 + h, mask)


@triton.jit
def _scale(log_size, CLAMP: tl.constexpr):
    """exp of log sizes within -CLAMP..CLAMP, and 1 where they were inside, else 0; NaN stays."""
    low = tl.where(log_size < -CLAMP, -CLAMP, log_size)
    return tl.exp(tl.where(low > CLAMP, CLAMP, low)), tl.where(tl.abs(log_size) <= CLAMP, 1.0, 0.0)


@triton.jit
def encode_boxes_fwd_kernel(
    p_proposals,  # [G, P, 4], any strides but that of the last dimension, 0 where a box is repeated
    p_targets,  # [G, P, 4], likewise
    p_deltas,  # [G, P, 4] contiguous
    count,  # G * P
    inner,  # P
    stride1_outer,
    stride1_inner,
    stride2_outer,
    stride2_inner,
    STD: tl.constexpr,  # tuple of 4
    BLOCK: tl.constexpr,
):
    """One pair per lane."""
    i_pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i_pair < count
    i_outer, i_inner = i_pair // inner, i_pair % inner
    px, py, pw, ph = _centres(p_proposals + i_outer * stride1_outer + i_inner * stride1_inner, mask)
    gx, gy, gw, gh = _centres(p_targets + i_outer * stride2_outer + i_inner * stride2_inner, mask)
    pw, ph = at_least(pw, SIZE_FLOOR), at_least(ph, SIZE_FLOOR)
    gw, gh = at_least(gw, SIZE_FLOOR), at_least(gh, SIZE_FLOOR)
    zero = tl.zeros((BLOCK,), p_proposals.dtype.element_ty)
    dx, dy = true_div(true_div(gx - px, pw), zero + STD[0]), true_div(true_div(gy - py, ph), zero + STD[1])
    dw, dh = true_div(tl.log(true_div(gw, pw)), zero + STD[2]), true_div(tl.log(true_div(gh, ph)), zero + STD[3])
    store_box(p_deltas + i_pair * 4, dx, dy, dw, dh, mask)


@triton.jit
def encode_boxes_bwd_kernel(
    p_grad,  # [G, P, 4], strides as those of the boxes
    p_proposals,
    p_targets,
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
    STD: tl.constexpr,
    NEED1: tl.constexpr,
    NEED2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pair per lane."""
    i_pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i_pair < count
    i_outer, i_inner = i_pair // inner, i_pair % inner
    dx, dy, dw, dh = _load(p_grad + i_outer * stride_outer + i_inner * stride_inner, mask)
    px, py, raw_pw, raw_ph = _centres(p_proposals + i_outer * stride1_outer + i_inner * stride1_inner, mask)
    gx, gy, raw_gw, raw_gh = _centres(p_targets + i_outer * stride2_outer + i_inner * stride2_inner, mask)
    pw, ph = at_least(raw_pw, SIZE_FLOOR), at_least(raw_ph, SIZE_FLOOR)
    zero = tl.zeros((BLOCK,), p_proposals.dtype.element_ty)
    to_x, to_y = true_div(true_div(dx, zero + STD[0]), pw), true_div(true_div(dy, zero + STD[1]), ph)
    to_w, to_h = true_div(dw, zero + STD[2]), true_div(dh, zero + STD[3])
    if NEED1:
        d_w = -(to_x * true_div(gx - px, pw) + true_div(to_w, pw)) * passes_clamp(raw_pw - SIZE_FLOOR)
        d_h = -(to_y * true_div(gy - py, ph) + true_div(to_h, ph)) * passes_clamp(raw_ph - SIZE_FLOOR)
        _store_corners(p_grad1 + i_pair * 4, -to_x, -to_y, d_w, d_h, mask)
    if NEED2:
        d_w = true_div(to_w, at_least(raw_gw, SIZE_FLOOR)) * passes_clamp(raw_gw - SIZE_FLOOR)
        d_h = true_div(to_h, at_least(raw_gh, SIZE_FLOOR)) * passes_clamp(raw_gh - SIZE_FLOOR)
        _store_corners(p_grad2 + i_pair * 4, to_x, to_y, d_w, d_h, mask)


@triton.jit
def decode_boxes_fwd_kernel(
    p_proposals,  # [G, P, 4], any strides but that of the last dimension, 0 where a box is repeated
    p_deltas,  # [G, P, 4], likewise
    p_boxes,  # [G, P, 4] contiguous
    count,  # G * P
    inner,  # P
    stride1_outer,
    stride1_inner,
    stride2_outer,
    stride2_inner,
    STD: tl.constexpr,  # tuple of 4
    CLAMP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pair per lane."""
    i_pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i_pair < count
    i_outer, i_inner = i_pair // inner, i_pair % inner
    px, py, pw, ph = _centres(p_proposals + i_outer * stride1_outer + i_inner * stride1_inner, mask)
    dx, dy, dw, dh = _load(p_deltas + i_outer * stride2_outer + i_inner * stride2_inner, mask)
    gx, gy = px + pw * (dx * STD[0]), py + ph * (dy * STD[1])
    scale_w, _ = _scale(dw * STD[2], CLAMP)
    scale_h, _ = _scale(dh * STD[3], CLAMP)
    half_w, half_h = pw * scale_w * 0.5, ph * scale_h * 0.5
    store_box(p_boxes + i_pair * 4, gx - half_w, gy - half_h, gx + half_w, gy + half_h, mask)


@triton.jit
def decode_boxes_bwd_kernel(
    p_grad,  # [G, P, 4], strides as those of the boxes
    p_proposals,
    p_deltas,
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
    STD: tl.constexpr,
    CLAMP: tl.constexpr,
    NEED1: tl.constexpr,
    NEED2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pair per lane."""
    i_pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i_pair < count
    i_outer, i_inner = i_pair // inner, i_pair % inner
    x1, y1, x2, y2 = _load(p_grad + i_outer * stride_outer + i_inner * stride_inner, mask)
    _, _, pw, ph = _centres(p_proposals + i_outer * stride1_outer + i_inner * stride1_inner, mask)
    dx, dy, dw, dh = _load(p_deltas + i_outer * stride2_outer + i_inner * stride2_inner, mask)
    to_x, to_y, to_w, to_h = x1 + x2, y1 + y2, (x2 - x1) * 0.5, (y2 - y1) * 0.5
    scale_w, live_w = _scale(dw * STD[2], CLAMP)
    scale_h, live_h = _scale(dh * STD[3], CLAMP)
    if NEED1:
        d_w, d_h = to_x * (dx * STD[0]) + to_w * scale_w, to_y * (dy * STD[1]) + to_h * scale_h
        _store_corners(p_grad1 + i_pair * 4, to_x, to_y, d_w, d_h, mask)
    if NEED2:
        d_dw, d_dh = to_w * (pw * scale_w) * STD[2] * live_w, to_h * (ph * scale_h) * STD[3] * live_h
        store_box(p_grad2 + i_pair * 4, to_x * pw * STD[0], to_y * ph * STD[1], d_dw, d_dh, mask)


def _forward(kernel: triton.JITFunction, proposals: Tensor, others: Tensor, *options: object) -> Tensor:
    """Launches a forward kernel: [..., 4], [..., 4] of one shape -> [..., 4]."""
    out = torch.empty(proposals.shape, dtype=proposals.dtype, device=proposals.device)
    if out.numel() == 0:
        return out
    (flat1, flat2), inner = two_dims(out.dim() - 1, proposals, others)
    strides = (*flat1.stride()[:2], *flat2.stride()[:2])
    with on_device(out):
        kernel[(cdiv(out.numel() // 4, BLOCK),)](flat1, flat2, out, out.numel() // 4, inner, *strides, *options, BLOCK, **NO_FMA)
    return out


def _backward(kernel: triton.JITFunction, grad: Tensor, proposals: Tensor, others: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    """Launches a backward kernel, whose last two options say which gradients are needed; an empty tensor where one is not."""
    grad1, grad2 = gradient_like(proposals, bool(options[-2])), gradient_like(others, bool(options[-1]))
    if grad.numel() == 0 or not any(options[-2:]):
        return grad1, grad2
    (flat, flat1, flat2), inner = two_dims(grad.dim() - 1, grad, proposals, others)
    count, strides = grad.numel() // 4, (*flat.stride()[:2], *flat1.stride()[:2], *flat2.stride()[:2])
    with on_device(grad):
        kernel[(cdiv(count, BLOCK),)](flat, flat1, flat2, grad1, grad2, count, inner, *strides, *options, BLOCK, **NO_FMA)
    return grad1, grad2


def encode_boxes(proposals: Tensor, targets: Tensor, sx: float, sy: float, sw: float, sh: float) -> Tensor:
    """`ssod_fast::encode_boxes`: deltas [..., 4]."""
    return _forward(encode_boxes_fwd_kernel, proposals, targets, (sx, sy, sw, sh))


def encode_boxes_backward(
    grad: Tensor, proposals: Tensor, targets: Tensor, sx: float, sy: float, sw: float, sh: float, need1: bool, need2: bool
) -> tuple[Tensor, Tensor]:
    """`ssod_fast::encode_boxes_backward`: gradients [..., 4] of both inputs."""
    return _backward(encode_boxes_bwd_kernel, grad, proposals, targets, (sx, sy, sw, sh), need1, need2)


def decode_boxes(proposals: Tensor, deltas: Tensor, sx: float, sy: float, sw: float, sh: float, clamp: float) -> Tensor:
    """`ssod_fast::decode_boxes`: boxes [..., 4]."""
    return _forward(decode_boxes_fwd_kernel, proposals, deltas, (sx, sy, sw, sh), clamp)


def decode_boxes_backward(
    grad: Tensor, proposals: Tensor, deltas: Tensor, sx: float, sy: float, sw: float, sh: float, clamp: float, need1: bool, need2: bool
) -> tuple[Tensor, Tensor]:
    """`ssod_fast::decode_boxes_backward`: gradients [..., 4] of both inputs."""
    return _backward(decode_boxes_bwd_kernel, grad, proposals, deltas, (sx, sy, sw, sh), clamp, need1, need2)
