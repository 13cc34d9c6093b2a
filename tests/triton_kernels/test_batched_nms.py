"""The Triton kernel of class-aware suppression against the reference and torchvision."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms
from triton_samples import DEVICE, nasty_boxes, real_boxes

from ssod_fast.kernels import batched_nms as kernels

reference = importlib.import_module("ssod_fast.ops.batched_nms")


def compare(
    boxes: Tensor, scores: Tensor, labels: Tensor, counts: Tensor | None, iou: float, score: float, keep: int
) -> tuple[Tensor, Tensor]:
    arguments = (boxes, scores, labels, counts, iou, score, keep)
    result = kernels.batched_nms(*arguments)
    for got, wanted in zip(result, reference._reference(*arguments), strict=True):
        assert torch.equal(got, wanted)
    return result


def predictions(batch: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores full of ties, with NaN and infinities, and labels of three classes."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (batch, n), generator=generator) / 6
    scores[:, 1::17], scores[:, 2::19], scores[:, 3::23] = math.nan, math.inf, -math.inf
    return scores.to(DEVICE), torch.randint(0, 3, (batch, n), generator=generator).to(DEVICE)


def test_golden() -> None:
    corners = [(0, 0, 10, 10), (0, 0, 10, 8), (20, 20, 30, 30), (0, 0, 10, 9), (0, 0, 10, 5)]
    boxes = torch.tensor([corners], dtype=torch.float32, device=DEVICE)
    scores = torch.tensor([[0.8, 0.9, 0.1, 0.9, 0.7]], device=DEVICE)
    labels = torch.tensor([[0, 0, 0, 1, 0]], device=DEVICE)
    index, count = compare(boxes, scores, labels, None, 0.5, 0.0, 5)
    assert index.tolist() == [[1, 3, 2, -1, -1]]
    assert count.tolist() == [3]
    assert compare(boxes, scores, labels, None, 0.625, 0.0, 5)[0].tolist() == [[1, 3, 4, 2, -1]]  # 50 / 80 is not above it
    assert compare(boxes, scores, labels, torch.tensor([3], device=DEVICE), 0.5, 0.1, 2)[0].tolist() == [[1, -1]]


@pytest.mark.parametrize("n", [1, 9, 60])
def test_equal_to_the_reference(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_BLOCK", 16)
    scores, labels = predictions(2, n)
    for boxes in (nasty_boxes(2, n), nasty_boxes(2, n, dtype=torch.float64)):
        compare(boxes, scores.to(boxes.dtype), labels, None, 0.3, 0.1, n)
    compare(nasty_boxes(2, n, seed=1), scores, labels, torch.tensor([n // 2, n], device=DEVICE), 0.5, -math.inf, 5)


def test_equal_to_torchvision() -> None:
    boxes, (scores, labels) = real_boxes(1, 60), predictions(1, 60, seed=1)
    index, count = compare(boxes, scores.nan_to_num(), torch.zeros_like(labels), None, 0.4, -math.inf, 60)
    assert index[0, : int(count)].tolist() == nms(boxes[0], scores[0].nan_to_num(), 0.4).tolist()


@pytest.mark.parametrize(("batch", "n", "keep"), [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_empty(batch: int, n: int, keep: int) -> None:
    scores, labels = predictions(batch, n)
    index, count = compare(real_boxes(batch, n), scores, labels, None, 0.5, 0.0, keep)
    assert index.shape == (batch, min(n, keep))
    assert count.tolist() == [0] * batch


@pytest.mark.gpu
def test_many_in_a_graph() -> None:
    boxes, (scores, labels) = real_boxes(8, 3000), predictions(8, 3000)
    arguments = (labels, None, 0.5, 0.05, 300)
    compare(boxes, scores, *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        index, _ = kernels.batched_nms(boxes, scores, *arguments)
    boxes.copy_(boxes.flip(1))
    graph.replay()
    assert torch.equal(index, reference._reference(boxes, scores, *arguments)[0])
