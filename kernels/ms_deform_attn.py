"""Multi-scale deformable attention, plain and fused with softmax and reference points. For GPUs without the CUDA kernels.

One program serves a block of queries of one head. Lanes lie along the channels, 16 bytes each, and all lanes of a query compute its
positions again: that costs instructions but no shared memory and no barrier.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._ms_deform_attn import BILINEAR, DISCRETE, compute_dtype
from ..ops.ms_deform_attn import _reference, _reference_backward
from ..ops.ms_deform_attn_fused import _reference as _fused_reference
from ..ops.ms_deform_attn_fused import _reference_backward as _fused_reference_backward
from ._boxes import NO_FMA
from ._common import on_device
from ._ms_deform_attn import (
    INFINITY,
    TILE,
    TILE_WARPS,
    WARPS,
    Problem,
    bilinear_corner,
    frame_of_level,
    live_position,
    load_level,
    nearest_pixel,
    tile_of_program,
    token_at,
)

DISCRETE_: tl.constexpr = tl.constexpr(DISCRETE)
RUNTIME = ["queries", "tokens", "stride_xy_row", "stride_weight_row"]  # no variant per value


@triton.jit
def _pixels(token, inside, stride_token, o: tl.constexpr):
    """Offsets [rows, channels] of the channels of a token per row, and which of them exist."""
    i_channel = tl.arange(0, o.block_c)[None, :]
    if o.wide:
        token = token.to(tl.int64)
    mask = inside[:, None]
    if o.channels != o.block_c:
        mask = mask & (i_channel < o.channels)
    return (token * stride_token)[:, None] + i_channel, mask


@triton.jit
def _load_sample(p_xy, p_weights, i_sample, used, dtype: tl.constexpr):
    """x, y and weight [rows] of a sample; one that is not there is NaN, so not live."""
    x = tl.load(p_xy + 2 * i_sample, mask=used, other=float("nan")).to(dtype)
    y = tl.load(p_xy + 2 * i_sample + 1, mask=used, other=float("nan")).to(dtype)
    return x, y, tl.load(p_weights + i_sample, mask=used, other=0.0).to(dtype)


@triton.jit
def _add_pixel(total, p_image, token, inside, share, stride_token, o: tl.constexpr):
    """total + share * value of one token per row; nothing is read where it does not count."""
    offset, mask = _pixels(token, inside, stride_token, o)
    pixel = tl.load(p_image + offset, mask=mask, other=0.0).to(total.dtype)
    return tl.fma(tl.broadcast_to(tl.where(inside, share, 0.0)[:, None], total.shape), pixel, total)


@triton.jit
def _add_sample(total, p_image, x, y, weight, frame, level, tokens, stride_token, o: tl.constexpr):
    """total [rows, channels] plus one weighted sample per row."""
    if o.method == DISCRETE_:
        known = (x == x) & (y == y)
        x0, y0 = nearest_pixel(tl.where(known, x, 0.0), level[1]), nearest_pixel(tl.where(known, y, 0.0), level[0])
        token, inside = token_at(x0, y0, known, level, tokens)
        total = _add_pixel(total, p_image, token, inside, weight, stride_token, o)
    else:
        x0, y0, fraction, live = live_position(x, y, frame, level)
        for i in tl.static_range(4):
            token, inside, wy, wx = bilinear_corner(x0, y0, fraction, live, level, tokens, i % 2, i // 2)
            total = _add_pixel(total, p_image, token, inside, wy * wx * weight, stride_token, o)
    return total


@triton.jit
def _log_sum_exp(p_logits, p_lse, used, o: tl.constexpr, dtype: tl.constexpr):
    """Stores the log-sum-exp [rows] of K logits per row and reads it back: NaN where it is infinite, as softmax is then.

    Through memory because its results would otherwise live in another layout than the samples, with a barrier at each of them.
    """
    top = tl.where(used, tl.full(used.shape, -INFINITY, dtype), 0.0)
    for i in tl.range(o.samples, loop_unroll_factor=4):
        top = tl.maximum(top, tl.load(p_logits + i, mask=used, other=0.0).to(dtype))
    shift, total = tl.where(tl.abs(top) < INFINITY, top, 0.0), tl.zeros(used.shape, dtype)
    for i in tl.range(o.samples, loop_unroll_factor=4):
        total += tl.exp(tl.load(p_logits + i, mask=used, other=0.0).to(dtype) - shift)
    tl.store(p_lse, shift + tl.log(total), mask=used)
    tl.debug_barrier()
    lse = tl.load(p_lse, mask=used, other=0.0)
    return lse + lse * 0.0


@triton.jit(do_not_specialize=RUNTIME)
def ms_deform_attn_fwd_kernel(
    p_value,  # [B, S, M, C], contiguous in (M, C)
    p_shapes,  # int64 [L, 2], unless host
    p_starts,  # int64 [L], read if starts
    p_reference,  # [B, Q, references, 2 or 4], read if there are any
    p_xy,  # [B, Q, M, K, 2]: locations, or offsets from the references
    p_weights,  # [B, Q, M, K]: weights, or logits if there are references
    p_out,  # [B, Q, M * C]
    p_lse,  # [B, Q, M], written if there are references
    sizes,  # height, width, ... of the levels, float32, read if host
    queries,
    tokens,
    stride_image,
    stride_token,
    stride_xy_row,
    stride_weight_row,
    o: tl.constexpr,
):
    """One program: rows of queries of one head."""
    dtype: tl.constexpr = tl.float64 if p_value.dtype.element_ty == tl.float64 else tl.float32
    i_row, used, i_image, i_head = tile_of_program(p_shapes, sizes, queries, o)
    p_image = p_value + i_image * stride_image + i_head * o.channels
    p_xy += i_row * stride_xy_row + i_head * (2 * o.samples)
    p_weights += i_row * stride_weight_row + i_head * o.samples
    if o.references > 0:
        lse = _log_sum_exp(p_weights, p_lse + i_row * o.heads + i_head, used, o, dtype)
    ROWS: tl.constexpr = o.rows
    CHANNELS: tl.constexpr = o.block_c
    total = tl.zeros((ROWS, CHANNELS), dtype)
    first, before = tl.full((), 0, tl.int64), 0
    LEVELS: tl.constexpr = o.levels
    for i in tl.static_range(LEVELS):
        level, first = load_level(p_shapes, sizes, p_starts, first, i, o)
        frame = frame_of_level(p_reference, i_row, used, level, i, o, dtype)
        for i_point in tl.range(o.points[i], loop_unroll_factor=4):
            i_sample = before + i_point
            x, y, weight = _load_sample(p_xy, p_weights, i_sample, used, dtype)
            if o.references > 0:
                weight = tl.exp(weight - lse)
            total = _add_sample(total, p_image, x, y, weight, frame, level, tokens, stride_token, o)
        before += o.points[i]
    i_channel = tl.arange(0, o.block_c)[None, :]
    p_out += (i_row * o.heads + i_head)[:, None] * o.channels + i_channel
    tl.store(p_out, total.to(p_out.dtype.element_ty), mask=used[:, None] & (i_channel < o.channels))


@triton.jit
def _corner_gradient(grad, p_image, p_grad_image, token, inside, share, stride_token, o: tl.constexpr):
    """<grad, value of a token per row> [rows], 0 where it does not count; adds share * grad to the gradient of the token."""
    offset, mask = _pixels(token, inside, stride_token, o)
    pixel = tl.load(p_image + offset, mask=mask, other=0.0).to(grad.dtype)
    target, _ = _pixels(token, inside, o.heads * o.channels, o)
    tl.atomic_add(p_grad_image + target, share[:, None] * grad, mask=mask, sem="relaxed")
    return tl.where(inside, tl.sum(grad * pixel, 1), 0.0)


@triton.jit
def _sample_gradients(grad, p_image, p_grad_image, x, y, weight, frame, level, tokens, stride_token, o: tl.constexpr):
    """Gradients [rows] of px, py and of the weight of one sample per row, from the dot products of `grad` with its pixels."""
    to_weight, to_x, to_y = tl.zeros(x.shape, grad.dtype), tl.zeros(x.shape, grad.dtype), tl.zeros(x.shape, grad.dtype)
    if o.method == DISCRETE_:
        known = (x == x) & (y == y)
        x0, y0 = nearest_pixel(tl.where(known, x, 0.0), level[1]), nearest_pixel(tl.where(known, y, 0.0), level[0])
        token, inside = token_at(x0, y0, known, level, tokens)
        to_weight += _corner_gradient(grad, p_image, p_grad_image, token, inside, weight, stride_token, o)
    else:
        x0, y0, fraction, live = live_position(x, y, frame, level)
        for i in tl.static_range(4):
            token, inside, wy, wx = bilinear_corner(x0, y0, fraction, live, level, tokens, i % 2, i // 2)
            share = wy * wx * weight
            dot = _corner_gradient(grad, p_image, p_grad_image, token, inside, share, stride_token, o)
            to_weight += wy * wx * dot
            to_x += tl.where(inside, wy * dot * weight, 0.0) * (2 * (i % 2) - 1)
            to_y += tl.where(inside, wx * dot * weight, 0.0) * (2 * (i // 2) - 1)
    return to_x, to_y, to_weight


@triton.jit
def _chain(grad, factor):
    """grad * factor, and 0 where grad is 0 and the factor infinite or NaN."""
    return tl.where(grad == 0, 0.0, grad * factor)


@triton.jit
def _add_reference_gradient(sums, to_x, to_y, x, y, level, share, o: tl.constexpr):
    """Four sums [rows] over samples: gradients of a reference's x and y and, for a box, of its width and height."""
    height, width = level[0].to(to_x.dtype), level[1].to(to_x.dtype)
    sum_x, sum_y, sum_w, sum_h = sums
    if o.box:
        sum_w += _chain(to_x, share * x * width)
        sum_h += _chain(to_y, share * y * height)
    return sum_x + _chain(to_x, width), sum_y + _chain(to_y, height), sum_w, sum_h


@triton.jit
def _store_reference_gradient(p_grad, sums, used, o: tl.constexpr):
    for i in tl.static_range(4 if o.box else 2):
        tl.store(p_grad + i, sums[i], mask=used)


@triton.jit
def _store_weight_gradients(p_grad, p_logits, lse, to_weight, used, o: tl.constexpr):
    """Gradients [rows, samples] of weights, or with references of the logits behind them."""
    i_sample = tl.arange(0, o.block_k)[None, :]
    mask = used[:, None] & (i_sample < o.samples)
    if o.references > 0:
        weight = tl.exp(tl.load(p_logits[:, None] + i_sample, mask=mask, other=-INFINITY).to(to_weight.dtype) - lse[:, None])
        weight = tl.where(mask, weight, 0.0)
        to_weight = weight * (to_weight - tl.sum(weight * to_weight, 1)[:, None])
    tl.store(p_grad[:, None] + i_sample, to_weight.to(p_grad.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def ms_deform_attn_bwd_kernel(
    p_grad,  # [B, Q, M * C]
    p_value,  # as in the forward kernel, as are all arguments that are not explained here
    p_shapes,
    p_starts,
    p_reference,
    p_xy,
    p_weights,
    p_lse,
    p_grad_value,  # [B, S, M, C], zeros, compute dtype
    p_grad_reference,  # [B, Q, M, references, 2 or 4], compute dtype: the share of each head
    p_grad_xy,  # [B, Q, M, K, 2]
    p_grad_weights,  # [B, Q, M, K]
    sizes,
    queries,
    tokens,
    stride_image,
    stride_token,
    stride_xy_row,
    stride_weight_row,
    o: tl.constexpr,
):
    """One program: rows of queries of one head. Sums over channels stay inside a warp, those over queries are atomic."""
    dtype: tl.constexpr = p_grad_value.dtype.element_ty
    i_row, used, i_image, i_head = tile_of_program(p_shapes, sizes, queries, o)
    i_out = i_row * o.heads + i_head
    i_channel, i_weight = tl.arange(0, o.block_c)[None, :], tl.arange(0, o.block_k)[None, :]
    grad = tl.load(p_grad + (i_out * o.channels)[:, None] + i_channel, mask=used[:, None] & (i_channel < o.channels), other=0.0).to(dtype)
    p_image = p_value + i_image * stride_image + i_head * o.channels
    p_grad_image = p_grad_value + (i_image * tokens * o.heads + i_head) * o.channels
    p_xy += i_row * stride_xy_row + i_head * (2 * o.samples)
    p_weights += i_row * stride_weight_row + i_head * o.samples
    ROWS: tl.constexpr = o.rows
    SAMPLES: tl.constexpr = o.block_k
    zero = tl.zeros((ROWS,), dtype)
    lse, none = zero, tl.zeros((ROWS, SAMPLES), dtype)
    to_weights, to_xs, to_ys = none, none, none
    if o.references > 0:
        lse = tl.load(p_lse + i_out, mask=used, other=0.0)
    sums = (zero, zero, zero, zero)
    first, before = tl.full((), 0, tl.int64), 0
    LEVELS: tl.constexpr = o.levels
    for i in tl.static_range(LEVELS):
        level, first = load_level(p_shapes, sizes, p_starts, first, i, o)
        frame = frame_of_level(p_reference, i_row, used, level, i, o, dtype)
        for i_point in range(o.points[i]):
            i_sample = before + i_point
            x, y, weight = _load_sample(p_xy, p_weights, i_sample, used, dtype)
            if o.references > 0:
                weight = tl.exp(weight - lse)
            to_x, to_y, to_weight = _sample_gradients(grad, p_image, p_grad_image, x, y, weight, frame, level, tokens, stride_token, o)
            here = i_weight == i_sample
            to_weights = tl.where(here, to_weight[:, None], to_weights)
            to_xs = tl.where(here, _chain(to_x, frame[2])[:, None], to_xs)
            to_ys = tl.where(here, _chain(to_y, frame[3])[:, None], to_ys)
            if o.references > 0:
                sums = _add_reference_gradient(sums, to_x, to_y, x, y, level, o.shares[i], o)
        if o.references > 0 and (o.references > 1 or i + 1 == o.levels):
            i_reference = i_out * o.references + (i if o.references > 1 else 0)
            _store_reference_gradient(p_grad_reference + i_reference * (4 if o.box else 2), sums, used, o)
            sums = (zero, zero, zero, zero)
        before += o.points[i]
    p_grad_xy = (p_grad_xy + i_out * (2 * o.samples))[:, None] + 2 * i_weight
    to_xy = tl.join(to_xs, to_ys).to(p_grad_xy.dtype.element_ty)
    tl.store(tl.join(p_grad_xy, p_grad_xy + 1), to_xy, mask=(used[:, None] & (i_weight < o.samples))[:, :, None])
    _store_weight_gradients(p_grad_weights + i_out * o.samples, p_weights, lse, to_weights, used, o)


def _forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Result [B, Q, M * C] and log-sum-exp [B, Q, M], [0] without references."""
    value, (batch, queries, heads, _) = problem.value, problem.weights.shape
    out = value.new_empty((batch, queries, heads * value.shape[3]))
    lse = value.new_empty((batch, queries, heads) if problem.references else (0,), dtype=compute_dtype(value))
    rows = problem.rows(value.dtype, TILE)
    warps = TILE_WARPS if rows == TILE else WARPS
    with on_device(value):
        ms_deform_attn_fwd_kernel[problem.grid(rows)](
            *problem.inputs(), out, lse, *problem.arguments(), problem.options(rows), num_warps=warps, **NO_FMA
        )
    return out, lse


def _backward(problem: Problem, grad: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of value, references ([0] without), locations or offsets, and weights or logits."""
    value, (batch, queries, heads, _) = problem.value, problem.weights.shape
    dtype = compute_dtype(value)
    grad_value = torch.zeros(value.shape, dtype=dtype, device=value.device)  # float32: sums of many in half precision would swamp
    per_head = (batch, queries, heads, problem.references, problem.numbers) if problem.references else (0,)
    grad_reference = torch.empty(per_head, dtype=dtype, device=value.device)
    grad_xy, grad_weights = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (problem.xy, problem.weights))
    rows = problem.rows(dtype)  # of the atomics, which bind
    with on_device(value):
        ms_deform_attn_bwd_kernel[problem.grid(rows)](
            *(grad, *problem.inputs(), lse, grad_value, grad_reference, grad_xy, grad_weights),
            *problem.arguments(),
            problem.options(rows),
            **NO_FMA,
        )
    return grad_value.to(value.dtype), grad_reference.sum(2) if problem.references else grad_reference, grad_xy, grad_weights


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    shapes_hw: Sequence[int] | None,
    num_points: Sequence[int] | None,
    method: int,
) -> Tensor:
    """`ssod_fast::ms_deform_attn`: [B, Q, M * C]."""
    tables = (value, spatial_shapes, level_start_index)
    problem = Problem(*tables, None, sampling_locations, attention_weights, shapes_hw, num_points, method, 0.0)
    if problem.is_degenerate:
        return _reference(*tables, sampling_locations, attention_weights, shapes_hw, num_points, method)
    return _forward(problem)[0]


def ms_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    shapes_hw: Sequence[int] | None,
    num_points: Sequence[int] | None,
    method: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ssod_fast::ms_deform_attn_backward`; the order of atomics is not fixed, so that `deterministic` takes the reference."""
    tables, options = (value, spatial_shapes, level_start_index), (shapes_hw, num_points, method)
    problem = Problem(*tables, None, sampling_locations, attention_weights, *options, 0.0)
    if deterministic or problem.is_degenerate:
        return _reference_backward(grad_output, *tables, sampling_locations, attention_weights, *options, deterministic)
    grad_value, _, grad_locations, grad_weights = _backward(problem, grad_output, grad_output)
    return grad_value, grad_locations, grad_weights


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    shapes_hw: Sequence[int] | None,
    num_points: Sequence[int] | None,
    offset_scale: float,
) -> tuple[Tensor, Tensor]:
    """`ssod_fast::ms_deform_attn_fused`: [B, Q, M * C], and the log-sum-exp of the logits [B, Q, M]."""
    inputs = (value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits, shapes_hw, num_points)
    problem = Problem(*inputs, BILINEAR, offset_scale)
    return _fused_reference(*inputs, offset_scale) if problem.is_degenerate else _forward(problem)


def ms_deform_attn_fused_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    shapes_hw: Sequence[int] | None,
    num_points: Sequence[int] | None,
    offset_scale: float,
    lse: Tensor,
    need_reference_grad: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ssod_fast::ms_deform_attn_fused_backward`; `deterministic` takes the reference, as in :func:`ms_deform_attn_backward`."""
    inputs = (value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits, shapes_hw, num_points)
    problem = Problem(*inputs, BILINEAR, offset_scale)
    if deterministic or problem.is_degenerate:
        return _fused_reference_backward(grad_output, *inputs, offset_scale, lse, need_reference_grad, deterministic)
    grad_value, grad_reference, grad_offsets, grad_logits = _backward(problem, grad_output, lse)
    return grad_value, grad_reference if need_reference_grad else reference_points.new_empty(0), grad_offsets, grad_logits
