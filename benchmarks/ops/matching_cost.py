"""Matching costs against the cost parts of public matchers: each image with its own targets, or, as most of them do, with all."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou

from harness import MIB, OURS, Call, Case, rotate
from matching import LOOP, RFDETR, TRANSFORMERS, ULTRALYTICS, Matcher, Targets, corners, detr_batch, image_cost, peer_matchers
from ssod_fast.ops import matching_cost, pack_targets

CLASSES = 80
ACROSS = "torch, all images at once"
Batch = tuple[Tensor, Tensor, Targets]
SOLVERS = {  # where each peer looks its solver up: the cost part is the matcher with the solver taken out
    TRANSFORMERS: "transformers.loss.loss_deformable_detr",
    ULTRALYTICS: "ultralytics.models.utils.ops",
    RFDETR: "rfdetr.models.matcher",
}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """A step's matching: COCO-like and crowded images, one layer on a CPU, all seven on a GPU."""
    gpu = device.type == "cuda"
    layers = 7 if gpu and not quick else 1
    shapes = ((2, 60, 7), (2, 40, 4)) if quick else ((16, 900, 100), (16, 300, 20))
    for shape in shapes:
        crowded = shape == shapes[0]
        for kind in ("mixed", "clustered") if crowded else ("mixed",):
            limits = {"targets": {ACROSS: 150.0}, "ceiling_us": 40.0} if gpu and crowded and kind == "mixed" else {}
            yield cost_case(kind, layers, shape, device, "focal", peers=kind == "mixed", **limits)
        yield cost_case("mixed", layers, shape, device, "softmax", peers=False)


def cost_case(kind: str, layers: int, shape: tuple[int, int, int], device: torch.device, mode: str, peers: bool, **limits: Any) -> Case:
    """One class mode on one batch, row keys included; the peak allows for the outputs and little else."""
    batch, queries, targets = shape
    inputs = [detr_batch(kind, layers, batch, queries, targets, CLASSES, device, seed) for seed in range(3)]
    packed = [(logits, boxes, pack_targets(wanted)) for logits, boxes, wanted in inputs]
    entries, predictions = layers * batch * targets * queries, layers * batch * queries
    outputs = 4 * entries + 8 * layers * batch * targets
    providers: dict[str, Call] = {OURS: rotate(lambda x, y, t: matching_cost(x, y, t, class_mode=mode, row_min=True), packed)}
    eager_only: tuple[str, ...] = ()
    if mode == "focal":
        providers[ACROSS] = rotate(all_images, inputs)
        providers[LOOP.removesuffix(" + scipy")] = rotate(one_by_one, inputs)
        found = peer_costs() if peers else {}
        providers |= {name: rotate(call, inputs) for name, call in found.items()}
        eager_only = tuple(found)
    return Case(
        op="matching_cost",
        name=f"{f'{layers}x' if layers > 1 else ''}{batch}x{queries}x{targets}",
        mode=mode,
        dtype="float32",
        inputs=kind,
        bytes=predictions * (4 * CLASSES + 16) + outputs,
        providers=providers,
        check=lambda: check(mode, *inputs[0]),
        peak_limit=outputs + 4 * MIB,
        eager_only=eager_only,
        note="peers compute the costs between all images, or pad targets" if mode == "focal" else "",
        **limits,
    )


def peer_costs() -> dict[str, Callable[[Tensor, Tensor, Targets], None]]:
    """The installed peers, layer by layer, without their solver."""
    return {name: cost_part(matcher, SOLVERS[name]) for name, matcher in peer_matchers().items() if name in SOLVERS}


def no_pairs(*_: Any) -> tuple[list[int], list[int]]:
    """The solver that is put in place of a peer's own."""
    return [], []


def cost_part(matcher: Matcher, module: str) -> Callable[[Tensor, Tensor, Targets], None]:
    """A matcher that finds an empty matching at once."""
    owner = importlib.import_module(module)
    solver = next(name for name in ("linear_sum_assignment", "batch_linear_assignment") if hasattr(owner, name))

    def costs(logits: Tensor, boxes: Tensor, targets: Targets) -> None:
        with mock.patch.object(owner, solver, no_pairs):
            for x, y in zip(logits, boxes, strict=True):
                matcher(x, y, targets)

    return costs


def all_images(logits: Tensor, boxes: Tensor, targets: Targets) -> list[Tensor]:
    """[B·Q, G] per layer: the operations of transformers' matcher, without its copy to the host."""
    labels, truth = torch.cat([t["labels"] for t in targets]), torch.cat([t["boxes"] for t in targets])
    return [image_cost(x.flatten(0, 1), y.flatten(0, 1), labels, truth) for x, y in zip(logits, boxes, strict=True)]


def one_by_one(logits: Tensor, boxes: Tensor, targets: Targets) -> list[list[Tensor]]:
    """[Q, T] per layer and image."""
    return [
        [image_cost(x, y, t["labels"], t["boxes"]) for x, y, t in zip(*layer, targets, strict=True)]
        for layer in zip(logits, boxes, strict=True)
    ]


def check(mode: str, logits: Tensor, boxes: Tensor, targets: Targets) -> None:
    """Within 1e-4 of a composition in float64, and keys that name the minimum at its lowest query."""
    cost, keys = matching_cost(logits, boxes, targets, class_mode=mode, row_min=True)  # type: ignore[call-overload]
    parts = cost.split([len(t["labels"]) for t in targets], 1)
    for layer, (x, y) in enumerate(zip(logits.double(), boxes.double(), strict=True)):
        for image, target in enumerate(targets):
            theirs = target["boxes"].double()
            if mode == "focal":
                expected = image_cost(x[image], y[image], target["labels"], theirs)
            else:
                giou = generalized_box_iou(corners(y[image]), corners(theirs))
                expected = 5 * torch.cdist(y[image], theirs, p=1) - 2 * x[image].softmax(-1)[:, target["labels"]] - 2 * giou
            torch.testing.assert_close(parts[image][layer].T.double(), expected, atol=1e-4, rtol=0)
    least = cost.amin(-1, keepdim=True)
    torch.testing.assert_close(keys & 0xFFFFFFFF, (cost == least).to(torch.uint8).argmax(-1), atol=0, rtol=0)
