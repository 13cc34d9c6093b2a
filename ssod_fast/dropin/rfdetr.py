"""The attention module of RF-DETR, LW-DETR, Deformable DETR and other code that took it over unchanged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..ops import ms_deform_attn_fused
from ._attention import exporting
from ._patch import Patched, Plan, check_parameters, check_switch, places_in, restore_places

_CLASS = "MSDeformAttn"
_SIZES = ("d_model", "n_levels", "n_heads", "n_points")
_FORWARD = ("query", "reference_points", "input_flatten", "input_spatial_shapes", "input_level_start_index", "input_padding_mask")
_SHAPES_ON_HOST = "input_spatial_shapes_hw"  # of newer RF-DETR


def patch(model: Any, *, deterministic: bool | None = None) -> Patched:
    """Replaces the forward of every MSDeformAttn in a live model by the fused op: no locations, no softmax, no transposed values.

    Parameters and state dict stay as they are; copies and pickles of the model keep the patch. The check of the number of tokens against
    sizes on the device, which made the host wait, is gone. Export modes go through the original.

    Args:
        model: a module, or what holds one as `.model` or `.model.model`, as the classes of the package rfdetr do.
        deterministic: whether backwards sum in a fixed order; by default as `torch.use_deterministic_algorithms` says then.

    Returns:
        What is replaced; a context manager that puts it back.

    Raises:
        NothingPatched: if the model has no such module.
        UnknownSurface: if an MSDeformAttn takes other arguments; nothing is replaced then.
        ValueError: if a module is patched with another `deterministic`; nothing is replaced then.
        TypeError: if there is no module, or `deterministic` is neither a bool nor None.
    """
    check_switch("deterministic", deterministic, optional=True)
    root, plan = _module_of(model), Plan(deterministic=deterministic)
    for name, module in root.named_modules():
        if type(module).__name__ == _CLASS:
            _check_class(type(module))
            plan.add(module, "forward", functools.partial(_forward, module, deterministic), f"{name}.forward".lstrip("."))
    return plan.apply(f"{type(root).__qualname__} has no module {_CLASS}")


def unpatch(model: Any) -> int:
    """Undoes :func:`patch`.

    Args:
        model: a patched model, or a copy of one.

    Returns:
        How many places are as they were; 0 the second time.

    Raises:
        RuntimeError: if a forward has been replaced again by somebody else; nothing is put back then.
        TypeError: if there is no module.
    """
    return restore_places([place for place in places_in(_module_of(model), "forward") if type(place.owner).__name__ == _CLASS])


def _module_of(model: Any) -> nn.Module:
    found = model
    for _ in range(3):
        if isinstance(found, nn.Module):
            return found
        found = getattr(found, "model", None)
    raise TypeError(f"model must be a torch module or hold one as .model or .model.model, got {type(model).__qualname__}")


def _check_class(kind: Callable[..., nn.Module]) -> None:
    """Refuses descendants with further arguments, which change what is computed."""
    label = f"{kind.__module__}.{_CLASS}"
    check_parameters(kind, label, _SIZES)
    forward = ("self", *_FORWARD)
    check_parameters(kind.forward, f"{label}.forward", forward, (*forward, _SHAPES_ON_HOST))  # type: ignore[attr-defined]


def _forward(
    module: Any,
    deterministic: bool | None,
    query: Tensor,
    reference_points: Tensor,
    input_flatten: Tensor,
    input_spatial_shapes: Tensor,
    input_level_start_index: Tensor,
    input_padding_mask: Tensor | None = None,
    input_spatial_shapes_hw: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """The forward of a module.

    Args:
        module: whose it is.
        deterministic: see :func:`patch`.
        query: [B, Q, d_model].
        reference_points: [B, Q, L or 1, 2 or 4].
        input_flatten: [B, S, d_model].
        input_spatial_shapes: int64 [L, 2], (height, width).
        input_level_start_index: int64 [L].
        input_padding_mask: bool [B, S], True for padding.
        input_spatial_shapes_hw: the sizes as Python ints.

    Returns:
        [B, Q, d_model].
    """
    if exporting() or getattr(module, "_export", False):
        named = {} if input_spatial_shapes_hw is None else {_SHAPES_ON_HOST: input_spatial_shapes_hw}
        inputs = query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index, input_padding_mask
        result: Tensor = type(module).forward(module, *inputs, **named)
        return result
    value = module.value_proj(input_flatten)
    if input_padding_mask is not None:
        value = value.masked_fill(input_padding_mask.unsqueeze(-1), 0)
    out = ms_deform_attn_fused(
        value.unflatten(2, (module.n_heads, -1)),
        input_spatial_shapes if input_spatial_shapes_hw is None else input_spatial_shapes_hw,
        reference_points,
        module.sampling_offsets(query).unflatten(2, (module.n_heads, -1, 2)),  # [B, Q, M, K, 2]
        module.attention_weights(query).unflatten(2, (module.n_heads, -1)),  # [B, Q, M, K]
        level_start_index=input_level_start_index,
        deterministic=deterministic,
    )
    projected: Tensor = module.output_proj(out)
    return projected
