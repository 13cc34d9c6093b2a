from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Any, cast

import pytest
import torch
from box_cases import DEVICES, FORMATS
from cost_cases import (
    CLASS_MODES,
    FOCAL_COSTS,
    GIOU_TERMS,
    L1_TERMS,
    SOFTMAX_COSTS,
    Targets,
    option_grid,
    oracle,
    random_case,
    rounded_probabilities,
    worked_example,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import no_sync
from torch import Tensor

from ssod_fast.ops import matching_cost
from ssod_fast.ops.box_iou import Format
from ssod_fast.ops.matching_cost import ClassMode, cost_arguments, row_keys
from ssod_fast.ops.packed_targets import PackedTargets, pack_targets
from ssod_fast.structures import PaddedTargets, Target

op_file = importlib.import_module("ssod_fast.ops.matching_cost")
UNKNOWN = op_file.UNKNOWN_KEY


def on(targets: Targets, device: str) -> Targets:
    return [{k: v.to(device) for k, v in t.items()} for t in targets]


def close(actual: Tensor, expected: Any, atol: float = 5e-6) -> None:
    torch.testing.assert_close(actual.double().cpu(), torch.as_tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_worked_example(device: str, fmt: Format) -> None:
    if fmt != "cxcywh":  # the L1 term differs; the others do not
        logits, boxes, targets = worked_example(fmt, device=device)
        close(matching_cost(logits, boxes, targets, box_format=fmt, w_class=0.0, w_box=0.0).T, GIOU_TERMS)
        return
    for dtype in (torch.float32, torch.float64):
        logits, boxes, targets = worked_example(fmt, dtype, device)
        close(matching_cost(logits, boxes, targets).T, FOCAL_COSTS)
        close(matching_cost(logits, boxes, targets, w_class=0.0, w_giou=0.0).T, L1_TERMS)
        close(matching_cost(logits, boxes, targets, class_mode="none", w_box=0.0).T, GIOU_TERMS)
        log_p = logits.sigmoid().log()
        close(matching_cost(log_p, boxes, targets, class_mode="softmax", w_class=1.0).T, SOFTMAX_COSTS)
        close(matching_cost(log_p.exp(), boxes, targets, class_mode="prob", w_class=1.0).T, SOFTMAX_COSTS)


@pytest.mark.parametrize("device", DEVICES)
def test_worked_example_in_pixels(device: str) -> None:
    logits, boxes, targets = worked_example(device=device)
    targets = [{"labels": t["labels"], "boxes": t["boxes"] * 100} for t in targets]
    hw = torch.tensor([[100.0, 100.0]], device=device)
    close(matching_cost(logits, boxes * 100, targets, image_hw=hw, giou_eps_mode="max").T, FOCAL_COSTS)


@pytest.mark.parametrize("device", DEVICES)
def test_second_worked_example(device: str) -> None:
    logits = torch.tensor([[(0.0, 1.0), (2.0, -1.0), (-1.0, 0.5)]], device=device)
    boxes = torch.tensor([[(0.5, 0.5, 0.2, 0.2), (0.3, 0.3, 0.2, 0.4), (0.7, 0.6, 0.1, 0.2)]], device=device)
    target = {"labels": torch.tensor([1, 0]), "boxes": torch.tensor([(0.68, 0.6, 0.12, 0.2), (0.32, 0.3, 0.2, 0.4)])}
    cost, keys = matching_cost(logits, boxes, on([target], device), row_min=True)
    close(cost.T, [[1.503625, 3.450710], [6.474972, -4.010579], [-1.716947, 6.588016]])
    assert (keys & 0xFFFFFFFF).tolist() == [2, 1]


@pytest.mark.parametrize("device", DEVICES)
def test_focal_terms(device: str) -> None:
    def term(x: float, **options: Any) -> float:
        logits = torch.full((1, 1, 1), x, device=device, dtype=options.pop("dtype", torch.float32))
        target = {"labels": torch.zeros(1, dtype=torch.int64, device=device), "boxes": torch.zeros(1, 4, device=device)}
        options = {"w_class": 1.0, "w_box": 0.0, "w_giou": 0.0} | options
        return float(matching_cost(logits, torch.zeros(1, 1, 4, device=device), [target], **options))

    for p, expected in ((0.5, -0.1732868), (0.9, -2.7971140), (0.1, 0.9309665)):
        assert term(math.log(p / (1 - p)), w_class=2.0) == pytest.approx(expected, abs=1e-6)
    # Saturated logits are where the modes part, and where the rounding of 1 - p shows.
    assert term(20.0) == pytest.approx(-13.8155, abs=1e-4)
    assert term(20.0, eps=1e-12) == pytest.approx(-20.7233, abs=1e-4)
    assert term(20.0, class_mode="focal_logits") == pytest.approx(-15.0, abs=1e-4)
    assert term(20.0, dtype=torch.float64) == pytest.approx(-13.6750, abs=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", option_grid(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_float64_oracle(device: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    fmt = options.get("box_format", "cxcywh")
    logits, boxes, targets = random_case(fmt=fmt, dtype=dtype)
    cost = matching_cost(logits.to(device), boxes.to(device), on(targets, device), **options).cpu()
    assert cost.dtype == dtype
    parts = cost.split([len(t["labels"]) for t in targets], 1)
    for layer in range(2):
        for b, target in enumerate(targets):
            x, ours = logits[layer, b], parts[b][layer].double()
            if dtype is torch.float64:
                torch.testing.assert_close(ours, oracle(x, boxes[layer, b], target, **options), atol=1e-11, rtol=1e-11)
                continue
            errors = [(ours - oracle(x, boxes[layer, b], target, p, **options)).abs() for p in rounded_probabilities(x)]
            assert torch.stack(errors).amin(0).max() <= 5e-6 if len(target["labels"]) else ours.numel() == 0


def test_probabilities_are_rounded_once() -> None:
    x = torch.linspace(-12, 12, 4001)
    p, q = op_file.sigmoid_pair(x)
    exact = x.double().sigmoid().float()
    assert ((p - exact).abs() <= 2.4e-7 * p).all()
    assert torch.equal(q[x >= 0], 1 - p[x >= 0])
    assert (p[x > 6] == exact[x > 6]).double().mean() > 0.995  # where ln(1 - p) depends on it


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", option_grid(), ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (40, 33), (65, 130), (5, 1024), (3, 2100)], ids=str)
def test_equals_reference(device: str, options: dict[str, Any], shape: tuple[int, int]) -> None:
    rows, queries = shape
    fmt = options.get("box_format", "cxcywh")
    logits, boxes, targets = random_case((rows, 2, 0, rows), queries, fmt=fmt, classes=17)
    arguments, _ = cost_arguments(logits.to(device), boxes.to(device), on(targets, device), **options)
    cost, keys = torch.ops.ssod_fast.matching_cost(*arguments, True)
    expected, _ = op_file._reference(*arguments, True)
    # Near p = 1 the two may round p differently: 6e-8 of 1 - p, which is 6e-6 or more here.
    slack = 2e-2 if options.get("class_mode", "focal") == "focal" else 5e-6
    torch.testing.assert_close(cost, expected, atol=slack, rtol=0)
    assert ((cost - expected).abs() <= 5e-6).double().mean() > 0.99
    assert torch.equal(keys, row_keys(cost))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 12), max_size=4),
    st.integers(0, 70),
    st.integers(1, 9),
    st.sampled_from(CLASS_MODES),
    st.booleans(),
)
def test_laws(seed: int, sizes: list[int], queries: int, classes: int, mode: str, wide: bool) -> None:
    dtype = torch.float64 if wide else torch.float32
    logits, boxes, targets = random_case(sizes, queries, classes=classes, seed=seed, dtype=dtype)
    options: dict[str, Any] = {"class_mode": mode}
    cost, keys = matching_cost(logits, boxes, targets, row_min=True, **options) if sizes else (None, None)
    if cost is None or keys is None:
        return
    assert torch.equal(keys, row_keys(cost))
    order = torch.randperm(queries)
    assert torch.equal(matching_cost(logits[:, :, order], boxes[:, :, order], targets, **options), cost[..., order])
    begin = 0
    for b, (n, target) in enumerate(zip(sizes, targets, strict=True)):
        rows = torch.randperm(n)
        shuffled = {k: v[rows] for k, v in target.items()}
        alone, alone_keys = matching_cost(logits[:, b : b + 1], boxes[:, b : b + 1], [shuffled], row_min=True, **options)
        assert torch.equal(alone, cost[:, begin : begin + n][:, rows])
        assert torch.equal(alone_keys, keys[:, begin : begin + n][:, rows])
        begin += n


def padded_of(targets: Targets, rows: int) -> PaddedTargets:
    """Padding that would show: NaN boxes and labels far out of range."""
    padded = PaddedTargets.from_list(cast(list[Target], targets), rows)
    boxes, labels = padded.boxes.clone(), padded.labels.clone()
    boxes[~padded.valid] = math.nan
    labels[~padded.valid] = 10**12
    return dataclasses.replace(padded, boxes=boxes, labels=labels)


@pytest.mark.parametrize("device", DEVICES)
def test_padded_equals_ragged_equals_one_by_one(device: str) -> None:
    logits, boxes, targets = random_case((5, 0, 9, 1))
    logits, boxes = logits.to(device), boxes.to(device)
    ragged, keys = matching_cost(logits, boxes, on(targets, device), row_min=True)
    padded = padded_of(targets, 11)
    padded = dataclasses.replace(padded, **{k: v.to(device) for k, v in vars(padded).items() if isinstance(v, Tensor)})
    wide, wide_keys = matching_cost(logits, boxes, padded, row_min=True)
    assert wide.shape == (2, 4, 11, 37)
    assert wide_keys.shape == (2, 4, 11)
    assert matching_cost(logits[0], boxes[0], padded).shape == (4, 11, 37)
    begin = 0
    for b, target in enumerate(on(targets, device)):
        n = len(target["labels"])
        assert torch.equal(wide[:, b, :n], ragged[:, begin : begin + n])
        assert torch.equal(wide_keys[:, b, :n], keys[:, begin : begin + n])
        assert (wide[:, b, n:] == math.inf).all()
        assert (wide_keys[:, b, n:] == UNKNOWN).all()
        for layer in range(2):
            alone = matching_cost(logits[layer, b : b + 1], boxes[layer, b : b + 1], [target])
            assert alone.shape == (n, 37)
            assert torch.equal(alone, ragged[layer, begin : begin + n])
        begin += n


@pytest.mark.parametrize("device", DEVICES)
def test_keys_take_the_lowest_query_and_ignore_the_sign_of_zero(device: str) -> None:
    extra = torch.tensor([[3.0, 1, 1, 2], [0.0, -0.0, 5, 0], [-0.0, 0, 1, 2], [-1, -3, -3, 0], [1, math.nan, 0, 2], [1, -math.inf, 0, 2]])
    boxes = torch.zeros(1, 4, 4, device=device)
    target = {"labels": torch.zeros(6, dtype=torch.int64, device=device), "boxes": torch.zeros(6, 4, device=device)}
    for dtype in (torch.float32, torch.float64):
        cost, keys = matching_cost(
            None, boxes.to(dtype), [target], class_mode="none", w_giou=0.0, extra_cost=extra.to(device, dtype), row_min=True
        )
        assert torch.equal(cost.cpu().nan_to_num(7), (extra + 0.0).to(dtype).nan_to_num(7))
        assert (keys[:4] & 0xFFFFFFFF).tolist() == [1, 0, 0, 1]
        assert (keys[1:3] >> 32).tolist() == [0, 0]
        assert (keys[:4].sort().indices.tolist()) == [3, 1, 2, 0]  # keys rise with values
        assert keys[4:].tolist() == [UNKNOWN] * 2
        assert torch.equal(keys, row_keys(cost))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", CLASS_MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_converted_first(device: str, mode: ClassMode, dtype: torch.dtype) -> None:
    logits, boxes, targets = random_case(classes=21, spread=6.0)
    logits, boxes = logits.to(device, dtype), boxes.to(device, dtype)
    targets = [{"labels": t["labels"], "boxes": t["boxes"].to(dtype)} for t in on(targets, device)]
    single = [{"labels": t["labels"], "boxes": t["boxes"].float()} for t in targets]
    cost = matching_cost(logits, boxes, targets, class_mode=mode)
    assert cost.dtype == torch.float32
    assert torch.equal(cost, matching_cost(logits.float(), boxes.float(), single, class_mode=mode))
    assert cost.isfinite().all()
    wide = matching_cost(logits, boxes.double(), targets, class_mode=mode)
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", CLASS_MODES)
def test_invalid_predictions_stay_in_their_entries(device: str, mode: ClassMode) -> None:
    logits, boxes, targets = random_case((6,), 40, layers=None)
    clean = matching_cost(logits, boxes, targets, class_mode=mode)
    logits[0, 3], logits[0, 5, 1], boxes[0, 7] = math.nan, math.inf, math.nan
    boxes[0, 9, 0], boxes[0, 11], boxes[0, 13, 2:] = math.inf, 0, -0.1
    cost = matching_cost(logits.to(device), boxes.to(device), on(targets, device), class_mode=mode).cpu()
    touched = torch.zeros(40, dtype=torch.bool)
    touched[[3, 5, 7, 9, 11, 13]] = True
    torch.testing.assert_close(cost[:, ~touched], clean[:, ~touched], atol=1e-2 if device == "cuda" else 0, rtol=0)
    assert not cost[:, [7, 9]].isfinite().any()
    if mode != "none":
        assert not cost[:, 3].isfinite().any()
    assert cost[:, [11, 13]].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_zero_size_prediction_on_an_identical_target(device: str) -> None:
    boxes = torch.tensor([[(0.5, 0.5, 0.0, 0.0), (0.5, 0.5, 0.1, 0.1)]], device=device)
    target = {"labels": torch.zeros(1, dtype=torch.int64, device=device), "boxes": boxes[0, :1]}
    cost = matching_cost(None, boxes, [target], class_mode="none")
    assert cost[0, 0] == 0
    close(cost[0, 1], 5 * 0.2, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_labels_on_the_device_may_be_out_of_range(device: str) -> None:
    logits, boxes, targets = random_case((4, 3), classes=5)
    packed = pack_targets(targets)
    labels = torch.tensor([0, -1, 5, 4, 2**40, -(2**63), 1])
    arguments, _ = cost_arguments(logits, boxes, packed)
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments._replace(labels=labels)]
    cost, keys = torch.ops.ssod_fast.matching_cost(*moved, True)
    bad = (labels < 0) | (labels >= 5)
    assert cost[:, bad.to(device)].isnan().all()
    assert cost[:, ~bad.to(device)].isfinite().all()
    assert (keys == UNKNOWN).cpu().tolist() == [bad.tolist()] * 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("sizes", "queries", "layers", "classes"),
    [((), 5, 2, 3), ((0, 0), 5, 2, 3), ((3, 1), 0, 2, 3), ((3, 1), 5, 0, 3), ((0,), 0, 1, 0), ((2, 1), 5, 1, 0)],
)
def test_empty(device: str, sizes: tuple[int, ...], queries: int, layers: int, classes: int) -> None:
    logits, boxes, targets = random_case(sizes, queries, layers, classes)
    mode: ClassMode = "focal" if classes else "none"
    packed = pack_targets(on(targets, device), device)
    cost, keys = matching_cost(logits.to(device), boxes.to(device), packed, class_mode=mode, row_min=True)
    assert cost.shape == (layers, sum(sizes), queries)
    assert keys.shape == (layers, sum(sizes))
    assert queries or (keys == UNKNOWN).all()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_no_image_are_infinite(device: str) -> None:
    logits, boxes, targets = random_case((4, 3))
    arguments, _ = cost_arguments(logits, boxes, targets)
    for offsets in ([1, 3, 5], [0, 9, 3], [-5, 2, 2], [3, 3, 3]):
        moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments._replace(offsets=torch.tensor(offsets))]
        cost, keys = torch.ops.ssod_fast.matching_cost(*moved, True)
        low, high = max(offsets[0], 0), min(max(offsets), 7)
        unowned = [r for r in range(7) if not low <= r < high]
        assert (cost[:, unowned] == math.inf).all()
        assert (keys[:, unowned] == UNKNOWN).all()
    no_images = arguments._replace(logits=logits[:, :0], boxes=boxes[:, :0], offsets=torch.zeros(1, dtype=torch.int64), batch=0)
    cost, keys = torch.ops.ssod_fast.matching_cost(*[a.to(device) if isinstance(a, Tensor) else a for a in no_images], True)
    assert (cost == math.inf).all()
    assert (keys == UNKNOWN).all()


@pytest.mark.parametrize("device", DEVICES)
def test_image_hw_and_extra_cost(device: str) -> None:
    logits, boxes, targets = random_case((4, 3), spread=0.5)
    hw = torch.tensor([(480.0, 640.0), (333.0, 500.0)])
    scale = hw.flip(-1).repeat(1, 2)
    pixels = boxes * scale[:, None]
    in_pixels = [{"labels": t["labels"], "boxes": t["boxes"] * s} for t, s in zip(targets, scale, strict=True)]
    extra = torch.randn(2, 7, 37)
    cost = matching_cost(
        logits.to(device), pixels.to(device), on(in_pixels, device), image_hw=hw.to(device), extra_cost=extra.to(device)
    ).cpu()
    parts = cost.split([4, 3], 1)
    for layer in range(2):
        for b in range(2):
            expected = oracle(logits[layer, b], pixels[layer, b], in_pixels[b], hw=hw[b])
            more = extra[layer].split([4, 3])[b]
            torch.testing.assert_close(parts[b][layer].double(), expected + more, atol=2e-2, rtol=0)
            assert ((parts[b][layer] - expected - more).abs() <= 1e-5).double().mean() > 0.98
    transposed = extra.transpose(1, 2).contiguous().transpose(1, 2)  # not contiguous in queries
    again = matching_cost(logits, pixels, in_pixels, image_hw=hw, extra_cost=transposed)
    assert torch.equal(again, matching_cost(logits, pixels, in_pixels, image_hw=hw, extra_cost=extra))


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous(device: str) -> None:
    logits, boxes, targets = random_case()
    logits, boxes, targets = logits.to(device), boxes.to(device), on(targets, device)
    expected = matching_cost(logits, boxes, targets)
    images_first = logits.transpose(0, 1).contiguous().transpose(0, 1), boxes.transpose(0, 1).contiguous().transpose(0, 1)
    columns = logits.transpose(2, 3).contiguous().transpose(2, 3), boxes.transpose(2, 3).contiguous().transpose(2, 3)
    sliced = torch.cat([logits, logits], -1)[..., :6], torch.cat([boxes, boxes], -1)[..., :4]
    for x, y in (images_first, columns, sliced):
        assert not x.is_contiguous()
        assert torch.equal(matching_cost(x, y, targets), expected)
    repeated = matching_cost(logits[:1].expand(3, -1, -1, -1), boxes[:1].expand(3, -1, -1, -1), targets)
    assert all(torch.equal(layer, expected[0]) for layer in repeated)


def test_threads_agree() -> None:
    logits, boxes, targets = random_case((40, 3, 0, 70, 20), 300)
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        results.append(matching_cost(logits, boxes, targets, row_min=True))
    torch.set_num_threads(threads)
    for cost, keys in results[1:]:
        assert torch.equal(cost, results[0][0])
        assert torch.equal(keys, results[0][1])


def test_every_output_is_written(fill_uninitialised: None) -> None:
    logits, boxes, targets = random_case((5, 0, 9, 1), 70)
    assert matching_cost(logits, boxes, targets).isfinite().all()
    assert not matching_cost(logits, boxes, padded_of(targets, 12)).isnan().any()


def test_no_gradient_and_autocast() -> None:
    logits, boxes, targets = random_case()
    expected = matching_cost(logits, boxes, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cost = matching_cost(logits.requires_grad_(), boxes.requires_grad_(), targets)
    assert not cost.requires_grad
    assert torch.equal(cost, expected)


def test_class_names_of_the_peers() -> None:
    logits, boxes, targets = random_case()
    renamed = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    assert torch.equal(matching_cost(logits, boxes, renamed), matching_cost(logits, boxes, targets))


def test_opcheck() -> None:
    logits, boxes, targets = random_case((3, 2), 9)
    op = torch.ops.ssod_fast.matching_cost.default
    for options in ({}, {"class_mode": "softmax"}, {"image_hw": torch.ones(2, 2), "extra_cost": torch.ones(2, 5, 9)}):
        torch.library.opcheck(op, (*cost_arguments(logits, boxes, targets, **options)[0], True))
    torch.library.opcheck(op, (*cost_arguments(logits.half(), boxes, padded_of(targets, 4))[0], False))


def test_compile_and_no_sync() -> None:
    logits, boxes, targets = random_case((3, 2), 9)
    packed = pack_targets(targets)

    def cost_of(x: Tensor, y: Tensor, labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        rows = PackedTargets(labels, wanted, 2, packed.image, offsets=packed.offsets)
        cost, keys = matching_cost(x, y, rows, row_min=True)
        return cost + 1, keys

    arguments, padded = (logits, boxes, packed.labels, packed.boxes), padded_of(targets, 4)
    with no_sync():
        expected = cost_of(*arguments)
        matching_cost(logits, boxes, padded)
    actual = torch.compile(cost_of, fullgraph=True, backend="aot_eager")(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_reference_does_not_synchronise() -> None:
    logits, boxes, targets = random_case((3, 2), 9)
    for mode in CLASS_MODES:
        ragged = cost_arguments(logits, boxes, targets, class_mode=mode)[0]
        padded = cost_arguments(logits, boxes, padded_of(targets, 4), class_mode=mode)[0]
        with no_sync():
            op_file._reference(*ragged, True)
            op_file._reference(*padded, True)


@pytest.mark.gpu
def test_cuda_graph_follows_changed_targets() -> None:
    logits, boxes, targets = random_case((30, 4), 300)
    arguments, _ = cost_arguments(logits.cuda(), boxes.cuda(), on(targets, "cuda"))
    op = torch.ops.ssod_fast.matching_cost
    op(*arguments, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cost, keys = op(*arguments, True)
    assert arguments.offsets is not None
    arguments.offsets.copy_(torch.tensor([0, 7, 34]))
    arguments.labels.copy_(arguments.labels.flip(0))
    graph.replay()
    expected = op(*arguments, True)
    assert torch.equal(cost, expected[0])
    assert torch.equal(keys, expected[1])


@pytest.mark.gpu
def test_cuda_side_stream_and_no_sync() -> None:
    logits, boxes, targets = random_case((30, 4), 300)
    arguments, _ = cost_arguments(logits.cuda(), boxes.cuda(), on(targets, "cuda"))
    expected = torch.ops.ssod_fast.matching_cost(*arguments, True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    with torch.cuda.stream(stream):
        actual = torch.ops.ssod_fast.matching_cost(*arguments, True)
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
