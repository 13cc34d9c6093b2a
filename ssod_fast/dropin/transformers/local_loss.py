"""Losses of D-FINE's edge distributions (Peng et al., arXiv 2410.13842), for all layers at once and without a host sync.

Each edge of a box is a distribution over unevenly spaced offsets from a reference box. It learns the two offsets around its target, and
follows the distribution of the last layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...criterion.gather import gather_matched, query_index
from ...ops._matches import Matches
from ...ops.packed_targets import PackedTargets
from ...ops.paired_box_iou import paired_box_iou

_TEMPERATURE = 5.0


@dataclass(frozen=True)
class Corners:
    """Edge distributions of some layers.

    Attributes:
        logits: [L, B, Q, 4 * (bins + 1)], left, top, right, bottom.
        references: [L, B, Q, 4] cxcywh.
        teacher: [B, Q, 4 * (bins + 1)], those of the last layer.
        teacher_classes: [B, Q, C], class logits of the last layer.
        layers: which layers of the predictions they belong to.
    """

    logits: Tensor
    references: Tensor
    teacher: Tensor
    teacher_classes: Tensor
    layers: slice

    @classmethod
    def of(cls, predictions: Mapping[str, Tensor], number: int, layers: slice) -> Corners | None:
        """From predictions [layers, B, Q, .] of all decoder layers, of which the first `number` are taken; None where there are none."""
        if "corners" not in predictions:
            return None
        corners, references = predictions["corners"], predictions["references"]
        return cls(corners[:number], references[:number], corners[-1], predictions["classes"][-1], layers)


def fine_grained_loss(
    corners: Corners, boxes: Tensor, targets: PackedTargets, matches: Matches, norm: Tensor | float, config: Any
) -> Tensor:
    """Cross-entropy of the two offsets around each edge's target, weighted by the IoU of the pair.

    Args:
        corners: of L layers.
        boxes: [L, B, Q, 4] cxcywh.
        targets: those that were matched.
        matches: of the same layers.
        norm: what to divide by.
        config: `max_num_bins`, `up` and `reg_scale` of the model.

    Returns:
        [L].
    """
    bins, matched = int(config.max_num_bins), matches.matched  # [L, E, G]
    log_p = gather_matched(corners.logits, matches).unflatten(-1, (4, bins + 1)).float().log_softmax(-1)  # [L, E, G, 4, bins + 1]
    references = gather_matched(corners.references.detach(), matches).float()
    references = torch.where(matched.unsqueeze(-1), references, 1)  # keeps rows without a pair finite
    distances = edge_distances(references, targets.boxes.float(), abs(float(config.reg_scale)))
    left, share = bracket(distances, offsets_of_bins(bins, float(config.up), abs(float(config.reg_scale)), distances.device))
    pair = torch.stack((left, left + 1), -1)  # [L, E, G, 4, 2]
    loss = -(log_p.gather(-1, pair) * torch.stack((1 - share, share), -1)).sum((-1, -2))
    loss = loss * _iou(boxes, targets, matches)
    if targets.weights is not None:
        loss = loss * targets.weights
    return torch.where(matched, loss, 0).sum((1, 2)) / norm


def edge_distances(references: Tensor, boxes: Tensor, scale: float) -> Tensor:
    """How far the edges of boxes lie from those that a reference has by default, in units of the reference's size / scale.

    Args:
        references: [..., G, 4] cxcywh.
        boxes: [G, 4] cxcywh.
        scale: of the distances.

    Returns:
        [..., G, 4] left, top, right, bottom, outwards.
    """
    centre, size = references.split(2, -1)
    middle, half = boxes[:, :2], boxes[:, 2:] / 2
    inwards, outwards = centre - (middle - half), middle + half - centre
    distances: Tensor = torch.cat((inwards, outwards), -1) / (torch.cat((size, size), -1) / scale + 1e-16) - scale / 2
    return distances


def offsets_of_bins(bins: int, up: float, scale: float, device: torch.device) -> Tensor:
    """The offset that each bin stands for, [bins + 1], ascending: finer around 0, and one far bin at either end.

    Args:
        bins: even.
        up: with `scale` the reach of the bins.
        scale: see :func:`edge_distances`.
        device: of the result.
    """
    reach = abs(up) * scale
    base = (reach + 1) ** (2 / (bins - 2))
    half = [base**i - 1 for i in range(1, bins // 2)]
    return torch.tensor([-2 * reach, *[-x for x in reversed(half)], 0.0, *half, 2 * reach], device=device)


def bracket(distances: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the offset at or below each distance, and how far along the way to the next the distance lies, in 0 .. 1."""
    left = (torch.searchsorted(offsets, distances, right=True) - 1).clamp(0, len(offsets) - 2)
    low, high = offsets[left], offsets[left + 1]
    return left, ((distances - low) / (high - low)).clamp(0, 1)


def distillation_loss(corners: Corners, boxes: Tensor, targets: PackedTargets, matches: Matches) -> Tensor:
    """Divergence of each query's distributions from those of the last layer; weights of targets have no part in it.

    Queries count by the IoU of their pair, those without one by the last layer's confidence. The means over both kinds are mixed by the
    roots of their numbers.

    Args:
        corners: of L layers.
        boxes: [L, B, Q, 4] cxcywh.
        targets: those that were matched.
        matches: of the same layers.

    Returns:
        [L].
    """
    bins = corners.logits.shape[-1] // 4
    student, teacher = (t.float().unflatten(-1, (4, bins)).div(_TEMPERATURE).log_softmax(-1) for t in (corners.logits, corners.teacher))
    divergence = F.kl_div(student, teacher.detach().expand_as(student), reduction="none", log_target=True).sum((-1, -2))  # [L, B, Q]
    confidence = corners.teacher_classes.detach().float().sigmoid().amax(-1)  # [B, Q]
    quality, matched = _dense_quality(confidence, _iou(boxes, targets, matches), matches)
    loss = divergence * quality * _TEMPERATURE**2
    edges = 4 * torch.stack((matched.sum((1, 2)), (~matched).sum((1, 2))))  # [2, L]
    sums = torch.stack((torch.where(matched, loss, 0).sum((1, 2)), torch.where(matched, 0, loss).sum((1, 2))))
    shares = (edges / matches.batch).sqrt()
    return (sums / edges.clamp(min=1) * shares).sum(0) / shares.sum(0)


def _dense_quality(confidence: Tensor, iou: Tensor, matches: Matches) -> tuple[Tensor, Tensor]:
    """Confidence [B, Q], or the IoU [L, E, G] where a query has a target, and where that is; [L, B, Q] each."""
    layers, index = matches.layers, query_index(matches).flatten(1)
    spare = F.pad(confidence.flatten().expand(layers, -1), (0, 1))  # the last entry takes what belongs to no query
    quality = spare.scatter(1, index, iou.flatten(1).to(spare.dtype))
    matched = torch.zeros_like(spare, dtype=torch.bool).scatter(1, index, torch.ones_like(index, dtype=torch.bool))
    size = (matches.batch, matches.queries)
    return quality[:, :-1].unflatten(1, size), matched[:, :-1].unflatten(1, size)


def _iou(boxes: Tensor, targets: PackedTargets, matches: Matches) -> Tensor:
    """IoU of the pairs [L, E, G], a constant; 0 where there is none."""
    predicted = gather_matched(boxes.detach(), matches).float()
    return paired_box_iou(predicted, targets.boxes.float().expand_as(predicted), fmt="cxcywh")
