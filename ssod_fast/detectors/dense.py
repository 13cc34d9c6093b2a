"""Adapters of torchvision's one-stage detectors, FCOS and RetinaNet, with losses of our own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssod_fast.structures import PaddedTargets, Target

from .adapter import TorchvisionDetector
from .anchors import AnchorCache, AnchorGrid
from .fcos_loss import decode_fcos, fcos_losses
from .protocol import ImageBatch
from .retinanet_loss import RetinaNetSettings, decode_boxes, retinanet_losses
from .suppress import as_targets, best_boxes, clip_boxes
from .targets import to_padded, usable


@dataclass(frozen=True)
class DenseOutputs:
    """Head outputs of all anchors before any threshold.

    Attributes:
        logits: [B, A, C].
        deltas: [B, A, 4], in the code of the detector.
        center: [B, A, 1] centre-ness logits, None where the detector has none.
        grid: the anchors.
        sizes: true (h, w) of the images.
    """

    logits: Tensor
    deltas: Tensor
    center: Tensor | None
    grid: AnchorGrid
    sizes: list[tuple[int, int]]


class DenseDetector(TorchvisionDetector):
    """What FCOS and RetinaNet share. Losses take `PaddedTargets` without a host sync and honour the weights of boxes.

    Attributes:
        nms_thr: overlap above which the lower-scored of two detections of one class is dropped.
        topk_candidates: detections per level that enter the suppression.
    """

    supports_weights = True
    supports_padded = True

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__(model, num_classes)
        self.nms_thr = float(self.model.nms_thresh)
        self.topk_candidates = int(self.model.topk_candidates)
        self._anchors = AnchorCache(self.model.anchor_generator)

    def losses(self, images: ImageBatch | list[Tensor], targets: PaddedTargets | list[Target]) -> dict[str, Tensor]:
        """Training losses to be summed.

        Boxes that are not finite or have no area are left out. Images without boxes are background, and the losses keep their graph.

        Args:
            images: normalised batch, or [3, h, w] tensors with values in 0..255.
            targets: one entry per image, boxes in pixels of the image. The list form checks the labels and therefore waits for the device.

        Returns:
            Scalars under torchvision's names.

        Raises:
            ValueError: number of targets, or a label outside of 0..num_classes - 1 (list form).
        """
        batch = self._batch(images)
        padded = to_padded(targets, len(batch), self.num_classes, batch.tensor.device)
        return self._losses(self.raw_outputs(batch), padded, usable(padded, self.num_classes))

    def raw_outputs(self, images: ImageBatch | list[Tensor]) -> DenseOutputs:
        """Head outputs for all anchors, in the current mode and with gradients if enabled."""
        batch = self._batch(images)
        maps = list(self._feature_maps(batch).values())
        head: dict[str, Tensor] = self.model.head(maps)
        height, width = batch.tensor.shape[-2:]
        grid = self._anchors(maps, (int(height), int(width)))
        return DenseOutputs(head["cls_logits"], head["bbox_regression"], head.get("bbox_ctrness"), grid, batch.sizes)

    @torch.no_grad()
    def decode(self, raw: DenseOutputs, score_thr: float = 0.0, topk: int = 300) -> list[Target]:
        """Detections of head outputs, as `predict` returns them."""
        scores = self._scores(raw)
        index = _candidates(scores, raw.grid.per_level, self.topk_candidates)  # [B, K] into A * C
        scores = scores.flatten(1).gather(1, index)
        anchor, labels = index // self.num_classes, index % self.num_classes
        deltas = raw.deltas.float().gather(1, anchor[..., None].expand(-1, -1, 4))
        boxes = clip_boxes(self._decode_boxes(deltas, raw.grid.boxes[anchor]), raw.sizes)  # [B, K, 4]
        kept = best_boxes(boxes, scores, labels, nms_thr=self.nms_thr, max_keep=topk, score_thr=score_thr)
        return as_targets(kept, boxes, labels, scores)

    def _predict(self, batch: ImageBatch, score_thr: float, topk: int) -> list[Target]:
        return self.decode(self.raw_outputs(batch), score_thr, topk)

    def _losses(self, raw: DenseOutputs, targets: PaddedTargets, valid: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _scores(self, raw: DenseOutputs) -> Tensor:
        """Scores of all anchors and classes, float32 [B, A, C] in 0..1."""
        return raw.logits.float().sigmoid()

    def _decode_boxes(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Boxes [B, K, 4] from chosen head outputs and their anchors, both [B, K, 4]."""
        raise NotImplementedError


class FCOSDetector(DenseDetector):
    """torchvision's FCOS behind the detector protocol."""

    def _losses(self, raw: DenseOutputs, targets: PaddedTargets, valid: Tensor) -> dict[str, Tensor]:
        assert raw.center is not None
        radius = float(self.model.center_sampling_radius)
        return fcos_losses(raw.logits, raw.deltas, raw.center, raw.grid, targets, valid, radius)

    def _scores(self, raw: DenseOutputs) -> Tensor:
        assert raw.center is not None
        return (raw.logits.float().sigmoid() * raw.center.float().sigmoid()).sqrt()

    def _decode_boxes(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return decode_fcos(deltas, anchors)


class RetinaNetDetector(DenseDetector):
    """torchvision's RetinaNet behind the detector protocol."""

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__(model, num_classes)
        self.settings = _retinanet_settings(self.model)

    def _losses(self, raw: DenseOutputs, targets: PaddedTargets, valid: Tensor) -> dict[str, Tensor]:
        return retinanet_losses(raw.logits, raw.deltas, raw.grid, targets, valid, self.settings)

    def _decode_boxes(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return decode_boxes(deltas, anchors, self.settings)


def _retinanet_settings(model: Any) -> RetinaNetSettings:
    matcher, head = model.proposal_matcher, model.head.regression_head
    return RetinaNetSettings(
        high=matcher.high_threshold,
        low=matcher.low_threshold,
        low_quality=matcher.allow_low_quality_matches,
        box_loss=head._loss_type,
        code_weights=head.box_coder.weights,
        max_log_size=head.box_coder.bbox_xform_clip,
    )


def _candidates(scores: Tensor, per_level: list[int], limit: int) -> Tensor:
    """The `limit` best (anchor, class) pairs of each level and image: indices [B, K] into the flattened [A, C]."""
    chosen, start = [], 0
    for level in scores.split(per_level, dim=1):
        flat = level.flatten(1)
        chosen.append(flat.topk(min(limit, flat.shape[1]), dim=1).indices + start)
        start += flat.shape[1]
    return torch.cat(chosen, 1)
