from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from bag_cases import COCO_RATIOS, noisy_boxes
from box_cases import DEVICES, valid_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import no_sync
from tolerances import assert_close
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from ssod_fast.ops import decode_boxes, encode_boxes, neighborhood_boxes

STD = (0.1, 0.1, 0.2, 0.2)
DELTAS = {  # of the bag of one box, by position
    1: (2, 0, 0, 0),
    2: (-2, 0, 0, 0),
    3: (0, 2, 0, 0),
    4: (0, -2, 0, 0),
    5: (0, 0, 0, -0.91161),
    6: (2, 0, 0, -0.91161),
    25: (0, 0, -0.91161, 0),
    62: (-2, 0, -1.31182, -1.31182),
    124: (0, -2, 1.78337, 1.78337),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden(device: str, dtype: torch.dtype) -> None:
    box = torch.tensor([(100, 60, 180, 160)], dtype=dtype, device=device)
    index, hw = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor([[400, 500]], device=device)
    bag = neighborhood_boxes(box, index, hw, ratios=COCO_RATIOS, shakes=[0.2]).boxes
    deltas = encode_boxes(bag, box[:, None])
    torch.testing.assert_close(deltas[0, list(DELTAS)].cpu(), torch.tensor([*DELTAS.values()], dtype=dtype), atol=1e-5, rtol=0)
    mean = torch.tensor([0.8, 0.8, 1.024504, 1.024504], dtype=dtype)
    torch.testing.assert_close(deltas.abs().mean(1)[0].cpu(), mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(decode_boxes(bag, deltas), box[:, None].expand_as(bag), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchvision(dtype: torch.dtype) -> None:
    """torchvision's coder multiplies by weights where ours divides by std, and clamps large log sizes alone."""
    proposals, targets = noisy_boxes(500, dtype=dtype), noisy_boxes(500, seed=1, dtype=dtype)
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0), bbox_xform_clip=4.135)
    deltas = encode_boxes(proposals, targets)
    torch.testing.assert_close(deltas, coder.encode_single(targets, proposals), atol=2e-4, rtol=2e-5)
    torch.testing.assert_close(decode_boxes(proposals, deltas), coder.decode_single(deltas, proposals), atol=2e-3, rtol=1e-5)
    torch.testing.assert_close(decode_boxes(proposals, deltas), targets, atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_reference(device: str, dtype: torch.dtype) -> None:
    """Values and gradients of ordinary and odd boxes, broadcast and strided."""
    module, op = importlib.import_module("ssod_fast.ops.box_deltas"), torch.ops.ssod_fast
    proposals, targets = noisy_boxes(330, dtype=dtype).to(device), noisy_boxes(330, seed=1, dtype=dtype).to(device)
    proposals[3, 2], proposals[4, 0], proposals[5, 2], targets[6, 2] = torch.nan, torch.inf, proposals[5, 0], targets[6, 0] - 4
    deltas = torch.randn(330, 4, dtype=dtype, generator=torch.Generator().manual_seed(0)).to(device) * 6
    grad = torch.randn(330, 4, dtype=dtype, generator=torch.Generator().manual_seed(1)).to(device)
    bags = proposals.view(10, 33, 4).transpose(0, 1), targets[:10].expand(33, 10, 4), deltas.view(10, 33, 4).transpose(0, 1)
    loose = {torch.float32: (2e-3, 1e-5), torch.float64: (1e-9, 1e-12)}[dtype]
    for p, t, d, g in ((proposals, targets, deltas, grad), (*bags, grad.view(10, 33, 4).transpose(0, 1))):
        cases: list[tuple[str, tuple[Any, ...]]] = [("encode_boxes", (p, t, *STD)), ("decode_boxes", (p, d, *STD, 4.135))]
        cases += [(f"{name}_backward", (g, *arguments, True, True)) for name, arguments in cases]
        for name, arguments in cases:
            actual = getattr(op, name)(*arguments)
            expected = getattr(module, "_reference_" + name.replace("_boxes", ""))(*arguments)
            torch.testing.assert_close(actual, expected, atol=loose[0], rtol=loose[1], equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.floats(0.05, 2), min_size=4, max_size=4))
def test_laws(seed: int, std: list[float]) -> None:
    """A box has deltas 0 to itself, and decoding undoes encoding."""
    proposals, targets = noisy_boxes(20, seed=seed, dtype=torch.float64), noisy_boxes(20, seed=seed + 1, dtype=torch.float64)
    assert (encode_boxes(proposals, proposals, std) == 0).all()
    torch.testing.assert_close(decode_boxes(proposals, encode_boxes(proposals, targets, std), std), targets, atol=1e-9, rtol=0)
    assert (encode_boxes(proposals.float(), proposals.float(), std) == 0).all()


def test_extreme_sizes() -> None:
    box, point = torch.tensor([(10.0, 10.0, 20.0, 30.0)]), torch.tensor([(10.0, 10.0, 10.0, 10.0)])
    inverted = torch.tensor([(30.0, 30.0, 10.0, 10.0)])
    for p, g in ((box, point), (point, box), (inverted, box), (point, point), (box, inverted)):
        assert encode_boxes(p, g).isfinite().all()
    assert encode_boxes(box, point)[0, 2].item() == pytest.approx(torch.tensor(1e-6 / 10).log().item() / 0.2, rel=1e-5)
    grown = decode_boxes(box, torch.full((1, 4), 1e3))
    assert (grown[:, 2] - grown[:, 0]).item() == pytest.approx(10 * 1000 / 16, rel=1e-4)
    shrunk = decode_boxes(box, torch.tensor([(0.0, 0.0, -1e3, -1e3)]))
    assert (shrunk[:, 2] - shrunk[:, 0]).item() == pytest.approx(10 * 16 / 1000, rel=1e-4)
    unclamped = decode_boxes(box.double(), torch.tensor([(0.0, 0.0, 100.0, 100.0)]).double(), clamp=30)
    assert (unclamped[:, 2] - unclamped[:, 0]).item() == pytest.approx(10 * torch.tensor(20.0).double().exp().item(), rel=1e-9)


def test_exp_and_log_of_float() -> None:
    """The polynomials behind the float32 kernel stay within rounding of float64 over their whole range."""
    box = torch.tensor([(-0.5, -0.5, 0.5, 0.5)])
    logs = torch.linspace(-80, 80, 20001)
    deltas = torch.stack((torch.zeros_like(logs), torch.zeros_like(logs), logs, logs), 1)
    sides = decode_boxes(box, deltas, (1, 1, 1, 1), clamp=100)[:, 2].double() * 2
    torch.testing.assert_close(sides, logs.double().exp(), atol=0, rtol=4e-7)
    widths = torch.logspace(-6, 30, 20001, dtype=torch.float64).float()
    wide = torch.stack((-widths / 2, -widths / 2, widths / 2, widths / 2), 1)
    expected = (wide[:, 2] - wide[:, 0]).double().clamp(min=1e-6).log()
    torch.testing.assert_close(encode_boxes(box, wide, (1, 1, 1, 1))[:, 2].double(), expected, atol=2e-7, rtol=4e-7)


def test_gradcheck() -> None:
    proposals, targets = valid_boxes(4, 3, dtype=torch.float64).requires_grad_(), valid_boxes(4, 1, seed=1, dtype=torch.float64)
    targets.requires_grad_()
    deltas = torch.randn(4, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(encode_boxes, (proposals, targets))
    assert torch.autograd.gradcheck(decode_boxes, (proposals, deltas))
    assert torch.autograd.gradcheck(lambda d: decode_boxes(proposals.detach(), d), (deltas,))
    assert torch.autograd.gradcheck(lambda p: encode_boxes(p, targets.detach()), (proposals,))


def test_gradients_equal_autograd_of_the_reference() -> None:
    """Clamps included: no gradient beyond the clamp of a log size or below the floor of a side."""
    module = importlib.import_module("ssod_fast.ops.box_deltas")
    proposals = noisy_boxes(60, dtype=torch.float64)
    proposals[5, 2] = proposals[5, 0]
    deltas = torch.randn(60, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 15
    for public, reference, other in (
        (encode_boxes, lambda p, o: module._reference_encode(p, o, *STD), noisy_boxes(60, seed=1, dtype=torch.float64)),
        (decode_boxes, lambda p, o: module._reference_decode(p, o, *STD, module.MAX_LOG_SIZE), deltas),
    ):
        leaves = proposals.clone().requires_grad_(), other.clone().requires_grad_()
        weight = torch.rand(60, 4, dtype=torch.float64)
        ours = torch.autograd.grad((public(*leaves) * weight).sum(), leaves)
        theirs = torch.autograd.grad((reference(*leaves) * weight).sum(), leaves)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_gradients_through_broadcast_and_half() -> None:
    bags, boxes = noisy_boxes(24).view(4, 6, 4), noisy_boxes(4, seed=1)[:, None].requires_grad_()
    encode_boxes(bags, boxes).sum().backward()
    full = boxes.detach().expand(4, 6, 4).contiguous().requires_grad_()
    encode_boxes(bags, full).sum().backward()
    assert boxes.grad is not None
    assert full.grad is not None
    assert_close(boxes.grad, full.grad.sum(1, keepdim=True))
    deltas = torch.zeros(24, 4, dtype=torch.float16).requires_grad_()
    value = decode_boxes(bags.flatten(0, 1), deltas)
    assert value.dtype == torch.float32
    value.sum().backward()
    assert deltas.grad is not None
    assert deltas.grad.dtype == torch.float16


def test_shapes_and_dtypes() -> None:
    for shape in ((), (0,), (3,), (2, 0, 5), (2, 3, 5)):
        boxes = valid_boxes(*shape)
        assert encode_boxes(boxes, boxes).shape == decode_boxes(boxes, boxes).shape == (*shape, 4)
    assert encode_boxes(valid_boxes(3).half(), valid_boxes(3).half()).dtype == torch.float32
    assert encode_boxes(valid_boxes(3).int(), valid_boxes(3)).dtype == torch.float32
    assert decode_boxes(valid_boxes(3), valid_boxes(3).double()).dtype == torch.float64


def test_results_are_fully_written(fill_uninitialised: None) -> None:
    boxes, deltas = noisy_boxes(300), torch.zeros(300, 4).requires_grad_()
    value = decode_boxes(boxes, deltas)
    (grad,) = torch.autograd.grad(value.sum(), deltas)
    assert value.isfinite().all()
    assert grad.isfinite().all()
    assert encode_boxes(boxes, boxes).isfinite().all()


def test_bad_input() -> None:
    boxes = valid_boxes(3)
    with pytest.raises(ValueError, match=r"proposals and targets must broadcast, got \[3, 4\] and \[5, 4\]"):
        encode_boxes(boxes, valid_boxes(5))
    with pytest.raises(ValueError, match=r"deltas must have shape \[..., 4\], got \[3, 2\]"):
        decode_boxes(boxes, boxes[:, :2])
    with pytest.raises(TypeError, match="targets must be a tensor, got NoneType"):
        encode_boxes(boxes, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="std must be four finite numbers > 0, got"):
        encode_boxes(boxes, boxes, (0.1, 0.1, 0.2))
    with pytest.raises(ValueError, match="std must be four finite numbers > 0, got"):
        decode_boxes(boxes, boxes, (0.1, 0.1, 0.2, 0))
    with pytest.raises(TypeError, match=r"std must be four numbers, got 0\.1"):
        decode_boxes(boxes, boxes, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clamp must be a finite number >= 0, got -1"):
        decode_boxes(boxes, boxes, clamp=-1)
    with pytest.raises(TypeError, match="clamp must be a number, got 'no'"):
        decode_boxes(boxes, boxes, clamp="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [encode_boxes, decode_boxes])
def test_double_backward_is_refused(function: Any) -> None:
    boxes = valid_boxes(3).requires_grad_()
    (grad,) = torch.autograd.grad(function(boxes, valid_boxes(3, seed=1)).sum(), boxes, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{function.__name__}: double backward is not implemented"):
        grad.sum().backward()


def test_opcheck() -> None:
    boxes, others, op = valid_boxes(2, 3), valid_boxes(2, 3, seed=1), torch.ops.ssod_fast
    torch.library.opcheck(op.encode_boxes.default, (boxes, others, *STD))
    torch.library.opcheck(op.decode_boxes.default, (boxes, others, *STD, 4.135))
    torch.library.opcheck(op.encode_boxes_backward.default, (torch.ones(2, 3, 4), boxes, others, *STD, False, True))
    torch.library.opcheck(op.decode_boxes_backward.default, (torch.ones(2, 3, 4), boxes, others, *STD, 4.135, True, False))


@pytest.mark.parametrize("device", DEVICES)
def test_compile(device: str) -> None:
    def loss(proposals: Tensor, deltas: Tensor, targets: Tensor) -> Tensor:
        return decode_boxes(proposals, deltas).sum() + (deltas - encode_boxes(proposals, targets)).abs().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    for n in (5, 9):
        proposals, targets = valid_boxes(n, 3).to(device), valid_boxes(n, 1, seed=1).to(device)
        deltas = torch.randn(n, 3, 4, device=device, requires_grad=True)
        grad = torch.autograd.grad(compiled(proposals, deltas, targets), deltas)
        torch.testing.assert_close(grad, torch.autograd.grad(loss(proposals, deltas, targets), deltas))


def test_no_sync() -> None:
    deltas = torch.zeros(20, 4).requires_grad_()
    with no_sync():
        boxes = noisy_boxes(20)
        (decode_boxes(boxes, deltas) - encode_boxes(boxes, boxes)).sum().backward()


@pytest.mark.gpu
def test_graph_capture() -> None:
    boxes, others = noisy_boxes(20).cuda(), noisy_boxes(20, seed=1).cuda()
    expected = encode_boxes(boxes, others)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = encode_boxes(boxes, others)
    graph.replay()
    assert torch.equal(captured, expected)
