"""Two processes of which one has boxes: nothing hangs, and both end with the mean of their gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ssd_det_ranks import alone, work
from torch import multiprocessing

pytestmark = pytest.mark.slow


def test_ranks_agree(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with_boxes, without = alone(0), alone(1)
    assert first.keys() == with_boxes.keys() == without.keys()
    for name, grad in first.items():
        torch.testing.assert_close(grad, (with_boxes[name] + without[name]) / 2, rtol=1e-4, atol=1e-6)
    refiner = [name for name in first if name.startswith("1.")]
    assert any((first[name] != 0).any() for name in refiner)
    assert all((without[name] == 0).all() for name in refiner)
