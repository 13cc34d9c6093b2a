"""Pseudo boxes of Semi-DETR (arXiv 2307.08095), from the teacher's decoder to what the student learns, in device operations only.

All shapes are known to the host: images have a fixed number of rows of which the first `count` are real.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_convert

from ssod_fast.criterion.losses import _wide
from ssod_fast.ops import batched_nms
from ssod_fast.ops.project import moved_boxes
from ssod_fast.structures import PAD_LABEL, PaddedTargets

from .mining import mean_std_filter


@dataclass(frozen=True)
class Detections:
    """What the teacher sees on a batch.

    Attributes:
        targets: at most `topk` boxes per image, xyxy in pixels, best first.
        non_finite: int64 scalar, queries left out because a coordinate or a score was not finite.
        truncated: bool [B], whether an image had more candidates than were looked at and ended with fewer than `topk` boxes, so that boxes
            worse than all of its own may be missing.
    """

    targets: PaddedTargets
    non_finite: Tensor
    truncated: Tensor


@torch.no_grad()
def teacher_detections(
    logits: Tensor,
    boxes: Tensor,
    image_hw: Tensor,
    *,
    score_thr: float = 0.01,
    nms_thr: float = 0.6,
    topk: int = 300,
    candidates: int = 3000,
) -> Detections:
    """Detections from all pairs of a query and a class, suppressed class by class, for the whole batch in one call.

    Suppression goes from the best pair down, so that what becomes of a pair depends on better ones alone. Looking at the best
    `candidates` pairs of each image therefore gives exactly what looking at all of them gives, if no more pairs exceed the threshold or if
    `topk` boxes remain; `truncated` names the images where neither holds.

    Args:
        logits: [B, Q, C] of the last decoder layer.
        boxes: [B, Q, 4] cxcywh, normalised.
        image_hw: [B, 2], height and width in pixels; boxes are clipped to the image before they suppress each other.
        score_thr: pairs must score more.
        nms_thr: overlap above which the worse of two boxes of a class is dropped.
        topk: most boxes per image.
        candidates: most pairs per image that are looked at. 3,000 are ten for each box that can remain.

    Returns:
        :class:`Detections`; scores and boxes are float32, or float64 where the input is.

    Raises:
        ValueError: for shapes that do not fit, and for topk or candidates below 1.
    """
    _check_outputs(logits, boxes, image_hw, topk, candidates)
    scores, corners = _wide(logits).sigmoid(), clipped_corners(_wide(boxes), image_hw)
    # Of the boxes as they came: clipping would make an infinite side a finite one.
    sound = boxes.isfinite().all(-1) & scores.isfinite().all(-1)  # [B, Q]
    scores = torch.where(sound[..., None], scores, 0).flatten(1)  # [B, Q * C]
    looked_at = min(candidates, scores.shape[1])
    best, pair = scores.topk(looked_at, dim=1)
    classes = logits.shape[-1]
    query, label = pair // classes, pair % classes
    corners = torch.where(sound[..., None], corners, 0)
    candidate = corners.gather(1, query[..., None].expand(-1, -1, 4))
    kept = batched_nms(candidate, best, label, iou_threshold=nms_thr, score_threshold=score_thr, max_keep=topk)
    score = kept.gather(best)
    valid = (kept.index >= 0).to(score.dtype)
    targets = PaddedTargets(kept.gather(candidate), kept.gather(label, PAD_LABEL), score, valid, kept.count.to(torch.int32))
    more = (scores > score_thr).sum(1) > looked_at
    return Detections(targets, (~sound).sum(), more & (kept.count < min(topk, looked_at)))


def reliable(targets: PaddedTargets) -> PaddedTargets:
    """Detections that reach the mean plus the deviation of the scores of their image and have an area; they keep their order.

    The threshold is that of all detections of the image, those without an area included (:func:`~.mining.mean_std_filter`).
    """
    return targets.select(mean_std_filter(targets.scores, targets.count) & has_area(targets.boxes))


def project_rows(targets: PaddedTargets, matrix: Tensor, hw: Sequence[tuple[int, int]]) -> PaddedTargets:
    """Moves boxes from one view to another; every box keeps its row, even if nothing of it is left.

    The axis-aligned hull of the four moved corners is clipped to the new view. A box that comes out non-finite becomes an empty one.

    Args:
        targets: [B, N] in pixels of the weak views.
        matrix: float64 [B, 3, 3] on the CPU, weak view -> strong view, in pixels: M_strong · M_weak⁻¹.
        hw: (height, width) of the strong views without padding.

    Raises:
        ValueError: a shape does not fit the batch, or a matrix is not finite.
        TypeError: the matrices are not on the CPU.
    """
    moved, finite = moved_boxes(targets, matrix, hw)
    return dataclasses.replace(targets, boxes=torch.where((finite & targets.valid)[..., None], moved, 0))


def certain(targets: PaddedTargets, thr: float = 0.4, *, drop_degenerate: bool = True) -> Tensor:
    """Boxes that the detection loss learns from: bool [B, N].

    Args:
        targets: in pixels of the student's views.
        thr: the score must reach it.
        drop_degenerate: leave out boxes without an area, such as those that lie beyond the border of the view and were clipped to a line.
            The official code keeps them.
    """
    sure = targets.valid & (targets.scores >= thr)
    return sure & has_area(targets.boxes) if drop_degenerate else sure


def normalised(targets: PaddedTargets, image_hw: Tensor) -> PaddedTargets:
    """Boxes xyxy in pixels as cxcywh in shares of the image; every box keeps its row.

    Args:
        targets: [B, N].
        image_hw: [B, 2], height and width in pixels.
    """
    extent = image_hw.flip(-1).repeat(1, 2).to(targets.boxes.dtype)[:, None]  # [B, 1, 4]
    return dataclasses.replace(targets, boxes=box_convert(targets.boxes, "xyxy", "cxcywh") / extent)


def clipped_corners(boxes: Tensor, image_hw: Tensor) -> Tensor:
    """Boxes [B, N, 4] cxcywh in shares of the image as xyxy in pixels, cut off at its borders. NaN stays NaN."""
    extent = image_hw.flip(-1).repeat(1, 2).to(boxes.dtype)[:, None]  # [B, 1, 4]
    return torch.minimum((box_convert(boxes, "cxcywh", "xyxy") * extent).clamp(min=0), extent)


def has_area(boxes: Tensor) -> Tensor:
    """Bool [...]: boxes [..., 4] xyxy wider and higher than 0."""
    return (boxes[..., 2:] > boxes[..., :2]).all(-1)


def _check_outputs(logits: Tensor, boxes: Tensor, image_hw: Tensor, topk: int, candidates: int) -> None:
    if logits.dim() != 3 or boxes.shape != (*logits.shape[:2], 4) or image_hw.shape != (logits.shape[0], 2):
        found = f"{list(logits.shape)}, {list(boxes.shape)} and {list(image_hw.shape)}"
        raise ValueError(f"logits, boxes and image_hw must be [B, Q, C], [B, Q, 4] and [B, 2], got {found}")
    for name, value in (("topk", topk), ("candidates", candidates)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
