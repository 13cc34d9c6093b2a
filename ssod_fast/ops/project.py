"""`project_boxes`: pseudo boxes from the teacher's view to the student's, by way of the original image, without a host sync."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ssod_fast.structures import PaddedTargets, upload

Sizes = Sequence[tuple[int, int]]


def project_boxes(
    targets: PaddedTargets,
    weak_inv: Tensor,
    original_hw: Sizes,
    strong: Tensor,
    strong_hw: Sizes,
    *,
    min_wh: float | None = 1e-2,
) -> PaddedTargets:
    """Moves boxes from the weak view to the strong view of the same images.

    Two steps with a clip in each: to the original image, then to the strong view (the order of mmdetection's semi-supervised detectors).
    Boxes that come out non-finite are dropped. Matrices and sizes are host data; the upload does not wait for the device.

    Args:
        targets: [B, N] boxes in pixels of the weak views.
        weak_inv: float64 [B, 3, 3] on the CPU, weak view -> original image; see :func:`invert_homographies`.
        original_hw: (height, width) of the original images.
        strong: float64 [B, 3, 3] on the CPU, original image -> strong view.
        strong_hw: (height, width) of the strong views without padding.
        min_wh: width and height must exceed this many pixels at the end; None keeps every box.

    Returns:
        The boxes in pixels of the strong views, those that are left in their order.

    Raises:
        ValueError: a shape does not fit the batch, or a matrix is not finite.
        TypeError: a matrix is not on the CPU.
    """
    return drop_small(warp_boxes(warp_boxes(targets, weak_inv, original_hw), strong, strong_hw), min_wh)


def warp_boxes(targets: PaddedTargets, matrix: Tensor, hw: Sizes) -> PaddedTargets:
    """Moves boxes by one homography per image and clips them to the new image; non-finite boxes are dropped.

    Args:
        targets: [B, N].
        matrix: [B, 3, 3] on the CPU.
        hw: (height, width) of the images that the matrices lead to.

    Raises:
        ValueError: a shape does not fit the batch, or a matrix is not finite, which would drop every box of its image.
        TypeError: the matrices are not on the CPU.
    """
    moved, finite = moved_boxes(targets, matrix, hw)
    return dataclasses.replace(targets, boxes=moved).select(finite)


def moved_boxes(targets: PaddedTargets, matrix: Tensor, hw: Sizes) -> tuple[Tensor, Tensor]:
    """What :func:`warp_boxes` makes of every row, which stays in its place.

    Args:
        targets: see :func:`warp_boxes`, as the rest.
        matrix: see :func:`warp_boxes`.
        hw: see :func:`warp_boxes`.

    Returns:
        Clipped boxes [B, N, 4], and bool [B, N], whether the moved box is finite.

    Raises:
        ValueError: as :func:`warp_boxes`.
        TypeError: as :func:`warp_boxes`.
    """
    _check(targets, matrix, hw)
    _check_finite(matrix)
    limits = torch.tensor([(w, h, w, h) for h, w in hw], dtype=torch.float32).reshape(-1, 4)
    geometry = upload(torch.cat([matrix.reshape(-1, 9).float(), limits], dim=1), targets.device)  # [B, 13]
    moved = _hull(targets.boxes, geometry[:, :9])
    return torch.minimum(moved.clamp(min=0), geometry[:, None, 9:]), torch.isfinite(moved).all(-1)


def drop_small(targets: PaddedTargets, min_wh: float | None) -> PaddedTargets:
    """Keeps the boxes whose width and height both exceed `min_wh` pixels."""
    if min_wh is None:
        return targets
    width_height = targets.boxes[..., 2:] - targets.boxes[..., :2]
    return targets.select((width_height > min_wh).all(-1))


def invert_homographies(matrix: Tensor) -> Tensor:
    """Inverts [B, 3, 3] homographies on the host in float64.

    Raises:
        ValueError: names the image whose matrix is singular or not finite.
        TypeError: the matrices are not on the CPU.
    """
    _check_matrix(matrix)
    inverses = []
    for image, m in enumerate(matrix.double().numpy()):
        try:
            inverses.append(np.linalg.inv(m))
        except np.linalg.LinAlgError:
            inverses.append(np.full((3, 3), np.nan))
        if not np.isfinite(inverses[-1]).all():
            raise ValueError(f"the homography of image {image} must be invertible, got {m.tolist()}")
    return torch.from_numpy(np.stack(inverses)) if inverses else matrix.double()


def _hull(boxes: Tensor, matrix: Tensor) -> Tensor:
    """Axis-aligned hull of the four moved corners. boxes: [B, N, 4]; matrix: [B, 9], rows of the homography."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    x, y = torch.stack([x1, x2, x2, x1], dim=-1), torch.stack([y1, y1, y2, y2], dim=-1)  # [B, N, 4], one entry per corner
    m = matrix[:, :, None, None].unbind(1)  # nine [B, 1, 1]
    # Element by element: a matrix product would drop to TF32 or, under autocast, to bfloat16.
    w = m[6] * x + m[7] * y + m[8]
    x, y = (m[0] * x + m[1] * y + m[2]) / w, (m[3] * x + m[4] * y + m[5]) / w
    return torch.stack([x.amin(-1), y.amin(-1), x.amax(-1), y.amax(-1)], dim=-1)


def _check(targets: PaddedTargets, matrix: Tensor, hw: Sizes) -> None:
    _check_matrix(matrix)
    if matrix.shape[0] != len(targets) or len(hw) != len(targets):
        raise ValueError(f"targets, matrices and sizes must agree, got {len(targets)}, {matrix.shape[0]} and {len(hw)} images")


def _check_finite(matrix: Tensor) -> None:
    host = matrix.double().numpy()  # NumPy, so that nobody takes a question about host data for a wait for the device
    for image in np.flatnonzero(~np.isfinite(host).all(axis=(1, 2))).tolist():
        raise ValueError(f"the homography of image {image} must be finite, got {host[image].tolist()}")


def _check_matrix(matrix: Tensor) -> None:
    if matrix.dim() != 3 or matrix.shape[1:] != (3, 3):
        raise ValueError(f"a homography per image must be [B, 3, 3], got {list(matrix.shape)}")
    if matrix.device.type != "cpu":
        raise TypeError(f"homographies must stay on the CPU, where they are inverted and checked, got {matrix.device}")
