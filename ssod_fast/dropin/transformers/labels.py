"""The labels that models of transformers are trained with, checked, in the form in which our matching takes targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Targets = Sequence[Mapping[str, Tensor]]


def boxes_and_labels(labels: Targets, weights_key: str | None = None) -> list[dict[str, Tensor]]:
    """Labels without what only other parts of transformers read.

    As transformers does, this takes classes of any integer dtype, and `torch.tensor([])` for no boxes.

    Args:
        labels: one mapping per image with `class_labels` [N] and `boxes` [N, 4].
        weights_key: key of per-box weights [N], which become "weights". Where no image has it there are none, which counts as 1.

    Returns:
        Mappings as :func:`~ssod_fast.ops.pack_targets` takes them, with int64 classes.

    Raises:
        TypeError: for labels of an image that are no mapping, what is no tensor, and dtypes that are neither integer nor floating point.
        ValueError: for missing keys, shapes that do not fit, and weights that only some images with boxes have.
    """
    targets = [_target(f"labels[{i}]", entry) for i, entry in enumerate(labels)]
    given = {i: entry[weights_key] for i, entry in enumerate(labels) if weights_key and entry.get(weights_key) is not None}
    for i, target in enumerate(targets if given else ()):
        if i in given:
            target["weights"] = _weights(f"labels[{i}][{weights_key!r}]", given[i], len(target["boxes"]))
        elif len(target["boxes"]):
            raise ValueError(f"labels[{i}] must have {weights_key!r} as labels[{min(given)}] has, got the keys {sorted(labels[i])}")
    return targets


def _target(label: str, entry: Any) -> dict[str, Tensor]:
    if not isinstance(entry, Mapping):
        raise TypeError(f"{label} must be a mapping with 'class_labels' and 'boxes', got {type(entry).__name__}")
    classes, boxes = entry.get("class_labels"), entry.get("boxes")
    if classes is None or boxes is None:
        raise ValueError(f"{label} must have 'class_labels' and 'boxes', got the keys {sorted(entry)}")
    boxes = _boxes(f"{label}['boxes']", boxes)
    return {"class_labels": _classes(f"{label}['class_labels']", classes, len(boxes)), "boxes": boxes}


def _boxes(label: str, boxes: Any) -> Tensor:
    """[N, 4] of any float dtype."""
    _check_tensor(label, boxes)
    if boxes.shape == (0,):
        boxes = boxes.reshape(0, 4)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{label} must be [N, 4], got {list(boxes.shape)}")
    if not boxes.is_floating_point():
        if len(boxes):
            raise TypeError(f"{label} must be floating point, got {boxes.dtype}")
        boxes = boxes.float()
    return boxes  # type: ignore[no-any-return]


def _classes(label: str, classes: Any, number: int) -> Tensor:
    """int64 [N]."""
    _check_tensor(label, classes)
    _check_length(label, classes, number)
    if number and (classes.dtype is torch.bool or classes.is_floating_point() or classes.is_complex()):
        raise TypeError(f"{label} must be integers, got {classes.dtype}")
    return classes.to(torch.int64)  # type: ignore[no-any-return]


def _weights(label: str, weights: Any, number: int) -> Tensor:
    """[N] of any dtype."""
    _check_tensor(label, weights)
    _check_length(label, weights, number)
    return weights  # type: ignore[no-any-return]


def _check_tensor(label: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(value).__name__}")


def _check_length(label: str, value: Tensor, number: int) -> None:
    if value.shape != (number,):
        raise ValueError(f"{label} must be [{number}] as the boxes are, got {list(value.shape)}")
