"""Values and gradients of deformable attention against samples worked out by hand, grid_sample and loops."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from deform_cases import (
    DEVICES,
    DTYPES,
    GOLDENS,
    SHAPES,
    Case,
    Golden,
    composed,
    counting_value,
    gradients,
    random_case,
    tolerance,
)
from hypothesis import strategies as st
from torch import Tensor

from ssod_fast.ops import _ms_deform_attn as sampling
from ssod_fast.ops import ms_deform_attn

GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 5e-2, torch.bfloat16: 3e-1}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GOLDENS)
def test_golden_samples(name: str, dtype: torch.dtype, device: str) -> None:
    golden: Golden = GOLDENS[name]
    value = (counting_value([golden.shape], dtype=dtype, device=device) * golden.scale).requires_grad_()
    location = torch.tensor(golden.xy, dtype=dtype, device=device).view(1, 1, 1, 1, 2).requires_grad_()
    weight = torch.ones(1, 1, 1, 1, dtype=dtype, device=device, requires_grad=True)
    out = ms_deform_attn(value, [golden.shape], location, weight)
    grad_value, grad_location, grad_weight = torch.autograd.grad(out.sum(), (value, location, weight))
    assert out.item() == grad_weight.item() == golden.out
    assert all(b is None or a == b for a, b in zip(grad_location.flatten().tolist(), golden.grad_xy, strict=True))
    expected = [golden.grad_value.get(token, 0.0) for token in range(value.numel())]
    assert grad_value.flatten().tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
def test_golden_ragged(device: str) -> None:
    """Two heads of two channels, one point on a square level and two on a flat one."""
    options = {"dtype": torch.float64, "device": device}
    value = counting_value([(2, 2), (1, 3)], 2, 2, **options).requires_grad_()
    points = [[(0.5, 0.5), (0.25, 0.25), (0.75, 0.625)], [(0.375, 0.375), (0.375, 0.75), (1.0625, 0.25)]]
    locations = torch.tensor(points, **options).view(1, 1, 2, 3, 2).requires_grad_()
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], **options).view(1, 1, 2, 3).requires_grad_()
    out = ms_deform_attn(value, [(2, 2), (1, 3)], locations, weights, num_points=[1, 2])
    assert out.flatten().tolist() == [12.125, 13.03125, 11.14453125, 11.828125]
    grad_value, grad_locations, grad_weights = torch.autograd.grad(
        out, (value, locations, weights), torch.tensor([1.0, 2, 3, 4], **options).view(1, 1, 4)
    )
    assert grad_locations.flatten().tolist() == [12, 24, 6.75, 14, 7.875, -18.5, 14, 28, 31.5, -77.25, -108.5625, 15.078125]
    assert grad_weights.flatten().tolist() == [23, 42, 64.75, 46, 115.875, 45.234375]
    first = [0.125, 0.125, 0.125, 0.125, 0.140625, 0.1015625, 0.1640625]
    second = [0.421875, 0.140625, 0.140625, 0.046875, 0.421875, 0.703125, 0.17578125]
    assert grad_value[0, :, 0, 0].tolist() == first
    assert grad_value[0, :, 0, 1].tolist() == [2 * g for g in first]
    assert grad_value[0, :, 1, 0].tolist() == second
    torch.testing.assert_close(grad_value[0, :, 1, 1], grad_value[0, :, 1, 0] * 4 / 3, atol=1e-14, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("xy", "pixel"), [((0.5, 0.5), (2, 1)), ((1, 1), (3, 1)), ((-0.3, 0.1), (0, 0)), ((0.37, 0.74), (1, 1)), ((0.375, 0.75), (2, 1))]
)
def test_golden_discrete(xy: tuple[float, float], pixel: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    value = counting_value([(2, 4)], dtype=dtype, device=device)
    location = torch.tensor(xy, dtype=torch.float32, device=device).view(1, 1, 1, 1, 2)
    out = ms_deform_attn(value, [(2, 4)], location, torch.ones(1, 1, 1, 1, device=device), method="discrete")
    assert out.item() == 1 + pixel[1] * 4 + pixel[0]


SIZES = [
    {},
    {"batch": 1, "queries": 1, "heads": 1, "channels": 1},
    {"batch": 3, "queries": 7, "heads": 2, "channels": 3, "points": (1, 4, 2)},
    {"channels": 8, "points": 4, "shapes": SHAPES[:2]},
    {"channels": 16, "points": (3, 6, 3)},
    {"channels": 24, "heads": 5, "points": 1},
    {"channels": 30, "batch": 1, "points": 5, "shapes": [(9, 2)]},
    {"channels": 32, "heads": 8, "queries": 71, "points": 4},
    {"channels": 64, "heads": 1, "batch": 3, "points": (0, 3, 0)},
    {"channels": 71, "queries": 3},
    {"channels": 128, "queries": 2, "points": 8, "shapes": [*SHAPES, (1, 6)]},
    {"channels": 32, "heads": 2, "queries": 51, "batch": 1, "points": 4},  # as many queries as tokens
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(f"{k}{v}" for k, v in sizes.items()).replace(" ", ""))
def test_forward_and_gradients_match_grid_sample(sizes: dict, dtype: torch.dtype, device: str) -> None:
    case = random_case(**sizes, dtype=dtype, geometry=torch.float64 if dtype == torch.float64 else torch.float32, device=device).leaves()
    exact = case.double().leaves()
    out, expected = case(), composed(exact)
    assert out.dtype == dtype
    assert ((out.double() - expected).abs() <= tolerance(exact, dtype)).all()
    actual, wanted = gradients(out, *case.tensors()), gradients(expected, *exact.tensors())
    for tensor, grad, target in zip(case.tensors(), actual, wanted, strict=True):
        assert grad.dtype == tensor.dtype
        torch.testing.assert_close(grad.double(), target, atol=GRADIENT_TOLERANCE[dtype], rtol=GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", DTYPES, ids=str)
@pytest.mark.parametrize("locations", DTYPES, ids=str)
@pytest.mark.parametrize("weights", DTYPES, ids=str)
def test_mixed_dtypes(value: torch.dtype, locations: torch.dtype, weights: torch.dtype, device: str) -> None:
    case = random_case(channels=8, device=device)
    case = case.with_tensors(case.value.to(value), case.locations.to(locations), case.weights.to(weights)).leaves()
    exact = case.double()
    out = case()
    assert out.dtype == value
    assert ((out.double() - composed(exact)).abs() <= tolerance(exact, value)).all()
    grads = gradients(out, *case.tensors())
    assert [g.dtype for g in grads] == [value, locations, weights]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_discrete_matches_a_loop(dtype: torch.dtype, device: str) -> None:
    case = random_case(points=(1, 3, 2), dtype=dtype, geometry=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    case = case.leaves()
    out = case(method="discrete")
    exact = case.double().leaves()
    expected = discrete_by_loops(exact)
    assert ((out.double() - expected).abs() <= tolerance(exact, dtype) + 16 * torch.finfo(dtype).eps).all()
    actual = gradients(out, *case.tensors())
    wanted = torch.autograd.grad(expected, (exact.value, exact.weights), seeded_like(out).double())
    assert (actual[1] == 0).all()
    for grad, target in zip((actual[0], actual[2]), wanted, strict=True):
        torch.testing.assert_close(grad.double(), target, atol=GRADIENT_TOLERANCE[dtype], rtol=GRADIENT_TOLERANCE[dtype])


def seeded_like(out: Tensor) -> Tensor:
    """What `gradients` feeds in."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(out.device, out.dtype)


def discrete_by_loops(case: Case) -> Tensor:
    batch, queries, heads, samples, _ = case.locations.shape
    level_of = [i for i, n in enumerate(case.num_points) for _ in range(n)]
    starts = [sum(h * w for h, w in case.shapes[:i]) for i in range(len(case.shapes))]
    rows = []
    for b, q, m in torch.cartesian_prod(*map(torch.arange, (batch, queries, heads))).tolist():
        total = torch.zeros(case.value.shape[3], dtype=torch.float64, device=case.value.device)
        for k in range(samples):
            h, w = case.shapes[level_of[k]]
            x, y = case.locations[b, q, m, k].tolist()
            column, line = (min(max(math.trunc(p * n + 0.5), 0), n - 1) for p, n in ((x, w), (y, h)))
            total = total + case.weights[b, q, m, k] * case.value[b, starts[level_of[k]] + line * w + column, m]
        rows.append(total)
    return torch.stack(rows).view(batch, queries, -1)


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
@pytest.mark.parametrize("points", [2, (1, 3, 2)], ids=str)
def test_gradcheck(points: int | tuple[int, ...], method: str) -> None:
    case = random_case(1, 3, 2, 3, points=points, dtype=torch.float64).leaves()
    inputs = case.tensors() if method == "bilinear" else (case.value, case.locations.detach(), case.weights)
    assert torch.autograd.gradcheck(lambda *tensors: case.with_tensors(*tensors)(method=method), inputs)


def test_the_reference_is_differentiable_twice() -> None:
    case = random_case(1, 2, 1, 2, SHAPES[:1], dtype=torch.float64).leaves()

    def reference(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        levels = sampling.make_levels(value.device, 2, None, None, [5, 7], None)
        return sampling.sample_bilinear(value, *sampling.pixel_positions(locations, levels), weights, levels)

    assert torch.autograd.gradgradcheck(reference, case.tensors())


@pytest.mark.parametrize("device", DEVICES)
def test_forms_of_the_arguments_agree(device: str) -> None:
    case = random_case(points=2, device=device).leaves()
    expected = case()
    wanted = gradients(expected, *case.tensors())
    table = torch.tensor(case.shapes, device=device)
    starts = torch.tensor([0, 35, 47], device=device)
    batch, queries, heads = case.weights.shape[:3]
    locations, weights = case.locations.unflatten(3, (3, 2)), case.weights.unflatten(3, (3, 2))
    for shapes in (case.shapes, table, table.int(), [list(s) for s in case.shapes], torch.stack((table, table), 1)[:, 0]):
        for start in (None, starts, starts.int(), starts.repeat_interleave(2)[::2]):
            for xy, a in ((case.locations, case.weights), (locations, weights), (locations, case.weights)):
                out = ms_deform_attn(case.value, shapes, xy, a, level_start_index=start)
                assert torch.equal(out, expected)
    out = ms_deform_attn(case.value, table, locations, weights, num_points=[2, 2, 2])
    assert out.shape == (batch, queries, heads * 4)
    for grad, target in zip(gradients(out, *case.tensors()), wanted, strict=True):
        torch.testing.assert_close(grad, target, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_first_tokens_are_used_where_given(device: str) -> None:
    case = random_case(1, 5, 2, 3, [(2, 3), (3, 2)], device=device)
    swapped = torch.tensor([6, 0], device=device)
    other = case.with_tensors(case.value.roll(6, 1), case.locations, case.weights)
    assert torch.equal(case(), other(level_start_index=swapped))


@pytest.mark.parametrize("device", DEVICES)
def test_ragged_points_equal_padding_with_weight_zero(device: str) -> None:
    case = random_case(points=(1, 3, 2), device=device)
    locations = torch.rand(*case.locations.shape[:3], 3, 3, 2, device=device)
    weights = torch.zeros(*case.weights.shape[:3], 3, 3, device=device)
    for level, (first, count) in enumerate(((0, 1), (1, 3), (4, 2))):
        locations[:, :, :, level, :count] = case.locations[:, :, :, first : first + count]
        weights[:, :, :, level, :count] = case.weights[:, :, :, first : first + count]
    padded = ms_deform_attn(case.value, case.shapes, locations, weights)
    torch.testing.assert_close(case(), padded, atol=1e-6, rtol=1e-6)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(seed=st.integers(0, 10**6), queries=st.integers(1, 9), channels=st.integers(1, 9), margin=st.floats(0, 2))
def test_laws(seed: int, queries: int, channels: int, margin: float) -> None:
    case = random_case(1, queries, 2, channels, seed=seed, margin=margin, dtype=torch.float64)
    value, locations, weights = case.tensors()
    out = case()
    order = torch.randperm(queries, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(out[:, order], case.with_tensors(value, locations[:, order], weights[:, order])())
    other = torch.randn_like(value)
    sums = out + 2 * case.with_tensors(other, locations, weights)()
    torch.testing.assert_close(case.with_tensors(value + 2 * other, locations, weights)(), sums, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(case.with_tensors(value, locations, -3 * weights)(), -3 * out, atol=1e-10, rtol=1e-10)
    share = weights.softmax(-1)
    bounded = case.with_tensors(value, locations, share)().unflatten(2, (2, channels))
    slack = 1e-12
    assert (bounded <= value.amax(1).clamp(min=0) + slack).all()
    assert (bounded >= value.amin(1).clamp(max=0) - slack).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_constant_map_gives_the_sum_of_weights(device: str) -> None:
    case = random_case(points=4, margin=-0.26, device=device, dtype=torch.float64)  # half a pixel or more inside of every level
    out = case.with_tensors(torch.full_like(case.value, 3.0), case.locations, case.weights)()
    torch.testing.assert_close(out, 3 * case.weights.sum(-1).repeat_interleave(4, -1), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_queries_as_many_as_tokens_change_no_bit(device: str) -> None:
    """Kernels may visit the queries of an encoder, one per token, in another order; the sums of each must not notice."""
    tokens = sum(h * w for h, w in SHAPES)
    case = random_case(queries=tokens, channels=8, points=4, device=device)
    part = case.with_tensors(case.value, case.locations[:, : tokens - 1], case.weights[:, : tokens - 1])
    assert torch.equal(case()[:, : tokens - 1], part())
