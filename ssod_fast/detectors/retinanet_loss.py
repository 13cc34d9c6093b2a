"""RetinaNet losses over padded targets without a host sync (Lin et al., arXiv 1708.02002), equal to torchvision's if all weights are 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssod_fast.ops.box_iou import box_iou
from ssod_fast.structures import PaddedTargets

from .anchors import AnchorGrid
from .dense_loss import BACKGROUND, IGNORED, Matched, focal_rows, gather_matched, giou_loss

BOX_LOSSES: tuple[str, ...] = ("l1", "smooth_l1", "giou")

# Images are matched in groups whose overlap matrix has at most this many entries (64 MiB of float32).
_MAX_PAIRS = 1 << 24


@dataclass(frozen=True)
class RetinaNetSettings:
    """How anchors are matched and boxes are coded.

    Attributes:
        high: overlap from which an anchor is positive.
        low: overlap below which it is background; between the two it is ignored.
        low_quality: whether the best anchors of each box (ties included) are positive whatever their overlap.
        box_loss: one of BOX_LOSSES.
        code_weights: factors of the coded (x, y, w, h).
        max_log_size: upper limit of coded w and h before the exponential.
    """

    high: float = 0.5
    low: float = 0.4
    low_quality: bool = True
    box_loss: str = "l1"
    code_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    max_log_size: float = math.log(1000.0 / 16)

    def __post_init__(self) -> None:
        if self.box_loss not in BOX_LOSSES:
            raise ValueError(f"box_loss must be one of {', '.join(BOX_LOSSES)}, got {self.box_loss!r}")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"thresholds must satisfy 0 <= low <= high <= 1, got low {self.low} and high {self.high}")


@torch.no_grad()
def assign_retinanet(anchors: Tensor, boxes: Tensor, valid: Tensor, settings: RetinaNetSettings) -> Tensor:
    """The box that each anchor is responsible for: the one it overlaps most, if enough, and low-quality matches (see the settings).

    A box that touches no anchor claims none; torchvision then makes all anchors that overlap nothing positive.

    Args:
        anchors: float32 [A, 4].
        boxes: float32 [B, N, 4].
        valid: bool [B, N].

    Returns:
        int64 [B, A], row of the box, BACKGROUND or IGNORED.
    """
    group = max(1, _MAX_PAIRS // (boxes.shape[1] * anchors.shape[0]))
    pairs = zip(boxes.split(group), valid.split(group), strict=True)
    return torch.cat([_assign_group(anchors, b, v, settings) for b, v in pairs])


def _assign_group(anchors: Tensor, boxes: Tensor, valid: Tensor, settings: RetinaNetSettings) -> Tensor:
    overlap = box_iou(boxes, anchors.expand(boxes.shape[0], -1, -1))  # [B, N, A]
    overlap = torch.where(valid[..., None], overlap, -1.0)
    best, index = overlap.max(1)  # [B, A]
    unmatched = torch.where(best >= settings.low, IGNORED, BACKGROUND)
    result = torch.where(best >= settings.high, index, unmatched)
    if settings.low_quality:
        top = overlap.amax(2, keepdim=True)  # [B, N, 1]
        claimed = ((overlap == top) & (top > 0)).any(1)
        result = torch.where(claimed, index, result)
    return result


def encode_boxes(boxes: Tensor, anchors: Tensor, code_weights: Sequence[float]) -> Tensor:
    """Codes (dx, dy, dw, dh) of boxes [..., 4] relative to anchors [..., 4]; sizes must be positive."""
    size = anchors[..., 2:] - anchors[..., :2]
    box_size = boxes[..., 2:] - boxes[..., :2]
    shift = (boxes[..., :2] + 0.5 * box_size - anchors[..., :2] - 0.5 * size) / size
    dx, dy = shift.unbind(-1)
    dw, dh = torch.log(box_size / size).unbind(-1)
    return torch.stack([value * weight for value, weight in zip((dx, dy, dw, dh), code_weights, strict=True)], -1)


def decode_boxes(codes: Tensor, anchors: Tensor, settings: RetinaNetSettings) -> Tensor:
    """Boxes [..., 4] from codes (dx, dy, dw, dh) relative to anchors [..., 4]."""
    wx, wy, ww, wh = settings.code_weights
    width, height = anchors[..., 2] - anchors[..., 0], anchors[..., 3] - anchors[..., 1]
    x = codes[..., 0] / wx * width + anchors[..., 0] + 0.5 * width
    y = codes[..., 1] / wy * height + anchors[..., 1] + 0.5 * height
    w = torch.exp((codes[..., 2] / ww).clamp(max=settings.max_log_size)) * width
    h = torch.exp((codes[..., 3] / wh).clamp(max=settings.max_log_size)) * height
    return torch.stack([x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h], -1)


def retinanet_losses(
    logits: Tensor, codes: Tensor, grid: AnchorGrid, targets: PaddedTargets, valid: Tensor, settings: RetinaNetSettings
) -> dict[str, Tensor]:
    """Classification (focal) and box losses.

    Each image's sum is divided by its number of positive anchors (at least 1), then the images are averaged. The weight of a box multiplies
    the rows of its anchors in both losses and leaves the divisor alone; anchors of a box of weight 0 are not trained as background either.

    Args:
        logits: [B, A, C].
        codes: [B, A, 4].
        grid: the A anchors.
        targets: N >= 1 rows per image.
        valid: bool [B, N], rows of `targets` to use.
        settings: matching and box coding.

    Returns:
        `classification`, `bbox_regression`, torchvision's names.
    """
    matched = gather_matched(assign_retinanet(grid.boxes, targets.boxes, valid, settings), grid.boxes, targets)
    count = matched.positive.sum(1).clamp(min=1)  # [B]
    classes = (focal_rows(logits.float(), matched.labels) * matched.rows).sum(1)
    boxes = (_box_rows(codes.float(), grid.boxes, matched, settings) * matched.weights).sum(1)
    return {"classification": (classes / count).mean(), "bbox_regression": (boxes / count).mean()}


def _box_rows(codes: Tensor, anchors: Tensor, matched: Matched, settings: RetinaNetSettings) -> Tensor:
    """Box loss of each anchor, [B, A]."""
    if settings.box_loss == "giou":
        return giou_loss(decode_boxes(codes, anchors, settings), matched.boxes)
    expected = encode_boxes(matched.boxes, anchors, settings.code_weights)
    distance = torch.nn.functional.l1_loss if settings.box_loss == "l1" else torch.nn.functional.smooth_l1_loss
    return distance(codes, expected, reduction="none").sum(-1)
