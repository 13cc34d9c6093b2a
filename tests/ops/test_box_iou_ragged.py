"""Ragged overlaps: images of one batch with different numbers of boxes."""

from __future__ import annotations

import pytest
import torch
from box_cases import DEVICES, MODES, random_boxes
from no_sync import no_sync
from torch import Tensor

from ssod_fast.ops import box_iou, ragged_box_iou


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


def test_opcheck_ragged() -> None:
    boxes1, offsets1, boxes2, offsets2 = ragged_case()
    torch.library.opcheck(
        torch.ops.ssod_fast.ragged_box_iou.default, (boxes1, offsets1, boxes2, offsets2, 70, 0.0, 0, 0, 0, 0.0, True, torch.float32)
    )


def test_compile_ragged() -> None:
    case = ragged_case()
    compiled = torch.compile(lambda *x: ragged_box_iou(*x, max_boxes2=70, nan="zero"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*case), ragged_box_iou(*case, max_boxes2=70, nan="zero"))
