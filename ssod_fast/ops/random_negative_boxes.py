"""Random boxes that overlap no positive: the negatives of SSD-Det and P2BNet, without the matrix of overlaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _boxes, _overlaps
from ._boxes import Rule
from ._image_rows import as_rows, as_sizes, check_offsets, check_threshold
from ._registry import launcher, register

MARGIN = 0.2  # boxes may start this share of the image before its edge, and end as far behind it
_IOU = Rule(_boxes.IOU, _boxes.XYXY, _boxes.MAX, 1e-6)


class NegativeBoxes(NamedTuple):
    """N boxes for each of B images.

    Attributes:
        boxes: [B, N, 4] xyxy, pixels; float64 if the uniform numbers or the positives are, else float32.
        keep: bool [B, N], whether the box overlaps all positives of its image by less than the threshold.
        max_iou: [B, N], the largest overlap with a positive, 0 if there is none; None if not asked for.
    """

    boxes: Tensor
    keep: Tensor
    max_iou: Tensor | None


def random_negative_boxes(
    uniforms: Tensor, image_hw: Tensor, positives: Tensor, offsets: Tensor, *, threshold: float = 0.3, return_max: bool = False
) -> NegativeBoxes:
    """Boxes from uniform numbers, and whether all their overlaps with the positives of their image are strictly below `threshold`.

    With u = (u1, u2, u3, u4), x1 = -0.2 w + 1.2 w u1, y1 = -0.2 h + 1.2 h u2, x2 = x1 + (1.2 w - x1) u3, y2 = y1 + (1.2 h - y1) u4. The
    random numbers stay with the caller, so that a run replays. The overlap is IoU with the union raised to 1e-6. A pair that is NaN is not
    below anything, and the maxima skip it; an image without positives keeps all its boxes. No matrix is stored.

    Source: the negative proposals of P2BNet (arXiv 2207.06827).

    Args:
        uniforms: [B, N, 4] in [0, 1); half is computed in float32. Carries no gradient.
        image_hw: [B, 2] (height, width) of the images; any real dtype.
        positives: [G, 4] xyxy, or bags [G, P, 4] of which each is owned as a whole.
        offsets: int32 or int64 [B + 1]: image b owns the rows (bags) offsets[b] .. offsets[b + 1] of `positives`.
        threshold: in [0, 1), cast to the compute dtype before it is compared.
        return_max: also return the largest overlap of each box (0 if there is none); without it a box is done at its first hit.

    Returns:
        :class:`NegativeBoxes`, float64 if uniforms or positives are float64, else float32.

    Raises:
        ValueError: for wrong shapes, devices and options, input that requires grad, and offsets on the host that are no offsets.
        TypeError: for wrong dtypes.
    """
    uniforms, positives = as_rows("uniforms", uniforms, 4, "B, N"), _as_bags(positives)
    _boxes.refuse_grad("random_negative_boxes", uniforms, positives)
    image_hw = as_sizes(image_hw)
    for name, other in (("positives", positives), ("image_hw", image_hw)):
        if other.device != uniforms.device:
            raise ValueError(f"uniforms and {name} must be on one device, got {uniforms.device} and {other.device}")
    if image_hw.shape[0] != uniforms.shape[0]:
        raise ValueError(f"image_hw must have shape [{uniforms.shape[0]}, 2] as uniforms has that many images, got {list(image_hw.shape)}")
    check_threshold("threshold", threshold)
    offsets = check_offsets("offsets", offsets, uniforms.shape[0], positives.shape[0], uniforms.device)
    dtype = torch.promote_types(uniforms.dtype, positives.dtype)
    boxes, keep, max_iou = _op(uniforms.to(dtype), image_hw.to(dtype).contiguous(), positives.to(dtype), offsets, threshold, return_max)
    return NegativeBoxes(boxes, keep, max_iou if return_max else None)


def _as_bags(positives: Tensor) -> Tensor:
    """Positives [G, 4] as bags of one, [G, 1, 4]."""
    if isinstance(positives, Tensor) and positives.dim() == 2:
        return as_rows("positives", positives, 4, "G").unsqueeze(1)
    return as_rows("positives", positives, 4, "G, P")


def _reference(
    uniforms: Tensor, image_hw: Tensor, positives: Tensor, offsets: Tensor, threshold: float, return_max: bool
) -> tuple[Tensor, Tensor, Tensor]:
    boxes = _spread(uniforms, image_hw)
    shape, per_bag = boxes.shape[:2], positives.shape[1]
    if positives.shape[0] * per_bag == 0:
        return boxes, torch.ones(shape, dtype=torch.bool, device=boxes.device), boxes.new_zeros(shape if return_max else (0,))
    matrix = _overlaps.overlaps(
        _overlaps.corners(boxes, _IOU).unsqueeze(-1), _overlaps.corners(positives.flatten(0, 1), _IOU), _IOU, nan_zero=False
    )  # [B, N, G * P]
    row = torch.arange(positives.shape[0], device=boxes.device).repeat_interleave(per_bag)
    own = ((row >= offsets[:-1, None]) & (row < offsets[1:, None]))[:, None]  # [B, 1, G * P]
    keep = ((matrix < torch.tensor(threshold, dtype=matrix.dtype)) | ~own).all(-1)
    largest = matrix.where(own & (matrix > 0), 0).amax(-1) if return_max else boxes.new_empty(0)
    return boxes, keep, largest


def _spread(uniforms: Tensor, image_hw: Tensor) -> Tensor:
    """Boxes [B, N, 4] from uniform numbers and image sizes [B, 2]."""
    size = image_hw.flip(1)[:, None]  # [B, 1, 2] (w, h)
    low = -MARGIN * size + (1 + MARGIN) * size * uniforms[..., :2]
    return torch.cat((low, low + ((1 + MARGIN) * size - low) * uniforms[..., 2:]), -1)


def _fake(
    uniforms: Tensor, image_hw: Tensor, positives: Tensor, offsets: Tensor, threshold: float, return_max: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = uniforms.shape[:2]
    boxes = uniforms.new_empty((*shape, 4))
    return boxes, boxes.new_empty(shape, dtype=torch.bool), boxes.new_empty(shape if return_max else (0,))


register(
    "random_negative_boxes(Tensor uniforms, Tensor image_hw, Tensor positives, Tensor offsets, float threshold, bool return_max) "
    "-> (Tensor boxes, Tensor keep, Tensor max_iou)",
    reference=_reference,
    fake=_fake,
    triton=launcher("random_negative_boxes", "random_negative_boxes"),
)
_op: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.ssod_fast.random_negative_boxes.default
