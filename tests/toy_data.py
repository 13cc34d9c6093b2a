"""The same tiny data set in three formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "owl")
CATEGORY_IDS = (1, 5, 90)
# file name -> (h, w), boxes (x1, y1, x2, y2, label); the third image has none.
IMAGES: dict[str, tuple[tuple[int, int], list[tuple[int, int, int, int, int]]]] = {
    "a.png": ((48, 64), [(0, 0, 64, 48, 0), (8, 12, 24, 36, 2)]),
    "b.png": ((80, 40), [(4, 8, 20, 40, 1)]),
    "c.png": ((32, 32), []),
    "d.png": ((40, 80), [(20, 10, 60, 30, 2)]),
}


def write_image(path: Path, size: tuple[int, int], seed: int = 0, **options: Any) -> Path:
    """A noise picture of (h, w)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def coco_dict() -> dict[str, Any]:
    """The toy set as a COCO dictionary."""
    images, annotations = [], []
    for image_id, (name, ((h, w), boxes)) in enumerate(IMAGES.items()):
        images.append({"id": image_id, "file_name": name, "height": h, "width": w})
        for x1, y1, x2, y2, label in boxes:
            row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": CATEGORY_IDS[label], "iscrowd": 0}
            annotations.append({**row, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
    categories = [{"id": i, "name": n} for i, n in zip(CATEGORY_IDS, CLASSES, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(root: Path, content: dict[str, Any] | None = None, name: str = "annotations/instances_train.json") -> Path:
    """Writes images/ and a json; returns the json."""
    content = coco_dict() if content is None else content
    for i, image in enumerate(content["images"]):
        write_image(root / "images" / image["file_name"], (image.get("height", 32), image.get("width", 32)), i)
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def write_yolo(root: Path, with_yaml: bool = True) -> Path:
    """Writes images/train, labels/train and data.yaml; returns the folder."""
    for i, (name, ((h, w), boxes)) in enumerate(IMAGES.items()):
        write_image(root / "images" / "train" / name, (h, w), i)
        lines = [f"{c} {(x1 + x2) / 2 / w} {(y1 + y2) / 2 / h} {(x2 - x1) / w} {(y2 - y1) / h}" for x1, y1, x2, y2, c in boxes]
        label = (root / "labels" / "train" / name).with_suffix(".txt")
        label.parent.mkdir(parents=True, exist_ok=True)
        if lines:
            label.write_text("\n".join(lines) + "\n")
    if with_yaml:
        (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: [{', '.join(CLASSES)}]\n")
    return root


def write_voc(root: Path) -> Path:
    """Writes JPEGImages/ and Annotations/; returns the folder."""
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    for i, (name, ((h, w), boxes)) in enumerate(IMAGES.items()):
        write_image(root / "JPEGImages" / name, (h, w), i)
        objects = "".join(
            f"<object><name>{CLASSES[c]}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for x1, y1, x2, y2, c in boxes
        )
        size = f"<size><width>{w}</width><height>{h}</height><depth>3</depth></size>"
        xml = f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"
        (root / "Annotations" / name).with_suffix(".xml").write_text(xml)
    return root
