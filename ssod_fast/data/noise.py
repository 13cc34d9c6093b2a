"""Label noise: boxes moved and scaled at random, as papers on inaccurate annotations do it.

The generator is OA-MIL's, which SSD-Det uses too: every box is shifted by a share of its size and scaled, both drawn uniformly up to the
noise level, once, in pixels of the original image. Published numbers depend on the noise file, so a manifest records how it was made and
the SHA-256 of its boxes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from .box_accuracy import BoxAccuracy, box_accuracy
from .coco import (
    CROWD,
    MALFORMED,
    TRUE_BOX,
    UNKNOWN_CATEGORY,
    UNKNOWN_IMAGE,
    box_of,
    check_unique_ids,
    find_coco_json,
    find_images_dir,
    load_coco,
)
from .detect import detect_format, load_detection_data
from .export import as_coco, xywh
from .records import DataReport

IGNORED = "annotations marked as ignored"
OUTSIDE = "boxes outside of their image"
TINY = "boxes without area or with a side below 1 pixel"
VANISHED = "boxes of which the noise left nothing"

PUBLISHED_SEED = 45


@dataclass(frozen=True)
class NoiseConfig:
    """How boxes are moved."""

    noise_level: float = 0.4  # largest shift and change of size, as a share of the side; papers: .1 to .4
    noise_seed: int = PUBLISHED_SEED
    # official: the last pixel (W - 1, H - 1) bounds a box, and VOC's are taken one pixel narrower, both as in the published generator.
    # image: the border of the image (W, H), and boxes as the readers give them.
    noise_clip: Literal["official", "image"] = "official"

    def __post_init__(self) -> None:
        for name, kind, words in (("noise_level", Real, "a number"), ("noise_seed", Integral, "an integer")):
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"{name} must be {words}, got {value!r}")
        if not 0 <= self.noise_level < 1:
            raise ValueError(f"noise_level must lie in [0, 1), got {self.noise_level}")
        if not 0 <= self.noise_seed < 2**32:
            raise ValueError(f"noise_seed must lie in [0, 2**32), got {self.noise_seed}")
        if self.noise_clip not in ("official", "image"):
            raise ValueError(f"noise_clip must be 'official' or 'image', got {self.noise_clip!r}")


@dataclass(frozen=True)
class Noise:
    """What was done to the annotations of one set.

    Attributes:
        accuracy: Overlap of the moved boxes with the clean ones.
        report: Annotations that stayed clean, by reason.
        boxes_sha256: Hash of the moved boxes: little-endian float32 xyxy, in the order of the draws.
    """

    accuracy: BoxAccuracy
    report: DataReport
    boxes_sha256: str


@dataclass(frozen=True)
class NoiseFiles:
    """What :func:`write_noise` wrote: a COCO json, and beside it a manifest with the content of `manifest`."""

    annotations: Path
    manifest_file: Path
    manifest: dict[str, Any]
    noise: Noise


def jitter_boxes(
    boxes: NDArray[np.float32], draws: NDArray[np.float64], sizes: NDArray[np.int64], clip: str = "official"
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Moves boxes by given draws, computed in float64.

    Args:
        boxes: float32 [N, 4] xyxy, pixels of the original image.
        draws: float64 [N, 4]: shift in x and y, change of width and height, as shares of the side.
        sizes: int64 [N, 2], (height, width) of each box's image.
        clip: See :class:`NoiseConfig`.

    Returns:
        float32 [N, 4] moved and clipped boxes; bool [N], True where nothing would be left, so that the box is the clean one.
    """
    exact = boxes.astype(np.float64)
    side = exact[:, 2:] - exact[:, :2]
    centre = (exact[:, :2] + exact[:, 2:]) / 2 + draws[:, :2] * side
    half = side * (1 + draws[:, 2:]) / 2
    limit = sizes[:, ::-1] - (1 if clip == "official" else 0)
    low, high = np.maximum(centre - half, 0.0), np.minimum(centre + half, limit)
    moved = np.concatenate([low, high], 1).astype(np.float32)
    vanished: NDArray[np.bool_] = np.any(moved[:, 2:] <= moved[:, :2], axis=1)
    return np.where(vanished[:, None], boxes, moved), vanished


def add_noise(raw: dict[str, Any], config: NoiseConfig, every_box: bool = False, source: Path | str = "raw") -> Noise:
    """Moves the boxes of COCO annotations in place; each keeps its clean box under `true_bbox`.

    Images are taken in the order of the file, the boxes of an image too. Crowd regions and annotations that training leaves out stay as
    they are and take no draws. Masks of moved boxes are left out, because they would tell the clean box.

    Args:
        raw: Content of a COCO file, as :func:`load_coco` gives it.
        config: Level, seed, border.
        every_box: Boxes that are tiny or outside of their image take draws too, as VOC's do.
        source: Named in errors.

    Raises:
        ValueError: If an image has no size, an image id occurs twice, or boxes were moved before.
    """
    moved_before = next((_name(row) for row in raw["annotations"] if row.get(TRUE_BOX) is not None), None)
    if moved_before:
        raise ValueError(f"{source} is noisy already ({moved_before} has a {TRUE_BOX}): expected clean boxes")
    sizes = _image_sizes(raw["images"], source)
    report = DataReport()
    rows = _rows_to_move(raw, sizes, every_box, report)
    boxes = np.array([box_of(row) for row in rows], dtype=np.float32).reshape(-1, 4)
    draws = np.random.RandomState(config.noise_seed).uniform(-config.noise_level, config.noise_level, size=boxes.shape)
    owners = np.array([sizes[row["image_id"]] for row in rows], dtype=np.int64).reshape(-1, 2)
    moved, stays = jitter_boxes(boxes, draws, owners, config.noise_clip)
    for row, vanished in zip(rows, stays.tolist(), strict=True):
        if vanished:
            report.note(VANISHED, _name(row))
    if config.noise_level == 0:  # not even clipped
        moved, stays = boxes, np.ones_like(stays)
    _write_boxes(rows, moved.astype(np.float64).tolist(), stays.tolist())
    categories = {int(c["id"]): str(c.get("name", c["id"])) for c in raw["categories"]}
    label_of = {category: label for label, category in enumerate(categories)}
    labels = torch.tensor([label_of[row["category_id"]] for row in rows], dtype=torch.int64)
    accuracy = box_accuracy(torch.from_numpy(moved), torch.from_numpy(boxes), labels, list(categories.values()))
    return Noise(accuracy, report, hashlib.sha256(moved.astype("<f4").tobytes()).hexdigest())


def _image_sizes(images: list[dict[str, Any]], source: Path | str) -> dict[int, tuple[int, int]]:
    """(height, width) by image id."""
    check_unique_ids([image["id"] for image in images], source)
    for image in images:
        if not all(isinstance(image.get(side), (int, float)) and image[side] > 0 for side in ("height", "width")):
            raise ValueError(f"{source}: image {image['id']} ({image['file_name']}) needs a width and a height above 0 to bound its boxes")
    return {image["id"]: (int(image["height"]), int(image["width"])) for image in images}


def _rows_to_move(raw: dict[str, Any], sizes: dict[int, tuple[int, int]], every_box: bool, report: DataReport) -> list[dict[str, Any]]:
    """The annotations that take draws, in the order of the draws; the others are counted."""
    of_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in raw["images"]}
    known = {c["id"] for c in raw["categories"]}
    for row in raw["annotations"]:
        reason = UNKNOWN_IMAGE if row["image_id"] not in sizes else _reason_to_skip(row, sizes[row["image_id"]], known, every_box)
        if reason is None:
            of_image[row["image_id"]].append(row)
        else:
            report.note(reason, _name(row))
    return [row for rows in of_image.values() for row in rows]


def _reason_to_skip(row: dict[str, Any], size: tuple[int, int], known: set[int], every_box: bool) -> str | None:
    """Why the loader of the published generator would not take an annotation as a box, None if it would."""
    corners = box_of(row)
    if corners is None or not all(map(math.isfinite, corners)):
        return MALFORMED
    if row.get("ignore"):
        return IGNORED
    (x1, y1, x2, y2), (h, w) = corners, size
    area = row["area"] if isinstance(row.get("area"), (int, float)) else (x2 - x1) * (y2 - y1)
    if not every_box and (area <= 0 or x2 - x1 < 1 or y2 - y1 < 1):
        return TINY
    if not every_box and (min(x2, w) <= max(x1, 0.0) or min(y2, h) <= max(y1, 0.0)):
        return OUTSIDE
    if row["category_id"] not in known:
        return UNKNOWN_CATEGORY
    return CROWD if row.get("iscrowd") else None


def _name(row: dict[str, Any]) -> str:
    return f"annotation {row.get('id', '?')}"


def _write_boxes(rows: list[dict[str, Any]], moved: list[list[float]], stays: list[bool]) -> None:
    for row, box, keep in zip(rows, moved, stays, strict=True):
        row[TRUE_BOX] = list(row["bbox"])
        if not keep:
            row["bbox"] = xywh(box)
            row["area"] = row["bbox"][2] * row["bbox"][3]
            row.pop("segmentation", None)


def write_noise(
    source: str | Path, out_dir: str | Path, config: NoiseConfig, split: str | None = None, format: str | None = None
) -> NoiseFiles:
    """Makes noisy annotations of a COCO, YOLO or VOC set and writes them as COCO json with a manifest.

    Args:
        source: COCO json, YOLO data.yaml, or a folder of one of the three formats.
        out_dir: Where to; made if missing. The images stay where they are.
        config: Level, seed, border.
        split: Which part of a folder; by default its training part, of VOC the list trainval if there is one.
        format: "coco", "yolo" or "voc" where a folder could be several.

    Raises:
        FileNotFoundError: If there is no such data.
        ValueError: If it cannot be read, an image has no size, or an image id occurs twice.
    """
    path, out = Path(source), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    kind = format or detect_format(path)
    if kind == "coco":
        path = find_coco_json(path, split or "train")
        raw, stem = load_coco(path), path.stem
        raw["info"] = {**(raw.get("info") or {}), "images_dir": os.path.relpath(find_images_dir(raw, path), out)}
    else:
        raw, stem = _read_other(path, out, kind, split, config)
    noise = add_noise(raw, config, every_box=kind == "voc", source=path)
    seed = "" if config.noise_seed == PUBLISHED_SEED else f"-s{config.noise_seed}"
    clip = "" if config.noise_clip == "official" else f"-{config.noise_clip}"
    file = out / f"{stem}_noise-r{config.noise_level:g}{seed}{clip}.json"
    file.write_text(json.dumps(raw))
    manifest = _manifest(path, file, config, noise)
    manifest_file = file.with_suffix(".manifest.json")
    manifest_file.write_text(json.dumps(manifest, indent=2) + "\n")
    return NoiseFiles(file, manifest_file, manifest, noise)


def _read_other(path: Path, out: Path, kind: str, split: str | None, config: NoiseConfig) -> tuple[dict[str, Any], str]:
    """A YOLO or VOC set as COCO content, and a name for its file."""
    part = split or ("trainval" if (path / "ImageSets" / "Main" / "trainval.txt").is_file() else "train")
    listed = kind == "yolo" or (path / "ImageSets" / "Main").is_dir()
    data = load_detection_data(path, format=kind, split=part if listed or split else None)
    raw = as_coco(data, out)
    if kind == "voc" and config.noise_clip == "official":
        for row in raw["annotations"]:  # the reader counts the last pixel in, the published generator does not
            row["bbox"][2] -= 1.0
            row["bbox"][3] -= 1.0
            row["area"] = row["bbox"][2] * row["bbox"][3]
    return raw, f"{data.name}_{part}"


def _manifest(source: Path, file: Path, config: NoiseConfig, noise: Noise) -> dict[str, Any]:
    from .. import __version__

    return {
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "boxes_sha256": noise.boxes_sha256,
        "noise_level": config.noise_level,
        "noise_seed": config.noise_seed,
        "noise_clip": config.noise_clip,
        "source": source.name,
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest() if source.is_file() else None,
        "severity": noise.accuracy.to_dict(),
        "kept_clean": noise.report.notes,
        "numpy": np.__version__,
        "ssod_fast": __version__,
    }
