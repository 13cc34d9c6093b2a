"""Multi-scale deformable attention of what the projections of a module return: offsets and logits, not positions and weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import _boxes, _ms_deform_checks
from . import _ms_deform_attn as sampling
from ._ms_deform_checks import Shapes
from ._registry import launcher, register

_NAMES = ("sampling_offsets", "attention_logits")


@overload
def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Shapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    level_start_index: Tensor | None = ...,
    num_points: Sequence[int] | None = ...,
    offset_scale: float = ...,
    deterministic: bool | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Shapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    level_start_index: Tensor | None = ...,
    num_points: Sequence[int] | None = ...,
    offset_scale: float = ...,
    deterministic: bool | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Shapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    level_start_index: Tensor | None = None,
    num_points: Sequence[int] | None = None,
    offset_scale: float = 0.5,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`ms_deform_attn` of locations around reference points and of softmaxed weights, neither of which is ever stored.

    A reference (x, y) is offset in pixels of the level: position = x + offset / width. A box (cx, cy, w, h) is offset in shares of its
    size, where its level has P points: position = cx + offset / P * w * offset_scale; in y likewise with the height. The softmax runs over
    all K samples of a head. Keeping reference points in float32 keeps positions exact to a few thousandths of a pixel even where offsets
    are bfloat16. Can be differentiated once and backwards: a second derivative and forward mode raise a RuntimeError.

    Args:
        value: [B, S, M, C], see :func:`ms_deform_attn`.
        spatial_shapes: see :func:`ms_deform_attn`.
        reference_points: [B, Q, L or 1, 2] (x, y) or [B, Q, L or 1, 4] (cx, cy, w, h), normalised, any float dtype.
        sampling_offsets: [B, Q, M, L, P, 2] or [B, Q, M, K, 2], any float dtype; may be a view of a wider row, as may the logits.
        attention_logits: [B, Q, M, L, P] or [B, Q, M, K], any float dtype.
        level_start_index: see :func:`ms_deform_attn`.
        num_points: see :func:`ms_deform_attn`.
        offset_scale: finite number, see above; no matter for references of two numbers.
        deterministic: see :func:`ms_deform_attn`.
        return_lse: also return the log-sum-exp of the logits, without gradient: the attention weights are exp(logits - lse).

    Returns:
        [B, Q, M * C], dtype of `value`, contiguous; with `return_lse` also [B, Q, M], float32 (float64 for a float64 value).

    Raises:
        ValueError: for shapes, devices or sizes in host memory that do not fit together, and for an `offset_scale` that is not finite.
        TypeError: for what is no tensor, for integer, boolean or complex tensors, and for options of other types.
        RuntimeError: for more than 64 levels on CUDA.
    """
    _ms_deform_checks.check_deterministic(deterministic)
    _ms_deform_checks.check_value(value)
    shapes, start, hw, levels = _ms_deform_checks.check_levels(value, spatial_shapes, level_start_index)
    _ms_deform_checks.check_samples(value, sampling_offsets, attention_logits, levels, num_points, _NAMES)
    _ms_deform_checks.check_reference(reference_points, value, attention_logits, levels)
    _ms_deform_checks.refuse_tangents("ms_deform_attn_fused", value, reference_points, sampling_offsets, attention_logits)
    tensors = value, shapes, start, reference_points, sampling_offsets, attention_logits
    options = hw, num_points, _ms_deform_checks.check_offset_scale(offset_scale)
    wanted = value.requires_grad or sampling_offsets.requires_grad or attention_logits.requires_grad or reference_points.requires_grad
    if wanted and torch.is_grad_enabled():
        out, lse = _MSDeformAttnFused.apply(*tensors, deterministic, *options)  # type: ignore[no-untyped-call]
    else:
        out, lse = _forward(*_layout(*tensors), *options)
    return (out, lse) if return_lse else out


def _layout(
    value: Tensor, shapes: Tensor | None, start: Tensor | None, points: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
    """Checked tensors as the op takes them."""
    samples = _ms_deform_checks.flat_samples(value, offsets, logits)
    return _ms_deform_checks.dense_tokens(value), shapes, start, _ms_deform_checks.wide_reference(points, value), *samples


class _Samples(NamedTuple):
    """Input of the reference in the compute dtype."""

    value: Tensor
    levels: sampling.Levels
    positions: sampling.FusedPositions
    logits: Tensor


def _samples(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    shapes_hw: Sequence[int] | None,
    num_points: Sequence[int] | None,
    offset_scale: float,
) -> _Samples:
    dtype = sampling.compute_dtype(value)
    levels = sampling.make_levels(value.device, attention_logits.shape[3], spatial_shapes, level_start_index, shapes_hw, num_points)
    positions = sampling.fused_positions(reference_points.to(dtype), sampling_offsets.to(dtype), levels, offset_scale)
    return _Samples(value.to(dtype), levels, positions, attention_logits.to(dtype))


def _reference(value: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    given = _samples(value, *inputs)
    weights = given.logits.softmax(-1)
    out = sampling.sample_bilinear(given.value, given.positions.px, given.positions.py, weights, given.levels)
    return out.flatten(2).to(value.dtype), given.logits.logsumexp(-1)


def _reference_backward(
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
    tables, points = (spatial_shapes, level_start_index), (shapes_hw, num_points)
    given = _samples(value, *tables, reference_points, sampling_offsets, attention_logits, *points, offset_scale)
    weights = (given.logits - lse.unsqueeze(-1)).exp()
    grad = grad_output.to(given.value.dtype).unflatten(2, value.shape[2:])
    grads = sampling.bilinear_gradients(grad, given.value, given.positions.px, given.positions.py, weights, given.levels)
    grad_offsets, grad_reference = sampling.fused_position_gradients(grads, given.positions, given.levels, reference_points)
    grad_logits = weights * (grads.weight - (weights * grads.weight).sum(-1, keepdim=True))
    return (
        grads.value.to(value.dtype),
        grad_reference if need_reference_grad else reference_points.new_empty(0),
        grad_offsets.to(sampling_offsets.dtype),
        grad_logits.to(attention_logits.dtype),
    )


def _fake(
    value: Tensor, spatial_shapes: Any, start: Any, points: Tensor, offsets: Tensor, logits: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    out = value.new_empty((value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3]))
    return out, value.new_empty(logits.shape[:3], dtype=sampling.compute_dtype(value))


def _fake_backward(
    grad_output: Tensor, value: Tensor, spatial_shapes: Any, start: Any, points: Tensor, offsets: Tensor, logits: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_reference_grad = rest[-2]
    return (
        value.new_empty(value.shape),
        points.new_empty(points.shape if need_reference_grad else (0,)),
        offsets.new_empty(offsets.shape),
        logits.new_empty(logits.shape),
    )


_INPUT = (
    "Tensor value, Tensor? spatial_shapes, Tensor? level_start_index, Tensor reference_points, Tensor sampling_offsets, "
    "Tensor attention_logits, SymInt[]? shapes_hw, int[]? num_points, float offset_scale"
)
register(
    f"ms_deform_attn_fused({_INPUT}) -> (Tensor out, Tensor lse)",
    reference=_reference,
    fake=_fake,
    triton=launcher("ms_deform_attn", "ms_deform_attn_fused"),
)
register(
    f"ms_deform_attn_fused_backward(Tensor grad_output, {_INPUT}, Tensor lse, bool need_reference_grad, bool deterministic) "
    "-> (Tensor grad_value, Tensor grad_reference, Tensor grad_offsets, Tensor grad_logits)",
    reference=_reference_backward,
    fake=_fake_backward,
    triton=launcher("ms_deform_attn", "ms_deform_attn_fused_backward"),
)
_forward: Callable[..., tuple[Tensor, Tensor]] = torch.ops.ssod_fast.ms_deform_attn_fused.default
_backward: Callable[..., tuple[Tensor, ...]] = torch.ops.ssod_fast.ms_deform_attn_fused_backward.default


class _MSDeformAttnFused(torch.autograd.Function):
    """Saves the inputs and the log-sum-exp; positions and weights are computed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, shapes: Any, start: Any, points: Tensor, offsets: Tensor, logits: Tensor, fixed: Any, *options: Any
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(*_layout(value, shapes, start, points, offsets, logits), *options)
        ctx.save_for_backward(value, shapes, start, points, offsets, logits, lse)
        ctx.deterministic, ctx.options = fixed, options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        *inputs, lse = ctx.saved_tensors
        value, _, _, points, offsets, logits = inputs
        need_points = ctx.needs_input_grad[3]
        fixed = torch.are_deterministic_algorithms_enabled() if ctx.deterministic is None else ctx.deterministic
        grads: Any = _backward(grad.contiguous(), *_layout(*inputs), *ctx.options, lse, need_points, fixed)
        if torch.is_grad_enabled():  # somebody will differentiate again
            grads = _boxes.once("ms_deform_attn_fused", (grad, value, points, offsets, logits), grads)
        grad_value, grad_points, grad_offsets, grad_logits = grads
        shaped_like = _ms_deform_checks.shaped_like
        grad_samples = shaped_like(grad_offsets, offsets), shaped_like(grad_logits, logits)
        return grad_value, None, None, shaped_like(grad_points, points) if need_points else None, *grad_samples, None, None, None, None
