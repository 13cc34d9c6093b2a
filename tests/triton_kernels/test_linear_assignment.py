"""The Triton solver against scipy, whose optimum it finds bit by bit, ties included."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from triton_samples import DEVICE

from ssod_fast.kernels import linear_assignment as kernels

reference = importlib.import_module("ssod_fast.ops.linear_assignment")
NAN = math.nan
Array = NDArray[np.float64]


def solve(cost: Tensor, offsets: Sequence[int] | None = None, counts: Sequence[int] | None = None, **options: Any) -> tuple[Tensor, ...]:
    """Query, matched cost and status on the CPU of a cost [L, G, Q], or of one matrix [G, Q]."""
    cost = (cost if cost.dim() == 3 else cost[None]).to(DEVICE)
    bounds = None if offsets is None else torch.tensor(offsets, device=DEVICE)
    sizes = None if counts is None else torch.tensor(counts, device=DEVICE)
    chosen: dict[str, Any] = {"batch": 1, "groups": 1, "repeats": 1, "interleave": False, "drop_invalid": False} | options
    return tuple(out.cpu() for out in kernels.linear_assignment(cost, bounds, sizes, None, **chosen, any_ties=False))


def expected_queries(matrix: Array) -> NDArray[np.int64]:
    """Scipy's query of each row of a target-major matrix, -1 for none; non-finite entries cost so much that few are taken."""
    finite = matrix[np.isfinite(matrix)]
    price = finite.max() + min(matrix.shape) * (finite.max() - finite.min()) + 1 if finite.size else 1.0
    query, target = linear_sum_assignment(np.where(np.isfinite(matrix), matrix, price).T)
    result = np.full(matrix.shape[0], -1)
    result[target] = query
    return result


def check(cost: Tensor, offsets: Sequence[int], **options: Any) -> None:
    """One group, no repeats: every layer and image against scipy, and the costs and flags that follow from it."""
    query, matched, status = solve(cost, offsets, batch=len(offsets) - 1, **options)
    assert matched.dtype == cost.dtype
    for layer in range(cost.shape[0]):
        for image, (begin, end) in enumerate(itertools.pairwise(offsets)):
            matrix = cost[layer, begin:end]
            wanted = expected_queries(matrix.double().numpy())
            assert query[layer, 0, begin:end].tolist() == wanted.tolist()
            paired = torch.tensor(wanted) >= 0
            values = matrix[torch.arange(end - begin)[paired], torch.tensor(wanted)[paired]]
            torch.testing.assert_close(matched[layer, 0, begin:end][paired], values.where(values.isfinite(), math.inf), atol=0, rtol=0)
            bits = (not matrix.isfinite().all()) | (not values.isfinite().all()) << 1 | (not paired.all()) << 2
            assert status[layer, 0, image] == bits


@pytest.mark.parametrize(
    ("rows", "query"),
    [
        ([[1, 4, 9, 7], [2, 3, 9, 7], [9, 9, 5, 6]], [0, 1, 2]),
        ([[1, 2, 9, 7], [1.5, 4, 9, 7], [9, 9, 5, 6]], [1, 0, 2]),
        ([[1, 0, 1, 1], [2, 0, 1, 2], [1, 1, 2, 1]], [0, 1, 3]),
        ([[1, 1, 0, 1], [1, 2, 2, 0], [2, 2, 0, 1]], [1, 3, 2]),
        ([[0, -0.0, 1], [-0.0, 0, 1]], [0, 1]),
        ([[1, 0], [1, 0]], [0, 1]),  # square: queries are the rows of the solver
        ([[1, 2, 0], [1, 1, 1], [1, 1, 0]], [0, 1, 2]),
        ([[5, 3], [1, 2], [4, 6], [2, 1]], [-1, 0, -1, 1]),
        ([[0.0] * 5] * 3, [0, 1, 2]),
        ([[0.0] * 3] * 5, [0, 1, 2, -1, -1]),
    ],
    ids=str,
)
def test_golden(rows: list[list[float]], query: list[int]) -> None:
    for dtype in (torch.float32, torch.float64):
        assert solve(torch.tensor(rows, dtype=dtype))[0].tolist() == [[query]]


def test_invalid_entries_are_taken_only_where_nothing_else_is_left() -> None:
    query, matched, status = solve(torch.tensor([[NAN, -6, NAN, 4], [NAN, NAN, NAN, 5], [NAN, -1, 3, -6]]))
    assert query.tolist() == [[[1, 3, 2]]]
    assert matched.tolist() == [[[-6, 5, 3]]]
    assert status.tolist() == [[[1]]]
    for bad in (NAN, math.inf, -math.inf):
        rows = torch.tensor([[bad, bad, bad], [1, 2, 3]])
        query, matched, status = solve(rows)
        assert (query.tolist(), matched.tolist(), status.tolist()) == ([[[1, 0]]], [[[math.inf, 1]]], [[[3]]])
        query, matched, status = solve(rows, drop_invalid=True)
        assert (query.tolist(), matched.tolist(), status.tolist()) == ([[[-1, 0]]], [[[math.inf, 1]]], [[[7]]])
    assert solve(torch.full((2, 3), NAN))[0].tolist() == [[[0, 1]]]


def test_invalid_entries_cost_more_than_huge_ones() -> None:
    """The second row would tie with its invalid first entry if 1 were all that a price has above the largest cost."""
    query, _, status = solve(torch.tensor([[NAN, 1e30, NAN, NAN], [NAN, 1e30, 1e30, NAN]]))
    assert (query.tolist(), status.tolist()) == ([[[1, 2]]], [[[1]]])


@pytest.mark.parametrize("kind", ["normal", "ties", "binary", "huge", "invalid"])
def test_equal_to_scipy(kind: str) -> None:
    generator = torch.Generator().manual_seed(len(kind))
    offsets = [0, 3, 3, 9, 10, 18]  # an image without targets, and one with more targets than queries
    cost = torch.randn(2, offsets[-1], 7, generator=generator)
    if kind in ("ties", "binary"):
        cost = torch.randint(0, 2 if kind == "binary" else 5, cost.shape, generator=generator).double()
    elif kind == "huge":
        cost *= 1e30
    elif kind == "invalid":
        cost[torch.rand(cost.shape, generator=generator) < 0.4] = NAN
        cost[0, :3] = math.inf
    check(cost, offsets)


def test_columns_over_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    check(torch.randint(0, 9, (1, 8, 37), generator=generator).float(), [0, 8])
    check(torch.randint(0, 9, (1, 35, 5), generator=generator).float(), [0, 35])


def test_padded_rows_may_hold_anything() -> None:
    cost = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    counts = [4, 0, 2]
    cost[:, 1], cost[:, 2, 2:] = NAN, math.inf
    query, matched, status = solve(cost.flatten(1, 2), counts=counts, batch=3)
    ragged = torch.cat([cost[:, 0], cost[:, 2, :2]], 1)
    wanted = solve(ragged, [0, 4, 4, 6], batch=3)
    padding = torch.arange(4) >= torch.tensor(counts)[:, None]
    torch.testing.assert_close(query[:, :, ~padding.flatten()], wanted[0])
    torch.testing.assert_close(matched[:, :, ~padding.flatten()], wanted[1])
    torch.testing.assert_close(status, wanted[2])
    assert (query[:, :, padding.flatten()] == -1).all()
    assert (matched[:, :, padding.flatten()] == math.inf).all()


def test_groups_are_separate_problems() -> None:
    assert solve(torch.tensor([[3.0, 1, 2, 0]]), groups=2)[0].tolist() == [[[1], [3]]]
    cost = torch.randint(0, 4, (2, 5, 12), generator=torch.Generator().manual_seed(0)).float()
    query, matched, status = solve(cost, [0, 2, 5], batch=2, groups=3)
    for group in range(3):
        alone = solve(cost[..., group * 4 : group * 4 + 4], [0, 2, 5], batch=2)  # not contiguous
        torch.testing.assert_close(query[:, group], alone[0][:, 0] + group * 4)
        torch.testing.assert_close(matched[:, group], alone[1][:, 0])
        torch.testing.assert_close(status[:, group], alone[2][:, 0])


@pytest.mark.parametrize("interleave", [False, True])
def test_repeats_are_copies_of_rows(interleave: bool) -> None:
    a, b = [1.0, 2, 2, 1], [2.0, 2, 2, 1]
    query, _, _ = solve(torch.tensor([a, b]), repeats=2, interleave=interleave)
    assert query.tolist() == [[[0, 2], [1, 3]] if interleave else [[0, 1], [2, 3]]]
    cost = torch.randint(0, 3, (1, 4, 7), generator=torch.Generator().manual_seed(1)).float()
    for repeats in (1, 2, 3):  # 4, 8 and 12 rows for 7 queries: the last two with swapped roles
        query, _, status = solve(cost, repeats=repeats, interleave=interleave)
        copies = cost[0].repeat_interleave(repeats, 0) if interleave else cost[0].repeat(repeats, 1)
        wanted = torch.tensor(expected_queries(copies.double().numpy()))
        assert torch.equal(query[0], wanted.view(4, repeats).T if interleave else wanted.view(repeats, 4))
        assert status.item() == (4 if repeats > 1 else 0)


@pytest.mark.parametrize(("interleave", "drop"), [(False, True), (True, False)])
def test_equal_to_the_reference_with_everything_at_once(interleave: bool, drop: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    cost = torch.randint(0, 3, (1, 9, 10), generator=generator).float()
    cost[torch.rand(cost.shape, generator=generator) < 0.6] = NAN
    for rows in ((torch.tensor([0, 1, 6, 9]), None), (None, torch.tensor([3, 0, 2])), (None, None)):
        arguments = (cost, *rows, None, 3, 2, 2, interleave, drop, False)
        moved = (t.to(DEVICE) if isinstance(t, Tensor) else t for t in arguments)
        for got, wanted in zip(kernels.linear_assignment(*moved), reference._reference(*arguments), strict=True):
            assert torch.equal(got.cpu(), wanted)


@pytest.mark.parametrize(("shape", "batch"), [((2, 0, 5), 3), ((2, 4, 0), 1), ((0, 4, 5), 1), ((1, 0, 5), 0)], ids=str)
def test_empty(shape: tuple[int, ...], batch: int) -> None:
    query, matched, status = solve(torch.zeros(shape), [0] * batch + [shape[1]] if batch else [0], batch=batch)
    assert query.shape == matched.shape == (shape[0], 1, shape[1])
    assert (query == -1).all()
    assert status.shape == (shape[0], 1, batch)


@pytest.mark.parametrize("offsets", [[-5, 2, 99], [0, 3, 2], [1, 3, 4]], ids=str)
def test_offsets_out_of_range_are_clamped(offsets: list[int]) -> None:
    cost = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    bounds = np.maximum.accumulate(np.clip(offsets, 0, 4))
    query, _, _ = solve(cost, offsets, batch=2)
    for begin, end in itertools.pairwise(bounds):
        assert query[0, 0, begin:end].tolist() == expected_queries(cost[0, begin:end].double().numpy()).tolist()
    assert (query[0, 0, : bounds[0]] == -1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(7, 64, 900), (2, 300, 300), (1, 700, 300), (1, 20, 3000)], ids=str)
def test_many(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    half = shape[1] // 2
    check(torch.randn(shape, generator=generator), [0, half, shape[1]])
    check(torch.randint(0, 20, shape, generator=generator).double(), [0, half, half, shape[1]])


@pytest.mark.gpu
def test_a_graph_serves_other_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    cost, offsets = torch.randn(3, 20, 50, device=DEVICE), torch.tensor([0, 10, 20], device=DEVICE)
    arguments = (cost, offsets, None, None, 2, 1, 1, False, False, False)
    kernels.linear_assignment(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        query, _, _ = kernels.linear_assignment(*arguments)
    for split in (0, 7, 20):
        cost.copy_(torch.randn(cost.shape, generator=generator))
        offsets.copy_(torch.tensor([0, split, 20]))
        graph.replay()
        for begin, end in ((0, split), (split, 20)):
            for layer in range(3):
                wanted = expected_queries(cost[layer, begin:end].double().cpu().numpy())
                assert query[layer, 0, begin:end].tolist() == wanted.tolist()
