from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.ops as tv
from box_cases import DEVICES, FORMATS, GOLDEN, GOLDEN_MODES, MODES, A, integer_boxes, random_boxes, rules, valid_boxes
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from no_sync import no_sync
from tolerances import assert_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssod_fast.ops import _overlaps, box_iou, complete_box_iou, distance_box_iou, generalized_box_iou, ragged_box_iou
from ssod_fast.ops._boxes import make_rule


def reference(boxes1: Tensor, boxes2: Tensor, mode: str, fmt: str = "xyxy", eps_mode: str = "zero", eps: float | None = None) -> Tensor:
    return _overlaps.pairwise(boxes1.double(), boxes2.double(), make_rule(mode, fmt, eps_mode, eps), nan_zero=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_table(device: str, dtype: torch.dtype) -> None:
    one = torch.tensor([A], dtype=dtype, device=device)
    others = torch.tensor(list(GOLDEN), dtype=dtype, device=device)
    for column, mode in enumerate(GOLDEN_MODES):
        expected = torch.tensor([[values[column] for values in GOLDEN.values()]])
        torch.testing.assert_close(box_iou(one, others, mode=mode).cpu().double(), expected.double(), atol=1e-6, rtol=0)


def test_golden_other_rules() -> None:
    a = torch.tensor([A])
    inside, inverted = torch.tensor([[2.0, 2, 4, 6]]), torch.tensor([[8.0, 8, 2, 2]])
    assert box_iou(inside, a, mode="iof").item() == 1
    assert box_iou(a, inside, mode="iof").item() == pytest.approx(0.08)
    assert box_iou(a, inverted, mode="giou", eps_mode="none").item() == pytest.approx(0.36)
    assert box_iou(a, a, mode="ciou", eps_mode="none", eps=0).isnan().all()
    point = torch.full((1, 4), 3.0)
    for mode in ("iou", "giou", "diou"):
        assert box_iou(point, point, mode=mode).item() == 0
        assert box_iou(point, point, mode=mode, eps_mode="none", eps=0).isnan().all()
    far = torch.tensor([[0.0, 0, 0, 0]]), torch.tensor([[5.0, 5, 5, 5]])
    assert [box_iou(*far, mode=m).item() for m in ("iou", "giou", "diou")] == [0, -1, -1]
    centred = torch.tensor([[5.0, 5, 10, 10]]), torch.tensor([[10.0, 10, 10, 10]])
    assert box_iou(*centred, fmt="cxcywh").item() == pytest.approx(1 / 7)
    tiny = torch.tensor([[0.0, 0, 5e-4, 5e-4]])
    assert box_iou(tiny, tiny, eps_mode="max").item() == pytest.approx(0.25)
    shifted = torch.tensor([[5.0, 5, 15, 15]])
    assert box_iou(a, shifted, mode="giou", eps_mode="add").item() == pytest.approx(-0.0793650793, abs=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("mode", "fmt", "eps_mode", "eps"), rules())
def test_matches_reference(device: str, dtype: torch.dtype, mode: str, fmt: str, eps_mode: str, eps: float) -> None:
    boxes1, boxes2 = random_boxes(2, 37, dtype=dtype).to(device), random_boxes(2, 1041, seed=1, dtype=dtype).to(device)
    actual = box_iou(boxes1, boxes2, mode=mode, fmt=fmt, eps_mode=eps_mode, eps=eps)
    expected = _overlaps.pairwise(boxes1, boxes2, make_rule(mode, fmt, eps_mode, eps), nan_zero=False)
    assert actual.dtype == dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_close(actual, expected, equal_nan=True)
    silent = box_iou(boxes1, boxes2, mode=mode, fmt=fmt, eps_mode=eps_mode, eps=eps, nan="zero")
    assert torch.equal(silent, actual.where(~actual.isnan(), 0))


@pytest.mark.parametrize("mode", MODES)
def test_float32_close_to_float64(mode: str) -> None:
    boxes1, boxes2 = valid_boxes(33), valid_boxes(65, seed=1)
    assert_close(box_iou(boxes1, boxes2, mode=mode), reference(boxes1, boxes2, mode))


def test_bit_equal_to_torchvision() -> None:
    boxes1, boxes2 = valid_boxes(211) * 40, valid_boxes(307, seed=1) * 40
    for eps_mode in ("none", "zero"):
        assert torch.equal(box_iou(boxes1, boxes2, eps_mode=eps_mode), tv.box_iou(boxes1, boxes2))
        assert torch.equal(generalized_box_iou(boxes1, boxes2, eps_mode=eps_mode), tv.generalized_box_iou(boxes1, boxes2))
    assert_close(distance_box_iou(boxes1, boxes2, eps_mode="none"), tv.distance_box_iou(boxes1, boxes2))
    assert_close(complete_box_iou(boxes1, boxes2, eps_mode="none"), tv.complete_box_iou(boxes1, boxes2))


def floored(boxes1: Tensor, boxes2: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """IoU and GIoU with the union and the enclosing area raised to at least eps."""
    corner = torch.maximum(boxes1[:, None, :2], boxes2[None, :, :2])
    sides = (torch.minimum(boxes1[:, None, 2:], boxes2[None, :, 2:]) - corner).clamp(min=0)
    inter = sides.prod(-1)
    area1, area2 = ((b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes1, boxes2))
    union = (area1[:, None] + area2[None] - inter).clamp(min=eps)
    outer = torch.maximum(boxes1[:, None, 2:], boxes2[None, :, 2:]) - torch.minimum(boxes1[:, None, :2], boxes2[None, :, :2])
    enclosing = outer.clamp(min=0).prod(-1).clamp(min=eps)
    return inter / union, inter / union - (enclosing - union) / enclosing


def test_formulas_of_peers() -> None:
    boxes1, boxes2 = valid_boxes(20) * 1e-4, valid_boxes(30, seed=1) * 1e-4
    iou, giou = floored(boxes1, boxes2, 1e-6)
    assert_close(box_iou(boxes1, boxes2, eps_mode="max"), iou)
    assert_close(box_iou(boxes1, boxes2, mode="giou", eps_mode="max"), giou)
    iou, _ = floored(boxes1, boxes2, 0)
    inter_over = box_iou(boxes1, boxes2, eps_mode="add", eps=1e-6)
    assert (inter_over < iou + 1e-12).all()
    assert not torch.allclose(inter_over, iou)
    paired = tv.generalized_box_iou_loss(boxes1, boxes2[:20], eps=1e-7)
    assert_close(1 - box_iou(boxes1, boxes2[:20], mode="giou", eps_mode="add").diagonal(), paired)


@pytest.mark.parametrize("shapes", [((0,), (5,)), ((3,), (0,)), ((0,), (0,)), ((1,), (1,)), ((2, 0, 3), (2, 0, 4)), ((2, 3, 5), (2, 3, 7))])
def test_shapes(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    boxes1, boxes2 = valid_boxes(*shapes[0]), valid_boxes(*shapes[1], seed=1)
    out = box_iou(boxes1, boxes2, mode="giou")
    assert out.shape == (*shapes[0], shapes[1][-1])
    assert_close(out, reference(boxes1, boxes2, "giou"))


def test_layouts_without_copies() -> None:
    wide = valid_boxes(4, 6, 9).repeat(1, 1, 1, 2)  # [4, 6, 9, 8]
    other = valid_boxes(4, 6, 5, seed=1)
    for boxes in (wide[..., :4], wide[..., 4:].transpose(0, 1), wide[::2, :, ::3, 2:6], wide[:1, :, :, :4].expand(4, 6, 9, 4)):
        partner = other.transpose(0, 1) if boxes.shape[0] == 6 else other[: boxes.shape[0]]
        assert torch.equal(box_iou(boxes, partner), box_iou(boxes.contiguous(), partner.contiguous()))
    planes = valid_boxes(9).t().contiguous().t()  # last dimension not contiguous
    assert torch.equal(box_iou(planes, planes), box_iou(planes.contiguous(), planes.contiguous()))


def test_dtypes() -> None:
    boxes = torch.tensor([[0.0, 0, 1200, 1200], [100, 100, 1300, 1300]])
    for half in (torch.float16, torch.bfloat16):
        assert box_iou(boxes.to(half), boxes.to(half)).dtype == torch.float32
        stored = box_iou(boxes, boxes, dtype=half)
        assert stored.dtype == half
        assert_close(stored, box_iou(boxes, boxes))
    assert box_iou(boxes[:1].half(), boxes[1:].half()).item() == pytest.approx(0.7245509, abs=1e-7)
    assert box_iou(boxes.double(), boxes).dtype == torch.float64
    assert box_iou(boxes.int(), boxes.int()).dtype == torch.float32
    assert torch.equal(box_iou(boxes.long(), boxes.int()), box_iou(boxes, boxes))
    assert box_iou(boxes.double(), boxes, dtype=torch.float32).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(box_iou(boxes, boxes), box_iou(boxes, boxes))
        assert box_iou(boxes, boxes).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_out_is_fully_written(dtype: torch.dtype) -> None:
    boxes1, boxes2 = valid_boxes(2, 65), valid_boxes(2, 1100, seed=1)
    out = torch.full((2, 65, 1100), torch.nan, dtype=dtype)
    assert box_iou(boxes1, boxes2, mode="giou", dtype=dtype, out=out) is out
    assert torch.equal(out, box_iou(boxes1, boxes2, mode="giou", dtype=dtype))


def test_out_errors() -> None:
    boxes = valid_boxes(3)
    with pytest.raises(ValueError, match=r"out must be a contiguous torch.float32 tensor of shape \[3, 3\] on cpu, got .* \[3, 4\]"):
        box_iou(boxes, boxes, out=torch.empty(3, 4))
    with pytest.raises(ValueError, match="got a non-contiguous"):
        box_iou(boxes, boxes, out=torch.empty(3, 6)[:, ::2])
    with pytest.raises(ValueError, match=r"got a contiguous torch\.float64"):
        box_iou(boxes, boxes, out=torch.empty(3, 3, dtype=torch.float64))
    with pytest.raises(TypeError, match="out must be a tensor, got list"):
        box_iou(boxes, boxes, out=[])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out cannot be used when boxes1, boxes2 or out require grad"):
        box_iou(boxes.requires_grad_(), boxes, out=torch.empty(3, 3))


def test_out_must_not_overlap_the_boxes_in_memory() -> None:
    workspace = torch.empty(2, 200, 4)
    boxes, others, out = workspace[0].copy_(valid_boxes(200)), valid_boxes(4, seed=1), workspace[1]
    expected = box_iou(boxes, others)
    assert torch.equal(box_iou(boxes, others, out=out), expected)  # side by side in one storage is fine
    with pytest.raises(ValueError, match="out must not share memory with boxes1 or boxes2"):
        box_iou(boxes, others, out=workspace.view(400, 4)[1:201])
    square = others.clone()
    with pytest.raises(ValueError, match="out must not share memory"):
        box_iou(boxes[:4], square, out=square)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes1": [[0, 0, 1, 1]]}, TypeError, "boxes1 must be a tensor, got list"),
        ({"boxes1": torch.zeros(3, 5)}, ValueError, r"boxes1 must have shape \[..., 4\], got \[3, 5\]"),
        ({"boxes2": torch.zeros(4)}, ValueError, r"boxes2 must have shape \[..., N, 4\], got \[4\]"),
        ({"boxes2": torch.zeros(2, 3, 4)}, ValueError, r"equal leading dimensions, got \[\] and \[2\]"),
        ({"boxes1": torch.zeros(3, 4, dtype=torch.complex64)}, TypeError, r"boxes1 must have a real number dtype, got torch\.complex64"),
        ({"boxes2": torch.zeros(3, 4, dtype=torch.bool)}, TypeError, r"boxes2 must have a real number dtype, got torch\.bool"),
        ({"boxes2": torch.zeros(3, 4, device="meta")}, ValueError, "boxes1 and boxes2 must be on one device, got cpu and meta"),
        ({"mode": "IoU"}, ValueError, "mode must be one of 'iou', 'iof', 'giou', 'diou', 'ciou', got 'IoU'"),
        ({"fmt": "yxyx"}, ValueError, "fmt must be one of 'xyxy', 'xywh', 'cxcywh', got 'yxyx'"),
        ({"eps_mode": ["zero"]}, ValueError, "eps_mode must be one of 'zero', 'none', 'max', 'add', got"),
        ({"eps": -1e-7}, ValueError, "eps must be a finite number >= 0, got -1e-07"),
        ({"eps": float("nan")}, ValueError, "eps must be a finite number >= 0, got nan"),
        ({"eps": "small"}, ValueError, "eps must be a finite number >= 0, got 'small'"),
        ({"nan": "raise"}, ValueError, "nan must be 'propagate' or 'zero', got 'raise'"),
        ({"dtype": torch.int32}, TypeError, r"dtype must be a floating dtype, got torch\.int32"),
        ({"dtype": "float16"}, TypeError, "dtype must be a floating dtype, got 'float16'"),
        ({"boxes1": torch.zeros(3, 4).to_sparse()}, TypeError, r"boxes1 must be a dense tensor, got layout torch\.sparse_coo"),
        ({"boxes2": torch.zeros(3, 4).double().to_sparse()}, TypeError, "boxes2 must be a dense tensor"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    options: dict[str, Any] = {"boxes1": torch.zeros(3, 4), "boxes2": torch.zeros(3, 4), **change}
    with pytest.raises(error, match=message):
        box_iou(options.pop("boxes1"), options.pop("boxes2"), **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("eps_mode", ["zero", "none", "max", "add"])
def test_nan_and_infinite_boxes(device: str, mode: str, eps_mode: str) -> None:
    good = valid_boxes(3).to(device)
    for value in (torch.nan, torch.inf, -torch.inf):
        for i in range(4):
            bad = good.clone()
            bad[1, i] = value
            for result in (box_iou(bad, good, mode=mode, eps_mode=eps_mode), box_iou(good, bad, mode=mode, eps_mode=eps_mode).t()):
                assert result[1].isnan().all()
                assert result[[0, 2]].isfinite().all()


def test_zero_mode_is_finite_for_finite_boxes() -> None:
    boxes = torch.randn(60, 4) * 10  # most of them inverted
    boxes[::7] = boxes[::7].round().clamp(-1, 1)
    for mode in MODES:
        assert box_iou(boxes, boxes, mode=mode).isfinite().all()
    giou = box_iou(boxes, boxes, mode="giou")
    assert (giou >= -1).all()
    assert (giou <= 1).all()
    assert box_iou(boxes * 1e17, boxes * 1e17, mode="giou").isfinite().all()


boxes_strategy = arrays(np.float32, st.tuples(st.integers(1, 12), st.just(4)), elements=st.integers(0, 64).map(float)).map(
    lambda b: torch.from_numpy(np.concatenate([b[:, :2], b[:, :2] + b[:, 2:] + 1], 1))
)


@settings(max_examples=60, deadline=None)
@given(boxes_strategy, boxes_strategy, st.integers(-8, 8), st.integers(-1000, 1000))
def test_laws(boxes1: Tensor, boxes2: Tensor, power: int, shift: int) -> None:
    values = {mode: box_iou(boxes1, boxes2, mode=mode) for mode in MODES}
    for mode in ("iou", "giou"):
        assert torch.equal(values[mode], box_iou(boxes2, boxes1, mode=mode).t())
        assert torch.equal(values[mode], box_iou(boxes1 * 2.0**power, boxes2 * 2.0**power, mode=mode))
        assert torch.equal(values[mode], box_iou(boxes1 + shift, boxes2 + shift, mode=mode))
    iou = values["iou"]
    assert ((iou >= 0) & (iou <= 1)).all()
    assert ((values["giou"] >= -1) & (values["giou"] <= iou)).all()
    assert ((values["ciou"] <= values["diou"]) & (values["diou"] <= iou)).all()
    assert (box_iou(boxes1, boxes1).diagonal() == 1).all()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str, fmt: str) -> None:
    boxes1 = valid_boxes(2, 5, dtype=torch.float64).requires_grad_()
    boxes2 = valid_boxes(2, 4, seed=1, dtype=torch.float64).requires_grad_()
    if mode == "ciou":  # its weight alpha is held constant, so finite differences do not apply
        first = torch.autograd.grad(box_iou(boxes1, boxes2, mode=mode, fmt=fmt).sum(), (boxes1, boxes2))
        rule = make_rule(mode, fmt, "zero", None)
        a, b = _overlaps.corners(boxes1, rule).unsqueeze(-1), _overlaps.corners(boxes2, rule).unsqueeze(-2)
        diou = _overlaps.overlaps(a, b, rule._replace(mode=3), nan_zero=False)
        iou = _overlaps.overlaps(a, b, rule._replace(mode=0), nan_zero=False)
        v = 4 / torch.pi**2 * (torch.atan(b.w / b.h) - torch.atan(a.w / a.h)) ** 2
        alpha = (v / (1 - iou + v)).detach()
        second = torch.autograd.grad((diou - alpha * v).sum(), (boxes1, boxes2))
        torch.testing.assert_close(first, second, atol=1e-12, rtol=1e-10)
    else:
        assert torch.autograd.gradcheck(lambda x, y: box_iou(x, y, mode=mode, fmt=fmt), (boxes1, boxes2), atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("mode", "fmt", "eps_mode", "eps"), rules())
def test_gradient_matches_reference(device: str, mode: str, fmt: str, eps_mode: str, eps: float) -> None:
    boxes1 = random_boxes(2, 33, dtype=torch.float64).to(device)
    boxes2 = random_boxes(2, 540, seed=1, dtype=torch.float64).to(device)
    grad = torch.rand(2, 33, 540, dtype=torch.float64, device=device)
    rule = make_rule(mode, fmt, eps_mode, eps)
    for nan_zero in (False, True):
        a, b = _overlaps.corners(boxes1, rule).unsqueeze(-1), _overlaps.corners(boxes2, rule).unsqueeze(-2)
        grad1, grad2 = _overlaps.overlap_gradients(grad, a, b, rule, nan_zero)
        leaf1, leaf2 = boxes1.clone().requires_grad_(), boxes2.clone().requires_grad_()
        value = box_iou(leaf1, leaf2, mode=mode, fmt=fmt, eps_mode=eps_mode, eps=eps, nan="zero" if nan_zero else "propagate")
        actual = torch.autograd.grad(value, (leaf1, leaf2), grad)
        for got, expected in zip(actual, (grad1.sum(-2), grad2.sum(-3)), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10, equal_nan=True)


@pytest.mark.parametrize("mode", ["iou", "giou"])
def test_gradient_equals_torchvision_autograd_at_ties(mode: str) -> None:
    boxes1 = integer_boxes(30).requires_grad_()
    boxes2 = integer_boxes(40, seed=1).requires_grad_()
    weight = torch.rand(30, 40, dtype=torch.float64)
    peer = tv.box_iou if mode == "iou" else tv.generalized_box_iou
    ours = torch.autograd.grad((box_iou(boxes1, boxes2, mode=mode, eps_mode="none") * weight).sum(), (boxes1, boxes2))
    theirs = torch.autograd.grad((peer(boxes1, boxes2) * weight).sum(), (boxes1, boxes2))
    torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=1e-10)


def test_gradient_needs() -> None:
    boxes1, boxes2 = valid_boxes(5), valid_boxes(6, seed=1)
    one = boxes1.clone().requires_grad_()
    box_iou(one, boxes2, mode="giou").sum().backward()  # an expanded incoming gradient
    both = boxes1.clone().requires_grad_(), boxes2.clone().requires_grad_()
    box_iou(*both, mode="giou").backward(torch.ones(6, 5).t())
    assert torch.equal(one.grad, both[0].grad)
    half = boxes1.half().requires_grad_()
    box_iou(half, boxes2, dtype=torch.bfloat16).sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.float16
    empty = torch.zeros(0, 4, requires_grad=True)
    box_iou(empty, boxes2).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 4)
    lone = boxes1.clone().requires_grad_()
    box_iou(lone, torch.zeros(0, 4)).sum().backward()
    assert (lone.grad == 0).all()


def test_gradient_does_not_depend_on_threads() -> None:
    boxes1, boxes2 = valid_boxes(900).requires_grad_(), valid_boxes(700, seed=1).requires_grad_()
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(torch.autograd.grad(box_iou(boxes1, boxes2, mode="giou").sum(), (boxes1, boxes2)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_of_few_rows_and_many_columns_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    peak_bytes = importlib.import_module("machine").peak_bytes
    boxes1, boxes2 = valid_boxes(4).requires_grad_(), valid_boxes(200_000, seed=1).requires_grad_()
    grad = torch.rand(4, 200_000)
    result = box_iou(boxes1, boxes2, mode="giou")

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(result, (boxes1, boxes2), grad, retain_graph=True)

    parts = zip(boxes2.split(1000), grad.split(1000, 1), strict=True)
    few = [torch.autograd.grad(box_iou(boxes1, part, mode="giou"), boxes1, g) for part, g in parts]
    torch.testing.assert_close(backward()[0], torch.stack([g for (g,) in few]).sum(0), rtol=1e-4, atol=1e-4)
    peak = peak_bytes(backward, torch.device("cpu"))
    assert peak is None or peak < 16 * 2**20  # planes, sums and gradients take 11 MiB; column sums for each of six parts take 16 more


def test_double_backward_is_refused() -> None:
    boxes = valid_boxes(3).requires_grad_()
    (grad,) = torch.autograd.grad(box_iou(boxes, valid_boxes(2, seed=1)).sum(), boxes, create_graph=True)
    with pytest.raises(RuntimeError, match="box_iou: double backward is not implemented"):
        grad.sum().backward()


def ragged_case(device: str = "cpu", offset_dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts1, counts2 = [3, 0, 5, 2], [4, 2, 0, 70]
    boxes1, boxes2 = random_boxes(10).to(device), random_boxes(76, seed=1).to(device)
    offsets1, offsets2 = (torch.tensor([0, *c]).cumsum(0).to(device, offset_dtype) for c in (counts1, counts2))
    return boxes1, offsets1, boxes2, offsets2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64])
def test_ragged_equals_loop(device: str, offset_dtype: torch.dtype) -> None:
    boxes1, offsets1, boxes2, offsets2 = ragged_case(device, offset_dtype)
    for mode in MODES:
        with no_sync() if device == "cuda" else torch.no_grad():
            actual = ragged_box_iou(boxes1, offsets1, boxes2, offsets2, max_boxes2=72, pad_value=-3, mode=mode, fmt="xywh")
        assert actual.shape == (10, 72)
        for b in range(4):
            rows, cols = slice(offsets1[b], offsets1[b + 1]), slice(offsets2[b], offsets2[b + 1])
            expected = box_iou(boxes1[rows], boxes2[cols], mode=mode, fmt="xywh")
            width = expected.shape[1]
            assert torch.equal(actual[rows, :width].nan_to_num(9), expected.nan_to_num(9))
            assert (actual[rows, width:] == -3).all()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_compressed_sparse_boxes_are_refused() -> None:
    boxes = valid_boxes(3)
    with pytest.raises(TypeError, match=r"boxes2 must be a dense tensor, got layout torch\.sparse_csr"):
        box_iou(boxes, boxes.to_sparse_csr())


@pytest.mark.parametrize(("function", "mode"), [(generalized_box_iou, "giou"), (distance_box_iou, "diou"), (complete_box_iou, "ciou")])
def test_functions_of_one_mode_refuse_another(function: Callable[..., Tensor], mode: str) -> None:
    boxes = valid_boxes(3)
    with pytest.raises(TypeError, match=f"mode must not be given: {function.__name__} fixes it to '{mode}', got 'iou'; box_iou takes any"):
        function(boxes, boxes, mode="iou")


def test_ragged_edges() -> None:
    boxes1, offsets1, boxes2, offsets2 = ragged_case()
    none = torch.zeros(1, dtype=torch.int64)
    assert ragged_box_iou(boxes1[:0], none, boxes2[:0], none, max_boxes2=3).shape == (0, 3)
    assert ragged_box_iou(boxes1, offsets1, boxes2, offsets2, max_boxes2=70, dtype=torch.float16).dtype == torch.float16
    with pytest.raises(ValueError, match=r"offsets1 must rise from 0 to the number of boxes \(10\), got \[0, 4, 3, 8, 10\]"):
        ragged_box_iou(boxes1, torch.tensor([0, 4, 3, 8, 10]), boxes2, offsets2, max_boxes2=70)
    with pytest.raises(ValueError, match="offsets2 must rise from 0"):
        ragged_box_iou(boxes1, offsets1, boxes2, offsets2 + 1, max_boxes2=70)
    with pytest.raises(ValueError, match=r"max_boxes2 must be at least the largest number of boxes of an image \(70\), got 69"):
        ragged_box_iou(boxes1, offsets1, boxes2, offsets2, max_boxes2=69)
    with pytest.raises(TypeError, match=r"offsets1 must be int32 or int64, got torch\.float32"):
        ragged_box_iou(boxes1, offsets1.float(), boxes2, offsets2, max_boxes2=70)
    with pytest.raises(TypeError, match="boxes1 must be a tensor, got NoneType"):
        ragged_box_iou(None, offsets1, boxes2, offsets2, max_boxes2=70)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="max_boxes2 must be an integer, got None"):
        ragged_box_iou(boxes1, offsets1, boxes2, offsets2, max_boxes2=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dtype must be a floating dtype, got 'half'"):
        ragged_box_iou(boxes1, offsets1, boxes2, offsets2, max_boxes2=70, dtype="half")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="offsets2 must be a tensor, got list"):
        ragged_box_iou(boxes1, offsets1, boxes2, [0, 1], max_boxes2=70)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="equal lengths, got 5 and 4"):
        ragged_box_iou(boxes1, offsets1, boxes2[:6], offsets2[:4], max_boxes2=70)
    with pytest.raises(ValueError, match=r"offsets1 must have shape \[B \+ 1\]"):
        ragged_box_iou(boxes1, offsets1[None], boxes2, offsets2, max_boxes2=70)
    with pytest.raises(ValueError, match=r"boxes1 must have shape \[N, 4\] when offsets are given"):
        ragged_box_iou(boxes1[None], offsets1, boxes2, offsets2, max_boxes2=70)
    with pytest.raises(ValueError, match="ragged_box_iou carries no gradient"):
        ragged_box_iou(boxes1.requires_grad_(), offsets1, boxes2, offsets2, max_boxes2=70)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("broken", [[-5, 20, 3, 400, 10], [4, 4, 4, 4, 4], [9, 8, 7, 6, 5], [0, 0, 0, 0, 2**40]])
def test_broken_offsets_are_clamped(device: str, broken: list[int]) -> None:
    """Offsets on a device are not read by the host, so the kernels must stay inside the boxes whatever they hold."""
    boxes1, _, boxes2, _ = ragged_case(device)
    offsets = torch.tensor(broken, device=device)
    rule = (0, 0, 0, 0.0)
    op = torch.ops.ssod_fast
    assert op.ragged_box_iou(boxes1, offsets, boxes2, offsets, 5, -1.0, *rule, True, torch.float32).shape == (10, 5)
    for index in op.box_iou_max(boxes1, boxes2, offsets, offsets, *rule, True, True)[1::2]:
        assert (index < 76).all()
    assert op.box_iou_below(boxes1, boxes2, offsets, offsets, 0.5, *rule, True)[0].shape == (10,)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_opcheck(lead: tuple[int, ...]) -> None:
    boxes1, boxes2 = valid_boxes(*lead, 3), valid_boxes(*lead, 4, seed=1)
    rule = (2, 0, 0, 0.0, False)
    op = torch.ops.ssod_fast
    torch.library.opcheck(op.box_iou.default, (boxes1, boxes2, *rule, torch.float32))
    torch.library.opcheck(op.box_iou.out, (boxes1, boxes2, *rule, torch.empty(*lead, 3, 4)))
    torch.library.opcheck(op.box_iou_backward.default, (torch.ones(*lead, 3, 4), boxes1, boxes2, *rule, True, False))


def test_opcheck_ragged() -> None:
    boxes1, offsets1, boxes2, offsets2 = ragged_case()
    torch.library.opcheck(
        torch.ops.ssod_fast.ragged_box_iou.default, (boxes1, offsets1, boxes2, offsets2, 70, 0.0, 0, 0, 0, 0.0, True, torch.float32)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_compile(device: str) -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return box_iou(x, y, mode="ciou", fmt="cxcywh").clamp(min=0).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    for n in (5, 9):
        boxes1 = valid_boxes(n).to(device).requires_grad_()
        boxes2 = valid_boxes(7, seed=1).to(device).requires_grad_()
        grads = torch.autograd.grad(compiled(boxes1, boxes2), (boxes1, boxes2))
        expected = torch.autograd.grad(loss(boxes1, boxes2), (boxes1, boxes2))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, expected, strict=True))


def test_compile_out() -> None:
    boxes1, boxes2 = valid_boxes(5), valid_boxes(6, seed=1)
    compiled = torch.compile(lambda x, y, out: box_iou(x, y, out=out) * 2, fullgraph=True, backend="aot_eager")
    out = torch.empty(5, 6)
    assert torch.equal(compiled(boxes1, boxes2, out), 2 * box_iou(boxes1, boxes2))
    assert torch.equal(out, box_iou(boxes1, boxes2))


def test_compile_ragged() -> None:
    case = ragged_case()
    compiled = torch.compile(lambda *x: ragged_box_iou(*x, max_boxes2=70, nan="zero"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*case), ragged_box_iou(*case, max_boxes2=70, nan="zero"))


def test_no_sync_and_huge_sizes() -> None:
    boxes = valid_boxes(20)
    with no_sync():
        box_iou(boxes, boxes, mode="ciou")
    with FakeTensorMode():
        huge = torch.empty(70000, 4)
        assert box_iou(huge, huge).numel() == 70000**2 > 2**31


@pytest.mark.gpu
def test_side_stream() -> None:
    boxes1, boxes2 = valid_boxes(500).cuda(), valid_boxes(600, seed=1).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), no_sync():
        result = box_iou(boxes1, boxes2)
    stream.synchronize()
    torch.testing.assert_close(result.cpu(), box_iou(boxes1.cpu(), boxes2.cpu()), atol=1e-7, rtol=0)
