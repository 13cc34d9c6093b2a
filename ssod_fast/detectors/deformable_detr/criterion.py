"""Losses of Deformable DETR and DINO, for all decoder layers and images at once and without a host sync."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

from ssod_fast.criterion import matched_box_losses, matched_focal_loss
from ssod_fast.criterion.gather import mean_over_ranks, normalizer
from ssod_fast.ops import Matches, match, pack_targets
from ssod_fast.ops.packed_targets import AnyTargets
from ssod_fast.structures import PaddedTargets

from ..targets import usable
from .denoising import Denoising

_NEVER = -1e4  # logit whose loss and gradient are 0 in float32 without being infinite


@dataclass(frozen=True)
class DETRCriterion:
    """Sigmoid focal loss of all queries, L1 distance and 1 - GIoU of those that found an object, summed over the layers.

    Objects take the queries that cost least, each one query per layer. Sums are divided by the mean number of objects per rank, at least 1.
    Weights of targets are shares of their losses, see :func:`~ssod_fast.criterion.matched_focal_loss`.

    Attributes:
        cls_weight: of the focal loss. Deformable DETR 2, DINO 1, Semi-DETR 2.
        l1_weight: of the L1 distance of boxes cxcywh, normalised.
        giou_weight: of 1 - GIoU.
        cls_cost: of the class in the cost of matching.
        l1_cost: of the L1 distance in it.
        giou_cost: of the GIoU in it.
        alpha: weight of an object's class in the focal loss; the background has 1 - alpha.
        gamma: exponent of its modulating factor.
    """

    cls_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    cls_cost: float = 2.0
    l1_cost: float = 5.0
    giou_cost: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        check_weights(self)
        if self.cls_cost == self.l1_cost == self.giou_cost == 0:
            raise ValueError("cls_cost, l1_cost and giou_cost must not all be 0")
        if self.alpha > 1:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}")

    def match(self, logits: Tensor, boxes: Tensor, targets: AnyTargets) -> Matches:
        """The queries that objects take, in all layers with one call.

        Args:
            logits: [L, B, Q, C] or [B, Q, C].
            boxes: [L, B, Q, 4] or [B, Q, 4] cxcywh, normalised.
            targets: boxes in the same form.
        """
        return match(
            logits,
            boxes,
            targets,
            alpha=self.alpha,
            gamma=self.gamma,
            w_class=self.cls_cost,
            w_box=self.l1_cost,
            w_giou=self.giou_cost,
        )

    def losses(
        self, logits: Tensor, boxes: Tensor, targets: AnyTargets, *, prefix: str = "", norm: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        """Matches and computes the losses.

        Args:
            logits: [L, B, Q, C] or [B, Q, C]; bfloat16 is computed in float32.
            boxes: [L, B, Q, 4] or [B, Q, 4] cxcywh, normalised.
            targets: boxes in the same form.
            prefix: in front of the names.
            norm: what to divide by, by default the mean number of targets per rank, at least 1.

        Returns:
            Scalars `loss_cls`, `loss_l1` and `loss_giou`, with their weights. Nothing waits for the device.
        """
        packed = pack_targets(targets, logits.device)
        return self.matched_losses(logits, boxes, packed, self.match(logits, boxes, packed), prefix=prefix, norm=norm)

    def matched_losses(
        self, logits: Tensor, boxes: Tensor, targets: AnyTargets, matches: Matches, *, prefix: str = "", norm: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        """As :meth:`losses`, with queries that were chosen already."""
        norm = normalizer(matches) if norm is None else norm
        with torch.autocast(logits.device.type, enabled=False):
            focal = matched_focal_loss(logits, targets, matches, alpha=self.alpha, gamma=self.gamma, norm=norm)
            box = matched_box_losses(boxes, targets, matches, norm=norm)
        return {
            f"{prefix}loss_cls": self.cls_weight * focal.sum(),
            f"{prefix}loss_l1": self.l1_weight * box.l1.sum(),
            f"{prefix}loss_giou": self.giou_weight * box.giou.sum(),
        }

    def denoising_losses(
        self, logits: Tensor, boxes: Tensor, denoising: Denoising, *, prefix: str = "dn_", norm: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        """Losses of denoising queries, whose objects are known. Images without objects have no share.

        Args:
            logits: [L, B, R, C], of the denoising queries alone.
            boxes: [L, B, R, 4].
            denoising: what the queries were made from.
            prefix: in front of the names.
            norm: what to divide by, by default the mean number of positive queries per rank, at least 1.
        """
        packed, matches = denoising.matches(logits.shape[0])
        shown = torch.where(denoising.real[:, None, None], logits, _NEVER)
        return self.matched_losses(shown, boxes, packed, matches, prefix=prefix, norm=norm)


def normalisers(targets: PaddedTargets, denoising: Denoising | None = None) -> tuple[Tensor, Tensor]:
    """What losses of matching queries and those of denoising queries are divided by, with one communication for both.

    Returns:
        float32 scalars: mean number per rank of objects and of positive denoising queries, at least 1 each.
    """
    count = targets.count.sum()
    positives = count.new_zeros(()) if denoising is None else denoising.targets.count.sum() * denoising.groups
    means = mean_over_ranks(torch.stack([count, positives]).float()).clamp(min=1)
    return means[0], means[1]


def normalised_targets(targets: PaddedTargets, image_hw: Tensor, num_classes: int) -> PaddedTargets:
    """Targets as the criterion reads them, without boxes that are not finite or have no area and without labels that are no class.

    Args:
        targets: boxes xyxy in pixels.
        image_hw: [B, 2], true height and width of the images.
        num_classes: without background.

    Returns:
        The usable rows, with boxes cxcywh in shares of the image. Nothing waits for the device.
    """
    kept = targets.select(usable(targets, num_classes))
    scale = image_hw.flip(-1).repeat(1, 2)[:, None]  # [B, 1, 4]
    return dataclasses.replace(kept, boxes=box_convert(kept.boxes, "xyxy", "cxcywh") / scale)


def objectness_targets(targets: PaddedTargets) -> PaddedTargets:
    """The same targets, all of class 0: what a head learns whose first column says that there is an object, whatever it is."""
    return dataclasses.replace(targets, labels=torch.zeros_like(targets.labels))


def check_weights(options: Any) -> None:
    """Refuses a dataclass of weights with a field that is no finite number >= 0, by its name."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{field.name} must be a number, got {value!r}")
        if not 0 <= value < float("inf"):
            raise ValueError(f"{field.name} must be a finite number >= 0, got {value}")
