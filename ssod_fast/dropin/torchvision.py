"""Our box overlap in torchvision: RPN, RoI heads, RetinaNet, SSD and the IoU crop call it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..ops import box_iou
from ._attention import exporting, holders, require_attribute
from ._patch import (
    NothingPatched,
    Patched,
    Place,
    Plan,
    check_parameters,
    check_switch,
    is_replaced,
    label_of,
    original,
    require,
    restore_places,
)

_MODULE = "torchvision.ops.boxes"
_FUNCTION = "box_iou"
_LIVE = "box_similarity"  # the RPN and the RoI heads keep the function that they were built with
_THEIRS = "_ssod_fast_original"  # how models that were built while torchvision was patched are recognised


def patch_box_iou(model: nn.Module | None = None, *, deterministic: bool | None = None) -> Patched:
    """Replaces `torchvision.ops.box_iou` in every module of torchvision that holds it: no temporaries of the size of the result.

    The replacement is process-wide, also where a model is given. A model that is built while it lasts keeps ours, until it is handed to
    :func:`unpatch_box_iou`.

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
        NothingPatched: if the model contains no detector of torchvision; nothing is replaced then.
        TypeError: if `model` is neither a module nor None, or `deterministic` neither a bool nor None.
    """
    _check_model(model)
    check_switch("deterministic", deterministic, optional=True)
    if model is not None and not any(_is_detector(part) for part in model.modules()):
        raise NothingPatched(
            f"{type(model).__qualname__} has no part of a detector of torchvision; without a model all box overlaps are replaced"
        )
    module, plan = require(_MODULE, "torchvision"), Plan()
    require_attribute(module, _FUNCTION)
    theirs = original(module, _FUNCTION)
    check_parameters(theirs, f"{_MODULE}.{_FUNCTION}", ("boxes1", "boxes2"), ("boxes1", "boxes2", "fmt"))
    ours = _overlap(theirs)
    for owner in dict.fromkeys((module, *holders(theirs, _FUNCTION, "torchvision"), *holders(ours, _FUNCTION, "torchvision"))):
        plan.add(owner, _FUNCTION, ours)
    for path, part in model.named_modules() if model is not None else ():
        if vars(part).get(_LIVE) in (theirs, ours):
            plan.add(part, _LIVE, ours, f"{path or label_of(part)}.{_LIVE}")
    return plan.apply(f"{_MODULE}.{_FUNCTION} is nowhere")


def unpatch_box_iou(model: nn.Module | None = None) -> int:
    """Undoes :func:`patch_box_iou` in all of torchvision, also where a model is given, and in that model, whatever calls came before.

    Args:
        model: a detector it was called with, a copy of one, or one that was built in between. Others keep ours: hand over each.

    Returns:
        How many places are as they were; 0 the second time.

    Raises:
        ImportError: without torchvision.
        RuntimeError: if a place has been replaced again by somebody else; nothing is put back then.
        TypeError: if `model` is neither a module nor None.
    """
    _check_model(model)
    require(_MODULE, "torchvision")
    places = _places_of_ours(model)
    restore_places(places)
    for place in places:  # what was built or imported in between had ours from the start
        theirs = _replaced_by(vars(place.owner).get(place.name))
        if theirs is not None:
            setattr(place.owner, place.name, theirs)
    return len(places)


def _places_of_ours(model: nn.Module | None) -> list[Place]:
    """Modules of torchvision and parts of a model that hold our function, or that a record says have held another."""
    modules = dict.fromkeys(module for name, module in list(sys.modules.items()) if name.split(".")[0] == "torchvision")
    parts = model.named_modules() if model is not None else ()
    everything = [
        *(Place(owner, _FUNCTION, f"{owner.__name__}.{_FUNCTION}") for owner in modules if isinstance(owner, ModuleType)),
        *(Place(part, _LIVE, f"{path or label_of(part)}.{_LIVE}") for path, part in parts),
    ]
    return [place for place in everything if is_replaced(place.owner, place.name) or _replaced_by(vars(place.owner).get(place.name))]


def _check_model(model: Any) -> None:
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")


def _is_detector(part: nn.Module) -> bool:
    return any(kind.__module__.startswith("torchvision.models.detection.") for kind in type(part).__mro__)


def _replaced_by(value: Any) -> Callable[..., Tensor] | None:
    """The function of torchvision that `value` stands in for if it is ours, else None."""
    theirs: Callable[..., Tensor] | None = getattr(value, _THEIRS, None)
    return theirs


@functools.cache
def _overlap(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(theirs)
    def overlap(boxes1: Tensor, boxes2: Tensor, fmt: Any = "xyxy") -> Tensor:
        if exporting():
            return theirs(boxes1, boxes2, *(() if fmt == "xyxy" else (fmt,)))  # which older versions do not take
        return box_iou(boxes1, boxes2, fmt=fmt)

    vars(overlap)[_THEIRS] = theirs
    return overlap
