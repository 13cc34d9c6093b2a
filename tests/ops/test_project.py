"""Pseudo boxes from one view to another."""

from __future__ import annotations

import math

import pytest
import torch
from no_sync import no_sync
from torch import Tensor

from ssod_fast.ops.project import drop_small, invert_homographies, project_boxes, warp_boxes
from ssod_fast.structures import PaddedTargets, Target

EYE = torch.eye(3, dtype=torch.float64)[None]


def padded(boxes: list[list[float]], nmax: int | None = None) -> PaddedTargets:
    target = Target(boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), labels=torch.arange(len(boxes)))
    return PaddedTargets.from_list([target], nmax=nmax)


def rotation(degrees: float) -> Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[[c, -s, 0], [s, c, 0], [0, 0, 1]]], dtype=torch.float64)


def test_scale_and_mirror() -> None:
    matrix = torch.tensor([[[-0.5, 0, 320], [0, 0.5, 0], [0, 0, 1]]], dtype=torch.float64)
    moved = warp_boxes(padded([[100, 40, 300, 200]]), matrix, [(240, 320)])
    assert moved.boxes.tolist() == [[[170, 20, 270, 100]]]


def test_rotation_takes_the_hull() -> None:
    moved = warp_boxes(padded([[100, 0, 200, 100]]), rotation(30), [(400, 400)])
    torch.testing.assert_close(moved.boxes[0, 0], torch.tensor([36.60254, 50.0, 173.20508, 186.60254]))


def test_perspective_divides() -> None:
    matrix = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 2]]], dtype=torch.float64)
    moved = warp_boxes(padded([[10, 20, 30, 40]]), matrix, [(100, 100)])
    assert moved.boxes.tolist() == [[[5, 10, 15, 20]]]


def test_clips_to_the_original_before_the_strong_view() -> None:
    # The box leaves the original image by 20 pixels; a strong view that shows more must not bring them back.
    shift = torch.tensor([[[1.0, 0, 50], [0, 1, 0], [0, 0, 1]]], dtype=torch.float64)
    result = project_boxes(padded([[-20, 0, 30, 30]]), EYE, [(40, 40)], shift, [(40, 200)])
    assert result.boxes[0, 0].tolist() == [50, 0, 80, 30]


def test_small_boxes_go_and_the_rest_closes_up() -> None:
    boxes = [[0, 0, 10, 10], [50, 5, 60, 15], [5, 5, 5.0099, 9], [2, 2, 8, 8]]
    result = project_boxes(padded(boxes, nmax=6), EYE, [(40, 40)], EYE, [(40, 40)])
    assert result.count.tolist() == [2]  # the second lies outside, the third is not wider than 0.01
    assert result.labels.tolist() == [[0, 3, -1, -1, -1, -1]]
    assert result.boxes[0, 2:].abs().sum() == 0
    assert drop_small(padded(boxes), None).count.tolist() == [4]


def test_random_matrices_equal_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(3, 5, 2, generator=generator) * 300
    boxes = torch.cat([corner, corner + 1 + torch.rand(3, 5, 2, generator=generator) * 80], dim=-1)
    targets = PaddedTargets.from_list([Target(boxes=b, labels=torch.zeros(5, dtype=torch.int64)) for b in boxes])
    matrix = torch.eye(3, dtype=torch.float64) + 0.2 * torch.rand(3, 3, 3, generator=generator, dtype=torch.float64)
    matrix[:, 2] = torch.tensor([1e-4, 2e-4, 1.0])
    moved = warp_boxes(targets, matrix, [(10_000, 10_000)] * 3)
    x, y = boxes.double()[..., [0, 2, 2, 0]], boxes.double()[..., [1, 1, 3, 3]]
    points = torch.stack([x, y, torch.ones_like(x)], dim=-1) @ matrix[:, None].mT
    points = points[..., :2] / points[..., 2:]
    expected = torch.cat([points.amin(2), points.amax(2)], dim=-1)
    torch.testing.assert_close(moved.boxes.double(), expected, rtol=1e-5, atol=1e-3)


def test_there_and_back_again() -> None:
    matrix = torch.tensor([[[1.5, 0, 3], [0, 1.5, 4], [0, 0, 1]]], dtype=torch.float64)
    there = warp_boxes(padded([[10, 20, 30, 40]]), matrix, [(400, 400)])
    back = warp_boxes(there, invert_homographies(matrix), [(400, 400)])
    torch.testing.assert_close(back.boxes[0, 0], torch.tensor([10.0, 20, 30, 40]))


def test_non_finite_boxes_are_dropped_not_clipped() -> None:
    boxes = [[0, 0, float("inf"), 10], [float("nan"), 0, 5, 5], [1, 1, 9, 9]]
    result = project_boxes(padded(boxes), EYE, [(40, 40)], EYE, [(40, 40)])
    assert result.count.tolist() == [1]
    assert result.labels[0, 0] == 2
    assert torch.isfinite(result.boxes).all()


def test_a_corner_at_infinity_is_dropped() -> None:
    matrix = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [-0.1, 0, 1]]], dtype=torch.float64)  # w = 0 at x = 10
    assert warp_boxes(padded([[0, 0, 10, 10], [0, 0, 5, 5]]), matrix, [(40, 40)]).count.tolist() == [1]


def test_no_boxes() -> None:
    result = project_boxes(PaddedTargets.empty(2, 3), EYE.repeat(2, 1, 1), [(4, 4)] * 2, EYE.repeat(2, 1, 1), [(4, 4)] * 2)
    assert result.count.tolist() == [0, 0]
    assert project_boxes(PaddedTargets.empty(1, 0), EYE, [(4, 4)], EYE, [(4, 4)]).nmax == 0


def test_does_not_wait_for_the_device() -> None:
    targets, device = padded([[1, 2, 30, 40]]), "cuda" if torch.cuda.is_available() else "cpu"
    targets = targets.to(device)
    with no_sync():
        project_boxes(targets, EYE, [(50, 50)], EYE, [(50, 50)])


def test_autocast_does_not_touch_coordinates() -> None:
    targets = padded([[1001.25, 2, 1303.5, 40]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moved = warp_boxes(targets, EYE, [(2000, 2000)])
    assert torch.equal(moved.boxes, targets.boxes)


def test_bad_input() -> None:
    targets = padded([[1, 2, 3, 4]])
    singular = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    singular[1, 2] = 0
    with pytest.raises(ValueError, match="homography of image 1 must be invertible"):
        invert_homographies(singular)
    with pytest.raises(ValueError, match="homography of image 0 must be invertible"):
        invert_homographies(torch.full((1, 3, 3), float("nan")))
    with pytest.raises(ValueError, match=r"must be \[B, 3, 3\]"):
        warp_boxes(targets, torch.eye(3), [(4, 4)])
    with pytest.raises(ValueError, match="must agree, got 1, 1 and 2 images"):
        warp_boxes(targets, EYE, [(4, 4), (4, 4)])
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="homography of image 0 must be finite, got"):
            project_boxes(targets, EYE, [(4, 4)], torch.full((1, 3, 3), value), [(4, 4)])
    with pytest.raises(TypeError, match="must stay on the CPU"):
        invert_homographies(torch.empty(1, 3, 3, device="meta"))
