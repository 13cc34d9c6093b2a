"""Losses of transformers' detectors on our matching: all decoder layers and images at once, a weight per target box, no host sync.

Names and values of the loss dict are those of transformers. A weight multiplies the terms of its target; a query whose target weighs 0
counts as background. What losses are divided by remains the number of targets, weighted or not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...criterion import (
    HungarianMatcher,
    matched_box_losses,
    matched_ce_loss,
    matched_focal_loss,
    matched_ia_bce_loss,
    matched_vfl_loss,
)
from ...ops._matches import Matches
from ...ops.packed_targets import PackedTargets, pack_targets
from .grounded import match_grounded, matched_grounded_loss, phrase_tokens
from .labels import Targets, boxes_and_labels
from .local_loss import Corners, distillation_loss, fine_grained_loss
from .matchers import whole_groups

Result = tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]


@dataclass(frozen=True)
class Layers:
    """Predictions of several layers.

    Attributes:
        logits: [L, B, Q, C].
        boxes: [L, B, Q, 4], normalised cxcywh.
        suffixes: what follows the names of each layer's losses.
    """

    logits: Tensor
    boxes: Tensor
    suffixes: tuple[str, ...]

    @classmethod
    def of(cls, *layers: tuple[Tensor, Tensor, str]) -> Layers:
        """From (logits [B, Q, C], boxes [B, Q, 4], suffix) of each layer."""
        logits, boxes, suffixes = zip(*layers, strict=True)
        return cls(torch.stack(logits), torch.stack(boxes), suffixes)

    @property
    def outputs(self) -> dict[str, Tensor]:
        """As matchers take them."""
        return {"logits": self.logits, "pred_boxes": self.boxes}

    def named(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One scalar per layer of each term [L]."""
        return {name + suffix: values[i] for i, suffix in enumerate(self.suffixes) for name, values in terms.items()}


@dataclass(frozen=True)
class Loss:
    """What all families share.

    Attributes:
        weights_key: key of per-box weights [N] in the labels of an image; where it is missing, boxes weigh 1.
    """

    weights_key: str = "weights"

    def targets(self, labels: Targets, logits: Tensor) -> PackedTargets:
        """Labels of all images as rows on the device of the predictions."""
        return pack_targets(boxes_and_labels(labels, self.weights_key), logits.device)


def auxiliary(outputs_class: Tensor, outputs_coord: Tensor) -> list[dict[str, Tensor]]:
    """Predictions [layers, B, Q, .] in the form in which transformers returns them."""
    return [{"logits": logits, "pred_boxes": boxes} for logits, boxes in zip(outputs_class, outputs_coord, strict=True)]


def numbered(found: list[dict[str, Tensor]] | None, prefix: str = "_") -> list[tuple[Tensor, Tensor, str]]:
    """Auxiliary outputs as input of :meth:`Layers.of`."""
    return [(layer["logits"], layer["pred_boxes"], f"{prefix}{i}") for i, layer in enumerate(found or ())]


def box_terms(layers: Layers, targets: PackedTargets, matches: Matches, norm: float | None = None) -> dict[str, Tensor]:
    """`loss_bbox` and `loss_giou`, [L] each."""
    l1, giou = matched_box_losses(layers.boxes, targets, matches, norm=norm)
    return {"loss_bbox": l1, "loss_giou": giou}


@torch.no_grad()
def cardinality_error(found: Tensor, targets: PackedTargets) -> dict[str, Tensor]:
    """Mean difference between numbers of found objects and of targets, [L]; a figure for the log, not a loss.

    Args:
        found: bool [L, B, Q], whether a query predicts an object.
        targets: rows of the batch, ragged.
    """
    assert targets.offsets is not None  # targets of lists are ragged
    return {"cardinality_error": (found.sum(-1) - targets.offsets.diff()).abs().float().mean(-1)}


def detected(logits: Tensor) -> Tensor:
    """Whether any class of a sigmoid head is likelier than not, bool [L, B, Q]."""
    return logits.detach().amax(-1).sigmoid() > 0.5


def total(terms: Mapping[str, Tensor], coefficients: Mapping[str, float]) -> Tensor:
    """Weighted sum of terms [L] over terms and layers."""
    return torch.stack([terms[name].sum() * factor for name, factor in coefficients.items()]).sum()


def box_coefficients(config: Any) -> dict[str, float]:
    """Factors of the box terms of all families but RT-DETR's."""
    return {"loss_bbox": config.bbox_loss_coefficient, "loss_giou": config.giou_loss_coefficient}


class DetrLoss(Loss):
    """DETR, Table Transformer and YOLOS: softmax classes with a background."""

    def __call__(
        self,
        logits: Tensor,
        labels: Targets,
        device: Any,
        pred_boxes: Tensor,
        config: Any,
        outputs_class: Any = None,
        outputs_coord: Any = None,
        **kwargs: Any,
    ) -> Result:
        """See :class:`Loss`; called by the model."""
        found = auxiliary(outputs_class[:-1], outputs_coord[:-1]) if config.auxiliary_loss else None
        layers = Layers.of((logits, pred_boxes, ""), *numbered(found))
        targets = self.targets(labels, logits)
        matches = self.matcher(config).match(layers.outputs, targets)
        terms = {**self.class_terms(layers.logits, targets, matches, config), **box_terms(layers, targets, matches)}
        return total(terms, {"loss_ce": 1.0, **box_coefficients(config)}), layers.named(terms), found

    def matcher(self, config: Any) -> HungarianMatcher:
        """The matcher of the family."""
        return HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost, class_mode="softmax")

    def class_terms(self, logits: Tensor, targets: PackedTargets, matches: Matches, config: Any) -> dict[str, Tensor]:
        """`loss_ce` and `cardinality_error`, [L] each."""
        found = logits.detach().argmax(-1) != logits.shape[-1] - 1
        loss = matched_ce_loss(logits, targets, matches, eos_coef=config.eos_coefficient)
        return {"loss_ce": loss, **cardinality_error(found, targets)}


class DeformableDetrLoss(DetrLoss):
    """Deformable DETR, Conditional DETR and DAB-DETR: sigmoid classes with the focal loss."""

    def matcher(self, config: Any) -> HungarianMatcher:
        """The matcher of the family."""
        return HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)

    def class_terms(self, logits: Tensor, targets: PackedTargets, matches: Matches, config: Any) -> dict[str, Tensor]:
        """`loss_ce` and `cardinality_error`, [L] each."""
        loss = matched_focal_loss(logits, targets, matches, alpha=config.focal_alpha)
        return {"loss_ce": loss, **cardinality_error(detected(logits), targets)}


class LwDetrLoss(Loss):
    """LW-DETR and RF-DETR: groups of queries, of which each is matched with all targets, and the IoU-aware loss."""

    def __call__(
        self,
        logits: Tensor,
        labels: Targets,
        device: Any,
        pred_boxes: Tensor,
        config: Any,
        outputs_class: Any = None,
        outputs_coord: Any = None,
        enc_outputs_class: Any = None,
        enc_outputs_coord: Any = None,
        **kwargs: Any,
    ) -> Result:
        """See :class:`Loss`; called by the model."""
        found = auxiliary(outputs_class[:-1], outputs_coord[:-1]) if config.auxiliary_loss else None
        layers = Layers.of((logits, pred_boxes, ""), *numbered(found), (enc_outputs_class, enc_outputs_coord, "_enc"))
        targets = self.targets(labels, logits)
        matcher = HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost, groups=config.group_detr)
        matches = matcher.match(whole_groups(layers.outputs, config.group_detr), targets)
        matches = dataclasses.replace(matches, queries=logits.shape[1])
        terms = {
            "loss_ce": matched_ia_bce_loss(layers.logits, layers.boxes, targets, matches, alpha=config.focal_alpha),
            **cardinality_error(detected(layers.logits), targets),
            **box_terms(layers, targets, matches),
        }
        return total(terms, {"loss_ce": config.class_loss_coefficient, **box_coefficients(config)}), layers.named(terms), found


class GroundingDinoLoss(Loss):
    """Grounding DINO and MM Grounding DINO: classes are phrases of a text, of which every token is predicted."""

    def __call__(
        self,
        logits: Tensor,
        labels: Targets,
        device: Any,
        pred_boxes: Tensor,
        config: Any,
        label_maps: Sequence[Tensor],
        text_mask: Tensor,
        outputs_class: Any = None,
        outputs_coord: Any = None,
        encoder_logits: Any = None,
        encoder_pred_boxes: Any = None,
    ) -> Result:
        """See :class:`Loss`; called by the model."""
        found = auxiliary(outputs_class[:-1], outputs_coord[:-1]) if config.auxiliary_loss else None
        encoder = [(encoder_logits, encoder_pred_boxes, "_enc")] if config.two_stage else []
        layers = Layers.of((logits, pred_boxes, ""), *numbered(found), *encoder)
        targets = self.targets(labels, logits)
        tokens = phrase_tokens(label_maps, labels, logits.device)
        matches = match_grounded(layers.logits, layers.boxes, targets, tokens, (config.class_cost, config.bbox_cost, config.giou_cost))
        terms = {
            "loss_ce": matched_grounded_loss(layers.logits, targets, matches, tokens, text_mask, config.focal_alpha),
            **cardinality_error(detected(layers.logits), targets),
            **box_terms(layers, targets, matches),
        }
        for layer in found or ():
            layer.update(label_maps=label_maps, text_mask=text_mask)  # type: ignore[call-overload]
        return total(terms, {"loss_ce": 2.0, **box_coefficients(config)}), layers.named(terms), found


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
            losses = self.losses(Layers.of(last), targets, None, norm, config)
            return sum_of(losses), losses, None
        given = {"classes": outputs_class, "boxes": self.frame(outputs_coord), **self.corners(kwargs)}
        noisy, clean = split_all(given, noise)
        depth = min(len(t) for t in clean.values())
        found = [
            *auxiliary(clean["classes"][: depth - 1], clean["boxes"][: depth - 1]),
            {"logits": enc_topk_logits, "pred_boxes": self.frame(enc_topk_bboxes)},
        ]
        layers = Layers.of(last, *numbered(found, "_aux_"))
        losses = self.losses(layers, targets, None, norm, config, Corners.of(clean, depth - 1, slice(1, depth)))
        if noise is not None:
            layers = Layers(noisy["classes"][:depth], noisy["boxes"][:depth], tuple(f"_dn_{i}" for i in range(depth)))
            matches = noise.matches(depth, layers.logits.shape[2], targets)
            losses |= self.losses(layers, targets, matches, norm * noise.groups, config, Corners.of(noisy, depth, slice(0, depth)))
        return sum_of(losses), losses, found

    def frame(self, boxes: Tensor) -> Tensor:
        """Boxes as they enter the losses."""
        return boxes

    def corners(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Further predictions [B, layers, Q, .] of the model."""
        return {}

    def losses(
        self, layers: Layers, targets: PackedTargets, matches: Matches | None, norm: float, config: Any, corners: Corners | None = None
    ) -> dict[str, Tensor]:
        """Named and weighted losses of all layers; matched here unless `matches` are given."""
        if matches is None:
            matches = self.matcher(config).match(layers.outputs, targets)
        vfl = {"alpha": config.focal_loss_alpha, "gamma": config.focal_loss_gamma}
        terms = {
            "loss_vfl": config.weight_loss_vfl * matched_vfl_loss(layers.logits, layers.boxes, targets, matches, norm=norm, **vfl),
            **box_terms(layers, targets, matches, norm),
        }
        terms["loss_bbox"] = terms["loss_bbox"] * config.weight_loss_bbox
        terms["loss_giou"] = terms["loss_giou"] * config.weight_loss_giou
        return layers.named(terms)

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
        self, layers: Layers, targets: PackedTargets, matches: Matches | None, norm: float, config: Any, corners: Corners | None = None
    ) -> dict[str, Tensor]:
        """Named and weighted losses of all layers, see :meth:`RTDetrLoss.losses`."""
        if matches is None:
            matches = self.matcher(config).match(layers.outputs, targets)
        losses = super().losses(layers, targets, matches, norm, config)
        if corners is None or not len(corners.logits):
            return losses
        part = Layers(layers.logits[corners.layers], layers.boxes[corners.layers], layers.suffixes[corners.layers])
        pairs = dataclasses.replace(matches, query=matches.query[corners.layers])
        local = {
            "loss_fgl": config.weight_loss_fgl * fine_grained_loss(corners, part.boxes, targets, pairs, norm, config),
            "loss_ddf": config.weight_loss_ddf * distillation_loss(corners, part.boxes, targets, pairs),
        }
        return losses | part.named(local)


def sum_of(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of scalars."""
    return torch.stack(list(losses.values())).sum()
