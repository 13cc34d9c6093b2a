"""How far boxes are from known right ones: what label noise did to them, and what a refiner made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.paired_box_iou import paired_box_iou

BINS = 10


@dataclass(frozen=True)
class BoxAccuracy:
    """Overlap of boxes with the right ones.

    Attributes:
        boxes: How many there are.
        mean_iou: Mean IoU; None without boxes, like the shares.
        share_75: Share of the boxes with IoU >= .75.
        share_50: Share of the boxes with IoU >= .5, the least that evaluation calls a hit.
        share_below_30: Share of the boxes with IoU < .3.
        histogram: Boxes per tenth of IoU; the last one includes 1.
        per_class: Mean IoU by class name, of the classes that occur.
    """

    boxes: int
    mean_iou: float | None
    share_75: float | None
    share_50: float | None
    share_below_30: float | None
    histogram: list[int]
    per_class: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if self.mean_iou is None or self.share_50 is None or self.share_below_30 is None:
            return "no boxes"
        shares = f"{self.share_50:.1%} at least .5, {self.share_below_30:.1%} below .3"
        return f"mean IoU {self.mean_iou:.4f} with the clean boxes ({shares}; {self.boxes} boxes)"


def box_accuracy(boxes: Tensor, right: Tensor, labels: Tensor, classes: Sequence[str]) -> BoxAccuracy:
    """Compares boxes with the right ones, row by row.

    Args:
        boxes: floating point [N, 4] xyxy, on the host.
        right: [N, 4], parallel to `boxes`.
        labels: int64 [N].
        classes: Class names by label.

    Raises:
        ValueError: If the rows do not run in parallel.
    """
    if boxes.shape != right.shape or len(labels) != len(boxes):
        raise ValueError(f"boxes, right and labels must be equally long, got {len(boxes)}, {len(right)} and {len(labels)}")
    iou = paired_box_iou(boxes.double(), right.double())  # [N]
    by_class = {name: iou[labels == c] for c, name in enumerate(classes)}
    return BoxAccuracy(
        boxes=len(iou),
        mean_iou=_mean(iou),
        share_75=_mean((iou >= 0.75).double()),
        share_50=_mean((iou >= 0.5).double()),
        share_below_30=_mean((iou < 0.3).double()),
        histogram=torch.histc(iou, BINS, 0.0, 1.0).long().tolist(),
        per_class={name: float(values.mean()) for name, values in by_class.items() if len(values)},
    )


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None
