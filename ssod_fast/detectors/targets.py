"""Targets as detectors need them: in one of two forms, on the right device, without boxes that break a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_convert

from ssod_fast.structures import PaddedTargets, Target


def usable(targets: PaddedTargets, num_classes: int) -> Tensor:
    """Bool [B, N]: real rows whose box is finite and wider and higher than 0, and whose label names a class. No host sync."""
    boxes, labels = targets.boxes, targets.labels
    positive = (boxes[..., 2:] > boxes[..., :2]).all(-1)
    known = (labels >= 0) & (labels < num_classes)
    return targets.valid & positive & known & torch.isfinite(boxes).all(-1)


def to_padded(targets: PaddedTargets | Sequence[Target], batch: int, num_classes: int, device: torch.device) -> PaddedTargets:
    """Padded targets of at least one row on `device`.

    Only the list form is checked for labels outside of 0..num_classes - 1, because that waits for the device; in the padded form such rows
    count as padding (see :func:`usable`).

    Raises:
        ValueError: not one target per image, or a label that is no class.
    """
    _check_length(len(targets), batch)
    if isinstance(targets, PaddedTargets):
        padded = targets.to(device)
    else:
        plain = [plain_target(target) for target in targets]
        padded = PaddedTargets.from_list(plain).to(device)
        _check_labels(plain, num_classes)
    # One row of padding lets every loss gather from the rows without a special case for "no boxes at all".
    return padded if padded.nmax else PaddedTargets.empty(batch, 1, device)


def to_clean_list(targets: PaddedTargets | Sequence[Target], batch: int, num_classes: int, device: torch.device) -> list[Target]:
    """One dict of usable boxes per image: boxes, labels, weights. Waits for the device once per image.

    Raises:
        ValueError: not one target per image, or (list form) a label that is no class.
    """
    padded = to_padded(targets, batch, num_classes, device)
    keep = usable(padded, num_classes)
    rows = zip(padded.boxes, padded.labels, padded.weights, keep, strict=True)
    return [Target(boxes=boxes[k], labels=labels[k], weights=weights[k]) for boxes, labels, weights, k in rows]


def plain_target(target: Target) -> Target:
    """The target with plain xyxy tensors where it holds `tv_tensors.BoundingBoxes` of any format."""
    boxes = target.get("boxes")
    if not isinstance(boxes, tv_tensors.BoundingBoxes):
        return target
    fmt = str(boxes.format.value).lower()
    xyxy = boxes.as_subclass(Tensor)
    return cast(Target, {**target, "boxes": xyxy if fmt == "xyxy" else box_convert(xyxy, fmt, "xyxy")})


def _check_length(got: int, batch: int) -> None:
    if got != batch:
        raise ValueError(f"targets must have one entry per image, expected {batch}, got {got}")


def _check_labels(targets: Sequence[Target], num_classes: int) -> None:
    for i, target in enumerate(targets):
        labels = target["labels"]
        if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
            raise ValueError(
                f"targets[{i}]['labels'] must lie in 0..{num_classes - 1} (0-based, background has no label), "
                f"got {int(labels.min())}..{int(labels.max())}"
            )
