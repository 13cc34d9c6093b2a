"""Adapter of torchvision's Faster R-CNN: two stages, torchvision's own losses."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign

from ssod_fast.structures import PaddedTargets, Target

from .adapter import TorchvisionDetector
from .protocol import ImageBatch, LossProgram
from .suppress import as_targets, best_boxes, clip_boxes
from .targets import to_clean_list

MIN_DETECTION = 0.01  # pixels: torchvision drops detections with a shorter side


class FasterRCNNDetector(TorchvisionDetector):
    """torchvision's Faster R-CNN behind the detector protocol.

    Inside of the model label 0 is background, so labels are shifted by one on the way in and back on the way out. The losses sample anchors
    and proposals at random and wait for the device many times, so box weights and padded targets bring nothing here and are not supported:
    `PaddedTargets` are accepted and turned into lists, and weights other than 1 are refused.

    Attributes:
        nms_thr: overlap above which the lower-scored of two detections of one class is dropped.
    """

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__(model, num_classes)
        self.nms_thr = float(self.model.roi_heads.nms_thresh)
        # torchvision decodes boxes in the dtype of the head outputs: bfloat16 under autocast, with steps of 4 pixels at 1000.
        for head in (self.model.rpn.head, self.model.roi_heads.box_predictor):
            head.register_forward_hook(_widen_outputs)

    def forward(self, images: ImageBatch | list[Tensor], targets: PaddedTargets | list[Target] | LossProgram) -> dict[str, Tensor]:
        """The losses, so that DistributedDataParallel can wrap the detector.

        Args:
            images: normalised batch, or [3, h, w] tensors with values in 0..255.
            targets: as for :meth:`losses`; or a program, which computes losses from the stages of the detector.
        """
        if callable(targets):
            return targets(self, self._batch(images))
        return self.losses(images, targets)

    def losses(self, images: ImageBatch | list[Tensor], targets: PaddedTargets | list[Target]) -> dict[str, Tensor]:
        """Training losses to be summed, torchvision's four. Waits for the device.

        Boxes that are not finite or have no area are left out; images without boxes are background.

        Args:
            images: normalised batch, or [3, h, w] tensors with values in 0..255.
            targets: one entry per image, boxes in pixels of the image.

        Raises:
            ValueError: number of targets, a label outside of 0..num_classes - 1 (list form), or a weight other than 1.
            RuntimeError: the detector is in eval mode, in which torchvision computes no losses.
        """
        batch = self._batch(images)
        return self.losses_from(self.pyramid(batch), batch, targets)

    def pyramid(self, batch: ImageBatch) -> OrderedDict[str, Tensor]:
        """Feature maps [B, C, h, w] by name, float32, finest first: the backbone's share of :meth:`losses`."""
        return self._feature_maps(batch)

    def losses_from(self, maps: OrderedDict[str, Tensor], batch: ImageBatch, targets: PaddedTargets | list[Target]) -> dict[str, Tensor]:
        """What :meth:`losses` computes, for who has run :meth:`pyramid` already.

        Args:
            maps: the pyramid of the batch.
            batch: normalised images.
            targets: one entry per image, boxes in pixels of the image.

        Raises:
            ValueError: as :meth:`losses`.
            RuntimeError: as :meth:`losses`.
        """
        if not self.training:
            raise RuntimeError("losses() of Faster R-CNN needs training mode: call train() first")
        clean = to_clean_list(targets, len(batch), self.num_classes, batch.tensor.device)
        _refuse_weights(clean)
        inside = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in clean]
        self._fix_scales(maps, batch)
        proposals, first = self.model.rpn(ImageList(batch.tensor, batch.sizes), maps, inside)
        _, second = self.model.roi_heads(maps, proposals, batch.sizes, inside)
        return {**first, **second}

    def _predict(self, batch: ImageBatch, score_thr: float, topk: int) -> list[Target]:
        maps = self._feature_maps(batch)
        self._fix_scales(maps, batch)
        proposals, counts = self._proposals(maps, batch)  # [B, P, 4], [B]
        boxes, scores = self._classify(maps, proposals, batch)  # [B, P * C, 4], [B, P * C]
        labels = torch.arange(self.num_classes, device=boxes.device).repeat(*proposals.shape[:2])
        kept = best_boxes(
            boxes,
            scores,
            labels,
            counts=counts * self.num_classes,
            nms_thr=self.nms_thr,
            max_keep=topk,
            score_thr=score_thr,
            min_side=MIN_DETECTION,
        )
        return as_targets(kept, boxes, labels, scores)

    def _classify(self, maps: OrderedDict[str, Tensor], proposals: Tensor, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """Boxes [B, P * C, 4] and scores [B, P * C] of every proposal as every class, classes side by side, without background."""
        heads, per_image, shape = self.model.roi_heads, list(proposals), (*proposals.shape[:2], self.num_classes + 1)
        logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, per_image, batch.sizes)))
        boxes: Tensor = heads.box_coder.decode(deltas, per_image).view(*shape, 4)[:, :, 1:]
        scores: Tensor = logits.softmax(-1).view(shape)[..., 1:]
        return clip_boxes(boxes.flatten(1, 2), batch.sizes), scores.flatten(1)

    def _proposals(self, maps: OrderedDict[str, Tensor], batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """What the first stage proposes: boxes [B, P, 4], zeros behind the first `counts` [B]. Levels take the place of classes."""
        rpn, features = self.model.rpn, list(maps.values())
        objectness, deltas = rpn.head(features)
        anchors = rpn.anchor_generator(ImageList(batch.tensor, batch.sizes), features)
        per_level = [int(o[0].numel()) for o in objectness]
        flat, deltas = concat_box_prediction_layers(objectness, deltas)
        boxes = rpn.box_coder.decode(deltas, anchors).view(len(batch), -1, 4)
        flat = flat.view(len(batch), -1)
        index = rpn._get_top_n_idx(flat, per_level)  # [B, K]
        levels = torch.cat([index.new_full((n,), i) for i, n in enumerate(per_level)])[index]
        boxes = clip_boxes(boxes.gather(1, index[..., None].expand(-1, -1, 4)), batch.sizes)
        scores = flat.gather(1, index).sigmoid()
        scores = scores.where(scores >= rpn.score_thresh, -1)  # the first stage keeps a score that equals its threshold
        most, side = int(rpn.post_nms_top_n()), float(rpn.min_size)
        kept = best_boxes(boxes, scores, levels, nms_thr=float(rpn.nms_thresh), max_keep=most, min_side=side)
        return kept.gather(boxes), kept.count

    @torch.no_grad()
    def _fix_scales(self, maps: OrderedDict[str, Tensor], batch: ImageBatch) -> None:
        """Lets the pooling derive its scales, once, from the padded size, which the strides divide; true sizes would be rounded wrongly."""
        pool = self.model.roi_heads.box_roi_pool
        if isinstance(pool, MultiScaleRoIAlign) and pool.scales is None:
            height, width = batch.tensor.shape[-2:]
            pool(maps, [batch.tensor.new_zeros(1, 4)] * len(batch), [(int(height), int(width))] * len(batch))

    def _feature_maps(self, batch: ImageBatch) -> OrderedDict[str, Tensor]:
        # Anchors too get the dtype of what they are computed from.
        maps = super()._feature_maps(batch)
        return OrderedDict((name, value.float()) for name, value in maps.items())


def _widen_outputs(module: nn.Module, args: Any, outputs: Any) -> Any:
    """Forward hook: tensors in (nested lists and tuples of) outputs become float32."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    return type(outputs)(_widen_outputs(module, args, value) for value in outputs)


def _refuse_weights(targets: list[Target]) -> None:
    for i, target in enumerate(targets):
        if bool((target["weights"] != 1).any()):
            raise ValueError(f"targets[{i}]['weights'] must be 1: Faster R-CNN does not support box weights, use FCOS or RetinaNet")
