"""Overlaps of all pairs: values, shapes, dtypes, laws, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.ops as tv
from box_cases import DEVICES, GOLDEN, GOLDEN_MODES, MODES, A, random_boxes, rules, valid_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from no_sync import no_sync
from tolerances import assert_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssod_fast.ops import _overlaps, box_iou, complete_box_iou, distance_box_iou, generalized_box_iou
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


@pytest.mark.parametrize("lead", [(), (2,)])
def test_opcheck(lead: tuple[int, ...]) -> None:
    boxes1, boxes2 = valid_boxes(*lead, 3), valid_boxes(*lead, 4, seed=1)
    rule = (2, 0, 0, 0.0, False)
    op = torch.ops.ssod_fast
    torch.library.opcheck(op.box_iou.default, (boxes1, boxes2, *rule, torch.float32))
    torch.library.opcheck(op.box_iou.out, (boxes1, boxes2, *rule, torch.empty(*lead, 3, 4)))
    torch.library.opcheck(op.box_iou_backward.default, (torch.ones(*lead, 3, 4), boxes1, boxes2, *rule, True, False))


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
