"""Matching and class loss of Grounding DINO (Liu et al., arXiv 2303.05499), whose classes are phrases of several text tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...criterion import gather_matched, normalizer
from ...ops._matches import Matches
from ...ops.match import match
from ...ops.packed_targets import PackedTargets

_EPS = 1e-8


def phrase_tokens(label_maps: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]], device: torch.device) -> Tensor:
    """Which text tokens name each target.

    Args:
        label_maps: [classes, T] of each image.
        targets: one mapping per image with `class_labels`.
        device: where the result shall be.

    Returns:
        float32 [G, T], 0 or 1.
    """
    rows = [maps.to(device)[target["class_labels"].to(device, torch.int64)] for maps, target in zip(label_maps, targets, strict=True)]
    return torch.cat(rows).float()


def match_grounded(logits: Tensor, boxes: Tensor, targets: PackedTargets, tokens: Tensor, costs: tuple[float, float, float]) -> Matches:
    """Matches by the focal cost of each token, averaged over the tokens of a target's phrase, and by boxes.

    Args:
        logits: [L, B, Q, T].
        boxes: [L, B, Q, 4] normalised cxcywh.
        targets: G rows.
        tokens: [G, T], see :func:`phrase_tokens`.
        costs: weights of the class, L1 and GIoU cost.

    Returns:
        The queries of all targets.
    """
    w_class, w_box, w_giou = costs
    extra = _token_cost(logits.detach(), tokens, targets.image) * w_class
    boxes = boxes.detach()
    return match(None, boxes, targets, class_mode="none", w_class=0.0, w_box=w_box, w_giou=w_giou, extra_cost=extra)


def _token_cost(logits: Tensor, tokens: Tensor, image: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Mean focal cost of the tokens of each phrase, [L, G, Q]."""
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    wrong = (1 - alpha) * p**gamma * -(1 - p + _EPS).log()
    right = alpha * (1 - p) ** gamma * -(p + _EPS).log()
    share = (tokens / tokens.sum(-1, keepdim=True)).to(p.dtype)
    return torch.einsum("lgqt,gt->lgq", (right - wrong)[:, image], share)


def matched_grounded_loss(
    logits: Tensor, targets: PackedTargets, matches: Matches, tokens: Tensor, text_mask: Tensor, alpha: float, gamma: float = 2.0
) -> Tensor:
    """Focal loss over all queries and text tokens; the tokens of its phrase are the target of a matched query.

    Args:
        logits: [L, B, Q, T]; anything outside of `text_mask`.
        targets: those that were matched, optionally with a weight per target.
        matches: of the same layers.
        tokens: [G, T], see :func:`phrase_tokens`.
        text_mask: bool [B, Q, T], tokens of the text, the same for all queries of an image.
        alpha: weight of the target's tokens, the others have 1 - alpha; negative for 1 and 1.
        gamma: exponent of the modulating factor.

    Returns:
        [L].
    """
    positive, negative = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
    x = torch.where(text_mask, logits, 0).to(torch.promote_types(logits.dtype, torch.float32))
    background = torch.where(text_mask, F.softplus(x) * x.sigmoid() ** gamma, 0).sum((1, 2, 3))
    pairs = gather_matched(x, matches)  # [L, E, G, T]
    change = positive * F.softplus(-pairs) * (-pairs).sigmoid() ** gamma - negative * F.softplus(pairs) * pairs.sigmoid() ** gamma
    wanted = tokens * text_mask[targets.image, 0]
    if targets.weights is not None:
        wanted = wanted * targets.weights.unsqueeze(1)
    on_pairs = torch.where(matches.matched.unsqueeze(-1), change * wanted, 0).sum((1, 2, 3))
    loss: Tensor = (on_pairs + negative * background) / normalizer(matches)
    return loss
