"""From the candidates of a whole batch to the detections of each image, with one wait for the device at the very end."""

from __future__ import annotations

import torch
from torch import Tensor

from ssod_fast.ops import Kept, batched_nms
from ssod_fast.structures import Target, upload


def clip_boxes(boxes: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
    """Boxes [B, N, 4] xyxy cut off at the borders of their images, whose true (h, w) are `sizes`. NaN stays NaN."""
    limits = torch.tensor([(w, h, w, h) for h, w in sizes], dtype=boxes.dtype).view(-1, 1, 4)
    return torch.minimum(boxes.clamp(min=0), upload(limits, boxes.device))


def best_boxes(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    nms_thr: float,
    max_keep: int,
    score_thr: float = -1.0,
    min_side: float = 0.0,
    counts: Tensor | None = None,
) -> Kept:
    """Suppression of boxes [B, N, 4] by better ones of their label, without those that are not finite or have no area.

    Args:
        boxes: [B, N, 4] xyxy.
        scores: [B, N], not negative.
        labels: int64 [B, N].
        nms_thr: overlap above which the worse of two boxes is dropped.
        max_keep: at most so many per image.
        score_thr: only boxes with a strictly larger score.
        min_side: only boxes with width and height of at least this, and above 0.
        counts: int64 [B], how many of the N boxes are real, None if all are.
    """
    sides = boxes[..., 2:] - boxes[..., :2]
    usable = ((sides > 0) & (sides >= min_side)).all(-1) & scores.isfinite()
    scores = scores.masked_fill(~usable, -torch.inf)
    return batched_nms(boxes, scores, labels, counts=counts, iou_threshold=min(nms_thr, 1.0), score_threshold=score_thr, max_keep=max_keep)


def as_targets(kept: Kept, boxes: Tensor, labels: Tensor, scores: Tensor) -> list[Target]:
    """The kept boxes of each image, best first. This waits for the device: the lengths of the lists depend on its data."""
    found = kept.gather(boxes).float(), kept.gather(labels), kept.gather(scores).float()
    rows = zip(kept.count.tolist(), *found, strict=True)
    return [Target(boxes=b[:n], labels=c[:n], scores=s[:n]) for n, b, c, s in rows]
