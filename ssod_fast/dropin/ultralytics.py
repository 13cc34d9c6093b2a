"""Deformable attention of the RT-DETR decoder in ultralytics."""

from __future__ import annotations

from ._attention import plan_core_function
from ._patch import Patched, Plan, check_switch, require

_MODULE = "ultralytics.nn.modules.transformer"
_FUNCTION = "multi_scale_deformable_attn_pytorch"


def patch(*, deterministic: bool | None = None) -> Patched:
    """Replaces the attention function in every loaded module that has imported it; models built before and after use ours.

    Exports (TorchScript, ONNX, torch.export) are traced through the original, so that their graphs stay as they were.

    Args:
        deterministic: whether backwards sum in a fixed order; by default as `torch.use_deterministic_algorithms` says then.

    Returns:
        What is replaced; a context manager that puts it back.

    Raises:
        ImportError: without ultralytics.
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
    plan_core_function(plan, require(_MODULE, "ultralytics"), _FUNCTION, deterministic)
    return plan
