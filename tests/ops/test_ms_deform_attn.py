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
from no_sync import no_sync
from torch import Tensor
from torch.autograd import forward_ad

from ssod_fast.ops import _ms_deform_attn as sampling
from ssod_fast.ops import ms_deform_attn
from ssod_fast.ops.ms_deform_attn import ms_deform_attn_gradients

OPS = torch.ops.ssod_fast
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


def layouts(case: Case) -> list[Case]:
    """The same numbers in other places."""
    value, locations, weights = case.tensors()
    packed = torch.cat((locations.flatten(2), weights.flatten(2)), -1)
    split = locations[0, 0].numel()
    rows = packed[..., :split].unflatten(2, locations.shape[2:]), packed[..., split:].unflatten(2, weights.shape[2:])
    doubled = torch.cat((value, value), 1)[:, : value.shape[1]]
    return [
        case.with_tensors(value, *rows),
        case.with_tensors(doubled, locations, weights),
        case.with_tensors(torch.cat((value, value), 2)[:, :, : value.shape[2]], locations, weights),
        case.with_tensors(value.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), locations, weights),
        case.with_tensors(
            value,
            locations.transpose(0, 1).contiguous().transpose(0, 1),
            weights.transpose(2, 3).contiguous().transpose(2, 3),
        ),
        case.with_tensors(
            torch.cat((value, value), -1)[..., : value.shape[3]],
            locations.flip(0).flip(0),
            torch.stack((weights, weights), -1)[..., 1],
        ),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes", [{}, {"queries": 1}, {"batch": 1, "queries": 1, "channels": 1}, {"heads": 1, "points": (1, 0, 0)}], ids=str
)
def test_layouts(sizes: dict, dtype: torch.dtype, device: str) -> None:
    case = random_case(**sizes, dtype=dtype, device=device)
    expected = case.leaves()
    out = expected()
    wanted = gradients(out, *expected.tensors())
    for other in layouts(case):
        inputs = [t.detach().requires_grad_() for t in other.tensors()]
        result = case.with_tensors(*inputs)()
        assert torch.equal(result, out)
        for grad, target in zip(gradients(result, *inputs), wanted, strict=True):
            torch.testing.assert_close(grad, target, atol=1e-6, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_of_dimensions_of_one(device: str) -> None:
    """[B, 1, ...] that was [1, B, ...]: its second stride means nothing."""
    case = random_case(3, 1, device=device)
    flipped = case.with_tensors(
        case.value, case.locations.view(1, *case.locations.shape[:1], *case.locations.shape[2:]).transpose(0, 1), case.weights
    )
    assert torch.equal(flipped(), case())


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_any_layout(device: str) -> None:
    case = random_case(device=device).leaves()
    out = case()
    grads = torch.autograd.grad(out.sum(), case.tensors(), retain_graph=True)  # an expanded scalar
    plain = torch.autograd.grad(out, case.tensors(), torch.ones_like(out), retain_graph=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, plain, strict=True))
    wide = torch.randn(*out.shape[:2], out.shape[2], 2, device=device)[..., 0]
    strided = torch.autograd.grad(out, case.tensors(), wide, retain_graph=True)
    dense = torch.autograd.grad(out, case.tensors(), wide.contiguous())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(strided, dense, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_only_what_is_asked_for_has_a_gradient(device: str) -> None:
    for wanted in range(3):
        case = random_case(device=device)
        tensors = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(case.tensors())]
        case.with_tensors(*tensors)().sum().backward()
        assert [t.grad is not None for t in tensors] == [i == wanted for i in range(3)]
    with torch.no_grad():
        assert not case.leaves()().requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_explicit_gradients(device: str) -> None:
    case = random_case(dtype=torch.bfloat16, geometry=torch.float32, device=device)
    case = case.with_tensors(case.value, case.locations.unflatten(3, (3, 2)), case.weights.unflatten(3, (3, 2)).double()).leaves()
    out = case()
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, case.tensors(), grad)
    actual = ms_deform_attn_gradients(grad, case.value, case.shapes, case.locations, case.weights)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=2e-2)
    with pytest.raises(ValueError, match=r"grad_output must be \[2, 6, 12\], got \[2, 6, 11\]"):
        ms_deform_attn_gradients(
            grad[..., 1:], *case.with_tensors(*case.tensors()).tensors()[:1], case.shapes, case.locations, case.weights
        )


def test_double_backward_is_refused() -> None:
    case = random_case().leaves()
    (grad,) = torch.autograd.grad(case().square().sum(), case.value, create_graph=True)
    with pytest.raises(RuntimeError, match="ms_deform_attn: double backward is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("which", range(3))
def test_forward_mode_is_refused(which: int, leaves: bool) -> None:
    case = random_case()
    case = case.leaves() if leaves else case
    expected, tensors = case(), list(case.tensors())
    with forward_ad.dual_level():
        assert torch.equal(case(), expected)  # nothing is differentiated forwards yet
        tensors[which] = forward_ad.make_dual(tensors[which], torch.ones_like(tensors[which]))
        with pytest.raises(RuntimeError, match="ms_deform_attn: forward-mode differentiation is not implemented"):
            case.with_tensors(*tensors)()


def test_functional_forward_mode_is_refused() -> None:
    case = random_case()
    with pytest.raises(RuntimeError, match="ms_deform_attn: forward-mode differentiation is not implemented"):
        torch.func.jvp(lambda value: case.with_tensors(value, case.locations, case.weights)(), (case.value,), (case.value,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["bilinear", "discrete"])
@pytest.mark.usefixtures("fill_uninitialised")
def test_results_are_fully_written(method: str, dtype: torch.dtype, device: str) -> None:
    case = random_case(queries=51, points=(1, 3, 2), dtype=dtype, device=device, margin=2).leaves()
    for _ in range(2):
        out = case(method=method)
        assert out.isfinite().all()
        assert all(g.isfinite().all() for g in gradients(out, *case.tensors()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("fill_uninitialised")
def test_deterministic_mode_repeats_every_bit(device: str) -> None:
    case = random_case(queries=500, device=device).leaves()
    first, second = (gradients(case(), *case.tensors()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact = case.double().leaves()
    for grad, target in zip(first, gradients(composed(exact), *exact.tensors()), strict=True):
        torch.testing.assert_close(grad.double(), target, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["bilinear", "discrete"])
def test_no_sync(method: str, device: str) -> None:
    case = random_case(points=(1, 3, 2), device=device).leaves()
    shapes = torch.tensor(case.shapes, device=device)
    grad = torch.ones(2, 6, 12, device=device)
    with no_sync():
        case(method=method).backward(grad)
        ms_deform_attn(case.value, shapes, case.locations, case.weights, num_points=[1, 3, 2], method=method).backward(grad)


@pytest.mark.parametrize("method", [0, 1])
@pytest.mark.parametrize("host", [True, False])
def test_opcheck(host: bool, method: int) -> None:
    case = random_case(points=(1, 3, 2), dtype=torch.bfloat16, geometry=torch.float32)
    hw, table = ([n for s in SHAPES for n in s], None) if host else (None, torch.tensor(SHAPES))
    start = None if host else torch.tensor([0, 35, 47])
    arguments = (case.value, table, start, case.locations, case.weights, hw, [1, 3, 2], method)
    torch.library.opcheck(OPS.ms_deform_attn.default, arguments)
    grad = torch.ones(2, 6, 12, dtype=torch.bfloat16)
    torch.library.opcheck(OPS.ms_deform_attn_backward.default, (grad, *arguments, False))


def attention_of_maps(maps: list[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    """Levels as a backbone returns them [B, M, C, H, W]; their sizes are Python ints."""
    value = torch.cat([m.flatten(3).permute(0, 3, 1, 2) for m in maps], 1)
    return ms_deform_attn(value, [(m.shape[3], m.shape[4]) for m in maps], locations, weights).square().sum()


def maps_of(sizes: list[tuple[int, int]], device: str) -> tuple[list[Tensor], Tensor, Tensor]:
    case = random_case(queries=sizes[0][0] + 4, shapes=sizes, device=device).leaves()
    parts = case.value.detach().split([h * w for h, w in sizes], 1)
    maps = [p.permute(0, 2, 3, 1).unflatten(3, s).contiguous().requires_grad_() for p, s in zip(parts, sizes, strict=True)]
    return maps, case.locations, case.weights


@pytest.mark.parametrize("device", DEVICES)
def test_compile_with_new_sizes_does_not_compile_again(device: str) -> None:
    torch._dynamo.reset()
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(attention_of_maps, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in ([(5, 7), (6, 8)], [(9, 6), (4, 5)], [(8, 11), (7, 3)]):
            maps, locations, weights = maps_of(sizes, device)
            inputs = (*maps, locations, weights)
            result, expected = compiled(maps, locations, weights), attention_of_maps(maps, locations, weights)
            torch.testing.assert_close(result, expected)
            grads = torch.autograd.grad(result, inputs)
            for grad, target in zip(grads, torch.autograd.grad(expected, inputs), strict=True):
                torch.testing.assert_close(grad, target, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_compile_with_sizes_on_the_device(device: str) -> None:
    torch._dynamo.reset()

    def loss(value: Tensor, table: Tensor, start: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value, table, locations, weights, level_start_index=start, method="bilinear").square().sum()

    case = random_case(device=device).leaves()
    table, start = torch.tensor(SHAPES, device=device), torch.tensor([0, 35, 47], device=device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    grads = torch.autograd.grad(compiled(case.value, table, start, case.locations, case.weights), case.tensors())
    expected = torch.autograd.grad(loss(case.value, table, start, case.locations, case.weights), case.tensors())
    for grad, target in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, target, atol=1e-5, rtol=1e-5)


def test_autocast_leaves_dtypes_alone() -> None:
    case = random_case(dtype=torch.bfloat16, geometry=torch.float32).leaves()
    expected = case()
    with torch.autocast("cpu", torch.bfloat16):
        out = case()
    assert torch.equal(out, expected)
    assert gradients(out, *case.tensors())[1].dtype == torch.float32


@pytest.mark.gpu
def test_side_stream_and_graph_capture() -> None:
    case = random_case(queries=40, channels=32, device="cuda").leaves()
    grad = torch.ones(2, 40, 96, device="cuda")
    expected = case()
    wanted = torch.autograd.grad(expected, case.tensors(), grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(case(), case.tensors(), grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case()
        grads = torch.autograd.grad(out, case.tensors(), grad)
    for tensor in (out, *grads):
        tensor.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    for ours, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = random_case(device="cuda:1").leaves()
    out = case()
    assert out.device == case.value.device
    torch.testing.assert_close(out.double(), composed(case.double()), atol=1e-5, rtol=1e-5)
    assert all(g.isfinite().all() for g in gradients(out, *case.tensors()))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_billion_numbers() -> None:
    side = 46400
    value = torch.zeros(1, side * side // 32, 1, 32, dtype=torch.float16, device="cuda")
    height = value.shape[1] // 1000
    value = value[:, : height * 1000]
    assert value.numel() > 2**31
    value[0, -1] = 2
    location = torch.tensor((1 - 0.5 / 1000, 1 - 0.5 / height), dtype=torch.float64, device="cuda").float().view(1, 1, 1, 1, 2)
    out = ms_deform_attn(value, [(height, 1000)], location, torch.ones(1, 1, 1, 1, device="cuda"))
    assert (out > 1.5).all()
