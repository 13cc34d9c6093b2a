"""One entrance for labelled data: finds the format and calls its reader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .coco import coco_files, is_split, read_coco
from .records import DetectionData
from .voc import read_voc
from .yolo import find_image_folder, read_yolo

FORMATS = ("coco", "yolo", "voc")


def load_detection_data(
    path: str | Path,
    split: str | None = None,
    format: str | None = None,
    classes: Sequence[str] | None = None,
    images_dir: str | Path | None = None,
    voc_zero_based: bool = False,
    strict: bool = False,
) -> DetectionData:
    """Reads a labelled data set of any known format.

    Args:
        path: A COCO json, a data.yaml, or a folder.
        split: Which part of a folder, such as "train" or "val".
        format: "coco", "yolo" or "voc"; found by itself where only one fits.
        classes: Class names in label order, where they must follow another data set or the source has none.
        images_dir: COCO only: where the image files are.
        voc_zero_based: VOC only: coordinates count from 0.
        strict: Raise if anything has to be dropped.

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: If no format or several formats are found, or the data are unusable.
    """
    root = Path(path)
    chosen = format or detect_format(root)
    if chosen not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {chosen!r}")
    if chosen == "yolo":
        return read_yolo(root, split, classes, strict)
    if chosen == "voc":
        return read_voc(root, split, classes, voc_zero_based, strict)
    return read_coco(root, images_dir, strict, split, classes)


def has_split(path: str | Path, split: str, format: str | None = None) -> bool:
    """True if a folder holds a part of its own for `split`, such as instances_val.json beside instances_train.json."""
    root = Path(path)
    if not root.is_dir():
        return False
    chosen = format or detect_format(root)
    if chosen == "coco":
        return any(is_split(file, split) for file in coco_files(root))
    if chosen == "voc":
        return (root / "ImageSets" / "Main" / f"{split}.txt").is_file()
    return find_image_folder(root, split) is not None


def detect_format(path: Path) -> str:
    """The one format that a path looks like.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If nothing or more than one thing is found; the message says what was looked for or found.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected a COCO json, a data.yaml, or a folder with labelled images")
    found = _evidence(path)
    if len(found) == 1:
        return next(iter(found))
    if found:
        listed = "; ".join(f"{name}: {why}" for name, why in found.items())
        raise ValueError(f"{path} holds several formats ({listed}): choose one by format={' or '.join(repr(f) for f in found)}")
    raise ValueError(
        f"{path} holds no labelled data: looked for a COCO json (keys images, annotations, categories; also in train/ and annotations/), "
        "for YOLO's data.yaml or images/ with labels/, and for VOC's Annotations/*.xml with JPEGImages/"
    )


def _evidence(path: Path) -> dict[str, str]:
    """Format -> what speaks for it."""
    if path.is_file():
        by_suffix = {".json": "coco", ".yaml": "yolo", ".yml": "yolo"}
        return {by_suffix[path.suffix.lower()]: path.name} if path.suffix.lower() in by_suffix else {}
    found: dict[str, str] = {}
    files = coco_files(path)
    if files:
        found["coco"] = str(files[0].relative_to(path))
    yolo = _yolo_evidence(path)
    if yolo:
        found["yolo"] = yolo
    if (path / "JPEGImages").is_dir() and any((path / "Annotations").glob("*.xml")):
        found["voc"] = "Annotations/*.xml with JPEGImages/"
    return found


def _yolo_evidence(path: Path) -> str | None:
    for name in ("data.yaml", "data.yml"):
        if (path / name).is_file():
            return name
    for base in (path, path / "train"):
        if (base / "images").is_dir() and any((base / "labels").rglob("*.txt")):
            return f"{(base / 'images').relative_to(path)}/ with {(base / 'labels').relative_to(path)}/"
    return None
