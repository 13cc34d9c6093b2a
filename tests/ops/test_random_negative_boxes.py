from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from bag_cases import COCO_RATIOS, noisy_boxes
from box_cases import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import no_sync
from torch import Tensor

from ssod_fast.ops import box_iou, neighborhood_boxes, random_negative_boxes

UNIFORMS = [(0.0, 0.0, 0.0, 0.0), (0.5, 0.5, 0.5, 0.5), (0.9, 0.1, 0.25, 0.75), (0.2, 0.7, 1.0, 1.0)]
BOXES = [(-100.0, -80.0, -100.0, -80.0), (200.0, 160.0, 400.0, 320.0), (440.0, -32.0, 480.0, 352.0), (20.0, 256.0, 600.0, 480.0)]


def interior_bag(device: str = "cpu") -> Tensor:
    """The bag [1, 125, 4] of one box in an image of 400 x 500."""
    index, hw = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor([[400, 500]], device=device)
    box = torch.tensor([(100.0, 60.0, 180.0, 160.0)], device=device)
    return neighborhood_boxes(box, index, hw, ratios=COCO_RATIOS, shakes=[0.2]).boxes


def uniforms_of(boxes: Tensor, h: float, w: float) -> Tensor:
    """The numbers that give these boxes [N, 4] in an image (h, w)."""
    x1, y1, x2, y2 = boxes.double().unbind(-1)
    u1, u2 = (x1 + 0.2 * w) / (1.2 * w), (y1 + 0.2 * h) / (1.2 * h)
    return torch.stack((u1, u2, (x2 - x1) / (1.2 * w - x1), (y2 - y1) / (1.2 * h - y1)), -1)


@pytest.mark.parametrize("device", DEVICES)
def test_golden(device: str) -> None:
    uniforms, hw = torch.tensor([UNIFORMS], device=device), torch.tensor([[400.0, 500.0]], device=device)
    result = random_negative_boxes(uniforms, hw, interior_bag(device), torch.tensor([0, 1], device=device), return_max=True)
    torch.testing.assert_close(result.boxes[0].cpu(), torch.tensor(BOXES), atol=5e-4, rtol=0)
    assert result.keep.all()
    assert result.max_iou is not None
    torch.testing.assert_close(result.max_iou[0].cpu(), torch.tensor([0, 0.0042, 0, 0]), atol=5e-5, rtol=0)
    given_boxes = torch.tensor([(110, 70, 170, 150), (200, 60, 280, 160), (150, 60, 230, 160)])
    uniforms = uniforms_of(given_boxes, 400, 500)[None].to(device)
    result = random_negative_boxes(uniforms, hw, interior_bag(device), torch.tensor([0, 1], device=device), return_max=True)
    assert result.max_iou is not None
    torch.testing.assert_close(result.max_iou[0].cpu().float(), torch.tensor([0.9375, 0.0748, 0.5182]), atol=5e-5, rtol=0)
    assert result.keep.tolist() == [[False, True, False]]


def problem(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Uniforms [3, 301, 4], image sizes and bags [9, 25, 4], a few of them degenerate or not finite."""
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(3, 301, 4, generator=generator, dtype=torch.float64).to(dtype)
    sizes = [(800.0, 1333.0), (500.0, 400.0), (300.0, 300.0)]
    bags = torch.stack([noisy_boxes(25, sizes[k % 3], seed=seed + k, dtype=dtype) for k in range(9)])
    bags[0, 4, 2] = bags[0, 4, 0] - 5
    bags[1, 5] = bags[1, 5].flip(0)
    bags[2, 6, 2:] = bags[2, 6, :2]
    return uniforms, torch.tensor(sizes, dtype=dtype), bags


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offsets", [(0, 4, 4, 9), (0, 0, 0, 0), (2, 8, 9, 9), (0, 8, 3, 9), (-3, 5, 99, 4)], ids=str)
def test_equals_reference(device: str, dtype: torch.dtype, offsets: tuple[int, ...]) -> None:
    """Bit by bit, with culling of blocks and early exit, also on offsets that are none."""
    uniforms, hw, bags = problem(dtype)
    bags[7, 3] = torch.nan
    uniforms[0, 0, 0] = torch.nan
    tables = [t.to(device) for t in (uniforms, hw, bags, torch.tensor(offsets))]
    reference = importlib.import_module("ssod_fast.ops.random_negative_boxes")._reference
    for threshold in (0.0, 0.05, 0.3, 0.7):
        for return_max in (True, False):
            actual = torch.ops.ssod_fast.random_negative_boxes(*tables, threshold, return_max)
            expected = reference(*tables, threshold, return_max)
            torch.testing.assert_close(actual[0], expected[0], equal_nan=True, atol=0, rtol=0)
            assert torch.equal(actual[1], expected[1])
            torch.testing.assert_close(actual[2], expected[2], atol=0 if device == "cpu" else 1e-6, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_images_whose_size_is_nan(device: str) -> None:
    """Their boxes are below nothing, unless there is nothing."""
    uniforms, hw, bags = problem(torch.float32)
    hw[0, 0], hw[1, 1] = torch.nan, torch.nan
    tables = [t.to(device) for t in (uniforms, hw, bags, torch.tensor((0, 4, 4, 9)))]
    boxes, keep, _ = random_negative_boxes(*tables)
    assert not keep[0].any()
    assert keep[1].all()
    expected = importlib.import_module("ssod_fast.ops.random_negative_boxes")._reference(*tables, 0.3, False)
    torch.testing.assert_close(boxes, expected[0], equal_nan=True, atol=0, rtol=0)
    assert torch.equal(keep, expected[1])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 90), st.floats(0.01, 0.9))
def test_equals_matrix(seed: int, positives: int, threshold: float) -> None:
    """Flags and maxima are those of the matrix that is never stored."""
    uniforms = torch.rand(1, 60, 4, generator=torch.Generator().manual_seed(seed))
    boxes, hw = noisy_boxes(positives, (400, 500), seed=seed), torch.tensor([[400.0, 500.0]])
    result = random_negative_boxes(uniforms, hw, boxes, torch.tensor([0, positives]), threshold=threshold, return_max=True)
    matrix = box_iou(result.boxes[0], boxes, eps_mode="max", eps=1e-6)
    assert result.max_iou is not None
    assert torch.equal(result.max_iou[0], matrix.amax(1))
    assert torch.equal(result.keep[0], (matrix < torch.tensor(threshold, dtype=torch.float32)).all(1))
    assert torch.equal(random_negative_boxes(uniforms, hw, boxes, torch.tensor([0, positives]), threshold=threshold).keep, result.keep)
    low, high = result.boxes[0, :, :2], result.boxes[0, :, 2:]
    size = torch.tensor([500.0, 400.0])
    assert (low >= -0.2 * size).all()
    assert (high >= low).all()
    assert (high <= 1.2 * size + 1e-3).all()


def test_bags_and_images() -> None:
    """Bags are rows of one image; images do not see each other."""
    uniforms, hw, bags = problem(torch.float32)
    offsets = torch.tensor([0, 4, 4, 9])
    whole = random_negative_boxes(uniforms, hw, bags, offsets, return_max=True)
    flat = random_negative_boxes(uniforms, hw, bags.flatten(0, 1), offsets * 25, return_max=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, flat, strict=True))
    assert whole.keep[1].all()
    assert whole.max_iou is not None
    assert (whole.max_iou[1] == 0).all()
    for b in range(3):
        own = bags[offsets[b] : offsets[b + 1]]
        alone = random_negative_boxes(uniforms[b : b + 1], hw[b : b + 1], own, torch.tensor([0, len(own)]), return_max=True)
        assert all(torch.equal(a[0], w[b]) for a, w in zip(alone, whole, strict=True))
    assert random_negative_boxes(uniforms, hw, bags, offsets).max_iou is None


def test_dtypes_layouts_and_empty() -> None:
    uniforms, hw, bags = problem(torch.float32)
    offsets = torch.tensor([0, 4, 4, 9])
    expected = random_negative_boxes(uniforms, hw, bags, offsets)
    views = uniforms.transpose(0, 1).contiguous().transpose(0, 1), hw.int(), bags.repeat(1, 1, 2)[..., 4:], offsets.int()
    assert torch.equal(random_negative_boxes(*views).keep, expected.keep)
    assert random_negative_boxes(uniforms.half(), hw, bags.half(), offsets).boxes.dtype == torch.float32
    assert random_negative_boxes(uniforms, hw, bags.double(), offsets).boxes.dtype == torch.float64
    none = random_negative_boxes(uniforms[:, :0], hw, bags, offsets, return_max=True)
    assert none.boxes.shape == (3, 0, 4)
    assert none.keep.shape == (3, 0)
    assert random_negative_boxes(uniforms[:0], hw[:0], bags[:0], torch.tensor([0])).keep.shape == (0, 301)
    assert random_negative_boxes(uniforms, hw, bags[:0], torch.zeros(4, dtype=torch.int64)).keep.all()


def test_results_are_fully_written(fill_uninitialised: None) -> None:
    uniforms, hw, bags = problem(torch.float32)
    result = random_negative_boxes(uniforms, hw, bags, torch.tensor([0, 4, 4, 9]), return_max=True)
    assert result.boxes.isfinite().all()
    assert result.max_iou is not None
    assert result.max_iou.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"uniforms": torch.rand(5, 4)}, ValueError, r"uniforms must have shape \[B, N, 4\], got \[5, 4\]"),
        ({"positives": torch.rand(5)}, ValueError, r"positives must have shape \[G, P, 4\], got \[5\]"),
        ({"positives": "boxes"}, TypeError, "positives must be a tensor, got str"),
        ({"positives": torch.rand(3, 4, device="meta")}, ValueError, "uniforms and positives must be on one device, got cpu and meta"),
        ({"positives": torch.rand(3, 4).requires_grad_()}, ValueError, "random_negative_boxes carries no gradient"),
        ({"image_hw": torch.ones(3, 2)}, ValueError, r"image_hw must have shape \[2, 2\] as uniforms has that many images, got \[3, 2\]"),
        ({"offsets": torch.tensor([0, 3])}, ValueError, r"offsets must have shape \[3\], got \[2\]"),
        ({"offsets": torch.tensor([0, 3, 4])}, ValueError, r"offsets must rise from 0 to the number of rows \(3\), got \[0, 3, 4\]"),
        ({"offsets": torch.tensor([0.0, 1, 3])}, TypeError, r"offsets must be int32 or int64, got torch\.float32"),
        ({"threshold": 1.5}, ValueError, r"threshold must lie in \[0, 1\), got 1.5"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"uniforms": torch.rand(2, 5, 4), "image_hw": torch.ones(2, 2), "positives": torch.rand(3, 4)}
    with pytest.raises(error, match=message):
        random_negative_boxes(**(arguments | {"offsets": torch.tensor([0, 1, 3])} | change))


def test_opcheck() -> None:
    uniforms, hw, bags = problem(torch.float32)
    for return_max in (True, False):
        arguments = (uniforms, hw, bags, torch.tensor([0, 4, 4, 9]), 0.3, return_max)
        torch.library.opcheck(torch.ops.ssod_fast.random_negative_boxes.default, arguments)


def test_compile_and_no_sync() -> None:
    def negatives(uniforms: Tensor, hw: Tensor, bags: Tensor, offsets: Tensor) -> Tensor:
        return ~random_negative_boxes(uniforms, hw, bags, offsets).keep

    arguments = (*problem(torch.float32), torch.tensor([0, 4, 4, 9]))
    with no_sync():
        expected = negatives(*arguments)
    assert torch.equal(torch.compile(negatives, fullgraph=True, backend="aot_eager")(*arguments), expected)


@pytest.mark.gpu
def test_graph_capture() -> None:
    arguments = [t.cuda() for t in (*problem(torch.float32), torch.tensor([0, 4, 4, 9]))]
    expected = random_negative_boxes(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = random_negative_boxes(*arguments)
    graph.replay()
    assert torch.equal(captured.keep, expected.keep)
