from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import no_sync
from torch import Tensor

from ssod_fast.ops import Matches, linear_assignment, match, matching_cost, pack_targets
from ssod_fast.ops._matches import INVALID_ENTRIES, INVALID_PAIR, UNMATCHED_TARGET
from ssod_fast.ops.matching_cost import cost_arguments
from ssod_fast.structures import PaddedTargets

op_file = importlib.import_module("ssod_fast.ops.match")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Targets = list[dict[str, Tensor]]


def sample(
    sizes: tuple[int, ...] = (5, 0, 9, 1),
    queries: int = 24,
    layers: int = 2,
    classes: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Targets]:
    """Logits [L, B, Q, C], boxes [L, B, Q, 4] with many near duplicates of the targets, targets."""
    rng = torch.Generator().manual_seed(seed)
    batch = len(sizes)
    logits = torch.randn(layers, batch, queries, classes, generator=rng) * 2
    boxes = torch.rand(layers, batch, queries, 4, generator=rng) * 0.5 + 0.2
    targets = []
    for image, n in enumerate(sizes):
        wanted = torch.rand(n, 4, generator=rng) * 0.5 + 0.2
        if n and queries:
            boxes[:, image] = 0.9 * wanted[torch.randint(0, n, (queries,), generator=rng)] + 0.1 * boxes[:, image]
        targets.append({"labels": torch.randint(0, classes, (n,), generator=rng), "boxes": wanted})
    return logits.to(dtype), boxes.to(dtype), targets


def equal(a: Matches, b: Matches) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("query", "cost", "status", "image"))


def composed(logits: Tensor, boxes: Tensor, targets: Any, options: dict[str, Any]) -> Matches:
    """Cost and assignment as two calls, on ragged targets."""
    names = ("groups", "repeats", "repeat_order", "invalid", "ties")
    of_assignment = {name: options[name] for name in names if name in options}
    of_cost = {name: value for name, value in options.items() if name not in names}
    packed = pack_targets(targets)
    return linear_assignment(matching_cost(logits, boxes, packed, **of_cost), offsets=packed.offsets, **of_assignment)


def test_golden() -> None:
    """Two targets, three queries; by softmax target 0 takes another query than by focal costs."""
    boxes = torch.tensor([[[0.3, 0.3, 0.4, 0.4], [0.35, 0.3, 0.4, 0.4], [0.7, 0.7, 0.2, 0.2]]])
    probabilities = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.1, 0.9]]])
    corners = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.8, 0.8]])
    centres = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    targets = [{"labels": torch.tensor([0, 1]), "boxes": centres}]
    matches = match(probabilities.logit(), boxes, targets)
    assert matches.query.tolist() == [[[1, 2]]]
    torch.testing.assert_close(matches.cost, torch.tensor([[[-4.102670, -4.797114]]]), atol=5e-6, rtol=0)
    assert matches.status.tolist() == [[[0]]]
    softmax = match(probabilities.log(), boxes, targets, class_mode="softmax", w_class=1)
    assert softmax.query.tolist() == [[[0, 2]]]
    torch.testing.assert_close(softmax.cost, torch.tensor([[[-2.5, -2.9]]]), atol=5e-6, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_query_of_nan_is_avoided(device: str) -> None:
    logits = torch.tensor([[[0.0, 1], [2, -1], [-1, 0.5]]], device=device)
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.4], [0.7, 0.6, 0.1, 0.2]]], device=device)
    targets = [{"labels": torch.tensor([1, 0]), "boxes": torch.tensor([[0.68, 0.6, 0.12, 0.2], [0.32, 0.3, 0.2, 0.4]])}]
    assert match(logits, boxes, targets).query.tolist() == [[[2, 1]]]
    logits[0, 1] = boxes[0, 1] = torch.nan
    matches = match(logits, boxes, targets)
    assert matches.query.tolist() == [[[2, 0]]]
    assert matches.status.tolist() == [[[INVALID_ENTRIES]]]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"class_mode": "softmax", "w_class": 1.0},
    {"class_mode": "focal_logits", "alpha": 0.3, "gamma": 1.5},
    {"class_mode": "prob", "box_format": "xywh"},
    {"eps": 1e-12, "box_format": "xyxy", "giou_eps_mode": "max"},
    {"groups": 3},
    {"groups": 24},
    {"repeats": 2},
    {"repeats": 3, "repeat_order": "interleave"},
    {"groups": 2, "repeats": 2, "invalid": "drop"},
    {"ties": "any"},
    {"w_class": 0, "w_giou": 0},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_cost_and_assignment(options: dict[str, Any], dtype: torch.dtype) -> None:
    logits, boxes, targets = sample(dtype=dtype)
    for bad in (False, True):
        if bad:
            logits[0, 2, ::3], boxes[1, 0, :4] = torch.nan, torch.inf
        matches = match(logits, boxes, targets, **options)
        assert equal(matches, composed(logits, boxes, targets, options))
        assert matches.query.shape == (2, options.get("groups", 1) * options.get("repeats", 1), 15)


def test_equals_scipy_on_our_costs() -> None:
    scipy = pytest.importorskip("scipy.optimize")
    for seed, (queries, sizes) in enumerate([(300, (20, 3)), (64, (64, 40)), (10, (25, 10, 9)), (70, (1, 69))]):
        logits, boxes, targets = sample(sizes, queries, seed=seed)
        matches = match(logits, boxes, targets)
        for layer in range(2):
            pairs = matches.pairs(layer)
            for image, (i, j) in enumerate(pairs):
                cost = matching_cost(logits[layer, [image]], boxes[layer, [image]], [targets[image]])  # [T, Q]
                rows, columns = scipy.linear_sum_assignment(cost.T.double().numpy())
                assert i.tolist() == rows.tolist()
                assert j.tolist() == columns.tolist()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    queries=st.sampled_from([0, 1, 2, 4, 8, 36]),
    groups=st.sampled_from([1, 2, 4]),
    repeats=st.integers(1, 3),
    options=st.fixed_dictionaries({"repeat_order": st.sampled_from(["tile", "interleave"]), "invalid": st.sampled_from(["keep", "drop"])}),
    share=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_shape(sizes: list[int], queries: int, groups: int, repeats: int, options: dict[str, Any], share: float, seed: int) -> None:
    if queries % groups:
        groups = 1
    logits, boxes, targets = sample(tuple(sizes), queries, seed=seed)
    logits[torch.rand(logits.shape[:-1], generator=torch.Generator().manual_seed(seed)) < share] = torch.nan
    options = {**options, "groups": groups, "repeats": repeats}
    matches = match(logits, boxes, targets, **options)
    assert equal(matches, composed(logits, boxes, targets, options))
    for layer, pairs in enumerate(matches.pairs(layer) for layer in range(2)):
        taken = [i for i, _ in pairs]
        assert all(i.unique().numel() == i.numel() for i in taken)
        if options["invalid"] == "keep":
            assert [len(i) for i in taken] == [groups * min(repeats * n, queries // groups) for n in sizes]
        assert (matches.matched[layer] | matches.cost[layer].isinf()).all()


def test_padded_ragged_and_single_images_agree() -> None:
    logits, boxes, targets = sample()
    ragged = match(logits, boxes, targets)
    padded = PaddedTargets.from_list(targets, nmax=11)
    messy = PaddedTargets(
        boxes=padded.boxes.masked_fill(~padded.valid[..., None], torch.nan),
        labels=padded.labels.masked_fill(~padded.valid, 99),
        scores=padded.scores,
        weights=padded.weights,
        count=padded.count,
    )
    found = match(logits, boxes, messy)
    rows = padded.valid.flatten()
    assert torch.equal(found.query[..., rows], ragged.query)
    assert torch.equal(found.cost[..., rows], ragged.cost)
    assert (found.query[..., ~rows] == -1).all()
    assert found.cost[..., ~rows].isinf().all()
    assert torch.equal(found.status, ragged.status)
    for image, target in enumerate(targets):
        for layer in range(2):
            alone = match(logits[layer, [image]], boxes[layer, [image]], [target])
            assert torch.equal(alone.query[0], ragged.query[layer][:, ragged.image == image])


def test_groups_are_separate_calls() -> None:
    logits, boxes, targets = sample(queries=24)
    together = match(logits, boxes, targets, groups=3)
    for group in range(3):
        part = slice(8 * group, 8 * group + 8)
        alone = match(logits[:, :, part], boxes[:, :, part], targets)
        expected = torch.where(alone.query < 0, -1, alone.query + 8 * group)
        assert torch.equal(together.query[:, group], expected[:, 0])
        assert torch.equal(together.status[:, group], alone.status[:, 0])


def test_extra_cost_alone() -> None:
    _, boxes, targets = sample()
    extra = torch.rand(2, 15, 24)
    matches = match(None, boxes, targets, class_mode="none", w_box=0, w_giou=0, w_class=0, extra_cost=extra)
    offsets = pack_targets(targets).offsets
    assert torch.equal(matches.query, linear_assignment(extra, offsets=offsets).query)


def test_pixels() -> None:
    logits, boxes, targets = sample(layers=1)
    scale = torch.tensor([640.0, 480, 640, 480])
    pixels = [{**t, "boxes": t["boxes"] * scale} for t in targets]
    matches = match(logits, boxes * scale, pixels, image_hw=torch.tensor([[480.0, 640]]).repeat(4, 1))
    torch.testing.assert_close(matches.cost, match(logits, boxes, targets).cost, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("sizes", "queries", "layers"), [((), 5, 1), ((0, 0), 5, 2), ((3, 1), 0, 2), ((2,), 4, 0)], ids=str)
def test_empty(sizes: tuple[int, ...], queries: int, layers: int) -> None:
    logits, boxes, targets = sample(sizes, queries, layers)
    matches = match(logits, boxes, targets)
    assert matches.query.shape == (layers, 1, sum(sizes))
    assert (matches.query == -1).all()
    assert matches.cost.isinf().all()
    assert (matches.status == (UNMATCHED_TARGET if queries == 0 and sizes else 0)).all()
    for layer in range(layers):
        assert [len(i) for i, _ in matches.pairs(layer)] == [0] * len(sizes)


def test_status_and_invalid_options() -> None:
    logits, boxes, targets = sample((3, 2), 4, 1)
    logits[0, 0, :2] = torch.nan
    kept = match(logits, boxes, targets)
    assert kept.status.tolist() == [[[INVALID_ENTRIES + INVALID_PAIR, 0]]]
    assert kept.matched.all()
    assert kept.cost.isinf().sum() == 1
    dropped = match(logits, boxes, targets, invalid="drop")
    assert dropped.status.tolist() == [[[INVALID_ENTRIES + INVALID_PAIR + UNMATCHED_TARGET, 0]]]
    assert torch.equal(dropped.matched, kept.cost.isfinite())
    with pytest.raises(ValueError, match="logits or boxes give NaN or infinite costs that no complete matching avoids"):
        match(logits, boxes, targets, invalid="raise")


def test_labels_out_of_range_on_a_device_are_invalid_rows() -> None:
    """The host refuses such labels where it can read them; the op meets them on a GPU and never reads beyond the logits."""
    arguments, _ = cost_arguments(*sample((3, 2), 4, 1))
    for label in (-1, 6, 2**40):
        labels = arguments.labels.clone()
        labels[1] = label
        query, cost, status = torch.ops.ssod_fast.match.default(*arguments._replace(labels=labels), 1, 1, False, False, False)
        assert cost.isinf().flatten().tolist() == [False, True, False, False, False]
        assert (query >= 0).all()
        assert status.tolist() == [[[INVALID_ENTRIES + INVALID_PAIR, 0]]]


def test_offsets_that_lie_about_the_rows_stay_in_range() -> None:
    """Offsets on a device are not read by the host; the op clamps them."""
    arguments, _ = cost_arguments(*sample((3, 2), 4, 1))
    expected = op_file._op(*arguments, 1, 1, False, False, False)
    query, cost, _ = op_file._op(*arguments._replace(offsets=torch.tensor([-5, 3, 99])), 1, 1, False, False, False)
    assert torch.equal(query, expected[0])
    assert torch.equal(cost, expected[1])
    query, cost, _ = op_file._op(*arguments._replace(offsets=torch.tensor([4, 2, 3])), 1, 1, False, False, False)
    assert (query[..., [0, 1, 3, 4]] == -1).all()
    assert cost[..., [0, 1, 3, 4]].isinf().all()
    assert query[0, 0, 2] >= 0


def test_weights_change_nothing() -> None:
    logits, boxes, targets = sample()
    weighted = [{**target, "weights": torch.zeros(len(target["labels"]))} for target in targets]
    assert equal(match(logits, boxes, weighted), match(logits, boxes, targets))


def test_layouts_and_gradients() -> None:
    logits, boxes, targets = sample()
    expected = match(logits, boxes, targets)
    turned = logits.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).requires_grad_()
    wide = torch.cat([boxes, boxes], -1)[..., :4]
    assert equal(match(turned, wide, targets), expected)
    assert not match(turned, wide, targets).cost.requires_grad
    spread = torch.stack([boxes, boxes], -1)[..., 0]  # the numbers of a box are apart
    assert equal(match(logits, spread, targets), expected)


def test_threads_do_not_change_the_result() -> None:
    logits, boxes, targets = sample((60,) * 6, 300, 4)
    previous = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = match(logits, boxes, targets)
        torch.set_num_threads(4)
        assert equal(match(logits, boxes, targets), expected)
    finally:
        torch.set_num_threads(previous)


def test_results_are_fully_written(fill_uninitialised: None) -> None:
    logits, boxes, targets = sample()
    assert match(logits, boxes, targets, groups=2).cost.isfinite().all()
    found = match(logits, boxes, PaddedTargets.from_list(targets, nmax=20))
    assert found.query.min() == -1
    assert found.query.max() < 24


@pytest.mark.parametrize("device", DEVICES)
def test_no_sync(device: str) -> None:
    logits, boxes, targets = sample()
    logits, boxes, padded = logits.to(device), boxes.to(device), PaddedTargets.from_list(targets).to(device)
    with no_sync():
        match(logits, boxes, targets)
        match(logits, boxes, padded, groups=2, invalid="drop")


@pytest.mark.parametrize("padded", [False, True])
def test_opcheck(padded: bool) -> None:
    logits, boxes, targets = sample()
    arguments, _ = cost_arguments(logits, boxes, PaddedTargets.from_list(targets) if padded else targets)
    op = torch.ops.ssod_fast.match.default
    torch.library.opcheck(op, (*arguments, 2, 3, True, False, False))
    results, expected = op(*arguments, 2, 3, True, False, False), op_file._reference(*arguments, 2, 3, True, False, False)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_compile(device: str, dynamic: bool) -> None:
    def function(logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        ones = torch.ones(labels.shape, device=labels.device)
        matches = match(logits, boxes, PaddedTargets(target_boxes, labels, ones, ones, count))
        return matches.query, matches.cost

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager" if device == "cpu" else "inductor")
    for sizes in ((5, 0, 9), (2, 3, 4)):
        logits, boxes, targets = sample(sizes)
        padded = PaddedTargets.from_list(targets, nmax=9).to(device)
        inputs = (logits.to(device), boxes.to(device), padded.labels, padded.boxes, padded.count)
        torch.testing.assert_close(compiled(*inputs), function(*inputs))


@pytest.mark.parametrize("dynamic", [None, False, True])
@pytest.mark.parametrize("sizes", [(1,), (5,), (0,), (0, 3), (2, 0, 4)], ids=str)
def test_compile_with_lists(sizes: tuple[int, ...], dynamic: bool | None) -> None:
    logits, boxes, targets = sample(sizes)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: match(*inputs).query, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(logits, boxes, targets), match(logits, boxes, targets).query)
        logits, boxes, targets = sample(tuple(2 * n for n in sizes), seed=1)


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    for sizes, queries in (((20, 0, 7), 300), ((100, 60), 100), ((40,), 25)):
        logits, boxes, targets = sample(sizes, queries)
        expected, found = match(logits, boxes, targets), match(logits.cuda(), boxes.cuda(), targets)
        torch.testing.assert_close(found.cost.cpu().sum(), expected.cost.sum(), rtol=1e-5, atol=1e-4)
        assert (found.query.cpu() == expected.query).float().mean() >= 0.999


@pytest.mark.gpu
def test_cuda_graph_with_changed_targets() -> None:
    logits, boxes, first = sample()
    logits, boxes = logits.cuda(), boxes.cuda()
    static = PaddedTargets.from_list(first, nmax=9).to("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        match(logits, boxes, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        matches = match(logits, boxes, static)
    _, _, second = sample((0, 9, 4, 2), seed=1)
    for targets in (first, second):
        fresh = PaddedTargets.from_list(targets, nmax=9).to("cuda")
        for name in ("boxes", "labels", "count"):
            getattr(static, name).copy_(getattr(fresh, name))
        graph.replay()
        assert torch.equal(matches.query, match(logits, boxes, fresh).query)


def test_bad_input() -> None:
    logits, boxes, targets = sample()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"groups": 5}, r"groups must be >= 1 and divide the number of queries \(24\), got 5"),
        ({"groups": 0}, r"groups must be >= 1"),
        ({"repeats": 0}, "repeats must be >= 1, got 0"),
        ({"repeats": 2**40}, "repeats must be at most 4096, got 1099511627776"),
        ({"repeat_order": "twice"}, "repeat_order must be one of 'tile', 'interleave', got 'twice'"),
        ({"invalid": "ignore"}, "invalid must be one of 'keep', 'drop', 'raise', got 'ignore'"),
        ({"ties": "lapjv"}, "ties must be one of 'scipy', 'any', got 'lapjv'"),
        ({"class_mode": "bce"}, "class_mode must be one of"),
        ({"class_mode": ["focal"]}, r"class_mode must be one of .*, got \['focal'\]"),
        ({"gamma": -1.0}, "gamma must be a finite number >= 0, got -1.0"),
        ({"w_class": 0, "w_box": 0, "w_giou": 0}, "w_class, w_box and w_giou must not all be 0"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            match(logits, boxes, targets, **options)
    for options, message in (
        ({"groups": 2.0}, r"groups must be an int, got 2\.0"),
        ({"repeats": 1.5}, r"repeats must be an int, got 1\.5"),
    ):
        with pytest.raises(TypeError, match=message):
            match(logits, boxes, targets, **options)
    with pytest.raises(ValueError, match="targets must be of as many images as boxes, 4, got 3"):
        match(logits, boxes, targets[:3])
    targets[0]["labels"][0] = 6
    for device in ("cpu", "meta"):  # a list on the host is looked at before it is uploaded
        with pytest.raises(ValueError, match=r"labels of targets must lie in 0 \.\. 5, got"):
            match(logits.to(device), boxes.to(device), targets)
