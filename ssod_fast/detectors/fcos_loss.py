"""FCOS losses over padded targets without a host sync (Tian et al., arXiv 2006.09214), equal to torchvision's where all weights are 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssod_fast.structures import PaddedTargets

from .anchors import AnchorGrid
from .dense_loss import BACKGROUND, focal_rows, gather_matched, giou_loss


@torch.no_grad()
def assign_fcos(grid: AnchorGrid, boxes: Tensor, valid: Tensor, radius: float) -> Tensor:
    """The box that each anchor point is responsible for.

    A point takes a box if it lies inside of it, within `radius` strides of its centre, and if the farthest side is in the range of the
    point's level; of several boxes it takes the one with the smallest area.

    Args:
        grid: anchors of all levels; only their centres and sizes (= strides) matter.
        boxes: float32 [B, N, 4].
        valid: bool [B, N].
        radius: in units of the stride.

    Returns:
        int64 [B, A], row of the box or BACKGROUND.
    """
    x, y = ((grid.boxes[:, :2] + grid.boxes[:, 2:]) / 2)[:, :, None].unbind(1)  # [A, 1] each
    size = (grid.boxes[:, 2] - grid.boxes[:, 0])[:, None]  # [A, 1]
    x0, y0, x1, y1 = boxes[:, None].unbind(-1)  # [B, 1, N] each
    inside, farthest = _reach(x, y, x0, y0, x1, y1)
    lower, upper = _level_range(size, grid.per_level)
    match = inside & valid[:, None] & (farthest > lower) & (farthest < upper)
    match &= torch.maximum((x - (x0 + x1) / 2).abs_(), (y - (y0 + y1) / 2).abs_()) < radius * size  # [B, A, N]
    # The constant is torchvision's: it turns the smallest area into the largest value and ranks areas up to 8 square pixels apart as equal.
    value = torch.where(match, 1e8 - (x1 - x0) * (y1 - y0), 0.0)
    best, index = value.max(-1)
    return torch.where(best < 1e-5, BACKGROUND, index)


def _reach(x: Tensor, y: Tensor, x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each point lies inside each box, and its distance to the farthest side; both [B, A, N]."""
    left, right, top, bottom = x - x0, x1 - x, y - y0, y1 - y
    nearest = torch.minimum(torch.minimum(left, right), torch.minimum(top, bottom))
    farthest = torch.maximum(torch.maximum(left, right), torch.maximum(top, bottom))
    return nearest > 0, farthest


def _level_range(size: Tensor, per_level: list[int]) -> tuple[Tensor, Tensor]:
    """Range of the farthest distance per anchor: 4 to 8 strides, open at the finest and the coarsest level."""
    lower, upper = size * 4, size * 8
    lower[: per_level[0]] = 0
    upper[-per_level[-1] :] = float("inf")
    return lower, upper


def decode_fcos(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Boxes [..., A, 4] from distances (left, top, right, bottom) in units of the anchor size; anchors [A, 4] or [..., A, 4]."""
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2
    size = anchors[..., 2:] - anchors[..., :2]
    return torch.cat([centre - deltas[..., :2] * size, centre + deltas[..., 2:] * size], -1)


def centerness(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Centre-ness of anchor centres inside paired boxes [..., 4] -> [...]; 1 in the middle, 0 at a side."""
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2
    near, far = centre - boxes[..., :2], boxes[..., 2:] - centre  # (left, top), (right, bottom)
    ratio = torch.minimum(near, far) / torch.maximum(near, far)
    return ratio.prod(-1).clamp(min=0).sqrt()


def fcos_losses(
    logits: Tensor, deltas: Tensor, center_logits: Tensor, grid: AnchorGrid, targets: PaddedTargets, valid: Tensor, radius: float = 1.5
) -> dict[str, Tensor]:
    """Classification (focal), box (GIoU) and centre-ness (BCE) losses.

    Each is a sum over anchors divided by the number of positive anchors in the batch (at least 1). The weight of a box multiplies the rows
    of its anchors in all three losses and leaves the divisor alone: a box of weight .5 counts half, one of weight 0 not at all, and its
    anchors are then not trained as background either.

    Args:
        logits: [B, A, C].
        deltas: [B, A, 4], distances to the sides in units of the stride.
        center_logits: [B, A, 1].
        grid: the A anchors.
        targets: N >= 1 rows per image.
        valid: bool [B, N], rows of `targets` to use.
        radius: centre sampling radius in strides.

    Returns:
        `classification`, `bbox_regression`, `bbox_ctrness`, torchvision's names.
    """
    matched = gather_matched(assign_fcos(grid, targets.boxes, valid, radius), grid.boxes, targets)
    count = matched.positive.sum().clamp(min=1)
    classes = focal_rows(logits.float(), matched.labels) * matched.rows
    boxes = giou_loss(decode_fcos(deltas.float(), grid.boxes), matched.boxes) * matched.weights
    middle = F.binary_cross_entropy_with_logits(
        center_logits.squeeze(-1).float(), centerness(grid.boxes, matched.boxes), weight=matched.weights, reduction="sum"
    )
    return {"classification": classes.sum() / count, "bbox_regression": boxes.sum() / count, "bbox_ctrness": middle / count}
