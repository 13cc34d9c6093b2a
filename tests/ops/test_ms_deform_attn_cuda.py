"""CUDA kernels of multi-scale deformable attention against the reference on the same device, in every shape of lanes they have."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from deform_cases import DTYPES, SHAPES, Case, fused_inputs, random_case
from deform_lanes import STARTS, TABLES
from torch import Tensor

from ssod_fast.ops import ms_deform_attn, ms_deform_attn_fused

plain = importlib.import_module("ssod_fast.ops.ms_deform_attn")
fused = importlib.import_module("ssod_fast.ops.ms_deform_attn_fused")
OPS = torch.ops.ssod_fast

pytestmark = pytest.mark.gpu

LIMIT = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
FEW, MANY = 6, 2200  # queries that take many lanes each, and queries that fill the device
STRIPS = ((40, 37), (20, 19), (9, 1), (5, 3))
ATOMICS, TILES = 1, 2  # how the gradient of value is summed


def check(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal up to the order of sums, and one rounding to the dtype."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.is_contiguous()
        limit = LIMIT[ours.dtype]
        scale = max(1.0, theirs.nan_to_num().abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, atol=limit * scale, rtol=limit, equal_nan=True)


def hw_of(case: Case) -> list[int]:
    return [n for size in case.shapes for n in size]


def gradient_of(case: Case) -> Tensor:
    batch, queries = case.weights.shape[:2]
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(batch, queries, case.value.shape[2] * case.value.shape[3], generator=generator)
    return grad.to(case.value)


def check_plain(case: Case, method: int = 0, table: Tensor | None = None, starts: Tensor | None = None) -> None:
    hw = hw_of(case) if table is None else None
    inputs = (case.value, table, starts, case.locations, case.weights, hw, case.num_points, method)
    check([OPS.ms_deform_attn(*inputs)], [plain._reference(*inputs)])
    grad = gradient_of(case)
    for deterministic in (False, True):
        arguments = (grad, *inputs, deterministic)
        check(OPS.ms_deform_attn_backward(*arguments), plain._reference_backward(*arguments))


def check_fused(case: Case, points: Tensor, offsets: Tensor, logits: Tensor) -> None:
    wide = torch.float64 if case.value.dtype == torch.float64 else torch.float32
    inputs = (case.value, None, None, points.to(wide), offsets, logits, hw_of(case), case.num_points, 0.7)
    out, lse = fused._reference(*inputs)
    check(OPS.ms_deform_attn_fused(*inputs), (out, lse))
    for wanted in ((True, False), (True, True), (False, False)):
        arguments = (gradient_of(case), *inputs, lse, *wanted)
        check(OPS.ms_deform_attn_fused_backward(*arguments), fused._reference_backward(*arguments))


def unaligned(tensor: Tensor) -> Tensor:
    """A contiguous copy that begins one element after an aligned address."""
    room = tensor.new_empty(tensor.numel() + 1)[1:]
    return room.copy_(tensor.flatten()).view(tensor.shape)


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("channels", [1, 7, 8, 16, 24, 32, 64, 71, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels(dtype: torch.dtype, channels: int, queries: int) -> None:
    case = random_case(2, queries, 3, channels, points=(1, 5, 3), dtype=dtype, device="cuda")
    for method in (0, 1):
        check_plain(case, method)


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize("channels", [7, 16, 32, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_channels(dtype: torch.dtype, channels: int, boxes: bool, shared: bool, queries: int) -> None:
    case = random_case(2, queries, 2, channels, points=(1, 5, 3), dtype=dtype, device="cuda")
    check_fused(case, *fused_inputs(case, boxes, shared))


@pytest.mark.parametrize("geometry", DTYPES[:3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_mixed_dtypes(dtype: torch.dtype, geometry: torch.dtype) -> None:
    case = random_case(2, FEW, 2, 32, dtype=dtype, geometry=geometry, device="cuda")
    check_plain(case)
    check_fused(case, *fused_inputs(case, boxes=True))


@pytest.mark.parametrize("points", [1, 4, 30, (3, 6, 3), (0, 9, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_points(dtype: torch.dtype, points: Any) -> None:
    """90 samples keep what the softmax needs in global memory."""
    case = random_case(1, MANY, 2, 16, points=points, dtype=dtype, device="cuda")
    check_plain(case)
    check_fused(case, *fused_inputs(case))


def test_many_levels() -> None:
    check_plain(random_case(1, 5, 2, 32, [(3, 2 + i % 4) for i in range(64)], 1, device="cuda"))


def test_too_many_levels() -> None:
    case = random_case(1, 5, 2, 32, [(3, 2)] * 65, 1, device="cuda")
    with pytest.raises(RuntimeError, match="at most 64 levels on CUDA, got 65"):
        case()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_in_strips(dtype: torch.dtype) -> None:
    tokens = sum(h * w for h, w in STRIPS)
    case = random_case(2, tokens, 2, 32, STRIPS, 4, dtype=dtype, device="cuda")
    check_plain(case)
    check_fused(case, *fused_inputs(case))
    with_one_more = [torch.cat((t, t[:, :1]), 1) for t in (case.locations, case.weights)]
    natural = case.with_tensors(case.value, *with_one_more)()
    assert torch.equal(case(), natural[:, :tokens])


def gradients_by(case: Case, summation: int, fused_of: tuple[Tensor, ...] | None = None, method: int = 0, **levels: Any) -> Any:
    """Gradients of value, references, positions and weights with a Summation of choice, and those of the reference."""
    hw = None if "table" in levels else hw_of(case)
    tables = levels.get("table"), levels.get("starts")
    grad = gradient_of(case)
    if fused_of is None:
        samples = (case.value, *tables, case.locations, case.weights, hw, case.num_points, method)
        value, positions, weights = plain._reference_backward(grad, *samples, False)
        expected = [value, value.new_empty(0), positions, weights]
        inputs = (*tables, None, case.locations, case.weights, hw, case.num_points, method, 0.0, None)
    else:
        samples = (case.value, *tables, fused_of[0].float(), *fused_of[1:], hw, case.num_points, 0.7)
        lse = fused._reference(*samples)[1]
        expected = fused._reference_backward(grad, *samples, lse, True, False)
        inputs = (*tables, fused_of[0].float(), *fused_of[1:], hw, case.num_points, 0, 0.7, lse)
    return OPS._ms_deform_attn_backward_by(grad, case.value, *inputs, summation), expected


PYRAMIDS = (STRIPS, ((100, 3), (1, 1), (0, 5), (1, 130)), ((1, 1),), ((64, 65), (3, 3)))


@pytest.mark.parametrize("summation", [ATOMICS, TILES])
@pytest.mark.parametrize("shapes", PYRAMIDS, ids=str)
@pytest.mark.parametrize("channels", [8, 16, 24, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_sums_by_tiles_and_by_atomics(dtype: torch.dtype, channels: int, shapes: Any, summation: int) -> None:
    filled = [(max(h, 1), w) for h, w in shapes]
    tokens = sum(h * w for h, w in shapes)
    case = random_case(
        2, tokens, 2, channels, filled, [1 + 4 * i for i in range(len(shapes))], dtype=dtype, geometry=torch.float32, device="cuda"
    )
    case.value, case.shapes = case.value[:, :tokens].contiguous(), list(shapes)
    for method in (0, 1):
        check(*gradients_by(case, summation, method=method))
    for boxes, shared in ((False, False), (True, True)):
        check(*gradients_by(case, summation, fused_inputs(case, boxes, shared)))


@pytest.mark.parametrize("summation", [ATOMICS, TILES])
@pytest.mark.parametrize("spread", [0.0, 0.01, 0.1])
def test_sums_of_samples_close_together(spread: float, summation: int) -> None:
    """All samples of all queries fall on few tokens of every level, up to all of them on the same four."""
    tokens = sum(h * w for h, w in STRIPS)
    case = random_case(2, tokens, 2, 32, STRIPS, 4, device="cuda")
    case.locations = 0.43 + spread * (case.locations - 0.5)
    check(*gradients_by(case, summation))


@pytest.mark.parametrize("summation", [ATOMICS, TILES])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("starts", STARTS, ids=str)
def test_sums_with_sizes_that_do_not_fit(table: Any, starts: Any, summation: int) -> None:
    case = random_case(2, 51, 2, 32, SHAPES, device="cuda")
    first = None if starts is None else torch.tensor(starts, device="cuda")
    check(*gradients_by(case, summation, table=torch.tensor(table, device="cuda"), starts=first))


@pytest.mark.parametrize("summation", [ATOMICS, TILES])
def test_sums_of_samples_that_are_nowhere(summation: int) -> None:
    case = random_case(1, 51, 2, 32, device="cuda")
    for i, bad in enumerate((math.nan, math.inf, -math.inf, 1e30)):
        case.locations[0, i, :, 1, i % 2] = bad
        case.weights[0, i, :, 1] = math.nan
    case.weights[0, 5, 0, 2] = math.nan
    check(*gradients_by(case, summation))


@pytest.mark.parametrize("channels", [1, 7, 12])
def test_rows_that_tiles_do_not_take(channels: int) -> None:
    case = random_case(1, 51, 2, channels, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(RuntimeError, match="no tiles of these arguments"):
        gradients_by(case, TILES)
    check_plain(case)


def test_encoder_without_channels() -> None:
    """As many blocks as would fill the device, of nothing."""
    check_plain(random_case(8, sum(h * w for h, w in STRIPS), 8, 0, STRIPS, 1, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_incoming_gradient_that_is_not_aligned(dtype: torch.dtype) -> None:
    case = random_case(8, sum(h * w for h, w in STRIPS), 8, 32, STRIPS, 1, dtype=dtype, device="cuda")
    grad, inputs = gradient_of(case), (case.value, None, None, case.locations, case.weights, hw_of(case), None, 0, False)
    check(OPS.ms_deform_attn_backward(unaligned(grad), *inputs), plain._reference_backward(grad, *inputs))


@pytest.mark.parametrize("summation", [ATOMICS, TILES])
def test_more_elements_than_32_bits_count(summation: int) -> None:
    """Every query looks at its own pixel, so that the gradient of value is the one that comes in."""
    images, side, heads, channels = 2, 1025, 4, 256
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GiB of memory that is free")
    centres = (torch.arange(side, device="cuda") + 0.5) / side
    pixels = torch.cartesian_prod(centres, centres).flip(1)[None, :, None, None]  # [1, S, 1, 1, 2]
    locations = pixels.expand(images, -1, heads, -1, -1).contiguous()
    value = torch.zeros(images, side * side, heads, channels, dtype=torch.bfloat16, device="cuda")
    assert value.numel() > 2**31
    grad = torch.randn_like(value).flatten(2)
    inputs = (None, None, None, locations, torch.ones_like(locations[..., 0]), [side, side], None, 0, 0.0, None, summation)
    found = OPS._ms_deform_attn_backward_by(grad, value, *inputs)[0].flatten(2)
    for ours, theirs in zip(found, grad, strict=True):
        assert (ours - theirs).abs().max() < 0.05


def test_tiles_need_a_query_per_token() -> None:
    with pytest.raises(RuntimeError, match="no tiles of these arguments"):
        gradients_by(random_case(1, 52, 2, 32, device="cuda"), TILES)


def test_encoders_are_summed_by_tiles() -> None:
    """The profiler sees the kernel of the tiles by default, and the atomics alone where queries are few."""
    tokens = sum(h * w for h, w in STRIPS)
    for queries, expected in ((tokens, True), (tokens + 1, False)):
        case = random_case(8, queries, 8, 32, STRIPS, 4, device="cuda")
        inputs = (case.value, None, None, case.locations, case.weights, hw_of(case), None, 0, False)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            OPS.ms_deform_attn_backward(gradient_of(case), *inputs)
            torch.cuda.synchronize()
        assert any("tile_kernel" in event.key for event in profile.key_averages()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addresses_that_are_not_aligned(dtype: torch.dtype) -> None:
    case = random_case(2, MANY, 2, 32, dtype=dtype, device="cuda")
    points, offsets, logits = fused_inputs(case)
    for value in (unaligned(case.value), torch.cat((case.value, case.value[..., :1, :]), 2)[:, :, :2]):
        check_plain(case.with_tensors(value, unaligned(case.locations), unaligned(case.weights)))
        check_fused(case.with_tensors(value, case.locations, case.weights), points, unaligned(offsets), unaligned(logits))


def test_broadcast_value() -> None:
    case = random_case(1, FEW, 2, 32, device="cuda")
    case = case.with_tensors(case.value.expand(3, -1, -1, -1), *(t.repeat(3, *[1] * (t.dim() - 1)) for t in case.tensors()[1:]))
    check_plain(case)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("starts", STARTS, ids=str)
@pytest.mark.parametrize("queries", [51, 52])
def test_sizes_that_do_not_fit(table: Any, starts: Any, queries: int) -> None:
    case = random_case(2, queries, 2, 32, SHAPES, device="cuda")
    first = None if starts is None else torch.tensor(starts, device="cuda")
    check_plain(case, table=torch.tensor(table, device="cuda"), starts=first)


def test_not_a_number() -> None:
    case = random_case(1, 6, 2, 32, device="cuda")
    case.value[0, 3] = math.nan
    for i, bad in enumerate((math.nan, math.inf, -math.inf, 1e30)):
        case.locations[0, i, :, 1, i % 2] = bad
        case.weights[0, i, 0, 1] = math.nan
    check_plain(case)
    check_plain(case, method=1)
    points, offsets, logits = fused_inputs(case, boxes=True)
    offsets[0, :4, :, 1] = case.locations[0, :4, :, 1]
    logits = logits.nan_to_num()
    logits[0, 1, 0, ::2] = -math.inf
    logits[0, 2, 1] = -math.inf
    check_fused(case, points, offsets, logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("fill_uninitialised")
def test_deterministic_gradients_repeat(dtype: torch.dtype) -> None:
    """All samples fall on few pixels, where the order of sums shows."""
    case = random_case(2, MANY, 2, 32, dtype=dtype, device="cuda").leaves()
    inputs = [t.requires_grad_() for t in (case.value, *(t.detach() for t in fused_inputs(case, boxes=True)))]
    grad = gradient_of(case)

    def gradients() -> tuple[Tensor, ...]:
        of_plain = torch.autograd.grad(case(), case.tensors(), grad)
        return *of_plain, *torch.autograd.grad(ms_deform_attn_fused(inputs[0], case.shapes, *inputs[1:]), inputs, grad)

    first = gradients()
    assert all(t.isfinite().all() for t in first)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


@pytest.mark.parametrize("queries", [FEW, MANY])
def test_gradients_of_samples_repeat_in_any_mode(queries: int) -> None:
    case = random_case(2, queries, 2, 32, device="cuda").leaves()
    grad = gradient_of(case)
    runs = [torch.autograd.grad(case(), case.tensors()[1:], grad) for _ in range(3)]
    for others in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], others, strict=True))


def captured(step: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph_with_changed_inputs(dtype: torch.dtype, deterministic: bool) -> None:
    """New values, offsets, sizes and starts in the memory that was captured."""
    case = random_case(2, 51, 2, 32, dtype=dtype, device="cuda")
    points, offsets, logits = fused_inputs(case, boxes=True)
    table, starts = torch.tensor(SHAPES, device="cuda"), torch.tensor([0, 35, 47], device="cuda")
    inputs = (case.value, table, starts, points.float(), offsets, logits, None, None, 0.5)
    grad = gradient_of(case)

    def step() -> tuple[Tensor, ...]:
        out, lse = OPS.ms_deform_attn_fused(*inputs)
        by_tiles = OPS._ms_deform_attn_backward_by(grad, *inputs[:-1], 0, inputs[-1], lse, TILES)
        return out, lse, *OPS.ms_deform_attn_fused_backward(grad, *inputs, lse, True, deterministic), *by_tiles

    graph, results = captured(step)
    case.value.copy_(torch.randn_like(case.value))
    offsets.mul_(0.5)
    table.copy_(torch.tensor([(2, 2), (7, 5), (4, 3)]))
    starts.copy_(torch.tensor([0, 4, 39]))
    graph.replay()
    torch.cuda.synchronize()
    check(results, step())


def test_side_stream() -> None:
    case = random_case(2, MANY, 2, 32, device="cuda")
    expected = case()
    stream = torch.cuda.Stream()
    value = torch.zeros_like(case.value)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # the kernel must wait for what its own stream does first
        value.copy_(case.value)
        out = ms_deform_attn(value, case.shapes, case.locations, case.weights)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_tiles_on_a_side_stream() -> None:
    case = random_case(2, 51, 2, 32, device="cuda")
    late, grad = torch.zeros_like(gradient_of(case)), gradient_of(case)
    inputs = (case.value, None, None, None, case.locations, case.weights, hw_of(case), None, 0, 0.0, None, TILES)
    expected = OPS._ms_deform_attn_backward_by(grad, *inputs)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(grad)
        found = OPS._ms_deform_attn_backward_by(late, *inputs)
    stream.synchronize()
    check(found, expected)


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = random_case(2, MANY, 2, 32, device="cuda:1")
    assert torch.cuda.current_device() == 0
    check_plain(case)
    check_fused(case, *fused_inputs(case))
    check(*gradients_by(random_case(2, 51, 2, 32, device="cuda:1"), TILES))
