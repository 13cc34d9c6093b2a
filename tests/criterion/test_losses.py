from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from criterion_cases import dense_loss, golden, golden_matches, matches_of, on_pairs, random_case
from no_sync import no_sync
from torch import Tensor
from torch.nn import functional as F

from ssod_fast.criterion import (
    matched_box_losses,
    matched_ce_loss,
    matched_focal_loss,
    matched_ia_bce_loss,
    matched_mal_loss,
    matched_vfl_loss,
)
from ssod_fast.ops import PackedTargets, generalized_box_iou, pack_targets
from ssod_fast.ops._matches import Matches
from ssod_fast.structures import PaddedTargets

Loss = Callable[..., Tensor]


def class_loss(name: str) -> Loss:
    """loss(logits, boxes, targets, matches), whatever the loss reads of them."""
    losses: dict[str, Loss] = {
        "focal": lambda x, boxes, *rest, **options: matched_focal_loss(x, *rest, **options),
        "vfl": matched_vfl_loss,
        "mal": matched_mal_loss,
        "ia_bce": matched_ia_bce_loss,
    }
    return losses[name]


GOLDEN = {"focal": 0.7076976735, "vfl": 1.5264402808, "mal": 2.4861676392, "ia_bce": 2.0175937500}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_class_losses(name: str) -> None:
    logits, boxes, targets = golden()
    loss = class_loss(name)(logits, boxes, targets, golden_matches(targets), norm=1.0)
    torch.testing.assert_close(loss, torch.tensor([GOLDEN[name]], dtype=torch.float64), atol=1e-9, rtol=0)


def test_golden_box_and_cross_entropy_losses() -> None:
    logits, boxes, targets = golden()
    matches = golden_matches(targets)
    l1, giou = matched_box_losses(boxes, targets, matches, norm=1.0)
    assert l1.item() == pytest.approx(0.06, abs=1e-12)
    assert giou.item() == pytest.approx(0.4895104895, abs=1e-9)
    with_background = torch.cat([logits, torch.zeros(1, 3, 1, dtype=torch.float64)], -1)
    assert matched_ce_loss(with_background, targets, matches).item() == pytest.approx(0.4424386173, abs=1e-9)
    halved = matched_box_losses(boxes, targets, matches)  # two targets
    torch.testing.assert_close(torch.stack(halved), torch.stack([l1, giou]) / 2)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("entries", [1, 2])
@pytest.mark.parametrize("name", GOLDEN)
def test_equals_the_dense_form(name: str, entries: int, weighted: bool) -> None:
    logits, boxes, targets, matches = random_case(queries=17, entries=entries)
    weights = torch.rand(8, generator=torch.Generator().manual_seed(1)) if weighted else None
    packed = weigh(targets, weights)
    logits.requires_grad_()
    sparse = class_loss(name)(logits, boxes, packed, matches, norm=3.0)
    dense = dense_loss(name, logits, boxes, packed, matches, weights) / 3
    torch.testing.assert_close(sparse, dense, atol=1e-12, rtol=1e-12)
    grads = [torch.autograd.grad((loss * torch.tensor([1.0, -2, 3])).sum(), logits)[0] for loss in (sparse, dense)]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-12)


def weigh(targets: list[dict[str, Tensor]], weights: Tensor | None) -> PackedTargets:
    if weights is None:
        return pack_targets(targets)
    parts = weights.split([len(target["labels"]) for target in targets])
    return pack_targets([{**target, "weights": part} for target, part in zip(targets, parts, strict=True)])


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_equals_the_dense_form(weighted: bool) -> None:
    logits, _, targets, matches = random_case(classes=5)
    targets = [{**target, "labels": target["labels"].clamp(max=3)} for target in targets]
    weights = torch.rand(8, generator=torch.Generator().manual_seed(1)) if weighted else torch.ones(8)
    packed = weigh(targets, weights)
    x = logits.requires_grad_()
    numerator, denominator = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    taken = {(layer, image, query): row for layer, image, query, row in on_pairs(matches, packed)}
    log_p = F.log_softmax(x, -1)
    for layer, image, query in ((a, b, c) for a in range(3) for b in range(3) for c in range(9)):
        row = taken.get((layer, image, query))
        share = 0.0 if row is None else float(weights[row])
        at = log_p[layer, image, query]
        numerator[layer] -= (1 - share) * 0.1 * at[4].detach()
        denominator[layer] += (1 - share) * 0.1 + share
        if row is not None:
            numerator[layer] -= share * at[packed.labels[row]].detach()
    torch.testing.assert_close(matched_ce_loss(x, packed, matches), numerator / denominator, atol=1e-12, rtol=1e-12)


def test_cross_entropy_equals_torch() -> None:
    logits, _, targets, matches = random_case(classes=5)
    targets = [{**target, "labels": target["labels"].clamp(max=3)} for target in targets]
    packed = pack_targets(targets)
    dense = torch.full((3, 3, 9), 4)
    for layer, image, query, row in on_pairs(matches, packed):
        dense[layer, image, query] = packed.labels[row]
    weight = torch.tensor([1.0, 1, 1, 1, 0.1], dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = torch.stack([F.cross_entropy(x.flatten(0, 1), y.flatten(), weight) for x, y in zip(theirs, dense, strict=True)])
    loss = matched_ce_loss(ours, packed, matches)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(*[torch.autograd.grad(a.sum(), b)[0] for a, b in ((loss, ours), (expected, theirs))], atol=1e-12, rtol=1e-12)


def test_box_losses_equal_the_pairwise_diagonal() -> None:
    _, boxes, targets, matches = random_case()
    packed = pack_targets(targets)
    l1, giou = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for layer, image, query, row in on_pairs(matches, packed):
        a, b = boxes[layer, image, query], packed.boxes[row]
        l1[layer] += (a - b).abs().sum()
        giou[layer] += 1 - generalized_box_iou(a[None], b[None], fmt="cxcywh")[0, 0]
    ours = matched_box_losses(boxes, packed, matches)
    torch.testing.assert_close(ours, (l1 / 8, giou / 8), atol=1e-12, rtol=1e-12)


CALLS = [*GOLDEN, "ce", "box"]


def call(name: str, logits: Tensor, boxes: Tensor, targets: object, matches: Matches, **options: object) -> Tensor:
    """Any of the losses, as one tensor [L] or, for the boxes, [2, L]."""
    if name == "box":
        return torch.stack(matched_box_losses(boxes, targets, matches, **options))
    if name == "ce":
        return matched_ce_loss(F.pad(logits, (0, 1)), targets, matches)  # the column of the background
    return class_loss(name)(logits, boxes, targets, matches, **options)


@pytest.mark.parametrize("name", CALLS)
def test_weight_0_is_background(name: str) -> None:
    logits, boxes, targets, matches = random_case()
    weights = torch.ones(8)
    weights[[1, 4]] = 0
    query = matches.query.clone()
    query[..., [1, 4]] = -1
    without = matches_of(query, pack_targets(targets), 9)
    norm = {} if name == "ce" else {"norm": 8.0}
    logits.requires_grad_()
    boxes.requires_grad_()
    losses = call(name, logits, boxes, weigh(targets, weights), matches, **norm), call(name, logits, boxes, targets, without, **norm)
    torch.testing.assert_close(*losses, atol=1e-12, rtol=1e-12)
    wanted = boxes if name == "box" else logits
    torch.testing.assert_close(*[torch.autograd.grad(loss.sum(), wanted)[0] for loss in losses], atol=1e-12, rtol=1e-12)
    assert not torch.allclose(losses[0], call(name, logits, boxes, targets, matches, **norm))


@pytest.mark.parametrize("name", CALLS)
def test_boxes_of_a_target_of_weight_0_hold_anything(name: str) -> None:
    logits, boxes, targets, matches = random_case()
    weights = torch.ones(8)
    weights[[1, 4]] = 0
    packed = weigh(targets, weights)
    wanted = boxes if name == "box" else logits
    wanted.requires_grad_()
    expected = call(name, logits, boxes, packed, matches)
    for value in (torch.nan, torch.inf):
        rows = packed.boxes.clone()
        rows[[1, 4]] = value
        loss = call(name, logits, boxes, dataclasses.replace(packed, boxes=rows), matches)
        assert torch.equal(loss, expected)
        grads = [torch.autograd.grad(x.sum(), wanted, retain_graph=True)[0] for x in (loss, expected)]
        assert torch.equal(*grads)


def test_predicted_boxes_of_a_target_of_weight_0_hold_anything() -> None:
    _, boxes, targets, matches = random_case(layers=1)
    weights = torch.ones(8)
    weights[0] = 0
    packed = weigh(targets, weights)
    expected = matched_box_losses(boxes, packed, matches)
    boxes[0, 0, matches.query[0, 0, 0]] = torch.nan
    losses = matched_box_losses(boxes.requires_grad_(), packed, matches)
    torch.testing.assert_close(losses, expected)
    assert torch.autograd.grad(losses.l1 + losses.giou, boxes)[0].isfinite().all()


@pytest.mark.parametrize("name", ["focal", "ce", "box"])  # the others hold parts constant, which numeric gradients do not
def test_gradcheck(name: str) -> None:
    logits, boxes, targets, matches = random_case(layers=2, queries=6, classes=3, sizes=(2, 1))
    targets = weigh([{**t, "labels": t["labels"].clamp(max=1)} for t in targets], torch.tensor([0.5, 1, 0.25]))
    inputs = (logits.requires_grad_(name != "box"), boxes.requires_grad_(name == "box"))
    assert torch.autograd.gradcheck(lambda x, y: call(name, x, y, targets, matches), inputs)
    if name == "focal":
        assert torch.autograd.gradgradcheck(lambda x: matched_focal_loss(x, targets, matches), logits)


@pytest.mark.parametrize("name", GOLDEN)
def test_second_derivatives(name: str) -> None:
    """What is a constant for the gradient is one for the gradient's gradient too."""
    logits, boxes, targets, matches = random_case()
    logits.requires_grad_()
    losses = call(name, logits, boxes, targets, matches, norm=1.0), dense_loss(name, logits, boxes, pack_targets(targets), matches)
    gradients = [torch.autograd.grad(loss.sum(), logits, create_graph=True)[0] for loss in losses]
    seconds = [torch.autograd.grad(gradient.square().sum(), logits)[0] for gradient in gradients]
    torch.testing.assert_close(*seconds, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    logits, boxes, targets, matches = random_case()
    logits[0, 0, 0, 0], logits[0, 0, 0, 1] = 30, -30  # a sigmoid in half precision would be 1 and 0
    low = [(x.to(dtype)).requires_grad_() for x in (logits, boxes)]
    wide = [x.detach().double().requires_grad_() for x in low]
    narrow = [{**t, "boxes": t["boxes"].float()} for t in targets]
    loss, expected = call(name, *low, narrow, matches), call(name, *wide, narrow, matches)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    i = int(name == "box")
    grad, wanted = (torch.autograd.grad(x.sum(), y[i])[0] for x, y in ((loss, low), (expected, wide)))
    assert grad.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(grad.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("layers", "queries", "sizes"), [(2, 5, (0, 0)), (1, 0, (2, 0)), (2, 4, ()), (0, 3, (1, 2))], ids=str)
def test_empty(name: str, layers: int, queries: int, sizes: tuple[int, ...]) -> None:
    batch, rows = len(sizes), sum(sizes)
    targets = [{"labels": torch.zeros(n, dtype=torch.int64), "boxes": torch.rand(n, 4)} for n in sizes]
    logits = torch.randn(layers, batch, queries, 3, requires_grad=True)
    boxes = torch.rand(layers, batch, queries, 4, requires_grad=True)
    matches = matches_of(torch.full((layers, 1, rows), -1), pack_targets(targets), queries)
    loss = call(name, logits, boxes, targets, matches)
    loss.sum().backward()
    assert loss.shape[-1] == layers
    assert loss.isfinite().all()
    assert all(x.grad is None or x.grad.isfinite().all() for x in (logits, boxes))


@pytest.mark.parametrize("name", CALLS)
def test_padding_and_unmatched_rows_hold_anything(name: str) -> None:
    logits, boxes, targets, matches = random_case(sizes=(3, 0, 2))
    padded = PaddedTargets.from_list([{**t, "boxes": t["boxes"].float()} for t in targets], nmax=4)
    valid = padded.valid
    messy = PaddedTargets(
        boxes=padded.boxes.masked_fill(~valid[..., None], torch.nan),
        labels=padded.labels.masked_fill(~valid, 77),
        scores=padded.scores,
        weights=padded.weights.masked_fill(~valid, torch.nan),
        count=padded.count,
    )
    query = torch.full((3, 1, 12), -1)
    query[..., [0, 1, 2, 8, 9]] = matches.query
    boxes[:, 0, [0]] = boxes[:, 0, [0]]
    spread = matches_of(query, pack_targets(messy), 9)
    inputs = [(x.clone().float().requires_grad_()) for x in (logits, boxes)]
    plain = [(x.clone().float().requires_grad_()) for x in (logits, boxes)]
    loss = call(name, *inputs, messy, spread)
    expected = call(name, *plain, [{**t, "boxes": t["boxes"].float()} for t in targets], matches)
    torch.testing.assert_close(loss, expected)
    i = int(name == "box")
    torch.testing.assert_close(*[torch.autograd.grad(a.sum(), b[i])[0] for a, b in ((loss, inputs), (expected, plain))])


def test_saturated_logits_stay_finite() -> None:
    logits, boxes, targets = golden(torch.float32)
    matches = golden_matches(targets)
    for value in (1e4, -1e4):
        for name in GOLDEN:
            x = torch.full_like(logits, value).requires_grad_()
            loss = class_loss(name)(x, boxes, targets, matches)
            loss.sum().backward()
            assert loss.isfinite().all()
            assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", CALLS)
def test_no_sync(name: str) -> None:
    logits, boxes, targets, matches = random_case()
    packed = weigh(targets, torch.ones(8))
    logits.requires_grad_()
    boxes.requires_grad_()
    with no_sync():
        call(name, logits, boxes, packed, matches).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_compile(name: str, dtype: torch.dtype) -> None:
    logits, boxes, targets, matches = random_case()
    logits, boxes = logits.to(dtype), boxes.to(dtype)
    packed = weigh(targets, torch.rand(8))
    x = boxes.requires_grad_() if name == "box" else logits.requires_grad_()
    loss = lambda a, b: call(name, a, b, packed, matches)  # noqa: E731
    torch._dynamo.reset()  # all cases share one line of code, and its recompilations are counted
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    values = loss(logits, boxes), compiled(logits, boxes)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*[torch.autograd.grad(value.sum(), x)[0] for value in values])
