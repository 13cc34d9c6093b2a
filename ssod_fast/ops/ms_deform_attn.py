"""Multi-scale deformable attention (Zhu et al., Deformable DETR, arXiv 2010.04159)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import _boxes, _ms_deform_checks
from . import _ms_deform_attn as sampling
from ._ms_deform_checks import Shapes
from ._registry import launcher, register

Method = Literal["bilinear", "discrete"]
_METHODS = {"bilinear": sampling.BILINEAR, "discrete": sampling.DISCRETE}
_NAMES = ("sampling_locations", "attention_weights")


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    level_start_index: Tensor | None = None,
    num_points: Sequence[int] | None = None,
    method: Method = "bilinear",
    deterministic: bool | None = None,
) -> Tensor:
    """Weighted sum of a few samples per query and head from every level of a feature pyramid (equation 3 of the paper, unprojected).

    Positions, weights and sums are float32 whatever the dtype of `value` (float64 for float64), rounded once at the end. A bilinear sample
    one pixel or more outside of its level, or at a NaN, contributes exactly 0 and gets no gradient. Sizes that are on the device are not
    read by the host: where they do not fit `value`, samples that would lie outside of it contribute 0. Can be differentiated once and
    backwards: a second derivative and forward mode raise a RuntimeError.

    Args:
        value: [B, S, M, C], float32, float16, bfloat16 or float64: S tokens, level by level, row by row; M heads of C channels.
        spatial_shapes: (height, width) of the L levels as Python ints, or int64 or int32 [L, 2] on the device of `value`.
        sampling_locations: [B, Q, M, L, P, 2] or [B, Q, M, K, 2], any float dtype; (x, y), where 0 and 1 are the outer edges of the level.
        attention_weights: [B, Q, M, L, P] or [B, Q, M, K], any float dtype; used as they are.
        level_start_index: int64 or int32 [L], first token of each level; by default levels follow each other.
        num_points: samples of each level, L ints >= 0 that sum to K, each P where there is a dimension P; by default K / L each.
        method: "bilinear", or "discrete" (RT-DETRv2, arXiv 2407.17140): the pixel at x · width + 0.5 and y · height + 0.5, truncated and
            clamped to the level; locations get gradient 0.
        deterministic: whether the backward sums in a fixed order; by default as `torch.use_deterministic_algorithms` says then.

    Returns:
        [B, Q, M * C], dtype of `value`, contiguous.

    Raises:
        ValueError: for shapes, devices or sizes in host memory that do not fit together, and for an unknown method.
        TypeError: for what is no tensor, for integer, boolean or complex tensors, and for options of other types.
        RuntimeError: for more than 64 levels on CUDA.
    """
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    _ms_deform_checks.check_deterministic(deterministic)
    _ms_deform_checks.check_value(value)
    shapes, start, hw, levels = _ms_deform_checks.check_levels(value, spatial_shapes, level_start_index)
    _ms_deform_checks.check_samples(value, sampling_locations, attention_weights, levels, num_points, _NAMES)
    _ms_deform_checks.refuse_tangents("ms_deform_attn", value, sampling_locations, attention_weights)
    options = hw, num_points, _METHODS[method]
    if torch.is_grad_enabled() and (value.requires_grad or sampling_locations.requires_grad or attention_weights.requires_grad):
        tensors = value, shapes, start, sampling_locations, attention_weights
        result: Tensor = _MSDeformAttn.apply(*tensors, deterministic, *options)  # type: ignore[no-untyped-call]
        return result
    return _forward(*_layout(value, shapes, start, sampling_locations, attention_weights), *options)


def ms_deform_attn_gradients(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    level_start_index: Tensor | None = None,
    num_points: Sequence[int] | None = None,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of bilinear :func:`ms_deform_attn` by explicit call, for code that has an autograd function of its own around it.

    Args:
        grad_output: [B, Q, M * C], gradient of the result.
        value: as the remaining arguments, what :func:`ms_deform_attn` was called with.
        spatial_shapes: see `value`.
        sampling_locations: see `value`.
        attention_weights: see `value`.
        level_start_index: see `value`.
        num_points: see `value`.
        deterministic: see :func:`ms_deform_attn`.

    Returns:
        Gradients of value, sampling_locations and attention_weights, each with shape and dtype of its tensor.

    Raises:
        ValueError: as :func:`ms_deform_attn`.
        TypeError: as :func:`ms_deform_attn`.
    """
    _ms_deform_checks.check_deterministic(deterministic)
    _ms_deform_checks.check_value(value)
    shapes, start, hw, levels = _ms_deform_checks.check_levels(value, spatial_shapes, level_start_index)
    _ms_deform_checks.check_samples(value, sampling_locations, attention_weights, levels, num_points, _NAMES)
    _ms_deform_checks.check_grad_output(grad_output, value, attention_weights.shape[1])
    with torch.no_grad():
        tensors = value, shapes, start, sampling_locations, attention_weights
        return _gradients(grad_output.to(value.dtype), *tensors, deterministic, hw, num_points, sampling.BILINEAR)


def _layout(
    value: Tensor, shapes: Tensor | None, start: Tensor | None, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Checked tensors as the op takes them."""
    return _ms_deform_checks.dense_tokens(value), shapes, start, *_ms_deform_checks.flat_samples(value, locations, weights)


def _gradients(
    grad: Tensor,
    value: Tensor,
    shapes: Tensor | None,
    start: Tensor | None,
    locations: Tensor,
    weights: Tensor,
    deterministic: bool | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of checked tensors in the form that they were given in.

    Every backward has a path that sums in a fixed order, so none has to warn that it does not.
    """
    inputs = _layout(value, shapes, start, locations, weights)
    fixed = torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic
    grad_value, grad_locations, grad_weights = _backward(grad.contiguous(), *inputs, *options, fixed)
    shaped_like = _ms_deform_checks.shaped_like
    return grad_value, shaped_like(grad_locations, locations), shaped_like(grad_weights, weights)


def _reference(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    shapes_hw: Sequence[int] | None,
    num_points: Sequence[int] | None,
    method: int,
) -> Tensor:
    dtype = sampling.compute_dtype(value)
    levels = sampling.make_levels(value.device, attention_weights.shape[3], spatial_shapes, level_start_index, shapes_hw, num_points)
    locations, weights = sampling_locations.to(dtype), attention_weights.to(dtype)
    if method == sampling.BILINEAR:
        out = sampling.sample_bilinear(value.to(dtype), *sampling.pixel_positions(locations, levels), weights, levels)
    else:
        out = sampling.sample_discrete(value.to(dtype), locations, weights, levels)
    return out.flatten(2).to(value.dtype)


def _reference_backward(
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
    dtype = sampling.compute_dtype(value)
    levels = sampling.make_levels(value.device, attention_weights.shape[3], spatial_shapes, level_start_index, shapes_hw, num_points)
    locations, weights = sampling_locations.to(dtype), attention_weights.to(dtype)
    grad, wide = grad_output.to(dtype).unflatten(2, value.shape[2:]), value.to(dtype)
    if method == sampling.BILINEAR:
        grads = sampling.bilinear_gradients(grad, wide, *sampling.pixel_positions(locations, levels), weights, levels)
    else:
        grads = sampling.discrete_gradients(grad, wide, locations, weights, levels)
    grad_locations = torch.stack((sampling.chain(grads.px, levels.width), sampling.chain(grads.py, levels.height)), -1)
    return grads.value.to(value.dtype), grad_locations.to(sampling_locations.dtype), grads.weight.to(attention_weights.dtype)


def _fake(value: Tensor, spatial_shapes: Any, start: Any, locations: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    return value.new_empty((value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]))


def _fake_backward(
    grad_output: Tensor, value: Tensor, spatial_shapes: Any, start: Any, locations: Tensor, weights: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


_INPUT = (
    "Tensor value, Tensor? spatial_shapes, Tensor? level_start_index, Tensor sampling_locations, Tensor attention_weights, "
    "SymInt[]? shapes_hw, int[]? num_points, int method"
)
register(
    f"ms_deform_attn({_INPUT}) -> Tensor",
    reference=_reference,
    fake=_fake,
    triton=launcher("ms_deform_attn", "ms_deform_attn"),
)
register(
    f"ms_deform_attn_backward(Tensor grad_output, {_INPUT}, bool deterministic) "
    "-> (Tensor grad_value, Tensor grad_locations, Tensor grad_weights)",
    reference=_reference_backward,
    fake=_fake_backward,
    triton=launcher("ms_deform_attn", "ms_deform_attn_backward"),
)
_forward: Callable[..., Tensor] = torch.ops.ssod_fast.ms_deform_attn.default
_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.ssod_fast.ms_deform_attn_backward.default


class _MSDeformAttn(torch.autograd.Function):
    """Saves the inputs alone and samples again in the backward; thinner per call than a registered autograd formula.

    Brings the inputs into layout itself, out of sight of autograd: one node instead of one more for every view and cast.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, shapes: Any, start: Any, locations: Tensor, weights: Tensor, fixed: Any, *options: Any) -> Tensor:
        ctx.save_for_backward(value, shapes, start, locations, weights)
        ctx.options = fixed, *options
        return _forward(*_layout(value, shapes, start, locations, weights), *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs = ctx.saved_tensors
        grads = _gradients(grad, *inputs, *ctx.options)
        if torch.is_grad_enabled():  # somebody will differentiate again
            grads = _boxes.once("ms_deform_attn", (grad, inputs[0], inputs[3], inputs[4]), grads)
        grad_value, grad_locations, grad_weights = grads
        return grad_value, None, None, grad_locations, grad_weights, None, None, None, None
