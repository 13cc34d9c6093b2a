"""The Triton fit of two Gaussians against the reference, which is held to scikit-learn in tests/ops."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_samples import DEVICE

from ssod_fast.kernels import gmm_threshold as kernels

reference = importlib.import_module("ssod_fast.ops.gmm_threshold")
EXACT = ("threshold", "keep", "counters")
DENSITY, POSTERIOR = 0, 1


def compare(
    values: Tensor, offsets: Tensor | None = None, counts: Tensor | None = None, groups: int = 1, max_iter: int = 100, **chosen: Any
) -> Any:
    """Decisions are equal, statistics to the rounding of their sums."""
    settings = {"reg_covar": 1e-5, "tol": 1e-3, "max_iter": max_iter, "reverse": False, "rule": DENSITY} | chosen
    rows = tuple(t if t is None else t.to(DEVICE) for t in (offsets, counts))
    result = reference.GMMThreshold(*kernels.gmm_threshold(values.to(DEVICE), *rows, groups, *settings.values()))
    wanted = reference._reference(values.to(DEVICE), *rows, groups, *settings.values())
    for name, got, expected in zip(result._fields, result, wanted, strict=True):
        tolerance = 0 if name in EXACT else 1e-9
        assert got.dtype == expected.dtype, name
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
    return result


def samples(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """[60] of two overlapping clusters, with equal samples and some that are not finite."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(60, generator=generator, dtype=torch.float64)
    values[20:] *= 3
    values[::3] += 4
    values[3], values[5], values[7], values[40:43] = math.nan, math.inf, -math.inf, 1.5
    return values.to(dtype)


def test_golden() -> None:
    fit = compare(torch.tensor([0.1, 0.2, 0.25, 0.3, 0.35, 2, 2.2, 2.5, 2.7, 3], dtype=torch.float64))
    assert fit.threshold.tolist() == [0.25]
    assert fit.iterations.tolist() == [5]
    torch.testing.assert_close(fit.means.cpu(), torch.tensor([[0.24, 2.48]], dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(fit.variances.cpu(), torch.tensor([[0.00741, 0.12561]], dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(fit.lower_bound.cpu(), torch.tensor([-0.3668539], dtype=torch.float64), atol=1e-6, rtol=0)
    assert compare(torch.tensor([1.0, 2.0], dtype=torch.float64)).iterations.tolist() == [3]


@pytest.mark.parametrize("rule", [DENSITY, POSTERIOR])
@pytest.mark.parametrize("reverse", [False, True])
def test_equal_to_the_reference(rule: int, reverse: bool) -> None:
    chosen = {"rule": rule, "reverse": reverse}
    offsets = torch.tensor([0, 0, 1, 3, 30, 40, 43, 60])  # no sample, one, two, and three equal ones among them
    ragged = compare(samples(), offsets, groups=7, **chosen)
    assert ragged.flag[[0, 1, 5]].tolist() == [1, 2, 4]
    compare(samples(1, torch.float32).view(4, 15), counts=torch.tensor([15, 0, 1, 9]), groups=4, **chosen)
    fit = compare(samples(2), max_iter=2, **chosen)
    assert fit.flag.tolist() == [8]


def test_samples_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_BLOCK", 16)
    for rule in (DENSITY, POSTERIOR):
        compare(samples(3), rule=rule)


def test_tolerance_keeps_its_digits() -> None:
    values = samples(4)
    fit = compare(values)
    step = float((fit.lower_bound - compare(values, max_iter=int(fit.iterations) - 1).lower_bound).abs())
    assert compare(values, tol=step * (1 - 1e-9)).iterations > fit.iterations  # no difference in float32
    assert compare(values, tol=step * (1 + 1e-9)).iterations == fit.iterations


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    groups = shape[0] if len(shape) == 2 else 1
    fit = compare(torch.zeros(shape), groups=groups)
    assert fit.keep.shape == shape
    assert fit.flag.tolist() == [1] * groups


def test_padding_and_samples_of_no_group_are_not_kept() -> None:
    values = torch.zeros(2, 4)
    fit = kernels.gmm_threshold(values.to(DEVICE), None, torch.tensor([3, 0], device=DEVICE), 2, 1e-5, 1e-3, 100, False, DENSITY)
    assert fit[1].tolist() == [[True, True, True, False], [False] * 4]
    offsets = torch.tensor([2, 5, 4, 99], device=DEVICE)
    keep = kernels.gmm_threshold(values.flatten().to(DEVICE), offsets, None, 3, 1e-5, 1e-3, 100, False, DENSITY)[1]
    assert keep.tolist() == [False] * 2 + [True] * 6


@pytest.mark.gpu
def test_many_in_a_graph() -> None:
    values = torch.cat([samples(seed) + seed for seed in range(200)]).to(DEVICE)
    offsets = torch.arange(0, 12001, 60, device=DEVICE)
    compare(values, offsets, groups=200)
    graph = torch.cuda.CUDAGraph()
    arguments = (offsets, None, 200, 1e-5, 1e-3, 100, False, DENSITY)
    with torch.cuda.graph(graph):
        threshold = kernels.gmm_threshold(values, *arguments)[0]
    values.copy_(values.flip(0))
    graph.replay()
    assert torch.equal(threshold, reference._reference(values, *arguments)[0])
