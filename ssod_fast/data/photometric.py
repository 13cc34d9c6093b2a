"""Colour operations on uint8 images: torchvision's, by name, with the magnitude ranges of mmdetection's RandAugment."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

Rng = np.random.Generator


def _enhance(rng: Rng) -> float:
    """Factor of an enhancement: 1 leaves the picture alone."""
    return float(rng.uniform(0.1, 1.9))


def identity(image: Tensor, rng: Rng) -> Tensor:
    """mmdetection's ColorTransform: the base class of the others, which leaves the picture as it is."""
    return image


def autocontrast(image: Tensor, rng: Rng) -> Tensor:
    """Stretches every channel to the full range."""
    from torchvision.transforms.v2 import functional as tvf

    stretched: Tensor = tvf.autocontrast(image)
    return stretched


def equalize(image: Tensor, rng: Rng) -> Tensor:
    """Equalises the histogram of every channel."""
    from torchvision.transforms.v2 import functional as tvf

    equalized: Tensor = tvf.equalize(image)
    return equalized


def sharpness(image: Tensor, rng: Rng) -> Tensor:
    """Blurs (below 1) or sharpens."""
    return adjust_sharpness(image, _enhance(rng))


def adjust_sharpness(image: Tensor, factor: float) -> Tensor:
    """Blends uint8 [3, h, w] with its 3x3 blur (centre 5, others 1, of 13), the border pixels excepted.

    torchvision's result; its depthwise convolution takes several times as long on a CPU as these sums.
    """
    if min(image.shape[1:]) <= 2:
        return image
    x = image.float()
    rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = x[:, 1:-1, 1:-1]
    blurred = (total + 4 * inner).div_(13).round_()
    inner.lerp_(blurred, 1 - factor)
    return x.clamp_(0, 255).to(image.dtype)


def posterize(image: Tensor, rng: Rng) -> Tensor:
    """Keeps 1 to 4 bits per channel."""
    from torchvision.transforms.v2 import functional as tvf

    posterized: Tensor = tvf.posterize(image, max(1, math.ceil(rng.uniform(0, 4))))
    return posterized


def solarize(image: Tensor, rng: Rng) -> Tensor:
    """Inverts what is brighter than a threshold."""
    from torchvision.transforms.v2 import functional as tvf

    solarized: Tensor = tvf.solarize(image, min(255.0, float(rng.uniform(0, 256))))
    return solarized


def color(image: Tensor, rng: Rng) -> Tensor:
    """Changes the saturation."""
    from torchvision.transforms.v2 import functional as tvf

    changed: Tensor = tvf.adjust_saturation(image, _enhance(rng))
    return changed


def contrast(image: Tensor, rng: Rng) -> Tensor:
    """Changes the contrast."""
    from torchvision.transforms.v2 import functional as tvf

    changed: Tensor = tvf.adjust_contrast(image, _enhance(rng))
    return changed


def brightness(image: Tensor, rng: Rng) -> Tensor:
    """Changes the brightness."""
    from torchvision.transforms.v2 import functional as tvf

    changed: Tensor = tvf.adjust_brightness(image, _enhance(rng))
    return changed


COLOUR_OPS: dict[str, Callable[[Tensor, Rng], Tensor]] = {
    op.__name__: op for op in (identity, autocontrast, equalize, sharpness, posterize, solarize, color, contrast, brightness)
}
