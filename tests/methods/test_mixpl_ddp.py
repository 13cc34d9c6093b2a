"""Two processes of which one has pseudo labels: nothing hangs and both end with the same gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixpl_ranks import work
from torch import multiprocessing

pytestmark = pytest.mark.slow


def run(folder: Path, skip: bool) -> list[Any]:
    multiprocessing.spawn(work, (str(folder), skip), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_ranks_agree(tmp_path: Path) -> None:
    (gates, grads), (other_gates, other_grads) = run(tmp_path, skip=False)
    assert gates == [1] * 4
    assert other_gates == [0] * 4
    for a, b in zip(grads, other_grads, strict=True):
        assert torch.equal(a, b)
        assert a.abs().sum() > 0


def test_skipping_shut_branches_is_refused(tmp_path: Path) -> None:
    for message in run(tmp_path, skip=True):
        assert "skip_closed_gate must be off in a distributed run" in message
