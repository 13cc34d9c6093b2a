"""The assignment that CUDA blocks run (csrc/assignment.h), run by threads of the CPU: bit for bit what scipy finds."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from assignment_cases import KINDS, cost_matrix, filled, scipy_queries, sprinkle_invalid
from cpp_module import build

UNKNOWN = -(2**63)


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The compiled module."""
    return build("assignment", tmp_path_factory.mktemp("assignment"))


def solve(
    team: ModuleType, cost: torch.Tensor, threads: int, *, repeats: int = 1, interleave: bool = False, key_share: float = 1
) -> list[int]:
    """Query of each (target, copy), with keys for a share of the rows. Columns are in registers where they fit."""
    targets, count = cost.shape
    rng = np.random.default_rng(targets + count)
    known = cost.isfinite().all(-1).numpy() & (rng.random(targets) < key_share)
    keys = np.where(known, cost.nan_to_num().argmin(-1).numpy() if count else 0, UNKNOWN)
    in_memory = max(targets * repeats, count) > threads * team.columns_in_registers or bool(rng.integers(2))
    run = team.solve_f32 if cost.dtype is torch.float32 else team.solve_f64
    found: list[int] = run(cost.numpy(), count, keys, team.Options(repeats, interleave, in_memory), threads).tolist()
    return found


@pytest.mark.parametrize(("threads", "problems", "largest"), [(1, 1500, 12), (3, 200, 24), (4, 200, 40), (32, 40, 70)])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_scipy(team: ModuleType, kind: str, threads: int, problems: int, largest: int) -> None:
    rng = np.random.default_rng(threads)
    for seed in range(problems):
        dtype = torch.float32 if seed % 2 else torch.float64
        cost = cost_matrix(kind, int(rng.integers(1, largest)), int(rng.integers(1, largest)), seed, dtype)
        assert solve(team, cost, threads, key_share=(seed % 3) / 2) == scipy_queries(cost.numpy()), (kind, threads, seed)


@pytest.mark.parametrize("threads", [1, 4])
def test_invalid_entries(team: ModuleType, threads: int) -> None:
    rng = np.random.default_rng(0)
    for seed in range(400 // threads):
        targets, count = rng.integers(1, 12, 2).tolist()
        cost = sprinkle_invalid(cost_matrix(KINDS[seed % 2], targets, count, seed), float(rng.random()), seed)
        assert solve(team, cost, threads, key_share=0.7) == scipy_queries(filled(cost.numpy()))


@pytest.mark.parametrize("interleave", [False, True])
def test_repeats(team: ModuleType, interleave: bool) -> None:
    rng = np.random.default_rng(0)
    for seed in range(200):
        targets, count = rng.integers(1, 8, 2).tolist()
        repeats = 1 + seed % 4
        cost = cost_matrix("integer", targets, count, seed)
        rows = cost.repeat_interleave(repeats, 0) if interleave else cost.repeat(repeats, 1)
        assert solve(team, cost, 4, repeats=repeats, interleave=interleave) == scipy_queries(rows.numpy())


def test_large(team: ModuleType) -> None:
    for targets, count in ((100, 900), (300, 300), (120, 40)):
        for kind in ("random", "integer"):
            cost = cost_matrix(kind, targets, count, 0)
            assert solve(team, cost, 1) == solve(team, cost, 2) == scipy_queries(cost.numpy())
