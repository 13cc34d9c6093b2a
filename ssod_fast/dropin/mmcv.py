"""Deformable attention of mmcv and its fork onedl-mmcv, as mmdet, mmdet3d, MixPL, Co-DETR and BEVFormer call it."""

from __future__ import annotations

from ._attention import plan_module
from ._patch import Patched, Plan, check_switch, require
from .shims import plan_extension

_MODULE = "mmcv.ops.multi_scale_deform_attn"
_EXTENSION = "mmcv._ext"


def patch(*, deterministic: bool | None = None) -> Patched:
    """Replaces forward and backward of mmcv's autograd function, its composition for the CPU, and both functions of its extension.

    Modules, configurations and checkpoints stay as they are. Locations and weights are no longer rounded to the dtype of the values, any
    batch works, and bfloat16 too. BEVFormer's own autograd functions call the extension, and are covered by it. Where mmcv was installed
    without its extension, `install_as("mmcv._ext")` makes `mmcv.ops` importable.

    Args:
        deterministic: whether backwards sum in a fixed order; by default as `torch.use_deterministic_algorithms` says then.

    Returns:
        What is replaced; a context manager that puts it back.

    Raises:
        ImportError: without mmcv, or without its extension.
        UnknownSurface: for an mmcv that looks otherwise; nothing is replaced then.
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
    plan_module(plan, require(_MODULE, "mmcv", ', or call ssod_fast.dropin.install_as("mmcv._ext") first'), deterministic)
    plan_extension(plan, _EXTENSION, deterministic)
    return plan
