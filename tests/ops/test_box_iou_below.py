from __future__ import annotations

import pytest
import torch
from box_cases import DEVICES, A, random_boxes, rules, valid_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import no_sync
from torch import Tensor

from ssod_fast.ops import box_iou, box_iou_below, box_iou_max


@pytest.mark.parametrize("device", DEVICES)
def test_golden(device: str) -> None:
    boxes = torch.tensor([A, (20, 20, 30, 30), (5, 5, 15, 15), (0, 0, 0, 0)], device=device)
    one = torch.tensor([A], device=device)
    assert box_iou_below(boxes, one, 0.2).tolist() == [False, True, True, True]
    assert box_iou_below(boxes, one, 1 / 7).tolist() == [False, True, False, True]  # strict
    assert box_iou_below(boxes, one[:0], 0.2).tolist() == [True] * 4
    assert box_iou_below(boxes, torch.cat([one, one * torch.nan]), 0.2).tolist() == [False] * 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("mode", "fmt", "eps_mode", "eps"), rules())
def test_equals_matrix(device: str, mode: str, fmt: str, eps_mode: str, eps: float) -> None:
    for dtype in (torch.float32, torch.float64):
        boxes, others = random_boxes(2, 71, dtype=dtype).to(device), random_boxes(2, 531, seed=1, dtype=dtype).to(device)
        for partners in (others, others[:, 10:40], others[:, 10:10]):
            options = {"mode": mode, "fmt": fmt, "eps_mode": eps_mode, "eps": eps}
            matrix = box_iou(boxes, partners, **options)
            below, maxima = box_iou_below(boxes, partners, 0.3, **options, return_max=True)
            assert torch.equal(below, (matrix < 0.3).all(-1))
            assert torch.equal(maxima, box_iou_max(boxes, partners, **options).values)
            assert torch.equal(box_iou_below(boxes, partners, 0.3, **options), below)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 300), st.floats(-1, 1))
def test_below_is_maximum_below(seed: int, n: int, m: int, threshold: float) -> None:
    boxes, others = valid_boxes(n, seed=seed), valid_boxes(m, seed=seed + 1)
    for mode in ("iou", "giou"):
        limit = torch.tensor(threshold, dtype=torch.float32)
        assert torch.equal(box_iou_below(boxes, others, threshold, mode=mode), box_iou_max(boxes, others, mode=mode).values < limit)


@pytest.mark.parametrize("device", DEVICES)
def test_ragged_equals_loop(device: str) -> None:
    counts1, counts2 = [3, 0, 40, 2, 4], [4, 2, 0, 170, 1]
    boxes, others = random_boxes(49).to(device), random_boxes(177, seed=1).to(device)
    offsets1, offsets2 = (torch.tensor([0, *c], device=device).cumsum(0) for c in (counts1, counts2))
    below, maxima = box_iou_below(boxes, others, 0.1, offsets1=offsets1, offsets2=offsets2, return_max=True)
    for b in range(5):
        rows, cols = slice(offsets1[b], offsets1[b + 1]), slice(offsets2[b], offsets2[b + 1])
        expected = box_iou_below(boxes[rows], others[cols], 0.1, return_max=True)
        assert torch.equal(below[rows], expected[0])
        assert torch.equal(maxima[rows], expected[1])
    assert below[3:43].all()  # an image without others


def test_shapes_and_dtypes() -> None:
    assert box_iou_below(valid_boxes(0), valid_boxes(3), 0.5).shape == (0,)
    below, maxima = box_iou_below(valid_boxes(2, 0, 3), valid_boxes(2, 0, 4), 0.5, return_max=True)
    assert below.shape == maxima.shape == (2, 0, 3)
    below, maxima = box_iou_below(valid_boxes(2).double().requires_grad_(), valid_boxes(3), 0.5, return_max=True)
    assert below.dtype == torch.bool
    assert maxima.dtype == torch.float64
    assert not maxima.requires_grad
    boxes = valid_boxes(3).half()
    third = float(box_iou(boxes[:1], boxes[1:2]))
    assert not box_iou_below(boxes[:1], boxes[1:2], third).any()


@pytest.mark.parametrize("batched", [False, True])
def test_a_box_of_nan_is_false_with_maximum_zero(batched: bool) -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [torch.nan, 0, 4, 4], [50, 50, 60, 60]])
    others = torch.tensor([[0.0, 0, 4, 4], [20, 20, 30, 30]])
    offsets = {"offsets1": torch.tensor([0, 3]), "offsets2": torch.tensor([0, 2])} if batched else {}
    below, maxima = box_iou_below(boxes, others, 0.5, return_max=True, **offsets)
    assert below.tolist() == [False, False, True]
    assert maxima.tolist() == [1, 0, 0]


def test_bad_input() -> None:
    boxes = valid_boxes(3)
    with pytest.raises(TypeError, match="threshold must be a number, got 'high'"):
        box_iou_below(boxes, boxes, "high")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"others must be a dense tensor, got layout torch\.sparse_coo"):
        box_iou_below(boxes, boxes.to_sparse(), 0.5)
    with pytest.raises(ValueError, match="threshold must be a number, got nan"):
        box_iou_below(boxes, boxes, float("nan"))
    with pytest.raises(ValueError, match=r"others must have shape \[..., 4\], got \[3, 2\]"):
        box_iou_below(boxes, boxes[:, :2], 0.5)
    with pytest.raises(ValueError, match="boxes and others must have equal leading dimensions"):
        box_iou_below(boxes, boxes[None], 0.5)
    with pytest.raises(TypeError, match="others must be a tensor, got NoneType"):
        box_iou_below(boxes, None, 0.5)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="offsets1 and offsets2 must be given together"):
        box_iou_below(boxes, boxes, 0.5, offsets2=torch.tensor([0, 3]))


def test_opcheck() -> None:
    boxes, others = valid_boxes(5), valid_boxes(6, seed=1)
    op = torch.ops.ssod_fast.box_iou_below.default
    torch.library.opcheck(op, (boxes, others, None, None, 0.3, 0, 0, 0, 0.0, False))
    torch.library.opcheck(op, (boxes, others, torch.tensor([0, 2, 5]), torch.tensor([0, 6, 6]), 0.3, 2, 0, 0, 0.0, True))


def test_compile_and_no_sync() -> None:
    def keep(x: Tensor, y: Tensor) -> Tensor:
        return ~box_iou_below(x, y, 0.2)

    boxes, others = valid_boxes(5), valid_boxes(6, seed=1)
    with no_sync():
        expected = keep(boxes, others)
    assert torch.equal(torch.compile(keep, fullgraph=True, backend="aot_eager")(boxes, others), expected)
