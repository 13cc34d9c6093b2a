"""Writes a data set of any format as COCO annotations that stay beside where its images are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .coco import TRUE_BOX
from .records import DetectionData


def as_coco(data: DetectionData, folder: Path) -> dict[str, Any]:
    """The cleaned annotations as the content of a COCO json.

    Args:
        data: Any data set. Right boxes that it knows become `true_bbox`.
        folder: Where the json is going to be: the path to the images, under info.images_dir, starts there.
    """
    content: dict[str, Any] = data.to_coco()
    images_dir = Path(os.path.commonpath([record.path.resolve().parent for record in data.records]))
    for image, record in zip(content["images"], data.records, strict=True):
        image["file_name"] = record.path.resolve().relative_to(images_dir).as_posix()
    rows = (row for row in content["annotations"] if not row["iscrowd"])  # in the order of the targets
    for target in data.targets:
        for box in target.get("clean_boxes", target["boxes"]).tolist():
            row = next(rows)
            if "clean_boxes" in target:
                row[TRUE_BOX] = xywh(box)
    return {"info": {"images_dir": os.path.relpath(images_dir, folder.resolve())}, **content}


def xywh(box: list[float]) -> list[float]:
    """COCO's form of an xyxy box."""
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1, y2 - y1]
