"""Detections from the last layer of a decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from ssod_fast.structures import Target

from ..suppress import as_targets, best_boxes

# Pairs of query and class with lower scores do not enter non-maximum suppression: of hundreds of queries times classes, most are such.
LEAST_NMS_SCORE = 0.01


def best_pairs(logits: Tensor, boxes: Tensor, image_hw: Tensor, *, score_thr: float, topk: int) -> list[Target]:
    """The pairs of query and class with the highest scores, best first. Waits for the device once, at the end.

    Args:
        logits: [B, Q, C].
        boxes: [B, Q, 4] cxcywh, normalised.
        image_hw: float32 [B, 2], size of the images in pixels.
        score_thr: only pairs with a strictly larger score.
        topk: at most so many per image.
    """
    scores = pair_scores(logits, boxes).flatten(1)
    best, index = scores.topk(min(topk, scores.shape[1]))  # [B, K]
    query, classes = index // logits.shape[-1], index % logits.shape[-1]
    found = pixel_boxes(boxes.gather(1, query[..., None].expand(-1, -1, 4)), image_hw)
    rows = zip((best > score_thr).sum(1).tolist(), found, classes, best, strict=True)
    return [Target(boxes=b[:n], labels=c[:n], scores=s[:n]) for n, b, c, s in rows]


def separate_pairs(logits: Tensor, boxes: Tensor, image_hw: Tensor, *, nms_thr: float, score_thr: float, topk: int) -> list[Target]:
    """As :func:`best_pairs`, without boxes that a better one of their class overlaps by more than `nms_thr`.

    Pairs of a score up to 0.01, and boxes without area, are left out.
    """
    classes = logits.shape[-1]
    scores = pair_scores(logits, boxes).flatten(1)  # [B, Q * C]
    found = pixel_boxes(boxes, image_hw).repeat_interleave(classes, 1)
    labels = torch.arange(classes, device=logits.device).repeat(*logits.shape[:2])
    kept = best_boxes(found, scores, labels, nms_thr=nms_thr, max_keep=topk, score_thr=max(score_thr, LEAST_NMS_SCORE))
    return as_targets(kept, found, labels, scores)


def pair_scores(logits: Tensor, boxes: Tensor) -> Tensor:
    """Scores float32 [B, Q, C] in 0..1; -1 where the score or its box is not finite."""
    scores = logits.float().sigmoid()
    return torch.where(scores.isfinite() & boxes.isfinite().all(-1, keepdim=True), scores, -1)


def pixel_boxes(boxes: Tensor, image_hw: Tensor) -> Tensor:
    """Boxes [B, N, 4] cxcywh in shares of the image as float32 xyxy in pixels, cut off at its borders. NaN stays NaN.

    Args:
        boxes: normalised.
        image_hw: float32 [B, 2].
    """
    centre, half = boxes.float()[..., :2], boxes.float()[..., 2:] / 2
    corners = torch.cat([centre - half, centre + half], -1).clamp(0, 1)
    return corners * image_hw.flip(-1).repeat(1, 2)[:, None]
