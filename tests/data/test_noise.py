"""Label noise: the published generator, its order of draws, what it leaves alone, files, right boxes on their way to a batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_data import coco_dict, write_coco, write_voc, write_yolo

from ssod_fast.data import LabeledBatch, NoiseConfig, ViewConfig, add_noise, box_accuracy, labeled_view, read_coco, write_noise
from ssod_fast.data.noise import CROWD, IGNORED, MALFORMED, OUTSIDE, TINY, VANISHED, jitter_boxes
from ssod_fast.structures import Target

GOLDEN = [(100, 60, 180, 160), (0, 0, 80, 100), (470, 350, 499, 399)]  # in an image of 500 x 400, seed 45, level .4
MOVED = [(138.2904, 80.8720, 204.3031, 147.0552), (10.8933, 11.2917, 61.9988, 84.3576), (456.9583, 352.0517, 494.2218, 399.0)]


def coco(boxes: Sequence[tuple[float, ...]], size: tuple[int, int] = (400, 500), **extra: Any) -> dict[str, Any]:
    """One image; boxes are xyxy."""
    rows = [
        {"id": i + 1, "image_id": 1, "category_id": 7, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), **extra}
        for i, (x1, y1, x2, y2) in enumerate(boxes)
    ]
    image = {"id": 1, "file_name": "a.jpg", "height": size[0], "width": size[1]}
    return {"images": [image], "annotations": rows, "categories": [{"id": 7, "name": "thing"}]}


def corners(raw: dict[str, Any], key: str = "bbox") -> np.ndarray:
    boxes = np.array([row[key] for row in raw["annotations"]], dtype=float).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def test_golden_boxes_and_draws() -> None:
    first = np.random.RandomState(45).uniform(-0.4, 0.4, size=(1, 4))[0]
    assert first == pytest.approx([0.391209, 0.039636, -0.174842, -0.338168], abs=1e-6)
    raw = coco(GOLDEN)
    add_noise(raw, NoiseConfig())
    np.testing.assert_allclose(corners(raw), MOVED, atol=1e-3)
    np.testing.assert_array_equal(corners(raw, "true_bbox"), GOLDEN)
    assert raw["annotations"][0]["area"] == pytest.approx((204.3031 - 138.2904) * (147.0552 - 80.8720), abs=0.05)


def literal(boxes: Sequence[tuple[float, ...]], level: float, size: tuple[int, int], seed: int = 45) -> list[tuple[float, ...]]:
    """The generator as its description says it, one number at a time."""
    rng, result = np.random.RandomState(seed), []
    for x1, y1, x2, y2 in boxes:
        w, h, cx, cy = x2 - x1, y2 - y1, (x1 + x2) / 2, (y1 + y2) / 2
        shift_x, shift_y, scale_w, scale_h = (rng.uniform(-level, level) for _ in range(4))
        cx, cy, w, h = cx + shift_x * w, cy + shift_y * h, w * (1 + scale_w), h * (1 + scale_h)
        new = (max(0, cx - w / 2), max(0, cy - h / 2), min(cx + w / 2, size[1] - 1), min(cy + h / 2, size[0] - 1))
        result.append(new if new[2] > new[0] and new[3] > new[1] else (x1, y1, x2, y2))
    return result


box = st.tuples(*[st.integers(0, 390)] * 4).map(lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]) + 2, max(b[1], b[3]) + 2))


@settings(max_examples=40, deadline=None)
@given(boxes=st.lists(box, max_size=8), level=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_equals_the_generator_written_out(boxes: Sequence[tuple[float, ...]], level: float, seed: int) -> None:
    raw = coco(boxes)
    noise = add_noise(raw, NoiseConfig(level, seed))
    np.testing.assert_allclose(corners(raw), np.reshape(literal(boxes, level, (400, 500), seed), (-1, 4)), atol=1e-3)
    assert noise.accuracy.boxes == len(boxes)


def test_level_zero_changes_no_bit() -> None:
    raw = coco([(0.1, 0.3, 499.99, 399.7), (3, 4, 500, 400)])
    before = json.dumps([row["bbox"] for row in raw["annotations"]])
    noise = add_noise(raw, NoiseConfig(0.0))
    assert json.dumps([row["bbox"] for row in raw["annotations"]]) == before
    assert noise.accuracy.mean_iou == 1


@pytest.mark.parametrize(
    ("level", "mean", "half", "low"),
    [(0.1, 0.810, 1.0, 0.0), (0.2, 0.664, 0.98, 0.0), (0.3, 0.545, 0.62, 0.0), (0.4, 0.447, 0.32, 0.107)],
)
def test_severity_of_interior_boxes(level: float, mean: float, half: float, low: float) -> None:
    boxes = np.tile(np.float32([1000, 1000, 1100, 1060]), (20_000, 1))
    draws = np.random.RandomState(1).uniform(-level, level, size=boxes.shape)
    moved, _ = jitter_boxes(boxes, draws, np.full((len(boxes), 2), 3000))
    accuracy = box_accuracy(torch.from_numpy(moved), torch.from_numpy(boxes), torch.zeros(len(boxes), dtype=torch.int64), ["thing"])
    assert accuracy.mean_iou == pytest.approx(mean, abs=3e-3)
    assert accuracy.share_50 == pytest.approx(half, abs=0.01)
    assert accuracy.share_below_30 == pytest.approx(low, abs=0.01)
    assert sum(accuracy.histogram) == 20_000


def test_draws_go_by_image_and_skip_what_training_leaves_out() -> None:
    kept = coco(GOLDEN)
    add_noise(kept, NoiseConfig())
    raw = coco(GOLDEN)
    others = coco([(1, 1, 50, 50)] * 7)["annotations"]
    others[0]["iscrowd"] = 1
    others[1]["ignore"] = 1
    others[2]["bbox"] = [600, 20, 30, 30]
    others[3]["bbox"] = [20, 20, 0.5, 30]
    others[4]["bbox"] = [20, 20, float("nan"), 30]
    others[5]["category_id"] = 8
    others[6]["image_id"] = 2
    before = json.dumps(others)
    raw["annotations"] = [*others[:4], raw["annotations"][0], *others[4:], *raw["annotations"][1:]]
    noise = add_noise(raw, NoiseConfig())
    assert json.dumps(others) == before
    moved = [row for row in raw["annotations"] if "true_bbox" in row]
    assert [row["bbox"] for row in moved] == [row["bbox"] for row in kept["annotations"]]
    assert noise.report.notes == dict.fromkeys(noise.report.notes, 1)
    assert {CROWD, IGNORED, OUTSIDE, TINY, MALFORMED} < set(noise.report.notes)
    assert len(noise.report.notes) == 7


def test_voc_draws_for_tiny_boxes_too() -> None:
    tiny = (20, 20, 20.5, 50)
    raw = coco([tiny, GOLDEN[0]])
    add_noise(raw, NoiseConfig(), every_box=True)
    np.testing.assert_allclose(corners(raw), literal([tiny, GOLDEN[0]], 0.4, (400, 500)), atol=1e-3)


def test_order_of_images_decides_not_order_of_annotations() -> None:
    raw = coco(GOLDEN)
    raw["images"].append({**raw["images"][0], "id": 2})
    raw["annotations"][0]["image_id"] = 2
    add_noise(raw, NoiseConfig())
    reordered = literal([GOLDEN[1], GOLDEN[2], GOLDEN[0]], 0.4, (400, 500))
    np.testing.assert_allclose(corners(raw), [reordered[2], reordered[0], reordered[1]], atol=1e-3)


def test_border_and_vanished_boxes() -> None:
    outside = [(498.0, 0.0, 520.0, 40.0)]  # its centre lies right of the image: noise may push all of it out
    draws = np.array([[0.4, 0.0, -0.4, 0.0]])
    boxes, sizes = np.float32(outside), np.array([[400, 500]])
    moved, vanished = jitter_boxes(boxes, draws, sizes)
    assert vanished.tolist() == [True]
    np.testing.assert_array_equal(moved, boxes)
    wide, _ = jitter_boxes(np.float32([[400, 300, 500, 400]]), np.full((1, 4), 0.3), sizes, "image")
    assert wide[0, 2:].tolist() == [500, 400]
    narrow, _ = jitter_boxes(np.float32([[400, 300, 500, 400]]), np.full((1, 4), 0.3), sizes, "official")
    assert narrow[0, 2:].tolist() == [499, 399]


def test_masks_of_moved_boxes_are_dropped_and_vanished_ones_counted() -> None:
    raw = coco([(10, 10, 60, 60)], segmentation=[[10, 10, 60, 10, 60, 60]])
    add_noise(raw, NoiseConfig(0.2))
    assert "segmentation" not in raw["annotations"][0]
    draws = ((seed, np.random.RandomState(seed).uniform(-0.9, 0.9, 4)) for seed in range(1000))
    away = next(seed for seed, (right, _, wider, _) in draws if right > 0.8 and wider < 0)
    raw = coco([(450, 100, 540, 200)], segmentation=[[0, 0, 1, 1, 2, 2]])
    noise = add_noise(raw, NoiseConfig(0.9, away))
    assert noise.report.notes == {VANISHED: 1}
    assert "segmentation" in raw["annotations"][0]
    assert raw["annotations"][0]["bbox"] == raw["annotations"][0]["true_bbox"] == [450, 100, 90, 100]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_level": 1.0}, r"noise_level must lie in \[0, 1\), got 1.0"),
        ({"noise_level": -0.1}, r"noise_level must lie in \[0, 1\), got -0.1"),
        ({"noise_level": float("nan")}, "noise_level must lie in"),
        ({"noise_seed": -1}, "noise_seed must lie in"),
        ({"noise_clip": "none"}, "noise_clip must be 'official' or 'image', got 'none'"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_level": "0.4"}, "noise_level must be a number, got '0.4'"),
        ({"noise_seed": 1.5}, "noise_seed must be an integer, got 1.5"),
        ({"noise_seed": True}, "noise_seed must be an integer, got True"),
    ],
)
def test_settings_of_a_wrong_type(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        NoiseConfig(**change)


def test_bad_images() -> None:
    raw = coco(GOLDEN)
    del raw["images"][0]["width"]
    with pytest.raises(ValueError, match=r"image 1 \(a.jpg\) needs a width and a height"):
        add_noise(raw, NoiseConfig())
    raw = coco(GOLDEN)
    raw["images"] *= 2
    with pytest.raises(ValueError, match=r"lists image ids twice: \[1\]"):
        add_noise(raw, NoiseConfig())


def test_noise_on_noise_is_refused() -> None:
    raw = coco(GOLDEN)
    add_noise(raw, NoiseConfig())
    with pytest.raises(ValueError, match=r"raw is noisy already \(annotation 1 has a true_bbox\): expected clean boxes"):
        add_noise(raw, NoiseConfig())


def test_accuracy_checks_its_rows() -> None:
    with pytest.raises(ValueError, match="equally long, got 2, 1 and 2"):
        box_accuracy(torch.zeros(2, 4), torch.zeros(1, 4), torch.zeros(2, dtype=torch.int64), ["a"])
    nothing = box_accuracy(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), ["a"])
    assert (nothing.boxes, nothing.mean_iou, str(nothing)) == (0, None, "no boxes")


def test_files_of_a_coco_set(tmp_path: Path) -> None:
    write_coco(tmp_path / "set")
    files = write_noise(tmp_path / "set", tmp_path / "noisy", NoiseConfig())
    assert files.annotations.name == "instances_train_noise-r0.4.json"
    manifest = json.loads(files.manifest_file.read_text())
    assert manifest == files.manifest
    assert manifest["sha256"] == hashlib.sha256(files.annotations.read_bytes()).hexdigest()
    assert (manifest["noise_level"], manifest["noise_seed"], manifest["noise_clip"]) == (0.4, 45, "official")
    clean, noisy = read_coco(tmp_path / "set"), read_coco(files.annotations)
    moved = torch.cat([t["boxes"] for t in noisy.targets])
    assert manifest["boxes_sha256"] == hashlib.sha256(moved.numpy().astype("<f4").tobytes()).hexdigest()
    assert [r.path for r in noisy.records] == [r.path for r in clean.records]
    for a, b in zip(clean.targets, noisy.targets, strict=True):
        torch.testing.assert_close(a["boxes"], b["clean_boxes"])
    assert "clean_boxes" not in clean.targets[0]
    again = write_noise(tmp_path / "set", tmp_path / "other", NoiseConfig())
    assert again.manifest["boxes_sha256"] == manifest["boxes_sha256"]
    third = write_noise(tmp_path / "set", tmp_path / "other", NoiseConfig(noise_seed=46))
    assert third.annotations.name == "instances_train_noise-r0.4-s46.json"
    assert third.manifest["boxes_sha256"] != manifest["boxes_sha256"]
    fourth = write_noise(tmp_path / "set", tmp_path / "other", NoiseConfig(noise_clip="image"))
    assert fourth.annotations.name == "instances_train_noise-r0.4-image.json"
    assert again.annotations.is_file()


def test_formats_give_the_same_boxes(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco")
    write_yolo(tmp_path / "yolo")
    write_voc(tmp_path / "voc")
    config = NoiseConfig(noise_clip="image")
    made = [write_noise(tmp_path / kind, tmp_path / "out" / kind, config) for kind in ("coco", "yolo", "voc")]
    sets = [read_coco(files.annotations) for files in made]
    for other in sets[1:]:
        assert [r.path.name for r in other.records] == [r.path.name for r in sets[0].records]
        for a, b in zip(sets[0].targets, other.targets, strict=True):
            torch.testing.assert_close(a["boxes"], b["boxes"], atol=1e-3, rtol=0)
            torch.testing.assert_close(a["clean_boxes"], b["clean_boxes"], atol=1e-4, rtol=0)


def test_voc_boxes_are_those_of_the_published_generator(tmp_path: Path) -> None:
    write_voc(tmp_path / "voc")
    raw = json.loads(write_noise(tmp_path / "voc", tmp_path, NoiseConfig(0.2)).annotations.read_text())
    expected = literal([(0, 0, 63, 47), (8, 12, 23, 35)], 0.2, (48, 64))
    np.testing.assert_allclose(corners(raw)[:2], expected, atol=1e-3)


def test_right_boxes_follow_their_view_and_rows_without_one_count_as_right(tmp_path: Path) -> None:
    raw = coco_dict()
    raw["annotations"][1]["true_bbox"] = [6, 10, 20, 28]
    data = read_coco(write_coco(tmp_path, raw))
    torch.testing.assert_close(data.targets[0]["clean_boxes"], torch.tensor([[0.0, 0, 64, 48], [6, 10, 26, 38]]))
    assert data.targets[2]["clean_boxes"].shape == (0, 4)
    config = ViewConfig(short_side=(96, 96), max_side=500, flip=1.0, colour_ops=())
    image = torch.zeros(3, 48, 64, dtype=torch.uint8)
    view, target = labeled_view(image, data.targets[0], config, np.random.default_rng(0))
    assert view.size == (96, 128)
    torch.testing.assert_close(target["clean_boxes"][1], torch.tensor([128.0 - 52, 20, 128 - 12, 76]))
    batch = LabeledBatch([view.image], [target]).to("cpu")
    assert batch.targets[0]["clean_boxes"].dtype == torch.float32


def test_right_boxes_leave_with_the_noisy_ones_that_a_view_drops() -> None:
    boxes = torch.tensor([[70.0, 5, 90, 20], [4, 4, 30, 30]])  # the first one lies outside of the image
    target = Target(boxes=boxes, labels=torch.tensor([0, 1]), clean_boxes=torch.tensor([[50.0, 5, 60, 20], [5, 5, 31, 31]]))
    config = ViewConfig(short_side=(48, 48), max_side=500, flip=0.0, colour_ops=())
    _, seen = labeled_view(torch.zeros(3, 48, 64, dtype=torch.uint8), target, config, np.random.default_rng(0))
    assert seen["labels"].tolist() == [1]
    torch.testing.assert_close(seen["clean_boxes"], torch.tensor([[5.0, 5, 31, 31]]))
