"""Deformable attention of detrex, with or without its compiled extension."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

from torch import nn

from ._attention import holders, plan_module, require_attribute
from ._patch import Patched, Plan, UnknownSurface, check_switch, is_replaced, original, require
from .shims import install_as, plan_extension

_MODULE = "detrex.layers.multi_scale_deform_attn"
_EXTENSION = "detrex._C"
_ATTENTION = "MultiScaleDeformableAttention"


def patch(*, deterministic: bool | None = None) -> Patched:
    """Replaces forward and backward of its autograd function, its composition for the CPU, and `detrex._C`, which may be missing.

    Without its extension detrex puts a class that raises in place of its attention module when it is imported. That class is replaced
    by the real one, made from detrex's own source, in every loaded module that has imported it. Models that were built before keep their
    state dicts.

    Args:
        deterministic: whether backwards sum in a fixed order; by default as `torch.use_deterministic_algorithms` says then.

    Returns:
        What is replaced; a context manager that puts it back.

    Raises:
        ImportError: without detrex.
        UnknownSurface: for a version that looks otherwise; nothing is replaced then.
        ValueError: if it is patched with other options; nothing is replaced then.
        TypeError: if `deterministic` is neither a bool nor None.
    """
    check_switch("deterministic", deterministic, optional=True)
    return _plan(deterministic).apply(f"{_MODULE} has nothing to replace")


def unpatch() -> int:
    """Undoes :func:`patch`, also where it was called several times.

    Returns:
        How many places are as they were; 0 the second time.

    Raises:
        RuntimeError: if a place has been replaced again by somebody else; nothing is put back then.
    """
    return _plan(None).revert()


def _plan(deterministic: bool | None) -> Plan:
    plan = Plan(deterministic=deterministic)
    module = require(_MODULE, "detrex", " from its repository")
    plan_module(plan, module, deterministic)
    plan_extension(plan, _EXTENSION, deterministic)
    _plan_real_class(plan, module, deterministic)
    return plan


def _plan_real_class(plan: Plan, module: ModuleType, deterministic: bool | None) -> None:
    current = require_attribute(module, _ATTENTION)
    if is_replaced(module, _ATTENTION):
        real = current
    elif _is_module_class(current):
        return
    else:
        fresh = _executed_again(module)
        real = require_attribute(fresh, _ATTENTION)
        if not _is_module_class(real):
            raise UnknownSurface(f"{_MODULE}.{_ATTENTION} must be a torch module, found {real!r}: nothing was patched")
        inner = Plan()  # nobody else sees that module: nothing to put back, and nothing to report
        plan_module(inner, fresh, deterministic)
        inner.apply(f"{_MODULE} has nothing to replace")
    for owner in dict.fromkeys((module, *holders(original(module, _ATTENTION), _ATTENTION), *holders(real, _ATTENTION))):
        plan.add(owner, _ATTENTION, real)


def _is_module_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _executed_again(module: ModuleType) -> ModuleType:
    """The module from its source, which now finds an extension; not entered into sys.modules."""
    spec = importlib.util.find_spec(module.__name__)
    if spec is None or spec.loader is None:
        raise UnknownSurface(f"{module.__name__} has no source to be executed again: nothing was patched")
    fresh = importlib.util.module_from_spec(spec)
    with install_as(_EXTENSION):
        spec.loader.exec_module(fresh)
    return fresh
