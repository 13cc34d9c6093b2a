"""Pseudo boxes from decoder outputs, against loops over images and classes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from no_sync import no_sync
from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image, nms

from ssod_fast.methods.semi_detr import CostMiner, Detections, certain, normalised, project_rows, reliable, teacher_detections
from ssod_fast.structures import PaddedTargets, Target

SIZES = [(240, 320), (100, 150)]
IMAGE_HW = torch.tensor(SIZES, dtype=torch.float32)


def outputs(queries: int, classes: int, *, seed: int = 0, shift: float = -3.0) -> tuple[Tensor, Tensor]:
    """Logits [2, Q, C] and boxes [2, Q, 4] that overlap a lot and reach beyond the image."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randint(1, 5, (2, queries, 2), generator=generator) / 5 + 0.02 * torch.randn(2, queries, 2, generator=generator)
    size = 0.3 + 0.05 * torch.rand(2, queries, 2, generator=generator)
    return torch.randn(2, queries, classes, generator=generator) * 2 + shift, torch.cat([centre, size], -1)


def literal_detections(logits: Tensor, boxes: Tensor, hw: tuple[int, int], topk: int = 300) -> Target:
    """One image, class by class."""
    extent = torch.tensor([hw[1], hw[0], hw[1], hw[0]])
    corners = clip_boxes_to_image(box_convert(boxes, "cxcywh", "xyxy") * extent, hw)
    found = []
    for label, scores in enumerate(logits.sigmoid().unbind(1)):
        chosen = (scores > 0.01).nonzero()[:, 0]
        kept = chosen[nms(corners[chosen], scores[chosen], 0.6)]
        found += [(scores[query].item(), label, corners[query]) for query in kept.tolist()]
    found = sorted(found, key=lambda one: -one[0])[:topk]
    return Target(
        boxes=torch.stack([box for *_, box in found]) if found else torch.zeros(0, 4),
        labels=torch.tensor([label for _, label, _ in found], dtype=torch.int64),
        scores=torch.tensor([score for score, *_ in found]),
    )


def assert_same(found: Detections, logits: Tensor, boxes: Tensor, topk: int = 300) -> None:
    for image, ours in enumerate(found.targets.to_list()):
        literal = literal_detections(logits[image], boxes[image], SIZES[image], topk)
        assert torch.equal(ours["labels"], literal["labels"])
        torch.testing.assert_close(ours["scores"], literal["scores"], rtol=0, atol=1e-7)
        torch.testing.assert_close(ours["boxes"], literal["boxes"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("queries", "classes"), [(60, 5), (300, 20), (5, 1)])
def test_detections_equal_loop(queries: int, classes: int, seed: int) -> None:
    logits, boxes = outputs(queries, classes, seed=seed)
    found = teacher_detections(logits, boxes, IMAGE_HW)
    assert_same(found, logits, boxes)
    assert found.non_finite.item() == 0
    assert (found.targets.weights == found.targets.valid).all()
    assert not found.truncated.any()


def test_few_candidates_are_exact_where_enough_boxes_remain() -> None:
    logits, boxes = outputs(300, 20)
    found = teacher_detections(logits, boxes, IMAGE_HW, topk=20, candidates=400)
    assert ((logits.sigmoid() > 0.01).flatten(1).sum(1) > 400).all()
    assert found.targets.count.tolist() == [20, 20]
    assert not found.truncated.any()
    assert_same(found, logits, boxes, topk=20)


def test_truncation_is_told_per_image() -> None:
    logits, boxes = outputs(60, 5, shift=-2.0)
    boxes[0] = boxes[0, :1]  # suppression leaves one box per class here
    found = teacher_detections(logits, boxes, IMAGE_HW, topk=20, candidates=100)
    assert found.truncated.tolist() == [True, False]
    logits[0] = -20.0
    assert not teacher_detections(logits, boxes, IMAGE_HW, topk=20, candidates=100).truncated.any()


def test_nothing_above_the_threshold() -> None:
    logits, boxes = outputs(20, 3, shift=-50.0)
    found = teacher_detections(logits, boxes, IMAGE_HW)
    assert found.targets.count.tolist() == [0, 0]
    assert reliable(found.targets).count.tolist() == [0, 0]


def test_threshold_is_strict() -> None:
    logits = torch.logit(torch.tensor([0.5, 0.4], dtype=torch.float64))[None, :, None]
    boxes = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]]], dtype=torch.float64)
    thr = logits.sigmoid()[0, 1, 0].item()
    found = teacher_detections(logits, boxes, IMAGE_HW[:1], score_thr=thr)
    assert found.targets.count.tolist() == [1]
    assert found.targets.boxes.dtype == torch.float64


def test_non_finite_outputs_are_dropped_and_counted() -> None:
    logits, boxes = outputs(30, 4)
    clean = teacher_detections(logits[:, 3:], boxes[:, 3:], IMAGE_HW)
    logits[:, 0, 1], boxes[:, 1, 2], boxes[0, 2, 0] = math.nan, math.inf, math.nan
    logits[1, 2] = -50.0
    found = teacher_detections(logits, boxes, IMAGE_HW)
    assert found.non_finite.item() == 5
    assert torch.equal(found.targets.count, clean.targets.count)
    rows = int(clean.targets.count.max())
    torch.testing.assert_close(found.targets.boxes[:, :rows], clean.targets.boxes[:, :rows])
    all_bad = teacher_detections(torch.full_like(logits, math.nan), boxes, IMAGE_HW)
    assert all_bad.targets.count.tolist() == [0, 0]
    assert all_bad.targets.boxes.isfinite().all()


def test_one_detection_is_not_reliable() -> None:
    logits = torch.full((1, 4, 2), -50.0)
    logits[0, 2, 1] = 3.0
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(1, 4, 4)
    found = teacher_detections(logits, boxes, IMAGE_HW[:1])
    assert found.targets.count.tolist() == [1]
    assert reliable(found.targets).count.tolist() == [0]


def targets_of(boxes: list[list[float]], scores: list[float], rows: int | None = None) -> PaddedTargets:
    own = Target(boxes=torch.tensor(boxes), labels=torch.arange(len(boxes)), scores=torch.tensor(scores))
    return PaddedTargets.from_list([own], nmax=rows)


def test_reliable_boxes_reach_mean_and_deviation_and_have_an_area() -> None:
    boxes = [[0.0, 0, 10, 10], [5, 5, 5, 30], [0, 0, 20, 20], [1, 1, 2, 2], [1, 1, 3, 3], [4, 4, 9, 9]]
    kept = reliable(targets_of(boxes, [0.9, 0.89, 0.3, 0.1, 0.05, 0.02], rows=9))  # the threshold is 0.79
    assert kept.labels[0, : kept.count.item()].tolist() == [0]  # of the two above it, the second has no width
    assert kept.nmax == 9


def view_matrices() -> tuple[Tensor, Tensor]:
    """A flip at half size, and a rotation by 30 degrees; float64 [1, 3, 3]."""
    c, s = math.cos(math.pi / 6), 0.5
    flip = torch.tensor([[[-0.5, 0, 320], [0, 0.5, 0], [0, 0, 1]]], dtype=torch.float64)
    rotation = torch.tensor([[[c, -s, 0], [s, c, 0], [0, 0, 1]]], dtype=torch.float64)
    return flip, rotation


@pytest.mark.parametrize(
    ("which", "box", "hw", "expected"),
    [
        (0, [100.0, 40, 300, 200], (240, 320), [170, 20, 270, 100]),
        (1, [100.0, 0, 200, 100], (400, 400), [36.60254, 50, 173.20508, 186.60254]),
        (1, [-900.0, 0, -800, 10], (400, 400), [0, 0, 0, 0]),
    ],
)
def test_golden_projection(which: int, box: list[float], hw: tuple[int, int], expected: list[float]) -> None:
    moved = project_rows(targets_of([box], [0.5]), view_matrices()[which], [hw])
    assert moved.boxes[0, 0].tolist() == pytest.approx(expected, abs=1e-4)


def test_projection_keeps_rows() -> None:
    boxes = [[100.0, 40, 300, 200], [math.nan, 0, 1, 1], [9000, 0, 9100, 10], [10, 10, 20, 20]]
    moved = project_rows(targets_of(boxes, [0.9, 0.8, 0.7, 0.6], rows=6), view_matrices()[0], [(240, 320)])
    assert moved.labels[0].tolist() == [0, 1, 2, 3, -1, -1]
    assert moved.count.tolist() == [4]
    assert moved.boxes.isfinite().all()
    assert (moved.boxes[0, [1, 4, 5]] == 0).all()
    assert certain(moved)[0].tolist() == [True, False, False, True, False, False]
    assert certain(moved, drop_degenerate=False)[0].tolist() == [True] * 4 + [False] * 2
    assert certain(moved, 0.7, drop_degenerate=False)[0].tolist() == [True] * 3 + [False] * 3


def test_projection_refuses_bad_matrices() -> None:
    targets = targets_of([[0.0, 0, 1, 1]], [0.5])
    with pytest.raises(ValueError, match="the homography of image 0 must be finite"):
        project_rows(targets, torch.full((1, 3, 3), math.nan), [(10, 10)])
    with pytest.raises(ValueError, match=r"a homography per image must be \[B, 3, 3\], got \[3, 3\]"):
        project_rows(targets, torch.eye(3), [(10, 10)])


def test_score_on_the_threshold_is_certain() -> None:
    targets = targets_of([[0.0, 0, 1, 1]] * 3, [0.4, 0.39, 0.41])
    assert certain(targets, float(targets.scores[0, 0]))[0].tolist() == [True, False, True]


def test_normalised() -> None:
    found = normalised(targets_of([[32.0, 24, 96, 72]], [0.5], rows=2), IMAGE_HW[:1])
    torch.testing.assert_close(found.boxes[0], torch.tensor([[0.2, 0.2, 0.2, 0.2], [0, 0, 0, 0]]))


def pipeline(logits: Tensor, boxes: Tensor) -> tuple[PaddedTargets, Tensor, Tensor]:
    """From the teacher's decoder to the two sets of boxes; the student answers as the teacher does."""
    found = teacher_detections(logits, boxes, IMAGE_HW)
    weak = reliable(found.targets)
    strong = project_rows(weak, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), SIZES)
    mined = CostMiner()(logits, boxes, normalised(strong, IMAGE_HW))
    return strong, certain(strong), mined.keep | certain(strong, drop_degenerate=False)


def test_all_of_it_without_sync() -> None:
    logits, boxes = outputs(60, 5)
    with no_sync():
        strong, of_detection, of_consistency = pipeline(logits, boxes)
    assert (of_detection.sum(1) > 0).all()
    assert (of_detection <= of_consistency).all()
    assert (of_consistency <= strong.valid).all()


def test_all_of_it_without_boxes() -> None:
    logits, boxes = outputs(20, 3, shift=-50.0)
    strong, of_detection, of_consistency = pipeline(logits, boxes)
    assert strong.count.tolist() == [0, 0]
    assert not of_detection.any()
    assert not of_consistency.any()


def test_half_precision_is_computed_in_float32() -> None:
    logits, boxes = (t.bfloat16() for t in outputs(40, 4))
    with torch.autocast("cpu", torch.bfloat16):
        low = teacher_detections(logits, boxes, IMAGE_HW)
    high = teacher_detections(logits.float(), boxes.float(), IMAGE_HW)
    assert low.targets.boxes.dtype == low.targets.scores.dtype == torch.float32
    assert torch.equal(low.targets.boxes, high.targets.boxes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 4)}, r"logits, boxes and image_hw must be \[B, Q, C\], \[B, Q, 4\] and \[B, 2\], got \[3, 4\]"),
        ({"boxes": torch.zeros(2, 5, 4)}, r"got \[2, 4, 3\], \[2, 5, 4\] and \[2, 2\]"),
        ({"image_hw": torch.zeros(3, 2)}, r"got \[2, 4, 3\], \[2, 4, 4\] and \[3, 2\]"),
        ({"topk": 0}, "topk must be at least 1, got 0"),
        ({"candidates": 0}, "candidates must be at least 1, got 0"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"logits": torch.zeros(2, 4, 3), "boxes": torch.zeros(2, 4, 4), "image_hw": IMAGE_HW}
    with pytest.raises(ValueError, match=message):
        teacher_detections(**(good | change))
