"""Scores of bags and the losses that train on them (SSD-Det, arXiv 2307.12101; the classification of bags is that of P2BNet).

G bags of P proposals. Means are taken over bags; without any bag every loss is 0 and keeps its graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_FLOOR = -100.0  # of logarithms in the cross-entropy
_EPS = 1e-6  # in the logarithms of the focal form
_HALF = 0.5  # overlaps are predicted as (IoU - 0.5) / 0.5


def instance_scores(logits: Tensor, valid: Tensor) -> Tensor:
    """How much each proposal stands for its bag, class by class: a softmax over the valid proposals.

    Args:
        logits: [G, P, C].
        valid: bool [G, P]; the logits of other proposals have no effect and no gradient.

    Returns:
        [G, P, C]; sums over P are 1, or 0 where no proposal is valid.
    """
    counts = valid.unsqueeze(-1)
    return logits.masked_fill(~counts, torch.finfo(logits.dtype).min).softmax(1) * counts


def own_class(values: Tensor, labels: Tensor) -> Tensor:
    """Values [G, P, C] of the bags' own classes `labels` [G], as [G, P]."""
    return values.gather(2, labels[:, None, None].expand(-1, values.shape[1], 1)).squeeze(2)


def mil_loss(bags: Tensor, labels: Tensor, occupied: Tensor, *, mask_empty: bool = True) -> Tensor:
    """Stage I: cross-entropy of bag scores, summed over classes, divided by the number of bags with a valid proposal.

    Args:
        bags: [G, C] in [0, 1], sums over the proposals of class score times instance score.
        labels: int64 [G].
        occupied: bool [G], whether the bag has a valid proposal.
        mask_empty: leave out the others. Officially they add 100 each, without a gradient.
    """
    wanted = _one_hot(labels, bags)
    p = bags.clamp(0, 1)
    losses = -(wanted * _log(p) + (1 - wanted) * _log(1 - p)).sum(1)
    if mask_empty:
        losses = torch.where(occupied, losses, 0)
    return losses.sum() / occupied.sum().clamp(min=1)


def focal_mil_loss(bags: Tensor, labels: Tensor, occupied: Tensor, weight: Tensor) -> Tensor:
    """Stage II: :func:`focal_form` of bag scores, weighted by how sure stage I was.

    Args:
        bags: [G, C] in [0, 1].
        labels: int64 [G].
        occupied: bool [G], whether the bag has a valid proposal; others are left out.
        weight: [G], a constant.
    """
    losses = focal_form(bags, _one_hot(labels, bags)).sum(1) * weight
    return torch.where(occupied, losses, 0).sum() / occupied.sum().clamp(min=1)


def negative_loss(logits: Tensor, keep: Tensor, weight: Tensor) -> Tensor:
    """Random boxes as background: :func:`focal_form` summed over boxes and classes, times the mean weight of the bags, per bag.

    Args:
        logits: [N, C] of stage II.
        keep: bool [N], whether the box is far enough from all bags.
        weight: [G] of the bags, a constant; at least one.
    """
    p = logits.sigmoid()
    losses = torch.where(keep, focal_form(p, torch.zeros_like(p)).sum(1), 0)
    return weight.mean() * losses.sum() / weight.shape[0]


def focal_form(p: Tensor, q: Tensor) -> Tensor:
    """-(p - q)² · (q ln(p + 1e-6) + (1 - q) ln(1 - p + 1e-6)), elementwise."""
    return -((p - q) ** 2) * (q * (p + _EPS).log() + (1 - q) * (1 - p + _EPS).log())


def regression_loss(deltas: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
    """L1 distance of box deltas [G, P, 4], summed over coordinates, averaged over proposals; invalid ones count.

    Args:
        deltas: predicted.
        targets: wanted, constants.
        weight: [G], a constant; None for 1.
    """
    errors = (deltas - targets).abs().sum((1, 2))
    return (errors if weight is None else errors * weight).sum() / _proposals(deltas)


def overlap_loss(predicted: Tensor, overlaps: Tensor) -> Tensor:
    """Smooth L1 of predicted overlaps [G, P] against (IoU - 0.5) / 0.5, averaged over proposals.

    Args:
        predicted: without an activation.
        overlaps: IoU with the box of stage I, constants.
    """
    return F.smooth_l1_loss(predicted, (overlaps - _HALF) / _HALF, reduction="sum") / _proposals(predicted)


def _proposals(values: Tensor) -> int:
    return max(values.shape[0] * values.shape[1], 1)


def _one_hot(labels: Tensor, like: Tensor) -> Tensor:
    return (labels[:, None] == torch.arange(like.shape[1], device=like.device)).to(like.dtype)


def _log(p: Tensor) -> Tensor:
    """ln p, at least -100, with a gradient of 0 where p is 0."""
    least = torch.finfo(p.dtype).tiny
    return torch.where(p > 0, p.clamp(min=least).log(), _FLOOR).clamp(min=_FLOOR)
