"""Bags of boxes around points, the coarse proposals of P2BNet, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _boxes
from ._image_rows import as_rows, check_factors, check_image_rows, check_threshold, images_of_rows
from ._registry import launcher, register

CUTS = {"symmetry": 0, "clamp": 1, "ignore": 2}
SYMMETRY, CLAMP, IGNORE = range(3)
MIN_AREA = 1e-6  # px^2: the floor of areas that divide


class PointBoxes(NamedTuple):
    """Bags of M boxes around G points.

    Attributes:
        boxes: [G, M, 4] xyxy, pixels; float64 for float64 points, else float32.
        valid: bool [G, M], whether the box has area, and under "ignore" enough of it in the image.
    """

    boxes: Tensor
    valid: Tensor


def point_boxes(
    points: Tensor,
    image_index: Tensor | None,
    image_hw: Tensor,
    *,
    scales: Sequence[float],
    ratios: Sequence[float],
    cut: Literal["symmetry", "clamp", "ignore"] = "symmetry",
    offsets: Tensor | None = None,
    iof_threshold: float = 0.7,
) -> PointBoxes:
    """M = len(scales) · len(ratios) boxes around each point; box i_scale · len(ratios) + i_ratio has the size

    W = scale · base · ratio and H = scale · base / ratio, with base = min(h, w) / 100 of the image. Boxes that leave the image are shrunk
    about their point ("symmetry"), clipped ("clamp"), or kept and judged by the share that lies inside ("ignore").

    A box is valid if it has area, and under "ignore" if more than `iof_threshold` of it lies in the image: with "symmetry", every box of
    a point inside its image. Boxes of points that belong to no image have no area; those of points that are not finite are NaN, as are
    those that an image of NaN size decides on.

    Source: the coarse proposal generator of P2BNet (arXiv 2207.06827).

    Args:
        points: [G, 2] (x, y), pixels of the network input; half and integer points are computed in float32. Carries no gradient.
        image_index: int32 or int64 [G], the image of each point; None with `offsets`.
        image_hw: [B, 2] (height, width) of the images, resized but not padded; any real dtype.
        scales: > 0, at most 64.
        ratios: > 0, at most 64.
        cut: what happens to boxes that leave the image.
        offsets: int32 or int64 [B + 1] instead of `image_index`: image b owns the points offsets[b] .. offsets[b + 1].
        iof_threshold: in [0, 1), strict; read with cut "ignore".

    Returns:
        :class:`PointBoxes`, float64 for float64 points, else float32.

    Raises:
        ValueError: for wrong shapes, devices and options, points that require grad, and on the host indices or offsets out of range.
        TypeError: for wrong dtypes.
    """
    points = as_rows("points", points, 2, "G")
    _boxes.refuse_grad("point_boxes", points)
    rows = check_image_rows("points", points, image_index, offsets, image_hw)
    kind = _boxes._choice("cut", cut, CUTS)
    check_threshold("iof_threshold", iof_threshold)
    sizes, aspects = check_factors("scales", scales, positive=True), check_factors("ratios", ratios, positive=True)
    return PointBoxes(*_op(points, *rows, sizes, aspects, kind, iof_threshold))


def _reference(
    points: Tensor,
    image_index: Tensor | None,
    offsets: Tensor | None,
    image_hw: Tensor,
    scales: list[float],
    ratios: list[float],
    cut: int,
    iof_threshold: float,
) -> tuple[Tensor, Tensor]:
    _, hw = images_of_rows(image_index, offsets, image_hw, points.shape[0])
    limit = hw.flip(1)[:, None]  # [G, 1, 2] (w, h)
    centre = (points + (points - points).sum(1, keepdim=True))[:, None]  # [G, 1, 2], NaN where not finite
    base = hw.amin(1) / 100
    sides = torch.stack([torch.stack((s * base * r, s * base / r), 1) for s in scales for r in ratios], 1)  # [G, M, 2]
    if cut == SYMMETRY:
        room = torch.minimum(2 * centre, 2 * (limit - centre))
        sides = torch.minimum(sides, room).clamp(min=0)
    boxes = torch.cat((centre - sides / 2, centre + sides / 2), -1)
    if cut == CLAMP:
        boxes = torch.minimum(boxes.clamp(min=0), torch.cat((limit, limit), -1))
    side = boxes[..., 2:] - boxes[..., :2]
    area = side[..., 0] * side[..., 1]
    if cut != IGNORE:
        return boxes, area > 0
    inside = (torch.minimum(boxes[..., 2:], limit) - boxes[..., :2].clamp(min=0)).clamp(min=0)
    share = inside[..., 0] * inside[..., 1] / area.clamp(min=MIN_AREA)
    return boxes, share > torch.tensor(iof_threshold, dtype=share.dtype)


def _fake(
    points: Tensor,
    image_index: Tensor | None,
    offsets: Tensor | None,
    image_hw: Tensor,
    scales: list[float],
    ratios: list[float],
    cut: int,
    iof_threshold: float,
) -> tuple[Tensor, Tensor]:
    shape = (points.shape[0], len(scales) * len(ratios))
    return points.new_empty((*shape, 4)), points.new_empty(shape, dtype=torch.bool)


register(
    "point_boxes(Tensor points, Tensor? image_index, Tensor? offsets, Tensor image_hw, float[] scales, float[] ratios, int cut, "
    "float iof_threshold) -> (Tensor boxes, Tensor valid)",
    reference=_reference,
    fake=_fake,
    triton=launcher("point_boxes", "point_boxes"),
)
_op: Callable[..., tuple[Tensor, Tensor]] = torch.ops.ssod_fast.point_boxes.default
