"""Reader of Pascal VOC folders: `Annotations/*.xml` beside `JPEGImages/`."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .clean import BoxCollector
from .coco import BACKGROUND, MISSING_FILE
from .image_io import SUFFIXES, UnreadableImageError, image_size
from .records import DataReport, DetectionData, ImageRecord

DIFFICULT = "difficult objects, ignored in training"
MALFORMED = "objects without a name or four box numbers"
UNKNOWN_CLASS = "objects of classes that are not listed"


@dataclass(frozen=True)
class _Object:
    name: str
    corners: tuple[float, float, float, float]
    difficult: bool


def read_voc(
    path: str | Path,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    zero_based: bool = False,
    strict: bool = False,
) -> DetectionData:
    """Reads a Pascal VOC data set.

    Args:
        path: The folder (such as VOC2007).
        split: Name of a list in ImageSets/Main, such as "trainval"; by default every annotation.
        classes: Names in label order; by default those that occur, sorted.
        zero_based: Coordinates count from 0 and x2, y2 are exclusive. By default they follow the standard: from 1, inclusive.
        strict: Raise if anything has to be dropped.

    Raises:
        FileNotFoundError: If there is no annotation.
        ValueError: If an xml cannot be parsed or no image is there.
    """
    root = Path(path)
    report = DataReport()
    shift = 0.0 if zero_based else 1.0
    records: list[ImageRecord] = []
    objects: list[list[_Object]] = []
    for file in _xml_files(root, split):
        tree = _parse(file)
        record = _record(root, file, tree, len(records), report)
        if record is not None:
            records.append(record)
            objects.append(_objects(tree, file.stem, shift, report))
    if not records:
        raise ValueError(f"{root}: none of the annotated images exists in {root / 'JPEGImages'}\n{report}")
    names = tuple(classes) if classes is not None else tuple(sorted({o.name for row in objects for o in row}))
    parts = [_collect(record, row, names, report).results(record.id) for record, row in zip(records, objects, strict=True)]
    if strict:
        report.raise_if_dropped(root)
    targets, crowds, areas = (list(column) for column in zip(*parts, strict=True))
    return DetectionData(root.resolve().name, names, tuple(range(1, len(names) + 1)), records, targets, crowds, areas, report, root)


def _xml_files(root: Path, split: str | None) -> list[Path]:
    folder = root / "Annotations"
    listed = root / "ImageSets" / "Main" / f"{split}.txt"
    if split is not None and listed.is_file():
        stems = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
        return [folder / f"{stem}.xml" for stem in stems]
    if split is not None and (split not in ("train", root.resolve().name) or listed.parent.is_dir()):
        raise FileNotFoundError(f"{listed} does not exist: split must name a list in ImageSets/Main")
    files = sorted(folder.glob("*.xml"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no xml")
    return files


def _parse(file: Path) -> ET.Element:
    try:
        return ET.parse(file).getroot()
    except (ET.ParseError, OSError) as error:
        raise ValueError(f"{file} cannot be read as xml: {error}") from error


def _record(root: Path, file: Path, tree: ET.Element, image_id: int, report: DataReport) -> ImageRecord | None:
    """The image of an annotation, or None (counted) if it is not there."""
    name = tree.findtext("filename") or ""
    candidates = [root / "JPEGImages" / name] if name else []
    candidates += [root / "JPEGImages" / f"{file.stem}{suffix}" for suffix in SUFFIXES]
    image = next((c for c in candidates if c.is_file()), None)
    if image is None:
        report.drop(MISSING_FILE, name or file.stem)
        return None
    try:
        h, w = int(float(tree.findtext("size/height") or 0)), int(float(tree.findtext("size/width") or 0))
        return ImageRecord(image_id, image, (h, w) if h > 0 and w > 0 else image_size(image))
    except (UnreadableImageError, ValueError):
        report.drop("images whose size cannot be read", image.name)
        return None


def _objects(tree: ET.Element, stem: str, shift: float, report: DataReport) -> list[_Object]:
    found = []
    for node in tree.iter("object"):
        name = (node.findtext("name") or "").strip()
        try:
            x1, y1, x2, y2 = (float(node.findtext(f"bndbox/{key}") or "missing") for key in ("xmin", "ymin", "xmax", "ymax"))
        except ValueError:
            name = ""
        if not name:
            report.drop(MALFORMED, stem)
            continue
        difficult = (node.findtext("difficult") or "0").strip() == "1"
        found.append(_Object(name, (x1 - shift, y1 - shift, x2, y2), difficult))
    return found


def _collect(record: ImageRecord, objects: Sequence[_Object], names: tuple[str, ...], report: DataReport) -> BoxCollector:
    collector = BoxCollector(record.size or (0, 0), record.path.name, report)
    for item in objects:
        if item.name not in names:
            report.drop(UNKNOWN_CLASS, f"{record.path.name}: {item.name}")
            continue
        if item.difficult:
            report.note(DIFFICULT, record.path.name)
        collector.add(item.corners, names.index(item.name), crowd=item.difficult)
    if not collector.boxes:
        report.note(BACKGROUND, record.path.name)
    return collector
