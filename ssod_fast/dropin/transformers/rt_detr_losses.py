"""Losses of RT-DETR and its descendants: further layers of denoising queries, and of D-FINE on the distributions of a box's edges."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...criterion import HungarianMatcher, matched_mal_loss, matched_vfl_loss
from ...criterion.gather import query_index
from ...ops._matches import Matches
from ...ops.packed_targets import PackedTargets
from .labels import Targets
from .local_loss import Corners, distillation_loss, fine_grained_loss
from .losses import Layers, Loss, Result, auxiliary, box_terms, numbered


@dataclass(frozen=True)
class Denoising:
    """Queries made from noisy targets, which are matched by construction.

    Attributes:
        meta: what the model says about them.
        groups: how many of them each target has.
    """

    meta: Mapping[str, Any]

    @property
    def groups(self) -> int:
        """Number of queries that each target has."""
        return int(self.meta["dn_num_group"])

    def split(self, predictions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Denoising queries and the others."""
        noisy, others = predictions.split(self.meta["dn_num_split"], dim)
        return noisy, others

    def matches(self, layers: int, queries: int, targets: PackedTargets) -> Matches:
        """Query g of target i is the one that group g made from it."""
        device, groups = targets.labels.device, self.groups
        index = [positive.to(device).view(groups, -1) for positive in self.meta["dn_positive_idx"]]
        query = torch.cat(index, 1).expand(layers, groups, targets.rows)
        status = torch.zeros(layers, groups, targets.batch, dtype=torch.uint8, device=device)
        cost = torch.zeros(query.shape, device=device)
        return Matches(query, cost, status, targets.image, queries, targets.batch, groups, offsets=targets.offsets)


def split_all(predictions: Mapping[str, Tensor], noise: Denoising | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Denoising queries and the others of predictions [B, layers, Q, .], as [layers, B, Q, .]; the first is empty without denoising."""
    if noise is None:
        return {}, {name: t.transpose(0, 1) for name, t in predictions.items()}
    parts = {name: noise.split(t.transpose(0, 1), 2) for name, t in predictions.items()}
    return {name: noisy for name, (noisy, _) in parts.items()}, {name: others for name, (_, others) in parts.items()}


class Assignment(NamedTuple):
    """Pairs of the class loss and of the losses of boxes, and the numbers that their sums are divided by."""

    classes: Matches
    class_norm: Tensor | float
    boxes: Matches
    box_norm: Tensor | float

    @classmethod
    def of(cls, matches: Matches, norm: Tensor | float) -> Assignment:
        """The same pairs for all losses."""
        return cls(matches, norm, matches, norm)


class RTDetrLoss(Loss):
    """RT-DETR and RT-DETRv2: the varifocal loss, also of the encoder's proposals and of denoising queries.

    The loss dict holds what is summed up, factors included. Denoising queries are no predictions of the last layer; older versions of
    transformers match them with the targets all the same.
    """

    def __call__(
        self,
        logits: Tensor,
        labels: Targets,
        device: Any,
        pred_boxes: Tensor,
        config: Any,
        outputs_class: Any = None,
        outputs_coord: Any = None,
        enc_topk_logits: Any = None,
        enc_topk_bboxes: Any = None,
        denoising_meta_values: Any = None,
        **kwargs: Any,
    ) -> Result:
        """See :class:`Loss`; called by the model."""
        noise = None if denoising_meta_values is None else Denoising(denoising_meta_values)
        targets = self.targets(labels, logits)
        norm = float(max(1, targets.rows))  # of this process alone, as in transformers
        if noise is not None:
            logits, pred_boxes = (noise.split(t, 1)[1] for t in (logits, pred_boxes))
        last = logits, self.frame(pred_boxes), ""
        if not config.auxiliary_loss:
            layers = Layers.of(last)
            losses = self.losses(layers, targets, self.assign(layers, targets, norm, config), config)
            return sum_of(losses), losses, None
        given = {"classes": outputs_class, "boxes": self.frame(outputs_coord), **self.corners(kwargs)}
        noisy, clean = split_all(given, noise)
        depth = min(len(t) for t in clean.values())
        found = [
            *auxiliary(clean["classes"][: depth - 1], clean["boxes"][: depth - 1]),
            {"logits": enc_topk_logits, "pred_boxes": self.frame(enc_topk_bboxes)},
        ]
        layers = Layers.of(last, *numbered(found, "_aux_"))
        assigned = self.assign(layers, targets, norm, config)
        losses = self.losses(layers, targets, assigned, config, Corners.of(clean, depth - 1, slice(1, depth)))
        if noise is not None:
            layers = Layers(noisy["classes"][:depth], noisy["boxes"][:depth], tuple(f"_dn_{i}" for i in range(depth)))
            assigned = Assignment.of(noise.matches(depth, layers.logits.shape[2], targets), norm * noise.groups)
            losses |= self.losses(layers, targets, assigned, config, Corners.of(noisy, depth, slice(0, depth)))
        return sum_of(losses), losses, found

    def frame(self, boxes: Tensor) -> Tensor:
        """Boxes as they enter the losses."""
        return boxes

    def corners(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Further predictions [B, layers, Q, .] of the model."""
        return {}

    def assign(self, layers: Layers, targets: PackedTargets, norm: float, config: Any) -> Assignment:
        """Which queries of each layer learn which targets."""
        return Assignment.of(self.matcher(config).match(layers.outputs, targets), norm)

    def losses(
        self, layers: Layers, targets: PackedTargets, assigned: Assignment, config: Any, corners: Corners | None = None
    ) -> dict[str, Tensor]:
        """Named and weighted losses of all layers."""
        l1, giou = box_terms(layers, targets, assigned.boxes, assigned.box_norm).values()
        terms = {
            **self.class_terms(layers, targets, assigned, config),
            "loss_bbox": config.weight_loss_bbox * l1,
            "loss_giou": config.weight_loss_giou * giou,
        }
        return layers.named(terms)

    def class_terms(self, layers: Layers, targets: PackedTargets, assigned: Assignment, config: Any) -> dict[str, Tensor]:
        """The weighted loss of classes, [L]."""
        options: Any = {"alpha": config.focal_loss_alpha, "gamma": config.focal_loss_gamma, "norm": assigned.class_norm}
        return {"loss_vfl": config.weight_loss_vfl * matched_vfl_loss(layers.logits, layers.boxes, targets, assigned.classes, **options)}

    def matcher(self, config: Any) -> HungarianMatcher:
        """The matcher of the family."""
        return HungarianMatcher(
            config.matcher_class_cost,
            config.matcher_bbox_cost,
            config.matcher_giou_cost,
            class_mode="focal" if config.use_focal_loss else "softmax",
            alpha=config.matcher_alpha,
            gamma=config.matcher_gamma,
        )


class DFineLoss(RTDetrLoss):
    """D-FINE: as RT-DETR, on boxes clamped to the image, with losses of the distributions from which a box's edges are read.

    In training a model returns one layer more of classes and boxes, from before the first refinement, than of distributions. transformers
    counts both from the front and leaves out what is over, which is reproduced here.
    """

    def frame(self, boxes: Tensor) -> Tensor:
        """Boxes as they enter the losses."""
        return boxes.clamp(0, 1)

    def corners(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Further predictions [B, layers, Q, .] of the model."""
        return {"corners": given["predicted_corners"], "references": given["initial_reference_points"]}

    def losses(
        self, layers: Layers, targets: PackedTargets, assigned: Assignment, config: Any, corners: Corners | None = None
    ) -> dict[str, Tensor]:
        """Named and weighted losses of all layers, with those of the distributions where there are any."""
        losses = super().losses(layers, targets, assigned, config)
        if corners is None or not len(corners.logits):
            return losses
        part = Layers(layers.logits[corners.layers], layers.boxes[corners.layers], layers.suffixes[corners.layers])
        pairs = dataclasses.replace(assigned.boxes, query=assigned.boxes.query[corners.layers])
        local = {
            "loss_fgl": config.weight_loss_fgl * fine_grained_loss(corners, part.boxes, targets, pairs, assigned.box_norm, config),
            "loss_ddf": config.weight_loss_ddf * distillation_loss(corners, part.boxes, targets, pairs),
        }
        return losses | part.named(local)


class DEIMv2Loss(DFineLoss):
    """DEIMv2: as D-FINE, with the matchability-aware loss of classes, and boxes that learn what any layer has matched."""

    def assign(self, layers: Layers, targets: PackedTargets, norm: float, config: Any) -> Assignment:
        """Pairs of each layer for classes, and of all layers together for boxes, where the config wants that."""
        assigned = super().assign(layers, targets, norm, config)
        if not config.use_dense_one_to_one:
            return assigned
        union = pairs_of_any_layer(assigned.classes)
        return assigned._replace(boxes=union, box_norm=union.matched[0].sum().clamp(min=1).to(torch.float32))

    def class_terms(self, layers: Layers, targets: PackedTargets, assigned: Assignment, config: Any) -> dict[str, Tensor]:
        """The weighted loss of classes, [L]."""
        options: Any = {"alpha": config.mal_alpha, "gamma": config.focal_loss_gamma, "norm": assigned.class_norm}
        return {"loss_mal": config.weight_loss_mal * matched_mal_loss(layers.logits, layers.boxes, targets, assigned.classes, **options)}


def pairs_of_any_layer(matches: Matches) -> Matches:
    """The pairs of all layers, the same ones for each: a query keeps the target that most layers gave it, of equals the first.

    transformers leaves it open which of equals that is, since its sort is not stable.

    Args:
        matches: of L layers, one query per target and layer.

    Returns:
        Up to L queries per target.
    """
    query, index = matches.query[:, 0], query_index(matches)[:, 0]  # [L, G], unmatched at the end of the index
    layers, rows = query.shape
    same = query.unsqueeze(1) == query.unsqueeze(0)  # [L, L, G], whether two layers gave a target the same query
    rank = same.sum(0) * rows + torch.arange(rows, device=query.device).flip(0)  # votes first, then the order of targets
    best = rank.new_zeros(matches.batch * matches.queries + 1).scatter_reduce(0, index.flatten(), rank.flatten(), "amax")
    repeated = (same & same.new_ones(layers, layers).tril(-1).unsqueeze(-1)).any(1)  # an earlier layer has the pair, too
    kept = (query >= 0) & (rank == best[index]) & ~repeated
    found = torch.where(kept, query, -1).expand(layers, layers, rows)
    cost = torch.zeros(found.shape, dtype=matches.cost.dtype, device=query.device)
    return dataclasses.replace(matches, query=found, cost=cost, repeats=layers, pair_counts=None)


def sum_of(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of scalars."""
    return torch.stack(list(losses.values())).sum()
