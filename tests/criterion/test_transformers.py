"""Matchers and losses of transformers against ours, through their own classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from no_sync import no_sync
from torch import Tensor, nn

from ssod_fast.criterion import (
    HungarianMatcher,
    matched_box_losses,
    matched_ce_loss,
    matched_focal_loss,
    matched_ia_bce_loss,
    matched_mal_loss,
    matched_vfl_loss,
)
from ssod_fast.ops import matching_cost

deformable = pytest.importorskip("transformers.loss.loss_deformable_detr")
deimv2 = pytest.importorskip("transformers.loss.loss_deimv2")
detr = pytest.importorskip("transformers.loss.loss_for_object_detection")
lw_detr = pytest.importorskip("transformers.loss.loss_lw_detr")
rt_detr = pytest.importorskip("transformers.loss.loss_rt_detr")

CLASSES = 20
Targets = list[dict[str, Tensor]]
RT_DETR = SimpleNamespace(
    matcher_class_cost=2, matcher_bbox_cost=5, matcher_giou_cost=2, use_focal_loss=True, matcher_alpha=0.25, matcher_gamma=2.0
)


def predictions(queries: int, sizes: tuple[int, ...], seed: int, layers: int = 1) -> tuple[Tensor, Tensor, Targets]:
    """[L, B, Q, C] and [L, B, Q, 4]: untrained queries, and duplicates of each target as a trained model makes them."""
    rng = torch.Generator().manual_seed(seed)
    batch = len(sizes)
    logits = torch.randn(layers, batch, queries, CLASSES, generator=rng) - 2
    boxes = torch.cat(
        [torch.rand(layers, batch, queries, 2, generator=rng), torch.rand(layers, batch, queries, 2, generator=rng) * 0.3], -1
    )
    targets = []
    for image, n in enumerate(sizes):
        wanted = torch.cat([torch.rand(n, 2, generator=rng), torch.rand(n, 2, generator=rng) * 0.3 + 0.02], -1)
        labels = torch.randint(0, CLASSES, (n,), generator=rng)
        targets.append({"class_labels": labels, "boxes": wanted})
        if seed % 2:
            near = torch.randint(0, queries, (3 * n,), generator=rng)
            boxes[:, image, near] = (wanted.repeat(3, 1) + torch.randn(layers, 3 * n, 4, generator=rng) * 0.01).clamp(1e-3, 1)
            logits[:, image, near, labels.repeat(3)] += 4
    return logits, boxes, targets


MATCHERS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "deformable": (lambda: deformable.DeformableDetrHungarianMatcher(2, 5, 2), (), {}),
    "rt_detr": (lambda: rt_detr.RTDetrHungarianMatcher(RT_DETR), (), {}),
    "detr": (lambda: detr.HungarianMatcher(1, 5, 2), (), {"cost_class": 1, "class_mode": "softmax"}),
    "lw_detr": (lambda: lw_detr.LwDetrHungarianMatcher(2, 5, 2), (3,), {"groups": 3}),
}


@pytest.mark.parametrize("name", MATCHERS)
def test_matchers_agree(name: str) -> None:
    make, extra, options = MATCHERS[name]
    theirs, ours, equal, total = make(), HungarianMatcher(**options), 0, 0
    cost_options = {"w_class": options.get("cost_class", 2.0), "class_mode": options.get("class_mode", "focal")}
    for seed in range(12):
        logits, boxes, targets = predictions(150, (12, 0, 35, 1), seed)
        outputs = {"logits": logits[0], "pred_boxes": boxes[0]}
        found, expected = ours(outputs, targets), theirs(outputs, targets, *extra)
        assert [tuple(map(len, pair)) for pair in found] == [tuple(map(len, pair)) for pair in expected]
        for image, ((i, j), (k, m)) in enumerate(zip(found, expected, strict=True)):
            assert i.dtype == k.dtype == torch.int64
            cost = matching_cost(logits[0, [image]], boxes[0, [image]], [targets[image]], **cost_options)  # [T, Q]
            torch.testing.assert_close(cost[j, i].sum(), cost[m, k].sum(), rtol=1e-4, atol=1e-4)
            equal += int(((i == k) & (j == m)).sum())
            total += len(i)
    assert equal >= 0.999 * total


def test_more_targets_than_queries() -> None:
    logits, boxes, targets = predictions(8, (12, 8, 3), 0)
    outputs = {"logits": logits[0], "pred_boxes": boxes[0]}
    found, expected = HungarianMatcher()(outputs, targets), deformable.DeformableDetrHungarianMatcher(2, 5, 2)(outputs, targets)
    assert all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


def test_invalid_predictions_do_not_attract_targets() -> None:
    """As transformers has it: a pair on an invalid cost appears only if nothing else is left."""
    logits, boxes, targets = predictions(20, (5,), 1)
    logits[0, 0, ::2] = torch.nan
    outputs = {"logits": logits[0], "pred_boxes": boxes[0]}
    ((ours, _),) = HungarianMatcher()(outputs, targets)
    ((theirs, _),) = deformable.DeformableDetrHungarianMatcher(2, 5, 2)(outputs, targets)
    assert torch.equal(ours, theirs)
    assert (ours % 2 == 1).all()


def criterion(name: str) -> nn.Module:
    """A loss class of transformers without its matcher."""
    if name == "focal":
        return deformable.DeformableDetrImageLoss(None, CLASSES, 0.25, [])
    if name == "ce":
        return detr.ImageLoss(None, CLASSES, 0.1, [])
    if name == "ia_bce":
        return lw_detr.LwDetrImageLoss(None, CLASSES, 0.25, [], 3)
    weights = ("vfl", "mal", "bbox", "giou", "fgl", "ddf")
    config = SimpleNamespace(
        **vars(RT_DETR),
        **{f"weight_loss_{key}": 1 for key in weights},
        num_labels=CLASSES,
        eos_coefficient=0.1,
        focal_loss_alpha=0.75,
        focal_loss_gamma=1.5 if name == "mal" else 2.0,
        max_num_bins=32,
        reg_scale=4.0,
        up=0.5,
        mal_alpha=None,
        use_dense_one_to_one=False,
    )
    return deimv2.Deimv2Loss(config) if name == "mal" else rt_detr.RTDetrLoss(config)


THEIRS = {"focal": "loss_labels", "ce": "loss_labels", "ia_bce": "loss_labels", "vfl": "loss_labels_vfl", "mal": "loss_labels_mal"}
OURS: dict[str, Any] = {
    "focal": lambda x, boxes, *rest: matched_focal_loss(x, *rest),
    "ce": lambda x, boxes, *rest: matched_ce_loss(x, *rest),
    "ia_bce": matched_ia_bce_loss,
    "vfl": matched_vfl_loss,
    "mal": matched_mal_loss,
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", THEIRS)
def test_class_losses_agree(name: str, seed: int) -> None:
    groups = 3 if name == "ia_bce" else 1
    logits, boxes, targets = predictions(60, (7, 0, 15), seed)
    if name == "ce":
        logits = torch.cat([logits, torch.zeros_like(logits[..., :1])], -1)
    matcher = HungarianMatcher(groups=groups, class_mode="softmax" if name == "ce" else "focal")
    leaves = [(logits.clone().requires_grad_(), boxes.clone().requires_grad_()) for _ in range(2)]
    matches = matcher.match({"logits": logits, "pred_boxes": boxes}, targets)
    loss = OURS[name](*leaves[0], targets, matches)[0]
    outputs = {"logits": leaves[1][0][0], "pred_boxes": leaves[1][1][0]}
    (expected,) = getattr(criterion(name), THEIRS[name])(outputs, targets, matches.pairs(), 22.0 * groups).values()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(value, leaf)[0] for value, (leaf, _) in zip((loss, expected), leaves, strict=True)]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)


def test_box_losses_agree() -> None:
    logits, boxes, targets = predictions(60, (7, 0, 15), 1)
    matches = HungarianMatcher().match({"logits": logits, "pred_boxes": boxes}, targets)
    expected = criterion("vfl").loss_boxes({"pred_boxes": boxes[0]}, targets, matches.pairs(), 22.0)
    l1, giou = matched_box_losses(boxes, targets, matches)
    torch.testing.assert_close(l1[0], expected["loss_bbox"])
    torch.testing.assert_close(giou[0], expected["loss_giou"], atol=1e-6, rtol=1e-5)


def test_whole_loss_of_deformable_detr() -> None:
    """All layers at once give what transformers sums up layer by layer."""
    logits, boxes, targets = predictions(60, (7, 0, 15), 1, layers=4)
    leaves = [(logits.clone().requires_grad_(), boxes.clone().requires_grad_()) for _ in range(2)]
    config = SimpleNamespace(
        class_cost=2, bbox_cost=5, giou_cost=2, num_labels=CLASSES, focal_alpha=0.25, auxiliary_loss=True, decoder_layers=4,
        bbox_loss_coefficient=5, giou_loss_coefficient=2,
    )  # fmt: skip
    x, y = leaves[1]
    expected, _, _ = deformable.DeformableDetrForObjectDetectionLoss(x[-1], targets, "cpu", y[-1], config, x, y)
    x, y = leaves[0]
    with no_sync():
        matches = HungarianMatcher().match({"logits": x, "pred_boxes": y}, targets)
        l1, giou = matched_box_losses(y, targets, matches)
        loss = (matched_focal_loss(x, targets, matches) + 5 * l1 + 2 * giou).sum()
        loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    expected.backward()
    for ours, theirs in zip(*leaves, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)
