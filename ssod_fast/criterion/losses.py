"""Losses of a DETR-like detector on matched pairs, for all decoder layers and images at once.

A query without a target takes part with its background term alone. The term of a matched query is written as the background term plus the
difference that its target makes, so that no dense target is built.

Weights of targets lie in [0, 1]. A target of weight w gives w times its terms, and 1 - w times the background's where there is one, in all
losses but that of boxes: 0 leaves the query to the background. It keeps its query, though, and counts in the normalizer.

Each function returns one value per layer; nothing waits for the device. Half-precision predictions are computed in float32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops._matches import Matches
from ..ops.box_iou import Format, Mode
from ..ops.matching_cost import check_labels, check_number
from ..ops.packed_targets import AnyTargets, PackedTargets
from ..ops.paired_box_iou import paired_box_iou
from .gather import entry_index, gather_logits, gather_matched, layers_of, normalizer, packed_for, take


class BoxLosses(NamedTuple):
    """Sums over matched pairs divided by the normalizer, [L] each."""

    l1: Tensor
    giou: Tensor


def matched_box_losses(
    boxes: Tensor, targets: AnyTargets, matches: Matches, *, fmt: Format = "cxcywh", mode: Mode = "giou", norm: Tensor | float | None = None
) -> BoxLosses:
    """L1 distance in the given format, and 1 - GIoU, of each matched pair.

    Args:
        boxes: [L, B, Q, 4] or [B, Q, 4], predictions.
        targets: those that were matched, with boxes in the same format and frame, and optionally a weight w in [0, 1] per target: both
            terms of its pair are taken w times. The boxes of a target of weight 0 may hold anything.
        matches: of the same layers.
        fmt: format of both, "cxcywh" (normalised) for DETR.
        mode: which overlap, see :func:`~ssod_fast.ops.box_iou`.
        norm: what to divide by, a number > 0 or a tensor, a scalar or [L]; by default :func:`normalizer`.

    Returns:
        [L] each.

    Raises:
        ValueError: for shapes or targets that do not fit the matches, and bad options.
        TypeError: for predictions, targets, matches or `norm` of another type.
    """
    pairs = _Pairs.of(targets, matches, norm)
    predicted, wanted = pairs.boxes(boxes)
    l1 = (predicted - wanted).abs().sum(-1)
    giou = 1 - paired_box_iou(predicted, wanted, mode=mode, fmt=fmt)
    return BoxLosses(pairs.total(l1), pairs.total(giou))


def matched_focal_loss(
    logits: Tensor, targets: AnyTargets, matches: Matches, *, alpha: float = 0.25, gamma: float = 2.0, norm: Tensor | float | None = None
) -> Tensor:
    """Sigmoid focal loss (Lin et al., 2017) over all queries and classes, as Deformable DETR and DINO train with it.

    Args:
        logits: [L, B, Q, C] or [B, Q, C].
        targets: those that were matched, optionally with a weight w in [0, 1] per target: its query gets w times the term of the target
            plus 1 - w times that of the background.
        matches: of the same layers.
        alpha: weight of the target's class, in [0, 1]; the background has 1 - alpha.
        gamma: exponent of the modulating factor.
        norm: what to divide by, a number > 0 or a tensor, a scalar or [L]; by default :func:`normalizer`.

    Returns:
        [L].

    Raises:
        ValueError: for shapes or targets that do not fit the matches, labels known to be out of range, and bad options.
        TypeError: for logits, targets, matches or `norm` of another type.
    """
    _check_factors(gamma=gamma)
    _check_factors(1, alpha=alpha)
    pairs = _Pairs.of(targets, matches, norm)
    x, found, background = pairs.class_terms(logits, gamma)
    change = alpha * _modulated(-x, gamma) - (1 - alpha) * _modulated(x, gamma)
    return pairs.total(change, found, (1 - alpha) * background)


def matched_vfl_loss(
    logits: Tensor,
    boxes: Tensor,
    targets: AnyTargets,
    matches: Matches,
    *,
    alpha: float = 0.75,
    gamma: float = 2.0,
    fmt: Format = "cxcywh",
    norm: Tensor | float | None = None,
) -> Tensor:
    """Varifocal loss (Zhang et al., 2021) as RT-DETR trains with it: the target's class learns the IoU of its box, weighted by it.

    Args:
        logits: [L, B, Q, C] or [B, Q, C].
        boxes: [L, B, Q, 4] or [B, Q, 4]; they get no gradient.
        targets: those that were matched, with boxes in the same format and frame, and optionally a weight w in [0, 1] per target: its query
            gets w times the term of the target plus 1 - w times that of the background.
        matches: of the same layers.
        alpha: weight of the background.
        gamma: exponent of the probability in the background's weight, which gets no gradient.
        fmt: format of the boxes.
        norm: what to divide by, a number > 0 or a tensor, a scalar or [L]; by default :func:`normalizer`.

    Returns:
        [L].

    Raises:
        ValueError: for shapes or targets that do not fit the matches, labels known to be out of range, and bad options.
        TypeError: for predictions, targets, matches or `norm` of another type.
    """
    _check_factors(alpha=alpha, gamma=gamma)
    pairs = _Pairs.of(targets, matches, norm)
    x, found, background = pairs.class_terms(logits, gamma, detach=True)
    quality = pairs.iou(boxes, fmt)
    change = quality * _bce(x, quality) - alpha * _modulated(x, gamma, detach=True)
    return pairs.total(change, found, alpha * background)


def matched_mal_loss(
    logits: Tensor,
    boxes: Tensor,
    targets: AnyTargets,
    matches: Matches,
    *,
    alpha: float | None = None,
    gamma: float = 1.5,
    fmt: Format = "cxcywh",
    norm: Tensor | float | None = None,
) -> Tensor:
    """Matchability-aware loss of DEIM (Huang et al., 2025): the target's class learns IoU ** gamma at full weight.

    Args:
        logits: [L, B, Q, C] or [B, Q, C].
        boxes: [L, B, Q, 4] or [B, Q, 4]; they get no gradient.
        targets: those that were matched, with boxes in the same format and frame, and optionally a weight w in [0, 1] per target: its query
            gets w times the term of the target plus 1 - w times that of the background.
        matches: of the same layers.
        alpha: weight of the background, None for 1.
        gamma: exponent of the IoU, and of the probability in the background's weight, which gets no gradient.
        fmt: format of the boxes.
        norm: what to divide by, a number > 0 or a tensor, a scalar or [L]; by default :func:`normalizer`.

    Returns:
        [L].

    Raises:
        ValueError: for shapes or targets that do not fit the matches, labels known to be out of range, and bad options.
        TypeError: for predictions, targets, matches or `norm` of another type.
    """
    factor = 1.0 if alpha is None else alpha
    _check_factors(alpha=factor, gamma=gamma)
    pairs = _Pairs.of(targets, matches, norm)
    x, found, background = pairs.class_terms(logits, gamma, detach=True)
    change = _bce(x, pairs.iou(boxes, fmt) ** gamma) - factor * _modulated(x, gamma, detach=True)
    return pairs.total(change, found, factor * background)


_LEAST_QUALITY = 0.01


def matched_ia_bce_loss(
    logits: Tensor,
    boxes: Tensor,
    targets: AnyTargets,
    matches: Matches,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    fmt: Format = "cxcywh",
    norm: Tensor | float | None = None,
) -> Tensor:
    """IoU-aware classification loss of LW-DETR (Chen et al., 2024).

    The target's class learns p ** alpha * IoU ** (1 - alpha), at least 0.01. Logarithms come from the logits, so that saturated ones stay
    finite.

    Args:
        logits: [L, B, Q, C] or [B, Q, C].
        boxes: [L, B, Q, 4] or [B, Q, 4]; they get no gradient.
        targets: those that were matched, with boxes in the same format and frame, and optionally a weight w in [0, 1] per target: its query
            gets w times the term of the target plus 1 - w times that of the background.
        matches: of the same layers.
        alpha: exponent of the probability in the target, in [0, 1], which gets no gradient.
        gamma: exponent of the probability in the background's weight, which has a gradient.
        fmt: format of the boxes.
        norm: what to divide by, a number > 0 or a tensor, a scalar or [L]; by default :func:`normalizer`.

    Returns:
        [L].

    Raises:
        ValueError: for shapes or targets that do not fit the matches, labels known to be out of range, and bad options.
        TypeError: for predictions, targets, matches or `norm` of another type.
    """
    _check_factors(gamma=gamma)
    _check_factors(1, alpha=alpha)
    pairs = _Pairs.of(targets, matches, norm)
    x, found, background = pairs.class_terms(logits, gamma)
    quality = x.detach().sigmoid() ** alpha * pairs.iou(boxes, fmt) ** (1 - alpha)
    change = _bce(x, quality.clamp(min=_LEAST_QUALITY)) - _modulated(x, gamma)
    return pairs.total(change, found, background)


def matched_ce_loss(logits: Tensor, targets: AnyTargets, matches: Matches, *, eos_coef: float = 0.1) -> Tensor:
    """Softmax cross-entropy of DETR (Carion et al., 2020), divided by the sum of the weights rather than by the number of targets.

    Args:
        logits: [L, B, Q, C + 1] or [B, Q, C + 1]; the last column is the background, which no target may have as its label.
        targets: those that were matched, optionally with a weight w in [0, 1] per target: its query gets w times the term of the target
            plus 1 - w times that of the background.
        matches: of the same layers.
        eos_coef: weight of the background, >= 0.

    Returns:
        [L].

    Raises:
        ValueError: for shapes or targets that do not fit the matches, labels known to be out of range, and bad options.
        TypeError: for logits, targets, matches or `norm` of another type.
    """
    _check_factors(eos_coef=eos_coef)
    pairs = _Pairs.of(targets, matches, 1.0)
    log_p = F.log_softmax(_wide(layers_of("logits", logits, matches, "C + 1")), -1)
    last = log_p.shape[-1] - 1
    if last < 0:
        raise ValueError(f"logits must have at least one column, the background, got {list(logits.shape)}")
    check_labels(pairs.targets, last, ", before the column of the background")
    on_target, found = gather_logits(log_p, matches, pairs.targets.labels)
    on_background, _ = gather_logits(log_p, matches, torch.full_like(pairs.targets.labels, last))
    loss = pairs.total(eos_coef * on_background - on_target, found, -eos_coef * log_p[..., last].flatten(1).sum(1))
    weights = pairs.total(torch.full_like(on_target, 1 - eos_coef), found, eos_coef * (log_p.shape[1] * log_p.shape[2]))
    return loss / weights.clamp(min=torch.finfo(weights.dtype).tiny)


class _Pairs(NamedTuple):
    """Matched pairs with the weight of each and what their sum is divided by.

    Attributes:
        targets: what was matched.
        matches: of L layers.
        norm: number, scalar or [L].
        counted: bool [L, E, G], whether there is a pair whose weight is not 0.
    """

    targets: PackedTargets
    matches: Matches
    norm: Tensor | float
    counted: Tensor

    @classmethod
    def of(cls, targets: AnyTargets, matches: Matches, norm: Tensor | float | None) -> _Pairs:
        packed = packed_for(targets, matches)
        divisor = normalizer(matches) if norm is None else _check_norm(norm, matches.layers)
        return cls(packed, matches, divisor, matches.matched if packed.weights is None else matches.matched & (packed.weights != 0))

    def boxes(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted and target boxes [L, E, G, 4]; both are 0 where no pair counts, so that neither loss nor gradient can be NaN."""
        predicted = _wide(gather_matched(layers_of("boxes", boxes, self.matches, 4), self.matches))
        counted = self.counted.unsqueeze(-1)
        wanted = self.targets.boxes.to(predicted.dtype)
        return torch.where(counted, predicted, 0), torch.where(counted, wanted, 0)

    def iou(self, boxes: Tensor, fmt: Format) -> Tensor:
        """IoU of the pairs [L, E, G], a constant."""
        predicted, wanted = self.boxes(boxes.detach())
        return paired_box_iou(predicted, wanted, fmt=fmt)

    def class_terms(self, logits: Tensor, gamma: float, detach: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Logit of the target's class [L, E, G], where there is one, and the sum of :func:`_modulated` over all logits [L]."""
        logits = layers_of("logits", logits, self.matches, "C")
        check_labels(self.targets, logits.shape[-1])
        index, found = entry_index(self.matches, self.targets.labels, logits.shape[-1])
        values, background = _ClassTerms.apply(logits, index.flatten(1), gamma, detach)  # type: ignore[no-untyped-call]
        return values.view(found.shape), found, background

    def total(self, values: Tensor, found: Tensor | None = None, rest: Tensor | float = 0.0) -> Tensor:
        """(Weighted sum of the pairs + rest) / norm, [L]."""
        if self.targets.weights is not None:
            values = values * self.targets.weights.to(values.dtype)
        values = torch.where(self.counted if found is None else self.counted & found, values, 0)
        return (values.sum((1, 2)) + rest) / self.norm


def _check_norm(norm: Tensor | float, layers: int) -> Tensor | float:
    if isinstance(norm, Tensor):
        if norm.dim() and norm.shape != (layers,):
            raise ValueError(f"norm must be a scalar or [{layers}], got {list(norm.shape)}")
        return norm
    if not isinstance(norm, (int, float)) or isinstance(norm, bool):
        raise TypeError(f"norm must be a number, a tensor or None, got {type(norm).__name__}")
    if not 0 < norm < math.inf:
        raise ValueError(f"norm must be a finite number > 0, got {norm!r}")
    return norm


def _check_factors(most: float = math.inf, **factors: float) -> None:
    """Refuses numbers that are not finite, negative, or beyond `most`."""
    for name, value in factors.items():
        check_number(name, value)
        if not 0 <= value <= most:
            raise ValueError(f"{name} must {'be >= 0' if most == math.inf else f'lie in [0, {most:g}]'}, got {value!r}")


def _wide(values: Tensor) -> Tensor:
    # Not float() for all: as the output of a traced autograd.Function, a conversion that changes nothing loses its gradient.
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _bce(x: Tensor, target: Tensor) -> Tensor:
    """-target ln p - (1 - target) ln(1 - p) of a logit."""
    return F.softplus(x) - target * x


def _modulated(x: Tensor, gamma: float, detach: bool = False) -> Tensor:
    """-p ** gamma ln(1 - p) of a logit; with `detach` the factor is a constant."""
    p = x.detach().sigmoid() if detach else x.sigmoid()
    return F.softplus(x) * p**gamma


class _ClassTerms(torch.autograd.Function):
    """The logits of the pairs [L, M] and the sum of :func:`_modulated` over all logits [L].

    Together they need one gradient of the size of the logits, and of the forward pass the logits alone, where autograd would keep five
    tensors of that size. Fresh memory costs more than the arithmetic, so most of it is done in place.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, gamma: float, detach: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, index)
        ctx.gamma, ctx.detach = gamma, detach
        values, x = take(logits.flatten(1).unsqueeze(-1), index).squeeze(-1), _wide(logits).flatten(1)
        return _wide(values), F.softplus(x).mul_(x.sigmoid().pow_(gamma)).sum(1)

    @staticmethod
    def backward(ctx: Any, of_pairs: Tensor, of_sum: Tensor) -> Any:
        logits, index = ctx.saved_tensors
        x = _wide(logits).flatten(1)
        p = x.sigmoid()
        slope = p if ctx.detach else (1 - p).mul_(F.softplus(x)).mul_(ctx.gamma).add_(p)
        factor = (p.detach() if ctx.detach else p) ** ctx.gamma  # as a constant it stays one if somebody differentiates again
        dense = factor.mul_(slope).mul_(of_sum.unsqueeze(1))
        _add_entries(dense, index, of_pairs)
        return dense.view(logits.shape).to(logits.dtype), None, None, None


def _add_entries(dense: Tensor, index: Tensor, values: Tensor) -> None:
    """Adds values [L, M] to [L, N] at index [L, M], where the index N is nowhere; each entry is met once, so no order matters."""
    layers, count = dense.shape
    if not count:
        return
    found = index < count
    start = torch.arange(layers, device=index.device).unsqueeze(1) * count
    place = torch.where(found, index, 0) + start
    # One dimension, for which CUDA has a deterministic form.
    dense.view(-1).scatter_add_(0, place.flatten(), torch.where(found, values, 0).flatten())
