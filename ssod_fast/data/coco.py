"""Reader of COCO detection files."""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .clean import Box, BoxCollector
from .image_io import UnreadableImageError, image_size
from .records import EXAMPLES, DataReport, DetectionData, ImageRecord

KEYS = ("images", "annotations", "categories")
TRUE_BOX = "true_bbox"  # of an annotation whose bbox is inaccurate: the right one, also xywh
MISSING_FILE = "listed images whose file is missing"
NO_SIZE = "listed images without a stated size whose file cannot be read"
UNKNOWN_IMAGE = "annotations of images that are not listed"
UNKNOWN_CATEGORY = "annotations of categories that are not listed"
MALFORMED = "annotations whose bbox is not four numbers"
BACKGROUND = "images without boxes, kept as background"
CROWD = "crowd regions, ignored in training"


def read_coco(
    path: str | Path,
    images_dir: str | Path | None = None,
    strict: bool = False,
    split: str | None = None,
    classes: Sequence[str] | None = None,
) -> DetectionData:
    """Reads a COCO detection set.

    Args:
        path: The json, or a folder that holds it (directly, in `train/` or in `annotations/`).
        images_dir: Where the image files are; by default looked for around the json, never in the current folder.
        strict: Raise if anything has to be dropped.
        split: Which json of a folder, such as "train" for `instances_train.json`.
        classes: Order of the class names, if it must follow another data set; by default the order of the category ids.

    Returns:
        The data, boxes cleaned; `warnings` says what was dropped.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a COCO file, lists no image, or none of its images exists.
    """
    file = find_coco_json(Path(path), split)
    raw = load_coco(file)
    category_ids, names = _categories(raw["categories"], classes, file)
    report = DataReport()
    records = _records(raw, file, Path(images_dir) if images_dir is not None else None, report)
    collectors = {r.id: BoxCollector(r.size, r.path.name, report) for r in records if r.size is not None}
    if any(annotation.get(TRUE_BOX) is not None for annotation in raw["annotations"]):
        for collector in collectors.values():
            collector.clean_boxes = []
    listed = {image["id"] for image in raw["images"]}
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    for annotation in raw["annotations"]:
        _add_annotation(annotation, collectors, listed, label_of, report)
    parts = [collectors[record.id].results(record.id) for record in records]
    for record, (target, _, _) in zip(records, parts, strict=True):
        if not len(target["labels"]):
            report.note(BACKGROUND, record.path.name)
    if strict:
        report.raise_if_dropped(file)
    targets, crowds, areas = (list(column) for column in zip(*parts, strict=True))
    return DetectionData(_name_of(file), names, category_ids, records, targets, crowds, areas, report, file)


def load_coco(file: Path, needed: Sequence[str] = KEYS) -> dict[str, Any]:
    """The parsed json with the keys of a COCO file, ids as integers.

    Args:
        file: The json.
        needed: Keys that must hold a list; an unlabelled set needs "images" alone.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is empty, not json, or not COCO; the message names the entry that is wrong.
    """
    text = file.read_bytes()
    if not text.strip():
        raise ValueError(f"{file} is empty: expected a COCO json with the keys {', '.join(needed)}")
    try:
        raw = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid json: {error}") from error
    missing = [key for key in needed if not isinstance(raw, dict) or not isinstance(raw.get(key), list)]
    if missing:
        raise ValueError(f"{file} is not a COCO file: it needs lists under {', '.join(needed)}; missing: {', '.join(missing)}")
    if not raw["images"]:
        raise ValueError(f"{file} lists no image")
    for key in needed:
        _check_entries(raw[key], key, file)
    return dict(raw)


# What an entry must have, and which of its values identify an image or a category.
_NEEDED = {"images": ("id", "file_name"), "annotations": (), "categories": ("id",)}
_IDS = {"images": ("id",), "annotations": ("image_id", "category_id"), "categories": ("id",)}


def _check_entries(rows: list[Any], key: str, file: Path) -> None:
    """Entries are mappings with what they need; ids written as text or as whole floats become integers.

    What cannot be an id becomes None in an annotation, which is counted where it is dropped.
    """
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{file}: {key}[{i}] must be a mapping, got {row!r}")
        for name in _NEEDED[key]:
            if name not in row:
                raise ValueError(f"{file}: {key}[{i}] has no {name!r}, only {', '.join(map(repr, row))}")
        row.update({name: _as_id(row.get(name)) for name in _IDS[key]})
        if key != "annotations" and row["id"] is None:
            raise ValueError(f"{file}: the id of {key}[{i}] must be an integer")


def _as_id(value: Any) -> int | None:
    """An id as COCO has it, None for what cannot be one."""
    if type(value) is int:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(value) if number.is_integer() else None


def find_coco_json(path: Path, split: str | None = None) -> Path:
    """The annotation file itself, or the one a folder holds for `split`.

    Raises:
        FileNotFoundError: If the path or the file does not exist.
        ValueError: If several files fit.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: expected a COCO json or a folder that holds one")
    found = coco_files(path)
    if not found:
        raise FileNotFoundError(
            f"{path} holds no COCO json: looked for *.json with {', '.join(KEYS)} in it, in {path.name}/train/ and {path.name}/annotations/"
        )
    fitting = _of_split(found, split)
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(str(f.relative_to(path)) for f in fitting or found)
    if fitting:
        raise ValueError(f"{path} holds several annotation files ({names}): name one, or choose by split (for example split='train')")
    raise ValueError(f"{path} holds no annotation file of split {split!r}, only {names}: name the file to use it all the same")


def coco_files(folder: Path) -> list[Path]:
    """COCO files of a folder: first level, then its split folders and `annotations/`, without the by-products of a split."""
    places = [folder, *(folder / sub for sub in ("train", "valid", "val", "test", "annotations"))]
    files = (f for place in places if place.is_dir() for f in sorted(place.glob("*.json")))
    return [f for f in files if not f.stem.endswith(("-hidden", "-unlabeled")) and _looks_like_coco(f)]


def _looks_like_coco(file: Path) -> bool:
    """True if the three keys occur, without parsing what may be half a gigabyte."""
    if file.stat().st_size == 0:
        return False
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return all(view.find(f'"{key}"'.encode()) >= 0 for key in KEYS)


def _of_split(files: list[Path], split: str | None) -> list[Path]:
    """The files of a split; else those that belong to no other split, so that a training file never passes for a validation file."""
    if split is None:
        return files
    others = [s for s in ("train", "val", "test") if s != split]
    return [f for f in files if is_split(f, split)] or [f for f in files if not any(is_split(f, s) for s in others)]


def is_split(file: Path, split: str) -> bool:
    """True if the name of a file, or of its folder, says that it belongs to `split`."""
    aliases = {"val": "val|valid|validation", "valid": "val|valid|validation"}.get(split, re.escape(split))
    pattern = rf"(?:^|[_\-.])(?:{aliases})(?:\d{{4}})?(?:$|[_\-.])"
    return re.search(pattern, file.stem) is not None or re.fullmatch(aliases, file.parent.name) is not None


def _name_of(file: Path) -> str:
    folder = file.parent.parent if file.parent.name in ("annotations", "train", "valid", "val", "test") else file.parent
    return folder.resolve().name


def _categories(rows: list[dict[str, Any]], classes: Sequence[str] | None, file: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Category ids and names in label order."""
    pairs = sorted((int(row["id"]), str(row.get("name", row["id"]))) for row in rows)
    names = [name for _, name in pairs]
    if not pairs:
        raise ValueError(f"{file} has no categories: list at least one class")
    if len({i for i, _ in pairs}) != len(pairs) or len(set(names)) != len(names):
        raise ValueError(f"{file} lists a category id or name twice: {names}")
    if classes is not None:
        if sorted(classes) != sorted(names):
            raise ValueError(f"classes must be those of {file}, {names}, got {list(classes)}")
        pairs.sort(key=lambda pair: list(classes).index(pair[1]))
    return tuple(i for i, _ in pairs), tuple(name for _, name in pairs)


def _records(raw: dict[str, Any], file: Path, images_dir: Path | None, report: DataReport) -> list[ImageRecord]:
    """The listed images whose file exists, in the order of the file."""
    check_unique_ids([image["id"] for image in raw["images"]], file)
    folder = images_dir or find_images_dir(raw, file)
    records = []
    for image in raw["images"]:
        record = image_record(image, folder)
        if not record.path.is_file():
            report.drop(MISSING_FILE, str(image["file_name"]))
        elif (record := _with_size(record)).size is None:
            report.drop(NO_SIZE, str(image["file_name"]))
        else:
            records.append(record)
    if not records:
        raise ValueError(
            f"{file}: none of its {len(raw['images'])} images exists or can be read; looked in {folder} (set images_dir)\n{report}"
        )
    return records


def check_unique_ids(ids: Iterable[Any], file: Path | str) -> None:
    """Image ids are the identity of an image.

    Raises:
        ValueError: If one occurs twice.
    """
    seen: set[Any] = set()
    twice = [i for i in ids if i in seen or seen.add(i)]  # type: ignore[func-returns-value]
    if twice:
        raise ValueError(f"{file} lists image ids twice: {twice[:EXAMPLES]}")


def image_record(image: dict[str, Any], folder: Path) -> ImageRecord:
    """One entry of `images`."""
    h, w = (int(image.get(side) or 0) for side in ("height", "width"))
    return ImageRecord(int(image["id"]), folder / str(image["file_name"]), (h, w) if h > 0 and w > 0 else None)


def _with_size(record: ImageRecord) -> ImageRecord:
    if record.size is not None:
        return record
    try:
        return ImageRecord(record.id, record.path, image_size(record.path))
    except UnreadableImageError:
        return record


def find_images_dir(raw: dict[str, Any], file: Path) -> Path:
    """The folder that file names are relative to: stated under info.images_dir, or found around the json."""
    stated = (raw.get("info") or {}).get("images_dir") if isinstance(raw.get("info"), dict) else None
    here, above = file.parent, file.parent.parent
    candidates = [here / stated] if stated else []
    candidates += [here, here / "images", above / "images", above]
    parts = file.stem.split("_")
    candidates += [base / name for base in (above, above / "images", here) for name in parts]  # instances_train2017 -> train2017/
    probes = [str(image["file_name"]) for image in raw["images"][:: max(1, len(raw["images"]) // 20)]]
    hits = [sum((folder / name).is_file() for name in probes) for folder in candidates]
    best = candidates[hits.index(max(hits))] if max(hits) else candidates[0 if stated else 2]
    return Path(os.path.normpath(best))


def _add_annotation(
    annotation: dict[str, Any], collectors: dict[int, BoxCollector], listed: set[Any], label_of: dict[int, int], report: DataReport
) -> None:
    """Adds one annotation to its image, or counts why not."""
    name = f"annotation {annotation.get('id', '?')}"
    collector = collectors.get(annotation.get("image_id", -1))
    if collector is None:
        if annotation.get("image_id") not in listed:  # else its image was dropped and counted already
            report.drop(UNKNOWN_IMAGE, name)
        return
    label = label_of.get(annotation.get("category_id", -1))
    if label is None:
        report.drop(UNKNOWN_CATEGORY, name)
        return
    corners = box_of(annotation)
    if corners is None:
        report.drop(MALFORMED, name)
        return
    crowd = bool(annotation.get("iscrowd", 0))
    if crowd:
        report.note(CROWD, collector.where)
    area = annotation.get("area")
    collector.add(corners, label, crowd, float(area) if isinstance(area, (int, float)) else None, box_of(annotation, TRUE_BOX))


def box_of(annotation: dict[str, Any], key: str = "bbox") -> Box | None:
    """xyxy corners of an annotation's box, None where it is not four numbers."""
    try:
        x, y, w, h = (float(v) for v in annotation[key])
    except (KeyError, TypeError, ValueError):
        return None
    return x, y, x + w, y + h
