from __future__ import annotations

import math

import pytest
import torch
from deform_cases import DEVICES, DTYPES, SHAPES, composed, counting_value, fused_inputs, gradients, random_case, tolerance, unfused
from no_sync import no_sync
from torch import Tensor
from torch.autograd import forward_ad

from ssod_fast.ops import ms_deform_attn, ms_deform_attn_fused

OPS = torch.ops.ssod_fast
GOLDEN_SHAPES = [(2, 4), (2, 2)]
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-4, torch.float16: 1e-1, torch.bfloat16: 5e-1}


def golden(
    reference: list[tuple[float, ...]], offsets: list[tuple[float, float]], device: str
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Result, log-sum-exp and gradients of one query over two levels with 2 and 1 points and weights 1/6, 1/3, 1/2."""
    options = {"dtype": torch.float64, "device": device}
    value = counting_value(GOLDEN_SHAPES, **options).requires_grad_()
    points = torch.tensor(reference, **options).view(1, 1, len(reference), -1).requires_grad_()
    shifts = torch.tensor(offsets, **options).view(1, 1, 1, 3, 2).requires_grad_()
    logits = torch.tensor([0, math.log(2), math.log(3)], **options).view(1, 1, 1, 3).requires_grad_()
    out, lse = ms_deform_attn_fused(value, GOLDEN_SHAPES, points, shifts, logits, num_points=[2, 1], return_lse=True)
    assert not lse.requires_grad
    return out, lse, torch.autograd.grad(out.sum(), (value, points, shifts, logits))


def near(actual: Tensor, expected: list[float]) -> bool:
    return torch.allclose(actual.flatten().cpu(), torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shared", [True, False])
def test_golden_points(shared: bool, device: str) -> None:
    reference = [(0.5, 0.5)] if shared else [(0.5, 0.5), (0.25, 0.75)]
    last = (-0.25, 0.25) if shared else (0.25, -0.25)
    out, lse, (value, points, offsets, logits) = golden(reference, [(1, 0.25), (-0.25, 0.25), last], device)
    assert near(out, [8 + 5 / 24])
    assert near(lse, [math.log(6)])
    assert near(points, [3, 6] if shared else [2, 4, 1, 2])
    assert near(offsets, [1 / 6, 2 / 3, 1 / 3, 4 / 3, 0.5, 1])
    assert near(logits, [-0.28472222222222, -0.98611111111111, 1.27083333333333])
    expected = [0, 1 / 16, 1 / 24, 1 / 48, 0, 3 / 16, 1 / 8, 1 / 16, 0.09375, 0.03125, 0.28125, 0.09375]
    assert near(value, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_golden_boxes(device: str) -> None:
    out, _, (_, points, offsets, logits) = golden([(0.5, 0.5, 0.5, 0.5)], [(0.5, 0.5), (-0.5, 1), (-0.5, 0.5)], device)
    assert near(out, [8])
    assert near(points, [3, 6, -1 / 3, 4 / 3])
    assert near(offsets, [1 / 12, 1 / 6, 1 / 6, 1 / 3, 0.25, 0.5])
    assert near(logits, [-0.45833333333333, -0.91666666666667, 1.375])


SIZES = [
    {},
    {"batch": 1, "queries": 1, "heads": 1, "channels": 1, "points": 1},
    {"channels": 30, "batch": 3, "queries": 7, "points": (3, 6, 3)},
    {"channels": 32, "heads": 8, "queries": 51, "points": 4},
    {"channels": 16, "shapes": [(6, 9)], "points": 4},
    {"channels": 8, "shapes": [*SHAPES, (1, 6)], "points": (0, 5, 1, 2)},
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(f"{k}{v}" for k, v in sizes.items()).replace(" ", ""))
def test_matches_the_composition(sizes: dict, boxes: bool, shared: bool, dtype: torch.dtype, device: str) -> None:
    case = random_case(**sizes, dtype=dtype, geometry=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    points, offsets, logits = fused_inputs(case, boxes, shared)
    inputs = [t.detach().requires_grad_() for t in (case.value, points, offsets, logits)]
    out, lse = ms_deform_attn_fused(inputs[0], case.shapes, *inputs[1:], num_points=case.num_points, offset_scale=0.7, return_lse=True)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    plain = unfused(case.with_tensors(exact[0], *case.tensors()[1:]), *exact[1:], scale=0.7)
    expected = composed(plain)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((out.double() - expected).abs() <= tolerance(plain, dtype) + 4 * torch.finfo(lse.dtype).eps).all()
    torch.testing.assert_close(lse.double(), exact[3].logsumexp(-1), atol=1e-5 if dtype != torch.float64 else 1e-12, rtol=1e-6)
    limit = GRADIENT_TOLERANCE[dtype]
    for tensor, grad, target in zip(inputs, gradients(out, *inputs), gradients(expected, *exact), strict=True):
        assert grad.dtype == tensor.dtype
        torch.testing.assert_close(grad.double(), target, atol=limit, rtol=limit)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("boxes", [True, False])
def test_gradcheck(boxes: bool, shared: bool) -> None:
    case = random_case(1, 2, 2, 2, points=(1, 2, 1), dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (case.value, *fused_inputs(case, boxes, shared))]
    assert torch.autograd.gradcheck(lambda v, *rest: ms_deform_attn_fused(v, case.shapes, *rest, num_points=[1, 2, 1]), inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("geometry", DTYPES, ids=str)
@pytest.mark.parametrize("reference", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(dtype: torch.dtype, reference: torch.dtype, geometry: torch.dtype, device: str) -> None:
    case = random_case(channels=8, dtype=dtype, geometry=torch.float32, device=device)
    points, offsets, logits = fused_inputs(case)
    wanted = (reference, geometry, geometry)
    inputs = [case.value, *(t.to(d) for t, d in zip((points, offsets, logits), wanted, strict=True))]
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = ms_deform_attn_fused(inputs[0], case.shapes, *inputs[1:])
    exact = [t.detach().double() for t in inputs]
    plain = unfused(case.with_tensors(exact[0], *case.tensors()[1:]), *exact[1:])
    assert ((out.double() - composed(plain)).abs() <= tolerance(plain, dtype) + 1e-6).all()
    assert [g.dtype for g in gradients(out, *inputs)] == [dtype, *wanted]


@pytest.mark.parametrize("device", DEVICES)
def test_weights_from_the_log_sum_exp(device: str) -> None:
    case = random_case(device=device)
    points, offsets, logits = fused_inputs(case)
    out, lse = ms_deform_attn_fused(case.value, case.shapes, points, offsets, logits, return_lse=True)
    weights = (logits - lse.unsqueeze(-1)).exp()
    torch.testing.assert_close(weights, logits.softmax(-1), atol=1e-6, rtol=1e-5)
    locations = unfused(case, points, offsets, logits).locations
    torch.testing.assert_close(out, ms_deform_attn(case.value, case.shapes, locations, weights), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [{}, {"queries": 1}, {"batch": 1, "queries": 1}], ids=str)
def test_views_of_one_projection(sizes: dict, dtype: torch.dtype, device: str) -> None:
    case = random_case(**sizes, dtype=dtype, device=device)
    points, offsets, logits = fused_inputs(case)
    packed = torch.cat((offsets.flatten(2), logits.flatten(2)), -1).requires_grad_()
    split = offsets[0, 0].numel()
    views = packed[..., :split].unflatten(2, (3, 3, 2, 2)), packed[..., split:].unflatten(2, (3, 3, 2))
    leaves = offsets.clone().requires_grad_(), logits.clone().requires_grad_()
    out, expected = (ms_deform_attn_fused(case.value, case.shapes, points, *inputs) for inputs in (views, leaves))
    assert torch.equal(out, expected)
    (grad,) = gradients(out, packed)
    separate = gradients(expected, *leaves)
    assert torch.equal(grad[..., :split], separate[0].flatten(2))
    assert torch.equal(grad[..., split:], separate[1].flatten(2))


@pytest.mark.parametrize("device", DEVICES)
def test_shared_reference_is_an_expanded_one(device: str) -> None:
    case = random_case(device=device)
    points, offsets, logits = fused_inputs(case, boxes=True, shared=True)
    wide = points.expand(-1, -1, 3, -1)
    outs = [
        ms_deform_attn_fused(case.value, case.shapes, p, offsets, logits)
        for p in (points, wide, points.transpose(0, 1).clone().transpose(0, 1))
    ]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("device", DEVICES)
def test_sizes_on_the_device(device: str) -> None:
    case = random_case(device=device)
    inputs = [t.requires_grad_() for t in (case.value, *fused_inputs(case))]
    table, start = torch.tensor(SHAPES, device=device), torch.tensor([0, 35, 47], device=device)
    expected = ms_deform_attn_fused(inputs[0], case.shapes, *inputs[1:])
    wanted = gradients(expected, *inputs)
    for first in (None, start):
        out = ms_deform_attn_fused(inputs[0], table, *inputs[1:], level_start_index=first)
        assert torch.equal(out, expected)
        for grad, target in zip(gradients(out, *inputs), wanted, strict=True):
            torch.testing.assert_close(grad, target, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_sizes_on_the_device_that_do_not_fit(device: str) -> None:
    case = random_case(device=device)
    room = torch.full((2, 300, 3, 4), math.nan, device=device)
    room[:, 100:151] = case.value
    value, samples = room[:, 100:151], fused_inputs(case, boxes=True)
    for sizes in ([(5, 7), (3, 4), (200, 300)], [(-5, 7), (0, 4), (2**62, 4)], [(2**31, 2**31)] * 3):
        table = torch.tensor(sizes, device=device)
        inputs = (value, table, None, *samples, None, None, 0.5)
        out, lse = OPS.ms_deform_attn_fused(*inputs)  # the public function refuses such sizes in host memory
        assert out.isfinite().all()
        grads = OPS.ms_deform_attn_fused_backward(torch.ones_like(out), *inputs, lse, True, False)
        assert all(grad.isfinite().all() for grad in grads)
        if device == "cuda":
            assert torch.equal(ms_deform_attn_fused(value, table, *samples), out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_offsets_that_are_nowhere_have_no_gradient(bad: float, boxes: bool, device: str) -> None:
    case = random_case(1, 5, 2, 4, device=device)
    points, offsets, logits = fused_inputs(case, boxes)
    offsets[..., 1, 0] = bad
    inputs = [t.requires_grad_() for t in (case.value, points, offsets, logits)]
    out = ms_deform_attn_fused(inputs[0], case.shapes, *inputs[1:])
    assert out.isfinite().all()
    grads = gradients(out, *inputs)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[2][..., 1, :] == 0).all()
    harmless = offsets.detach().clone()
    harmless[..., 1, :] = 1e6
    others = [t.detach().requires_grad_() for t in (case.value, points, harmless, logits)]
    expected = gradients(ms_deform_attn_fused(others[0], case.shapes, *others[1:]), *others)
    for grad, target in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, target, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_infinite_logits(device: str) -> None:
    case = random_case(1, 2, 1, 4, points=2, margin=-0.2, device=device)
    points, offsets, logits = fused_inputs(case)
    points, offsets = torch.full_like(points, 0.5), offsets * 0.1
    logits[0, 0, 0, ::2] = -math.inf
    logits[0, 1] = -math.inf
    inputs = [t.requires_grad_() for t in (case.value, points, offsets, logits)]
    out, lse = ms_deform_attn_fused(inputs[0], case.shapes, *inputs[1:], return_lse=True)
    assert out[0, 0].isfinite().all()
    assert out[0, 1].isnan().all()
    assert lse[0, 1].item() == -math.inf
    grads = torch.autograd.grad(out[0, 0].sum(), inputs)
    assert (grads[2][0, 0, 0, ::2] == 0).all()
    assert (grads[3][0, 0, 0, ::2] == 0).all()
    assert (grads[3][0, 0, 0, 1::2] != 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"queries": 0}, {"points": 0}, {"shapes": []}, {"shapes": [(0, 5), (4, 0)]}, {"heads": 0}], ids=str
)
def test_empty(sizes: dict, shared: bool, boxes: bool, device: str) -> None:
    case = random_case(**sizes, device=device)
    inputs = [t.requires_grad_() for t in (case.value, *fused_inputs(case, boxes, shared))]
    out, lse = ms_deform_attn_fused(inputs[0], case.shapes, *inputs[1:], return_lse=True)
    assert out.shape == (case.value.shape[0], case.weights.shape[1], case.value.shape[2] * 4)
    assert lse.shape == case.weights.shape[:3]
    assert (out == 0).all()
    if "points" in sizes or sizes.get("shapes") == []:
        assert (lse == -math.inf).all()
    for tensor, grad in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_only_what_is_asked_for_has_a_gradient(device: str) -> None:
    case = random_case(device=device)
    for wanted in range(4):
        inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate((case.value, *fused_inputs(case)))]
        ms_deform_attn_fused(inputs[0], case.shapes, *inputs[1:]).sum().backward()
        assert [t.grad is not None for t in inputs] == [i == wanted for i in range(4)]


def test_double_backward_is_refused() -> None:
    case = random_case()
    inputs = [t.requires_grad_() for t in (case.value, *fused_inputs(case))]
    out = ms_deform_attn_fused(inputs[0], case.shapes, *inputs[1:])
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[2], create_graph=True)
    with pytest.raises(RuntimeError, match="ms_deform_attn_fused: double backward is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("which", range(4))
def test_forward_mode_is_refused(which: int) -> None:
    case = random_case()
    inputs = [case.value, *fused_inputs(case)]
    with forward_ad.dual_level():
        inputs[which] = forward_ad.make_dual(inputs[which], torch.ones_like(inputs[which]))
        with pytest.raises(RuntimeError, match="ms_deform_attn_fused: forward-mode differentiation is not implemented"):
            ms_deform_attn_fused(inputs[0], case.shapes, *inputs[1:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.usefixtures("fill_uninitialised")
def test_results_are_fully_written_and_repeat(boxes: bool, dtype: torch.dtype, device: str) -> None:
    case = random_case(queries=51, points=(1, 3, 2), dtype=dtype, device=device)
    inputs = [t.requires_grad_() for t in (case.value, *fused_inputs(case, boxes))]
    runs = []
    for _ in range(2):
        out, lse = ms_deform_attn_fused(inputs[0], case.shapes, *inputs[1:], num_points=[1, 3, 2], return_lse=True)
        runs.append((out, lse, *gradients(out, *inputs)))
    assert all(t.isfinite().all() for t in runs[0])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_no_sync(device: str) -> None:
    case = random_case(points=(1, 3, 2), device=device)
    inputs = [t.requires_grad_() for t in (case.value, *fused_inputs(case, boxes=True))]
    shapes = torch.tensor(case.shapes, device=device)
    grad = torch.ones(2, 6, 12, device=device)
    with no_sync():
        for sizes in (case.shapes, shapes):
            ms_deform_attn_fused(inputs[0], sizes, *inputs[1:], num_points=[1, 3, 2]).backward(grad)


@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize("need_reference_grad", [True, False])
def test_opcheck(need_reference_grad: bool, boxes: bool) -> None:
    case = random_case(points=(1, 3, 2), dtype=torch.bfloat16)
    points, offsets, logits = fused_inputs(case, boxes, shared=boxes)
    hw, table = ([n for s in SHAPES for n in s], None) if boxes else (None, torch.tensor(SHAPES))
    arguments = (case.value, table, None, points.float(), offsets, logits, hw, [1, 3, 2], 0.5)
    torch.library.opcheck(OPS.ms_deform_attn_fused.default, arguments)
    _, lse = OPS.ms_deform_attn_fused(*arguments)
    grad = torch.ones(2, 6, 12, dtype=torch.bfloat16)
    torch.library.opcheck(OPS.ms_deform_attn_fused_backward.default, (grad, *arguments, lse, need_reference_grad, False))


@pytest.mark.parametrize("device", DEVICES)
def test_compile_with_new_sizes_does_not_compile_again(device: str) -> None:
    torch._dynamo.reset()

    def loss(value: Tensor, height: int, width: int, points: Tensor, packed: Tensor) -> Tensor:
        offsets, logits = packed.split((3 * 4 * 2, 3 * 4), -1)
        samples = offsets.unflatten(2, (3, 4, 2)), logits.unflatten(2, (3, 4))
        out, lse = ms_deform_attn_fused(value, [(height, width)], points, *samples, return_lse=True)
        return out.square().sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager" if device == "cpu" else "inductor")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for queries, shape in ((9, (5, 7)), (11, (8, 6)), (6, (9, 13))):
            case = random_case(2, queries, 3, 10, [shape], 4, device=device)
            points, offsets, logits = fused_inputs(case, boxes=True)
            packed = torch.cat((offsets.flatten(2), logits.flatten(2)), -1)
            inputs = [t.detach().requires_grad_() for t in (case.value, points, packed)]
            results = [f(inputs[0], *shape, *inputs[1:]) for f in (compiled, loss)]
            torch.testing.assert_close(*results)
            for grad, target in zip(*(torch.autograd.grad(r, inputs) for r in results), strict=True):
                torch.testing.assert_close(grad, target, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_float32_references_keep_positions_exact(device: str) -> None:
    """A ramp 0 to 159 across the map returns the position in pixels: bfloat16 locations lose it, bfloat16 offsets do not."""
    value = torch.arange(160, dtype=torch.float32, device=device).view(1, 160, 1, 1)
    generator = torch.Generator().manual_seed(0)
    points = (torch.rand(1, 500, 1, 2, generator=generator) * 0.8 + 0.1).to(device)
    points[..., 1] = 0.5
    offsets = torch.zeros(1, 500, 1, 1, 2)
    offsets[..., 0] = torch.randn(500, generator=generator).view(1, 500, 1, 1) * 2
    offsets, logits = offsets.to(device).bfloat16(), torch.zeros(1, 500, 1, 1, device=device, dtype=torch.bfloat16)
    exact = points.double()[..., 0].flatten() * 160 + offsets.double()[..., 0].flatten() - 0.5
    fused = ms_deform_attn_fused(value, [(1, 160)], points, offsets, logits).flatten()
    assert (fused - exact).abs().max() < 1e-4
    locations = points.unsqueeze(2) + offsets.float() / torch.tensor((160.0, 1.0), device=device)
    plain = ms_deform_attn(value, [(1, 160)], locations.bfloat16(), torch.ones_like(logits)).flatten()
    assert (plain - exact).abs().max() > 0.1


@pytest.mark.gpu
def test_graph_capture() -> None:
    case = random_case(queries=40, channels=32, device="cuda")
    inputs = [t.requires_grad_() for t in (case.value, *fused_inputs(case))]
    grad = torch.ones(2, 40, 96, device="cuda")

    def step() -> tuple[Tensor, ...]:
        out = ms_deform_attn_fused(inputs[0], case.shapes, *inputs[1:])
        return out, *torch.autograd.grad(out, inputs, grad)

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for tensor in results:
        tensor.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
