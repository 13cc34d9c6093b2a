"""Cleaning of annotated boxes: what cannot be trained on is dropped and counted, what sticks out is clipped."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..structures import Target
from .records import DataReport

Box = tuple[float, float, float, float]  # x1, y1, x2, y2

MIN_SIDE = 1e-2  # pixels; a thinner sliver left by clipping holds no part of an object

NOT_FINITE = "boxes with NaN or infinite coordinates"
INVERTED = "inverted boxes (negative width or height)"
DEGENERATE = "degenerate boxes (zero width or height)"
OUTSIDE = "boxes outside of their image"
CLIPPED = "boxes reached beyond their image and were clipped"


def clean_box(corners: Box, size: tuple[int, int]) -> tuple[Box | None, str | None]:
    """Checks one box.

    Args:
        corners: x1, y1, x2, y2 in pixels.
        size: (height, width) of the image.

    Returns:
        The clipped box, or None if it cannot be used; and the reason why it was dropped or changed, or None.
    """
    x1, y1, x2, y2 = corners
    if not all(map(math.isfinite, corners)):
        return None, NOT_FINITE
    if x2 < x1 or y2 < y1:
        return None, INVERTED
    if x2 == x1 or y2 == y1:
        return None, DEGENERATE
    h, w = size
    box = (max(x1, 0.0), max(y1, 0.0), min(x2, float(w)), min(y2, float(h)))
    if box[2] - box[0] < min(MIN_SIDE, x2 - x1) or box[3] - box[1] < min(MIN_SIDE, y2 - y1):
        return None, OUTSIDE
    # Annotation tools round: a hair beyond the border is no finding.
    beyond = max(-x1, -y1, x2 - w, y2 - h)
    return box, CLIPPED if beyond > 1.0 else None


@dataclass
class BoxCollector:
    """Gathers the boxes of one image."""

    size: tuple[int, int]  # (h, w)
    where: str  # names the image in the report
    report: DataReport
    boxes: list[Box] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    clean_boxes: list[Box] | None = None  # right boxes of inaccurate ones, if the data set knows any
    crowd_boxes: list[Box] = field(default_factory=list)
    crowd_labels: list[int] = field(default_factory=list)

    def add(self, corners: Box, label: int, crowd: bool = False, area: float | None = None, right: Box | None = None) -> None:
        """Cleans and keeps one xyxy box, or counts why not; `right` is the true box where `corners` are inaccurate."""
        box, reason = clean_box(corners, self.size)
        if box is None:
            self.report.drop(str(reason), self.where)
            return
        if reason:
            self.report.note(reason, self.where)
        if crowd:
            self.crowd_boxes.append(box)
            self.crowd_labels.append(label)
            return
        if self.clean_boxes is not None:
            self.clean_boxes.append(right or box)
        self.boxes.append(box)
        self.labels.append(label)
        full = (box[2] - box[0]) * (box[3] - box[1])
        self.areas.append(area if area is not None and 0 < area < math.inf else full)

    def results(self, image_id: int) -> tuple[Target, Target, Tensor]:
        """The image's target, its crowd regions, and the areas of the target's boxes."""
        target = make_target(self.boxes, self.labels, image_id, self.size)
        if self.clean_boxes is not None:
            target["clean_boxes"] = torch.tensor(self.clean_boxes, dtype=torch.float32).reshape(-1, 4)
        crowd = make_target(self.crowd_boxes, self.crowd_labels, image_id, self.size)
        return target, crowd, torch.tensor(self.areas, dtype=torch.float32)


def make_target(boxes: list[Box], labels: list[int], image_id: int, size: tuple[int, int]) -> Target:
    """A target with the right dtypes, (0, 4) and (0,) where there are no boxes."""
    return Target(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        image_id=image_id,
        orig_size=size,
    )
