"""The Triton kernel of the threshold test against the reference, see test_box_iou.py."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor
from triton_samples import DEVICE, EVERY_MODE, assert_same, nasty_boxes, real_boxes, rule_name

from ssod_fast.kernels import box_iou_below as kernels
from ssod_fast.ops._boxes import Rule, make_rule

reference = importlib.import_module("ssod_fast.ops.box_iou_below")
IOU = make_rule("iou", "xyxy", "zero", None)


def compare(boxes: Tensor, others: Tensor, threshold: float, rule: Rule, *offsets: Tensor) -> Tensor:
    """Decision with and without the maximum."""
    arguments = (boxes, others, *(offsets or (None, None)), threshold, *rule)
    below, maxima = kernels.box_iou_below(*arguments, True)
    expected, wanted = reference._reference(*arguments, True)
    assert_same(below, expected)
    assert_same(maxima, wanted, rule)
    alone, nothing = kernels.box_iou_below(*arguments, False)
    assert_same(alone, expected)
    assert nothing.shape == (0,)
    return below


def test_golden() -> None:
    boxes = torch.tensor([(0, 0, 10, 10), (20, 20, 30, 30), (5, 5, 15, 15), (0, 0, 0, 0)], dtype=torch.float32, device=DEVICE)
    assert compare(boxes, boxes[:1], 0.2, IOU).tolist() == [False, True, True, True]
    assert compare(boxes, boxes[:1], 1 / 7, IOU).tolist() == [False, True, False, True]  # strict, after the cast to float32
    assert compare(boxes, boxes[:0], 0.2, IOU).all()
    with_nan = torch.cat((boxes[:1], boxes[:1] * math.nan))
    assert not compare(boxes, with_nan, 0.2, IOU).any()


def test_the_threshold_keeps_its_digits_in_float64() -> None:
    boxes = torch.tensor([(0, 0, 10, 10), (5, 5, 15, 15)], dtype=torch.float64, device=DEVICE)
    assert compare(boxes[:1], boxes[1:], 1 / 7, IOU).tolist() == [False]
    assert compare(boxes[:1], boxes[1:], math.nextafter(1 / 7, 1), IOU).tolist() == [True]


@pytest.mark.parametrize("rule", EVERY_MODE, ids=rule_name)
def test_equal_to_the_reference(rule: Rule) -> None:
    below = compare(nasty_boxes(2, 19), nasty_boxes(2, 5, seed=1), 0.3, rule)
    assert below.shape == (2, 19)


def test_partners_over_several_tiles() -> None:
    below = compare(real_boxes(19), real_boxes(300, seed=1), 0.55, IOU)
    assert below.any()
    assert not below.all()


def test_ragged() -> None:
    offsets1, offsets2 = torch.tensor([0, 4, 4, 15, 18], device=DEVICE), torch.tensor([0, 5, 7, 7, 140], device=DEVICE)
    below = compare(nasty_boxes(18), nasty_boxes(140, seed=1), 0.4, IOU, offsets1, offsets2)
    assert below[4:15].all()  # their image owns no others


@pytest.mark.parametrize("offsets", [([-5, 4, 99], [0, 3, 99]), ([0, 9, 3], [7, 2, 5]), ([0], [0]), ([2, 3], [1, 4])], ids=str)
def test_ragged_offsets_out_of_range_are_clamped(offsets: tuple[list[int], list[int]]) -> None:
    compare(real_boxes(6), real_boxes(5, seed=1), 0.1, IOU, *(torch.tensor(values, device=DEVICE) for values in offsets))


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)], ids=str)
def test_empty(sizes: tuple[int, int]) -> None:
    assert compare(real_boxes(2, sizes[0]), real_boxes(2, sizes[1]), 0.3, IOU).all()


@pytest.mark.gpu
def test_many_boxes() -> None:
    compare(real_boxes(5000), real_boxes(700, seed=1), 0.5, IOU)
