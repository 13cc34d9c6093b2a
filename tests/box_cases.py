"""Boxes that the tests of the IoU family share: a golden table worked out by hand, random sets, option grids."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

MODES = ("iou", "iof", "giou", "diou", "ciou")
FORMATS = ("xyxy", "xywh", "cxcywh")
EPS_MODES = ("zero", "none", "max", "add")
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))

A = (0.0, 0.0, 10.0, 10.0)
# box: (IoU, GIoU, DIoU, CIoU) of A with it, eps_mode "zero"
GOLDEN: dict[tuple[float, ...], tuple[float, float, float, float]] = {
    (0, 0, 10, 10): (1, 1, 1, 1),
    (5, 5, 15, 15): (1 / 7, -0.0793650794, 0.0317460317, 0.0317460317),
    (20, 20, 30, 30): (0, -7 / 9, -4 / 9, -4 / 9),
    (2, 2, 4, 6): (0.08, 0.08, 0.055, 0.0531700371),
    (10, 0, 20, 10): (0, 0, -0.2, -0.2),  # touching
    (3, 3, 3, 3): (0, 0, -0.04, -0.09),  # a point inside
    (20, 20, 20, 20): (0, -0.75, -0.5625, -0.6125),  # a point outside
    (2, 0, 2, 10): (0, 0, -0.045, -0.095),  # a line
    (8, 8, 2, 2): (0, 0, 0, -0.05),  # inverted
}
GOLDEN_MODES = ("iou", "giou", "diou", "ciou")

# (mode, box): gradient of the overlap of A with it, with respect to A
GOLDEN_GRADS: dict[tuple[str, tuple[float, ...]], tuple[float, float, float, float]] = {
    ("iou", (5, 5, 15, 15)): (0.0081632653, 0.0081632653, 0.0244897959, 0.0244897959),
    ("giou", (5, 5, 15, 15)): (0.0155706727, 0.0155706727, 0.0467120181, 0.0467120181),
    ("diou", (5, 5, 15, 15)): (0.0118669690, 0.0118669690, 0.0356009070, 0.0356009070),
    ("iou", (20, 20, 30, 30)): (0, 0, 0, 0),
    ("giou", (20, 20, 30, 30)): (-1 / 270, -1 / 270, 1 / 90, 1 / 90),
    ("diou", (20, 20, 30, 30)): (-1 / 270, -1 / 270, 1 / 90, 1 / 90),
    ("iou", (2, 2, 4, 6)): (0.008, 0.008, -0.008, -0.008),
    ("diou", (2, 2, 4, 6)): (-0.0045, 0.0005, -0.0155, -0.0105),
    ("ciou", (2, 2, 4, 6)): (-0.0039312479, -0.0000687521, -0.0160687521, -0.0099312479),
    ("iou", (10, 0, 20, 10)): (0, 0, 0.05, 0),
    ("giou", (10, 0, 20, 10)): (0, 0, 0.05, 0),
    ("diou", (10, 0, 20, 10)): (0.004, -0.004, 0.07, 0.004),  # ties in y are split in half
    ("iou", (0, 0, 10, 10)): (0, 0, 0, 0),
    ("giou", (0, 0, 10, 10)): (0, 0, 0, 0),
}


def rules() -> list[Any]:
    """Every mode, format and eps mode, with an eps that the boxes below feel."""
    eps = {"zero": 0.0, "none": 1e-3, "max": 30.0, "add": 1e-3}
    return [pytest.param(m, f, e, eps[e], id=f"{m}-{f}-{e}") for m, f, e in itertools.product(MODES, FORMATS, EPS_MODES)]


def random_boxes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, degenerate: bool = True, integer: bool = True) -> Tensor:
    """Boxes [*shape, 4] that are valid in every format; half have integer corners (ties), and a few are degenerate or not finite."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(*shape, 4, generator=generator, dtype=torch.float64) * 20
    boxes[..., 2:] += boxes[..., :2] + 0.5
    rows = boxes.view(-1, 4)
    if integer:
        rows[len(rows) // 2 :] = rows[len(rows) // 2 :].round()
    if degenerate and len(rows) > 6:
        rows[0, 2] = rows[0, 0] - 3
        rows[1] = float("nan")
        rows[2, 0] = float("inf")
        rows[3] = 5
        rows[4, 3] = rows[4, 1]
    return boxes.to(dtype)


def valid_boxes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Finite boxes [*shape, 4] with positive area and no ties."""
    return random_boxes(*shape, seed=seed, dtype=dtype, degenerate=False, integer=False)


def integer_boxes(*shape: int, seed: int = 0) -> Tensor:
    """Float64 boxes [*shape, 4] with small integer corners and positive area: full of ties."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.randint(0, 12, (*shape, 4), generator=generator).double()
    boxes[..., 2:] += boxes[..., :2] + 1
    return boxes
