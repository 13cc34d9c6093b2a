"""Bags of boxes around noisy boxes, the proposals of SSD-Det and P2BNet, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _boxes, _overlaps
from ._boxes import Rule
from ._image_rows import as_rows, check_factors, check_image_rows, check_threshold, images_of_rows
from ._registry import launcher, register
from .box_deltas import MIN_SIZE, check_std

MIN_AREA = 1e-6  # px^2: the floor of areas that divide
_IOU = Rule(_boxes.IOU, _boxes.XYXY, _boxes.MAX, MIN_AREA)


class NeighborhoodBoxes(NamedTuple):
    """Bags of P boxes around G boxes, all float64 for float64 boxes, else float32; what was not asked for is None.

    Attributes:
        boxes: [G, P, 4] xyxy, pixels, not clipped.
        valid: bool [G, P], whether more than `iof_threshold` of the box lies in the image.
        rois: [G * P, 5], rows for RoIAlign: index of the image, box.
        iof: [G, P], share of the box that lies in the image; NaN for images of NaN size, whose boxes are not valid.
        iou: [G, P], overlap with the source box.
        targets: [G, P, 4], deltas from the box to its source box.
        clipped: [G, P, 4], the boxes cut off at the edges of their image.
    """

    boxes: Tensor
    valid: Tensor
    rois: Tensor | None
    iof: Tensor | None
    iou: Tensor | None
    targets: Tensor | None
    clipped: Tensor | None


def neighborhood_boxes(
    boxes: Tensor,
    image_index: Tensor | None,
    image_hw: Tensor,
    *,
    ratios: Sequence[float],
    shakes: Sequence[float],
    offsets: Tensor | None = None,
    iof_threshold: float = 0.7,
    rois: bool = False,
    iof: bool = False,
    iou: bool = False,
    targets_std: Sequence[float] | None = None,
    clip: bool = False,
) -> NeighborhoodBoxes:
    """P = R · R · (1 + 4 K) boxes around each box: every pair of width and height ratios, unshifted and shifted four ways per shake.

    Box p = (iw · R + ih) · S + s, with S = 1 + 4 K, has the size (w · ratios[iw], h · ratios[ih]); s = 0 keeps the centre, s = 1 + 4 k + d
    moves it by shakes[k] of the **scaled** size to the left, right, up or down (d = 0..3). Nothing is rounded or clipped. A box is valid if
    more than `iof_threshold` of its area lies in the image. Boxes without area are invalid, as are all of a source box that is not finite
    (its bag is NaN), is inverted, or belongs to no image.

    Source: the proposal generator of SSD-Det (arXiv 2307.12101) and of the refinement stage of P2BNet (arXiv 2207.06827).

    Args:
        boxes: [G, 4] xyxy, pixels of the network input; half and integer boxes are computed in float32. Carries no gradient.
        image_index: int32 or int64 [G], the image of each box; None with `offsets`.
        image_hw: [B, 2] (height, width) of the images, resized but not padded; any real dtype.
        ratios: [R] > 0; at most 64.
        shakes: [K], may be empty; at most 64.
        offsets: int32 or int64 [B + 1] instead of `image_index`: image b owns the boxes offsets[b] .. offsets[b + 1].
        iof_threshold: in [0, 1), strict.
        rois: also return rows for RoIAlign. A box of no image gets the nearest image index, so that a reader stays in bounds.
        iof: also return the share of each box that lies in the image: intersection / max(area, 1e-6).
        iou: also return the overlap with the source box, union raised to 1e-6.
        targets_std: also return what :func:`~ssod_fast.ops.encode_boxes` gives for (bag, source box) with these four divisors.
        clip: also return the boxes clipped to their image.

    Returns:
        :class:`NeighborhoodBoxes`, float64 for float64 boxes, else float32.

    Raises:
        ValueError: for wrong shapes, devices and options, boxes that require grad, and on the host indices or offsets out of range.
        TypeError: for wrong dtypes.
    """
    boxes = as_rows("boxes", boxes, 4, "G")
    if boxes.requires_grad:
        _boxes.refuse_grad("neighborhood_boxes", boxes)
    rows = check_image_rows("boxes", boxes, image_index, offsets, image_hw)
    factors, offsets_of_centre = check_factors("ratios", ratios, positive=True), check_factors("shakes", shakes, positive=False)
    check_threshold("iof_threshold", iof_threshold)
    std = [] if targets_std is None else check_std("targets_std", targets_std)
    result = _op(boxes, *rows, factors, offsets_of_centre, iof_threshold, rois, iof, iou, std, clip)
    return NeighborhoodBoxes(
        result[0],
        result[1],
        result[2] if rois else None,
        result[3] if iof else None,
        result[4] if iou else None,
        result[5] if std else None,
        result[6] if clip else None,
    )


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class _Axis(NamedTuple):
    """One axis of all boxes of the bags: [G, R, S]."""

    low: Tensor
    high: Tensor
    size: Tensor  # [G, R, 1] scaled size
    shift: Tensor  # what the shake adds to the centre


def _axis(low: Tensor, high: Tensor, poison: Tensor, ratios: list[float], shifts: list[float]) -> _Axis:
    """Scales and moves one axis [G] of the source boxes; `poison` is NaN for boxes that are not finite, else 0."""
    centre = (low + high) / 2 + poison
    size = torch.stack([(high - low) * r for r in ratios], 1)[..., None]  # [G, R, 1]
    shift = torch.cat([size * o for o in shifts], 2)
    moved = centre[:, None, None] + shift
    return _Axis(moved - size / 2, moved + size / 2, size, shift)


def _reference(
    boxes: Tensor,
    image_index: Tensor | None,
    offsets: Tensor | None,
    image_hw: Tensor,
    ratios: list[float],
    shakes: list[float],
    iof_threshold: float,
    want_rois: bool,
    want_iof: bool,
    want_iou: bool,
    targets_std: list[float],
    want_clipped: bool,
) -> Outputs:
    image, hw = images_of_rows(image_index, offsets, image_hw, boxes.shape[0])
    poison = (boxes - boxes).sum(1)
    x1, y1, x2, y2 = boxes.unbind(1)
    x = _axis(x1, x2, poison, ratios, [0.0] + [v for o in shakes for v in (-o, o, 0.0, 0.0)])
    y = _axis(y1, y2, poison, ratios, [0.0] + [v for o in shakes for v in (0.0, 0.0, -o, o)])
    bags = _combine(x.low, y.low, x.high, y.high)
    limit = hw.flip(1)[:, None]  # [G, 1, 2] (w, h)
    clipped = torch.minimum(bags.clamp(min=0), torch.cat([limit, limit], -1))
    iof = _iof(bags, limit)
    valid = iof > torch.tensor(iof_threshold, dtype=iof.dtype)
    rois = torch.cat([image.to(bags.dtype)[:, None, None].expand(-1, bags.shape[1], 1), bags], 2).flatten(0, 1)
    extras = (
        rois if want_rois else boxes.new_empty(0),
        iof if want_iof else boxes.new_empty(0),
        _overlaps.overlaps(_overlaps.corners(bags, _IOU), _overlaps.corners(boxes[:, None], _IOU), _IOU, False)
        if want_iou
        else boxes.new_empty(0),
        _targets(x, y, boxes, poison, targets_std) if targets_std else boxes.new_empty(0),
        clipped if want_clipped else boxes.new_empty(0),
    )
    return bags, valid, *extras


def _combine(x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor) -> Tensor:
    """All pairs of an x axis and a y axis [G, R, S], as boxes [G, R * R * S, 4]."""
    columns = torch.broadcast_tensors(x1[:, :, None], y1[:, None], x2[:, :, None], y2[:, None])
    return torch.stack(columns, -1).flatten(1, 3)


def _iof(boxes: Tensor, limit: Tensor) -> Tensor:
    """Share of boxes [G, P, 4] inside of (0, 0, w, h), with limit [G, 1, 2] = (w, h)."""
    inside = (torch.minimum(boxes[..., 2:], limit) - boxes[..., :2].clamp(min=0)).clamp(min=0)
    side = boxes[..., 2:] - boxes[..., :2]
    return inside[..., 0] * inside[..., 1] / (side[..., 0] * side[..., 1]).clamp(min=MIN_AREA)


def _targets(x: _Axis, y: _Axis, boxes: Tensor, poison: Tensor, std: list[float]) -> Tensor:
    """Deltas from each box of a bag to its source. The difference of the centres is what the shake added, free of rounding."""
    columns = []
    for axis, size, centre_std, size_std in (
        (x, boxes[:, 2] - boxes[:, 0], std[0], std[2]),
        (y, boxes[:, 3] - boxes[:, 1], std[1], std[3]),
    ):
        scaled = axis.size.clamp(min=MIN_SIZE)
        centre = -axis.shift / scaled / centre_std + poison[:, None, None]
        log_size = (size[:, None, None].clamp(min=MIN_SIZE) / scaled).log() / size_std + poison[:, None, None]
        columns += [centre, log_size.expand_as(centre)]
    return _combine(columns[0], columns[2], columns[1], columns[3])


def _fake(
    boxes: Tensor,
    image_index: Tensor | None,
    offsets: Tensor | None,
    image_hw: Tensor,
    ratios: list[float],
    shakes: list[float],
    iof_threshold: float,
    want_rois: bool,
    want_iof: bool,
    want_iou: bool,
    targets_std: list[float],
    want_clipped: bool,
) -> Outputs:
    count, size = boxes.shape[0], len(ratios) ** 2 * (1 + 4 * len(shakes))
    scalar, box = (count, size), (count, size, 4)
    return (
        boxes.new_empty(box),
        boxes.new_empty(scalar, dtype=torch.bool),
        boxes.new_empty((count * size, 5) if want_rois else (0,)),
        boxes.new_empty(scalar if want_iof else (0,)),
        boxes.new_empty(scalar if want_iou else (0,)),
        boxes.new_empty(box if targets_std else (0,)),
        boxes.new_empty(box if want_clipped else (0,)),
    )


register(
    "neighborhood_boxes(Tensor boxes, Tensor? image_index, Tensor? offsets, Tensor image_hw, float[] ratios, float[] shakes, "
    "float iof_threshold, bool want_rois, bool want_iof, bool want_iou, float[] targets_std, bool want_clipped) "
    "-> (Tensor boxes, Tensor valid, Tensor rois, Tensor iof, Tensor iou, Tensor targets, Tensor clipped)",
    reference=_reference,
    fake=_fake,
    triton=launcher("neighborhood_boxes", "neighborhood_boxes"),
)
_op: Callable[..., Outputs] = torch.ops.ssod_fast.neighborhood_boxes.default
