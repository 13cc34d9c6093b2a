"""PaddedTargets: what goes in comes out, padding stays blank, and nothing but to_list waits for a device."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from no_sync import SyncError, no_sync

from ssod_fast.structures import PaddedTargets, Target

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def target(n: int, start: int = 0, **extra: Any) -> Target:
    boxes = torch.arange(start, start + 4 * n, dtype=torch.float32).view(n, 4)
    return Target(boxes=boxes, labels=torch.arange(start, start + n), **extra)


def assert_blank(padded: PaddedTargets) -> None:
    outside = ~padded.valid
    assert not padded.boxes[outside].any()
    assert (padded.labels[outside] == -1).all()
    assert not padded.scores[outside].any()
    assert not padded.weights[outside].any()


def test_padding_and_back() -> None:
    targets = [target(2), target(0), target(3, 7, scores=torch.tensor([0.1, 0.2, 0.3]), weights=torch.tensor([1.0, 2, 3]))]
    padded = PaddedTargets.from_list(targets)
    assert padded.boxes.shape == (3, 3, 4)
    assert padded.count.tolist() == [2, 0, 3]
    assert padded.labels.tolist() == [[0, 1, -1], [-1, -1, -1], [7, 8, 9]]
    assert padded.valid.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert padded.scores[0].tolist() == [1, 1, 0]
    assert padded.weights[2].tolist() == [1, 2, 3]
    assert_blank(padded)
    for given_target, back in zip(targets, padded.to_list(), strict=True):
        assert torch.equal(back["boxes"], given_target["boxes"])
        assert torch.equal(back["labels"], given_target["labels"])


def test_dtypes_are_fixed() -> None:
    padded = PaddedTargets.from_list([Target(boxes=torch.zeros(1, 4, dtype=torch.float64), labels=torch.zeros(1, dtype=torch.int64))])
    assert (padded.boxes.dtype, padded.labels.dtype, padded.count.dtype) == (torch.float32, torch.int64, torch.int32)
    assert (padded.scores.dtype, padded.weights.dtype) == (torch.float32, torch.float32)


def test_nothing_to_pad() -> None:
    assert PaddedTargets.from_list([]).boxes.shape == (0, 0, 4)
    assert PaddedTargets.from_list([target(0)] * 2).boxes.shape == (2, 0, 4)
    assert PaddedTargets.from_list([target(0)], nmax=3).labels.tolist() == [[-1] * 3]
    assert PaddedTargets.empty(2, 3).to_list()[1]["boxes"].shape == (0, 4)


def test_overflow() -> None:
    padded = PaddedTargets.from_list([target(3), target(1)], nmax=2)
    assert padded.overflow is not None
    assert (padded.count.tolist(), padded.overflow.tolist()) == ([2, 1], [1, 0])
    assert padded.labels.tolist() == [[0, 1], [0, -1]]


@given(st.lists(st.lists(st.booleans(), max_size=5), min_size=1, max_size=4))
def test_select_keeps_order_and_blanks_the_rest(keeps: list[list[bool]]) -> None:
    padded = PaddedTargets.from_list([target(len(k), 10 * i) for i, k in enumerate(keeps)], nmax=6)
    mask = torch.ones(len(keeps), 6, dtype=torch.bool)  # True in padding rows: they must not come back to life
    for i, k in enumerate(keeps):
        mask[i, : len(k)] = torch.tensor(k, dtype=torch.bool)
    selected = padded.select(mask)
    assert_blank(selected)
    assert selected.nmax == padded.nmax
    for i, (k, back) in enumerate(zip(keeps, selected.to_list(), strict=True)):
        assert back["labels"].tolist() == [10 * i + j for j, kept in enumerate(k) if kept]
        assert back["boxes"][:, 0].tolist() == [10 * i + 4 * j for j, kept in enumerate(k) if kept]


def test_cat_pads_to_the_longer() -> None:
    both = PaddedTargets.cat(PaddedTargets.from_list([target(1)]), PaddedTargets.from_list([target(3), target(0)]))
    assert both.count.tolist() == [1, 3, 0]
    assert both.labels.tolist() == [[0, -1, -1], [0, 1, 2], [-1, -1, -1]]
    assert_blank(both)
    assert both.placement is None
    assert both.overflow is not None
    assert PaddedTargets.cat(both, PaddedTargets.empty(1)).overflow is None


def test_indexing_by_host_rows() -> None:
    padded = PaddedTargets.from_list([target(1), target(2), target(3)])
    assert padded[[2, 0, -1]].count.tolist() == [3, 1, 3]
    assert padded[1:].count.tolist() == [2, 3]
    assert len(padded[[]]) == 0
    with pytest.raises(IndexError, match=re.escape("rows must lie in [0, 3), got [3]")):
        padded[[3]]
    with pytest.raises(TypeError, match="rows must be a slice or a sequence of int"):
        padded[1]  # type: ignore[index]
    with pytest.raises(TypeError, match=re.escape("rows must be a slice or a sequence of int, got [True, False]")):
        padded[[True, False]]


@pytest.mark.parametrize("device", DEVICES)
def test_only_to_list_syncs(device: str) -> None:
    host = [target(2), target(1)]
    with no_sync():
        padded = PaddedTargets.from_list(host, nmax=4, device=device)
        padded = PaddedTargets.cat(padded.select(padded.scores > 0.5), padded[[1, 0]]).to(device)
        assert padded.valid.shape == (4, 4)
    assert [len(t["labels"]) for t in padded.to_list()] == [2, 1, 1, 2]
    with pytest.raises((SyncError, RuntimeError)), no_sync():
        padded.count[0].item()


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"boxes": torch.zeros(1, 4)}, ValueError, "targets[1] must have 'labels', got the keys ['boxes']"),
        (
            {"boxes": torch.zeros(4), "labels": torch.zeros(1)},
            ValueError,
            "['boxes'] must be floating point [N, 4], got torch.float32 [4]",
        ),
        (
            {"boxes": torch.zeros(1, 4).long(), "labels": torch.zeros(1)},
            ValueError,
            "['boxes'] must be floating point [N, 4], got torch.int64",
        ),
        ({"boxes": torch.zeros(1, 4), "labels": torch.zeros(1)}, TypeError, "targets[1]['labels'] must be int64, got torch.float32"),
        ({"boxes": torch.zeros(1, 4), "labels": torch.zeros(2).long()}, ValueError, "targets[1]['labels'] must be [1], got [2]"),
        ({**target(1), "scores": torch.zeros(2)}, ValueError, "targets[1]['scores'] must be [1], got [2]"),
    ],
)
def test_bad_targets(bad: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        PaddedTargets.from_list([target(1), bad])


@pytest.mark.parametrize("name", ["boxes", "labels", "scores"])
def test_mixed_devices(name: str) -> None:
    elsewhere = {**target(1), "scores": torch.ones(1)}
    elsewhere[name] = elsewhere[name].to("meta")  # type: ignore[literal-required]
    with pytest.raises(ValueError, match=re.escape(f"targets must be on one device, got cpu and targets[1]['{name}'] on meta")):
        PaddedTargets.from_list([target(1), elsewhere])  # type: ignore[list-item]


def test_bad_fields() -> None:
    good = PaddedTargets.empty(2, 3)
    with pytest.raises(ValueError, match=re.escape("boxes must be [B, N, 4], got (2, 3)")):
        PaddedTargets(good.scores, good.labels, good.scores, good.weights, good.count)
    with pytest.raises(ValueError, match=re.escape("labels must be [2, 3], got [2]")):
        PaddedTargets(good.boxes, good.count, good.scores, good.weights, good.count)
    with pytest.raises(ValueError, match=re.escape("keep must be [2, 3], got [2, 2]")):
        good.select(torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"keep must be bool, got torch\.float32"):
        good.select(torch.ones(2, 3))
    with pytest.raises(ValueError, match="nmax must not be negative, got -1"):
        PaddedTargets.from_list([], nmax=-1)
