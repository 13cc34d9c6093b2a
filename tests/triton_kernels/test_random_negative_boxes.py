"""The Triton kernel of random negatives against the reference, see test_box_iou.py."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor
from triton_samples import DEVICE, assert_as_implemented, nasty_boxes, real_boxes

from ssod_fast.kernels import random_negative_boxes as kernels

reference = importlib.import_module("ssod_fast.ops.random_negative_boxes")


def uniforms(batch: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, count, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(DEVICE, dtype)


def compare(numbers: Tensor, positives: Tensor, offsets: list[int], threshold: float = 0.3) -> Tensor:
    """Both forms, with and without the maxima; returns what is kept."""
    size = torch.tensor([[90, 100], [110, 60]], dtype=numbers.dtype, device=DEVICE)[: numbers.shape[0]]
    ends = torch.tensor(offsets, device=DEVICE)
    for return_max in (False, True):
        arguments = (numbers, size, positives, ends, threshold, return_max)
        actual = kernels.random_negative_boxes(*arguments)
        assert_as_implemented(actual, reference._reference, reference._op, arguments)
    return actual[1]


def test_golden() -> None:
    numbers = torch.tensor([[[0.0] * 4, [0.5] * 4, [0.9, 0.1, 0.25, 0.75], [0.2, 0.7, 1, 1]]], device=DEVICE)
    size, ends = torch.tensor([[400.0, 500]], device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    positives = torch.tensor([[[100.0, 60, 180, 160]]], device=DEVICE)
    boxes, keep, maxima = kernels.random_negative_boxes(numbers, size, positives, ends, 0.3, True)
    expected = torch.tensor([[-100.0, -80, -100, -80], [200, 160, 400, 320], [440, -32, 480, 352], [20, 256, 600, 480]])
    torch.testing.assert_close(boxes[0].cpu(), expected, atol=1e-4, rtol=0)
    assert bool(keep.all())
    assert maxima.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_to_the_reference(dtype: torch.dtype) -> None:
    keep = compare(uniforms(2, 21, dtype), real_boxes(5, 40, dtype=dtype), [0, 4, 5])  # 160 positives: more than one tile
    assert 0 < int(keep.sum()) < keep.numel()


def test_degenerate_and_infinite_positives() -> None:
    keep = compare(uniforms(2, 10), nasty_boxes(30, 1), [0, 3, 30])
    compare(uniforms(2, 10), nasty_boxes(30, 1, finite=True), [0, 3, 30], threshold=0.0)
    positives = real_boxes(2, 1)
    positives[1, 0, 2] = math.nan
    assert not bool(compare(uniforms(2, 10), positives, [0, 1, 2])[1].any())
    assert keep.shape == (2, 10)


@pytest.mark.parametrize("offsets", [[-4, 3, 99], [3, 1, 4], [0, 0, 0]], ids=str)
def test_offsets_out_of_range(offsets: list[int]) -> None:
    compare(uniforms(2, 9), real_boxes(4, 3), offsets)


def test_strided() -> None:
    compare(uniforms(9, 2).transpose(0, 1), real_boxes(3, 4).transpose(0, 1), [0, 2, 4])


@pytest.mark.parametrize(("batch", "count", "bags", "per_bag"), [(0, 5, 3, 2), (2, 0, 3, 2), (2, 5, 0, 2), (2, 5, 3, 0)])
def test_empty(batch: int, count: int, bags: int, per_bag: int) -> None:
    compare(uniforms(batch, count), real_boxes(bags, per_bag), [0, bags, bags][: batch + 1])


@pytest.mark.gpu
def test_many_boxes() -> None:
    compare(uniforms(2, 500), real_boxes(40, 125), [0, 20, 40])


@pytest.mark.gpu
def test_more_images_than_a_second_axis_holds() -> None:
    arguments = (uniforms(70000, 2), torch.full((70000, 2), 90.0, device=DEVICE), real_boxes(1, 2))
    offsets = torch.ones(70001, dtype=torch.int64, device=DEVICE)
    offsets[0] = 0
    for actual, expected in zip(
        kernels.random_negative_boxes(*arguments, offsets, 0.3, True), reference._reference(*arguments, offsets, 0.3, True), strict=True
    ):
        torch.testing.assert_close(actual, expected)
