"""Pseudo boxes: from the teacher's predictions to what a loss sees, in device operations only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssod_fast.ops.project import drop_small, invert_homographies, warp_boxes
from ssod_fast.structures import PaddedTargets, Target

if TYPE_CHECKING:
    from ssod_fast.data.batches import UnlabeledBatch


@dataclass(frozen=True)
class TeacherBoxes:
    """What the teacher predicted on the weak views.

    Attributes:
        predictions: boxes, labels and scores per image, in pixels of its weak view.
        confident: per image, how many scores exceed the threshold. Predicting has waited for the device anyway; knowing this number on
            the host keeps the padded targets of the student as short as the boxes that count, whatever is predicted below the threshold.
    """

    predictions: list[Target]
    confident: list[int]

    @classmethod
    def count(cls, predictions: list[Target], threshold: float) -> TeacherBoxes:
        """Counts confident boxes; waits for the device once."""
        counts = torch.stack([(p["scores"].float() > threshold).sum() for p in predictions])
        return cls(predictions, counts.tolist())


@dataclass(frozen=True)
class PseudoBoxes:
    """The teacher's boxes of one step, not yet filtered by score.

    Attributes:
        original: in pixels of the original images.
        strong: in pixels of the strong views; very small ones are gone.
        non_finite: int64 scalar, boxes dropped because a coordinate or the score was not finite.
    """

    original: PaddedTargets
    strong: PaddedTargets
    non_finite: Tensor


def project_predictions(predictions: Sequence[Target], batch: UnlabeledBatch, *, rows: int, min_wh: float) -> PseudoBoxes:
    """Pads predictions on the weak views and moves them to the original images and to the strong views.

    Args:
        predictions: boxes, labels and scores per image, in pixels of the weak views; of any floating dtype.
        batch: the views with their homographies.
        rows: rows per image of the result; boxes beyond are dropped.
        min_wh: width and height in the strong view must exceed it.
    """
    raw = PaddedTargets.from_list(list(predictions), nmax=rows)
    finite = torch.isfinite(raw.boxes).all(-1) & torch.isfinite(raw.scores)
    non_finite = (raw.valid & ~finite).sum()
    original = warp_boxes(raw.select(finite), invert_homographies(batch.weak_matrix), batch.original_hw)
    strong_hw = [(int(image.shape[1]), int(image.shape[2])) for image in batch.strong]
    strong = drop_small(warp_boxes(original, batch.strong_matrix, strong_hw), min_wh)
    return PseudoBoxes(original, strong, non_finite)


def above_threshold(targets: PaddedTargets, threshold: float) -> PaddedTargets:
    """Boxes whose score exceeds the threshold; a score equal to it is not enough. Scores are float32."""
    return targets.select(targets.scores > threshold)


def first_rows(targets: PaddedTargets, rows: int) -> PaddedTargets:
    """The same targets with `rows` rows per image, for a caller that knows that no image has more boxes."""
    return PaddedTargets(
        boxes=targets.boxes[:, :rows],
        labels=targets.labels[:, :rows],
        scores=targets.scores[:, :rows],
        weights=targets.weights[:, :rows],
        count=targets.count,
    )


def open_gate(count: Tensor, rule: str, least_num: int) -> Tensor:
    """1 if the batch keeps enough boxes for its loss to count, else 0: a float32 scalar on the device.

    Args:
        count: int32 [B], boxes per image.
        rule: "batch_min" compares the poorest image with `least_num`, "sum" the whole batch, "per_image" the richest image (the others
            leave the batch).
        least_num: boxes needed.
    """
    if rule == "sum":
        boxes = count.sum()
    else:
        boxes = count.amin() if rule == "batch_min" else count.amax()
    return torch.ge(boxes, least_num).float()
