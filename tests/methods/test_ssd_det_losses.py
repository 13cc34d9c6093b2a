"""Scores, losses and merging of SSD-Det: golden cases, properties and edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ssod_fast.methods.ssd_det.losses import (
    focal_form,
    focal_mil_loss,
    instance_scores,
    mil_loss,
    negative_loss,
    overlap_loss,
    own_class,
    regression_loss,
)
from ssod_fast.methods.ssd_det.merge import clip_to_image, merge_boxes, relative_overlaps, usable_boxes
from ssod_fast.ops import neighborhood_boxes, paired_box_iou

F64 = torch.float64


def lin(*shape: int) -> Tensor:
    return (2 * torch.sin(0.7 * torch.arange(math.prod(shape), dtype=F64))).reshape(shape)


HW = torch.tensor([[400.0, 500.0]], dtype=F64)
NOISY = torch.tensor([[100, 60, 180, 160], [0, 0, 80, 100], [10, 20, 40, 90]], dtype=F64)
LABELS = torch.tensor([0, 3, 2])
VALID = torch.ones(3, 10, dtype=torch.bool)
VALID[1, 2] = VALID[1, 4] = False
CLS, INS = lin(3, 10, 5), 1.5 * lin(3, 10, 5).flip(1)


def proposals() -> Tensor:
    found = neighborhood_boxes(NOISY, torch.zeros(3, dtype=torch.int64), HW, ratios=[1, 1.2], shakes=[0.2])
    return found.boxes[:, :10]


def scores(cls: Tensor = CLS, ins: Tensor = INS, valid: Tensor = VALID) -> Tensor:
    return cls.softmax(-1) * instance_scores(ins, valid)


def interior() -> tuple[Tensor, Tensor, Tensor]:
    """Bag, deltas and overlaps of the first box with five ratios."""
    found = neighborhood_boxes(
        NOISY[:1],
        torch.zeros(1, dtype=torch.int64),
        HW,
        ratios=[1, 1.2, 1.3, 0.8, 0.7],
        shakes=[0.2],
        targets_std=(0.1, 0.1, 0.2, 0.2),
        iou=True,
    )
    assert found.targets is not None
    assert found.iou is not None
    return found.boxes, found.targets, found.iou


# Golden values: computed in float64 from the closed form of the released code.


def test_stage_one_golden() -> None:
    s = scores()
    assert 0.25 * mil_loss(s.sum(1), LABELS, VALID.any(1)).item() == pytest.approx(0.8780502589, abs=1e-9)
    own = own_class(s, LABELS)
    torch.testing.assert_close(own.sum(1), torch.tensor([0.038506, 0.054357, 0.141386], dtype=F64), atol=6e-7, rtol=0)
    order = [[1, 3, 5, 8, 7, 0, 9], [1, 3, 8, 5, 6, 7, 0], [9, 0, 2, 4, 7, 6, 5]]
    assert own.topk(7, dim=1).indices.tolist() == order
    merged = clip_to_image(merge_boxes(proposals(), own, NOISY), HW.expand(3, 2))
    expected = [
        [95.95571, 48.95765, 175.95571, 156.69497],
        [0, 0, 73.97097, 93.98287],
        [11.91789, 23.27189, 41.91790, 98.74596],
    ]
    torch.testing.assert_close(merged, torch.tensor(expected, dtype=F64), atol=6e-6, rtol=0)


def test_regression_golden() -> None:
    _, targets, _ = interior()
    assert 0.25 * regression_loss(torch.zeros_like(targets), targets).item() == pytest.approx(0.912252, abs=1e-6)
    means = torch.tensor([0.8, 0.8, 1.024504, 1.024504], dtype=F64)
    torch.testing.assert_close(targets.abs().mean((0, 1)), means, atol=1e-6, rtol=0)


def test_overlap_golden() -> None:
    boxes, _, iou = interior()
    overlaps = paired_box_iou(boxes, NOISY[:1, None])
    torch.testing.assert_close(overlaps, iou)
    wanted = ((overlaps - 0.5) / 0.5)[0, [0, 1, 5, 6, 62, 124]]
    torch.testing.assert_close(wanted, torch.tensor([1, 0.33333, 0.66667, 0.14286, -0.01111, -0.02], dtype=F64), atol=6e-6, rtol=0)
    assert overlaps.mean().item() == pytest.approx(0.5875, abs=5e-5)
    assert overlaps.min().item() == pytest.approx(0.4841, abs=5e-5)
    assert overlap_loss((overlaps - 0.5) / 0.5, overlaps) == 0
    one = overlap_loss((overlaps - 0.5) / 0.5 + torch.eye(125, dtype=F64)[:1] * 3, overlaps)
    assert one.item() == pytest.approx(2.5 / 125)  # smooth L1 with beta 1: 3 - 0.5


def test_focal_golden() -> None:
    half, one, zero = (torch.tensor(v, dtype=F64) for v in (0.5, 1.0, 0.0))
    assert focal_form(half, one).item() == pytest.approx(0.1732863, abs=1e-7)
    assert focal_form(half, zero).item() == pytest.approx(0.25 * -math.log(0.500001), abs=1e-12)
    assert focal_form(one, one) == focal_form(zero, zero) == 0


def test_negative_loss_by_hand() -> None:
    logits = torch.zeros(4, 2, dtype=F64)
    keep, weight = torch.tensor([True, False, True, True]), torch.tensor([0.2, 0.6], dtype=F64)
    expected = 0.4 * (3 * 2 * 0.25 * -math.log(0.500001)) / 2  # three boxes of two classes, divided by two bags
    assert negative_loss(logits, keep, weight).item() == pytest.approx(expected, abs=1e-12)


def test_focal_mil_by_hand() -> None:
    bags = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1]], dtype=F64)
    weight, occupied = torch.tensor([0.5, 0.25, 7.0], dtype=F64), torch.tensor([True, True, False])
    one = 2 * 0.25 * -math.log(0.500001)
    found = focal_mil_loss(bags, torch.tensor([0, 1, 0]), occupied, weight)
    assert found.item() == pytest.approx(0.75 * one / 2, abs=1e-12)


# Properties


def test_order_of_proposals_does_not_matter() -> None:
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    before, after = scores(), scores(CLS[:, order], INS[:, order], VALID[:, order])
    torch.testing.assert_close(after.sum(1), before.sum(1))
    ours = merge_boxes(proposals()[:, order], own_class(after, LABELS), NOISY)
    torch.testing.assert_close(ours, merge_boxes(proposals(), own_class(before, LABELS), NOISY))


def test_constants_on_instance_logits_do_not_matter() -> None:
    torch.testing.assert_close(scores(ins=INS + 5 * lin(3, 1, 5)), scores())


def test_invalid_proposals_have_no_gradient() -> None:
    cls, ins = CLS.clone().requires_grad_(), INS.clone().requires_grad_()
    mil_loss(scores(cls, ins).sum(1), LABELS, VALID.any(1)).backward()
    for grad in (cls.grad, ins.grad):
        assert grad is not None
        assert (grad[~VALID] == 0).all()
        assert (grad[VALID] != 0).any(-1).all()


def test_instance_scores_sum_to_one_whatever_invalid_logits_are() -> None:
    ins = INS.clone()
    ins[1, 2] = 1e4  # an ordinary softmax would leave nothing for the others
    share = instance_scores(ins.float(), VALID)
    torch.testing.assert_close(share.sum(1), torch.ones(3, 5))
    torch.testing.assert_close(share, instance_scores(INS.float(), VALID))


def test_gradients_of_losses() -> None:
    def total(cls: Tensor, ins: Tensor, deltas: Tensor, u: Tensor) -> Tensor:
        s = scores(cls, ins)
        occupied, weight = VALID.any(1), torch.tensor([0.3, 0.2, 0.9], dtype=F64)
        bags = (cls.sigmoid() * instance_scores(ins, VALID)).sum(1)
        rest = regression_loss(deltas, lin(3, 10, 4), weight) + overlap_loss(u, lin(3, 10).sigmoid())
        negatives = negative_loss(cls.flatten(0, 1), VALID.flatten(), weight)
        return mil_loss(s.sum(1), LABELS, occupied) + focal_mil_loss(bags, LABELS, occupied, weight) + rest + negatives

    inputs = [CLS[:, :, :4], INS[:, :, :4], 0.3 + lin(3, 10, 4).flip(1), 0.1 * lin(3, 10)]
    assert torch.autograd.gradcheck(total, [value.clone().requires_grad_() for value in inputs], fast_mode=True)


# Edge cases


def empty_bag() -> Tensor:
    valid = VALID.clone()
    valid[1] = False
    return valid


def test_empty_bags_are_left_out_of_the_classification() -> None:
    valid = empty_bag()
    cls, ins = CLS.clone().requires_grad_(), INS.clone().requires_grad_()
    s = scores(cls, ins, valid)
    assert (s[1] == 0).all()
    loss = mil_loss(s.sum(1), LABELS, valid.any(1))
    alone = mil_loss(s.sum(1)[[0, 2]], LABELS[[0, 2]], valid.any(1)[[0, 2]])
    torch.testing.assert_close(loss, alone)
    official = mil_loss(s.sum(1), LABELS, valid.any(1), mask_empty=False)
    torch.testing.assert_close(official, loss + 100 / 2)
    for value in (loss, official):
        grads = torch.autograd.grad(value, [cls, ins], retain_graph=True)
        assert all((grad[1] == 0).all() and grad.isfinite().all() for grad in grads)


def test_no_bag_at_all() -> None:
    cls, ins = (torch.zeros(0, 10, 5, dtype=F64, requires_grad=True) for _ in range(2))
    nothing = torch.zeros(0, dtype=torch.int64)
    s = scores(cls, ins, VALID[:0])
    deltas = torch.zeros(0, 10, 4, requires_grad=True)
    losses = [
        mil_loss(s.sum(1), nothing, VALID[:0].any(1)),
        focal_mil_loss(s.sum(1), nothing, VALID[:0].any(1), torch.zeros(0, dtype=F64)),
        regression_loss(deltas, deltas.detach()),
        overlap_loss(deltas[..., 0], torch.zeros(0, 10)),
    ]
    assert all(loss == 0 and loss.requires_grad for loss in losses)
    assert merge_boxes(proposals()[:0], s.detach().sum(2), NOISY[:0]).shape == (0, 4)


def test_merging_fewer_proposals_than_it_takes() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [10, 10, 30, 30]]], dtype=F64)
    merged = merge_boxes(boxes, torch.tensor([[1.0, 3.0]], dtype=F64), torch.zeros(1, 4, dtype=F64))
    torch.testing.assert_close(merged, torch.tensor([[7.5, 7.5, 25, 25]], dtype=F64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_merging_falls_back(bad: float) -> None:
    merged = merge_boxes(proposals(), torch.full((3, 10), bad, dtype=F64), NOISY)
    assert torch.equal(merged, NOISY)


def test_a_constant_overlap_chooses_nothing() -> None:
    predicted = torch.tensor([[0.3, 0.3, 0.3], [0.5, -0.5, 0.0], [9.0, 0.2, 0.4], [1.0, 2.0, 3.0]])
    valid = torch.tensor([[True] * 3, [True] * 3, [False, True, True], [False] * 3])
    found = relative_overlaps(predicted, valid)
    torch.testing.assert_close(found[:2], torch.tensor([[1.0, 1, 1], [1, 0, 0.5]]))
    torch.testing.assert_close(found[2, 1:], torch.tensor([0.0, 1.0]))
    assert found.isfinite().all()


def test_boxes_that_no_detector_can_use() -> None:
    hw = torch.tensor([[100.0, 200.0]]).expand(5, 2)
    first = torch.tensor([[1.0, 1, 50, 50]]).repeat(5, 1)
    noisy = torch.tensor([[-5.0, -5, 300, 300]]).repeat(5, 1)
    first[4] = torch.tensor([20.0, 20, 20.5, 80])  # too narrow as well
    boxes = torch.tensor([[-10.0, 5, 30, 130], [60, 60, 60.9, 90], [210, 10, 260, 60], [float("nan"), 0, 9, 9], [5, 5, 5, 5]])
    found = usable_boxes(boxes, hw, first, noisy)
    assert found.tolist() == [[0, 5, 30, 100], [1, 1, 50, 50], [1, 1, 50, 50], [1, 1, 50, 50], [-5, -5, 300, 300]]
