"""Deformable attention of the original GroundingDINO repository, with or without its compiled extension."""

from __future__ import annotations

from ._attention import plan_module
from ._patch import Patched, Plan, check_switch, require

_MODULE = "groundingdino.models.GroundingDINO.ms_deform_attn"


def patch(*, deterministic: bool | None = None) -> Patched:
    """Replaces forward and backward of its autograd function and its composition for the CPU.

    The compiled `groundingdino._C` is not called any more, so that it may be missing. A version that refuses to import without it wants
    `install_as("groundingdino._C")` before its import.

    Args:
        deterministic: whether backwards sum in a fixed order; by default as `torch.use_deterministic_algorithms` says then.

    Returns:
        What is replaced; a context manager that puts it back.

    Raises:
        ImportError: without groundingdino.
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
    hint = ' from its repository; where only groundingdino._C is missing, call ssod_fast.dropin.install_as("groundingdino._C") first'
    plan_module(plan, require(_MODULE, "groundingdino", hint), deterministic)
    return plan
