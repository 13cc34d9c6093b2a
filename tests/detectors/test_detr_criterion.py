"""Matching and losses of DETR against the loops of the papers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from no_sync import no_sync
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou

from ssod_fast.criterion import gather
from ssod_fast.detectors.deformable_detr import criterion as module
from ssod_fast.detectors.deformable_detr.criterion import DETRCriterion, normalised_targets, normalisers, objectness_targets
from ssod_fast.detectors.deformable_detr.denoising import make_denoising
from ssod_fast.structures import PaddedTargets, Target

CLASSES, QUERIES = 4, 9


def boxes(rng: torch.Generator, *shape: int) -> Tensor:
    side = torch.rand(*shape, 2, generator=rng) * 0.3 + 0.05
    return torch.cat([torch.rand(*shape, 2, generator=rng) * 0.6 + 0.2, side], -1)


def scene(sizes: tuple[int, ...] = (3, 0, 5), layers: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, PaddedTargets]:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, len(sizes), QUERIES, CLASSES, generator=rng) * 2
    rows = [Target(boxes=boxes(rng, n), labels=torch.randint(CLASSES, (n,), generator=rng)) for n in sizes]
    return logits, boxes(rng, layers, len(sizes), QUERIES), PaddedTargets.from_list(rows)


def literal_losses(logits: Tensor, boxes: Tensor, targets: PaddedTargets, c: DETRCriterion) -> dict[str, Tensor]:
    """Layer by layer and image by image, the assignment by scipy, in float64."""
    logits, boxes = logits.double(), boxes.double()
    total = max(int(targets.count.sum()), 1)
    found = dict.fromkeys(("loss_cls", "loss_l1", "loss_giou"), torch.zeros((), dtype=torch.float64))
    for layer in range(logits.shape[0]):
        for image, target in enumerate(targets.to_list()):
            x, b, wanted = logits[layer, image], boxes[layer, image], target["boxes"].double()
            p = x.sigmoid()[:, target["labels"]]
            focal = -0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log()
            giou = generalized_box_iou(box_convert(b, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy"))
            cost = c.cls_cost * focal + c.l1_cost * torch.cdist(b, wanted, p=1) - c.giou_cost * giou
            query, row = (torch.from_numpy(i) for i in linear_sum_assignment(cost.detach().numpy()))
            one_hot = torch.zeros_like(x)
            one_hot[query, target["labels"][row]] = target["weights"][row].double()
            both = [_focal(x, torch.full_like(x, value)) for value in (0.0, 1.0)]
            found["loss_cls"] = found["loss_cls"] + c.cls_weight * ((1 - one_hot) * both[0] + one_hot * both[1]).sum() / total
            share = target["weights"][row].double()
            found["loss_l1"] = found["loss_l1"] + c.l1_weight * ((b[query] - wanted[row]).abs().sum(-1) * share).sum() / total
            found["loss_giou"] = found["loss_giou"] + c.giou_weight * ((1 - giou[query, row]) * share).sum() / total
    return found


def _focal(x: Tensor, target: Tensor) -> Tensor:
    p_t = torch.where(target == 1, x.sigmoid(), 1 - x.sigmoid())
    alpha = torch.where(target == 1, 0.25, 0.75).double()
    return alpha * (1 - p_t) ** 2 * F.binary_cross_entropy_with_logits(x, target, reduction="none")


def soft_weights(targets: PaddedTargets) -> PaddedTargets:
    share = torch.linspace(0, 1, targets.nmax).expand_as(targets.weights)
    return dataclasses.replace(targets, weights=torch.where(targets.valid, share, 0))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("sizes", [(3, 0, 5), (0, 0), (12, 1)])  # 12: more objects than queries
def test_losses_and_gradients_are_those_of_the_loops(sizes: tuple[int, ...], soft: bool) -> None:
    logits, predicted, targets = scene(sizes)
    targets = soft_weights(targets) if soft else targets
    criterion = DETRCriterion(cls_weight=1.5, l1_weight=10.0)
    leaves = [logits.double().requires_grad_(), predicted.double().requires_grad_()]
    found, expected = criterion.losses(*leaves, targets), literal_losses(*leaves, targets, criterion)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9)
    grads = [torch.autograd.grad(sum(terms.values()), leaves, allow_unused=True) for terms in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, rtol=1e-5, atol=1e-9)


def test_all_layers_are_matched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    real = module.match
    monkeypatch.setattr(module, "match", lambda *a, **k: (calls.append(a), real(*a, **k))[1])
    DETRCriterion().losses(*scene())
    assert len(calls) == 1
    assert calls[0][0].shape[0] == 3


def test_nothing_waits_for_the_device() -> None:
    logits, predicted, targets = scene()
    logits.requires_grad_()
    pixels = dataclasses.replace(targets, boxes=box_convert(targets.boxes, "cxcywh", "xyxy") * 64)
    hw = torch.full((3, 2), 64.0)

    def step() -> None:
        wanted = normalised_targets(pixels, hw, CLASSES)
        denoising = make_denoising(wanted, CLASSES, number=10)
        norm, dn_norm = normalisers(wanted, denoising)
        terms = DETRCriterion().losses(logits, predicted, wanted, norm=norm)
        size = denoising.labels.shape[1]
        noisy = logits.mean(2, keepdim=True).expand(-1, -1, size, -1)
        terms |= DETRCriterion().denoising_losses(noisy, predicted[:, :, :1].expand(-1, -1, size, -1), denoising, norm=dn_norm)
        sum(terms.values()).backward()

    step()
    with no_sync():
        step()


def test_autocast_computes_in_float32() -> None:
    logits, predicted, targets = scene()
    expected = DETRCriterion().losses(logits.bfloat16().float(), predicted, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = DETRCriterion().losses(logits.bfloat16(), predicted, targets)
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name])


def test_images_without_objects_learn_the_background() -> None:
    logits, predicted, _ = scene((0, 0))
    logits.requires_grad_(), predicted.requires_grad_()
    found = DETRCriterion().losses(logits, predicted, PaddedTargets.empty(2, 1))
    assert found["loss_l1"] == found["loss_giou"] == 0 < found["loss_cls"]
    sum(found.values()).backward()
    assert (logits.grad > 0).all()
    assert (predicted.grad == 0).all()


def test_targets_in_shares_of_the_image() -> None:
    nan, inf = math.nan, math.inf
    rows = [[0, 0, 50, 40], [10, 10, 10, 30], [nan, 0, 5, 5], [20, 10, 60, 30], [0, 0, 9, 9], [0, 0, inf, 9]]
    target = Target(boxes=torch.tensor(rows), labels=torch.tensor([1, 0, 0, 2, 7, 1]), weights=torch.linspace(0.5, 1, 6))
    found = normalised_targets(PaddedTargets.from_list([target]), torch.tensor([[80.0, 100.0]]), 3)
    assert found.count.tolist() == [2]
    expected = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.4, 0.25, 0.4, 0.25]])
    torch.testing.assert_close(found.boxes[0, :2], expected)
    assert found.labels[0, :2].tolist() == [1, 2]
    torch.testing.assert_close(found.weights[0, :2], torch.tensor([0.5, 0.8]))
    assert objectness_targets(found).labels.eq(0).all()


def test_normalisers_are_means_over_ranks_with_one_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, targets = scene((3, 0, 5))
    denoising = make_denoising(targets, CLASSES, number=10)  # 2 groups
    assert [n.item() for n in normalisers(targets, denoising)] == [8, 16]
    assert [n.item() for n in normalisers(PaddedTargets.empty(2, 1))] == [1, 1]
    calls = []

    def other_rank_has_4_and_8(values: Tensor, group: Any = None) -> None:
        calls.append(group)
        values += torch.tensor([4.0, 8.0])

    for name, value in {"is_initialized": lambda: True, "get_world_size": lambda _: 2, "all_reduce": other_rank_has_4_and_8}.items():
        monkeypatch.setattr(gather.dist, name, value)
    assert [n.item() for n in normalisers(targets, denoising)] == [6, 12]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cls_weight": -1.0}, "cls_weight must be a finite number >= 0, got -1.0"),
        ({"l1_cost": math.nan}, "l1_cost must be a finite number >= 0, got nan"),
        ({"gamma": "2"}, "gamma must be a number, got '2'"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ({"cls_cost": 0, "l1_cost": 0, "giou_cost": 0}, "must not all be 0"),
    ],
)
def test_bad_weights_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        DETRCriterion(**options)
