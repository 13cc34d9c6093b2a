"""Deformable attention in the forms in which other code bases call it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import ms_deform_attn
from ..ops.ms_deform_attn import ms_deform_attn_gradients
from ._patch import Plan, UnknownSurface, check_parameters

CORE = ("value", "value_spatial_shapes", "sampling_locations", "attention_weights")
FORWARD = ("ctx", "value", "value_spatial_shapes", "value_level_start_index", "sampling_locations", "attention_weights", "im2col_step")


def exporting() -> bool:
    """Whether the call becomes part of a graph for programs that know none of our ops: a trace or an exported program.

    Both exporters of ONNX start from one of the two.
    """
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    # Not is_exporting(), which is a constant True wherever dynamo is at work.
    return traced or torch.compiler._is_exporting_flag


def core_function(original: Callable[..., Tensor], deterministic: bool | None) -> Callable[..., Tensor]:
    """Replaces a composition of grid_sample with the arguments :data:`CORE`; where a graph is exported, `original` is called.

    Args:
        original: the composition.
        deterministic: see :func:`ssod_fast.ops.ms_deform_attn`.

    Returns:
        A function with name, text and signature of `original`.
    """

    @functools.wraps(original)
    def attention(value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
        if exporting():
            return original(value, value_spatial_shapes, sampling_locations, attention_weights)
        return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights, deterministic=deterministic)

    return attention


def autograd_methods(deterministic: bool | None) -> tuple[Any, Any]:
    """Forward and backward for autograd functions around the 2020 kernel (Deformable DETR, mmcv, detrex, GroundingDINO).

    They stand in the class that calls them, not in place of it: code that has imported the class by name is covered too. Any dtypes mix,
    and `im2col_step` divides nothing.

    Args:
        deterministic: see :func:`ssod_fast.ops.ms_deform_attn`.

    Returns:
        Two static methods.
    """

    def forward(
        ctx: Any,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        inputs = value, value_spatial_shapes, sampling_locations, attention_weights
        ctx.save_for_backward(*inputs, value_level_start_index)
        return ms_deform_attn(*inputs, level_start_index=value_level_start_index)

    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        *inputs, start = ctx.saved_tensors
        grads = ms_deform_attn_gradients(grad_output, *inputs, level_start_index=start, deterministic=deterministic)
        return grads[0], None, None, grads[1], grads[2], None

    return staticmethod(forward), staticmethod(backward)


def plan_module(plan: Plan, module: ModuleType, deterministic: bool | None) -> None:
    """Plans what mmcv, detrex and GroundingDINO have in common: an autograd function for CUDA and a composition for CPU.

    Args:
        plan: gets the replacements.
        module: defines MultiScaleDeformableAttnFunction and multi_scale_deformable_attn_pytorch.
        deterministic: see :func:`ssod_fast.ops.ms_deform_attn`.

    Raises:
        UnknownSurface: if the module defines something else.
    """
    function = require_attribute(module, "MultiScaleDeformableAttnFunction")
    label = f"{module.__name__}.MultiScaleDeformableAttnFunction"
    if not (isinstance(function, type) and issubclass(function, torch.autograd.Function)):
        raise UnknownSurface(f"{label} must be an autograd function, found {function!r}: this version is not known, nothing was patched")
    check_parameters(function.forward, f"{label}.forward", FORWARD)
    check_parameters(function.backward, f"{label}.backward", ("ctx", "grad_output"))
    for name, method in zip(("forward", "backward"), autograd_methods(deterministic), strict=True):
        plan.add(function, name, method, f"{label}.{name}")
    plan_core_function(plan, module, "multi_scale_deformable_attn_pytorch", deterministic)


def plan_core_function(plan: Plan, module: ModuleType, name: str, deterministic: bool | None) -> None:
    """Plans the replacement of a composition with the arguments :data:`CORE`, and of every copy of its name in loaded modules.

    Args:
        plan: gets the replacements.
        module: defines the function.
        name: of the function.
        deterministic: see :func:`ssod_fast.ops.ms_deform_attn`.

    Raises:
        UnknownSurface: if there is no such function, or one with other arguments.
    """
    original = require_attribute(module, name)
    check_parameters(original, f"{module.__name__}.{name}", CORE)
    replacement = core_function(original, deterministic)
    for owner in dict.fromkeys((module, *holders(original, name))):
        plan.add(owner, name, replacement)


def require_attribute(module: ModuleType, name: str) -> Any:
    """An attribute that a known version has.

    Args:
        module: where it is.
        name: of it.

    Returns:
        Its value.

    Raises:
        UnknownSurface: if it is not there.
    """
    if name not in vars(module):
        raise UnknownSurface(f"{module.__name__} has no {name}: this version is not known, nothing was patched")
    return vars(module)[name]


def holders(value: Any, name: str, package: str = "") -> Iterator[ModuleType]:
    """Loaded modules that hold `value` under `name`, as after an import by name.

    Args:
        value: compared by identity.
        name: of the attribute.
        package: only modules inside of it; by default all.

    Yields:
        Modules.
    """
    for module in list(sys.modules.values()):
        inside = not package or getattr(module, "__name__", "").split(".")[0] == package
        if inside and isinstance(module, ModuleType) and vars(module).get(name) is value:
            yield module
