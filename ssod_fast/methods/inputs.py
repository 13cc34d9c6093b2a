"""Turns uint8 views into the normalised, padded batch of a detector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssod_fast.detectors.protocol import Detector, ImageBatch, preprocess
from ssod_fast.structures import PaddedTargets, Target


def input_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which images are best handed to a network: autocast's inside its region, else float32.

    The first convolution would round float32 input to the same values, after one more pass over the image.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


def detector_batch(detector: Detector, images: Sequence[Tensor]) -> ImageBatch:
    """Normalises and pads `images` (each [3, h, w]) with the detector's own statistics and stride."""
    return preprocess(list(images), detector.pixel_stats, detector.stride, input_dtype(images[0].device))


def labeled_targets(detector: nn.Module, targets: Sequence[Target]) -> PaddedTargets | list[Target]:
    """Ground truth in the form the detector takes; no host sync, because its lengths are known."""
    return PaddedTargets.from_list(targets) if getattr(detector, "supports_padded", False) else list(targets)
