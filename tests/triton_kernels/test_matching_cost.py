"""The Triton kernel of the matching cost against the reference, see test_box_iou.py."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_samples import DEVICE

from ssod_fast.kernels import matching_cost as kernels

reference = importlib.import_module("ssod_fast.ops.matching_cost")
MODES: dict[str, int] = reference.CLASS_MODES
LAYERS, BATCH, QUERIES, CLASSES = 2, 3, 19, 7  # queries over more than one block of 16
RAGGED = torch.tensor([0, 3, 3, 7])  # an image without targets, and two rows of no image
PADDED = torch.tensor([2, 0, 3])


def options(mode: str, *, gamma: float = 2.0, eps: float = 1e-8, fmt: int = 2, eps_mode: int = 0) -> tuple[Any, ...]:
    """What follows `batch` in the schema."""
    return (MODES[mode], 0.3, gamma, eps, 2.0, 5.0, 1.7, fmt, eps_mode, 1e-6, True)


def inputs(dtype: torch.dtype, half: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Logits, boxes, labels and target boxes of 9 rows, with NaN predictions, points, and labels out of range."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LAYERS, BATCH, QUERIES, CLASSES, generator=generator, dtype=torch.float64) * 3
    boxes = torch.rand(LAYERS, BATCH, QUERIES, 4, generator=generator, dtype=torch.float64)
    targets = torch.rand(9, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (9,), generator=generator)
    labels[1], labels[4], boxes[1, 2, 3, 0], boxes[0, 0, 0] = -1, CLASSES, math.nan, targets[0]
    boxes[0, 2, 1, 2:], targets[5, 2:] = 0, 0
    logits[0, 0, 5] = torch.tensor([80, -80, math.inf, -math.inf, math.nan, 0, 12])
    return logits.to(half or dtype).to(DEVICE), boxes.to(DEVICE, dtype), labels.to(DEVICE), targets.to(DEVICE, dtype)


def compare(*arguments: Any, atol: float | None = None) -> Tensor:
    """The cost, equal to the reference up to the rounding of exponentials and logarithms; keys are those of the cost itself."""
    arguments = tuple(a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments)
    cost, keys = kernels.matching_cost(*arguments)
    wanted, _ = reference._reference(*arguments)
    assert cost.dtype == wanted.dtype
    tolerance = 1e-12 if cost.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(cost, wanted, atol=tolerance if atol is None else atol, rtol=tolerance / 10, equal_nan=True)
    assert torch.equal(keys, reference.row_keys(cost))
    return cost


def test_golden() -> None:
    boxes = torch.tensor([[[[0.3, 0.3, 0.4, 0.4], [0.35, 0.3, 0.4, 0.4], [0.7, 0.7, 0.2, 0.2]]]])
    logits = torch.tensor([[[[0.5, 0.5], [0.9, 0.1], [0.1, 0.9]]]]).logit()
    targets = torch.tensor([[0.3, 0.3, 0.4, 0.4], [0.7, 0.7, 0.2, 0.2]])
    arguments = tuple(t.to(DEVICE) for t in (logits, boxes, torch.tensor([0, 1]), targets))
    rest = (None, None, None, None, 1, MODES["focal"], 0.25, 2.0, 1e-8, 2.0, 5.0, 2.0, 2, 0, 0.0)
    cost, keys = kernels.matching_cost(*arguments, *rest, True)
    expected = [[[-2.173287, -4.102670, 8.114640], [7.010387, 7.801846, -4.797114]]]
    torch.testing.assert_close(cost.cpu(), torch.tensor(expected), atol=5e-6, rtol=0)
    assert (keys & 0xFFFFFFFF).tolist() == [[1, 2]]
    assert kernels.matching_cost(*arguments, *rest, False)[1].shape == (0,)


@pytest.mark.parametrize("mode", MODES)
def test_equal_to_the_reference(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_BLOCK", 16)
    logits, boxes, labels, targets = inputs(torch.float32)
    hw, extra = torch.tensor([[2.0, 3], [4, 5], [1, 2]]), torch.rand(LAYERS, 9, QUERIES, generator=torch.Generator().manual_seed(1))
    ragged = compare(logits, boxes, labels, targets, RAGGED, None, hw, extra, BATCH, *options(mode, fmt=0, eps_mode=2))
    assert (ragged[:, 7:] == math.inf).all()
    padded = compare(logits, boxes, labels, targets, None, PADDED, None, None, BATCH, *options(mode))
    assert (padded[:, 2:6] == math.inf).all()
    if mode != "none":
        assert padded[:, 1].isnan().all()  # its label is -1


@pytest.mark.parametrize("mode", ["focal", "focal_logits", "softmax"])
def test_float64(mode: str) -> None:
    compare(*inputs(torch.float64), None, PADDED, None, None, BATCH, *options(mode))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5])
def test_other_exponents(gamma: float) -> None:
    logits, boxes, labels, targets = inputs(torch.float32)
    compare(logits, boxes, labels, targets, RAGGED, None, None, None, BATCH, *options("focal", gamma=gamma, eps=1e-12, fmt=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    compare(*inputs(torch.float32, dtype), RAGGED, None, None, None, BATCH, *options("focal"))


def test_strided_predictions_are_read_in_place() -> None:
    logits, boxes, labels, targets = inputs(torch.float32)
    rest = (labels, targets, RAGGED, None, None, None, BATCH, *options("focal"))
    expected = compare(logits, boxes, *rest)
    wide, turned = torch.cat((logits, logits), -1)[..., :CLASSES], boxes.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(compare(wide, turned, *rest).nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize(("batch", "queries", "rows"), [(1, 0, 2), (1, 3, 0), (0, 3, 0), (1, 0, 0)])
def test_empty(batch: int, queries: int, rows: int) -> None:
    logits, boxes = torch.zeros(1, batch, queries, 4, device=DEVICE), torch.zeros(1, batch, queries, 4, device=DEVICE)
    labels, offsets = torch.zeros(rows, dtype=torch.int64, device=DEVICE), torch.zeros(batch + 1, dtype=torch.int64, device=DEVICE)
    arguments = (logits, boxes, labels, boxes.new_zeros(rows, 4), offsets, None, None, None, batch, *options("focal"))
    cost, keys = kernels.matching_cost(*arguments)
    assert cost.shape == (1, rows, queries)
    assert torch.equal(keys, reference._reference(*arguments)[1])


def test_keys_of_zeros() -> None:
    boxes, labels = torch.rand(1, 1, 4, 4, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    logits = torch.tensor([1.0, 0.0, -0.0, 2.0], device=DEVICE).view(1, 1, 4, 1)  # cost -x
    rest = (labels, boxes[0, 0, :1], None, None, None, None, 1, MODES["prob"], 0.25, 2.0, 1e-8, -1.0, 0.0, 0.0, 2, 0, 0.0, True)
    cost, keys = kernels.matching_cost(logits, boxes, *rest)
    assert cost.tolist() == [[[1, 0, 0, 2]]]
    assert keys.tolist() == [[1]]  # -0 and +0 are equal, and the first of them wins
    logits[..., 3, :] = math.nan
    assert kernels.matching_cost(logits, boxes, *rest)[1].tolist() == [[reference.UNKNOWN_KEY]]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_many_in_a_graph(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(7, 4, 900, 80, generator=generator).to(DEVICE), torch.rand(7, 4, 900, 4, generator=generator).to(DEVICE)
    labels, targets = torch.randint(0, 80, (100,), generator=generator).to(DEVICE), torch.rand(100, 4, generator=generator).to(DEVICE)
    offsets = torch.tensor([0, 40, 40, 90, 100], device=DEVICE)
    arguments = (logits, boxes, labels, targets, offsets, None, None, None, 4, *options(mode))
    compare(*arguments, atol=2e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cost, _ = kernels.matching_cost(*arguments)
    offsets.copy_(torch.tensor([0, 10, 20, 30, 99]))
    graph.replay()
    torch.testing.assert_close(cost, reference._reference(*arguments)[0], atol=2e-5, rtol=1e-6)
