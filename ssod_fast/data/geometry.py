"""Exact image geometry: every operation returns the picture and the 3x3 matrix that moves a point with it.

Coordinates are continuous pixels: (0, 0) is the top left corner of the picture, the centre of its first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]  # [3, 3]

MIN_SIDE = 1e-2  # pixels; boxes thinner than this after a projection are gone (the value of MixPL's pipelines)


def resize(image: Tensor, size: tuple[int, int]) -> tuple[Tensor, Matrix]:
    """Antialiased bilinear resize of uint8 [3, h, w] to `size` = (h', w')."""
    from torchvision.transforms.v2 import functional as tvf

    h, w = image.shape[1:]
    # A copy where the size stays: the input may lie in a cache.
    resized: Tensor = image.clone() if (h, w) == size else tvf.resize(image, list(size), antialias=True)
    return resized.contiguous(), np.diag([size[1] / w, size[0] / h, 1.0])


def flip(image: Tensor) -> tuple[Tensor, Matrix]:
    """Mirrors left and right."""
    return image.flip(2), np.array([[-1.0, 0.0, image.shape[2]], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


def rotate_matrix(size: tuple[int, int], degrees: float) -> Matrix:
    """Clockwise (as seen on the screen) about the centre of a picture of `size` = (h, w)."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    cy, cx = size[0] / 2, size[1] / 2
    return np.array([[c, -s, cx - c * cx + s * cy], [s, c, cy - s * cx - c * cy], [0.0, 0.0, 1.0]])


def shear_matrix(degrees_x: float = 0.0, degrees_y: float = 0.0) -> Matrix:
    """x' = x + tan(degrees_x) * y, y' = y + tan(degrees_y) * x; the top left corner stays."""
    return np.array([[1.0, math.tan(math.radians(degrees_x)), 0.0], [math.tan(math.radians(degrees_y)), 1.0, 0.0], [0.0, 0.0, 1.0]])


def translate_matrix(dx: float = 0.0, dy: float = 0.0) -> Matrix:
    """Moves by (dx, dy) pixels."""
    return np.array([[1.0, 0.0, dx], [0.0, 1.0, dy], [0.0, 0.0, 1.0]])


def warp(image: Tensor, matrix: Matrix, fill: int) -> Tensor:
    """Moves the pixels of uint8 [3, h, w] by `matrix` (bilinear), same size; what comes from outside is grey `fill`."""
    h, w = image.shape[1:]
    to_unit = np.array([[2.0 / w, 0.0, -1.0], [0.0, 2.0 / h, -1.0], [0.0, 0.0, 1.0]])  # pixels -> [-1, 1], the convention of grid_sample
    theta = to_unit @ np.linalg.inv(matrix) @ np.linalg.inv(to_unit)
    grid = nnf.affine_grid(torch.from_numpy(theta[None, :2]).float(), [1, 3, h, w], align_corners=False)
    # Shifted by the fill value, zero padding blends into exactly that grey at the border.
    moved = nnf.grid_sample(image[None].float() - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (moved[0] + fill).round_().clamp_(0, 255).to(torch.uint8)


def map_boxes(boxes: Tensor, matrix: Matrix, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Projects boxes by their four corners and clips them.

    Args:
        boxes: float32 [N, 4] xyxy, pixels of the source frame.
        matrix: Source to target frame.
        size: (h, w) of the target frame.

    Returns:
        float32 [N, 4] boxes around the moved corners, clipped to the target; bool [N], True where more than a sliver is left.
    """
    x1, y1, x2, y2 = boxes.double().unbind(1)
    corners = torch.stack([torch.stack(p, 1) for p in ((x1, y1), (x2, y1), (x2, y2), (x1, y2))], 1)  # [N, 4, 2]
    m = torch.from_numpy(matrix)
    moved = corners @ m[:2, :2].T + m[:2, 2]
    moved = moved / (corners @ m[2, :2] + m[2, 2])[..., None]
    limit = torch.tensor([size[1], size[0]], dtype=torch.float64)
    low, high = moved.amin(1).clamp(min=0).minimum(limit), moved.amax(1).clamp(min=0).minimum(limit)
    keep = ((high - low) > MIN_SIDE).all(1)
    return torch.cat([low, high], 1).float(), keep
