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
)
from ...ops._matches import Matches
from ...ops.packed_targets import PackedTargets, pack_targets
from ...structures import PaddedTargets
from .grounded import match_grounded, matched_grounded_loss, phrase_tokens
from .labels import Targets, boxes_and_labels
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

    def targets(self, labels: Targets | PaddedTargets, logits: Tensor) -> PackedTargets:
        """Labels of all images as rows on the device of the predictions; padded ones, which our own detectors hand through, are there."""
        if isinstance(labels, PaddedTargets):
            return pack_targets(labels)
        return pack_targets(boxes_and_labels(labels, self.weights_key), logits.device)


def auxiliary(outputs_class: Tensor, outputs_coord: Tensor) -> list[dict[str, Tensor]]:
    """Predictions [layers, B, Q, .] in the form in which transformers returns them."""
    return [{"logits": logits, "pred_boxes": boxes} for logits, boxes in zip(outputs_class, outputs_coord, strict=True)]


def numbered(found: list[dict[str, Tensor]] | None, prefix: str = "_") -> list[tuple[Tensor, Tensor, str]]:
    """Auxiliary outputs as input of :meth:`Layers.of`."""
    return [(layer["logits"], layer["pred_boxes"], f"{prefix}{i}") for i, layer in enumerate(found or ())]


def box_terms(layers: Layers, targets: PackedTargets, matches: Matches, norm: Tensor | float | None = None) -> dict[str, Tensor]:
    """`loss_bbox` and `loss_giou`, [L] each."""
    l1, giou = matched_box_losses(layers.boxes, targets, matches, norm=norm)
    return {"loss_bbox": l1, "loss_giou": giou}


@torch.no_grad()
def cardinality_error(found: Tensor, targets: PackedTargets) -> dict[str, Tensor]:
    """Mean difference between numbers of found objects and of targets, [L]; a figure for the log, not a loss.

    Args:
        found: bool [L, B, Q], whether a query predicts an object.
        targets: rows of the batch.
    """
    counts = targets.offsets.diff() if targets.offsets is not None else targets.counts
    assert counts is not None  # targets are ragged or padded
    return {"cardinality_error": (found.sum(-1) - counts).abs().float().mean(-1)}


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
