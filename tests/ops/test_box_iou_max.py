from __future__ import annotations

from typing import Any

import pytest
import torch
from box_cases import DEVICES, MODES, A, random_boxes, rules, valid_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import no_sync
from torch import Tensor

from ssod_fast.ops import box_iou, box_iou_max


def best_of(matrix: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Maximum and first index along `dim`; NaN and -inf never win, nothing at all gives 0 and -1."""
    if matrix.shape[dim] == 0:
        shape = matrix.sum(dim).shape
        return matrix.new_zeros(shape), torch.full(shape, -1, device=matrix.device)
    score = matrix.where(matrix > -torch.inf, -torch.inf)
    values = score.amax(dim)
    index = (score == values.unsqueeze(dim)).int().argmax(dim)
    none = values == -torch.inf
    return values.where(~none, 0), index.where(~none, -1)


def check(boxes1: Tensor, boxes2: Tensor, **options: Any) -> None:
    matrix = box_iou(boxes1, boxes2, **options)
    for dim, result in zip((-1, -2), box_iou_max(boxes1, boxes2, dim=(-1, -2), **options), strict=True):
        values, indices = best_of(matrix, dim)
        assert torch.equal(result.values, values)
        assert torch.equal(result.indices, indices)
        alone = box_iou_max(boxes1, boxes2, dim=dim, **options)  # type: ignore[call-overload]
        assert torch.equal(alone.values, values)
        assert torch.equal(alone.indices, indices)


@pytest.mark.parametrize("device", DEVICES)
def test_golden(device: str) -> None:
    boxes1 = torch.tensor([A, (20, 20, 30, 30), (5, 5, 15, 15), (0, 0, 0, 0)], device=device)
    boxes2 = torch.tensor([A, (5, 5, 15, 15), A], device=device)
    rows, cols = box_iou_max(boxes1, boxes2, dim=(-1, -2))
    assert rows.values.tolist() == [1, 0, 1, 0]
    assert rows.indices.tolist() == [0, 0, 1, 0]
    assert cols.values.tolist() == [1, 1, 1]
    assert cols.indices.tolist() == [0, 2, 0]
    swapped = box_iou_max(boxes1, boxes2, dim=(-2, -1))
    assert torch.equal(swapped[0].indices, cols.indices)
    values, indices = box_iou_max(boxes1, boxes2[:0])
    assert values.tolist() == [0] * 4
    assert indices.tolist() == [-1] * 4
    assert indices.dtype == torch.int64


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("mode", "fmt", "eps_mode", "eps"), rules())
def test_equals_maximum_of_matrix(device: str, mode: str, fmt: str, eps_mode: str, eps: float) -> None:
    for dtype in (torch.float32, torch.float64):
        boxes1, boxes2 = random_boxes(2, 71, dtype=dtype).to(device), random_boxes(2, 1057, seed=1, dtype=dtype).to(device)
        check(boxes1, boxes2, mode=mode, fmt=fmt, eps_mode=eps_mode, eps=eps)


@pytest.mark.parametrize(
    "shapes", [((0,), (5,)), ((3,), (0,)), ((0,), (0,)), ((1,), (1,)), ((2, 0, 3), (2, 0, 4)), ((2, 3, 33), (2, 3, 32))]
)
def test_shapes(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    check(random_boxes(*shapes[0]), random_boxes(*shapes[1], seed=1), mode="giou")


def test_threads_and_chunks_agree() -> None:
    boxes1, boxes2 = valid_boxes(3000).round(), valid_boxes(400, seed=1).round()  # many equal values
    threads = torch.get_num_threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        check(boxes1, boxes2)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_never_wins(device: str) -> None:
    good, bad = valid_boxes(4).to(device), torch.full((3, 4), torch.nan, device=device)
    values, indices = box_iou_max(good, torch.cat([bad, good]))
    assert (values == 1).all()
    assert indices.tolist() == [3, 4, 5, 6]
    values, indices = box_iou_max(good, bad)
    assert (values == 0).all()
    assert (indices == -1).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 80))
def test_permutation(seed: int, n: int, m: int) -> None:
    boxes1, boxes2 = valid_boxes(n, seed=seed), valid_boxes(m, seed=seed + 1)
    order = torch.randperm(m)
    plain, shuffled = box_iou_max(boxes1, boxes2, mode="giou"), box_iou_max(boxes1, boxes2[order], mode="giou")
    assert torch.equal(plain.values, shuffled.values)
    assert torch.equal(box_iou(boxes1, boxes2[order], mode="giou").gather(1, shuffled.indices[:, None])[:, 0], plain.values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_ragged_equals_loop(device: str, mode: str) -> None:
    counts1, counts2 = [3, 0, 40, 2, 4], [4, 2, 0, 170, 1]
    boxes1, boxes2 = random_boxes(49).to(device), random_boxes(177, seed=1).to(device)
    offsets1, offsets2 = (torch.tensor([0, *c], device=device).cumsum(0) for c in (counts1, counts2))
    rows, cols = box_iou_max(boxes1, boxes2, dim=(-1, -2), mode=mode, offsets1=offsets1.int(), offsets2=offsets2)
    for b in range(5):
        part1, part2 = slice(offsets1[b], offsets1[b + 1]), slice(offsets2[b], offsets2[b + 1])
        expected = box_iou_max(boxes1[part1], boxes2[part2], dim=(-1, -2), mode=mode)
        for got, wanted, part in ((rows, expected[0], part1), (cols, expected[1], part2)):
            assert torch.equal(got.values[part], wanted.values)
            assert torch.equal(got.indices[part], wanted.indices)


def test_no_gradient_and_dtypes() -> None:
    boxes = valid_boxes(5).requires_grad_()
    values, indices = box_iou_max(boxes, valid_boxes(6, seed=1))
    assert not values.requires_grad
    assert not indices.requires_grad
    assert box_iou_max(boxes.double(), boxes).values.dtype == torch.float64
    assert box_iou_max(boxes.half(), boxes.half()).values.dtype == torch.float32


@pytest.mark.slow
def test_more_pairs_than_32_bits() -> None:
    boxes1, boxes2 = valid_boxes(48000), valid_boxes(45000, seed=1)  # 2.16e9 pairs, 8 GiB if they were stored
    values, indices = box_iou_max(boxes1, boxes2)
    rows = torch.tensor([0, 24000, 47999])
    expected = box_iou_max(boxes1[rows], boxes2)
    assert torch.equal(values[rows], expected.values)
    assert torch.equal(indices[rows], expected.indices)


def test_bad_input() -> None:
    boxes = valid_boxes(3)
    for dim in (0, 1, (-1,), (-1, -1), None):
        with pytest.raises(ValueError, match=r"dim must be -1, -2 or \(-1, -2\), got"):
            box_iou_max(boxes, boxes, dim=dim)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="offsets1 and offsets2 must be given together"):
        box_iou_max(boxes, boxes, offsets1=torch.tensor([0, 3]))
    with pytest.raises(TypeError, match="boxes1 must be a tensor, got list"):
        box_iou_max([], boxes)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"offsets2 must rise from 0 to the number of boxes \(3\), got \[0, 2\]"):
        box_iou_max(boxes, boxes, offsets1=torch.tensor([0, 3]), offsets2=torch.tensor([0, 2]))


def test_opcheck() -> None:
    boxes1, boxes2 = valid_boxes(5), valid_boxes(6, seed=1)
    rule = (1, 0, 0, 0.0)
    op = torch.ops.ssod_fast.box_iou_max.default
    torch.library.opcheck(op, (boxes1, boxes2, None, None, *rule, True, False))
    torch.library.opcheck(op, (boxes1, boxes2, torch.tensor([0, 2, 5]), torch.tensor([0, 6, 6]), *rule, True, True))


def test_compile_and_no_sync() -> None:
    boxes1, boxes2 = valid_boxes(5), valid_boxes(6, seed=1)
    offsets1, offsets2 = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 6])

    def best(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = box_iou_max(x, y, offsets1=offsets1, offsets2=offsets2)
        return values + 1, indices

    with no_sync():
        expected = best(boxes1, boxes2)
    actual = torch.compile(best, fullgraph=True, backend="aot_eager")(boxes1, boxes2)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
