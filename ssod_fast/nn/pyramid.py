"""Features under boxes from a feature pyramid, without a wait for a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ssod_fast.criterion.losses import _wide

from .roi_align import align

_UNIT = 56.0  # pixels: boxes whose sides have twice this geometric mean belong to the second level, four times to the third


def box_levels(boxes: Tensor, levels: int = 4) -> Tensor:
    """Which level of the pyramid a box is pooled from: floor(log2(sqrt(w·h) / 56 + 1e-6)), within the pyramid.

    With levels of stride 8, 16, 32 and 64 that is one coarser than in torchvision's `MultiScaleRoIAlign`.

    Args:
        boxes: [R, 4] xyxy in pixels.
        levels: number of levels.

    Returns:
        int64 [R].
    """
    width, height = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).unbind(-1)
    level = torch.log2((width * height).sqrt() / _UNIT + 1e-6).floor()
    return level.clamp(0, levels - 1).to(torch.int64)


def pool_boxes(maps: Sequence[Tensor], boxes: Tensor, image: Tensor, *, strides: Sequence[int], size: int = 7) -> Tensor:
    """Features under boxes, each from the level that fits its size (:func:`box_levels`). Gradients flow to the maps alone.

    Half-pixel aligned, with as many samples per bin as pixels of the level lie in it.

    Args:
        maps: [B, D, h, w] each, finest first; half precision is pooled in float32.
        boxes: [R, 4] xyxy in pixels.
        image: int64 [R], the image of each box.
        strides: pixels per cell of each map.
        size: height and width of the result.

    Returns:
        [R, D, size, size].

    Raises:
        ValueError: not one stride per map.
    """
    if len(maps) != len(strides) or not maps:
        raise ValueError(f"maps must be as many as strides, {len(strides)}, got {len(maps)}")
    level = box_levels(boxes, len(maps))
    pool = _pool_chosen if boxes.is_cpu else _pool_all
    return pool([_wide(features) for features in maps], boxes, image, level, strides, size)


def _pool_all(maps: Sequence[Tensor], boxes: Tensor, image: Tensor, level: Tensor, strides: Sequence[int], size: int) -> Tensor:
    """Every level pools every box, so that nobody has to know how many belong to it."""
    total = torch.zeros((), device=boxes.device)
    for i, (features, stride) in enumerate(zip(maps, strides, strict=True)):
        # Boxes of other levels become empty: no sample is taken for them and they give zeros.
        own = torch.where((level == i)[:, None], boxes, 0)
        total = _align(features, own, image, stride, size).add_(total)
    return total


def _pool_chosen(maps: Sequence[Tensor], boxes: Tensor, image: Tensor, level: Tensor, strides: Sequence[int], size: int) -> Tensor:
    """Every level pools its own boxes; what is cheaper where their number can be had without waiting."""
    levels = level.numpy()
    rows = [torch.from_numpy(np.flatnonzero(levels == i)) for i in range(len(maps))]
    parts = [
        _align(features, boxes.index_select(0, own), image.index_select(0, own), stride, size)
        for features, stride, own in zip(maps, strides, rows, strict=True)
    ]
    filled = [i for i, own in enumerate(rows) if own.numel()]
    if len(filled) < 2:  # nothing to sort
        return parts[filled[0] if filled else 0]
    return torch.cat(parts).index_select(0, torch.cat(rows).argsort())


def _align(features: Tensor, boxes: Tensor, image: Tensor, stride: int, size: int) -> Tensor:
    rois = torch.cat([image[:, None].to(features.dtype), boxes.to(features.dtype)], 1)
    return align(features, rois, size, 1 / stride)
