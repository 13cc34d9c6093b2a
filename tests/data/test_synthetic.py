"""The generator of synthetic scenes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssod_fast.data import SceneConfig, draw_split, read_coco, write_scenes
from ssod_fast.data.synthetic import CLASSES, draw_scene


def test_written_set_is_clean_coco(tmp_path: Path) -> None:
    paths = write_scenes(tmp_path, n_train=60, n_val=5, seed=3, size=(96, 128))
    data = read_coco(paths.train, strict=True)
    assert len(data) == 60
    assert data.classes == tuple(c.name for c in CLASSES)
    assert all(r.size == (96, 128) and Image.open(r.path).size == (128, 96) for r in data.records)
    assert len(read_coco(tmp_path, split="val")) == 5
    assert not data.warnings.dropped


def test_classes_are_long_tailed_and_sizes_vary(tmp_path: Path) -> None:
    data = read_coco(write_scenes(tmp_path, n_train=150, n_val=0, suffix="jpg", size=(64, 80)).train)
    counts = data.class_counts()
    assert counts[0] > 3 * counts[-1] > 0
    assert counts == sorted(counts, reverse=True) or np.corrcoef(counts, range(6))[0, 1] < -0.8
    sides = np.sqrt(np.concatenate([a.numpy() for a in data.areas]))
    assert np.quantile(sides, 0.95) > 2.5 * np.quantile(sides, 0.05)


def test_seed_decides_every_byte_and_count_does_not(tmp_path: Path) -> None:
    first = write_scenes(tmp_path / "a", n_train=3, n_val=1, seed=5, size=(48, 64))
    second = write_scenes(tmp_path / "b", n_train=4, n_val=1, seed=5, size=(48, 64))
    third = write_scenes(tmp_path / "c", n_train=3, n_val=1, seed=6, size=(48, 64))
    for file in first.images.iterdir():
        assert file.read_bytes() == (second.images / file.name).read_bytes()
        assert file.read_bytes() != (third.images / file.name).read_bytes()
    images = json.loads(first.train.read_text())["images"]
    assert images == json.loads(second.train.read_text())["images"][:3]
    assert (first.images / "train_00000.png").read_bytes() != (first.images / "val_00000.png").read_bytes()


def test_boxes_fit_the_pixels() -> None:
    # Without distractors, noise and tilt, what differs from the smooth ground is objects: outside of all boxes no texture edge may be left.
    config = SceneConfig(size=(120, 150), objects=(1, 1), distractors=(0, 0), noise=0.0)
    for seed in range(10):
        pixels, boxes, labels = draw_scene(np.random.default_rng(seed), config)
        empty, no_boxes, _ = draw_scene(
            np.random.default_rng(seed), SceneConfig(size=(120, 150), objects=(0, 0), distractors=(0, 0), noise=0.0)
        )
        assert len(boxes) == len(labels) == 1
        assert len(no_boxes) == 0
        ratio = np.median(pixels.astype(float) / np.maximum(empty.astype(float), 1))  # the two pictures differ in exposure
        changed = (np.abs(pixels.astype(float) - empty * ratio) > 25).any(2)
        x1, y1, x2, y2 = boxes[0].astype(int)
        inside = np.zeros_like(changed)
        inside[y1:y2, x1:x2] = True
        assert changed[inside].mean() > 0.25
        saturated = (pixels == 255).any(2) | (empty == 255).any(2)
        assert (changed & ~inside & ~saturated).mean() < 0.01


def test_visible_share_is_kept() -> None:
    config = SceneConfig(size=(120, 150), objects=(8, 8), object_size=(0.4, 0.6))
    boxes_seen = [len(draw_scene(np.random.default_rng(s), config)[1]) for s in range(5)]
    assert max(boxes_seen) <= 8
    assert min(boxes_seen) >= 2


def test_ten_percent_can_cover_all_classes(tmp_path: Path) -> None:
    data = read_coco(write_scenes(tmp_path, n_train=400, n_val=0, size=(32, 40), suffix="jpg").train)
    split = draw_split(data, 10, cover_classes=True)
    assert len(split.labeled_ids) == 40
    assert split.manifest["missing_classes"] == []


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n_train and n_val must be >= 0, got -1 and 5"):
        write_scenes(tmp_path, n_train=-1, n_val=5)
    with pytest.raises(ValueError, match='suffix must be "png" or "jpg", got \'gif\''):
        write_scenes(tmp_path, suffix="gif")
    with pytest.raises(ValueError, match=r"size must be at least \(16, 16\), got \(8, 64\)"):
        write_scenes(tmp_path, size=(8, 64))
    with pytest.raises(ValueError, match="objects must be"):
        SceneConfig(objects=(3, 2))
    with pytest.raises(ValueError, match="object_size must be"):
        SceneConfig(object_size=(0.0, 0.5))
