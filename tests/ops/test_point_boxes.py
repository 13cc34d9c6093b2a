from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from bag_cases import POINT_RATIOS, POINT_SCALES, share_inside
from box_cases import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import no_sync
from tolerances import assert_close
from torch import Tensor

from ssod_fast.ops import point_boxes
from ssod_fast.ops.point_boxes import CUTS

COARSE: dict[str, Any] = {"scales": POINT_SCALES, "ratios": POINT_RATIOS}
FIRST = {0: (97.3333, 26, 102.6667, 74), 3: (92, 42, 108, 58), 6: (76, 47.3333, 124, 52.6667), 24: (36, 0, 164, 100), 41: (0, 0, 200, 100)}
SECOND = {0: (0.3333, 276, 5.6667, 324), 3: (0, 292, 6, 308), 38: (0, 200, 6, 400)}


@pytest.mark.parametrize("device", DEVICES)
def test_golden(device: str) -> None:
    points = torch.tensor([(100.0, 50.0), (3.0, 300.0)], device=device)
    image, hw = torch.zeros(2, dtype=torch.int64, device=device), torch.tensor([(400.0, 500.0)], device=device)
    boxes, valid = point_boxes(points, image, hw, **COARSE)
    assert boxes.shape == (2, 42, 4)
    assert valid.all()
    for row, expected in zip(boxes.cpu(), (FIRST, SECOND), strict=True):
        torch.testing.assert_close(row[list(expected)], torch.tensor([*expected.values()], dtype=torch.float32), atol=5e-4, rtol=0)
    torch.testing.assert_close(boxes.sum((1, 2)).cpu(), torch.tensor([12600.0, 25452.0]), atol=0.02, rtol=0)


def literal(point: tuple[float, float], hw: tuple[float, float], cut: str) -> list[tuple[list[float], bool]]:
    """Boxes of one point and their flags, one after the other."""
    (x, y), (image_h, image_w) = point, hw
    result = []
    for scale in POINT_SCALES:
        for ratio in POINT_RATIOS:
            w, h = scale * min(hw) / 100 * ratio, scale * min(hw) / 100 / ratio
            if cut == "symmetry":
                w, h = min(w, 2 * x, 2 * (image_w - x)), min(h, 2 * y, 2 * (image_h - y))
            box = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
            valid = cut != "ignore" or share_inside(box, hw) > 0.7
            if cut == "clamp":
                box = [min(max(v, 0.0), limit) for v, limit in zip(box, (image_w, image_h) * 2, strict=True)]
            result.append((box, valid))
    return result


@settings(max_examples=30, deadline=None)
@given(st.floats(1, 499), st.floats(1, 399), st.sampled_from(["symmetry", "clamp", "ignore"]))
def test_literal_sampler(x: float, y: float, cut: Any) -> None:
    image, hw = torch.zeros(1, dtype=torch.int64), torch.tensor([(400.0, 500.0)])
    boxes, valid = point_boxes(torch.tensor([(x, y)], dtype=torch.float64), image, hw, **COARSE, cut=cut)
    expected = literal((x, y), (400.0, 500.0), cut)
    torch.testing.assert_close(boxes[0], torch.tensor([box for box, _ in expected], dtype=torch.float64), atol=1e-9, rtol=0)
    clear = torch.tensor([cut != "ignore" or abs(share_inside(box, (400.0, 500.0)) - 0.7) > 1e-6 for box, _ in expected])
    assert torch.equal(valid[0][clear], torch.tensor([flag for _, flag in expected])[clear])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cut", range(3))
def test_matches_reference(device: str, dtype: torch.dtype, cut: int) -> None:
    points = (torch.rand(23, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 600 - 50).to(dtype).to(device)
    points[3, 0], points[4, 1] = torch.nan, torch.inf
    hw, owner = torch.tensor([[400, 500], [300, 200]], dtype=dtype, device=device), torch.arange(23, device=device) % 4 - 1
    for image, offsets in ((owner, None), (None, torch.tensor([1, 1, 20], device=device))):
        arguments = (points, image, offsets, hw, [*POINT_SCALES], [*POINT_RATIOS], cut, 0.7)
        reference = importlib.import_module("ssod_fast.ops.point_boxes")._reference(*arguments)
        for actual, expected in zip(torch.ops.ssod_fast.point_boxes(*arguments), reference, strict=True):
            assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cut", CUTS)
def test_images_whose_size_is_not_finite(device: str, dtype: torch.dtype, cut: Any) -> None:
    """No box of an image of NaN size is valid, whichever side it is."""
    points = torch.tensor([(100.0, 50.0), (3.0, 300.0)], dtype=dtype, device=device).repeat(4, 1)
    sizes = [(torch.nan, 500.0), (400.0, torch.nan), (torch.nan, torch.nan), (torch.inf, 500.0)]
    hw, owner = torch.tensor(sizes, dtype=dtype, device=device), torch.arange(8, device=device) // 2
    boxes, valid = point_boxes(points, owner, hw, **COARSE, cut=cut)
    assert boxes[:6].isnan().all()
    assert not valid[:6].any()
    assert valid[6:].any()
    arguments = (points, owner, None, hw, [*POINT_SCALES], [*POINT_RATIOS], CUTS[cut], 0.7)
    reference = importlib.import_module("ssod_fast.ops.point_boxes")._reference(*arguments)
    assert_close(boxes, reference[0], equal_nan=True)
    assert torch.equal(valid, reference[1])


def test_points_without_room() -> None:
    """Points outside their image and not finite points: no box is valid, none is inverted."""
    points = torch.tensor([(-5.0, 50.0), (100.0, 50.0), (torch.nan, 50.0)])
    boxes, valid = point_boxes(points, torch.zeros(3, dtype=torch.int64), torch.tensor([[400, 500]]), **COARSE)
    assert valid.all(1).tolist() == [False, True, False]
    assert not valid[[0, 2]].any()
    assert (boxes[:2, :, 2:] >= boxes[:2, :, :2]).all()
    assert boxes[2].isnan().all()


def test_dtypes_layouts_and_empty() -> None:
    points, image, hw = torch.rand(5, 2) * 300, torch.zeros(5, dtype=torch.int32), torch.tensor([[400, 500]])
    expected = point_boxes(points, image, hw, **COARSE).boxes
    assert torch.equal(point_boxes(torch.cat((points, points), 1)[:, :2], image, hw, **COARSE).boxes, expected)
    assert torch.equal(point_boxes(points.T.contiguous().T, None, hw, offsets=torch.tensor([0, 5]), **COARSE).boxes, expected)
    assert point_boxes(points.half(), image, hw, **COARSE).boxes.dtype == torch.float32
    assert point_boxes(points[:0], image[:0], hw, **COARSE).boxes.shape == (0, 42, 4)
    many = point_boxes(points.double(), image, hw, scales=POINT_SCALES * 5, ratios=POINT_RATIOS)  # more boxes than a tile holds
    assert torch.equal(many.boxes[:, :42], many.boxes[:, -42:])


def test_results_are_fully_written(fill_uninitialised: None) -> None:
    boxes, _ = point_boxes(torch.rand(5, 2) * 300, torch.zeros(5, dtype=torch.int64), torch.tensor([[400, 500]]), **COARSE)
    assert boxes.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"points": torch.zeros(2, 4)}, ValueError, r"points must have shape \[G, 2\], got \[2, 4\]"),
        ({"points": torch.zeros(2, 2).requires_grad_()}, ValueError, "point_boxes carries no gradient"),
        ({"image_index": torch.tensor([0, 3])}, ValueError, r"image_index must lie in 0\.\.0 for 1 images, got 3"),
        ({"scales": []}, ValueError, "scales must not be empty"),
        ({"ratios": [-1.0]}, ValueError, "ratios must be finite and > 0, got"),
        ({"cut": "crop"}, ValueError, "cut must be one of 'symmetry', 'clamp', 'ignore', got 'crop'"),
        ({"iof_threshold": -0.1}, ValueError, r"iof_threshold must lie in \[0, 1\), got -0.1"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"points": torch.zeros(2, 2), "image_index": torch.tensor([0, 0]), "image_hw": torch.tensor([[400, 500]]), **COARSE}
    with pytest.raises(error, match=message):
        point_boxes(**(arguments | change))


def test_opcheck() -> None:
    hw, index = torch.tensor([[400.0, 500.0]]), torch.zeros(3, dtype=torch.int64)
    for cut in range(3):
        torch.library.opcheck(
            torch.ops.ssod_fast.point_boxes.default, (torch.rand(3, 2), index, None, hw, [4.0, 8.0], [0.5, 1.0, 2.0], cut, 0.7)
        )


def test_compile_and_no_sync() -> None:
    def bags(points: Tensor, offsets: Tensor, hw: Tensor) -> Tensor:
        return point_boxes(points, None, hw, offsets=offsets, **COARSE).boxes * 2

    points, offsets, hw = torch.rand(4, 2) * 300, torch.tensor([0, 1, 4]), torch.tensor([[400.0, 500.0]] * 2)
    with no_sync():
        expected = bags(points, offsets, hw)
    assert torch.equal(torch.compile(bags, fullgraph=True, backend="aot_eager")(points, offsets, hw), expected)


@pytest.mark.gpu
def test_graph_capture() -> None:
    points, image, hw = torch.rand(4, 2).cuda() * 300, torch.zeros(4, dtype=torch.int64).cuda(), torch.tensor([[400.0, 500.0]]).cuda()
    expected = point_boxes(points, image, hw, **COARSE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = point_boxes(points, image, hw, **COARSE)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
