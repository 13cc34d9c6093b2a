from __future__ import annotations

import pytest
import torch
import torchvision.ops as tv
from box_cases import DEVICES, FORMATS, GOLDEN_GRADS, MODES, A, integer_boxes, random_boxes, rules, valid_boxes
from no_sync import no_sync
from tolerances import assert_close
from torch import Tensor

from ssod_fast.ops import _overlaps, box_iou, paired_box_iou, paired_iou_loss
from ssod_fast.ops._boxes import make_rule


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("mode", "box"), list(GOLDEN_GRADS), ids=str)
def test_golden_gradients(mode: str, box: tuple[float, ...], device: str) -> None:
    a = torch.tensor([A], dtype=torch.float64, device=device, requires_grad=True)
    other = torch.tensor([box], dtype=torch.float64, device=device)
    (grad,) = torch.autograd.grad(paired_box_iou(a, other, mode=mode), a)
    torch.testing.assert_close(grad.cpu(), torch.tensor([GOLDEN_GRADS[mode, box]], dtype=torch.float64), atol=1e-10, rtol=0)
    if mode in ("iou", "giou") and box == A:
        assert (grad == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("mode", "fmt", "eps_mode", "eps"), rules())
def test_matches_reference_and_pairwise(device: str, dtype: torch.dtype, mode: str, fmt: str, eps_mode: str, eps: float) -> None:
    boxes1, boxes2 = random_boxes(301, dtype=dtype).to(device), random_boxes(301, seed=1, dtype=dtype).to(device)
    rule = make_rule(mode, fmt, eps_mode, eps)
    options = {"mode": mode, "fmt": fmt, "eps_mode": eps_mode, "eps": eps}
    actual = paired_box_iou(boxes1, boxes2, **options)
    a, b = _overlaps.corners(boxes1, rule), _overlaps.corners(boxes2, rule)
    assert_close(actual, _overlaps.overlaps(a, b, rule, nan_zero=False), equal_nan=True)
    assert torch.equal(actual.nan_to_num(9), box_iou(boxes1, boxes2, **options).diagonal().nan_to_num(9))
    assert torch.equal(paired_box_iou(boxes1, boxes2, **options, nan="zero"), actual.where(~actual.isnan(), 0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("mode", "fmt", "eps_mode", "eps"), rules())
def test_gradient_matches_reference(device: str, mode: str, fmt: str, eps_mode: str, eps: float) -> None:
    boxes1, boxes2 = (random_boxes(301, seed=s, dtype=torch.float64).to(device) for s in (0, 1))
    grad = torch.rand(301, dtype=torch.float64, device=device)
    rule = make_rule(mode, fmt, eps_mode, eps)
    a, b = _overlaps.corners(boxes1, rule), _overlaps.corners(boxes2, rule)
    for nan_zero in (False, True):
        expected = _overlaps.overlap_gradients(grad, a, b, rule, nan_zero)
        actual = torch.ops.ssod_fast.paired_box_iou_backward(grad, boxes1, boxes2, *rule, nan_zero, True, True)
        torch.testing.assert_close(tuple(actual), expected, atol=1e-11, rtol=1e-11, equal_nan=True)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("mode", [m for m in MODES if m != "ciou"])  # CIoU holds its weight constant; test_losses_of_torchvision covers it
def test_gradcheck(mode: str, fmt: str) -> None:
    boxes1 = valid_boxes(4, 3, dtype=torch.float64).requires_grad_()
    boxes2 = valid_boxes(4, 1, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: paired_box_iou(x, y, mode=mode, fmt=fmt), (boxes1, boxes2), atol=1e-7)


def test_losses_of_torchvision() -> None:
    boxes2 = valid_boxes(50, seed=1, dtype=torch.float64)
    peers = {"giou": tv.generalized_box_iou_loss, "diou": tv.distance_box_iou_loss, "ciou": tv.complete_box_iou_loss}
    for mode, peer in peers.items():
        ours = valid_boxes(50, dtype=torch.float64).requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        loss = paired_iou_loss(ours, boxes2, mode=mode, eps_mode="add")
        expected = peer(theirs, boxes2, reduction="sum")
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-7)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-5)


def test_gradient_equals_torchvision_autograd_at_ties() -> None:
    boxes1 = integer_boxes(200).requires_grad_()
    boxes2 = integer_boxes(200, seed=1).requires_grad_()
    ours = torch.autograd.grad(paired_box_iou(boxes1, boxes2, mode="giou", eps_mode="none").sum(), (boxes1, boxes2))
    theirs = torch.autograd.grad(tv.generalized_box_iou(boxes1, boxes2).diagonal().sum(), (boxes1, boxes2))
    torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
def test_broadcast(device: str) -> None:
    bags, boxes = valid_boxes(6, 25).to(device).requires_grad_(), valid_boxes(6, 1, seed=1).to(device).requires_grad_()
    value = paired_box_iou(bags, boxes, mode="giou")
    full = boxes.detach().expand(6, 25, 4).contiguous().requires_grad_()
    same = bags.detach().clone().requires_grad_()
    expected = paired_box_iou(same, full, mode="giou")
    assert torch.equal(value, expected)
    weight = torch.rand(6, 25, device=device)
    (value * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(bags.grad, same.grad)
    assert_close(boxes.grad, full.grad.sum(1, keepdim=True))
    assert paired_box_iou(valid_boxes(3, 1, 5), valid_boxes(4, 1)).shape == (3, 4, 5)
    assert paired_box_iou(torch.zeros(4), valid_boxes(3)).shape == (3,)


def test_layouts_and_shapes() -> None:
    wide = valid_boxes(4, 300).repeat(1, 1, 2)
    views = (wide[..., 2:6], wide.transpose(0, 1)[..., :4], wide[:, ::3, :4], wide[:1, :, 4:].expand(5, 300, 4))
    for view in views:
        other = valid_boxes(*view.shape[:-1], seed=3)
        leaf = view.detach().requires_grad_()
        plain = view.contiguous().detach().requires_grad_()
        assert torch.equal(paired_box_iou(view, other), paired_box_iou(view.contiguous(), other))
        grads = [torch.autograd.grad(paired_box_iou(x, other, mode="giou").sum(), x)[0] for x in (leaf, plain)]
        assert torch.equal(*grads)
    for shape in ((0,), (1,), (2, 0, 3), ()):
        boxes = valid_boxes(*shape).requires_grad_()
        value = paired_box_iou(boxes, boxes.detach())
        assert value.shape == shape
        value.sum().backward()
        assert (boxes.grad == 0).all()


def test_many_dimensions() -> None:
    boxes = valid_boxes(2, 2, 2, 2, 2, 2, 2, 2)
    view = boxes.permute(7, 6, 5, 4, 3, 2, 1, 0, 8)  # eight dimensions, none of which merge
    other = valid_boxes(*view.shape[:-1], seed=1)
    assert torch.equal(paired_box_iou(view, other), paired_box_iou(view.contiguous(), other))


def test_dtypes() -> None:
    boxes1, boxes2 = valid_boxes(7), valid_boxes(7, seed=1)
    leaf = boxes1.half().requires_grad_()
    value = paired_box_iou(leaf, boxes2.half(), mode="giou")
    assert value.dtype == torch.float32
    value.sum().backward()
    assert leaf.grad.dtype == torch.float16
    assert paired_box_iou(boxes1, boxes2.double()).dtype == torch.float64
    assert paired_box_iou(boxes1.int(), boxes2.int()).dtype == torch.float32


def test_results_are_fully_written() -> None:
    """Results come from memory that a freed tensor of NaN has just left."""
    boxes1, boxes2 = valid_boxes(5000), valid_boxes(5000, seed=1).requires_grad_()
    for _ in range(5):
        stale = [torch.full((5000, 4), torch.nan), torch.full((5000,), torch.nan)]
        del stale
        value = paired_box_iou(boxes1, boxes2, mode="giou")
        (grad,) = torch.autograd.grad(value.sum(), boxes2)
        assert value.isfinite().all()
        assert grad.isfinite().all()


def test_loss_reductions() -> None:
    boxes1, boxes2 = valid_boxes(9), valid_boxes(9, seed=1)
    weight = torch.rand(9)
    each = 1 - paired_box_iou(boxes1, boxes2, mode="giou")
    assert torch.equal(paired_iou_loss(boxes1, boxes2, reduction="none"), each)
    assert_close(paired_iou_loss(boxes1, boxes2, weight=weight), (each * weight).sum())
    assert_close(paired_iou_loss(boxes1, boxes2, reduction="mean"), each.mean())
    empty = torch.zeros(0, 4)
    assert paired_iou_loss(empty, empty, reduction="mean").item() == 0
    with pytest.raises(ValueError, match="reduction must be 'none', 'sum' or 'mean', got 'avg'"):
        paired_iou_loss(boxes1, boxes2, reduction="avg")  # type: ignore[arg-type]


def test_weights_of_the_loss_do_not_enlarge_it() -> None:
    boxes1, boxes2 = valid_boxes(2, 9), valid_boxes(2, 9, seed=1)
    each = paired_iou_loss(boxes1, boxes2, reduction="none")
    for shape in ((), (1,), (9,), (2, 1), (1, 9), (2, 9)):
        weight = torch.rand(shape)
        assert torch.equal(paired_iou_loss(boxes1, boxes2, weight=weight, reduction="none"), each * weight)
    with pytest.raises(ValueError, match=r"weight must broadcast to the pairs, of shape \[9\], got \[9, 1\]"):
        paired_iou_loss(boxes1[0], boxes2[0], weight=torch.ones(9, 1))
    with pytest.raises(ValueError, match=r"weight must broadcast to the pairs, of shape \[1\], got \[9\]"):
        paired_iou_loss(boxes1[0, :1], boxes2[0, :1], weight=torch.ones(9))
    with pytest.raises(ValueError, match=r"weight must broadcast to the pairs, of shape \[2, 9\], got \[8\]"):
        paired_iou_loss(boxes1, boxes2, weight=torch.ones(8))
    with pytest.raises(TypeError, match="weight must be a tensor, got list"):
        paired_iou_loss(boxes1, boxes2, weight=[1.0] * 9)  # type: ignore[arg-type]


def test_bad_input() -> None:
    boxes = valid_boxes(3)
    with pytest.raises(ValueError, match=r"boxes1 and boxes2 must broadcast, got \[3, 4\] and \[5, 4\]"):
        paired_box_iou(boxes, valid_boxes(5))
    with pytest.raises(TypeError, match="boxes2 must be a tensor, got ndarray"):
        paired_box_iou(boxes, boxes.numpy())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"boxes1 must have shape \[..., 4\], got \[3, 3\]"):
        paired_box_iou(boxes[:, :3], boxes)
    with pytest.raises(ValueError, match="mode must be one of"):
        paired_box_iou(boxes, boxes, mode="l1")  # type: ignore[arg-type]


def test_double_backward_is_refused() -> None:
    boxes = valid_boxes(3).requires_grad_()
    (grad,) = torch.autograd.grad(paired_box_iou(boxes, valid_boxes(3, seed=1)).sum(), boxes, create_graph=True)
    with pytest.raises(RuntimeError, match="paired_box_iou: double backward is not implemented"):
        grad.sum().backward()


def test_opcheck() -> None:
    boxes1, boxes2 = valid_boxes(2, 3), valid_boxes(2, 3, seed=1)
    rule = (4, 2, 0, 0.0, True)
    op = torch.ops.ssod_fast
    torch.library.opcheck(op.paired_box_iou.default, (boxes1, boxes2, *rule))
    torch.library.opcheck(op.paired_box_iou_backward.default, (torch.ones(2, 3), boxes1, boxes2, *rule, False, True))


@pytest.mark.parametrize("device", DEVICES)
def test_compile(device: str) -> None:
    def loss(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return paired_iou_loss(x, y, mode="ciou", fmt="cxcywh", weight=weight)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    for n in (5, 9):
        boxes1, boxes2 = (valid_boxes(n, k, seed=k).to(device).requires_grad_() for k in (3, 1))
        weight = torch.rand(n, 3, device=device)
        grads = torch.autograd.grad(compiled(boxes1, boxes2, weight), (boxes1, boxes2))
        expected = torch.autograd.grad(loss(boxes1, boxes2, weight), (boxes1, boxes2))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, expected, strict=True))


def test_no_sync() -> None:
    boxes = valid_boxes(20).requires_grad_()
    with no_sync():
        paired_iou_loss(boxes, valid_boxes(20, seed=1), weight=torch.ones(20)).backward()
