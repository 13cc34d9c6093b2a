"""Noisy boxes of a batch in one list, and the bags of proposals around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssod_fast.criterion.losses import _wide
from ssod_fast.ops import neighborhood_boxes
from ssod_fast.ops.box_deltas import STD
from ssod_fast.structures import Target, upload

from .config import RefinerConfig


@dataclass(frozen=True)
class NoisyBoxes:
    """The G boxes of B images, image after image.

    Attributes:
        boxes: [G, 4] xyxy in pixels of the network's input.
        labels: int64 [G].
        image: int64 [G], the image of each box.
        image_hw: float32 [B, 2], height and width of the images without padding.
        counts: boxes per image, on the host.
        clean: [G, 4], where the boxes really are, for measurements; None if unknown.
    """

    boxes: Tensor
    labels: Tensor
    image: Tensor
    image_hw: Tensor
    counts: tuple[int, ...]
    clean: Tensor | None = None

    @classmethod
    def pack(cls, targets: Sequence[Target], sizes: Sequence[tuple[int, int]], device: torch.device) -> NoisyBoxes:
        """Joins the targets of a batch. Lengths are known, so that nothing waits for the device.

        Args:
            targets: one per image.
            sizes: (height, width) of the images.
            device: where the targets are.

        Raises:
            ValueError: not one target per image.
        """
        if len(targets) != len(sizes):
            raise ValueError(f"targets must have one entry per image, expected {len(sizes)}, got {len(targets)}")
        counts = tuple(int(target["boxes"].shape[0]) for target in targets)
        known = all("clean_boxes" in target for target in targets)
        return cls(
            boxes=_wide(torch.cat([target["boxes"] for target in targets])),
            labels=torch.cat([target["labels"] for target in targets]),
            image=upload(torch.from_numpy(np.repeat(np.arange(len(counts)), counts)), device),
            image_hw=upload(torch.tensor(sizes, dtype=torch.float32), device),
            counts=counts,
            clean=_wide(torch.cat([target["clean_boxes"] for target in targets])) if known else None,
        )

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def own_hw(self) -> Tensor:
        """[G, 2], height and width of the image of each box."""
        return self.image_hw.index_select(0, self.image)

    @property
    def offsets(self) -> Tensor:
        """int64 [B + 1]: image b owns the rows offsets[b] .. offsets[b + 1]."""
        ends = torch.tensor((0, *self.counts)).cumsum(0)
        return upload(ends, self.boxes.device)

    def take(self, rows: Tensor, counts: tuple[int, ...]) -> NoisyBoxes:
        """The boxes `rows` (int64, in order), `counts` per image."""
        clean = None if self.clean is None else self.clean.index_select(0, rows)
        boxes, labels, image = (field.index_select(0, rows) for field in (self.boxes, self.labels, self.image))
        return NoisyBoxes(boxes, labels, image, self.image_hw, counts, clean)

    def divide(self, most: int, generator: torch.Generator) -> tuple[Tensor, tuple[int, ...], Tensor, tuple[int, ...]] | None:
        """Draws `most` boxes of every image that has more; None if none has.

        Args:
            most: boxes per image.
            generator: on the host.

        Returns:
            Rows and counts of the drawn boxes, rows and counts of the others.
        """
        if max(self.counts, default=0) <= most:
            return None
        drawn, left = [], []
        start = 0
        for count in self.counts:
            order = torch.arange(count) if count <= most else torch.randperm(count, generator=generator)
            drawn.append(order[:most].sort().values + start)
            left.append(order[most:].sort().values + start)
            start += count
        rows = [upload(torch.cat(part), self.boxes.device) for part in (drawn, left)]
        return rows[0], tuple(map(len, drawn)), rows[1], tuple(map(len, left))


@dataclass(frozen=True)
class Bags:
    """Proposals for G boxes, constants.

    Attributes:
        boxes: [G, P, 4] xyxy in pixels; may reach beyond the image.
        valid: bool [G, P], which of them count.
        targets: [G, P, 4], deltas from each proposal to the box that the bag was made around; None where nobody has asked.
    """

    boxes: Tensor
    valid: Tensor
    targets: Tensor | None = None

    @property
    def occupied(self) -> Tensor:
        """Bool [G], whether there is a valid proposal."""
        return self.valid.any(1)


def neighbours(boxes: Tensor, rows: NoisyBoxes, config: RefinerConfig) -> Bags:
    """Bags of scaled and shifted copies.

    Args:
        boxes: [G, 4], around which.
        rows: whose images these are.
        config: for ratios, shakes and the least share inside of the image.
    """
    found = neighborhood_boxes(
        boxes,
        rows.image,
        rows.image_hw,
        ratios=config.ratios,
        shakes=config.shakes,
        iof_threshold=config.iof_thr,
        targets_std=STD,
    )
    return Bags(found.boxes, found.valid, found.targets)


def check_boxes(targets: Sequence[Target], num_classes: int) -> None:
    """Looks at boxes and labels, for which the host waits if they are on a device.

    Raises:
        ValueError: a coordinate is not finite, a box ends before it begins, or a label is no class.
    """
    for i, target in enumerate(targets):
        boxes, labels = _on_host(target["boxes"]), _on_host(target["labels"])
        for wrong, expected in (
            (~np.isfinite(boxes).all(1), "finite"),
            ((boxes[:, 2:] < boxes[:, :2]).any(1), "xyxy with x1 <= x2 and y1 <= y2"),
        ):
            if wrong.any():
                raise ValueError(f"targets[{i}]['boxes'] must be {expected}, got {boxes[wrong][0].tolist()}")
        if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
            raise ValueError(
                f"targets[{i}]['labels'] must lie in 0..{num_classes - 1} (0-based, background has no label), "
                f"got {labels.min()}..{labels.max()}"
            )


def _on_host(values: Tensor) -> Any:
    # NumPy, so that nobody takes a question about host data for a wait for the device.
    return (values if values.device.type == "cpu" else values.cpu()).detach().numpy()
