"""Anchors of a padded batch: the same for each of its images, in float32, computed once per feature size."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator

# A run with multi-scale views meets a few dozen padded sizes; older ones are computed again.
_MAX_ENTRIES = 32


@dataclass(frozen=True)
class AnchorGrid:
    """Anchors of all levels, finest first.

    Attributes:
        boxes: float32 [A, 4], xyxy, pixels.
        per_level: how many of the A anchors each level holds.
    """

    boxes: Tensor
    per_level: list[int]


class CentredAnchorGenerator(AnchorGenerator):  # type: ignore[misc]
    """Anchors shifted by half a cell, so that they lie in the middle of the pixels that a cell stands for.

    The parent puts the anchor of cell i at i * stride, where a backbone with symmetric padding looks. With TensorFlow's "SAME" padding
    each stride-2 convolution reads to the right and below, so that at stride s cell i looks at i * s + s - 1: a whole cell away.
    """

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        """As the parent's, plus half a stride; [A_l, 4] per level."""
        levels = super().grid_anchors(grid_sizes, strides)
        return [_shift(anchors, sy, sx) for anchors, (sy, sx) in zip(levels, strides, strict=True)]


def _shift(anchors: Tensor, stride_y: Tensor | int, stride_x: Tensor | int) -> Tensor:
    moved = anchors.clone()
    moved[:, 0::2] += stride_x / 2
    moved[:, 1::2] += stride_y / 2
    return moved


class AnchorCache:
    """Anchor grids of one generator by feature sizes and device.

    torchvision's generator computes anchors anew in each step and in the dtype of the features, which rounds coordinates to whole multiples
    of 2, 4 or 8 pixels under bfloat16. Its first call on a device copies the cell anchors there; from then on nothing waits for the device.
    """

    def __init__(self, generator: AnchorGenerator) -> None:
        self.generator = generator
        self._grids: OrderedDict[tuple[object, ...], AnchorGrid] = OrderedDict()

    def __call__(self, features: Sequence[Tensor], image_hw: tuple[int, int]) -> AnchorGrid:
        """Anchors for feature maps [B, C, h, w] of a batch of padded size `image_hw`."""
        sizes = [(int(f.shape[-2]), int(f.shape[-1])) for f in features]
        device = features[0].device
        key = (*sizes, image_hw, device)
        if key in self._grids:
            self._grids.move_to_end(key)
            return self._grids[key]
        grid = self._generate(sizes, image_hw, device)
        self._grids[key] = grid
        if len(self._grids) > _MAX_ENTRIES:
            self._grids.popitem(last=False)
        return grid

    def __deepcopy__(self, memo: dict[int, object]) -> AnchorCache:
        """A cache for the copied model that starts empty."""
        return AnchorCache(cast(AnchorGenerator, copy.deepcopy(self.generator, memo)))

    @torch.no_grad()
    def _generate(self, sizes: list[tuple[int, int]], image_hw: tuple[int, int], device: torch.device) -> AnchorGrid:
        if len(sizes) != len(self.generator.sizes):
            raise ValueError(f"the anchor generator is made for {len(self.generator.sizes)} feature levels, got {len(sizes)}")
        strides = [[image_hw[0] // h, image_hw[1] // w] for h, w in sizes]
        self.generator.set_cell_anchors(torch.float32, device)
        levels = self.generator.grid_anchors([list(size) for size in sizes], strides)
        return AnchorGrid(torch.cat(levels), [level.shape[0] for level in levels])
