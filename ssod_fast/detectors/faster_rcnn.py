"""Adapter of torchvision's Faster R-CNN: two stages, torchvision's own losses."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from ssod_fast.structures import PaddedTargets, Target

from .adapter import TorchvisionDetector, attributes, clean_detections
from .protocol import ImageBatch
from .targets import to_clean_list


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
        if not self.training:
            raise RuntimeError("losses() of Faster R-CNN needs training mode: call train() first")
        batch = self._batch(images)
        clean = to_clean_list(targets, len(batch), self.num_classes, batch.tensor.device)
        _refuse_weights(clean)
        inside = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in clean]
        maps = self._feature_maps(batch)
        self._fix_scales(maps, batch)
        proposals, first = self.model.rpn(ImageList(batch.tensor, batch.sizes), maps, inside)
        _, second = self.model.roi_heads(maps, proposals, batch.sizes, inside)
        return {**first, **second}

    def _predict(self, batch: ImageBatch, score_thr: float, topk: int) -> list[Target]:
        maps = self._feature_maps(batch)
        self._fix_scales(maps, batch)
        proposals, _ = self.model.rpn(ImageList(batch.tensor, batch.sizes), maps, None)
        heads = self.model.roi_heads
        with attributes(heads, score_thresh=score_thr, detections_per_img=topk, nms_thresh=self.nms_thr):
            found, _ = heads(maps, proposals, batch.sizes, None)
        return [clean_detections(f["boxes"], f["labels"] - 1, f["scores"]) for f in found]

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
