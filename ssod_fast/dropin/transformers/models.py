"""Patches of live models, and of the models that transformers will build."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

from .._patch import (
    Patched,
    Place,
    Plan,
    UnknownSurface,
    check_parameters,
    check_switch,
    is_replaced,
    optional,
    original,
    places_in,
    require,
    restore_places,
)
from .attention import SUFFIX, WRAPPERS, AttentionCore, Mode, Wrapper, attention, attention_v2, returns_weights_untold

CORE = "MultiScaleDeformableAttention"
_CORE_PARAMETERS = (
    "value", "value_spatial_shapes", "value_spatial_shapes_list", "level_start_index", "sampling_locations", "attention_weights",
    "im2col_step",
)  # fmt: skip
_FUNCTIONS = {
    "rt_detr_v2": ("multi_scale_deformable_attention_v2", attention_v2),
    "d_fine": ("multi_scale_deformable_attention_v2", attention_v2),
    "deimv2": ("multi_scale_deformable_attention_v2", attention_v2),
    "mask2former": ("multi_scale_deformable_attention", attention),
    "oneformer": ("multi_scale_deformable_attention", attention),
}
_FUNCTION_PARAMETERS = ("value", "value_spatial_shapes", "sampling_locations", "attention_weights")
_PATCHED_NAMES = ("forward", "attn", "ms_deformable_attn_core")
_OLDEST, _NEXT_MAJOR = (5, 17), (6, 0)


def check_version() -> None:
    """Refuses versions of transformers that nobody has looked at; within them the parameters of all that is replaced are compared.

    Raises:
        ImportError: if transformers is missing or its version is not known.
    """
    found = str(require("transformers", "transformers>=5.17,<6").__version__)
    if not _OLDEST <= tuple(int(part) for part in found.split(".")[:2]) < _NEXT_MAJOR:
        raise ImportError(f"transformers {found} is not known to ssod_fast: install transformers>=5.17,<6")


def patch(model: nn.Module, fused: bool = True, *, deterministic: bool | None = None) -> Patched:
    """Puts our op into every multi-scale deformable attention of a model of transformers.

    Weights, state dict, device, recorded attentions, masks, hooks and adapters stay as they are; `copy.deepcopy` copies the patch.
    What is patched already stays so. Forward hooks of a wrapper's submodule `attn` never fire after this: with `fused` it is not called,
    and without it another module stands in its place. Hooks of the wrapper itself do fire.

    Args:
        model: any module with such models inside.
        fused: also skip sampling locations and softmaxed weights; False keeps as much of transformers' own code as possible.
        deterministic: whether gradients sum in a fixed order; None follows `torch.use_deterministic_algorithms`.

    Returns:
        What is patched now, with its `count`.

    Raises:
        NothingPatched: if the model has no such attention.
        UnknownSurface: if an attention looks otherwise, or hooks of accelerate have set its forward; nothing is patched then.
        ValueError: if an attention is patched with other options; nothing is patched then.
        ImportError: if transformers is missing, or a version that is not known; nothing is changed then.
        TypeError: if `model` is no module, `fused` no bool, or `deterministic` neither a bool nor None.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_switch("fused", fused)
    check_switch("deterministic", deterministic, optional=True)
    check_version()
    plan = Plan(fused=fused, deterministic=deterministic)
    for name, module in model.named_modules():
        _plan_module(plan, module, name or type(module).__name__, Mode(fused, deterministic))
    return plan.apply(f"{type(model).__name__} has no multi-scale deformable attention of transformers")


def unpatch(model: nn.Module) -> int:
    """Takes :func:`patch` back.

    Args:
        model: a patched model, or a copy of one.

    Returns:
        How many places were restored, 0 if the model was not patched.

    Raises:
        RuntimeError: if a place has been replaced again by somebody else, as by hooks of accelerate; nothing is put back then.
        TypeError: if `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return restore_places(places_in(model, *_PATCHED_NAMES))


def _plan_module(plan: Plan, module: nn.Module, label: str, mode: Mode) -> None:
    name = type(module).__name__
    wrapper = WRAPPERS.get(name) if type(module).__module__.startswith("transformers.models.") else None
    if any(is_replaced(module, place) for place in _PATCHED_NAMES):
        for place in _PATCHED_NAMES:
            if is_replaced(module, place):
                plan.add(module, place, None, f"{label}.{place}")
    elif _has_core(module) and not (mode.fused and wrapper):
        _plan_core(plan, module, label, mode)
    elif wrapper:
        _plan_wrapper(plan, module, wrapper, label, mode)
    elif name.endswith(SUFFIX) and type(module).__module__.startswith("transformers."):
        raise UnknownSurface(f"{label} is a {name}, which ssod_fast does not know: nothing was patched")


def _has_core(module: nn.Module) -> bool:
    return type(getattr(module, "attn", None)).__name__ in (CORE, AttentionCore.__name__)


def _plan_core(plan: Plan, module: nn.Module, label: str, mode: Mode) -> None:
    old: Any = module.attn
    if not isinstance(old, AttentionCore):
        check_parameters(old.forward, f"{label}.attn", _CORE_PARAMETERS)
        if next(old.parameters(), None) is not None:
            raise UnknownSurface(f"{label}.attn has parameters, expected none: nothing was patched")
    plan.add(module, "attn", AttentionCore(mode.deterministic).train(old.training), f"{label}.attn")


def _plan_wrapper(plan: Plan, module: nn.Module, wrapper: Wrapper, label: str, mode: Mode) -> None:
    if "forward" in vars(module):
        raise UnknownSurface(
            f"{label} has a forward of its own, as hooks of accelerate set it: patch before that, or, where "
            "from_pretrained(device_map=...) sets it, call register() before from_pretrained; nothing was patched"
        )
    check_parameters(type(module).forward, label, *[("self", *names) for names in wrapper.parameters])
    missing = [member for member in wrapper.members if not hasattr(module, member)]
    if missing:
        raise UnknownSurface(f"{label} has no {missing[0]}, expected {', '.join(wrapper.members)}: nothing was patched")
    mode = dataclasses.replace(mode, always_weights=returns_weights_untold(type(module).__name__, label))
    if hasattr(module, "ms_deformable_attn_core") and not mode.fused:
        plan.add(
            module, "ms_deformable_attn_core", partial(attention_v2, deterministic=mode.deterministic), f"{label}.ms_deformable_attn_core"
        )
    else:
        plan.add(module, "forward", partial(wrapper.forward, module, mode), f"{label}.forward")


def register() -> Patched:
    """Puts our op into all models that transformers builds from now on by `from_pretrained` and `from_config`.

    For models that call a function instead of a module (RT-DETRv2, D-FINE, DEIMv2, Mask2Former, OneFormer) the function is replaced, which
    also serves plain constructors. :func:`patch` does more, since it also reaches models that exist.

    Returns:
        What is replaced now; one place is the registry of transformers.

    Raises:
        ImportError: if transformers is missing, or a version that is not known; nothing is changed then.
        ValueError: by transformers, if another class is registered in place of the same one; nothing is changed then.
    """
    check_version()
    registry = require("transformers.monkey_patching", "transformers>=5.17,<6")
    plan = Plan()
    for module, name, new in _functions():
        names = _FUNCTION_PARAMETERS if new is attention else (*_FUNCTION_PARAMETERS, "num_points_list", "method")
        check_parameters(original(module, name), f"{module.__name__}.{name}", names)
        plan.add(module, name, new)
    known = _registered(registry)
    if not known:  # before the functions: it refuses a name that somebody else has taken
        registry.register_patch_mapping({CORE: AttentionCore})
    patched = plan.apply("transformers has no multi-scale deformable attention")
    places = (f"registry of transformers: {CORE}", *patched.places)
    return dataclasses.replace(patched, places=places, _undo=() if known else (partial(_forget, registry),))


def unregister() -> int:
    """Takes :func:`register` back. Models that were built in between keep our op.

    Returns:
        How many places were restored, 0 if nothing was registered.

    Raises:
        ImportError: if transformers is missing, or a version that is not known.
        RuntimeError: if a function has been replaced again by somebody else; nothing is put back then.
    """
    check_version()
    registry = require("transformers.monkey_patching", "transformers>=5.17,<6")
    places = [Place(module, name, f"{module.__name__}.{name}") for module, name, _ in _functions()]
    return restore_places(places) + _forget(registry)


def _forget(registry: ModuleType) -> bool:
    """Takes our class out of the registry; False if it is not there."""
    ours = _registered(registry)
    if ours:
        registry.unregister_patch_mapping([CORE])
    return ours


def _registered(registry: ModuleType) -> bool:
    return registry.get_patch_mapping().get(CORE) is AttentionCore


def _functions() -> Iterator[tuple[ModuleType, str, Any]]:
    for model, (name, new) in _FUNCTIONS.items():
        module = optional(f"transformers.models.{model}.modeling_{model}")
        if module is not None:
            yield module, name, new
