"""The Triton kernel for the best partners against the reference, see test_box_iou.py."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from triton_samples import DEVICE, EVERY_MODE, assert_same, nasty_boxes, real_boxes, rule_name

from ssod_fast.kernels import box_iou_max as kernels
from ssod_fast.ops._boxes import Rule, make_rule

reference = importlib.import_module("ssod_fast.ops.box_iou_max")
IOU = make_rule("iou", "xyxy", "zero", None)
Offsets = Tensor | None


def compare(boxes1: Tensor, boxes2: Tensor, rule: Rule, offsets1: Offsets = None, offsets2: Offsets = None) -> tuple[Tensor, ...]:
    arguments = (boxes1, boxes2, offsets1, offsets2, *rule, True, True)
    actual = kernels.box_iou_max(*arguments)
    for got, expected in zip(actual, reference._reference(*arguments), strict=True):
        assert_same(got, expected, rule)
    return actual


def test_golden() -> None:
    boxes1 = torch.tensor([(0, 0, 10, 10), (20, 20, 30, 30), (5, 5, 15, 15), (0, 0, 0, 0)], dtype=torch.float32, device=DEVICE)
    boxes2 = boxes1[[0, 2, 0]]
    values1, indices1, values2, indices2 = kernels.box_iou_max(boxes1, boxes2, None, None, *IOU, True, True)
    assert values1.tolist() == [1, 0, 1, 0]
    assert indices1.tolist() == [0, 0, 1, 0]
    assert values2.tolist() == [1, 1, 1]
    assert indices2.tolist() == [0, 2, 0]


@pytest.mark.parametrize("rule", EVERY_MODE, ids=rule_name)
def test_equal_to_the_reference(rule: Rule) -> None:
    compare(nasty_boxes(2, 5), nasty_boxes(2, 7, seed=1), rule)  # integer boxes: many ties


@pytest.mark.parametrize("tiles", [((8, 128), (8, 128)), ((1, 1024), (1, 1024))], ids=["wide", "tall"])
def test_partners_over_several_tiles(tiles: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TILES", tiles)
    boxes1, boxes2 = real_boxes(3), real_boxes(2100, seed=1)
    arguments = (None, None, *IOU, True, False)
    for got, expected in zip(
        kernels.box_iou_max(boxes1, boxes2, *arguments), reference._reference(boxes1, boxes2, *arguments), strict=True
    ):
        assert_same(got, expected)
    values, indices, _, _ = kernels.box_iou_max(boxes2[:2], boxes2[:1].expand(1500, 4), *arguments)
    assert values[0] == 1
    assert indices.tolist() == [0, 0]


def test_nan_is_skipped_and_nothing_left_gives_minus_one() -> None:
    boxes1, boxes2 = real_boxes(3), real_boxes(2, seed=1)
    boxes1[1] = float("nan")
    boxes2[0] = float("inf")
    values1, indices1, values2, indices2 = compare(boxes1, boxes2, IOU)
    assert indices1.tolist() == [1, -1, 1]
    assert values1[1] == 0
    assert indices2[0] == -1
    assert values2[0] == 0


def test_minus_infinity_is_nobodys_best_partner() -> None:
    inverted = torch.tensor([[5.0, 0.0, 3.0, 2.0]], device=DEVICE)  # without a guard its GIoU with itself is 0 - 8 / 0
    values1, indices1, _, _ = compare(inverted, inverted.expand(2, 4), make_rule("giou", "xyxy", "none", None))
    assert values1.tolist() == [0]
    assert indices1.tolist() == [-1]


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)], ids=str)
def test_empty(sizes: tuple[int, int]) -> None:
    values1, indices1, values2, indices2 = compare(real_boxes(2, sizes[0]), real_boxes(2, sizes[1]), IOU)
    for values, indices in ((values1, indices1), (values2, indices2)):
        assert not values.any()
        assert (indices == -1).all()


def test_only_one_direction() -> None:
    boxes1, boxes2 = real_boxes(4), real_boxes(5, seed=1)
    both = kernels.box_iou_max(boxes1, boxes2, None, None, *IOU, True, True)
    rows = kernels.box_iou_max(boxes1, boxes2, None, None, *IOU, True, False)
    columns = kernels.box_iou_max(boxes1, boxes2, None, None, *IOU, False, True)
    assert [tuple(t.shape) for t in rows] == [(4,), (4,), (0,), (0,)]
    assert [tuple(t.shape) for t in columns] == [(0,), (0,), (5,), (5,)]
    for got, expected in zip((*rows[:2], *columns[2:]), both, strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("mode", ["iou", "iof", "ciou"])
def test_ragged(mode: str) -> None:
    offsets1 = torch.tensor([0, 4, 4, 15, 18], device=DEVICE)
    offsets2 = torch.tensor([0, 5, 7, 7, 19], device=DEVICE)  # the third image owns no partners
    compare(nasty_boxes(18), nasty_boxes(19, seed=1), make_rule(mode, "xyxy", "zero", None), offsets1, offsets2)


@pytest.mark.parametrize("offsets", [([-5, 4, 99], [0, 3, 99]), ([0, 9, 3], [7, 2, 5]), ([0], [0]), ([2, 3], [1, 4])], ids=str)
def test_ragged_offsets_out_of_range_are_clamped(offsets: tuple[list[int], list[int]]) -> None:
    compare(real_boxes(6), real_boxes(5, seed=1), IOU, *(torch.tensor(values, device=DEVICE) for values in offsets))


def test_strided_float64() -> None:
    compare(real_boxes(7, 2, dtype=torch.float64).transpose(0, 1), real_boxes(2, 10, seed=1, dtype=torch.float64)[:, ::2], IOU)


@pytest.mark.gpu
def test_many_boxes() -> None:
    compare(real_boxes(5000), real_boxes(700, seed=1), IOU)
