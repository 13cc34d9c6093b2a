"""Deformable attention of the original repositories of RT-DETR (v1 and v2), D-FINE and DEIM."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import ms_deform_attn
from ..ops.ms_deform_attn import Method
from ._attention import CORE, exporting
from ._patch import Patched, Plan, UnknownSurface, check_parameters, check_switch, is_replaced, parameters, places_in, restore_places

_CORE = "ms_deformable_attn_core"  # holds a function, or a functools.partial of one
_VALUE_OP = "value_op"
_V2 = (*CORE, "num_points_list", "method")
_SURFACES = {"deformable_attention_core_func": (CORE,), "deformable_attention_core_func_v2": (_V2, (*_V2, "value_shape"))}
_METHODS: dict[str, Method] = {"default": "bilinear", "discrete": "discrete"}
_VALUE_OP_PARAMETERS = ["memory", "value_proj", "value_scale", "memory_mask", "memory_spatial_shapes"]


def patch(model: nn.Module, *, upstream_square_clamp: bool = True, deterministic: bool | None = None) -> Patched:
    """Replaces the attention of every decoder layer of a live model.

    Parameters, buffers and state dict stay as they are; copies and pickles of the model keep the patch. D-FINE and DEIM split their
    tokens into one channel-first map per level; these are put together once per forward, not once per layer. Exports (TorchScript, ONNX,
    torch.export) go through the original.

    Args:
        model: any module that contains decoders of these repositories.
        upstream_square_clamp: where `method` is "discrete", clamp x and y both to the height, as the originals do: models were trained
            with it. Wide maps then lose their right part; False clamps x to the width, as transformers does. On maps higher than wide,
            where the original fails with an index out of range, x is clamped to the width in any case.
        deterministic: whether backwards sum in a fixed order; by default as `torch.use_deterministic_algorithms` says then.

    Returns:
        What is replaced; a context manager that puts it back.

    Raises:
        NothingPatched: if the model has no such attention.
        UnknownSurface: if an attention has a function that is not known; nothing is replaced then.
        ValueError: if an attention is patched with other options; nothing is replaced then.
        TypeError: if `model` is no module, or an option is no bool (nor None).
    """
    _check_module(model)
    check_switch("upstream_square_clamp", upstream_square_clamp)
    check_switch("deterministic", deterministic, optional=True)
    plan = Plan(upstream_square_clamp=upstream_square_clamp, deterministic=deterministic)
    for name, module in _owners(model):
        current = vars(module)[_CORE]
        patched = is_replaced(module, _CORE)
        plan.add(module, _CORE, current if patched else _replacement(current, name, upstream_square_clamp, deterministic), name)
    for part in model.modules() if any(_owners(model)) else ():
        if _joins_levels(part):
            plan.add(part, _VALUE_OP, functools.partial(_value_op, part))
    return plan.apply(f"{type(model).__qualname__} has no module with {_CORE}: not a model of RT-DETR, D-FINE or DEIM")


def unpatch(model: nn.Module) -> int:
    """Undoes :func:`patch`.

    Args:
        model: a patched model, or a copy of one.

    Returns:
        How many places are as they were; 0 the second time.

    Raises:
        RuntimeError: if a place has been replaced again by somebody else; nothing is put back then.
        TypeError: if `model` is no module.
    """
    _check_module(model)
    return restore_places(places_in(model, _CORE, _VALUE_OP))


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if _CORE in vars(module):
            yield f"{name}.{_CORE}".lstrip("."), module


def _joins_levels(module: nn.Module) -> bool:
    """Whether a decoder splits its tokens by level for all of its layers; a function that somebody else has put there is left alone."""
    method = getattr(type(module), _VALUE_OP, None)
    mine = _VALUE_OP not in vars(module) or is_replaced(module, _VALUE_OP)
    return mine and callable(method) and parameters(method) == ["self", *_VALUE_OP_PARAMETERS]


def _replacement(current: Callable[..., Tensor], label: str, square: bool, deterministic: bool | None) -> Callable[..., Tensor]:
    wrapped = isinstance(current, functools.partial)
    function: Any = current.func if wrapped else current  # type: ignore[attr-defined]
    options = dict(current.keywords) if wrapped else {}  # type: ignore[attr-defined]
    name = getattr(function, "__name__", repr(function))
    if name not in _SURFACES:
        known = " or ".join(_SURFACES)
        theirs = getattr(function, "__module__", "").startswith("transformers.")
        hint = "; for models of transformers there is ssod_fast.dropin.transformers.patch" if theirs else ""
        raise UnknownSurface(f"{label} is {name}, expected {known}: not known, nothing was patched{hint}")
    check_parameters(function, name, *_SURFACES[name])
    method = options.pop("method", "default")
    options.pop("value_shape", None)  # which of two forms values have, as their type tells too
    if method not in _METHODS or options or (wrapped and current.args):  # type: ignore[attr-defined]
        raise UnknownSurface(f"{label} is {current}, expected method {' or '.join(_METHODS)} and nothing else: nothing was patched")
    return functools.partial(_attention, current, method, square, deterministic)


def _attention(
    original: Callable[..., Tensor],
    method: str,
    square: bool,
    deterministic: bool | None,
    value: Tensor | Sequence[Tensor],
    value_spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int] | None = None,
) -> Tensor:
    """The function of a layer.

    Args:
        original: what it replaces.
        method: "default" or "discrete".
        square: see `upstream_square_clamp` of :func:`patch`.
        deterministic: see :func:`patch`.
        value: [B, S, M, C], or one [B, M, C, H * W] per level.
        value_spatial_shapes: (height, width) of each level.
        sampling_locations: [B, Q, M, K, 2], or [B, Q, M, L, P, 2] in v1.
        attention_weights: [B, Q, M, K] or [B, Q, M, L, P].
        num_points_list: samples of each level, which v1 does not have.

    Returns:
        [B, Q, M * C].
    """
    if exporting():
        given = () if num_points_list is None else (num_points_list,)
        return original(value, value_spatial_shapes, sampling_locations, attention_weights, *given)
    if method == "discrete" and square and num_points_list is not None:
        sampling_locations = _clamp_to_square(sampling_locations, value_spatial_shapes, num_points_list)
    return ms_deform_attn(
        _tokens(value),
        value_spatial_shapes,
        sampling_locations,
        attention_weights,
        num_points=num_points_list,
        method=_METHODS[method],
        deterministic=deterministic,
    )


def _clamp_to_square(locations: Tensor, shapes: Any, num_points: Sequence[int]) -> Tensor:
    """Moves x from where pixel `height` or a later one is read to the pixel before; [B, Q, M, K, 2], without gradient."""
    x, y = locations.detach().to(torch.promote_types(locations.dtype, torch.float32)).unbind(-1)
    limited = [part.clamp(max=(h - 1) / w) for part, (h, w) in zip(x.split(list(num_points), -1), shapes, strict=True)]
    return torch.stack((torch.cat(limited, -1), y), -1)


def _tokens(value: Tensor | Sequence[Tensor]) -> Tensor:
    """[B, S, M, C] of either form."""
    return value if isinstance(value, Tensor) else torch.cat([level.permute(0, 3, 1, 2) for level in value], 1)


def _value_op(module: Any, *args: Any, **named: Any) -> Any:
    """Tokens [B, S, M, C] instead of a split per level, except where the original attention will take them."""
    levels = type(module).value_op(module, *args, **named)
    return levels if exporting() else _tokens(levels)
