"""The C++ kernels of deformable attention against the registered reference functions, op by op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deform_cases import DTYPES, SHAPES, Case, fused_inputs, random_case
from torch import Tensor

from ssod_fast.ops.ms_deform_attn import _reference, _reference_backward
from ssod_fast.ops.ms_deform_attn_fused import _reference as _fused_reference
from ssod_fast.ops.ms_deform_attn_fused import _reference_backward as _fused_reference_backward

OPS = torch.ops.ssod_fast
CHANNELS = (1, 3, 8, 16, 24, 30, 32, 64, 71, 128)
GEOMETRIES = (torch.float32, torch.float16, torch.bfloat16)
COMBINATIONS = [(v, g) for v in GEOMETRIES for g in GEOMETRIES] + [(torch.float64, torch.float64)]
BACKWARD_SCALE = 20  # gradients sum over many samples, and positions' are multiplied by the size of the map


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def plain_inputs(case: Case, method: int = 0) -> tuple[Any, ...]:
    hw = [size for shape in case.shapes for size in shape]
    return case.value, None, None, case.locations, case.weights, hw, case.num_points, method


def fused_arguments(case: Case, *, boxes: bool, shared: bool) -> tuple[Any, ...]:
    points, offsets, logits = fused_inputs(case, boxes=boxes, shared=shared)
    points = points.to(torch.float64 if case.value.dtype == torch.float64 else torch.float32)
    hw = [size for shape in case.shapes for size in shape]
    return case.value, None, None, points, offsets, logits, hw, case.num_points, 0.5


def random_grad(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    shape = (case.value.shape[0], case.locations.shape[1], case.value.shape[2] * case.value.shape[3])
    return torch.randn(shape, generator=generator).to(case.value.dtype)


def assert_same(actual: Any, expected: Any, scale: float = 4) -> None:
    """Equal but for rounding: once in the dtype of the result, and in the order of float32 or float64 sums."""
    actual, expected = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        unit = torch.finfo(e.dtype).eps
        largest = float(e.double().nan_to_num(0, 0, 0).abs().max()) if e.numel() else 0.0
        maths = torch.finfo(torch.float64 if e.dtype == torch.float64 else torch.float32).eps
        assert a.is_contiguous()
        torch.testing.assert_close(a, e, rtol=2 * unit, atol=scale * 16 * maths * max(largest, 1.0), equal_nan=True)


def check_plain(inputs: tuple[Any, ...], grad: Tensor) -> None:
    assert_same(OPS.ms_deform_attn(*inputs), _reference(*inputs))
    given: tuple[Any, ...] = (grad, *inputs, False)
    assert_same(OPS.ms_deform_attn_backward(*given), _reference_backward(*given), BACKWARD_SCALE)


def check_fused(inputs: tuple[Any, ...], grad: Tensor) -> None:
    out, lse = OPS.ms_deform_attn_fused(*inputs)
    assert_same((out, lse), _fused_reference(*inputs))
    for need in (True, False):
        given: tuple[Any, ...] = (grad, *inputs, lse, need, False)
        assert_same(OPS.ms_deform_attn_fused_backward(*given), _fused_reference_backward(*given), BACKWARD_SCALE)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels(dtype: torch.dtype, channels: int) -> None:
    case = random_case(queries=21, channels=channels, points=[1, 4, 2], dtype=dtype, seed=channels)
    check_plain(plain_inputs(case), random_grad(case))
    check_fused(fused_arguments(case, boxes=True, shared=False), random_grad(case))


@pytest.mark.parametrize(("dtype", "geometry"), COMBINATIONS)
@pytest.mark.parametrize(("boxes", "shared"), [(False, False), (False, True), (True, False), (True, True)])
def test_dtypes(dtype: torch.dtype, geometry: torch.dtype, boxes: bool, shared: bool, threads: int) -> None:
    case = random_case(batch=1, queries=37, heads=2, channels=32, points=4, dtype=dtype, geometry=geometry)
    check_fused(fused_arguments(case, boxes=boxes, shared=shared), random_grad(case))
    for method in (0, 1):
        check_plain(plain_inputs(case, method), random_grad(case))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"heads": 0}, {"channels": 0}, {"points": 0}, {"shapes": ()}], ids=str)
def test_nothing(sizes: dict[str, Any], threads: int) -> None:
    case = random_case(**sizes)
    grad = random_grad(case)
    for method in (0, 1):
        check_plain(plain_inputs(case, method), grad)
    for boxes in (False, True):
        check_fused(fused_arguments(case, boxes=boxes, shared=False), grad)


@pytest.mark.parametrize("shapes", [((1, 1),), ((1, 9), (9, 1)), ((0, 4), (3, 3)), ((4, 0), (2, 3))])
@pytest.mark.parametrize("samples", [1, 3, 300])
def test_thin_levels_and_long_rows_of_samples(shapes: Any, samples: int) -> None:
    generator = torch.Generator().manual_seed(samples)
    case = random_case(queries=5, channels=24, shapes=[(2, 2)] * len(shapes), points=samples)
    value = torch.randn(2, sum(h * w for h, w in shapes), 3, 24, generator=generator)
    case = Case(value, list(shapes), case.locations, case.weights)
    for method in (0, 1):
        check_plain(plain_inputs(case, method), random_grad(case))
    check_fused(fused_arguments(case, boxes=False, shared=True), random_grad(case))


def test_strided_rows() -> None:
    """Tokens, images and rows of samples lie apart, as slices of wider results do; one of the strides is 0."""
    case = random_case(queries=20, channels=16)
    batch, queries, heads, samples = case.weights.shape
    joint = torch.randn(batch, queries, heads * samples * 3 + 5)
    offsets = joint[..., : heads * samples * 2].unflatten(2, (heads, samples, 2))
    logits = joint[..., heads * samples * 2 : heads * samples * 3].unflatten(2, (heads, samples))
    tokens = torch.randn(case.value.shape[1], 3 * 16 + 3)[:, : 3 * 16].unflatten(1, (3, 16))
    strided = Case(tokens.expand(2, -1, -1, -1), case.shapes, offsets, logits)
    check_plain(plain_inputs(strided), random_grad(case))
    points = torch.rand(batch, queries, 1, 2)
    _, *rest = fused_arguments(case, boxes=False, shared=True)
    check_fused((strided.value, *rest[:2], points, offsets, logits, *rest[5:]), random_grad(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_that_do_not_fit(dtype: torch.dtype) -> None:
    """Levels beyond the tokens of value, of negative or of enormous size: what lies outside counts nothing."""
    case = random_case(queries=50, channels=8, dtype=dtype)
    tables = [[[5, 7], [3, 4], [2, 200]], [[5, 7], [-3, 4], [2, 2]], [[2**31, 3], [3, 2**33], [9, 9]]]
    starts = [[0, 35, 47], [-20, 35, 40], [2**40, 0, 48]]
    for shapes, start in zip(tables, starts, strict=True):
        for method in (0, 1):
            inputs = (case.value, torch.tensor(shapes), torch.tensor(start), case.locations, case.weights, None, None, method)
            check_plain(inputs, random_grad(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", [0, 1])
def test_positions_and_weights_that_are_not_finite(method: int, dtype: torch.dtype) -> None:
    case = random_case(queries=60, channels=20, dtype=dtype)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30], dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    hit = torch.rand(case.locations.shape, generator=generator) < 0.2
    choice = torch.randint(5, hit.shape, generator=generator)
    locations = torch.where(hit, odd[choice], case.locations)
    weights = torch.where(hit.any(-1), odd[choice[..., 0]], case.weights)
    broken = case.with_tensors(case.value, locations, weights if method == 0 else case.weights)
    check_plain(plain_inputs(broken, method), random_grad(case))


def test_offsets_and_logits_that_are_not_finite() -> None:
    case = random_case(queries=8, channels=8)
    value, *tables, points, offsets, logits, hw, counts, scale = fused_arguments(case, boxes=True, shared=False)
    nan, inf = float("nan"), float("inf")
    offsets[:, 0, :, 0] = nan
    offsets[:, 1, :, 1, 0] = inf
    logits[:, 2, :, :3] = -inf
    logits[:, 3] = -inf
    logits[:, 4, :, 0] = inf
    logits[:, 5, :, 2] = nan
    logits[:, 6] *= 1e30
    check_fused((value, *tables, points, offsets, logits, hw, counts, scale), random_grad(case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    case = random_case(batch=2, queries=400, heads=4, channels=40, points=4, shapes=((20, 30), *SHAPES), dtype=dtype)
    plain, fused, grad = plain_inputs(case), fused_arguments(case, boxes=True, shared=True), random_grad(case)
    results = []
    before = torch.get_num_threads()
    for count in (1, 2, 13):  # 13: more threads than images times heads
        torch.set_num_threads(count)
        out, lse = OPS.ms_deform_attn_fused(*fused)
        results.append(
            (
                OPS.ms_deform_attn(*plain),
                *OPS.ms_deform_attn_backward(grad, *plain, True),
                out,
                lse,
                *OPS.ms_deform_attn_fused_backward(grad, *fused, lse, True, True),
            )
        )
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_number_is_read_and_written_exactly(dtype: torch.dtype) -> None:
    """One sample at the centre of a pixel with weight 1 copies value: all 65536 bit patterns, subnormal ones and NaN too."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    value = bits.view(dtype).view(1, 1, 1, -1)
    out = OPS.ms_deform_attn(value, None, None, torch.full((1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1), [1, 1], None, 0)
    torch.testing.assert_close(out.view(-1), value.view(-1), rtol=0, atol=0, equal_nan=True)
