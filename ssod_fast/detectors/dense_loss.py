"""Pieces shared by the losses of dense detectors: every anchor of every image at once, masks instead of selections, no host sync.

Selecting the positive anchors with a boolean mask, as torchvision does, makes the host wait for the device to learn how many there are.
Here each anchor has a row of the loss, and rows that do not count are multiplied by 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssod_fast.ops.paired_box_iou import paired_box_iou
from ssod_fast.structures import PaddedTargets

BACKGROUND = -1
IGNORED = -2


@dataclass(frozen=True)
class Matched:
    """What each of A anchors of B images has to predict.

    Attributes:
        positive: bool [B, A].
        boxes: float32 [B, A, 4]; the anchor itself where not positive, so that box maths stays finite.
        labels: int64 [B, A]; -1 where not positive.
        weights: float32 [B, A], weight of the matched box; 0 where not positive.
        rows: float32 [B, A], weight of the anchor in the classification loss: 1 for background, 0 for ignored anchors.
    """

    positive: Tensor
    boxes: Tensor
    labels: Tensor
    weights: Tensor
    rows: Tensor


@torch.no_grad()
def gather_matched(index: Tensor, anchors: Tensor, targets: PaddedTargets) -> Matched:
    """Looks up the matched box of each anchor.

    Args:
        index: int64 [B, A], row of the box in `targets`, BACKGROUND or IGNORED.
        anchors: [A, 4].
        targets: N >= 1 rows per image.
    """
    positive = index >= 0
    row = index.clamp(min=0)
    boxes = targets.boxes.gather(1, row[..., None].expand(-1, -1, 4))
    weights = targets.weights.gather(1, row)
    return Matched(
        positive=positive,
        boxes=torch.where(positive[..., None], boxes, anchors),
        labels=torch.where(positive, targets.labels.gather(1, row), BACKGROUND),
        weights=torch.where(positive, weights, 0.0),
        rows=torch.where(positive, weights, (index != IGNORED).float()),
    )


def focal_rows(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss (Lin et al., arXiv 1708.02002, eq. 5) summed over the classes of each anchor.

    All classes are first treated as negatives; the one entry per anchor that is positive is then exchanged. No [B, A, C] target is built.

    Args:
        logits: float32 [B, A, C].
        labels: int64 [B, A], -1 = background.

    Returns:
        float32 [B, A].
    """
    negative = _focal_negative(logits, alpha, gamma).sum(-1)
    own = logits.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    exchange = alpha * torch.sigmoid(-own).pow(gamma) * F.softplus(-own) - _focal_negative(own, alpha, gamma)
    return negative + torch.where(labels >= 0, exchange, 0.0)


def _focal_negative(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    return (1 - alpha) * torch.sigmoid(logits).pow(gamma) * F.softplus(logits)


def giou_loss(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """1 - GIoU of paired boxes [..., 4] -> [...], with torchvision's small constants (Rezatofighi et al., arXiv 1902.09630)."""
    return 1 - paired_box_iou(boxes1, boxes2, mode="giou", eps_mode="add")
