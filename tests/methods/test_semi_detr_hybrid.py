"""Losses of both matching stages of Semi-DETR against loops over layers, images and targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from no_sync import no_sync
from one_to_many_cases import literal_assign
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from ssod_fast.methods.semi_detr import HybridMatching, MatchingLosses, one_to_many_losses, one_to_one_losses
from ssod_fast.methods.semi_detr.hybrid import assign_one_to_many
from ssod_fast.ops import match, matching_cost
from ssod_fast.structures import PaddedTargets

Target = dict[str, Tensor]


def predictions(
    sizes: tuple[int, ...], queries: int, *, layers: int = 2, classes: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, list[Target]]:
    """Logits and boxes that require grad, half of the boxes near a target, and targets, all cxcywh in shares of the image."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}

    def boxes(*shape: int) -> Tensor:
        size = 0.1 + 0.25 * torch.rand(*shape, 2, **draw)
        return torch.cat([size / 2 + (1 - size) * torch.rand(*shape, 2, **draw), size], -1)

    targets = [{"boxes": boxes(n), "labels": torch.randint(0, classes, (n,), generator=generator)} for n in sizes]
    predicted = boxes(layers, len(sizes), queries)
    for image, target in enumerate(targets):
        if sizes[image]:
            near = torch.randint(0, sizes[image], (layers, queries // 2), generator=generator)
            predicted[:, image, : queries // 2] = target["boxes"][near] + 0.02 * torch.randn(layers, queries // 2, 4, **draw)
    logits = torch.randn(layers, len(sizes), queries, classes, **draw) * 2 - 1
    targets = [{"boxes": t["boxes"].to(dtype), "labels": t["labels"]} for t in targets]
    return logits.to(dtype).requires_grad_(), predicted.to(dtype).requires_grad_(), targets


def literal_one_to_many(logits: Tensor, boxes: Tensor, targets: list[Target]) -> list[Tensor]:
    """Class, L1 and GIoU losses [L] without weights, image by image."""
    terms = []
    for of_layer, at_layer in zip(logits, boxes, strict=True):
        cls, l1, giou, total = [torch.zeros((), dtype=logits.dtype) for _ in range(4)]
        for x, predicted, target in zip(of_layer, at_layer, targets, strict=True):
            corners = {"boxes": box_convert(target["boxes"], "cxcywh", "xyxy"), "labels": target["labels"]}
            xyxy = box_convert(predicted, "cxcywh", "xyxy")
            found, _, _, weight = literal_assign(x.detach().sigmoid(), xyxy.detach(), corners, rule="tal")
            quality, dense = weight.to(x.dtype), torch.zeros_like(x)
            for query in (found >= 0).nonzero()[:, 0].tolist():
                own = found[query]
                dense[query, target["labels"][own]] = quality[query]
                l1 = l1 + quality[query] * (predicted[query] - target["boxes"][own]).abs().sum()
                giou = giou + quality[query] * (1 - generalized_box_iou(xyxy[query, None], corners["boxes"][own, None])[0, 0])
            p = x.sigmoid()
            cls = cls + ((dense - p).abs() ** 2 * F.binary_cross_entropy(p, dense, reduction="none")).sum()
            total = total + quality.sum()
        terms.append(torch.stack([cls, l1, giou]) / total.clamp(min=1))
    return list(torch.stack(terms, 1) + 0 * boxes.sum())


def literal_one_to_one(logits: Tensor, boxes: Tensor, targets: list[Target]) -> list[Tensor]:
    terms = []
    for of_layer, at_layer in zip(logits, boxes, strict=True):
        cls, l1, giou, pairs = torch.zeros(()), torch.zeros(()), torch.zeros(()), 0
        for x, predicted, target in zip(of_layer, at_layer, targets, strict=True):
            p = x.detach().sigmoid()[:, target["labels"]]
            focal = 0.25 * (1 - p) ** 2 * -(p + 1e-12).log() - 0.75 * p**2 * -(1 - p + 1e-12).log()
            xyxy, wanted = box_convert(predicted, "cxcywh", "xyxy"), box_convert(target["boxes"], "cxcywh", "xyxy")
            overlap = generalized_box_iou(xyxy, wanted)
            cost = 2 * focal + 5 * torch.cdist(predicted.detach(), target["boxes"], p=1) - 2 * overlap.detach()
            rows, columns = (torch.as_tensor(index) for index in linear_sum_assignment(cost.numpy()))
            dense = torch.zeros_like(x)
            dense[rows, target["labels"][columns]] = 1
            cls = cls + sigmoid_focal_loss(x, dense).sum()
            l1 = l1 + (predicted[rows] - target["boxes"][columns]).abs().sum()
            giou = giou + (1 - overlap[rows, columns]).sum()
            pairs += len(rows)
        terms.append(torch.stack([cls, l1, giou]) / max(pairs, 1))
    return list(torch.stack(terms, 1) + 0 * boxes.sum())


def assert_equal_with_gradients(found: MatchingLosses, wanted: list[Tensor], leaves: tuple[Tensor, ...], tolerance: float) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, check_dtype=False)
    factors = torch.rand(3, len(wanted[0]), generator=torch.Generator().manual_seed(1))
    totals = [sum((f * term).sum() for f, term in zip(factors, terms, strict=True)) for terms in (found, wanted)]
    for ours, theirs in zip(*[torch.autograd.grad(total, leaves) for total in totals], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sizes", [(3, 5), (0, 4), (0, 0), (1,)])
@pytest.mark.parametrize("queries", [30, 7])
def test_one_to_many_equals_loop(sizes: tuple[int, ...], queries: int) -> None:
    logits, boxes, targets = predictions(sizes, queries)
    found = one_to_many_losses(logits, boxes, PaddedTargets.from_list(targets))
    assert_equal_with_gradients(found, literal_one_to_many(logits, boxes, targets), (logits, boxes), 1e-5)


@pytest.mark.parametrize("sizes", [(3, 5), (0, 4), (0, 0), (9, 1)])
@pytest.mark.parametrize("queries", [30, 7])
def test_one_to_one_equals_loop(sizes: tuple[int, ...], queries: int) -> None:
    logits, boxes, targets = predictions(sizes, queries)
    found = one_to_one_losses(logits, boxes, targets)
    assert_equal_with_gradients(found, literal_one_to_one(logits, boxes, targets), (logits, boxes), 1e-9)


def golden() -> tuple[Tensor, Tensor, list[Target]]:
    """Five queries and two overlapping objects in an image of 100 x 100 pixels."""
    boxes = torch.tensor([[10.0, 10, 50, 50], [12, 10, 52, 50], [21, 10, 61, 50], [30, 10, 70, 50], [80, 80, 90, 90]]) / 100
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.2], [0.9, 0.1], [0.1, 0.8], [0.3, 0.3]])
    targets = [{"boxes": box_convert(boxes[[0, 3]], "xyxy", "cxcywh"), "labels": torch.tensor([0, 1])}]
    return torch.logit(scores)[None, None], box_convert(boxes, "xyxy", "cxcywh")[None, None], targets


def test_golden_assignment() -> None:
    logits, boxes, targets = golden()
    _, assigned = assign_one_to_many(logits, boxes, targets, topk=3)
    # Query 2 has the larger metric for the first object, and goes to the second, which it overlaps more.
    assert assigned.target[0, 0].tolist() == [0, 0, 1, 1, -1]
    torch.testing.assert_close(assigned.iou[0, 0], torch.tensor([1, 0.904762, 0.632653, 1, 0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(assigned.metric[0, 0], torch.tensor([0.9, 0.2742684, 0.0064120, 0.8, 0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(assigned.weight[0, 0], torch.tensor([0.9999999, 0.3047427, 0.0080150, 0.9999999, 0]), rtol=0, atol=1e-6)


def test_golden_losses() -> None:
    logits, boxes, targets = golden()
    found = one_to_many_losses(logits, boxes, targets, topk=3)
    assert found.cls.item() == pytest.approx(1.9777744 / 2.3127575, abs=1e-6)
    losses = HybridMatching(topk=3).losses(logits, boxes, targets, "o2m", prefix="sup_")
    assert losses["sup_loss_cls"].item() == pytest.approx(1.7103172, abs=1e-6)


@pytest.mark.parametrize(("p", "cost"), [(0.5, -0.1732868), (0.9, -2.7971137), (0.1, 0.9309665)])
def test_golden_focal_cost(p: float, cost: float) -> None:
    target = [{"boxes": torch.zeros(1, 4), "labels": torch.zeros(1, dtype=torch.int64)}]
    logit = torch.logit(torch.tensor(p, dtype=torch.float64)).view(1, 1, 1)
    found = matching_cost(logit, torch.zeros(1, 1, 4), target, eps=1e-12, w_class=2, w_box=0, w_giou=0)
    assert found.item() == pytest.approx(cost, abs=1e-6)


@pytest.mark.parametrize("stage", ["o2m", "o2o"])
def test_weights_layers_and_prefix(stage: Any) -> None:
    logits, boxes, targets = predictions((3, 2), 20, layers=3, dtype=torch.float32)
    found = HybridMatching(cls_weight=3.0, l1_weight=7.0, giou_weight=0.5).losses(logits, boxes, targets, stage, prefix="enc_")
    plain = (one_to_many_losses if stage == "o2m" else one_to_one_losses)(logits, boxes, targets)
    for name, weight, term in zip(("cls", "l1", "giou"), (3.0, 7.0, 0.5), plain, strict=True):
        assert found[f"enc_loss_{name}"].item() == pytest.approx(weight * term.sum().item(), rel=1e-6)
    assert len(found) == 3


def coordinate_distances(stage: str, logits: Tensor, boxes: Tensor, targets: list[Target]) -> Tensor:
    """Distance in each of cx, cy, w, h, summed over the pairs of the only image and layer, divided as its loss is: [4]."""
    if stage == "o2m":
        packed, assigned = assign_one_to_many(logits, boxes, targets)
        weight, own = assigned.weight[0, 0], assigned.target[0, 0]
        return (weight[:, None] * (boxes[0, 0] - packed.boxes[own.clamp(min=0)]).abs()).sum(0) / weight.sum().clamp(min=1)
    [(query, target)] = match(logits, boxes, targets, eps=1e-12).pairs()
    return (boxes[0, 0, query] - targets[0]["boxes"][target]).abs().mean(0)


@pytest.mark.parametrize("stage", ["o2m", "o2o"])
def test_one_l1_term_equals_the_three_of_the_official_code(stage: Any) -> None:
    """The term with weight 5, and its parts for the log (centre and size), which that code adds to the loss too."""
    logits, boxes, targets = predictions((4,), 20, layers=1)
    ours = HybridMatching().losses(logits, boxes, targets, stage)["loss_l1"]
    distance = coordinate_distances(stage, logits, boxes, targets)
    official = 5 * distance.sum() + 5 * distance[:2].sum() + 5 * distance[2:].sum()
    torch.testing.assert_close(ours, official, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, boxes)[0], torch.autograd.grad(official, boxes)[0], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(("sizes", "queries"), [((3, 5), 30), ((0, 12, 1), 8)])
def test_one_call_solves_all_layers_and_images_as_scipy_does(sizes: tuple[int, ...], queries: int) -> None:
    logits, boxes, targets = predictions(sizes, queries, layers=6)
    padded = PaddedTargets.from_list(targets)
    costs = matching_cost(logits, boxes, padded, eps=1e-12)  # [L, B, N, Q]
    matches = match(logits, boxes, padded, eps=1e-12)
    for layer in range(6):
        for image, (query, target) in enumerate(matches.pairs(layer)):
            rows, columns = linear_sum_assignment(costs[layer, image, : sizes[image]].T.numpy())
            assert (query.tolist(), target.tolist()) == (rows.tolist(), columns.tolist())


@pytest.mark.parametrize("stage", ["o2m", "o2o"])
def test_layers_of_one_call_equal_calls_per_layer(stage: Any) -> None:
    logits, boxes, targets = predictions((3, 0, 2), 25, layers=3)
    losses = one_to_many_losses if stage == "o2m" else one_to_one_losses
    together = losses(logits, boxes, targets)
    alone = [losses(x, b, targets) for x, b in zip(logits, boxes, strict=True)]
    for name in MatchingLosses._fields:
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(part, name) for part in alone]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("stage", ["o2m", "o2o"])
def test_no_targets_give_a_finite_loss_with_graph(stage: Any) -> None:
    logits, boxes, _ = predictions((0, 0), 20, dtype=torch.float32)
    losses = HybridMatching().losses(logits, boxes, PaddedTargets.empty(2), stage)
    assert losses["loss_l1"].item() == losses["loss_giou"].item() == 0
    assert losses["loss_cls"].item() > 0
    sum(losses.values(), torch.zeros(())).backward()
    assert logits.grad is not None
    assert boxes.grad is not None
    assert logits.grad.isfinite().all()
    assert boxes.grad.abs().sum() == 0


@pytest.mark.parametrize("stage", ["o2m", "o2o"])
def test_more_targets_than_queries(stage: Any) -> None:
    logits, boxes, targets = predictions((12,), 5, dtype=torch.float32)
    losses = HybridMatching().losses(logits, boxes, targets, stage)
    assert all(term.isfinite() for term in losses.values())
    if stage == "o2o":  # five pairs, which the sums are divided by
        assert losses["loss_l1"].item() == pytest.approx(10 * sum(literal_one_to_one(logits, boxes, targets)[1]).item(), rel=1e-5)


@pytest.mark.parametrize("stage", ["o2m", "o2o"])
def test_degenerate_boxes_stay_finite(stage: Any) -> None:
    """A target clipped to a line, one to a point, and predictions without an area."""
    logits, boxes, targets = predictions((3,), 20, dtype=torch.float32)
    targets[0]["boxes"][0, 2], targets[0]["boxes"][1, 2:] = 0, 0
    with torch.no_grad():
        boxes[:, :, 3, 2] = 0
        boxes[:, :, 4, 2:] = 0
        boxes[:, :, 5] = targets[0]["boxes"][1]
    losses = HybridMatching().losses(logits, boxes, targets, stage)
    gradients = torch.autograd.grad(sum(losses.values(), torch.zeros(())), (logits, boxes))
    assert all(t.isfinite().all() for t in (*losses.values(), *gradients))


@pytest.mark.parametrize("stage", ["o2m", "o2o"])
def test_weight_of_a_target(stage: Any) -> None:
    logits, boxes, targets = predictions((2,), 20, layers=1)
    losses = one_to_many_losses if stage == "o2m" else one_to_one_losses

    def weighted(*weights: float) -> MatchingLosses:
        return losses(logits, boxes, [targets[0] | {"weights": torch.tensor(weights, dtype=torch.float64)}])

    whole, none, half = weighted(1, 1), weighted(0, 0), weighted(0.25, 0.25)
    for a, b, c in zip(whole, none, half, strict=True):
        torch.testing.assert_close(0.25 * a + 0.75 * b, c)
    assert none.l1.item() == none.giou.item() == 0


def test_a_coordinate_that_is_not_finite_shows_in_the_box_terms() -> None:
    logits, boxes, targets = predictions((2,), 20, dtype=torch.float32)
    with torch.no_grad():
        boxes[0, 0, 19, 1] = torch.nan
    found = one_to_many_losses(logits, boxes, targets)
    assert found.l1.isnan().tolist() == found.giou.isnan().tolist() == [True, False]


@pytest.mark.parametrize("stage", ["o2m", "o2o"])
def test_saturated_logits_stay_finite(stage: Any) -> None:
    logits, boxes, targets = predictions((3,), 20, dtype=torch.float32)
    extreme = (logits.detach() * 100).requires_grad_()
    losses = HybridMatching().losses(extreme, boxes, targets, stage)
    gradients = torch.autograd.grad(sum(losses.values(), torch.zeros(())), (extreme, boxes))
    assert all(t.isfinite().all() for t in (*losses.values(), *gradients))


@pytest.mark.parametrize("stage", ["o2m", "o2o"])
def test_half_precision_is_computed_in_float32(stage: Any) -> None:
    logits, boxes, targets = predictions((3, 1), 20, dtype=torch.float32)
    rounded = logits.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        low = HybridMatching().losses(rounded, boxes, targets, stage)
    high = HybridMatching().losses(rounded.float(), boxes, targets, stage)
    for name, term in high.items():
        assert low[name].dtype == torch.float32
        torch.testing.assert_close(low[name], term)


@pytest.mark.parametrize("stage", ["o2m", "o2o"])
def test_no_host_sync(stage: Any) -> None:
    logits, boxes, targets = predictions((3, 0), 20, dtype=torch.float32)
    padded = PaddedTargets.from_list(targets)
    with no_sync():
        losses = HybridMatching().losses(logits, boxes, padded, stage)
        sum(losses.values(), torch.zeros(())).backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"l1_weight": -1.0}, ValueError, "l1_weight must be a finite number >= 0, got -1.0"),
        ({"gamma": float("nan")}, ValueError, "gamma must be a finite number >= 0, got nan"),
        ({"cls_weight": "2"}, TypeError, "cls_weight must be a number, got '2'"),
        ({"giou_cost": True}, TypeError, "giou_cost must be a number, got True"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HybridMatching(**options)


def test_bad_input() -> None:
    logits, boxes, targets = predictions((2,), 20)
    with pytest.raises(ValueError, match='stage must be "o2m" or "o2o", got \'o3o\''):
        HybridMatching().losses(logits, boxes, targets, "o3o")  # type: ignore[arg-type]
    targets[0]["labels"][0] = 4
    for stage in ("o2m", "o2o"):
        with pytest.raises(ValueError, match=r"labels of targets must lie in 0 \.\. 3"):
            HybridMatching().losses(logits, boxes, targets, stage)  # type: ignore[arg-type]
