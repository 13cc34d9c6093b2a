"""The Triton kernels of deformable attention against the reference, see test_box_iou.py."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from deform_cases import GOLDENS, SHAPES, Case, counting_value, fused_inputs, random_case
from torch import Tensor
from triton_samples import DEVICE, assert_close

from ssod_fast.kernels import _ms_deform_attn as helpers
from ssod_fast.kernels import ms_deform_attn as kernels

plain = importlib.import_module("ssod_fast.ops.ms_deform_attn")
fused = importlib.import_module("ssod_fast.ops.ms_deform_attn_fused")
BILINEAR, DISCRETE = 0, 1
METHODS = pytest.mark.parametrize("method", [BILINEAR, DISCRETE], ids=["bilinear", "discrete"])


def make_case(**options: Any) -> Case:
    return random_case(**{"heads": 2, "channels": 5, "points": (1, 0, 2)} | options, device=DEVICE.type)


def flat(shapes: Sequence[Sequence[int]]) -> list[int]:
    return [size for shape in shapes for size in shape]


def arguments(case: Case, method: int = BILINEAR, table: Tensor | None = None, starts: Tensor | None = None) -> tuple[Any, ...]:
    """Of the plain op: sizes from the host, or `table` from the device."""
    points = None if case.num_points is None else list(case.num_points)
    return case.value, table, starts, case.locations, case.weights, flat(case.shapes) if table is None else None, points, method


def fused_arguments(case: Case, boxes: bool, shared: bool, scale: float = 0.7) -> tuple[Any, ...]:
    value, table, starts, _, _, hw, points, _ = arguments(case)
    reference, offsets, logits = fused_inputs(case, boxes, shared)
    return value, table, starts, reference.to(torch.promote_types(value.dtype, torch.float32)), offsets, logits, hw, points, scale


def assert_all_close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert got.is_contiguous()
        assert_close(got, want, ulps=32)


def compare(inputs: tuple[Any, ...]) -> None:
    """Both directions of the plain op."""
    out = kernels.ms_deform_attn(*inputs)
    assert_all_close([out], [plain._reference(*inputs)])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    assert_all_close(kernels.ms_deform_attn_backward(grad, *inputs, False), plain._reference_backward(grad, *inputs, False))


def compare_fused(inputs: tuple[Any, ...]) -> None:
    """Both directions of the fused op."""
    out, lse = kernels.ms_deform_attn_fused(*inputs)
    assert_all_close([out, lse], fused._reference(*inputs))
    backward = (torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out), *inputs, lse)
    actual = kernels.ms_deform_attn_fused_backward(*backward, True, False)
    assert_all_close(actual, fused._reference_backward(*backward, True, False))
    assert kernels.ms_deform_attn_fused_backward(*backward, False, False)[1].shape == (0,)


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_samples(name: str) -> None:
    golden = GOLDENS[name]
    value = counting_value([golden.shape]).to(DEVICE, torch.float32) * golden.scale
    locations, weights = (
        torch.tensor(golden.xy, device=DEVICE, dtype=torch.float32).view(1, 1, 1, 1, 2),
        torch.ones(1, 1, 1, 1, device=DEVICE),
    )
    inputs = arguments(Case(value, [golden.shape], locations, weights))
    out = kernels.ms_deform_attn(*inputs)
    assert out.item() == pytest.approx(golden.out)
    grad_value, grad_xy, grad_weight = kernels.ms_deform_attn_backward(torch.ones_like(out), *inputs, False)
    assert grad_weight.item() == pytest.approx(golden.out)
    for got, want in zip(grad_xy.flatten().tolist(), golden.grad_xy, strict=True):
        assert want is None or got == pytest.approx(want)
    assert {i: v for i, v in enumerate(grad_value.flatten().tolist()) if v} == pytest.approx(golden.grad_value)


@METHODS
@pytest.mark.parametrize(
    ("dtype", "geometry"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_equal_to_the_reference(dtype: torch.dtype, geometry: torch.dtype, method: int) -> None:
    compare(arguments(make_case(dtype=dtype, geometry=geometry), method))


@pytest.mark.parametrize("channels", [1, 16, 71])
def test_any_number_of_channels(channels: int) -> None:
    compare(arguments(make_case(channels=channels, shapes=((3, 4),), points=1, queries=20, batch=1)))


@pytest.mark.parametrize("boxes", [False, True], ids=["points", "boxes"])
@pytest.mark.parametrize("shared", [False, True], ids=["per level", "shared"])
def test_fused(boxes: bool, shared: bool) -> None:
    compare_fused(fused_arguments(make_case(), boxes, shared))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_fused_dtypes(dtype: torch.dtype) -> None:
    compare_fused(fused_arguments(make_case(dtype=dtype, queries=3), boxes=True, shared=False))


@METHODS
def test_tables_on_the_device(method: int) -> None:
    case = make_case()
    table = torch.tensor(SHAPES, device=DEVICE)
    expected = kernels.ms_deform_attn(*arguments(case, method))
    assert torch.equal(kernels.ms_deform_attn(*arguments(case, method, table)), expected)
    starts = torch.tensor([1, 0, 8], device=DEVICE)
    compare(arguments(case, method, table, starts))
    compare(arguments(case, method, starts=starts))


@METHODS
@pytest.mark.parametrize("table", [[(50, 70), (3, 4), (2, 2)], [(0, 3), (-1, 4), (5, 7)]], ids=["too large", "no pixels"])
def test_sizes_on_the_device_that_do_not_fit(table: list[tuple[int, int]], method: int) -> None:
    inputs = arguments(make_case(queries=51), method, torch.tensor(table, device=DEVICE))  # as many queries as tokens
    assert_close(kernels.ms_deform_attn(*inputs), plain._reference(*inputs))


@METHODS
@pytest.mark.parametrize("table", [[(2**40, 2**40), (3, 2**33), (3, 4)], [(60_000, 60_000), (-3, 2**62), (4, 3)]], ids=str)
def test_levels_that_int32_cannot_count_have_no_pixels(table: list[tuple[int, int]], method: int) -> None:
    inputs = arguments(make_case(queries=51), method, torch.tensor(table, device=DEVICE))
    out = kernels.ms_deform_attn(*inputs)
    assert_close(out, torch.zeros_like(out))
    assert not any(bool(t.any()) for t in kernels.ms_deform_attn_backward(out, *inputs, False))


@METHODS
def test_positions_and_weights_that_are_no_numbers(method: int) -> None:
    case = make_case(points=(2, 0, 2))
    for i, bad in enumerate((math.nan, math.inf, -math.inf, 1e30, -1e30)):
        case.locations[0, i, 0, 1, i % 2] = bad
    case.weights[1, 2, 1, 3], case.weights[1, 3, 0, 0] = math.nan, -math.inf
    case.locations[0, 1, 1], case.weights[0, 1, 1] = 5, math.nan  # far outside
    case.value[0, 3], case.value[1, 36] = math.nan, math.inf
    compare(arguments(case, method))


def test_logits_and_offsets_that_are_no_numbers() -> None:
    value, table, starts, reference, offsets, logits, *options = fused_arguments(make_case(), boxes=True, shared=True)
    logits[0, 0, 0, 1], logits[0, 1, 0] = -math.inf, -math.inf
    logits[1, 2, 1, 0], logits[1, 3, 0, 2] = math.nan, math.inf
    out, lse = kernels.ms_deform_attn_fused(value, table, starts, reference, offsets, logits, *options)
    assert_all_close([out, lse], fused._reference(value, table, starts, reference, offsets, logits, *options))
    offsets[0, 2, 0, 1, 0], offsets[0, 3, 1, 2, 1] = math.inf, math.nan
    logits.clamp_(-1, 1).nan_to_num_()
    logits[0, 0, 0, 1] = -math.inf
    compare_fused((value, table, starts, reference, offsets, logits, *options))


def test_rows_of_a_wider_matrix() -> None:
    case = make_case(channels=4)
    batch, queries, heads, samples = case.weights.shape
    wide = torch.randn(batch, queries, heads * samples * 3, device=DEVICE)
    offsets, logits = wide.split((heads * samples * 2, heads * samples), -1)
    offsets, logits = offsets.unflatten(-1, (heads, samples, 2)), logits.unflatten(-1, (heads, samples))
    value, table, starts, reference, _, _, *options = fused_arguments(case, boxes=False, shared=False)
    value = torch.randn(batch, value.shape[1], heads * 4 + 3, device=DEVICE)[..., 3:].unflatten(-1, (heads, 4))
    compare_fused((value, table, starts, reference, offsets, logits, *options))
    compare((value[:1].expand(batch, -1, -1, -1), table, starts, offsets, logits, *options[:2], BILINEAR))


@triton.jit(do_not_specialize=["queries"])
def strip_order_kernel(p_out, p_shapes, sizes, queries, o: tl.constexpr, BLOCK: tl.constexpr):
    position = tl.arange(0, BLOCK)
    tl.store(p_out + position, helpers.strip_order(position, p_shapes, sizes, queries, o), mask=position < queries)


def strip_order(shapes: list[tuple[int, int]], queries: int, host: bool) -> list[int]:
    case = random_case(shapes=shapes, points=1, queries=1, batch=1, device=DEVICE.type)
    table = torch.tensor(shapes, device=DEVICE)
    inputs = arguments(case, table=None if host else table)
    problem = helpers.Problem(*inputs[:3], None, *inputs[3:], 0.0)
    out = torch.full((128,), -1, dtype=torch.int32, device=DEVICE)
    sizes = tuple(map(float, flat(shapes))) if host else (0.0,)
    strip_order_kernel[(1,)](out, table, sizes, queries, problem.options(1), 128)
    return out[:queries].tolist()


@pytest.mark.parametrize("host", [True, False], ids=["host", "device"])
def test_order_of_queries(host: bool) -> None:
    first = [3 * y + x for x in range(3) for y in range(8)]
    last = [24, 27, 25, 28, 26, 29]
    assert strip_order([(10, 3)], 30, host) == first + last
    assert strip_order([(10, 3), (2, 2)], 34, host) == [*first, *last, 30, 32, 31, 33]
    assert strip_order([(10, 3), (9, 9)], 100, host) == [*first, *last, *range(30, 100)]  # the second does not fit
    assert sorted(strip_order([(9, 5), (7, 3), (1, 4)], 71, host)) == list(range(71))


def test_the_order_of_queries_changes_no_bit() -> None:
    case = make_case(shapes=((9, 5), (7, 3), (1, 4)), queries=70, batch=1, points=1, channels=4)
    out = kernels.ms_deform_attn(*arguments(case))
    fewer = case.with_tensors(case.value, case.locations[:, :-1], case.weights[:, :-1])
    assert torch.equal(out[:, :-1], kernels.ms_deform_attn(*arguments(fewer)))
    compare(arguments(case))
    compare_fused(fused_arguments(case, boxes=True, shared=False))


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"queries": 0}, {"heads": 0}, {"channels": 0}, {"points": 0}, {"shapes": (), "points": ()}], ids=str
)
def test_empty(sizes: dict[str, Any]) -> None:
    case = make_case(**sizes)
    for method in (BILINEAR, DISCRETE):
        compare(arguments(case, method))
    if case.shapes:
        compare_fused(fused_arguments(case, boxes=False, shared=False))


def test_deterministic_gradients_are_those_of_the_reference() -> None:
    inputs = arguments(make_case())
    grad = torch.ones_like(plain._reference(*inputs))
    for got, want in zip(kernels.ms_deform_attn_backward(grad, *inputs, True), plain._reference_backward(grad, *inputs, True), strict=True):
        assert torch.equal(got, want)
    inputs = fused_arguments(make_case(), boxes=True, shared=False)
    _, lse = fused._reference(*inputs)
    backward = (grad, *inputs, lse, True, True)
    for got, want in zip(kernels.ms_deform_attn_fused_backward(*backward), fused._reference_backward(*backward), strict=True):
        assert torch.equal(got, want)


def test_results_are_fully_written(fill_uninitialised: None) -> None:
    inputs = arguments(make_case(queries=51))
    out = kernels.ms_deform_attn(*inputs)
    assert bool(out.isfinite().all())
    assert all(bool(t.isfinite().all()) for t in kernels.ms_deform_attn_backward(out, *inputs, False))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_encoder_layer(dtype: torch.dtype) -> None:
    case = make_case(shapes=((64, 80), (32, 40)), queries=6400, heads=8, channels=32, points=4, dtype=dtype)
    compare(arguments(case))
    compare_fused(fused_arguments(case, boxes=False, shared=False))


@pytest.mark.gpu
def test_graph_capture() -> None:
    case = make_case()
    inputs = fused_arguments(case, boxes=True, shared=False)
    expected, _ = kernels.ms_deform_attn_fused(*inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = kernels.ms_deform_attn_fused(*inputs)
    inputs[0].mul_(2)
    graph.replay()
    torch.testing.assert_close(out, expected * 2)


@pytest.mark.gpu
def test_new_sizes_compile_nothing() -> None:
    kernels.ms_deform_attn(*arguments(make_case(channels=16)))
    cache = kernels.ms_deform_attn_fwd_kernel.device_caches[torch.cuda.current_device()][0]
    before = len(cache)
    kernels.ms_deform_attn(*arguments(make_case(channels=16, queries=9, batch=3, shapes=((1, 16), (16, 32), (6, 7)))))
    assert len(cache) == before
