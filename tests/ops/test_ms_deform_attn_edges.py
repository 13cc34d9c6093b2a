"""Samples outside of their level, numbers that are not finite, sizes that do not fit, and nothing at all."""

from __future__ import annotations

import math

import pytest
import torch
from deform_cases import (
    DEVICES,
    SHAPES,
    composed,
    counting_value,
    gradients,
    random_case,
)

from ssod_fast.ops import ms_deform_attn

OPS = torch.ops.ssod_fast


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30, 1e38])
def test_samples_that_are_nowhere(bad: float, dtype: torch.dtype, device: str) -> None:
    case = random_case(dtype=dtype, geometry=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    for axis in (0, 1):
        lost, kept = case.locations.clone(), case.weights.clone()
        lost[..., 1, axis] = bad
        kept[..., 1] = 0
        nowhere = case.with_tensors(case.value, lost, case.weights).leaves()
        out = nowhere()
        expected = case.with_tensors(case.value, case.locations, kept)
        expected = expected.leaves()
        wanted = expected()
        assert torch.equal(out, wanted)
        grads, targets = gradients(out, *nowhere.tensors()), gradients(wanted, *expected.tensors())
        torch.testing.assert_close(grads[0], targets[0], atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)
        assert (grads[1][..., 1, :] == 0).all()
        assert (grads[2][..., 1] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_discrete_clamps_what_lies_outside_and_drops_nan(device: str) -> None:
    value = counting_value([(2, 4)], dtype=torch.float32, device=device).requires_grad_()
    inf, nan = math.inf, math.nan
    points = [(inf, inf), (-inf, 1e30), (1e38, -1e38), (nan, 0.5), (0.5, nan)]
    locations = torch.tensor(points, device=device).view(1, 5, 1, 1, 2)
    weights = torch.ones(1, 5, 1, 1, device=device, requires_grad=True)
    out = ms_deform_attn(value, [(2, 4)], locations, weights, method="discrete")
    assert out.flatten().tolist() == [8, 5, 4, 0, 0]
    grad_value, grad_weights = torch.autograd.grad(out.sum(), (value, weights))
    assert grad_value.flatten().tolist() == [0, 0, 0, 1, 1, 0, 0, 1]
    assert grad_weights.flatten().tolist() == [8, 5, 4, 0, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["bilinear", "discrete"])
def test_nan_propagates_only_from_what_is_touched(method: str, device: str) -> None:
    value = counting_value([(2, 3)], dtype=torch.float32, device=device)
    value[0, 2] = math.nan  # top right; the sample at the left edge touches tokens 0 and 3
    location = torch.tensor((0.05, 0.4), device=device).view(1, 1, 1, 1, 2)
    weight = torch.ones(1, 1, 1, 1, device=device)
    assert ms_deform_attn(value, [(2, 3)], location, weight, method=method).isfinite().all()
    assert ms_deform_attn(value, [(2, 3)], location, weight * math.nan, method=method).isnan().all()
    there = torch.tensor((0.9, 0.2), device=device).view(1, 1, 1, 1, 2)
    assert ms_deform_attn(value, [(2, 3)], there, weight, method=method).isnan().all()
    if method == "bilinear":  # x lies on column 1 exactly, where column 2 has weight 0: it is read all the same, as grid_sample does
        exact = torch.tensor((0.5, 0.25), device=device).view(1, 1, 1, 1, 2)
        assert ms_deform_attn(value, [(2, 3)], exact, weight).isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["bilinear", "discrete"])
@pytest.mark.parametrize(
    "table",
    [
        [(5, 7), (3, 4), (200, 300)],
        [(5, 7), (0, 4), (2, 2)],
        [(-5, 7), (3, -4), (-2, -2)],
        [(0, 0), (0, 0), (0, 0)],
        [(2**40, 2**40), (2**62, 4), (2**31, 2**31)],
    ],
    ids=str,
)
def test_sizes_on_the_device_that_do_not_fit(table: list[tuple[int, int]], method: str, device: str) -> None:
    """Nothing is read or written outside of value: the result is finite, and so is every gradient.

    Calls the ops, since the public functions refuse such sizes in host memory, where looking at them waits for nobody.
    """
    case = random_case(device=device, shapes=SHAPES)
    room = torch.full((2, 300, 3, 4), math.nan, device=device)
    room[:, 100:151] = case.value
    value = room[:, 100:151]
    start = torch.tensor([-40, 10**9, 50], device=device)
    for shapes, first in ((table, None), (SHAPES, start)):
        levels = torch.tensor(shapes, device=device), first
        inputs = (value, *levels, case.locations, case.weights, None, None, ["bilinear", "discrete"].index(method))
        out = OPS.ms_deform_attn(*inputs)
        assert out.isfinite().all()
        assert all(grad.isfinite().all() for grad in OPS.ms_deform_attn_backward(torch.ones_like(out), *inputs, False))
        if device == "cuda":
            public = ms_deform_attn(value, levels[0], case.locations, case.weights, level_start_index=first, method=method)
            assert torch.equal(public, out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["bilinear", "discrete"])
@pytest.mark.parametrize(
    "sizes",
    [{"batch": 0}, {"queries": 0}, {"points": 0}, {"shapes": []}, {"shapes": [(0, 5), (4, 0)]}, {"heads": 0}, {"channels": 0}],
    ids=str,
)
def test_empty(sizes: dict, method: str, device: str) -> None:
    case = random_case(**sizes, device=device).leaves()
    out = case(method=method)
    batch, queries, heads, channels = (sizes.get(k, n) for k, n in (("batch", 2), ("queries", 6), ("heads", 3), ("channels", 4)))
    assert out.shape == (batch, queries, heads * channels)
    assert (out == 0).all()
    for tensor, grad in zip(case.tensors(), torch.autograd.grad(out.sum(), case.tensors()), strict=True):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()
    table = torch.tensor(case.shapes, dtype=torch.int64, device=device).view(-1, 2)
    assert torch.equal(ms_deform_attn(case.value, table, case.locations, case.weights, method=method), out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1)])
def test_flat_levels(shape: tuple[int, int], device: str) -> None:
    case = random_case(shapes=[shape], points=4, device=device, dtype=torch.float64)
    torch.testing.assert_close(case(), composed(case), atol=1e-12, rtol=1e-12)
