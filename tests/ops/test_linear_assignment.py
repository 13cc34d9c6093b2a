from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from assignment_cases import KINDS, cost_matrix, filled, scipy_queries, sprinkle_invalid, unavoidable_invalid_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import no_sync
from scipy.optimize import linear_sum_assignment as scipy_assignment
from torch import Tensor

from ssod_fast.ops import Matches, linear_assignment
from ssod_fast.ops._matches import INVALID_ENTRIES, INVALID_PAIR, UNMATCHED_TARGET
from ssod_fast.ops.linear_assignment import _reference

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
N, INF = math.nan, math.inf
SHAPES = [(1, 1), (1, 9), (9, 1), (5, 5), (17, 16), (16, 17), (16, 16), (20, 300), (300, 20), (70, 65), (65, 70), (130, 130), (100, 260)]


def reference(
    cost: Tensor, offsets: Any = None, counts: Any = None, batch: int = 1, groups: int = 1, repeats: int = 1, **flags: bool
) -> Any:
    """The plain form of the op on rows [L, G, Q]."""
    interleave, drop = flags.get("interleave", False), flags.get("drop", False)
    return _reference(cost, offsets, counts, None, batch, groups, repeats, interleave, drop, False)


def queries(matches: Matches) -> list[int]:
    """Queries of the only problem."""
    found: list[int] = matches.query.flatten().tolist()
    return found


def same(a: Matches, b: Matches) -> None:
    for x, y in ((a.query, b.query), (a.cost, b.cost), (a.status, b.status)):
        assert torch.equal(x, y)


GOLDEN = {
    "plain": ([[1, 4, 9, 7], [2, 3, 9, 7], [9, 9, 5, 6]], [0, 1, 2], 9),
    "conflict": ([[1, 2, 9, 7], [1.5, 4, 9, 7], [9, 9, 5, 6]], [1, 0, 2], 8.5),
    "ties": ([[1, 0, 1, 1], [2, 0, 1, 2], [1, 1, 2, 1]], [0, 1, 3], 2),
    "scan position": ([[1, 1, 0, 1], [1, 2, 2, 0], [2, 2, 0, 1]], [1, 3, 2], 1),
    "all equal": ([[0] * 5] * 3, [0, 1, 2], 0),
    "all equal, few queries": ([[0] * 3] * 5, [0, 1, 2, -1, -1], 0),
    "zeros of both signs": ([[0.0, -0.0, 1], [-0.0, 0.0, 1]], [0, 1], 0),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(device: str, name: str) -> None:
    rows, expected, total = GOLDEN[name]
    cost = torch.tensor(rows, dtype=torch.float32, device=device)
    matches = linear_assignment(cost)
    assert queries(matches) == expected
    assert matches.cost[matches.query >= 0].sum() == total
    assert matches.status.item() == (UNMATCHED_TARGET if -1 in expected else 0)
    assert reference(cost[None])[0].flatten().tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
def test_golden_orientation(device: str) -> None:
    """Rows of the solver are queries unless targets are fewer: another orientation finds another optimum."""

    def query_major(rows: list[list[float]]) -> Matches:
        return linear_assignment(torch.tensor(rows, device=device), layout="query_major")

    assert queries(query_major([[1.0, 1], [0, 0]])) == [0, 1]
    assert queries(query_major([[1.0, 1, 1], [2, 1, 1], [0, 1, 0]])) == [0, 1, 2]
    many = query_major([[5.0, 1, 4, 2], [3, 2, 6, 1]])
    assert queries(many) == [-1, 0, -1, 1]
    assert many.cost.flatten().tolist() == [INF, 1, INF, 1]
    assert many.status.item() == UNMATCHED_TARGET


@pytest.mark.parametrize("device", DEVICES)
def test_golden_invalid(device: str) -> None:
    cost = torch.tensor([[N, -6, N, 4], [N, N, N, 5], [N, -1, 3, -6]], device=device)
    matches = linear_assignment(cost)
    assert queries(matches) == [1, 3, 2]  # a weaker price would take an invalid pair
    assert matches.status.item() == INVALID_ENTRIES
    assert queries(linear_assignment(cost, invalid="raise")) == [1, 3, 2]
    hopeless = torch.tensor([[N, N, N], [1, 2, 3]], device=device)
    kept, dropped = linear_assignment(hopeless), linear_assignment(hopeless, invalid="drop")
    assert queries(kept) == [1, 0]
    assert kept.status.item() == INVALID_ENTRIES | INVALID_PAIR
    assert queries(dropped) == [-1, 0]
    assert dropped.status.item() == INVALID_ENTRIES | INVALID_PAIR | UNMATCHED_TARGET
    assert kept.cost.flatten().tolist() == dropped.cost.flatten().tolist() == [INF, 1]
    with pytest.raises(ValueError, match="cost has NaN or infinite entries that no complete matching avoids"):
        linear_assignment(hopeless, invalid="raise")


@pytest.mark.parametrize("device", DEVICES)
def test_one_finite_entry_beside_which_one_vanishes(device: str) -> None:
    """A price of 1e30 + 1 would be 1e30, as good as the only valid entry."""
    assert queries(linear_assignment(torch.tensor([[INF, INF, 1e30]], device=device))) == [2]


@pytest.mark.parametrize("device", DEVICES)
def test_golden_repeats_and_groups(device: str) -> None:
    cost = torch.tensor([[1.0, 2, 2, 1], [2, 2, 2, 1]], device=device)
    tiled, interleaved = linear_assignment(cost, repeats=2), linear_assignment(cost, repeats=2, repeat_order="interleave")
    assert tiled.query.tolist() == [[[0, 1], [2, 3]]]  # [copy, target]
    assert interleaved.query.tolist() == [[[0, 2], [1, 3]]]
    grouped = linear_assignment(torch.tensor([[3.0, 1, 2, 0]], device=device), groups=2)
    assert grouped.query.tolist() == [[[1], [3]]]
    assert grouped.status.shape == (1, 2, 1)
    assert (grouped.groups, grouped.repeats, grouped.queries, grouped.layers) == (2, 1, 4, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_scipy(device: str, kind: str) -> None:
    for seed, (targets, count) in enumerate(SHAPES):
        for dtype in (torch.float32, torch.float64):
            cost = cost_matrix(kind, targets, count, seed, dtype)
            expected = scipy_queries(cost.numpy())
            assert queries(linear_assignment(cost.to(device))) == expected, (targets, count, dtype)
            total = linear_assignment(cost.to(device), ties="any")
            wanted = sum(cost[t, q].item() for t, q in enumerate(expected) if q >= 0)
            assert total.cost[total.query >= 0].double().sum().item() == pytest.approx(wanted, rel=1e-9, abs=1e-9 * cost.abs().max().item())


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 12), st.integers(0, 14), st.sampled_from(KINDS), st.booleans())
def test_equals_scipy_on_small_ties(seed: int, targets: int, count: int, kind: str, wide: bool) -> None:
    cost = torch.stack([cost_matrix(kind, targets, count, seed + b, torch.float64 if wide else torch.float32) for b in range(8)])
    matches = linear_assignment(cost)
    expected = [scipy_queries(one) for one in cost.numpy()]
    assert matches.query.view(8, targets).tolist() == expected
    assert torch.equal(reference(cost.view(1, 8 * targets, count), batch=8)[0], matches.query)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12), st.floats(0.05, 0.95), st.sampled_from(("random", "integer")))
def test_invalid_entries_are_the_last_resort(seed: int, targets: int, count: int, share: float, kind: str) -> None:
    cost = sprinkle_invalid(cost_matrix(kind, targets, count, seed), share, seed)
    matches = linear_assignment(cost)
    assert queries(matches) == scipy_queries(filled(cost.numpy()))
    paired = matches.query[0, 0] >= 0
    on_invalid = int((paired & matches.cost[0, 0].isinf()).sum())
    assert on_invalid == unavoidable_invalid_pairs(cost.numpy())
    dropped = linear_assignment(cost, invalid="drop")
    assert torch.equal(dropped.query, matches.query.where(matches.cost < INF, -1))
    bits = INVALID_ENTRIES * (not bool(cost.isfinite().all())) + INVALID_PAIR * (on_invalid > 0)
    assert matches.status.item() == bits + UNMATCHED_TARGET * (targets > count)
    assert dropped.status.item() == bits + UNMATCHED_TARGET * (targets > count or on_invalid > 0)
    for drop in (False, True):
        for got, wanted in zip(reference(cost[None], drop=drop), (dropped, matches)[not drop].__dict__.values(), strict=False):
            assert torch.equal(got, wanted)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 40))
def test_permutation(seed: int, targets: int, count: int) -> None:
    """Where the optimum is unique, it moves with the rows and columns."""
    cost = cost_matrix("random", targets, count, seed, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(targets, generator=generator), torch.randperm(count, generator=generator)
    plain, moved = linear_assignment(cost).query[0, 0], linear_assignment(cost[rows][:, columns]).query[0, 0]
    assert torch.equal(torch.where(moved < 0, -1, columns[moved]), plain[rows])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(0, 20), st.integers(-50, 50))
def test_adding_to_a_row_changes_nothing(seed: int, targets: int, more: int, offset: int) -> None:
    cost = cost_matrix("integer", targets, targets + more + 1, seed)  # fewer targets than queries: all of them are matched
    shifted = cost.clone()
    shifted[seed % targets] += offset
    assert queries(linear_assignment(cost)) == queries(linear_assignment(shifted))


def test_query_major_equals_target_major() -> None:
    for kind in KINDS:
        cost = torch.stack([cost_matrix(kind, 12, 30, seed) for seed in range(4)])
        same(linear_assignment(cost), linear_assignment(cost.transpose(1, 2).contiguous(), layout="query_major"))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (7, 9), (8, 8), (16, 24), (3, 17, 33), (2, 2, 100, 45), (5, 0, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transpose_costs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    costs = torch.randn(shape, dtype=dtype)
    op = torch.ops.ssod_fast.transpose_costs.default
    assert torch.equal(op(costs), costs.transpose(-1, -2))
    assert op(costs).is_contiguous()
    torch.library.opcheck(op, (costs,))


def batch_of(sizes: list[int], count: int, layers: int, kind: str = "integer") -> list[Tensor]:
    """Costs [L, T_b, Q] of each image."""
    return [torch.stack([cost_matrix(kind, size, count, 100 * b + layer) for layer in range(layers)]) for b, size in enumerate(sizes)]


SIZES = [3, 0, 12, 5, 40, 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("groups", "repeats", "order"), [(1, 1, "tile"), (3, 1, "tile"), (1, 4, "tile"), (1, 4, "interleave"), (2, 3, "tile")]
)
def test_forms_of_a_batch_agree(device: str, groups: int, repeats: int, order: Any) -> None:
    """Ragged = padded with NaN = one by one = layer by layer; groups = separate calls; repeats = explicit copies."""
    count, layers = 24, 3
    images = [image.to(device) for image in batch_of(SIZES, count, layers)]
    options: dict[str, Any] = {"groups": groups, "repeats": repeats, "repeat_order": order}
    offsets = torch.tensor([0, *np.cumsum(SIZES)], device=device)
    ragged = linear_assignment(torch.cat(images, 1), offsets=offsets.int(), **options)
    padded = torch.full((layers, len(SIZES), max(SIZES), count), N, device=device)
    for b, image in enumerate(images):
        padded[:, b, : SIZES[b]] = image
    counted = linear_assignment(padded, counts=torch.tensor(SIZES, device=device), **options)
    one_layer = linear_assignment(padded[1], counts=torch.tensor(SIZES, device=device), **options)
    assert torch.equal(one_layer.query[0], counted.query[1])
    assert torch.equal(ragged.status, counted.status)
    for b, size in enumerate(SIZES):
        rows = slice(b * max(SIZES), b * max(SIZES) + size)
        own = slice(int(offsets[b]), int(offsets[b + 1]))
        assert torch.equal(counted.query[..., rows], ragged.query[..., own])
        assert torch.equal(counted.cost[..., rows], ragged.cost[..., own])
        assert (counted.query[..., rows.stop : (b + 1) * max(SIZES)] == -1).all()
        assert counted.cost[..., rows.stop : (b + 1) * max(SIZES)].isinf().all()
        assert (ragged.image[own] == b).all()
        for layer in range(layers):
            check_entries(images[b][layer].cpu(), ragged.query[layer, :, own].cpu(), groups, repeats, order)
    got = reference(torch.cat(images, 1), offsets, batch=len(SIZES), groups=groups, repeats=repeats, interleave=order == "interleave")
    for wanted, actual in zip(got, (ragged.query, ragged.cost, ragged.status), strict=True):
        assert torch.equal(wanted, actual)


def check_entries(cost: Tensor, found: Tensor, groups: int, repeats: int, order: str) -> None:
    """[E, T] of one problem against scipy on the copied rows of each group."""
    targets, width = cost.shape[0], cost.shape[1] // groups
    for group in range(groups):
        part = cost[:, group * width : (group + 1) * width]
        rows = part.repeat(repeats, 1) if order == "tile" else part.repeat_interleave(repeats, 0)
        expected = torch.tensor(scipy_queries(rows.numpy()), dtype=torch.int64)
        expected = torch.where(expected < 0, -1, expected + group * width)
        own = found[group * repeats : (group + 1) * repeats]
        copies = expected.view(repeats, targets) if order == "tile" else expected.view(targets, repeats).T
        assert torch.equal(own, copies)


@pytest.mark.parametrize("device", DEVICES)
def test_row_minima_change_nothing(device: str) -> None:
    """Keys as matching_cost gives them, and keys that tell nothing or lie out of range."""
    for kind in KINDS:
        cost = torch.stack([sprinkle_invalid(cost_matrix(kind, 12, 30, seed), 0.02 * (seed % 2), seed) for seed in range(6)]).to(device)
        finite = cost.isfinite().all(-1)
        keys = torch.where(finite, cost.nan_to_num(0, INF, INF).argmin(-1), -(2**63))
        plain = linear_assignment(cost)
        same(linear_assignment(cost, row_min=keys), plain)
        same(linear_assignment(cost, row_min=torch.full_like(keys, -(2**63))), plain)
        same(linear_assignment(cost, row_min=torch.full_like(keys, 2**31)), plain)
        same(linear_assignment(cost, row_min=keys.fill_(7), groups=2), linear_assignment(cost, groups=2))  # of another range: not read
        same(linear_assignment(cost[:, :, :9], row_min=keys), linear_assignment(cost[:, :, :9]))  # more targets than queries


@pytest.mark.parametrize(
    "shape", [(0, 5), (5, 0), (0, 0), (3, 0, 5), (3, 5, 0), (0, 3, 5), (2, 0, 3, 5), (0, 2, 3, 5), (2, 2, 3, 0)], ids=str
)
@pytest.mark.parametrize("device", DEVICES)
def test_empty(device: str, shape: tuple[int, ...]) -> None:
    cost = torch.zeros(shape, device=device)
    layers, batch, targets, _ = (1,) * (4 - len(shape)) + shape
    matches = linear_assignment(cost, repeats=2)
    assert matches.query.shape == matches.cost.shape == (layers, 2, batch * targets)
    assert (matches.query == -1).all()
    assert matches.cost.isinf().all()
    assert (matches.status == (UNMATCHED_TARGET if targets else 0)).all()
    assert matches.image.shape == (batch * targets,)
    nothing = linear_assignment(cost.new_zeros(0, 5), offsets=torch.zeros(1, dtype=torch.int64, device=device))
    assert nothing.query.shape == (1, 1, 0)
    assert nothing.batch == 0


def test_dtypes() -> None:
    cost = cost_matrix("integer", 6, 9, 0)
    expected = linear_assignment(cost)
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8):
        matches = linear_assignment(cost.to(dtype))
        assert torch.equal(matches.query, expected.query)
        narrow = dtype in (torch.float16, torch.bfloat16)
        assert matches.cost.dtype == (torch.float32 if narrow else torch.float64)
    large = torch.tensor([[2**52, 2**52 + 1], [2**52, 2**52 + 3]])  # not numbers of float32
    assert queries(linear_assignment(large)) == [1, 0]
    fine = torch.tensor([[1.0, 1 + 1e-12], [1, 1 + 3e-12]], dtype=torch.float64)
    assert queries(linear_assignment(fine)) == [1, 0]
    graded = cost.requires_grad_()
    assert not linear_assignment(graded).cost.requires_grad


def test_layouts_of_memory() -> None:
    cost = torch.stack([cost_matrix("integer", 10, 12, seed) for seed in range(3)])
    expected = linear_assignment(cost)
    wide = torch.full((3, 20, 30), N)
    wide[:, ::2, 3:27:2] = cost
    same(linear_assignment(wide[:, ::2, 3:27:2]), expected)
    same(linear_assignment(cost.permute(2, 0, 1).contiguous().permute(1, 2, 0)), expected)
    before = cost.clone()
    linear_assignment(sprinkle_invalid(cost, 0.2, 0))
    assert torch.equal(cost, before)


def test_threads_agree() -> None:
    cost = torch.stack([cost_matrix("integer", 40, 300, seed) for seed in range(40)])
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(linear_assignment(cost))
    torch.set_num_threads(threads)
    same(*results)


def test_overflow_leaves_rows_unmatched_and_nothing_else() -> None:
    """Costs whose differences leave float64 have no defined optimum, but they end, and no query is taken twice."""
    rng = np.random.default_rng(0)
    cost = torch.tensor(rng.choice([1.7e308, -1.7e308, 0.0], (30, 12, 12)))
    found = linear_assignment(cost).query.view(30, 12)
    for row in found.tolist():
        taken = [q for q in row if q >= 0]
        assert len(set(taken)) == len(taken)


def test_every_output_is_written() -> None:
    """Deterministic mode fills fresh memory with NaN and large numbers."""
    torch.use_deterministic_algorithms(True)
    try:
        offsets = torch.tensor([0, 3, 3, 6])
        matches = linear_assignment(cost_matrix("random", 6, 4, 0).expand(2, 6, 4), offsets=offsets, groups=2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert ((matches.query >= -1) & (matches.query < 4)).all()
    assert not matches.cost.isnan().any()
    assert (matches.status <= 7).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cost": [[1.0]]}, TypeError, "cost must be a tensor, got list"),
        ({"cost": torch.zeros(2, 2, dtype=torch.bool)}, TypeError, "cost must have a real number dtype, got torch.bool"),
        ({"cost": torch.zeros(2, 2).to_sparse()}, TypeError, "cost must be a dense tensor, got layout torch.sparse_coo"),
        ({"cost": torch.zeros(3)}, ValueError, r"cost must have shape \[L, B, T, Q\], \[B, T, Q\] or \[T, Q\], got \[3\]"),
        (
            {"cost": torch.zeros(1, 1, 3, 4), "offsets": torch.tensor([0, 3])},
            ValueError,
            r"cost must have shape \[L, G, Q\] or \[G, Q\] with offsets, got \[1, 1, 3, 4\]",
        ),
        ({"offsets": [0, 3]}, TypeError, "offsets must be a tensor, got list"),
        ({"offsets": torch.tensor([0.0, 3])}, TypeError, "offsets must be int32 or int64, got torch.float32"),
        ({"offsets": torch.tensor([[0, 3]])}, ValueError, r"offsets must have shape \[B \+ 1\], got \[1, 2\]"),
        ({"offsets": torch.tensor([0, 2])}, ValueError, r"offsets must rise from 0 to the number of rows \(3\), got \[0, 2\]"),
        ({"offsets": torch.tensor([0, 2, 1, 3])}, ValueError, "offsets must rise from 0"),
        ({"offsets": torch.tensor([0, 3]), "counts": torch.tensor([3])}, ValueError, "offsets and counts must not be given together"),
        ({"counts": torch.tensor([3, 1])}, ValueError, r"counts must have shape \[1\], got \[2\]"),
        ({"counts": torch.tensor([4])}, ValueError, r"counts must lie in 0..3, the number of target rows of an image, got \[4\]"),
        ({"layout": "rows"}, ValueError, "layout must be one of 'target_major', 'query_major', got 'rows'"),
        ({"repeat_order": "zip"}, ValueError, "repeat_order must be one of 'tile', 'interleave', got 'zip'"),
        ({"invalid": "skip"}, ValueError, "invalid must be one of 'keep', 'drop', 'raise', got 'skip'"),
        ({"ties": "lapjv"}, ValueError, "ties must be one of 'scipy', 'any', got 'lapjv'"),
        ({"groups": 3}, ValueError, r"groups must be >= 1 and divide the number of queries \(4\), got 3"),
        ({"groups": 0}, ValueError, "groups must be >= 1"),
        ({"repeats": 0}, ValueError, "repeats must be >= 1, got 0"),
        ({"repeats": 2**40}, ValueError, "repeats must be at most 4096, got 1099511627776"),
        ({"repeats": True}, TypeError, "repeats must be an int, got True"),
        ({"groups": 2.0}, TypeError, r"groups must be an int, got 2\.0"),
        ({"repeats": "2"}, TypeError, "repeats must be an int, got '2'"),
        ({"row_min": torch.zeros(3)}, TypeError, "row_min must be an int64 tensor, got torch.float32"),
        (
            {"row_min": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            r"row_min must have shape \[3\], as the cost without queries, got \[4\]",
        ),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_assignment(**{"cost": torch.zeros(3, 4), **options})


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    op = torch.ops.ssod_fast.linear_assignment.default
    cost = torch.randn(2, 6, 8, device=device)
    offsets, counts = torch.tensor([0, 2, 6], device=device), torch.tensor([3, 1], device=device)
    keys = cost.argmin(-1)
    torch.library.opcheck(op, (cost, offsets, None, keys, 2, 1, 1, False, False, False))
    torch.library.opcheck(op, (cost.double(), None, counts, None, 2, 2, 2, True, True, True))


@pytest.mark.parametrize("device", DEVICES)
def test_compile_and_no_sync(device: str) -> None:
    cost = torch.randn(2, 6, 8, device=device)
    offsets = torch.tensor([0, 2, 6], device=device)

    def total(cost: Tensor) -> Tensor:
        matches = linear_assignment(cost, offsets=offsets, groups=2)
        return matches.cost.where(matches.query >= 0, 0).sum() + matches.image.sum()

    with no_sync():
        expected = total(cost)
        linear_assignment(cost.view(2, 2, 3, 8), counts=torch.tensor([3, 1], device=device), repeats=2)
    assert torch.equal(torch.compile(total, fullgraph=True, backend="aot_eager")(cost), expected)


def test_pairs_of_a_layer() -> None:
    cost = torch.stack(batch_of([3, 3], 8, 2))
    matches = linear_assignment(cost.transpose(0, 1).contiguous())
    for layer in range(2):
        for b, (query, target) in enumerate(matches.pairs(layer)):
            expected = scipy_assignment(cost[b, layer].T.numpy())
            assert query.tolist() == expected[0].tolist()
            assert target.tolist() == expected[1].tolist()


@pytest.mark.gpu
def test_cuda_equals_cpu_at_all_sizes() -> None:
    """Registers, shared memory beyond them, and the workspace beyond that."""
    for targets, count in ((100, 900), (900, 100), (300, 300), (50, 1500), (1500, 50), (40, 6000), (6000, 40), (20, 30000)):
        cost = torch.stack([cost_matrix(kind, targets, count, 7) for kind in ("random", "integer")])
        same_on_host(linear_assignment(cost.cuda()), linear_assignment(cost))
    sizes = torch.tensor([0, 700, 701, 705])
    cost = cost_matrix("integer", 705, 60, 3)
    same_on_host(linear_assignment(cost.cuda(), offsets=sizes.cuda(), repeats=3), linear_assignment(cost, offsets=sizes, repeats=3))


def same_on_host(a: Matches, b: Matches) -> None:
    for x, y in ((a.query, b.query), (a.cost, b.cost), (a.status, b.status)):
        assert torch.equal(x.cpu(), y)


@pytest.mark.gpu
def test_graph_capture_with_changed_costs() -> None:
    costs = torch.stack([cost_matrix("integer", 30, 90, seed) for seed in range(8)]).cuda()
    static, offsets = costs.new_zeros(60, 90), torch.tensor([0, 25, 60], device="cuda")
    linear_assignment(static, offsets=offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear_assignment(static, offsets=offsets)
    for a, b in ((0, 1), (4, 6)):
        static.copy_(costs[[a, b]].flatten(0, 1))
        offsets.copy_(torch.tensor([0, 10 + a, 60]))
        graph.replay()
        same(captured, linear_assignment(static, offsets=offsets))


@pytest.mark.gpu
def test_side_stream() -> None:
    cost = cost_matrix("random", 60, 300, 0)
    stream = torch.cuda.Stream()
    on_device = cost.cuda()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), no_sync():
        matches = linear_assignment(on_device)
    stream.synchronize()
    same_on_host(matches, linear_assignment(cost))
