"""What a method may ask of a detector: two methods, a few optional capabilities, and one image batch.

Any `torch.nn.Module` with the attributes of :class:`Detector` takes part in training; nothing has to be inherited. Optional capabilities
are found by attribute, and :func:`require` turns a missing one into an error when a method is built instead of thousands of steps later.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ssod_fast.ops.compose import compose_images
from ssod_fast.ops.compose_plan import ComposePlan, Placement

if TYPE_CHECKING:
    from ssod_fast.structures import PaddedTargets, Target

FLAGS: tuple[str, ...] = ("supports_weights", "supports_padded")
"""Capabilities that are a boolean attribute."""

METHODS: tuple[str, ...] = ("features", "raw_outputs", "decode")
"""Capabilities that are a method."""

_HOW_TO_ADD = {
    "supports_weights": "multiply each box's share of every loss by target['weights'] in losses() and set supports_weights = True",
    "supports_padded": "let losses() accept PaddedTargets without a host synchronisation and set supports_padded = True",
    "features": "add features(images) -> list of [B, C, h, w] feature maps",
    "raw_outputs": "add raw_outputs(images) -> the head outputs before scores are thresholded",
    "decode": "add decode(raw, score_thr, topk) -> list of predictions",
}


class NotADetectorError(TypeError):
    """An object that does not follow :class:`Detector`."""


@dataclass(frozen=True)
class PixelStats:
    """Mean and standard deviation per channel (RGB) that the detector was trained with, in units of 0..255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"PixelStats: mean and std must have 3 entries, got {len(self.mean)} and {len(self.std)}")
        if min(self.std) <= 0:
            raise ValueError(f"PixelStats: std must be positive, got {self.std}")


IMAGENET = PixelStats(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
"""Statistics of torchvision's ImageNet weights, scaled from 0..1 to 0..255."""


@dataclass(frozen=True)
class ImageBatch:
    """A normalised batch, padded at the right and the bottom with zeros (= the mean colour).

    Attributes:
        tensor: [B, 3, H, W] floating point, normalised.
        sizes: true (h, w) of each image in pixels, Python integers on the host; h <= H and w <= W.
    """

    tensor: Tensor
    sizes: list[tuple[int, int]]

    def __post_init__(self) -> None:
        if self.tensor.dim() != 4 or self.tensor.shape[1] != 3 or not self.tensor.is_floating_point():
            raise ValueError(f"ImageBatch: tensor must be floating point [B, 3, H, W], got {self.tensor.dtype} {list(self.tensor.shape)}")
        if len(self.sizes) != self.tensor.shape[0]:
            raise ValueError(f"ImageBatch: expected {self.tensor.shape[0]} sizes, got {len(self.sizes)}")
        height, width = self.tensor.shape[-2:]
        for i, (h, w) in enumerate(self.sizes):
            if not (0 < h <= height and 0 < w <= width):
                raise ValueError(f"ImageBatch: size {(h, w)} of image {i} does not lie in the padded batch {(height, width)}")

    def __len__(self) -> int:
        return len(self.sizes)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> ImageBatch:
        """The same batch on another device."""
        return ImageBatch(self.tensor.to(device, non_blocking=non_blocking), self.sizes)


@runtime_checkable
class Detector(Protocol):
    """Structural type of a trainable detector; every implementation is also a `torch.nn.Module`.

    Boxes are xyxy in pixels of the given images, labels 0-based and contiguous, whatever the wrapped model uses inside.
    """

    num_classes: int
    pixel_stats: PixelStats
    stride: int

    def losses(self, images: ImageBatch | list[Tensor], targets: PaddedTargets | list[Target]) -> dict[str, Tensor]:
        """Training forward: scalar losses that are to be summed, with gradient, finite for images without boxes."""
        ...

    def predict(self, images: ImageBatch | list[Tensor], score_thr: float = 0.0, topk: int = 300) -> list[Target]:
        """Boxes, labels and scores in the frame of the given images; eval mode inside, the previous mode restored, no gradient."""
        ...

    def forward(self, images: ImageBatch | list[Tensor], targets: PaddedTargets | list[Target]) -> dict[str, Tensor]:
        """The same as `losses`, so that DistributedDataParallel can wrap the detector."""
        ...


class LossProgram(Protocol):
    """Losses that a method computes from parts of a detector rather than from its `losses`.

    A detector that supports it takes one in the place of targets: `forward(images, program)` returns `program(self, images)`. Methods that
    run a student stage by stage then still go through `forward`, which DistributedDataParallel needs for its gradients.
    """

    def __call__(self, detector: Any, images: ImageBatch) -> dict[str, Tensor]:
        """Scalar losses that are to be summed, with gradient.

        Args:
            detector: whose `forward` was called.
            images: normalised batch.
        """
        ...


def capabilities(detector: nn.Module) -> frozenset[str]:
    """Names of the optional capabilities that `detector` has."""
    flags = {name for name in FLAGS if bool(getattr(detector, name, False))}
    return frozenset(flags | {name for name in METHODS if callable(getattr(detector, name, None))})


def require(detector: nn.Module, *names: str, for_method: str) -> None:
    """Checks at construction that `detector` follows the protocol and has the optional capabilities `names`.

    Raises:
        NotADetectorError: `detector` is no `nn.Module` or lacks a part of :class:`Detector`; the message lists the missing parts.
        ValueError: a capability is unknown, or missing; the message says what to add to the adapter.
    """
    parts = ("losses", "predict", "forward", "num_classes", "pixel_stats", "stride")
    missing = [part for part in parts if not _has(detector, part)]
    if missing or not isinstance(detector, nn.Module):
        raise NotADetectorError(
            f"{for_method} needs a detector (an nn.Module with {', '.join(parts)}), got {type(detector).__name__}"
            + (f" without {', '.join(missing)}" if missing else "")
            + "; wrap models with ssod_fast.detectors.from_torchvision or from_transformers"
        )
    available = capabilities(detector)
    for name in names:
        if name not in _HOW_TO_ADD:
            raise ValueError(f"unknown capability {name!r}, expected one of {', '.join(FLAGS + METHODS)}{near(name, FLAGS + METHODS)}")
        if name not in available:
            raise ValueError(f"{for_method} needs '{name}', which {type(detector).__name__} does not have: {_HOW_TO_ADD[name]}")


def _has(detector: nn.Module, part: str) -> bool:
    """Whether an attribute is there; the `forward` that every nn.Module inherits, and that only raises, is none."""
    value = getattr(detector, part, None)
    return value is not None and getattr(value, "__func__", value) is not nn.Module.forward


def near(name: str, known: Sequence[str]) -> str:
    """The tail of an error message that offers the names closest to a misspelt one; empty if none is close."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def preprocess(images: Sequence[Tensor], stats: PixelStats, stride: int = 32, out_dtype: torch.dtype = torch.float32) -> ImageBatch:
    """Normalises images and pads them into one batch.

    Args:
        images: [3, h, w] each, uint8 or floating point with values in 0..255, all of one dtype and on one device.
        stats: what to normalise with.
        stride: the batch height and width are rounded up to a multiple of it.
        out_dtype: dtype of the batch.

    Raises:
        ValueError: no image, a wrong shape or dtype, or mixed dtypes or devices; the message names the image.
    """
    _check_images(images, stride)
    sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
    plan = ComposePlan.from_placements(sizes, [[Placement(i, size)] for i, size in enumerate(sizes)])
    tensor = compose_images(
        images, plan, out_hw=plan.padded_hw(stride), mean=stats.mean, std=stats.std, interp="nearest", out_dtype=out_dtype
    )
    return ImageBatch(tensor, sizes)


def as_image_batch(images: ImageBatch | Sequence[Tensor], stats: PixelStats, stride: int) -> ImageBatch:
    """`images` itself if it is a batch already, else the preprocessed list."""
    return images if isinstance(images, ImageBatch) else preprocess(images, stats, stride)


def _check_images(images: Sequence[Tensor], stride: int) -> None:
    if isinstance(images, Tensor) or len(images) == 0:
        raise ValueError(f"images must be a non-empty list of [3, h, w] tensors, got {_describe(images)}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    first = images[0]
    for i, image in enumerate(images):
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"images[{i}] must be [3, h, w] with h, w > 0, got {list(image.shape)}")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise ValueError(f"images[{i}] must be uint8 or floating point (values 0..255), got {image.dtype}")
        if image.dtype != first.dtype or image.device != first.device:
            raise ValueError(f"images[{i}] is {image.dtype} on {image.device}, but images[0] is {first.dtype} on {first.device}")


def _describe(images: Any) -> str:
    return f"a tensor of shape {list(images.shape)}" if isinstance(images, Tensor) else "an empty list"
