from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import no_sync
from torch import Tensor

op_file = importlib.import_module("ssod_fast.ops.matched_pairs")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def rows_of(sizes: list[int], queries: int, entries: int, seed: int) -> Tensor:
    """[E, G]: random queries, none taken twice within an image, some targets without one."""
    rng = torch.Generator().manual_seed(seed)
    parts = [torch.randperm(max(queries, entries * n), generator=rng)[: entries * n].view(entries, n) for n in sizes]
    query = torch.cat(parts, 1) if parts else torch.zeros(entries, 0, dtype=torch.int64)
    return torch.where((query < queries) & (torch.rand(query.shape, generator=rng) < 0.8), query, -1)


@pytest.mark.parametrize("device", DEVICES)
def test_by_hand(device: str) -> None:
    query = torch.tensor([[7, 2, -1, 0], [1, 9, 3, 4]], device=device)
    offsets = torch.tensor([0, 2, 2, 4], device=device)
    found, target, count = op_file.matched_pairs(query, offsets=offsets, counts=None, batch=3, queries=10)
    assert found.tolist() == [1, 2, 7, 9, 0, 3, 4, -1]
    assert target.tolist() == [0, 1, 0, 1, 1, 0, 1, -1]
    assert count.tolist() == [4, 0, 3]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 6), max_size=5),
    queries=st.sampled_from([0, 1, 7, 40]),
    entries=st.integers(1, 3),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_reference(sizes: list[int], queries: int, entries: int, padded: bool, seed: int) -> None:
    batch, offsets, counts = len(sizes), torch.tensor([0, *sizes]).cumsum(0), None
    if padded:
        sizes, offsets, counts = [6] * batch, None, torch.tensor(sizes, dtype=torch.int64)
    query = rows_of(sizes, queries, entries, seed)
    if padded:
        query = query.masked_fill((torch.arange(6) >= counts[:, None]).flatten(), -1)
    results = op_file._op(query, offsets, counts, batch, queries)
    assert all(torch.equal(a, b) for a, b in zip(results, op_file._reference(query, offsets, counts, batch, queries), strict=True))
    assert int(results[2].sum()) == int((query >= 0).sum())


def test_views_are_taken_as_they_are() -> None:
    query = rows_of([4, 3], 9, 2, 0)
    wide = torch.stack([query, query], -1)[..., 0]
    options = {"offsets": torch.tensor([0, 4, 7]), "counts": None, "batch": 2, "queries": 9}
    found, expected = op_file.matched_pairs(wide, **options), op_file.matched_pairs(query, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_sync_on_a_device() -> None:
    query, offsets = rows_of([4, 3], 9, 2, 0), torch.tensor([0, 4, 7])
    with no_sync():
        op_file._reference(query, offsets, None, 2, 9)
        op_file._op(query, offsets, None, 2, 9)


def test_opcheck_and_compile() -> None:
    query, offsets = rows_of([4, 3], 9, 2, 0), torch.tensor([0, 4, 7])
    torch.library.opcheck(op_file._op, (query, offsets, None, 2, 9))
    torch.library.opcheck(op_file._op, (query[:, :6].contiguous(), None, torch.tensor([3, 2]), 2, 9))
    function = lambda x: op_file.matched_pairs(x, offsets=offsets, counts=None, batch=2, queries=9)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(query), function(query), strict=True))
