"""The pairwise Triton kernels against the reference: on CPU tensors through the interpreter, on CUDA tensors where a GPU is."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor
from triton_samples import DEVICE, EVERY_FORMAT, EVERY_MODE, assert_gradient, assert_same, nasty_boxes, real_boxes, rule_name

from ssod_fast.kernels import box_iou as kernels
from ssod_fast.ops._boxes import Rule, make_rule

reference = importlib.import_module("ssod_fast.ops.box_iou")  # the package exports a function of this name
GIOU = make_rule("giou", "xyxy", "zero", None)
every_mode = pytest.mark.parametrize("rule", EVERY_MODE + EVERY_FORMAT, ids=rule_name)

A = (0.0, 0.0, 10.0, 10.0)
GOLDEN = [  # box, then IoU, GIoU, DIoU, CIoU with A
    (A, (1, 1, 1, 1)),
    ((5, 5, 15, 15), (1 / 7, -0.0793650794, 0.0317460317, 0.0317460317)),
    ((20, 20, 30, 30), (0, -7 / 9, -4 / 9, -4 / 9)),
    ((2, 2, 4, 6), (0.08, 0.08, 0.055, 0.0531700371)),
    ((10, 0, 20, 10), (0, 0, -0.2, -0.2)),
    ((3, 3, 3, 3), (0, 0, -0.04, -0.09)),
    ((20, 20, 20, 20), (0, -0.75, -0.5625, -0.6125)),
    ((2, 0, 2, 10), (0, 0, -0.045, -0.095)),
    ((8, 8, 2, 2), (0, 0, 0, -0.05)),
]


def compare_gradients(grad: Tensor, boxes1: Tensor, boxes2: Tensor, rule: Rule, nan_zero: bool = False) -> tuple[Tensor, Tensor]:
    actual = kernels.box_iou_backward(grad, boxes1, boxes2, *rule, nan_zero, True, True)
    expected = reference._reference_backward(grad, boxes1, boxes2, *rule, nan_zero, True, True)
    for got, wanted in zip(actual, expected, strict=True):
        assert_gradient(got, wanted)
    return actual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_values(dtype: torch.dtype) -> None:
    boxes1 = torch.tensor([A], dtype=dtype, device=DEVICE)
    boxes2 = torch.tensor([box for box, _ in GOLDEN], dtype=dtype, device=DEVICE)
    for column, mode in enumerate(("iou", "giou", "diou", "ciou")):
        expected = torch.tensor([[values[column] for _, values in GOLDEN]], dtype=dtype, device=DEVICE)
        rule = make_rule(mode, "xyxy", "zero", None)
        torch.testing.assert_close(kernels.box_iou(boxes1, boxes2, *rule, False, dtype), expected, atol=1e-6, rtol=0)


def test_golden_gradients() -> None:
    boxes1 = torch.tensor([A], device=DEVICE)
    for box, mode, expected in [
        ((5, 5, 15, 15), "iou", (0.0081632653, 0.0081632653, 0.0244897959, 0.0244897959)),
        ((5, 5, 15, 15), "giou", (0.0155706727, 0.0155706727, 0.0467120181, 0.0467120181)),
        ((20, 20, 30, 30), "diou", (-1 / 270, -1 / 270, 1 / 90, 1 / 90)),
        ((2, 2, 4, 6), "ciou", (-0.0039312479, -0.0000687521, -0.0160687521, -0.0099312479)),
        ((10, 0, 20, 10), "giou", (0, 0, 0.05, 0)),
        (A, "giou", (0, 0, 0, 0)),
    ]:
        boxes2 = torch.tensor([box], dtype=torch.float32, device=DEVICE)
        rule = make_rule(mode, "xyxy", "zero", None)
        grad1, none = kernels.box_iou_backward(torch.ones(1, 1, device=DEVICE), boxes1, boxes2, *rule, False, True, False)
        torch.testing.assert_close(grad1, torch.tensor([expected], dtype=torch.float32, device=DEVICE), atol=1e-6, rtol=0)
        assert none.shape == (0,)


@every_mode
@pytest.mark.parametrize("nan_zero", [False, True])
def test_values_equal_the_reference(rule: Rule, nan_zero: bool) -> None:
    boxes1, boxes2 = nasty_boxes(2, 9), nasty_boxes(2, 131, seed=1)  # neither is a multiple of a tile
    actual = kernels.box_iou(boxes1, boxes2, *rule, nan_zero, torch.float32)
    assert_same(actual, reference._reference(boxes1, boxes2, *rule, nan_zero, torch.float32), rule)


@every_mode
def test_values_in_float64(rule: Rule) -> None:
    boxes1, boxes2 = nasty_boxes(5, dtype=torch.float64), nasty_boxes(7, seed=1, dtype=torch.float64)
    actual = kernels.box_iou(boxes1, boxes2, *rule, False, torch.float64)
    assert_same(actual, reference._reference(boxes1, boxes2, *rule, False, torch.float64), rule)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_storage(dtype: torch.dtype) -> None:
    boxes1, boxes2 = real_boxes(5), real_boxes(7, seed=1)
    actual = kernels.box_iou(boxes1, boxes2, *GIOU, False, dtype)
    expected = reference._reference(boxes1, boxes2, *GIOU, False, dtype)
    assert actual.dtype == dtype
    # The interpreter truncates where a GPU rounds to nearest: one unit in the last place.
    torch.testing.assert_close(actual, expected, atol=0, rtol=torch.finfo(dtype).eps)


@every_mode
def test_gradients_equal_the_reference(rule: Rule) -> None:
    boxes1, boxes2 = nasty_boxes(9, finite=True), nasty_boxes(17, seed=1, finite=True)
    compare_gradients(torch.rand(9, 17, device=DEVICE), boxes1, boxes2, rule, nan_zero=True)


def test_gradients_over_several_tiles_of_a_batch() -> None:
    compare_gradients(torch.rand(2, 3, 131, device=DEVICE), nasty_boxes(2, 3, finite=True), nasty_boxes(2, 131, finite=True), GIOU)


@every_mode
def test_gradients_in_float64(rule: Rule) -> None:
    boxes1, boxes2 = real_boxes(5, dtype=torch.float64), real_boxes(7, seed=1, dtype=torch.float64)
    grad = torch.rand(5, 7, dtype=torch.float64, device=DEVICE)
    compare_gradients(grad, boxes1, boxes2, rule)


def test_gradient_of_a_box_that_is_not_finite() -> None:
    boxes1, boxes2 = real_boxes(3), real_boxes(4, seed=1)
    boxes1[1, 2] = math.nan
    grad = torch.ones(3, 4, device=DEVICE)
    for nan_zero in (False, True):
        grad1, grad2 = compare_gradients(grad, boxes1, boxes2, GIOU, nan_zero)
        assert grad1[1].isnan().all() if not nan_zero else not grad1.isnan().any()
        assert grad2.isnan().all() if not nan_zero else not grad2.isnan().any()


def test_strided_boxes_and_gradients() -> None:
    boxes1, boxes2 = real_boxes(9, 2).transpose(0, 1), torch.cat((real_boxes(2, 7, seed=1),) * 2, -1)[..., 4:]
    grad = torch.rand(1, 1, 7, device=DEVICE, dtype=torch.float16).expand(2, 9, 7)
    assert not boxes1.is_contiguous()
    assert_same(
        kernels.box_iou(boxes1, boxes2, *GIOU, False, torch.float32), reference._reference(boxes1, boxes2, *GIOU, False, torch.float32)
    )
    compare_gradients(grad, boxes1, boxes2, GIOU)


@pytest.mark.parametrize("shapes", [((0, 4), (3, 4)), ((3, 4), (0, 4)), ((0, 2, 4), (0, 3, 4)), ((2, 0, 4), (2, 0, 4))], ids=str)
def test_empty(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    boxes1, boxes2 = (torch.zeros(shape, device=DEVICE) for shape in shapes)
    value = kernels.box_iou(boxes1, boxes2, *GIOU, False, torch.float32)
    assert value.shape == (*shapes[0][:-1], shapes[1][-2])
    grad1, grad2 = kernels.box_iou_backward(value, boxes1, boxes2, *GIOU, False, True, True)
    assert_same(grad1, torch.zeros_like(boxes1))
    assert_same(grad2, torch.zeros_like(boxes2))


def test_many_leading_dimensions() -> None:
    boxes1, boxes2 = real_boxes(2, 3, 5), real_boxes(2, 3, 4, seed=1)
    assert_same(
        kernels.box_iou(boxes1, boxes2, *GIOU, False, torch.float32), reference._reference(boxes1, boxes2, *GIOU, False, torch.float32)
    )


def test_every_output_is_written(fill_uninitialised: None) -> None:
    boxes1, boxes2 = real_boxes(9), real_boxes(130, seed=1)
    assert not kernels.box_iou(boxes1, boxes2, *GIOU, False, torch.float32).isnan().any()
    grads = kernels.box_iou_backward(torch.rand(9, 130, device=DEVICE), boxes1, boxes2, *GIOU, False, True, True)
    assert not any(grad.isnan().any() for grad in grads)


@every_mode
def test_ragged(rule: Rule) -> None:
    boxes1, boxes2 = nasty_boxes(13), nasty_boxes(11, seed=1)
    offsets1, offsets2 = torch.tensor([0, 4, 4, 10, 13], device=DEVICE), torch.tensor([0, 5, 7, 7, 11], device=DEVICE)
    arguments = (boxes1, offsets1, boxes2, offsets2, 6, -1.0, *rule, False, torch.float32)
    assert_same(kernels.ragged_box_iou(*arguments), reference._reference_ragged(*arguments), rule)


@pytest.mark.parametrize("offsets", [([-5, 4, 99], [0, 3, 99]), ([0, 9, 3], [7, 2, 5]), ([0], [0]), ([2, 3], [1, 4])], ids=str)
def test_ragged_offsets_out_of_range_are_clamped(offsets: tuple[list[int], list[int]]) -> None:
    boxes1, boxes2 = real_boxes(6), real_boxes(5, seed=1)
    offsets1, offsets2 = (torch.tensor(values, device=DEVICE) for values in offsets)
    arguments = (boxes1, offsets1, boxes2, offsets2, 5, 0.0, *GIOU, False, torch.float32)
    assert_same(kernels.ragged_box_iou(*arguments), reference._reference_ragged(*arguments))


def test_ragged_without_partners() -> None:
    offsets = torch.tensor([0, 0, 0], device=DEVICE)
    result = kernels.ragged_box_iou(
        real_boxes(3), torch.tensor([0, 1, 3], device=DEVICE), real_boxes(0), offsets, 2, 7.0, *GIOU, False, torch.float32
    )
    assert_same(result, torch.full((3, 2), 7.0, device=DEVICE))


@pytest.mark.gpu
def test_on_a_side_stream_and_a_large_matrix() -> None:
    boxes1, boxes2 = real_boxes(3000), real_boxes(1000, seed=1)
    expected = reference._reference(boxes1, boxes2, *GIOU, False, torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = kernels.box_iou(boxes1, boxes2, *GIOU, False, torch.float32)
    stream.synchronize()
    assert_same(actual, expected)
