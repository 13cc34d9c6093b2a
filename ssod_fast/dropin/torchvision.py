"""Our box overlap in torchvision: RPN, RoI heads, RetinaNet, SSD and the IoU crop call it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..ops import box_iou
from ._attention import exporting, holders, require_attribute
from ._patch import Patched, Plan, check_parameters, original, require

_MODULE = "torchvision.ops.boxes"
_FUNCTION = "box_iou"
_LIVE = "box_similarity"  # the RPN and the RoI heads keep the function that they were built with


def patch_box_iou(model: nn.Module | None = None, *, deterministic: bool | None = None) -> Patched:
    """Replaces `torchvision.ops.box_iou` in every module of torchvision that holds it: no temporaries of the size of the result.

    Results differ where torchvision's mean little: two boxes without area have overlap 0, not 0 / 0 = NaN, and a box that reaches to
    infinity has overlap NaN with every other, not 0. Traces and exports go through the original. `torch.jit.script` of a detector wants
    the original: undo first.

    Args:
        model: a detector that was built before; its RPN keeps a reference of its own, which is replaced too.
        deterministic: accepted as everywhere in the drop-ins; every sum here has a fixed order.

    Returns:
        What is replaced; a context manager that puts it back.

    Raises:
        ImportError: without torchvision.
        UnknownSurface: for a version that looks otherwise; nothing is replaced then.
    """
    return _plan(model).apply(f"{_MODULE}.{_FUNCTION} is nowhere")


def unpatch_box_iou(model: nn.Module | None = None) -> int:
    """Undoes :func:`patch_box_iou`, also where it was called several times.

    Args:
        model: the detector it was called with.

    Returns:
        How many places are as they were; 0 the second time.
    """
    return _plan(model).revert()


def _plan(model: nn.Module | None) -> Plan:
    plan = Plan()
    module = require(_MODULE, "torchvision")
    current = require_attribute(module, _FUNCTION)
    check_parameters(current, f"{_MODULE}.{_FUNCTION}", ("boxes1", "boxes2"), ("boxes1", "boxes2", "fmt"))
    theirs = original(module, _FUNCTION)
    ours = _overlap(theirs) if theirs is current else current
    for owner in dict.fromkeys((module, *holders(current, _FUNCTION, "torchvision"))):
        plan.add(owner, _FUNCTION, ours)
    for part in model.modules() if model is not None else ():
        if vars(part).get(_LIVE) in (theirs, current):
            plan.add(part, _LIVE, ours)
    return plan


def _overlap(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(theirs)
    def overlap(boxes1: Tensor, boxes2: Tensor, fmt: Any = "xyxy") -> Tensor:
        if exporting():
            return theirs(boxes1, boxes2, *(() if fmt == "xyxy" else (fmt,)))  # which older versions do not take
        return box_iou(boxes1, boxes2, fmt=fmt)

    return overlap
