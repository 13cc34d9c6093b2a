"""From a bag of proposals to one box (SSD-Det, arXiv 2307.12101), for all bags at once."""

from __future__ import annotations

import torch
from torch import Tensor

_SHARE = 1e-8  # officially added to every share after they were made to sum to 1
MIN_SIDE = 1.0  # pixels: narrower boxes are no objects


def merge_boxes(boxes: Tensor, weights: Tensor, fallback: Tensor, topk: int = 7) -> Tensor:
    """Average of the `topk` proposals of the largest weight, weighted by it.

    Args:
        boxes: [G, P, 4] xyxy.
        weights: [G, P] >= 0; 0 for proposals that must not count.
        fallback: [G, 4], what a bag becomes whose weights are all 0, or not finite.
        topk: all proposals where there are fewer.

    Returns:
        [G, 4].
    """
    best, index = weights.topk(min(topk, weights.shape[1]), dim=1)
    total = best.sum(1, keepdim=True)
    share = best / total + _SHARE
    chosen = boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
    merged = (chosen * share.unsqueeze(-1)).sum(1)
    return torch.where((total > 0) & total.isfinite(), merged, fallback)


def relative_overlaps(predicted: Tensor, valid: Tensor) -> Tensor:
    """Predicted overlaps [G, P], stretched to [0, 1] within the valid proposals of each bag; 1 for all where they are equal."""
    low = torch.where(valid, predicted, torch.inf).amin(1, keepdim=True)
    span = torch.where(valid, predicted, -torch.inf).amax(1, keepdim=True) - low
    varied = span > 0
    return torch.where(varied, (predicted - low) / torch.where(varied, span, 1), 1)


def clip_to_image(boxes: Tensor, image_hw: Tensor) -> Tensor:
    """Boxes [G, 4] cut off at the borders of their images, whose (height, width) are `image_hw` [G, 2]."""
    limit = image_hw.flip(1).repeat(1, 2).to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limit)


def usable_boxes(boxes: Tensor, image_hw: Tensor, *fallbacks: Tensor) -> Tensor:
    """The first of several candidates per object that is finite and at least a pixel wide and high in its image.

    Args:
        boxes: [G, 4] xyxy in pixels.
        image_hw: [G, 2], height and width of the image of each box.
        fallbacks: [G, 4] each, next candidates; the last one is taken as it is.

    Returns:
        [G, 4], inside of the images but for the last fallback.
    """
    result = fallbacks[-1]
    for candidate in reversed((boxes, *fallbacks[:-1])):
        inside = clip_to_image(candidate, image_hw)
        fits = ((inside[:, 2:] - inside[:, :2]) >= MIN_SIDE).all(1, keepdim=True) & candidate.isfinite().all(1, keepdim=True)
        result = torch.where(fits, inside, result)
    return result
