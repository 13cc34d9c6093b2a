"""Matching from predictions to indices against whole matchers, and a loss over all layers against transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from boxes import optional
from harness import MIB, OURS, Call, Case, rotate
from matching import LOOP, RFDETR, TRANSFORMERS, ULTRALYTICS, Matcher, Pairs, Targets, detr_batch, peer_matchers, transformers_loss
from ssod_fast.criterion import HungarianMatcher, matched_box_losses, matched_focal_loss
from ssod_fast.ops import PackedTargets, match, matching_cost, pack_targets

CLASSES = 80
Shape = tuple[int, int, int, int]  # L, B, Q, T
TARGETS = {  # peer time / our time, one thread
    900: {LOOP: 15.0, TRANSFORMERS: 800.0, ULTRALYTICS: 24.0, RFDETR: 25.0},
    300: {LOOP: 21.0, TRANSFORMERS: 220.0, ULTRALYTICS: 12.0, RFDETR: 18.0},
}
FORWARD_TARGETS = {900: {LOOP: 13.0}, 300: {LOOP: 12.0}}
ACROSS_IMAGES = (TRANSFORMERS,)  # seconds per call where images are many: timed once per shape


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """A crowd and COCO-like images."""
    if device.type == "cuda":
        yield from gpu_cases(device, quick)
        return
    shapes = ((1, 2, 40, 10), (1, 2, 30, 4)) if quick else ((1, 16, 900, 100), (1, 16, 300, 20))
    for shape, (targets, of_forward) in zip(shapes, zip(TARGETS.values(), FORWARD_TARGETS.values(), strict=True), strict=True):
        yield match_case(shape, "mixed", device, targets, peak=8 * MIB)
        for kind in ("clustered", "equal"):
            yield match_case(shape, kind, device, {}, without=ACROSS_IMAGES)
        yield forward_case(shape, "mixed", device, of_forward, without=ACROSS_IMAGES)
    yield loss_case((2, 2, 30, 4) if quick else (6, 4, 300, 20), device)


def gpu_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """All decoder layers of a step: alone, with the packing of lists, and the whole loss."""
    shapes = ((2, 2, 30, 4), (2, 2, 40, 10)) if quick else ((7, 16, 300, 20), (7, 16, 900, 100))
    for shape in shapes:
        ceilings = {"ceiling_us": 35.0, "wall_ceiling_us": 80.0} if shape[2] == 300 else {}
        yield match_case(shape, "mixed", device, {}, without=ACROSS_IMAGES, **ceilings)
        yield forward_case(shape, "mixed", device, {LOOP: 100.0} if shape[2] == 300 else {}, without=ACROSS_IMAGES)
    yield loss_case((2, 2, 30, 4) if quick else (6, 16, 300, 20), device)


def match_case(
    shape: Shape,
    kind: str,
    device: torch.device,
    targets: Mapping[str, float],
    without: tuple[str, ...] = (),
    peak: int | None = None,
    **limits: Any,
) -> Case:
    """Costs and assignment of all layers. The targets are packed already; peers take their lists, one layer after the other."""
    inputs = [detr_batch(kind, *shape, CLASSES, device, seed) for seed in range(3)]
    packed = [(logits, boxes, pack_targets(targets)) for logits, boxes, targets in inputs]
    peers = {name: peer for name, peer in peer_matchers().items() if name not in without}
    providers: dict[str, Call] = {OURS: rotate(match, packed)}
    providers |= {name: rotate(by_layer(peer), inputs) for name, peer in peers.items()}
    return Case(
        op="match",
        name=name_of(shape),
        mode="cost + assignment",
        dtype="float32",
        inputs=kind,
        bytes=traffic(shape),
        providers=providers,
        check=lambda: check(*inputs[0], peers if kind != "equal" else {}),
        targets=targets,
        peak_limit=peak,
        note="targets packed before; gate: scipy's indices on our costs, and each peer's pairs cost as much as ours",
        eager_only=tuple(peers),
        **limits,
    )


def forward_case(shape: Shape, kind: str, device: torch.device, targets: Mapping[str, float], without: tuple[str, ...]) -> Case:
    """Lists in; out come the classic lists for one layer, and Matches for several."""
    inputs = [detr_batch(kind, *shape, CLASSES, device, seed) for seed in range(3)]
    peers = {name: peer for name, peer in peer_matchers().items() if name not in without}
    matcher = HungarianMatcher()
    outputs = [({"logits": logits[0], "pred_boxes": boxes[0]}, t) for logits, boxes, t in inputs]
    stacks = [({"logits": logits, "pred_boxes": boxes}, t) for logits, boxes, t in inputs]
    single = shape[0] == 1
    providers: dict[str, Call] = {OURS: rotate(matcher, outputs) if single else rotate(matcher.match, stacks)}
    providers |= {name: rotate(by_layer(peer), inputs) for name, peer in peers.items()}
    return Case(
        op="match",
        name=name_of(shape),
        mode="HungarianMatcher.forward" if single else "HungarianMatcher.match",
        dtype="float32",
        inputs=kind,
        bytes=traffic(shape),
        providers=providers,
        check=lambda: check(*inputs[0], peers),
        targets=targets,
        note="lists of targets in, lists of pairs out" if single else "lists of targets in, one result for all layers out",
        target_timing="wall",
        eager_only=(OURS, *peers),
    )


def loss_case(shape: Shape, device: torch.device) -> Case:
    """Matching, focal loss and box losses of all layers, forward and backward."""
    inputs = [detr_batch("mixed", *shape, CLASSES, device, seed) for seed in range(3)]
    for logits, boxes, _ in inputs:
        logits.requires_grad_()
        boxes.requires_grad_()
    packed = [(logits, boxes, pack_targets(targets)) for logits, boxes, targets in inputs]
    providers: dict[str, Call] = {OURS: rotate(step(our_loss), packed)}
    theirs = transformers_loss(shape[0], CLASSES)
    if theirs is not None:
        providers[TRANSFORMERS] = rotate(step(theirs), inputs)
    return Case(
        op="match",
        name=name_of(shape),
        mode="loss forward+backward",
        dtype="float32",
        inputs="mixed",
        bytes=3 * shape[0] * shape[1] * shape[2] * (CLASSES + 4) * 4,
        providers=providers,
        check=lambda: check_loss(*inputs[0], theirs),
        note="matching, focal loss, L1 and GIoU of every decoder layer",
        eager_only=(TRANSFORMERS,),
    )


def name_of(shape: Shape) -> str:
    return "x".join(map(str, shape if shape[0] > 1 else shape[1:]))


def traffic(shape: Shape) -> int:
    """Bytes: predictions read once, indices and costs written once."""
    layers, batch, queries, targets = shape
    return layers * batch * (queries * (CLASSES + 4) * 4 + targets * 12) + batch * targets * 24


def by_layer(peer: Matcher) -> Callable[[Tensor, Tensor, Targets], list[Pairs]]:
    """A matcher of one layer, called for all of them."""
    return lambda logits, boxes, targets: [peer(x, y, targets) for x, y in zip(logits, boxes, strict=True)]


def our_loss(logits: Tensor, boxes: Tensor, targets: PackedTargets) -> Tensor:
    matches = match(logits, boxes, targets)
    l1, giou = matched_box_losses(boxes, targets, matches)
    return (matched_focal_loss(logits, targets, matches) + 5 * l1 + 2 * giou).sum()


def step(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda logits, boxes, targets: torch.autograd.grad(loss(logits, boxes, targets), (logits, boxes))


def check(logits: Tensor, boxes: Tensor, targets: Targets, peers: Mapping[str, Matcher]) -> None:
    """Our pairs are scipy's on our own costs, which pass the gate of `matching_cost`; the pairs of peers cost as much."""
    scipy = optional("scipy.optimize")
    matches = match(logits, boxes, targets)
    for layer, (x, y) in enumerate(zip(logits, boxes, strict=True)):
        costs = [matching_cost(x[[b]], y[[b]], [target]).double().cpu() for b, target in enumerate(targets)]  # [T, Q] each
        pairs = matches.pairs(layer)
        if scipy is not None:
            for cost, (i, j) in zip(costs, pairs, strict=True):
                rows, columns = scipy.linear_sum_assignment(cost.T.numpy())
                torch.testing.assert_close(i, torch.as_tensor(rows), rtol=0, atol=0)
                torch.testing.assert_close(j, torch.as_tensor(columns), rtol=0, atol=0)
        ours = total(costs, pairs)
        for peer in peers.values():
            torch.testing.assert_close(total(costs, peer(x, y, targets)), ours, rtol=1e-4, atol=1e-4)


def total(costs: list[Tensor], pairs: Pairs) -> Tensor:
    return torch.stack(
        [cost[torch.as_tensor(j).cpu(), torch.as_tensor(i).cpu()].sum() for cost, (i, j) in zip(costs, pairs, strict=True)]
    ).sum()


def check_loss(logits: Tensor, boxes: Tensor, targets: Targets, theirs: Callable[..., Tensor] | None) -> None:
    """Value and gradients against transformers."""
    if theirs is None:
        raise RuntimeError("the gate of the loss compares with transformers: install it")
    value, expected = our_loss(logits, boxes, pack_targets(targets)), theirs(logits, boxes, targets)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(loss, (logits, boxes)) for loss in (value, expected)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
