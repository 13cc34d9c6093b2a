"""Reader of YOLO folders: `images/` beside `labels/`, one txt per image with `class cx cy w h` in shares of the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .clean import BoxCollector
from .coco import BACKGROUND
from .image_io import UnreadableImageError, image_size, is_image
from .records import DataReport, DetectionData, ImageRecord

NO_LABEL_FILE = "images without a label file, taken as background"
BAD_LINE = "label lines that are not `class cx cy w h` or a polygon"
BAD_CLASS = "boxes of a class that has no name"
UNREADABLE = "images that cannot be read"


def read_yolo(path: str | Path, split: str | None = None, classes: Sequence[str] | None = None, strict: bool = False) -> DetectionData:
    """Reads a YOLO data set.

    Args:
        path: The folder, or its data.yaml.
        split: "train", "val" or "test": which entry of the yaml, or which subfolder of images/.
        classes: Names in label order where there is no yaml; by default classes.txt, else class_0, class_1, ...
        strict: Raise if anything has to be dropped.

    Raises:
        FileNotFoundError: If there is no image folder.
        ValueError: If the yaml or the class names are unusable.
    """
    root = Path(path)
    base, settings = _settings(root)
    folder = find_image_folder(root, split)
    if folder is None:
        looked = ", ".join(str(c) for c in _image_folders(base, settings, split))
        raise FileNotFoundError(f"{base} has no image folder for split {split!r}: looked for {looked}")
    files = sorted(f for f in folder.rglob("*") if is_image(f) and f.is_file())
    if not files:
        raise FileNotFoundError(f"{folder} holds no image")
    names = _names(base, settings, classes)
    report = DataReport()
    return _collect(base, files, names, report, strict)


def _collect(base: Path, files: Sequence[Path], names: list[str] | None, report: DataReport, strict: bool) -> DetectionData:
    records: list[ImageRecord] = []
    lines: list[list[tuple[int, list[float]]]] = []
    for file in files:
        try:
            records.append(ImageRecord(len(records), file, image_size(file)))
        except UnreadableImageError:
            report.drop(UNREADABLE, file.name)
            continue
        lines.append(_read_labels(label_file(file), file.name, report))
    if not records:
        raise ValueError(f"{base}: none of its {len(files)} images can be read\n{report}")
    if names is None:
        names = [f"class_{i}" for i in range(1 + max((c for rows in lines for c, _ in rows), default=0))]
    parts = [_target(record, rows, len(names), report) for record, rows in zip(records, lines, strict=True)]
    if strict:
        report.raise_if_dropped(base)
    targets, crowds, areas = (list(column) for column in zip(*parts, strict=True))
    return DetectionData(base.resolve().name, tuple(names), tuple(range(len(names))), records, targets, crowds, areas, report, base)


def _target(record: ImageRecord, rows: Sequence[tuple[int, list[float]]], num_classes: int, report: DataReport) -> tuple[Any, Any, Any]:
    h, w = record.size or (0, 0)
    collector = BoxCollector((h, w), record.path.name, report)
    for label, values in rows:
        if not 0 <= label < num_classes:
            report.drop(BAD_CLASS, f"{record.path.name}: {label}")
            continue
        collector.add(_corners(values, h, w), label)
    if not collector.boxes:
        report.note(BACKGROUND, record.path.name)
    return collector.results(record.id)


def _corners(values: Sequence[float], h: int, w: int) -> tuple[float, float, float, float]:
    """xyxy pixels of a box (4 numbers) or around a polygon (more)."""
    if len(values) == 4:
        cx, cy, bw, bh = values
        return (cx - bw / 2) * w, (cy - bh / 2) * h, (cx + bw / 2) * w, (cy + bh / 2) * h
    xs, ys = values[::2], values[1::2]
    return min(xs) * w, min(ys) * h, max(xs) * w, max(ys) * h


def label_file(image: Path) -> Path:
    """The txt of an image: the last folder called images becomes labels."""
    parts = list(image.parts)
    places = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def _read_labels(file: Path, name: str, report: DataReport) -> list[tuple[int, list[float]]]:
    if not file.is_file():
        report.note(NO_LABEL_FILE, name)
        return []
    rows = []
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        row = _parse_line(line)
        if row is None:
            report.drop(BAD_LINE, f"{file.name}:{number}")
        else:
            rows.append(row)
    return rows


def _parse_line(line: str) -> tuple[int, list[float]] | None:
    try:
        label, *values = (float(v) for v in line.split())
    except ValueError:
        return None
    is_polygon = len(values) >= 6 and len(values) % 2 == 0
    return (int(label), values) if label.is_integer() and (len(values) == 4 or is_polygon) else None


def _load_yaml(file: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f'{file} needs PyYAML to be read: pip install "ssod-fast[train]"') from error
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid yaml: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a mapping with names and image folders, got {type(content).__name__}")
    return content


def _names(base: Path, settings: dict[str, Any], classes: Sequence[str] | None) -> list[str] | None:
    names = settings.get("names")
    if isinstance(names, dict):
        ids = sorted(int(k) for k in names)
        if ids != list(range(len(ids))):
            raise ValueError(f"names of {base} must be numbered 0 .. C-1 without gaps, got {ids}")
        names = [names[k] for k in sorted(names, key=int)]
    listed = base / "classes.txt"
    if names is None and listed.is_file():
        names = [line.strip() for line in listed.read_text().splitlines() if line.strip()]
    if names is None:
        return list(classes) if classes is not None else None
    if classes is not None and list(classes) != [str(n) for n in names]:
        raise ValueError(f"classes must be those of {base}, {names}, got {list(classes)}")
    return [str(n) for n in names]


def find_image_folder(root: Path, split: str | None) -> Path | None:
    """The folder that holds the images of a split, if there is one."""
    return next((folder for folder in _image_folders(*_settings(root), split) if folder.is_dir()), None)


def _settings(root: Path) -> tuple[Path, dict[str, Any]]:
    """The folder and the content of its yaml, if it has one."""
    yaml_file = root if root.is_file() else next((f for f in (root / "data.yaml", root / "data.yml") if f.is_file()), None)
    return root.parent if root.is_file() else root, _load_yaml(yaml_file) if yaml_file else {}


def _image_folders(base: Path, settings: dict[str, Any], split: str | None) -> list[Path]:
    """Where the images of a split may be: what the yaml says, then the usual names."""
    keys = {"val": ("val", "valid"), "valid": ("val", "valid")}.get(split or "train", (split or "train",))
    stated = next((settings[key] for key in keys if isinstance(settings.get(key), str)), None)
    folders: list[Path] = []
    if stated is not None:
        start = base / str(settings.get("path", ""))
        # Exported archives often say ../train/images although train/ lies beside the yaml.
        folders = [start / stated, base / stated, base / stated.removeprefix("../")]
    folders += [base / "images" / key for key in keys] + [base / key / "images" for key in keys]
    name = base.resolve().name
    if split in (None, "train", name) or name in keys:  # never the training images for another split
        folders.append(base / "images")
    return folders
