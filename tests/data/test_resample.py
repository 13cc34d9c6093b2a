"""Repeat-factor resampling."""

from __future__ import annotations

import math

import pytest
import torch

from ssod_fast.data import LabeledResampler, repeat_factors
from ssod_fast.structures import Target


def images(n: int, **counts: int) -> list[list[int]]:
    """n images; class k is in the first counts[f"c{k}"] of them."""
    return [[k for k in range(len(counts)) if i < counts[f"c{k}"]] for i in range(n)]


@pytest.mark.parametrize(
    ("t", "n", "count", "factor", "times"),
    [(1e-3, 1000, 1, 1.0, 1), (1e-3, 4000, 1, 2.0, 2), (1e-3, 10000, 1, 3.1623, 4), (0.1, 500, 1, 7.0711, 8), (0.01, 1000, 1, 3.1623, 4)],
)
def test_golden_factors(t: float, n: int, count: int, factor: float, times: int) -> None:
    factors = repeat_factors(images(n, c0=count), 1, t)
    assert factors.per_class[0] == pytest.approx(factor, abs=1e-4)
    assert factors.times[0] == times
    assert factors.times[-1] == 1


def test_the_rarest_class_of_an_image_decides() -> None:
    factors = repeat_factors(images(10000, c0=1, c1=10), 2, 1e-3)
    assert factors.per_class.tolist() == [math.sqrt(10), 1]
    assert factors.times[:2].tolist() == [4, 1]
    assert factors.per_image[5000] == 1  # no boxes
    assert "repeats 1 of 10000 images for 1 of 2 classes" in str(factors)


def test_rows() -> None:
    targets = [Target(boxes=torch.zeros(len(row), 4), labels=torch.tensor(row, dtype=torch.int64)) for row in ([0], [0, 1], [], [0])]
    rows, factors = LabeledResampler().rows(targets, 2)
    assert rows.tolist() == [0, 1, 2, 3]
    assert factors is None
    rows, factors = LabeledResampler(t=1.0).rows(targets, 3)  # f = 3/4, 1/4, 0
    assert rows.tolist() == [0, 0, 1, 1, 2, 3, 3]
    assert factors is not None
    assert factors.per_class.tolist() == [math.sqrt(4 / 3), 2, 1]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"t must lie in \(0, 1\], got 0"):
        repeat_factors([[0]], 1, 0)
    with pytest.raises(ValueError, match="labels must hold at least one image"):
        repeat_factors([], 1, 0.5)
