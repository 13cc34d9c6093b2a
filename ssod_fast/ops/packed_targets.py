"""Targets of a batch as flat rows on the device: what the matching ops read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..structures import PaddedTargets, upload


@dataclass(frozen=True)
class PackedTargets:
    """G target rows of B images, either ragged (`offsets`) or padded (`counts`): image b owns the rows
    `offsets[b] .. offsets[b + 1]`, or the first `counts[b]` of the G / B rows from `b * G / B` on.

    Attributes:
        labels: int64 [G]; anything in padding rows.
        boxes: [G, 4], any float dtype, in the frame and format of the boxes they are matched with; anything in padding rows.
        batch: number of images, B.
        image: int64 [G], the image of each row.
        offsets: int64 [B + 1], or None for padded rows.
        counts: int32 or int64 [B], or None for ragged rows.
        weights: float32 [G], factor of each target in a loss, or None for 1.
        sizes: number of targets per image where the host knows it.
    """

    labels: Tensor
    boxes: Tensor
    batch: int
    image: Tensor
    offsets: Tensor | None = None
    counts: Tensor | None = None
    weights: Tensor | None = None
    sizes: tuple[int, ...] | None = None

    @property
    def rows(self) -> int:
        """Number of rows, padding included: G."""
        return self.labels.shape[0]

    @property
    def padded(self) -> bool:
        """Whether every image owns the same number of rows, some of which are padding."""
        return self.counts is not None


AnyTargets = PackedTargets | PaddedTargets | Sequence[Mapping[str, Any]]


def pack_targets(targets: AnyTargets, device: torch.device | str | None = None) -> PackedTargets:
    """Flat rows of targets given in any of the usual forms.

    A list of dicts costs one upload; :class:`~ssod_fast.structures.PaddedTargets` are only viewed; packed targets pass through.

    Args:
        targets: one mapping per image with `boxes` [T, 4], `labels` or `class_labels` int64 [T], and optionally `weights` [T]; or
            :class:`~ssod_fast.structures.PaddedTargets`; or :class:`PackedTargets`.
        device: where the rows shall be; by default where the boxes are.

    Returns:
        The rows, in the order of the images.

    Raises:
        ValueError: for missing keys and wrong shapes.
        TypeError: for targets or labels of another type.
    """
    if isinstance(targets, PackedTargets):
        return targets
    if isinstance(targets, PaddedTargets):
        return _from_padded(targets)
    return _from_list(targets, device)


def _from_padded(targets: PaddedTargets) -> PackedTargets:
    batch, rows = targets.labels.shape
    image = torch.arange(batch, device=targets.labels.device).unsqueeze(1).expand(batch, rows).flatten()
    return PackedTargets(
        targets.labels.flatten(), targets.boxes.flatten(0, 1), batch, image, counts=targets.count, weights=targets.weights.flatten()
    )


def _from_list(targets: Sequence[Mapping[str, Any]], device: torch.device | str | None) -> PackedTargets:
    rows = [_check_target(i, target) for i, target in enumerate(targets)]
    sizes = tuple(boxes.shape[0] for boxes, _, _ in rows)
    if not rows:
        where = torch.device("cpu" if device is None else device)
        none = torch.zeros(0, dtype=torch.int64, device=where)
        return PackedTargets(none, none.new_zeros((0, 4), dtype=torch.float32), 0, none, offsets=none.new_zeros(1), sizes=())
    where = rows[0][0].device if device is None else torch.device(device)
    index = torch.zeros(len(sizes) + 1 + sum(sizes), dtype=torch.int64)
    index[1 : len(sizes) + 1] = torch.tensor(sizes).cumsum(0)
    index[len(sizes) + 1 :] = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    index = upload(index, where)
    weights = None
    if any(w is not None for _, _, w in rows):
        parts = [boxes.new_ones(boxes.shape[0], dtype=torch.float32) if w is None else w.float() for boxes, _, w in rows]
        weights = upload(torch.cat(parts), where)
    return PackedTargets(
        upload(torch.cat([labels for _, labels, _ in rows]), where),
        upload(torch.cat([boxes for boxes, _, _ in rows]), where),
        len(sizes),
        index[len(sizes) + 1 :],
        offsets=index[: len(sizes) + 1],
        weights=weights,
        sizes=sizes,
    )


def _check_target(i: int, target: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Boxes, labels and weights of one image, checked."""
    if not isinstance(target, Mapping):
        raise TypeError(f"targets[{i}] must be a mapping with 'boxes' and 'labels', got {type(target).__name__}")
    labels = target.get("labels", target.get("class_labels"))
    boxes, weights = target.get("boxes"), target.get("weights")
    if boxes is None or labels is None:
        raise ValueError(f"targets[{i}] must have 'boxes' and 'labels' (or 'class_labels'), got the keys {sorted(target)}")
    if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(f"targets[{i}]['boxes'] must be floating point [T, 4], got {boxes.dtype} {list(boxes.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"targets[{i}]['labels'] must be int64, got {labels.dtype}")
    for name, value in (("labels", labels), ("weights", weights)):
        if value is not None and tuple(value.shape) != (boxes.shape[0],):
            raise ValueError(f"targets[{i}][{name!r}] must be [{boxes.shape[0]}] as the boxes are, got {list(value.shape)}")
    return boxes, labels, weights
