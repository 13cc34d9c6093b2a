"""The Triton kernel of bags around points against the reference, see test_box_iou.py."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor
from triton_samples import DEVICE, assert_as_implemented, real_boxes

from ssod_fast.kernels import point_boxes as kernels
from ssod_fast.ops.point_boxes import CUTS

reference = importlib.import_module("ssod_fast.ops.point_boxes")
SCALES: list[float] = [4, 8, 16, 32, 64, 128]
RATIOS = [1 / 3, 1 / 2, 1 / 1.5, 1, 1.5, 2, 3]
every_cut = pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)


def points(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return real_boxes(count, dtype=dtype)[:, :2]


def compare(points: Tensor, index: Tensor | None, offsets: Tensor | None, cut: int) -> None:
    size = torch.tensor([[90, 100], [110, 60]], dtype=points.dtype, device=DEVICE)
    arguments = (points, index, offsets, size, SCALES, RATIOS, cut, 0.7)
    assert_as_implemented(kernels.point_boxes(*arguments), reference._reference, reference._op, arguments)


def test_golden() -> None:
    where, size = torch.tensor([[100.0, 50], [3, 300]], device=DEVICE), torch.tensor([[400.0, 500]], device=DEVICE)
    index = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    boxes, valid = kernels.point_boxes(where, index, None, size, SCALES, RATIOS, CUTS["symmetry"], 0.7)
    assert bool(valid.all())
    expected = torch.tensor([[[97.3333, 26, 102.6667, 74], [36, 0, 164, 100]], [[0.3333, 276, 5.6667, 324], [0, 219, 6, 381]]])
    torch.testing.assert_close(boxes[0, [0, 24]].cpu(), expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(boxes[1, 0].cpu(), expected[1, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(boxes.sum((1, 2)).cpu(), torch.tensor([12600.0, 25452]), atol=0.05, rtol=0)


@every_cut
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_to_the_reference(cut: int, dtype: torch.dtype) -> None:
    where = points(9, dtype)
    where[2], where[3] = where[2] + 300, -where[3]  # outside of their image
    compare(where, torch.tensor([0, 1, 1, 0, 7, -1, 1, 0, 1], device=DEVICE), None, cut)


@every_cut
def test_points_that_are_not_finite(cut: int) -> None:
    where = points(5)
    where[0, 1], where[1, 0], where[2] = math.nan, math.inf, -math.inf
    compare(where, None, torch.tensor([0, 2, 4], device=DEVICE), cut)


@every_cut
def test_images_whose_size_is_nan(cut: int) -> None:
    size = torch.tensor([[math.nan, 100], [110, math.nan], [math.inf, 90]], device=DEVICE)
    arguments = (points(9), torch.arange(9, device=DEVICE) % 3, None, size, SCALES, RATIOS, cut, 0.7)
    assert_as_implemented(kernels.point_boxes(*arguments), reference._reference, reference._op, arguments)


@every_cut
def test_empty(cut: int) -> None:
    compare(points(0), None, torch.zeros(3, dtype=torch.int64, device=DEVICE), cut)


@pytest.mark.gpu
@every_cut
def test_many_points(cut: int) -> None:
    compare(points(2000), torch.arange(2000, device=DEVICE) % 2, None, cut)
