"""Repeat-factor resampling of labelled images, for long-tailed classes (LVIS, Gupta et al. 2019, section 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..structures import Target


@dataclass(frozen=True)
class RepeatFactors:
    """How often images are seen.

    Attributes:
        per_class: float64 [C], r(c) = max(1, sqrt(t / f(c))); 1 for a class that occurs nowhere.
        per_image: float64 [n], the largest factor of the classes in the image; 1 without boxes.
        times: int64 [n], ceil of it: occurrences per epoch.
    """

    per_class: NDArray[np.float64]
    per_image: NDArray[np.float64]
    times: NDArray[np.int64]

    def __str__(self) -> str:
        classes, images = int((self.per_class > 1).sum()), int((self.times > 1).sum())
        return f"resampling repeats {images} of {len(self.times)} images for {classes} of {len(self.per_class)} classes"


def repeat_factors(labels: Sequence[Sequence[int]], num_classes: int, t: float) -> RepeatFactors:
    """Repeat factors of images.

    Args:
        labels: The labels in each image, with repetitions or without.
        num_classes: Number of classes.
        t: Classes that occur in a smaller share of the images than this are repeated.

    Raises:
        ValueError: If t is not in (0, 1] or there is no image.
    """
    if not 0 < t <= 1:
        raise ValueError(f"t must lie in (0, 1], got {t}")
    if not labels:
        raise ValueError("labels must hold at least one image")
    present = [set(row) for row in labels]
    frequency = [sum(c in row for row in present) / len(present) for c in range(num_classes)]
    per_class = [max(1.0, math.sqrt(t / f)) if f else 1.0 for f in frequency]
    per_image = [max((per_class[c] for c in row), default=1.0) for row in present]
    times = [math.ceil(r) for r in per_image]
    return RepeatFactors(np.array(per_class), np.array(per_image), np.array(times, np.int64))


@dataclass(frozen=True)
class LabeledResampler:
    """Turns a labelled set into the list of image rows of one epoch."""

    t: float | None = None  # off: the value behind MixPL's published numbers is not known, and 1e-3 (LVIS) touches hardly any COCO class

    def rows(self, targets: Sequence[Target], num_classes: int) -> tuple[NDArray[np.int64], RepeatFactors | None]:
        """int64 [m] rows of `targets`, each as often as it appears in an epoch, and the factors (None where resampling is off)."""
        rows = np.arange(len(targets))
        if self.t is None:
            return rows, None
        factors = repeat_factors([target["labels"].tolist() for target in targets], num_classes, self.t)
        return np.repeat(rows, factors.times), factors
