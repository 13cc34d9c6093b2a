"""The paired Triton kernels against the reference, see test_box_iou.py."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor
from triton_samples import DEVICE, EVERY_FORMAT, EVERY_MODE, assert_gradient, assert_same, nasty_boxes, real_boxes, rule_name

from ssod_fast.kernels import box_iou as pairwise
from ssod_fast.kernels import paired_box_iou as kernels
from ssod_fast.ops._boxes import Rule, make_rule

reference = importlib.import_module("ssod_fast.ops.paired_box_iou")
GIOU = make_rule("giou", "xyxy", "zero", None)
every_mode = pytest.mark.parametrize("rule", EVERY_MODE + EVERY_FORMAT, ids=rule_name)


def compare(boxes1: Tensor, boxes2: Tensor, grad: Tensor, rule: Rule, nan_zero: bool = False) -> None:
    expected = reference._reference(boxes1, boxes2, *rule, nan_zero)
    assert_same(kernels.paired_box_iou(boxes1, boxes2, *rule, nan_zero), expected, rule)
    actual = kernels.paired_box_iou_backward(grad, boxes1, boxes2, *rule, nan_zero, True, True)
    wanted = reference._reference_backward(grad, boxes1, boxes2, *rule, nan_zero, True, True)
    for got, want in zip(actual, wanted, strict=True):
        assert_gradient(got, want)


@every_mode
def test_equal_to_the_reference(rule: Rule) -> None:
    boxes1, boxes2 = nasty_boxes(301), nasty_boxes(301, seed=1)  # more than one block, not a multiple of it
    compare(boxes1, boxes2, torch.rand(301, device=DEVICE), rule)


@every_mode
def test_float64_with_nan_as_zero(rule: Rule) -> None:
    boxes1, boxes2 = nasty_boxes(50, dtype=torch.float64), nasty_boxes(50, seed=1, dtype=torch.float64)
    compare(boxes1, boxes2, torch.rand(50, device=DEVICE, dtype=torch.float64), rule, nan_zero=True)


def test_is_the_diagonal_of_the_pairwise_kernel() -> None:
    for rule in EVERY_MODE:
        boxes1, boxes2 = nasty_boxes(20), nasty_boxes(20, seed=1)
        matrix = pairwise.box_iou(boxes1, boxes2, *rule, False, torch.float32)
        assert_same(kernels.paired_box_iou(boxes1, boxes2, *rule, False), matrix.diagonal(), rule)


@pytest.mark.parametrize("shape1", [(6, 5, 4), (6, 1, 4), (1, 5, 4), (5, 4), (4,)], ids=str)
def test_broadcast_is_read_through_zero_strides(shape1: tuple[int, ...]) -> None:
    boxes1, boxes2 = torch.broadcast_tensors(real_boxes(*shape1[:-1]), real_boxes(6, 5, seed=1))
    grad = torch.ones((), device=DEVICE).expand(6, 5)  # what the backward of a sum hands over
    compare(boxes1, boxes2, grad, GIOU)


def test_strides_that_do_not_merge_are_copied() -> None:
    boxes1, boxes2 = real_boxes(2, 3, 4).transpose(0, 2), real_boxes(4, 3, 2, seed=1)
    compare(boxes1, boxes2, torch.rand(4, 3, 2, device=DEVICE), GIOU)


def test_one_pair_without_dimensions() -> None:
    compare(real_boxes(), real_boxes(seed=1), torch.ones((), device=DEVICE), GIOU)


def test_only_the_gradient_that_is_needed() -> None:
    boxes1, boxes2, grad = real_boxes(7), real_boxes(7, seed=1), torch.rand(7, device=DEVICE)
    both = kernels.paired_box_iou_backward(grad, boxes1, boxes2, *GIOU, False, True, True)
    first, nothing = kernels.paired_box_iou_backward(grad, boxes1, boxes2, *GIOU, False, True, False)
    assert nothing.shape == (0,)
    assert_same(first, both[0])
    nothing, second = kernels.paired_box_iou_backward(grad, boxes1, boxes2, *GIOU, False, False, True)
    assert nothing.shape == (0,)
    assert_same(second, both[1])


def test_equal_boxes_have_gradient_zero() -> None:
    boxes = real_boxes(40)
    for mode in ("iou", "giou"):
        rule = make_rule(mode, "xyxy", "zero", None)
        for grad in kernels.paired_box_iou_backward(torch.ones(40, device=DEVICE), boxes, boxes.clone(), *rule, False, True, True):
            assert_same(grad, torch.zeros_like(boxes))


def test_a_box_that_is_not_finite_gives_nan() -> None:
    boxes1, boxes2 = real_boxes(3), real_boxes(3, seed=1)
    boxes1[0, 0], boxes2[1, 3] = math.nan, math.inf
    assert kernels.paired_box_iou(boxes1, boxes2, *GIOU, False).isnan().tolist() == [True, True, False]
    assert kernels.paired_box_iou(boxes1, boxes2, *GIOU, True)[:2].tolist() == [0.0, 0.0]


def test_empty() -> None:
    boxes = torch.zeros(3, 0, 4, device=DEVICE)
    assert kernels.paired_box_iou(boxes, boxes, *GIOU, False).shape == (3, 0)
    grad1, grad2 = kernels.paired_box_iou_backward(torch.zeros(3, 0, device=DEVICE), boxes, boxes, *GIOU, False, True, True)
    assert grad1.shape == grad2.shape == (3, 0, 4)
