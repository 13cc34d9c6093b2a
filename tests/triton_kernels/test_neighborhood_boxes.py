"""The Triton kernel of bags around boxes against the reference, see test_box_iou.py."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor
from triton_samples import DEVICE, assert_as_implemented, nasty_boxes, real_boxes

from ssod_fast.kernels import neighborhood_boxes as kernels

reference = importlib.import_module("ssod_fast.ops.neighborhood_boxes")
RATIOS, SHAKES = [1, 1.2, 1.3, 0.8, 0.7], [0.2]
STD = [0.1, 0.1, 0.2, 0.3]


def image_hw(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([[90, 100], [110, 60]], dtype=dtype, device=DEVICE)


def compare(boxes: Tensor, index: Tensor | None, offsets: Tensor | None, ratios: list[float], shakes: list[float]) -> None:
    arguments = (boxes, index, offsets, image_hw(boxes.dtype), ratios, shakes, 0.7, True, True, True, STD, True)
    assert_as_implemented(kernels.neighborhood_boxes(*arguments), reference._reference, reference._op, arguments)


def test_golden() -> None:
    box, size = torch.tensor([[100.0, 60, 180, 160]], device=DEVICE), torch.tensor([[400.0, 500]], device=DEVICE)
    arguments = (torch.zeros(1, dtype=torch.int64, device=DEVICE), None, size, RATIOS, SHAKES, 0.7, False, False, False, [], False)
    bags, valid, *extras = kernels.neighborhood_boxes(box, *arguments)
    assert valid.shape == (1, 125)
    assert bool(valid.all())
    expected = torch.tensor([[84.0, 60, 164, 160], [72.8, 60, 168.8, 160], [108.8, 45, 212.8, 175], [112, 89, 168, 159]], device=DEVICE)
    torch.testing.assert_close(bags[0, [1, 26, 62, 124]], expected, atol=5e-4, rtol=0)
    torch.testing.assert_close(bags.sum((0, 1)).cpu(), torch.tensor([12500.0, 7500, 22500, 20000]), atol=0.05, rtol=0)
    assert [tuple(t.shape) for t in extras] == [(0,)] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("ratios", "shakes"), [(RATIOS, SHAKES), ([1, 0.5], []), ([1.1], [0.1, -0.3])], ids=str)
def test_equal_to_the_reference(ratios: list[float], shakes: list[float], dtype: torch.dtype) -> None:
    index = torch.tensor([0, 1, 1, 0, 7, -1, 1], device=DEVICE)  # two boxes belong to no image
    compare(real_boxes(7, dtype=dtype), index, None, ratios, shakes)


def test_degenerate_and_infinite_boxes() -> None:
    boxes = nasty_boxes(40)
    boxes[0, 1], boxes[1, 2], boxes[2] = math.nan, math.inf, math.nan
    compare(boxes, None, torch.tensor([0, 15, 40], device=DEVICE), [1, 0.5], [0.2])


@pytest.mark.parametrize("offsets", [[0, 0, 6], [0, 6, 6], [0, 2, 4]], ids=str)
def test_offsets(offsets: list[int]) -> None:
    compare(real_boxes(12)[::2], None, torch.tensor(offsets, device=DEVICE), [1, 0.5], [0.1])


def test_empty() -> None:
    arguments = (torch.zeros(0, dtype=torch.int64, device=DEVICE), None, image_hw(), RATIOS, SHAKES, 0.7, True, True, False, STD, True)
    shapes = [tuple(t.shape) for t in kernels.neighborhood_boxes(torch.zeros(0, 4, device=DEVICE), *arguments)]
    assert shapes == [(0, 125, 4), (0, 125), (0, 5), (0, 125), (0,), (0, 125, 4), (0, 125, 4)]


def test_images_whose_size_is_nan() -> None:
    size = torch.tensor([[math.nan, 100], [110, math.nan], [math.inf, 90]], device=DEVICE)
    index = torch.arange(9, device=DEVICE) % 3
    arguments = (real_boxes(9), index, None, size, [1.0, 1.3], [0.2], 0.7, True, True, True, STD, True)
    assert_as_implemented(kernels.neighborhood_boxes(*arguments), reference._reference, reference._op, arguments)


@pytest.mark.gpu
def test_many_boxes() -> None:
    compare(real_boxes(2000), torch.arange(2000, device=DEVICE) % 2, None, RATIOS, SHAKES)
