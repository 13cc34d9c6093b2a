"""The Triton kernels of one-to-many assignment against the reference and, where it is built, the C++ kernel."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_samples import DEVICE, assert_as_implemented

from ssod_fast.kernels import one_to_many_assign as kernels
from ssod_fast.ops._one_to_many import CONFLICTS, RULES, Options, make_options

reference = importlib.import_module("ssod_fast.ops.one_to_many_assign")
every_rule = pytest.mark.parametrize("rule", RULES)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples then take several blocks."""
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(kernels, "SUM_CLASSES", 2)


def make_rule(rule: str, batch: int, queries: int, **changes: Any) -> Options:
    options: dict[str, Any] = dict.fromkeys(
        ("topk", "final_topk", "alpha", "beta", "eps", "min_side", "levels", "from_logits", "dynamic_k", "conflict")
    )
    return make_options(rule, batch, queries, **{**options, "box_format": "xyxy", "keep_one": False, **changes})


def sample(rule: str, shape: tuple[int, int, int, int], rows: int, *, whole: bool = False, seed: int = 0) -> list[Tensor | None]:
    """Scores, boxes, labels, targets of one image after the other, offsets, no counts, priors and no sizes; `whole` boxes make ties."""
    generator = torch.Generator().manual_seed(seed)

    def make(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    layers, batch, queries, classes = shape
    scores, boxes, targets = make(layers, batch, queries, classes), make(layers, batch, queries, 4) * 50, make(rows, 4) * 50
    if whole:
        scores, boxes, targets = (scores * 4).round() / 4, boxes.round(), targets.round()
    for t in (boxes, targets):
        t[..., 2:] = t[..., :2] + t[..., 2:] * 0.6 + 20
    if rule == "soft_label":
        scores = (scores - 0.5) * 8
    priors = torch.cat([make(queries, 2) * 70 + 5, torch.full((queries, 2), 8.0)], 1)
    labels = torch.randint(0, max(classes, 1), (rows,), generator=generator)
    offsets = torch.linspace(0, rows, batch + 1).long()
    return [t if t is None else t.to(DEVICE) for t in (scores, boxes, labels, targets, offsets, None, priors, None)]


def compare(inputs: list[Tensor | None], options: Options) -> tuple[Tensor, ...]:
    actual = kernels.one_to_many_assign(*inputs, *options)  # type: ignore[arg-type]
    assert_as_implemented(actual, reference._reference, reference._op, (*inputs, *options), ulps=64)
    return actual


def test_golden() -> None:
    boxes = torch.tensor([(10.0, 10, 50, 50), (12, 10, 52, 50), (21, 10, 61, 50), (30, 10, 70, 50), (80, 80, 90, 90)], device=DEVICE)
    scores = torch.tensor([(0.9, 0.1), (0.5, 0.2), (0.9, 0.1), (0.1, 0.8), (0.3, 0.3)], device=DEVICE)
    ends = torch.tensor([0, 2], device=DEVICE)
    rest = (torch.tensor([0, 1], device=DEVICE), boxes[[0, 3]], ends, None, None, None)
    arguments = (scores[None, None], boxes[None, None], *rest)
    for topk in (3, 13):
        target, metric, _, weight, count = kernels.one_to_many_assign(*arguments, *make_rule("tal", 1, 5, topk=topk))
        assert target.tolist() == [[[0, 0, 1, 1, -1]]]
        torch.testing.assert_close(metric[0, 0].cpu(), torch.tensor([0.9, 0.2742684, 0.0064120, 0.8, 0]), atol=1e-6, rtol=0)
        torch.testing.assert_close(weight[0, 0].cpu(), torch.tensor([0.9999999, 0.3047427, 0.0080150, 0.9999999, 0]), atol=1e-6, rtol=0)
        assert count.tolist() == [[2, 2]]


@every_rule
@pytest.mark.parametrize("whole", [False, True], ids=["distinct", "tied"])
def test_equal_to_the_reference(rule: str, whole: bool) -> None:
    inputs = sample(rule, (1, 2, 20, 3), 5, whole=whole)
    target, *_ = compare(inputs, make_rule(rule, 2, 20))
    if not whole:
        assert 0 < int((target >= 0).sum()) < target.numel()


@every_rule
def test_without_priors_and_with_logits(rule: str) -> None:
    inputs = sample(rule, (2, 1, 10, 3), 2, seed=1)
    if rule in ("tal", "atss"):
        inputs[6] = None
    compare(inputs, make_rule(rule, 1, 10, from_logits=True))


@pytest.mark.parametrize("rule", ["tal", "simota", "atss"])
@pytest.mark.parametrize("conflict", CONFLICTS)
def test_conflicts(rule: str, conflict: str) -> None:
    inputs = sample(rule, (1, 1, 20, 1), 4, whole=True, seed=2)
    inputs[3] = inputs[3][[0, 0, 1, 2]]  # type: ignore[index] # equal targets contend
    compare(inputs, make_rule(rule, 1, 20, conflict=conflict))


@every_rule
def test_steps_that_options_add(rule: str) -> None:
    inputs = sample(rule, (1, 2, 20, 3), 5, seed=3)
    inputs[1], inputs[7] = inputs[1] / 50, torch.tensor([[40.0, 50], [50, 40]], device=DEVICE)  # type: ignore[operator]
    options = {"levels": [3, 0, 17]} if rule == "atss" else {"dynamic_k": True}
    compare(inputs, make_rule(rule, 2, 20, final_topk=1, keep_one=True, box_format="cxcywh", **options))


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (0.5, 2.3), (7.0, 64.0), (1.7, 0.5)])
def test_exponents(alpha: float, beta: float) -> None:
    compare(sample("tal", (1, 1, 12, 3), 2), make_rule("tal", 1, 12, alpha=alpha, beta=beta))


@every_rule
def test_input_that_is_not_finite_takes_part_in_no_pair(rule: str) -> None:
    inputs = sample(rule, (1, 2, 12, 3), 6, seed=4)
    scores, boxes, labels, targets = inputs[:4]
    assert scores is not None and boxes is not None and labels is not None and targets is not None  # noqa: PT018
    scores[0, 0, 0], boxes[0, 0, 1, 2], boxes[0, 1, 3] = math.nan, math.inf, math.nan
    targets[0, 1], labels[1], labels[5] = math.nan, -1, 3
    if rule == "atss":
        inputs[0] = None
    _, _, _, _, count = compare(inputs, make_rule(rule, 2, 12))
    assert count[0, 0] == 0
    if rule != "atss":
        assert count[0, [1, 5]].tolist() == [0, 0]


@pytest.mark.parametrize("counts", [[3, 0], [1, 9], None], ids=str)
def test_padded_targets(counts: list[int] | None) -> None:
    inputs = sample("tal", (1, 2, 20, 3), 6)
    inputs[4:6] = [None, None if counts is None else torch.tensor(counts, device=DEVICE)]
    compare(inputs, make_rule("tal", 2, 20, keep_one=True))


@every_rule
@pytest.mark.parametrize(("batch", "queries", "rows"), [(0, 5, 0), (2, 0, 3), (2, 5, 0), (1, 1, 1)])
def test_empty_and_single(rule: str, batch: int, queries: int, rows: int) -> None:
    compare(sample(rule, (1, batch, queries, 3), rows), make_rule(rule, batch, queries, levels=[queries] if rule == "atss" else None))


def test_strided_input() -> None:
    inputs = sample("tal", (3, 2, 20, 4), 2)
    scores, boxes = inputs[:2]
    assert scores is not None and boxes is not None  # noqa: PT018
    inputs[:2], inputs[6] = [scores.transpose(0, 2)[::2].transpose(0, 2), boxes[:, :, ::2]], None
    compare(inputs, make_rule("tal", 2, 10))


@pytest.mark.gpu
@every_rule
def test_many_queries(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 512)
    target, _, _, _, count = kernels.one_to_many_assign(*sample(rule, (2, 4, 5000, 80), 60), *make_rule(rule, 4, 5000))  # type: ignore[arg-type]
    expected = reference._reference(*sample(rule, (2, 4, 5000, 80), 60), *make_rule(rule, 4, 5000))
    assert (target == expected[0]).double().mean() > 0.999  # logarithms of a GPU may order equal costs otherwise
    assert abs(int(count.sum()) - int(expected[4].sum())) <= 0.01 * int(expected[4].sum())


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["simota", "soft_label"])
def test_more_images_than_a_second_axis_holds(rule: str) -> None:
    compare(sample(rule, (1, 70000, 2, 3), 4), make_rule(rule, 70000, 2))
