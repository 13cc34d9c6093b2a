"""Detectors of transformers as methods see them: boxes in pixels, padded batches, weights of boxes, losses by name."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssod_fast.structures import PaddedTargets, Target, upload

from ..adapter import check_prediction, eval_mode
from ..deformable_detr.criterion import normalised_targets
from ..deformable_detr.predictions import best_pairs
from ..protocol import ImageBatch, PixelStats, as_image_batch
from ..targets import to_padded
from .families import Family, needs_square, spare_parameters, stride_of

WEIGHTS_KEY = "weights"


class TransformersDetector(nn.Module):
    """A detector of transformers that methods can train; made by :func:`~ssod_fast.detectors.from_transformers`.

    `losses` takes padded targets too, but waits for the device to unpad them, except for RF-DETR: RT-DETR and its successors make denoising
    queries image by image, and Deformable DETR of transformers waits after each layer of its encoder anyway.

    Attributes:
        model: the model; `model.state_dict()` has transformers' own keys, `model.save_pretrained(folder)` writes a checkpoint of it.
        num_classes: without background.
        pixel_stats: what images are normalised with.
        stride: multiple that batches are padded to.
        supports_weights: always.
        supports_padded: whether `losses` runs on `PaddedTargets` without a host sync: RF-DETR alone.
        build_options: what :func:`~ssod_fast.detectors.build_detector` rebuilds this detector from.
    """

    supports_weights = True

    def __init__(self, model: Any, family: Family, pixel_stats: PixelStats) -> None:
        super().__init__()
        self.training = model.training
        self.model = model
        self.family = family
        self.num_classes: int = self.model.config.num_labels
        self.pixel_stats = pixel_stats
        self.stride = stride_of(model)
        self.supports_padded = family.padded
        self.build_options: dict[str, Any] = {}

    def forward(self, images: ImageBatch | list[Tensor], targets: PaddedTargets | list[Target]) -> dict[str, Tensor]:
        """The losses, so that DistributedDataParallel can wrap the detector."""
        return self.losses(images, targets)

    def losses(self, images: ImageBatch | list[Tensor], targets: PaddedTargets | list[Target]) -> dict[str, Tensor]:
        """The terms of the model's own loss, each summed over the layers, with the factors of the config: their sum is the loss.

        Boxes that are not finite or have no area are left out; images without boxes are background.

        Args:
            images: normalised batch, or [3, h, w] tensors with values in 0..255.
            targets: one entry per image, boxes in pixels of the image; `weights` in [0, 1] are shares of their losses.

        Returns:
            Scalars with the names that transformers gives the terms (`loss_ce` or `loss_vfl`, `loss_bbox`, `loss_giou`, ...); with prefix
            `enc_` those of the encoder's proposals, where the model tells them apart from those of layers; with prefix `dn_` those of
            denoising queries, which are there in training mode, unless no image of the batch has a box.

        Raises:
            ValueError: number of targets, a label outside of 0..num_classes - 1 (list form), or images too small for the model's queries.
        """
        batch = self.batch(images)
        padded = to_padded(targets, len(batch), self.num_classes, batch.tensor.device)
        wanted = normalised_targets(padded, self._frame_hw(batch), self.num_classes)
        return self._terms(self._run(batch, wanted if self.family.padded else _labels(wanted)).loss_dict)

    def predict(self, images: ImageBatch | list[Tensor], score_thr: float = 0.0, topk: int = 300) -> list[Target]:
        """The best pairs of query and class, best first; without non-maximum suppression, and without boxes that lie in the padding.

        Args:
            images: normalised batch, or [3, h, w] tensors with values in 0..255.
            score_thr: only detections with a strictly larger score.
            topk: at most so many per image.

        Returns:
            Per image: boxes float32 [n, 4] xyxy, in pixels of the given image and inside of it; labels int64 [n], 0-based; scores [n].

        Raises:
            ValueError: `topk` < 1, `score_thr` outside of 0..1, bad images, or images too small for the model's queries.
        """
        check_prediction(score_thr, topk)
        batch = self.batch(images)
        with eval_mode(self), torch.no_grad():
            found = self._run(batch)
        image_hw = _image_hw(batch)
        boxes = in_image(found.pred_boxes.float(), self._frame_hw(batch) / image_hw)
        return best_pairs(found.logits, boxes, image_hw, score_thr=score_thr, topk=topk)

    def features(self, images: ImageBatch | list[Tensor]) -> list[Tensor]:
        """Feature maps [B, C, h, w] of the backbone, finest first."""
        batch = self.batch(images)
        found = self.model.model.backbone(self._pixels(batch), self._mask(batch))
        maps = [found[0]] if isinstance(found[0], Tensor) else [feature for feature, *_ in found]
        height, width = batch.tensor.shape[-2:]
        canvas = self._canvas(batch)
        return [m[..., : m.shape[-2] * height // canvas[0], : m.shape[-1] * width // canvas[1]] for m in maps]

    def batch(self, images: ImageBatch | list[Tensor]) -> ImageBatch:
        """`images` itself if it is a batch already, else the preprocessed list."""
        return as_image_batch(images, self.pixel_stats, self.stride)

    def _run(self, batch: ImageBatch, labels: PaddedTargets | list[dict[str, Tensor]] | None = None) -> Any:
        mask = self._mask(batch) if self.family.frame == "image" else None
        with _enough_places(self.model, self._canvas(batch)):
            return self.model(pixel_values=self._pixels(batch), pixel_mask=mask, labels=labels, return_dict=True)

    def _canvas(self, batch: ImageBatch) -> tuple[int, int]:
        """Height and width of what the model sees."""
        height, width = batch.tensor.shape[-2:]
        if needs_square(self.model):
            height = width = math.ceil(max(height, width) / self.stride) * self.stride
        return height, width

    def _pixels(self, batch: ImageBatch) -> Tensor:
        """[B, 3, H, W], H and W as :meth:`_canvas` says."""
        (height, width), (old_height, old_width) = self._canvas(batch), batch.tensor.shape[-2:]
        if (height, width) == (old_height, old_width):
            return batch.tensor
        return F.pad(batch.tensor, (0, width - old_width, 0, height - old_height))

    def _mask(self, batch: ImageBatch) -> Tensor:
        """int64 [B, H, W], 1 in pixels of the images."""
        height, width = self._canvas(batch)
        size = _image_hw(batch)
        rows = torch.arange(height, device=size.device) < size[:, :1]
        columns = torch.arange(width, device=size.device) < size[:, 1:]
        return (rows[:, :, None] & columns[:, None]).long()

    def _frame_hw(self, batch: ImageBatch) -> Tensor:
        """float32 [B, 2]: height and width that boxes are shares of."""
        if self.family.frame == "image":
            return _image_hw(batch)
        return _as_rows([self._canvas(batch)] * len(batch), batch.tensor.device)

    def _terms(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """One scalar per term and kind of query, layers summed. What is no loss, as the cardinality error, stays out."""
        factors = self.family.coefficients(self.model.config)
        terms: dict[str, Tensor] = {}
        for name, value in losses.items():
            term = next((term for term in factors if name == term or name.startswith(f"{term}_")), None)
            if term is not None:
                key = _kind(name) + term
                terms[key] = terms.get(key, 0) + value * factors[term]
        first = next(iter(terms))
        return {**terms, first: self._with_all_parameters(terms[first])}

    def _with_all_parameters(self, loss: Tensor) -> Tensor:
        """The loss, with gradients of 0 for parameters that it does not depend on."""
        for name in spare_parameters(self.model, self.family):
            loss = loss + 0 * self.model.get_parameter(name).sum()
        return loss


def in_image(boxes: Tensor, ratio: Tensor) -> Tensor:
    """Boxes as shares of the image, NaN where they lie outside of it, so that nothing counts them.

    Args:
        boxes: [B, Q, 4] cxcywh, shares of the frame.
        ratio: [B, 2], height and width of the frame in those of the image.
    """
    boxes = boxes * ratio.flip(-1).repeat(1, 2)[:, None]
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    inside = ((centre + half > 0) & (centre - half < 1)).all(-1, keepdim=True)
    return torch.where(inside, boxes, torch.nan)


def _labels(targets: PaddedTargets) -> list[dict[str, Tensor]]:
    """As transformers wants them. Waits for the device."""
    return [{"class_labels": t["labels"], "boxes": t["boxes"], WEIGHTS_KEY: t["weights"]} for t in targets.to_list()]


def _kind(name: str) -> str:
    """Prefix for the queries that a loss of transformers is about."""
    if "_dn_" in name:
        return "dn_"
    return "enc_" if name.endswith("_enc") else ""


def _image_hw(batch: ImageBatch) -> Tensor:
    return _as_rows(batch.sizes, batch.tensor.device)


def _as_rows(sizes: list[tuple[int, int]], device: torch.device) -> Tensor:
    return upload(torch.tensor(sizes, dtype=torch.float32), device)


@contextlib.contextmanager
def _enough_places(model: Any, canvas: tuple[int, int]) -> Iterator[None]:
    """Says in words what it means when the model cannot choose as many queries as it wants."""
    try:
        yield
    except RuntimeError as error:
        if "index k out of range" not in str(error):
            raise
        raise ValueError(
            f"images must be larger: {canvas[0]} x {canvas[1]} pixels have fewer places than {type(model).__name__} chooses queries from "
            "them; or build it with fewer (num_queries, two_stage_num_proposals)"
        ) from error
