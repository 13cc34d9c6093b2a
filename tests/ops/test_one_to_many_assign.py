"""One-to-many assignment against rules spelt out target by target, by every rule."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from box_cases import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import no_sync
from one_to_many_cases import BOXES, CENTRAL, PROBABILITIES, RULE_CASES, TARGETS, arguments, literal_assign, random_case
from torch import Tensor

from ssod_fast.ops import OneToMany, one_to_many_assign, pack_targets
from ssod_fast.structures import PaddedTargets

op_file = importlib.import_module("ssod_fast.ops.one_to_many_assign")
TOLERANCE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-5}  # logarithms and powers of float32 against float64; costs reach 1e5


def on(device: str, values: Any) -> Any:
    """Tensors in nested arguments moved to a device."""
    if isinstance(values, Tensor):
        return values.to(device)
    if isinstance(values, dict):
        return {key: on(device, value) for key, value in values.items()}
    return type(values)(on(device, v) for v in values) if isinstance(values, (list, tuple)) else values


def op_arguments(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> tuple[Any, ...]:
    """What the public function hands to the op."""
    seen: list[tuple[Any, ...]] = []

    def record(*values: Any) -> Any:
        seen.append(values)
        return torch.ops.ssod_fast.one_to_many_assign(*values)

    with monkeypatch.context() as patch:
        patch.setattr(op_file, "_op", record)
        one_to_many_assign(*args, **options)
    return seen[0]


def assert_same(actual: OneToMany, expected: OneToMany, **tolerance: Any) -> None:
    assert actual.target.tolist() == expected.target.tolist()
    assert actual.count.tolist() == expected.count.tolist()
    for name in ("metric", "iou", "weight"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("topk", [3, 13])
def test_golden_tal(device: str, topk: int) -> None:
    result = one_to_many_assign(*on(device, (PROBABILITIES, BOXES, TARGETS)), topk=topk)
    assert result.target.tolist() == [[0, 0, 1, 1, -1]]  # query 2 has the larger metric for target 0, and the larger overlap with 1
    assert result.metric[0].tolist() == pytest.approx([0.9, 0.2742684, 0.0064120, 0.8, 0], abs=1e-6)
    assert result.iou[0].tolist() == pytest.approx([1, 0.904762, 0.632653, 1, 0], abs=1e-6)
    assert result.weight[0].tolist() == pytest.approx([0.9999999, 0.3047427, 0.0080150, 0.9999999, 0], abs=1e-6)
    assert result.weight.sum().item() == pytest.approx(2.3127575, abs=1e-5)
    assert result.count.tolist() == [2, 2]
    assert [t.dtype for t in result] == [torch.int64, torch.float32, torch.float32, torch.float32, torch.int32]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("logits", [False, True])
def test_golden_simota(device: str, logits: bool) -> None:
    scores = PROBABILITIES.logit() if logits else PROBABILITIES
    result = one_to_many_assign(*on(device, (scores, BOXES, TARGETS)), rule="simota", priors=CENTRAL.to(device), from_logits=logits)
    assert result.target.tolist() == [[0, 0, -1, 1, -1]]  # two queries for each; both want query 1
    assert result.metric[0].tolist() == pytest.approx([0.210721, 1.216541, 0, 0.328504, 0], abs=2e-6)
    assert result.weight[0].tolist() == pytest.approx([1, 0.904762, 0, 1, 0], abs=1e-6)
    assert result.count.tolist() == [2, 1]


def test_metric_decides_conflicts_on_request() -> None:
    result = one_to_many_assign(PROBABILITIES, BOXES, TARGETS, conflict="metric")
    assert result.target.tolist() == [[0, 0, 0, 1, -1]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RULE_CASES)
@pytest.mark.parametrize("seed", range(3))
def test_equals_literal_rules(device: str, name: str, seed: int) -> None:
    case = random_case((5, 0, 9), 120, seed=seed)
    (scores, boxes, targets), options = arguments(case, RULE_CASES[name])
    result = one_to_many_assign(*on(device, (scores, boxes, targets)), **on(device, options))
    assert (result.target >= 0).sum() > 5
    for layer in range(2):
        for image, first in enumerate((0, 5, 5)):
            s = None if scores is None else scores[layer, image]
            target, *expected = literal_assign(s, boxes[layer, image], targets[image], **options)
            got = result.target[layer, image].cpu()
            assert got.tolist() == torch.where(target < 0, -1, target + first).tolist()
            for actual, wanted in zip(result[1:4], expected, strict=True):
                torch.testing.assert_close(actual[layer, image].cpu().double(), wanted, **TOLERANCE)
            count = torch.bincount(target[target >= 0], minlength=len(targets[image]["labels"]))
            assert result.count[layer, first : first + len(count)].tolist() == count.tolist()


@pytest.mark.parametrize("name", RULE_CASES)
def test_kernel_equals_reference(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for sizes, queries, seed in (((3,), 1, 0), ((2, 30), 63, 1), ((40, 1, 7), 330, 2), ((1, 0), 64, 3), ((25,), 7, 4)):
        args, options = arguments(random_case(sizes, queries, seed=seed, classes=11), RULE_CASES[name])
        if "levels" in options:
            options["levels"] = [queries // 2, 0, queries - queries // 2]
        values = op_arguments(monkeypatch, *args, **options)
        expected = OneToMany(*op_file._reference(*values))
        assert_same(OneToMany(*torch.ops.ssod_fast.one_to_many_assign(*values)), expected, **TOLERANCE)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(1, 90), st.integers(0, 12), st.sampled_from([1, 3, 13, 500]), st.sampled_from(["iou", "any_metric"])
)
def test_ties_take_the_lowest(seed: int, queries: int, size: int, topk: int, conflict: Any) -> None:
    """On a small grid almost everything is equal to something; without transcendental functions the results are equal to the last bit."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 4, (2, 1, queries + size, 2), generator=generator).float()
    boxes = torch.cat([corner, corner + torch.randint(1, 4, corner.shape, generator=generator)], -1)
    scores = torch.randint(0, 3, (2, 1, queries, 2), generator=generator).float() / 2
    targets = [{"boxes": boxes[0, 0, queries:], "labels": torch.randint(0, 2, (size,), generator=generator)}]
    packed = pack_targets(targets)
    options = {"topk": topk, "conflict": conflict, "keep_one": bool(seed % 2), "final_topk": [None, 2][seed // 2 % 2]}
    actual = one_to_many_assign(scores, boxes[:, :, :queries], targets, **options)
    made = op_file.make_options("tal", 1, queries, **DEFAULTS | options)
    reference = op_file._reference(scores, boxes[:, :, :queries], packed.labels, packed.boxes, packed.offsets, None, None, None, *made)
    assert_same(actual, OneToMany(*reference))


DEFAULTS: dict[str, Any] = dict.fromkeys(
    ("topk", "final_topk", "alpha", "beta", "eps", "min_side", "levels", "from_logits", "dynamic_k", "conflict")
)
DEFAULTS |= {"box_format": "xyxy", "keep_one": False}


# Not "simota": costs beyond 1e5 leave an ulp of 1/128, where much is equal. Not levels, which are about the order.
UNTIED = [name for name, options in RULE_CASES.items() if options["rule"] != "simota" and "levels" not in options]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(UNTIED))
def test_order_of_queries_and_targets_does_not_matter(seed: int, name: str) -> None:
    logits, boxes, targets, priors = random_case((7,), 60, layers=1, seed=seed)
    if "keep-one" in name:  # whose turn it is depends on the order of the targets
        shuffled_targets, target_order = targets, torch.arange(7)
    else:
        target_order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
        shuffled_targets = [{key: value[target_order] for key, value in targets[0].items()}]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed + 1))
    args, options = arguments((logits, boxes, targets, priors), RULE_CASES[name])
    plain = one_to_many_assign(*args, **options)
    args, options = arguments((logits[:, :, order], boxes[:, :, order], shuffled_targets, priors[order]), RULE_CASES[name])
    shuffled = one_to_many_assign(*args, **options)
    back = torch.cat([target_order, torch.tensor([-1])])[shuffled.target]
    assert back.tolist() == plain.target[:, :, order].tolist()
    torch.testing.assert_close(shuffled.weight, plain.weight[:, :, order], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["tal", "tal-any-metric-trimmed", "tal_any", "simota", "soft_label-keep-one", "atss-levels"])
def test_padded_equals_ragged_equals_one_by_one(device: str, name: str) -> None:
    sizes = (5, 0, 9, 2)
    case = random_case(sizes, 100, seed=5)
    args, options = arguments(case, RULE_CASES[name])
    (scores, boxes, targets), options = on(device, args), on(device, options)
    whole = one_to_many_assign(scores, boxes, targets, **options)
    width = 11
    padded = PaddedTargets(
        boxes=torch.full((4, width, 4), torch.nan, device=device),
        labels=torch.full((4, width), 10**12, device=device),
        scores=torch.ones(4, width, device=device),
        weights=torch.ones(4, width, device=device),
        count=torch.tensor(sizes, dtype=torch.int32, device=device),
    )
    first = 0
    for image, target in enumerate(targets):
        padded.boxes[image, : sizes[image]] = target["boxes"]
        padded.labels[image, : sizes[image]] = target["labels"]
    in_padding = one_to_many_assign(scores, boxes, padded, **options)
    for image, target in enumerate(targets):
        s = None if scores is None else scores[:, image : image + 1]
        alone = one_to_many_assign(s, boxes[:, image : image + 1], [target], **options)
        layer = one_to_many_assign(None if s is None else s[1], boxes[1, image : image + 1], [target], **options)
        assert [t[1].tolist() for t in alone] == [t.tolist() for t in layer]
        for values, offset in ((whole, first), (in_padding, image * width)):
            target_of = values.target[:, image]
            assert torch.where(target_of < 0, -1, target_of - offset).tolist() == alone.target[:, 0].tolist()
            assert values.count[:, offset : offset + sizes[image]].tolist() == alone.count.tolist()
            for name_of in ("metric", "iou", "weight"):
                assert torch.equal(getattr(values, name_of)[:, image], getattr(alone, name_of)[:, 0])
        first += sizes[image]
    assert in_padding.count.sum() == whole.count.sum()


@pytest.mark.parametrize("name", RULE_CASES)
def test_laws(name: str) -> None:
    args, options = arguments(random_case((6, 3), 90, seed=9), RULE_CASES[name])
    result = one_to_many_assign(*args, **options)
    taken = result.target >= 0
    for values in result[1:4]:
        assert (values[~taken] == 0).all()
    assert result.count.sum(1).tolist() == taken.sum((1, 2)).tolist()
    image = torch.tensor([0] * 6 + [1] * 3)[result.target]
    assert (image == torch.arange(2)[:, None])[taken].all()
    assert (result.weight[taken] <= 1 + 1e-6).all()
    if options["rule"] == "tal" and "any" not in name:
        assert (result.metric[taken] > 0).all()
        assert result.count.max() <= options.get("topk", 13)
    if options.get("keep_one") and options["rule"] == "tal":
        assert (result.count > 0).all()


def test_keep_one_takes_the_best_that_is_left() -> None:
    """Target 1 loses its only query to target 0, then gets the second best."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [40, 40, 50, 50]])[None]
    scores = torch.tensor([[[0.9], [0.1], [0.9]]])
    targets = [{"boxes": torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]]), "labels": torch.tensor([0, 0])}]
    assert one_to_many_assign(scores, boxes, targets, topk=1).target.tolist() == [[0, -1, -1]]
    kept = one_to_many_assign(scores, boxes, targets, topk=1, keep_one=True)
    assert kept.target.tolist() == [[0, 1, -1]]
    assert kept.count.tolist() == [1, 1]
    assert kept.weight[0, 1].item() == pytest.approx(8 / 9, rel=1e-4)


def test_small_targets_are_enlarged() -> None:
    """A target of 4 pixels whose nearest point lies outside of it."""
    targets = [{"boxes": torch.tensor([[10.0, 10, 14, 14]]), "labels": torch.tensor([0])}]
    boxes, scores = torch.tensor([[[9.0, 9, 15, 15]]]), torch.tensor([[[0.5]]])
    points = torch.tensor([[16.0, 12.0]])
    assert one_to_many_assign(scores, boxes, targets, rule="tal_any", priors=points, min_side=4).target.item() == -1
    assert one_to_many_assign(scores, boxes, targets, rule="tal_any", priors=points, min_side=8.1).target.item() == 0
    assert one_to_many_assign(scores, boxes, targets, rule="tal_any", priors=points).target.item() == 0


def test_normalised_boxes() -> None:
    logits, boxes, targets, _ = random_case((4, 6), 50, seed=3)
    sizes = torch.tensor([[200.0, 300.0], [150.0, 100.0]])
    plain = one_to_many_assign(logits, boxes, targets, from_logits=True)
    center, side = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    normalised = torch.cat([center, side], -1) / sizes.flip(-1).repeat(1, 2)[:, None]
    scaled = one_to_many_assign(logits, normalised, targets, from_logits=True, image_hw=sizes, box_format="cxcywh")
    assert_same(scaled, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RULE_CASES)
def test_what_is_not_finite_takes_no_part(device: str, name: str) -> None:
    args, options = arguments(random_case((6, 3), 90, seed=2), RULE_CASES[name])
    (scores, boxes, targets), options = on(device, args), on(device, options)
    boxes[:, 0, ::7] = torch.nan
    boxes[:, 1, ::5, 2] = torch.inf
    boxes[:, :, 3] = boxes[:, :, 3, :1]  # no area
    boxes[:, :, 4] = boxes[:, :, 4].flip(-1)  # inverted
    if scores is not None:
        scores[:, :, 1] = torch.nan
    targets[0]["boxes"][2] = torch.nan
    targets[1]["boxes"][1, 2:] = targets[1]["boxes"][1, :2]  # no area
    result = one_to_many_assign(scores, boxes, targets, **options)
    for values in result[1:4]:
        assert values.isfinite().all()
    assert (result.target[:, 0, ::7] == -1).all()
    assert (result.target[:, 1, ::5] == -1).all()
    assert (result.target != 2).all()
    if scores is not None:
        assert (result.target[:, :, 1] == -1).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RULE_CASES)
@pytest.mark.parametrize(("sizes", "queries", "layers"), [((0, 0), 20, 2), ((), 20, 2), ((3, 1), 0, 2), ((3, 1), 20, 0)])
@pytest.mark.usefixtures("fill_uninitialised")
def test_nothing(device: str, name: str, sizes: tuple[int, ...], queries: int, layers: int) -> None:
    _, _, targets, _ = random_case(sizes, 20)
    case = torch.zeros(layers, len(sizes), queries, 6), torch.zeros(layers, len(sizes), queries, 4), targets, torch.ones(queries, 4)
    args, options = arguments(case, RULE_CASES[name])
    result = one_to_many_assign(*on(device, args), **on(device, options))
    assert result.target.shape == (layers, len(sizes), queries)
    assert result.count.shape == (layers, sum(sizes))
    assert (result.target == -1).all()
    assert all((values == 0).all() for values in result[1:])


def test_labels_out_of_range() -> None:
    targets = [{"boxes": BOXES[0, :2], "labels": torch.tensor([0, 2])}]
    with pytest.raises(ValueError, match=r"labels of targets must lie in 0 \.\. 1, got 0 \.\. 2"):
        one_to_many_assign(PROBABILITIES, BOXES, targets)
    op = torch.ops.ssod_fast.one_to_many_assign
    packed = pack_targets(targets)
    options = op_file.make_options("tal", 1, 5, **DEFAULTS)
    for implementation in (op, op_file._reference):
        result = implementation(PROBABILITIES[None], BOXES[None], packed.labels, packed.boxes, packed.offsets, None, None, None, *options)
        assert result[4].tolist() == [[4, 0]]  # on a device the labels are not read first: such a target gets nothing


def test_wild_offsets_and_counts_stay_in_bounds() -> None:
    packed = pack_targets(TARGETS)
    options = op_file.make_options("tal", 2, 5, **DEFAULTS)
    scores, boxes = PROBABILITIES[None].expand(1, 2, 5, 2), BOXES[None].expand(1, 2, 5, 4)
    for offsets, counts in (((0, -5, 99), None), ((2, 1, 0), None), ((-7, 1, 2), None), (None, (99, -3))):
        rows = [None if v is None else torch.tensor(v) for v in (offsets, counts)]
        result = torch.ops.ssod_fast.one_to_many_assign(scores, boxes, packed.labels, packed.boxes, *rows, None, None, *options)
        assert result[0].max() < 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_and_layouts(dtype: torch.dtype) -> None:
    logits, boxes, targets, priors = random_case((5, 4), 70, seed=1)
    logits, boxes = logits.to(dtype), boxes.round().to(dtype)
    plain = one_to_many_assign(logits.float(), boxes.float(), targets, rule="simota", priors=priors, from_logits=True)
    assert_same(one_to_many_assign(logits, boxes, targets, rule="simota", priors=priors.to(torch.float64), from_logits=True), plain)
    odd = logits.transpose(2, 3).contiguous().transpose(2, 3), boxes.transpose(2, 3).contiguous().transpose(2, 3)
    assert_same(one_to_many_assign(*odd, targets, rule="simota", priors=priors, from_logits=True), plain)
    grown = logits.new_zeros(2, 2, 140, 9)
    grown[:, :, ::2, 1:7] = logits
    assert_same(one_to_many_assign(grown[:, :, ::2, 1:7], boxes, targets, rule="simota", priors=priors, from_logits=True), plain)


def test_no_gradient() -> None:
    scores, boxes = PROBABILITIES.clone().requires_grad_(), BOXES.clone().requires_grad_()
    assert not any(t.requires_grad for t in one_to_many_assign(scores, boxes, TARGETS))


def test_shared_anchors() -> None:
    _, boxes, targets, _ = random_case((5, 8), 60, layers=1, seed=6)
    shared = boxes[0, :1].expand(2, -1, -1)
    assert_same(one_to_many_assign(None, shared, targets, rule="atss"), one_to_many_assign(None, shared.contiguous(), targets, rule="atss"))


def test_threads_agree() -> None:
    args, options = arguments(random_case((30, 20, 40, 5), 700, layers=3), RULE_CASES["tal"])
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(one_to_many_assign(*args, **options))
    torch.set_num_threads(threads)
    assert_same(*results)


def test_rows_of_targets_count_through_the_images() -> None:
    """Target j of image b is row offsets[b] + j of a list and row b * N + j of padded targets: the labels are those of the rows."""
    (scores, boxes, targets), options = arguments(random_case((3, 1, 2), 40), RULE_CASES["tal"])
    padded = PaddedTargets.from_list(targets, nmax=4)
    for rows, first in ((targets, [0, 3, 4]), (padded, [0, 4, 8])):
        found = one_to_many_assign(scores, boxes, rows, **options).target  # [L, B, Q]
        labels = pack_targets(rows).labels[found]
        for b, target in enumerate(targets):
            taken = found[:, b] >= 0
            assert taken.any()
            assert torch.equal(labels[:, b][taken], target["labels"][(found[:, b] - first[b])[taken]])


def test_weights_play_no_part() -> None:
    weighted = [{**target, "weights": torch.zeros(2)} for target in TARGETS]
    assert_same(one_to_many_assign(PROBABILITIES, BOXES, weighted), one_to_many_assign(PROBABILITIES, BOXES, TARGETS))


def test_tal_takes_its_candidates_before_it_asks_the_priors() -> None:
    """The best query's prior is outside: nothing is left of one candidate; "tal_any" takes the next one."""
    scores, boxes = torch.tensor([[[0.9], [0.8]]]), torch.tensor([[[10.0, 10, 50, 50], [12, 12, 50, 50]]])
    target, priors = [{"labels": torch.tensor([0]), "boxes": torch.tensor([[10.0, 10, 50, 50]])}], torch.tensor([[90.0, 90], [30, 30]])
    assert one_to_many_assign(scores, boxes, target, priors=priors, topk=1).target.tolist() == [[-1, -1]]
    assert one_to_many_assign(scores, boxes, target, rule="tal_any", priors=priors, topk=1).target.tolist() == [[-1, 0]]


@pytest.mark.parametrize("name", ["tal", "tal-priors", "tal_any-trimmed-keep-one", "simota", "soft_label-keep-one", "atss-priors-keep-one"])
def test_opcheck(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    args, options = arguments(random_case((3, 2), 30), RULE_CASES[name])
    torch.library.opcheck(torch.ops.ssod_fast.one_to_many_assign.default, op_arguments(monkeypatch, *args, **options))


@pytest.mark.parametrize("name", ["tal", "tal_any", "simota", "atss-levels"])
def test_compile(name: str) -> None:
    (scores, boxes, targets), options = arguments(random_case((3, 2), 30), RULE_CASES[name])
    packed = pack_targets(targets)

    def total(s: Tensor | None, b: Tensor) -> tuple[Tensor, Tensor]:
        result = one_to_many_assign(s, b, packed, **options)
        return result.target, result.weight * 2

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(scores, boxes), total(scores, boxes), strict=True))


@pytest.mark.parametrize("name", RULE_CASES)
def test_does_not_synchronise(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (scores, boxes, targets), options = arguments(random_case((3, 2), 30), RULE_CASES[name])
    packed = pack_targets(targets)
    values = op_arguments(monkeypatch, scores, boxes, packed, **options)
    with no_sync():
        one_to_many_assign(scores, boxes, packed, **options)
        op_file._reference(*values)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RULE_CASES)
def test_cuda_equals_cpu(name: str) -> None:
    """Merits of a target in the shared memory that a block has, in what it may ask for, and in global memory."""
    for sizes, queries in (((40, 0, 7), 900), ((3,), 14000), ((2,), 70000)):
        args, options = arguments(random_case(sizes, queries, side=800.0), RULE_CASES[name])
        expected = one_to_many_assign(*args, **options)
        result = one_to_many_assign(*on("cuda", args), **on("cuda", options))
        assert_same(OneToMany(*(t.cpu() for t in result)), expected, **TOLERANCE)


@pytest.mark.gpu
def test_cuda_graph_follows_changed_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    args, options = arguments(random_case((20, 14), 300), RULE_CASES["simota"])
    values = op_arguments(monkeypatch, *on("cuda", args), **on("cuda", options))
    op = torch.ops.ssod_fast.one_to_many_assign
    op(*values)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(*values)
    values[2].copy_(values[2].flip(0))
    values[4].copy_(torch.tensor([0, 7, 34]))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, op(*values), strict=True))


@pytest.mark.gpu
def test_cuda_side_stream_and_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    args, options = arguments(random_case((20, 14), 300), RULE_CASES["tal"])
    values = op_arguments(monkeypatch, *on("cuda", args), **on("cuda", options))
    expected = torch.ops.ssod_fast.one_to_many_assign(*values)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with no_sync(), torch.cuda.stream(stream):
        actual = torch.ops.ssod_fast.one_to_many_assign(*values)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
