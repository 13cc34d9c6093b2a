"""Stage-wise hybrid matching of Semi-DETR (arXiv 2307.08095): several queries per object first, one query per object later.

Boxes are cxcywh, normalised by the size of the image. Overlaps do not depend on the unit, so nothing here needs sizes in pixels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert

from ssod_fast.criterion import matched_box_losses, matched_focal_loss
from ssod_fast.criterion.gather import mean_over_ranks
from ssod_fast.criterion.losses import _bce, _ClassTerms, _modulated, _wide
from ssod_fast.detectors.deformable_detr.criterion import check_weights
from ssod_fast.ops import OneToMany, PackedTargets, match, one_to_many_assign, pack_targets, paired_box_iou
from ssod_fast.ops.packed_targets import AnyTargets

MatchingStage = Literal["o2m", "o2o"]
COST_EPS = 1e-12  # summand under the logarithms of the class cost


class MatchingLosses(NamedTuple):
    """Losses of each decoder layer, [L] each, without their weights."""

    cls: Tensor
    l1: Tensor
    giou: Tensor


@dataclass(frozen=True)
class HybridMatching:
    """Detection losses of both stages, summed over the decoder layers.

    Stage "o2m" gives every object up to `topk` queries, so that a wrong pseudo box does not hold the only query that could be right. It
    leaves duplicates, which suppression removes. Stage "o2o" gives every object one query and so ends with a model that needs none.

    Attributes:
        cls_weight: of the class loss. Original DINO 1.
        l1_weight: of the L1 distance. The paper says 5. The official code adds two parts of the term, meant for the log, once more to the
            loss: 10 in effect.
        giou_weight: of 1 - GIoU.
        cls_cost: of the class in the cost of one-to-one matching.
        l1_cost: of the L1 distance in it; it stays 5.
        giou_cost: of the GIoU in it.
        topk: candidates per object in stage "o2m".
        alpha: exponent of the score in the metric that ranks them.
        beta: exponent of the overlap in it.
        gamma: exponent of the distance between probability and target in the class loss of stage "o2m".
        focal_alpha: weight of an object's class in the focal loss of stage "o2o".
        focal_gamma: exponent of its modulating factor.
    """

    cls_weight: float = 2.0
    l1_weight: float = 10.0
    giou_weight: float = 2.0
    cls_cost: float = 2.0
    l1_cost: float = 5.0
    giou_cost: float = 2.0
    topk: int = 13
    alpha: float = 1.0
    beta: float = 6.0
    gamma: float = 2.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0

    def __post_init__(self) -> None:
        check_weights(self)

    def losses(self, logits: Tensor, boxes: Tensor, targets: AnyTargets, stage: MatchingStage, *, prefix: str = "") -> dict[str, Tensor]:
        """Weighted losses, three scalars with a graph even where there is no target. Nothing waits for the device.

        The encoder's proposals are one layer like any other; in the official code they learn objects of class 0, whatever the class is
        (:func:`~ssod_fast.detectors.deformable_detr.criterion.objectness_targets`).

        Args:
            logits: [L, B, Q, C] or [B, Q, C].
            boxes: [L, B, Q, 4] or [B, Q, 4].
            targets: anything :func:`~ssod_fast.ops.pack_targets` takes, boxes cxcywh normalised. A weight w in [0, 1] gives w times the
                terms of the target and 1 - w times those of the background.
            stage: which matching.
            prefix: of the keys.

        Returns:
            "loss_cls", "loss_l1" and "loss_giou", each with the prefix.

        Raises:
            ValueError: for an unknown stage, and as the functions of the two stages.
            TypeError: as they.
        """
        if stage == "o2m":
            found = one_to_many_losses(logits, boxes, targets, topk=self.topk, alpha=self.alpha, beta=self.beta, gamma=self.gamma)
        elif stage == "o2o":
            costs = self.cls_cost, self.l1_cost, self.giou_cost
            found = one_to_one_losses(logits, boxes, targets, costs=costs, alpha=self.focal_alpha, gamma=self.focal_gamma)
        else:
            raise ValueError(f'stage must be "o2m" or "o2o", got {stage!r}')
        weights = self.cls_weight, self.l1_weight, self.giou_weight
        terms = {f"loss_{name}": weight * term.sum() for name, weight, term in zip(found._fields, weights, found, strict=True)}
        return {prefix + name: term for name, term in terms.items()}


def one_to_many_losses(
    logits: Tensor,
    boxes: Tensor,
    targets: AnyTargets,
    *,
    topk: int = 13,
    alpha: float = 1.0,
    beta: float = 6.0,
    gamma: float = 2.0,
    process_group: dist.ProcessGroup | None = None,
) -> MatchingLosses:
    """Losses of stage one: task-aligned focal loss, L1 and 1 - GIoU of several queries per target.

    Queries are assigned by :func:`~ssod_fast.ops.one_to_many_assign` with the rule "tal". Its weights m̂ are what the classes learn,
    |t - p|^gamma · BCE(p, t) with t = m̂ for the class of the target and 0 elsewhere, and the weights of the box terms. Sums are divided by
    the mean over ranks of Σ m̂, at least 1. The cross-entropy is that of the logits, so it stays exact where probabilities saturate.

    Args:
        logits: [L, B, Q, C] or [B, Q, C]; half precision is computed in float32.
        boxes: [L, B, Q, 4] or [B, Q, 4] cxcywh, normalised.
        targets: anything :func:`~ssod_fast.ops.pack_targets` takes, boxes in the same form, weights as in :class:`HybridMatching`.
        topk: candidates per target; with fewer queries all of them.
        alpha: exponent of the score in the metric.
        beta: exponent of the overlap in it.
        gamma: exponent of the modulating factor, which has a gradient.
        process_group: ranks to average the divisor over, by default all.

    Returns:
        Losses of each layer. A coordinate that is not finite makes the box terms NaN.

    Raises:
        ValueError: as :func:`~ssod_fast.ops.one_to_many_assign`.
        TypeError: as :func:`~ssod_fast.ops.one_to_many_assign`.
    """
    packed, assigned = assign_one_to_many(logits, boxes, targets, topk=topk, alpha=alpha, beta=beta)
    rows = _Rows.of(packed, assigned)
    norm = mean_over_ranks(assigned.weight.sum((1, 2)), process_group=process_group).clamp(min=1)  # [L]
    cls = _task_aligned_focal(_layers(logits), rows, gamma)
    predicted, weight = _wide(_layers(boxes)), rows.weight * rows.quality
    l1 = (predicted - rows.boxes).abs().sum(-1)
    giou = 1 - paired_box_iou(predicted, rows.boxes, mode="giou", fmt="cxcywh")
    # A product, not a choice: it also carries NaN of boxes that take no part, for whoever guards the step.
    return MatchingLosses(cls / norm, (weight * l1).sum((1, 2)) / norm, (weight * giou).sum((1, 2)) / norm)


def assign_one_to_many(
    logits: Tensor, boxes: Tensor, targets: AnyTargets, *, topk: int = 13, alpha: float = 1.0, beta: float = 6.0
) -> tuple[PackedTargets, OneToMany]:
    """The assignment of :func:`one_to_many_losses`, of all layers and images in one call.

    Returns:
        The rows of the targets, and for each query which of them it takes, with shapes [L, B, Q].
    """
    packed = pack_targets(targets, boxes.device)
    corners = dataclasses.replace(packed, boxes=box_convert(packed.boxes, "cxcywh", "xyxy"))
    assigned = one_to_many_assign(
        _layers(logits),
        _layers(boxes),
        corners,
        rule="tal",
        topk=topk,
        alpha=alpha,
        beta=beta,
        box_format="cxcywh",
        from_logits=True,
    )
    return packed, assigned


def one_to_one_losses(
    logits: Tensor,
    boxes: Tensor,
    targets: AnyTargets,
    *,
    costs: tuple[float, float, float] = (2.0, 5.0, 2.0),
    alpha: float = 0.25,
    gamma: float = 2.0,
    process_group: dist.ProcessGroup | None = None,
) -> MatchingLosses:
    """Losses of stage two: sigmoid focal loss, L1 and 1 - GIoU of the optimal query of each target.

    The class loss is divided by the number of pairs on this rank, the box losses by its mean over ranks, both at least 1.

    Args:
        logits: [L, B, Q, C] or [B, Q, C]; half precision is computed in float32.
        boxes: [L, B, Q, 4] or [B, Q, 4] cxcywh, normalised.
        targets: anything :func:`~ssod_fast.ops.pack_targets` takes, boxes in the same form, weights as in :class:`HybridMatching`.
        costs: weights of class, L1 and GIoU in the cost of a pair.
        alpha: weight of the target's class in the focal loss and in the cost.
        gamma: exponent of the modulating factor in both.
        process_group: ranks to average the divisor over, by default all.

    Returns:
        Losses of each layer.

    Raises:
        ValueError: as :func:`~ssod_fast.ops.match`.
        TypeError: as :func:`~ssod_fast.ops.match`.
    """
    packed = pack_targets(targets, boxes.device)
    w_class, w_box, w_giou = costs
    matches = match(logits, boxes, packed, alpha=alpha, gamma=gamma, eps=COST_EPS, w_class=w_class, w_box=w_box, w_giou=w_giou)
    pairs = matches.matched.sum((1, 2)).to(_wide(boxes).dtype)  # [L]
    cls = matched_focal_loss(logits, packed, matches, alpha=alpha, gamma=gamma, norm=pairs.clamp(min=1))
    norm = mean_over_ranks(pairs, process_group=process_group).clamp(min=1)
    of_boxes = matched_box_losses(boxes, packed, matches, norm=norm)
    return MatchingLosses(cls, of_boxes.l1, of_boxes.giou)


class _Rows(NamedTuple):
    """What each query learns, [L, B, Q] or [L, B, Q, 4]; the background has quality and weight 0 and an empty box."""

    positive: Tensor
    label: Tensor
    boxes: Tensor
    quality: Tensor
    weight: Tensor

    @classmethod
    def of(cls, packed: PackedTargets, assigned: OneToMany) -> _Rows:
        positive = assigned.target >= 0
        row = torch.where(positive, assigned.target, packed.rows)  # the spare row behind the last one is the background
        weights = torch.ones_like(packed.boxes[:, 0]) if packed.weights is None else packed.weights
        return cls(
            positive,
            F.pad(packed.labels, (0, 1))[row],
            F.pad(packed.boxes, (0, 0, 0, 1))[row],
            assigned.weight,
            F.pad(weights, (0, 1))[row],
        )


def _task_aligned_focal(logits: Tensor, rows: _Rows, gamma: float) -> Tensor:
    """Σ |t - p|^gamma · BCE(p, t) over queries and classes, [L]: the background of all entries plus what the targets change."""
    batch, queries, classes = logits.shape[1:]
    first = torch.arange(batch * queries, device=logits.device).view(batch, queries) * classes
    entry = torch.where(rows.positive, first + rows.label, batch * queries * classes)
    x, background = _ClassTerms.apply(logits, entry.flatten(1), gamma, False)  # type: ignore[no-untyped-call]
    x = x.view(entry.shape)
    on_target = (rows.quality - x.sigmoid()).abs() ** gamma * _bce(x, rows.quality)
    change = torch.where(rows.positive, rows.weight * (on_target - _modulated(x, gamma)), 0)
    total: Tensor = change.sum((1, 2)) + background
    return total


def _layers(predictions: Tensor) -> Tensor:
    """[L, B, Q, ...] of that or of [B, Q, ...]."""
    return predictions.unsqueeze(0) if predictions.dim() == 3 else predictions
