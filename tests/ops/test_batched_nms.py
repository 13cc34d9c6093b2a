from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import cpp_module
import numpy as np
import pytest
import torch
from box_cases import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import no_sync
from torch import Tensor
from torchvision.ops import nms

from ssod_fast.ops import batched_nms
from ssod_fast.ops.batched_nms import _reference


def crowd(*shape: int, seed: int = 0, classes: int = 3, integer: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Overlapping boxes [*shape, 4], scores with ties where `integer`, and labels; a few boxes are degenerate."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 60
    size = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 40 - 2
    boxes = torch.cat([corner, corner + size], -1)
    scores = torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 0.5
    labels = torch.randint(classes, shape, generator=generator)
    if integer:
        boxes, scores = boxes.div(4).round(), scores.mul(8).round() * 0.5  # with both zeros
    return boxes.to(dtype), scores.to(dtype), labels


def by_torchvision(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> list[int]:
    """torchvision's nms of each class of one image, merged by score."""
    keep = torch.zeros(len(scores), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        keep[members[nms(boxes[members], scores[members], iou_threshold)]] = True
    order = scores.sort(descending=True, stable=True).indices
    return [int(i) for i in order if keep[i]]


def lists(kept: Any) -> list[list[int]]:
    """The kept boxes of each image, after a look at the padding."""
    rows = []
    for row, count in zip(kept.index.tolist(), kept.count.tolist(), strict=True):
        assert row[count:] == [-1] * (len(row) - count)
        rows.append(row[:count])
    return rows


@pytest.mark.parametrize("device", DEVICES)
def test_golden(device: str) -> None:
    boxes = torch.tensor([[[0, 0, 10, 10], [0, 0, 10, 5], [1, 0, 11, 10], [0, 0, 10, 10], [50, 50, 60, 60]]], device=device).float()
    scores = torch.tensor([[0.9, 0.8, 0.95, 0.9, 0.1]], device=device)
    labels = torch.tensor([[7, 7, 7, -3, 7]], device=device)
    # Overlap of 0 and 2 is 9/11, that of 0 and 1 exactly 1/2, that of 1 and 2 is 45/105; 3 is alone in its class.
    assert lists(batched_nms(boxes, scores, labels, iou_threshold=0.8)) == [[2, 3, 1, 4]]
    assert lists(batched_nms(boxes, scores, labels, iou_threshold=0.42)) == [[2, 3, 4]]
    assert lists(batched_nms(boxes, scores, iou_threshold=0.42)) == [[2, 4]]
    assert lists(batched_nms(boxes[:, :2], scores[:, :2], labels[:, :2], iou_threshold=0.5)) == [[0, 1]]  # equal is not above
    assert lists(batched_nms(boxes, scores, labels, iou_threshold=0.8, max_keep=2)) == [[2, 3]]
    assert lists(batched_nms(boxes, scores, labels, iou_threshold=0.8, score_threshold=0.8)) == [[2, 3]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("integer", [False, True])
def test_equals_torchvision_per_class(device: str, dtype: torch.dtype, integer: bool) -> None:
    for seed, (n, classes) in enumerate([(1, 1), (2, 1), (40, 1), (63, 2), (64, 3), (65, 1), (200, 4), (300, 80), (1000, 2)]):
        boxes, scores, labels = crowd(3, n, seed=seed, classes=classes, integer=integer, dtype=dtype)
        labels = labels * 600 - 500  # small, large and negative numbers
        for threshold in (0.0, 0.3, 0.5, 1.0):
            kept = batched_nms(boxes.to(device), scores.to(device), labels.to(device), iou_threshold=threshold)
            assert lists(kept) == [by_torchvision(*rows, threshold) for rows in zip(boxes, scores, labels, strict=True)]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 90), st.integers(1, 5), st.floats(0, 1), st.booleans())
def test_laws(seed: int, n: int, classes: int, threshold: float, integer: bool) -> None:
    boxes, scores, labels = crowd(2, n, seed=seed, classes=classes, integer=integer)
    kept = batched_nms(boxes, scores, labels, iou_threshold=threshold)
    rows = lists(kept)
    assert rows == [by_torchvision(*image, threshold) for image in zip(boxes, scores, labels, strict=True)]
    fewer = batched_nms(boxes, scores, labels, iou_threshold=threshold, max_keep=5)
    assert fewer.index.shape == (2, min(5, n))
    assert lists(fewer) == [row[:5] for row in rows]
    again = batched_nms(kept.gather(boxes), kept.gather(scores), kept.gather(labels), counts=kept.count, iou_threshold=threshold)
    assert lists(again) == [list(range(len(row))) for row in rows]
    shifted = batched_nms(boxes, scores, labels * 10**12 - 7, iou_threshold=threshold)
    assert lists(shifted) == rows


def test_threshold_is_compared_in_double() -> None:
    boxes = torch.tensor([[[0.0, 0, 3, 1], [0, 0, 1, 1]]])  # their overlap is float32(1/3), which lies above 1/3
    scores = torch.tensor([[2.0, 1]])
    third = float(torch.tensor(1.0) / 3)
    for threshold, count in ((1 / 3, 1), (third, 2), (math.nextafter(third, 0), 1)):
        assert batched_nms(boxes, scores, iou_threshold=threshold).count.item() == count
        assert len(nms(boxes[0], scores[0], threshold)) == count


@pytest.mark.parametrize("device", DEVICES)
def test_equals_reference(device: str) -> None:
    for dtype in (torch.float32, torch.float64):
        boxes, scores, labels = crowd(4, 150, dtype=dtype)
        boxes[0, 3, 1], boxes[0, 8, 0], boxes[1, 0, 2] = math.nan, -math.inf, math.inf
        scores[0, 10], scores[1, 11], scores[1, 12] = math.nan, math.inf, -math.inf
        counts = torch.tensor([150, 100, 0, 1])
        for score_threshold, most in ((-math.inf, 150), (0.2, 20), (0.2, 0), (math.inf, 3)):
            arguments = (boxes, scores, labels, counts, 0.4, score_threshold, most)
            index, count = torch.ops.ssod_fast.batched_nms(*(a.to(device) if isinstance(a, Tensor) else a for a in arguments))
            expected = _reference(*arguments)
            assert torch.equal(index.cpu(), expected[0])
            assert torch.equal(count.cpu(), expected[1])


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_finite_takes_no_part(device: str) -> None:
    boxes, scores, labels = (t.to(device) for t in crowd(1, 60))
    clean = lists(batched_nms(boxes, scores, labels, iou_threshold=0.3))[0]
    bad = torch.tensor([[math.nan, 0, 9, 9], [0, 0, math.inf, 9], [-math.inf, 0, 9, 9], [0, 0, 9, 9]], device=device)
    dirty = torch.cat([bad, boxes[0]])[None]
    values = torch.cat([torch.tensor([9.0, 9, 9, math.nan], device=device), scores[0]])[None]
    classes = torch.cat([labels.new_zeros(4), labels[0]])[None]
    assert lists(batched_nms(dirty, values, classes, iou_threshold=0.3)) == [[i + 4 for i in clean]]


@pytest.mark.parametrize("device", DEVICES)
def test_padding_is_not_read(device: str) -> None:
    boxes, scores, labels = (t.to(device) for t in crowd(3, 40))
    counts = torch.tensor([40, 0, 13], device=device, dtype=torch.int32)
    expected = [lists(batched_nms(boxes[i : i + 1, :n], scores[i : i + 1, :n], labels[i : i + 1, :n], iou_threshold=0.3))[0]
                for i, n in enumerate([40, 0, 13])]  # fmt: skip
    beyond = torch.arange(40, device=device) >= counts[:, None]
    boxes = boxes.masked_fill(beyond[..., None], 5.0)
    scores = scores.masked_fill(beyond, 1e9)
    assert lists(batched_nms(boxes, scores, labels, counts=counts, iou_threshold=0.3)) == expected


@pytest.mark.parametrize("device", DEVICES)
def test_gather(device: str) -> None:
    boxes, scores, labels = (t.to(device) for t in crowd(2, 30))
    kept = batched_nms(boxes, scores, labels, iou_threshold=0.2, score_threshold=0.5)
    found = kept.gather(boxes), kept.gather(scores, fill=-1), kept.gather(labels, fill=-1)
    for i, row in enumerate(lists(kept)):
        for got, source, fill in zip(found, (boxes, scores, labels), (0, -1, -1), strict=True):
            assert torch.equal(got[i, : len(row)], source[i, row])
            assert (got[i, len(row) :] == fill).all()
    assert kept.gather(torch.zeros(2, 30, 0, device=device)).shape == (2, 30, 0)
    for shape in ((3, 30), (2, 29), (2, 31, 4), (60,)):
        with pytest.raises(ValueError, match=rf"values must have shape \[2, 30, ...\] as the boxes had, got {re.escape(str([*shape]))}"):
            kept.gather(torch.zeros(shape, device=device))
    with pytest.raises(TypeError, match="values must be a tensor, got list"):
        kept.gather([0.0])  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
def test_empty(device: str) -> None:
    for images, n in ((0, 5), (2, 0), (0, 0)):
        boxes, scores = torch.zeros(images, n, 4, device=device), torch.zeros(images, n, device=device)
        kept = batched_nms(boxes, scores, iou_threshold=0.5)
        assert kept.index.shape == (images, n)
        assert kept.count.tolist() == [0] * images
        assert kept.gather(boxes).shape == (images, n, 4)
    boxes, scores, labels = (t.to(device) for t in crowd(2, 9))
    none = batched_nms(boxes, scores, labels, iou_threshold=0.5, max_keep=0)
    assert none.index.shape == (2, 0)
    assert none.count.tolist() == [0, 0]


def test_threads_agree() -> None:
    boxes, scores, labels = crowd(16, 400)
    threads, results = torch.get_num_threads(), []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(lists(batched_nms(boxes, scores, labels, iou_threshold=0.5)))
    torch.set_num_threads(threads)
    assert results[0] == results[1]


@pytest.mark.parametrize("device", DEVICES)
def test_dtypes_and_layouts(device: str) -> None:
    boxes, scores, labels = (t.to(device) for t in crowd(2, 50))
    expected = lists(batched_nms(boxes, scores, labels, iou_threshold=0.4))
    assert lists(batched_nms(boxes.double(), scores, labels.int(), iou_threshold=0.4)) == lists(
        batched_nms(boxes.double(), scores.double(), labels, iou_threshold=0.4)
    )
    half = boxes.half()
    assert lists(batched_nms(half, scores, labels.to(torch.int8), iou_threshold=0.4)) == lists(
        batched_nms(half.float(), scores, labels, iou_threshold=0.4)
    )
    planes = boxes.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    columns = scores.T.contiguous().T, labels.T.contiguous().T
    assert not planes.is_contiguous()
    assert lists(batched_nms(planes, *columns, iou_threshold=0.4)) == expected
    assert lists(batched_nms(boxes.clone().requires_grad_(), scores, labels, iou_threshold=0.4)) == expected


def test_every_output_is_written(fill_uninitialised: None) -> None:
    boxes, scores, labels = crowd(3, 40)
    kept = batched_nms(boxes, scores, labels, iou_threshold=0.1, counts=torch.tensor([0, 3, 40]))
    assert ((kept.index >= -1) & (kept.index < 40)).all()
    lists(kept)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"boxes": [[]]}, TypeError, "boxes must be a tensor, got list"),
        (
            {"scores": torch.zeros(2, 3, dtype=torch.int64)},
            TypeError,
            "scores must be float16, bfloat16, float32 or float64, got",
        ),
        ({"boxes": torch.zeros(3, 4)}, ValueError, r"boxes must have shape \[B, N, 4\], got \[3, 4\]"),
        ({"scores": torch.zeros(2, 4)}, ValueError, r"scores must have shape \[2, 3\], got \[2, 4\]"),
        ({"scores": torch.zeros(2, 3, device="meta")}, ValueError, "scores and boxes must be on one device, got meta and cpu"),
        ({"labels": torch.zeros(2, 3)}, TypeError, "labels must be integers, got torch.float32"),
        ({"labels": [0]}, TypeError, "labels must be a tensor or None, got list"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels must have shape \[2, 3\], got \[3\]"),
        ({"counts": [3, 3]}, TypeError, "counts must be a tensor or None, got list"),
        ({"counts": torch.tensor([3.0, 3])}, TypeError, "counts must be int32 or int64, got torch.float32"),
        ({"counts": torch.tensor([3])}, ValueError, r"counts must have shape \[2\], got \[1\]"),
        ({"counts": torch.tensor([3, 4])}, ValueError, r"counts must lie in 0\.\.3, got \[3, 4\]"),
        ({"iou_threshold": 1.5}, ValueError, r"iou_threshold must lie in 0\.\.1, got 1\.5"),
        ({"iou_threshold": math.nan}, ValueError, r"iou_threshold must lie in 0\.\.1, got nan"),
        ({"iou_threshold": "0.5"}, TypeError, r"iou_threshold must be a number, got '0\.5'"),
        ({"score_threshold": None}, TypeError, "score_threshold must be a number, got None"),
        ({"score_threshold": math.nan}, ValueError, "score_threshold must be a number, got nan"),
        ({"max_keep": -1}, ValueError, "max_keep must be >= 0, got -1"),
        ({"max_keep": 2.0}, TypeError, r"max_keep must be an int or None, got 2\.0"),
        ({"max_keep": True}, TypeError, "max_keep must be an int or None, got True"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"boxes": torch.zeros(2, 3, 4), "scores": torch.zeros(2, 3), "iou_threshold": 0.5}
    with pytest.raises(error, match=message):
        batched_nms(**(good | arguments))


def test_opcheck() -> None:
    op = torch.ops.ssod_fast.batched_nms.default
    torch.library.opcheck(op, (*crowd(2, 7), None, 0.5, 0.0, 7))
    torch.library.opcheck(op, (*crowd(2, 7, dtype=torch.float64), torch.tensor([7, 2]), 0.5, 0.0, 3))


def test_compile_and_no_sync() -> None:
    boxes, scores, labels = crowd(2, 30)
    counts = torch.tensor([30, 10])

    def best(b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        kept = batched_nms(b, s, labels, counts=counts, iou_threshold=0.5, max_keep=8)
        return kept.gather(b) + 1, kept.count

    with no_sync():
        expected = best(boxes, scores)
        _reference(boxes, scores, labels, counts, 0.5, 0.0, 8)
    actual = torch.compile(best, fullgraph=True, backend="aot_eager")(boxes, scores)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cpp_module.build("nms", Path(tmp_path_factory.mktemp("nms")))


@pytest.mark.parametrize("threads", [1, 4, 32])
@pytest.mark.parametrize("integer", [False, True])
def test_a_team_of_threads_finds_the_same(teams: Any, threads: int, integer: bool) -> None:
    """What a CUDA block runs after the sort, run by threads of the CPU."""
    for n, most, classes in ((1, 1, 1), (64, 64, 2), (65, 65, 1), (300, 300, 3), (300, 20, 3), (300, 64, 200)):
        boxes, scores, labels = (rows[0] for rows in crowd(1, n, seed=n, classes=classes, integer=integer, dtype=torch.float64))
        scores[scores < -0.4] = -math.inf
        for name, dtype in (("sweep_f32", torch.float32), ("sweep_f64", torch.float64)):
            b, s = boxes.to(dtype), scores.to(dtype)
            keys, order = s.sort(descending=True, stable=True)
            found = getattr(teams, name)(threads, b.numpy(), labels.numpy(), keys.numpy(), order.numpy(), 0.4, most)
            expected = _reference(b[None], s[None], labels[None], None, 0.4, -math.inf, most)[0][0]
            assert found.tolist() == expected.tolist()


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1))
def test_threshold_in_float(teams: Any, threshold: float) -> None:
    rounded = np.float32(teams.threshold_f32(threshold))
    assert float(rounded) <= threshold < float(np.nextafter(rounded, np.float32(2)))


@pytest.mark.gpu
def test_cuda_graph_replays_changed_boxes() -> None:
    boxes, scores, labels = (t.cuda() for t in crowd(4, 500))
    batched_nms(boxes, scores, labels, iou_threshold=0.5, max_keep=100)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = batched_nms(boxes, scores, labels, iou_threshold=0.5, max_keep=100)
    for old, new in zip((boxes, scores, labels), crowd(4, 500, seed=1), strict=True):
        old.copy_(new)
    graph.replay()
    assert lists(captured) == lists(batched_nms(boxes, scores, labels, iou_threshold=0.5, max_keep=100))


@pytest.mark.gpu
def test_side_stream() -> None:
    boxes, scores, labels = (t.cuda() for t in crowd(2, 100))
    stream, expected = torch.cuda.Stream(), lists(batched_nms(boxes, scores, labels, iou_threshold=0.5))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kept = batched_nms(boxes, scores, labels, iou_threshold=0.5)
    torch.cuda.current_stream().wait_stream(stream)
    assert lists(kept) == expected
