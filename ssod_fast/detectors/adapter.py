"""What all adapters of torchvision detectors share."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ssod_fast.structures import PaddedTargets, Target

from .protocol import ImageBatch, PixelStats, as_image_batch


class NoTransform(nn.Module):
    """Takes the place of a model's resize-and-normalise step, which would treat views a second time."""

    def forward(self, *args: Any) -> NoReturn:
        """Always fails: the wrapped model is never called as a whole."""
        raise RuntimeError("this model is wrapped by an adapter that feeds it normalised batches: call the adapter's losses() or predict()")


class TorchvisionDetector(nn.Module):
    """Base of the adapters. Takes the model over: its `transform` is replaced, and everything else stays where it was.

    Attributes:
        model: the torchvision model; `model.state_dict()` has torchvision's own keys.
        num_classes: classes without background.
        pixel_stats: taken from the model's transform.
        stride: multiple that batches are padded to.
        supports_weights: whether `losses` uses the weights of boxes.
        supports_padded: whether `losses` runs on `PaddedTargets` without a host sync.
    """

    supports_weights = False
    supports_padded = False

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.model: Any = model
        self.num_classes = num_classes
        self.pixel_stats = _pixel_stats(model)
        self.stride = int(getattr(model.transform, "size_divisible", 32))
        model.transform = NoTransform()

    def forward(self, images: ImageBatch | list[Tensor], targets: PaddedTargets | list[Target]) -> dict[str, Tensor]:
        """The losses, so that DistributedDataParallel can wrap the detector."""
        return self.losses(images, targets)

    def losses(self, images: ImageBatch | list[Tensor], targets: PaddedTargets | list[Target]) -> dict[str, Tensor]:
        """Scalar losses to be summed; see the subclass."""
        raise NotImplementedError

    def predict(self, images: ImageBatch | list[Tensor], score_thr: float = 0.0, topk: int = 300) -> list[Target]:
        """Detections after non-maximum suppression, best first.

        Args:
            images: normalised batch, or [3, h, w] tensors with values in 0..255.
            score_thr: only detections with a strictly larger score.
            topk: at most so many per image.

        Returns:
            Per image: boxes float32 [n, 4] xyxy, in pixels of the given image and inside of it; labels int64 [n], 0-based; scores [n].

        Raises:
            ValueError: `topk` < 1, `score_thr` outside of 0..1, or bad images.
        """
        check_prediction(score_thr, topk)
        with eval_mode(self), torch.no_grad():
            return self._predict(self._batch(images), score_thr, topk)

    def features(self, images: ImageBatch | list[Tensor]) -> list[Tensor]:
        """Feature maps [B, C, h, w] of the backbone, finest first."""
        return list(self._feature_maps(self._batch(images)).values())

    def _predict(self, batch: ImageBatch, score_thr: float, topk: int) -> list[Target]:
        raise NotImplementedError

    def _batch(self, images: ImageBatch | Sequence[Tensor]) -> ImageBatch:
        return as_image_batch(images, self.pixel_stats, self.stride)

    def _feature_maps(self, batch: ImageBatch) -> OrderedDict[str, Tensor]:
        maps = self.model.backbone(batch.tensor)
        return OrderedDict([("0", maps)]) if isinstance(maps, Tensor) else maps


def check_prediction(score_thr: float, topk: int) -> None:
    """Checks what `predict` of a detector was asked for.

    Raises:
        ValueError: `topk` < 1, or `score_thr` outside of 0..1.
    """
    if topk < 1:
        raise ValueError(f"topk must be at least 1, got {topk}")
    if not 0 <= score_thr <= 1:
        raise ValueError(f"score_thr must lie in 0..1, got {score_thr}")


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each submodule is back in the mode it had, also where these differed (frozen batch norm)."""
    before = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in before:
            m.training = training


def _pixel_stats(model: nn.Module) -> PixelStats:
    transform: Any = model.transform
    if not hasattr(transform, "image_mean"):
        raise ValueError(f"model.transform must hold image_mean and image_std, got {type(transform).__name__}: is it wrapped already?")
    mean, std = ([255.0 * float(v) for v in values] for values in (transform.image_mean, transform.image_std))
    return PixelStats((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
