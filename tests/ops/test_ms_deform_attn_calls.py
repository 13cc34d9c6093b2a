"""How deformable attention may be called: layouts, gradients on request, compiled, without a sync, on streams."""

from __future__ import annotations

import pytest
import torch
from deform_cases import (
    DEVICES,
    DTYPES,
    SHAPES,
    Case,
    composed,
    gradients,
    random_case,
)
from no_sync import no_sync
from torch import Tensor
from torch.autograd import forward_ad

from ssod_fast.ops import ms_deform_attn
from ssod_fast.ops.ms_deform_attn import ms_deform_attn_gradients

OPS = torch.ops.ssod_fast


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
