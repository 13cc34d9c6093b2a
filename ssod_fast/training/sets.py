"""The data of a run: labelled set, unlabelled images, validation set, and the hidden truth that only the monitor sees."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssod_fast.data.coco import read_coco
from ssod_fast.data.detect import detect_format, has_split, load_detection_data
from ssod_fast.data.records import EXAMPLES, DetectionData, ImageRecord, check_same_classes
from ssod_fast.data.unlabeled import list_images
from ssod_fast.data.yolo import find_image_folder

from .config import TrainConfig
from .quality import HiddenTruth
from .tree import ConfigError


class DataError(ValueError):
    """Data that cannot be read or does not fit together."""


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is judged by.

    Attributes:
        labeled: the labelled set.
        unlabeled: images without annotations; None if there are none.
        val: for evaluation; None: no evaluation.
        hidden: truth of the unlabelled images, for the monitor; None if unknown.
        split: manifest of the draw if LABELED was split here.
        notes: sentences for the banner.
    """

    labeled: DetectionData
    unlabeled: list[ImageRecord] | None
    val: DetectionData | None
    hidden: HiddenTruth | None
    split: dict[str, Any] | None
    notes: list[str]

    @property
    def split_hash(self) -> str | None:
        """Identity of the drawn labelled set."""
        return None if self.split is None else str(self.split["labeled_sha256"])


def load_sets(config: TrainConfig[Any]) -> TrainingData:
    """Reads everything a run needs.

    Raises:
        DataError: unreadable data, or class names that differ.
        ConfigError: the method needs unlabelled images and there are none.
    """
    try:
        return _load(config)
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error


def _load(config: TrainConfig[Any]) -> TrainingData:
    full = load_detection_data(config.labeled, split="train", strict=config.strict_data)
    val = _read_val(config, full)
    labeled, rest, split = (full, None, None) if config.percent is None else _draw(config, full)
    _require_boxes(labeled, drawn=config.percent is not None)
    unlabeled = list(rest.records) if rest is not None else []
    hidden = None if rest is None else HiddenTruth([r.id for r in rest.records], rest.targets)
    if config.unlabeled is not None:
        unlabeled += _with_free_ids(list_images(config.unlabeled), unlabeled)
    if config.hidden_gt is not None:
        hidden = _read_hidden(config.hidden_gt, unlabeled, full.classes)
    if not unlabeled and hasattr(config.method, "unlabeled_batch"):
        raise ConfigError(
            f"--method {config.method_name} needs unlabelled images: name a folder after the labelled set, draw a labelled share with "
            "--percent 10, write a split with `ssod-fast split`, or train with --method supervised"
        )
    notes = [str(data.warnings) for data in (full, val) if data is not None and data.warnings]
    notes += _shared_with_val(unlabeled, val)
    return TrainingData(labeled, unlabeled or None, val, hidden, split, notes)


def _require_boxes(labeled: DetectionData, drawn: bool) -> None:
    if not any(len(target["labels"]) for target in labeled.targets):
        hint = ": draw another --fold or raise --percent" if drawn else ""
        raise ValueError(f"none of the {len(labeled)} labelled images in {labeled.source} has a box to learn from{hint}")


def _read_val(config: TrainConfig[Any], labeled: DetectionData) -> DetectionData | None:
    """The named validation set, or the val split of the labelled folder if it has one of its own."""
    if config.val is None and not has_split(config.labeled, "val"):
        return None
    path = config.val or config.labeled
    val = read_evaluation_set(path, labeled.classes, strict=config.strict_data)
    check_same_classes(labeled, val)
    return val


def read_evaluation_set(path: Path, classes: Sequence[str], split: str = "val", strict: bool = False) -> DetectionData:
    """A labelled set to evaluate on: the part `split` of a folder that has parts, else all of it.

    Its labels follow `classes` where it has the same ones; VOC, which lists no classes, may lack some.

    Raises:
        ValueError: unusable data.
        OSError: no such file.
    """
    kind = detect_format(path)
    # A COCO folder without the part is an error that lists its files; a folder of VOC or YOLO without parts is meant as a whole.
    flat = path.is_dir() and ((kind == "voc" and not (path / "ImageSets").is_dir()) or (kind == "yolo" and _is_flat_yolo(path)))
    part = None if flat else split
    data = load_detection_data(path, split=part, strict=strict)
    same = set(data.classes) == set(classes) or (kind == "voc" and set(data.classes) < set(classes))
    if same and tuple(data.classes) != tuple(classes):  # another order is no other set of classes
        data = load_detection_data(path, split=part, strict=strict, classes=classes)
    return data


def _is_flat_yolo(folder: Path) -> bool:
    return (
        not any((folder / name).is_file() for name in ("data.yaml", "data.yml")) and find_image_folder(folder, "train") == folder / "images"
    )


def _draw(config: TrainConfig[Any], full: DetectionData) -> tuple[DetectionData, DetectionData, dict[str, Any]]:
    from ssod_fast.data.split import draw_split

    assert config.percent is not None
    split = draw_split(
        full,
        percent=config.percent,
        fold=config.fold,
        protocol=config.protocol,
        seed_offset=config.seed_offset,
        cover_classes=config.cover_classes,
    )
    return full.subset(split.labeled_ids), full.subset(split.unlabeled_ids), dict(split.manifest)


def _shared_with_val(unlabeled: Sequence[ImageRecord], val: DetectionData | None) -> list[str]:
    """A note if images for evaluation are also trained on, as happens where one folder holds the images of all parts."""
    names = {record.path.name for record in val.records} if val is not None else set()
    candidates = {record.path.resolve() for record in unlabeled if record.path.name in names}
    shared = [record.path for record in val.records if record.path.resolve() in candidates] if val is not None and candidates else []
    if not shared:
        return []
    examples = ", ".join(path.name for path in shared[:EXAMPLES]) + (", ..." if len(shared) > EXAMPLES else "")
    return [f"{len(shared)} images for evaluation are among the unlabelled ones ({examples}): the evaluation is not on unseen images"]


def _with_free_ids(records: Sequence[ImageRecord], taken: Sequence[ImageRecord]) -> list[ImageRecord]:
    """The same images with ids that `taken` does not use."""
    if not taken:
        return list(records)
    start = max(r.id for r in taken) + 1
    return [dataclasses.replace(record, id=start + i) for i, record in enumerate(records)]


def _read_hidden(path: Path, unlabeled: Sequence[ImageRecord], classes: Sequence[str]) -> HiddenTruth:
    """Truth from a COCO json, matched to the unlabelled images by path, or by file name where that says which image is meant.

    Raises:
        ValueError: no image matches.
    """
    truth = read_coco(path, classes=classes)
    by_path = {record.path.resolve(): row for row, record in enumerate(truth.records)}
    by_name = {record.path.name: row for row, record in enumerate(truth.records)}
    for records in (truth.records, unlabeled):  # a name that two folders use names no image
        uses = Counter(record.path.name for record in records)
        by_name = {name: row for name, row in by_name.items() if uses[name] == 1}
    rows = [by_path.get(record.path.resolve(), by_name.get(record.path.name)) for record in unlabeled]
    found = [(record.id, truth.targets[row]) for record, row in zip(unlabeled, rows, strict=True) if row is not None]
    if not found:
        raise ValueError(f"hidden_gt {path} describes none of the {len(unlabeled)} unlabelled images (matched by path and file name)")
    return HiddenTruth([i for i, _ in found], [t for _, t in found])
