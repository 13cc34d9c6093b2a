"""Gradients of overlaps."""

from __future__ import annotations

import importlib

import pytest
import torch
import torchvision.ops as tv
from box_cases import DEVICES, FORMATS, MODES, integer_boxes, random_boxes, rules, valid_boxes
from conftest import ROOT

from ssod_fast.ops import _overlaps, box_iou
from ssod_fast.ops._boxes import make_rule


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str, fmt: str) -> None:
    boxes1 = valid_boxes(2, 5, dtype=torch.float64).requires_grad_()
    boxes2 = valid_boxes(2, 4, seed=1, dtype=torch.float64).requires_grad_()
    if mode == "ciou":  # its weight alpha is held constant, so finite differences do not apply
        first = torch.autograd.grad(box_iou(boxes1, boxes2, mode=mode, fmt=fmt).sum(), (boxes1, boxes2))
        rule = make_rule(mode, fmt, "zero", None)
        a, b = _overlaps.corners(boxes1, rule).unsqueeze(-1), _overlaps.corners(boxes2, rule).unsqueeze(-2)
        diou = _overlaps.overlaps(a, b, rule._replace(mode=3), nan_zero=False)
        iou = _overlaps.overlaps(a, b, rule._replace(mode=0), nan_zero=False)
        v = 4 / torch.pi**2 * (torch.atan(b.w / b.h) - torch.atan(a.w / a.h)) ** 2
        alpha = (v / (1 - iou + v)).detach()
        second = torch.autograd.grad((diou - alpha * v).sum(), (boxes1, boxes2))
        torch.testing.assert_close(first, second, atol=1e-12, rtol=1e-10)
    else:
        assert torch.autograd.gradcheck(lambda x, y: box_iou(x, y, mode=mode, fmt=fmt), (boxes1, boxes2), atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("mode", "fmt", "eps_mode", "eps"), rules())
def test_gradient_matches_reference(device: str, mode: str, fmt: str, eps_mode: str, eps: float) -> None:
    boxes1 = random_boxes(2, 33, dtype=torch.float64).to(device)
    boxes2 = random_boxes(2, 540, seed=1, dtype=torch.float64).to(device)
    grad = torch.rand(2, 33, 540, dtype=torch.float64, device=device)
    rule = make_rule(mode, fmt, eps_mode, eps)
    for nan_zero in (False, True):
        a, b = _overlaps.corners(boxes1, rule).unsqueeze(-1), _overlaps.corners(boxes2, rule).unsqueeze(-2)
        grad1, grad2 = _overlaps.overlap_gradients(grad, a, b, rule, nan_zero)
        leaf1, leaf2 = boxes1.clone().requires_grad_(), boxes2.clone().requires_grad_()
        value = box_iou(leaf1, leaf2, mode=mode, fmt=fmt, eps_mode=eps_mode, eps=eps, nan="zero" if nan_zero else "propagate")
        actual = torch.autograd.grad(value, (leaf1, leaf2), grad)
        for got, expected in zip(actual, (grad1.sum(-2), grad2.sum(-3)), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10, equal_nan=True)


@pytest.mark.parametrize("mode", ["iou", "giou"])
def test_gradient_equals_torchvision_autograd_at_ties(mode: str) -> None:
    boxes1 = integer_boxes(30).requires_grad_()
    boxes2 = integer_boxes(40, seed=1).requires_grad_()
    weight = torch.rand(30, 40, dtype=torch.float64)
    peer = tv.box_iou if mode == "iou" else tv.generalized_box_iou
    ours = torch.autograd.grad((box_iou(boxes1, boxes2, mode=mode, eps_mode="none") * weight).sum(), (boxes1, boxes2))
    theirs = torch.autograd.grad((peer(boxes1, boxes2) * weight).sum(), (boxes1, boxes2))
    torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=1e-10)


def test_gradient_needs() -> None:
    boxes1, boxes2 = valid_boxes(5), valid_boxes(6, seed=1)
    one = boxes1.clone().requires_grad_()
    box_iou(one, boxes2, mode="giou").sum().backward()  # an expanded incoming gradient
    both = boxes1.clone().requires_grad_(), boxes2.clone().requires_grad_()
    box_iou(*both, mode="giou").backward(torch.ones(6, 5).t())
    assert torch.equal(one.grad, both[0].grad)
    half = boxes1.half().requires_grad_()
    box_iou(half, boxes2, dtype=torch.bfloat16).sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.float16
    empty = torch.zeros(0, 4, requires_grad=True)
    box_iou(empty, boxes2).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 4)
    lone = boxes1.clone().requires_grad_()
    box_iou(lone, torch.zeros(0, 4)).sum().backward()
    assert (lone.grad == 0).all()


def test_gradient_does_not_depend_on_threads() -> None:
    boxes1, boxes2 = valid_boxes(900).requires_grad_(), valid_boxes(700, seed=1).requires_grad_()
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(torch.autograd.grad(box_iou(boxes1, boxes2, mode="giou").sum(), (boxes1, boxes2)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_of_few_rows_and_many_columns_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    peak_bytes = importlib.import_module("machine").peak_bytes
    boxes1, boxes2 = valid_boxes(4).requires_grad_(), valid_boxes(200_000, seed=1).requires_grad_()
    grad = torch.rand(4, 200_000)
    result = box_iou(boxes1, boxes2, mode="giou")

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(result, (boxes1, boxes2), grad, retain_graph=True)

    parts = zip(boxes2.split(1000), grad.split(1000, 1), strict=True)
    few = [torch.autograd.grad(box_iou(boxes1, part, mode="giou"), boxes1, g) for part, g in parts]
    torch.testing.assert_close(backward()[0], torch.stack([g for (g,) in few]).sum(0), rtol=1e-4, atol=1e-4)
    peak = peak_bytes(backward, torch.device("cpu"))
    assert peak is None or peak < 16 * 2**20  # planes, sums and gradients take 11 MiB; column sums for each of six parts take 16 more


def test_double_backward_is_refused() -> None:
    boxes = valid_boxes(3).requires_grad_()
    (grad,) = torch.autograd.grad(box_iou(boxes, valid_boxes(2, seed=1)).sum(), boxes, create_graph=True)
    with pytest.raises(RuntimeError, match="box_iou: double backward is not implemented"):
        grad.sum().backward()
