"""The loss of a DETR-like detector over all layers and images: matching, class loss and box losses, without one host sync."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from no_sync import no_sync
from torch import Tensor

from ssod_fast.criterion import (
    gather_matched,
    matched_box_losses,
    matched_ce_loss,
    matched_focal_loss,
    matched_ia_bce_loss,
    matched_mal_loss,
    matched_vfl_loss,
)
from ssod_fast.ops import match, pack_targets
from ssod_fast.ops.packed_targets import AnyTargets
from ssod_fast.structures import PaddedTargets

LAYERS, BATCH, QUERIES, CLASSES = 4, 3, 24, 5
Loss = Callable[[Tensor, Tensor, AnyTargets], Tensor]


def whole_loss(kind: str, groups: int = 1) -> Loss:
    """loss(logits [L, B, Q, C], boxes [L, B, Q, 4], targets), summed over the layers."""

    def loss(logits: Tensor, boxes: Tensor, targets: AnyTargets) -> Tensor:
        matches = match(logits, boxes, targets, class_mode="softmax" if kind == "ce" else "focal", groups=groups)
        if kind == "focal":
            of_class = matched_focal_loss(logits, targets, matches)
        elif kind == "ce":
            of_class = matched_ce_loss(logits, targets, matches)
        else:
            losses = {"vfl": matched_vfl_loss, "mal": matched_mal_loss, "ia_bce": matched_ia_bce_loss}
            of_class = losses[kind](logits, boxes, targets, matches)
        l1, giou = matched_box_losses(boxes, targets, matches)
        return (of_class + 5 * l1 + 2 * giou).sum()

    return loss


def step_inputs(seed: int = 0, sizes: tuple[int, ...] = (4, 0, 7), device: str = "cpu") -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(LAYERS, BATCH, QUERIES, CLASSES, generator=rng).to(device).requires_grad_()
    boxes = (torch.rand(LAYERS, BATCH, QUERIES, 4, generator=rng) * 0.4 + 0.2).to(device).requires_grad_()
    targets = [
        {
            "labels": torch.randint(0, CLASSES - 1, (n,), generator=rng),
            "boxes": torch.rand(n, 4, generator=rng) * 0.4 + 0.2,
            "weights": torch.rand(n, generator=rng),
        }
        for n in sizes
    ]
    return logits, boxes, targets


KINDS = ["focal", "ce", "vfl", "mal", "ia_bce"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_issues_no_sync(kind: str) -> None:
    logits, boxes, targets = step_inputs()
    with no_sync():
        whole_loss(kind)(logits, boxes, targets).backward()
    assert logits.grad.isfinite().all()
    assert boxes.grad.isfinite().all()
    assert (boxes.grad != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_padded_and_ragged_targets_give_the_same_loss(kind: str) -> None:
    logits, boxes, targets = step_inputs()
    padded = PaddedTargets.from_list(targets, nmax=9)
    losses = [whole_loss(kind)(logits, boxes, t) for t in (targets, padded, pack_targets(targets))]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_a_batch_without_targets() -> None:
    for kind in KINDS:
        logits, boxes, targets = step_inputs(sizes=(0, 0, 0))
        loss = whole_loss(kind)(logits, boxes, targets)
        loss.backward()
        assert loss.isfinite()
        assert (boxes.grad == 0).all()


def test_groups_are_the_sum_of_separate_losses_over_their_number() -> None:
    logits, boxes, targets = step_inputs()
    together = whole_loss("focal", groups=3)(logits, boxes, targets)
    parts = zip(logits.chunk(3, 2), boxes.chunk(3, 2), strict=True)
    torch.testing.assert_close(together, sum(whole_loss("focal")(x, y, targets) for x, y in parts) / 3)


def test_training_on_it_finds_the_targets() -> None:
    logits, boxes, targets = step_inputs()
    targets = [{k: v for k, v in t.items() if k != "weights"} for t in targets]
    logits, raw = logits.detach().requires_grad_(), torch.logit(boxes.detach()).requires_grad_()
    optimizer = torch.optim.Adam([logits, raw], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        whole_loss("focal")(logits, raw.sigmoid(), targets).backward()
        optimizer.step()
    matches = match(logits, raw.sigmoid(), targets)
    packed = pack_targets(targets)
    assert (gather_matched(raw.sigmoid(), matches) - packed.boxes).abs().max() < 0.02
    assert (gather_matched(logits, matches).argmax(-1) == packed.labels).all()


def test_compile() -> None:
    logits, boxes, targets = step_inputs()
    packed = pack_targets(targets)
    loss = lambda x, y: whole_loss("vfl")(x, y, packed)  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(logits, boxes), (logits, boxes))
    torch.testing.assert_close(torch.autograd.grad(compiled(logits, boxes), (logits, boxes)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graph_with_changed_targets(kind: str) -> None:
    """Padded targets keep their shapes, so one captured graph serves every batch."""
    loss_of = whole_loss(kind)
    logits, boxes, first = step_inputs(device="cuda")
    static = PaddedTargets.from_list(first, nmax=9).to("cuda")
    grads = [torch.zeros_like(logits), torch.zeros_like(boxes)]
    value = torch.zeros((), device="cuda")

    def step() -> None:
        loss = loss_of(logits, boxes, static)
        for kept, grad in zip(grads, torch.autograd.grad(loss, (logits, boxes)), strict=True):
            kept.copy_(grad)
        value.copy_(loss.detach())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    _, _, second = step_inputs(seed=1, sizes=(2, 9, 0))
    for targets in (first, second):
        fresh = PaddedTargets.from_list(targets, nmax=9).to("cuda")
        for name in ("boxes", "labels", "scores", "weights", "count"):
            getattr(static, name).copy_(getattr(fresh, name))
        graph.replay()
        cpu = [x.detach().cpu().requires_grad_() for x in (logits, boxes)]
        expected = loss_of(*cpu, PaddedTargets.from_list(targets, nmax=9))
        torch.testing.assert_close(value.cpu(), expected.detach(), atol=1e-4, rtol=1e-4)
        for kept, wanted in zip(grads, torch.autograd.grad(expected, cpu), strict=True):
            torch.testing.assert_close(kept.cpu(), wanted, atol=1e-5, rtol=1e-4)
