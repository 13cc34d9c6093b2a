"""Matched pairs: the loss form against torch.diag of a pairwise matrix and against torchvision's losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from boxes import box_sets, torchvision_loss, torchvision_pairwise
from harness import OURS, Call, Case, rotate
from ssod_fast.ops import paired_box_iou, paired_iou_loss

DIAG = "torch.diag of torchvision"
LOSS = "torchvision loss"
NOTHING = "autograd.Function that computes nothing"
Loss = Callable[[Tensor, Tensor], Tensor]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """1600 pairs are a DETR head's matches over 6 layers and 16 images, 11200 those of a dense head."""
    few, many = (160, 1120) if quick else (1600, 11200)
    gpu = device.type == "cuda"
    forward, both, large = ({}, {DIAG: 60}, {}) if gpu else ({DIAG: 4000}, {DIAG: 7500, LOSS: 11}, {LOSS: 18})
    yield paired_case("giou", few, "uniform", device, forward, ceiling=None if gpu else 13)
    yield paired_case("giou", few, "uniform", device, both, backward=True, ceiling=6 if gpu else None, wall_ceiling=60)
    for kind in ("disjoint", "equal"):
        yield paired_case("giou", few, kind, device, both, backward=True)
    yield paired_case("giou", many, "uniform", device, large, backward=True, diag=False)
    for mode in ("diou", "ciou"):
        yield paired_case(mode, many, "uniform", device, {}, backward=True, diag=False)


def paired_case(
    mode: str,
    count: int,
    inputs: str,
    device: torch.device,
    targets: Mapping[str, float],
    *,
    backward: bool = False,
    diag: bool = True,
    ceiling: float | None = None,
    wall_ceiling: float | None = None,
) -> Case:
    """Overlap of `count` pairs, or the summed loss 1 - overlap with its gradient to the predicted boxes."""
    pairs = box_sets(inputs, (count,), (count,), device)
    if backward:
        for predicted, _ in pairs:
            predicted.requires_grad_()
    functions = (loss_functions if backward else overlap_functions)(mode, diag)
    run = step if backward else (lambda function: function)
    providers: dict[str, Call] = {name: rotate(run(function), pairs) for name, function in functions.items()}
    return Case(
        op="paired_box_iou",
        name=str(count),
        mode=f"{mode} forward+backward" if backward else mode,
        dtype="float32",
        inputs=inputs,
        bytes=count * (72 + 16 if backward else 36),
        providers=providers,
        check=lambda: check(mode, *pairs[0]),
        targets=targets,
        ceiling_us=ceiling,
        wall_ceiling_us=wall_ceiling,
        note="gradient to the predicted boxes; the loss is summed" if backward else "",
        eager_only=(LOSS,),  # it indexes with a mask
    )


def step(function: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss and its gradient."""
    return lambda predicted, target: torch.autograd.grad(function(predicted, target), predicted)[0]


def overlap_functions(mode: str, diag: bool) -> dict[str, Loss]:
    """Providers of the overlaps [N]; torchvision has none but its losses."""
    functions: dict[str, Loss] = {OURS: lambda a, b: paired_box_iou(a, b, mode=mode)}  # type: ignore[arg-type]
    pairwise, loss = torchvision_pairwise(mode), torchvision_loss(mode)
    if diag and pairwise is not None:
        functions[DIAG] = lambda a, b: torch.diag(pairwise(a, b))
    if loss is not None:
        functions[LOSS] = lambda a, b: loss(a, b, reduction="none")
    return functions


def loss_functions(mode: str, diag: bool) -> dict[str, Loss]:
    """Providers of the summed loss."""
    functions: dict[str, Loss] = {OURS: lambda a, b: paired_iou_loss(a, b, mode=mode, reduction="sum")}  # type: ignore[arg-type]
    pairwise, loss = torchvision_pairwise(mode), torchvision_loss(mode)
    if diag and pairwise is not None:
        functions[DIAG] = lambda a, b: (1 - torch.diag(pairwise(a, b))).sum()
    if loss is not None:
        functions[LOSS] = lambda a, b: loss(a, b, reduction="sum")
    functions[NOTHING] = lambda a, b: (1 - Nothing.apply(a)).sum()
    return functions


class Nothing(torch.autograd.Function):
    """What torch takes for the form of our call, without its work: the least that any Python autograd.Function can reach."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor) -> Tensor:
        ctx.shape = boxes.shape
        return boxes.new_zeros(boxes.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.new_zeros(ctx.shape)


def check(mode: str, predicted: Tensor, target: Tensor) -> None:
    """Value and gradient against torchvision's loss in float64."""
    loss = torchvision_loss(mode)
    if loss is None:
        raise RuntimeError("the gate of paired_box_iou compares with torchvision: install it")
    ours = predicted.detach().clone().requires_grad_()
    wide = predicted.detach().double().requires_grad_()
    value, expected = paired_iou_loss(ours, target, mode=mode, reduction="none"), loss(wide, target.double())  # type: ignore[arg-type]
    torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-5)
    gradient, wanted = torch.autograd.grad(value.sum(), ours)[0], torch.autograd.grad(expected.sum(), wide)[0]
    torch.testing.assert_close(gradient.double(), wanted, atol=1e-6, rtol=1e-4)
