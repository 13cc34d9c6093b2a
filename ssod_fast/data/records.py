"""What every reader returns: image records, targets, and a report in words of what was dropped on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..structures import Target

EXAMPLES = 5  # how many offenders a report names per reason


@dataclass(frozen=True)
class ImageRecord:
    """One image file.

    Attributes:
        id: Identity in its data set.
        path: Where the file is.
        size: (height, width) after EXIF orientation where the source states it, else None.
    """

    id: int
    path: Path
    size: tuple[int, int] | None = None


@dataclass
class DataReport:
    """Counts of what a reader met, by reason, with a few examples each.

    `dropped` holds what was lost (strict reading makes it an error); `notes` holds what was changed or is merely worth knowing.
    """

    dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, example: str, count: int = 1) -> None:
        """Counts something that was lost."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count
        self._remember(reason, example)

    def note(self, reason: str, example: str, count: int = 1) -> None:
        """Counts something that was kept."""
        self.notes[reason] = self.notes.get(reason, 0) + count
        self._remember(reason, example)

    def _remember(self, reason: str, example: str) -> None:
        seen = self.examples.setdefault(reason, [])
        if len(seen) < EXAMPLES and example not in seen:
            seen.append(example)

    def __bool__(self) -> bool:
        return bool(self.dropped or self.notes)

    def __str__(self) -> str:
        lines = [f"dropped {n} {reason}{self._tail(reason, n)}" for reason, n in self.dropped.items()]
        lines += [f"{n} {reason}{self._tail(reason, n)}" for reason, n in self.notes.items()]
        return "\n".join(lines) or "nothing was dropped"

    def _tail(self, reason: str, count: int) -> str:
        seen = self.examples.get(reason, [])
        return f" ({', '.join(seen)}{', ...' if count > len(seen) else ''})" if seen else ""

    def raise_if_dropped(self, source: Path) -> None:
        """For strict reading.

        Raises:
            ValueError: If anything was dropped; the message is this report.
        """
        if self.dropped:
            raise ValueError(f"{source}: strict reading found faults:\n{self}")


@dataclass(frozen=True)
class DetectionData:
    """A labelled data set; `records`, `targets`, `crowds` and `areas` run in parallel, in the order of the source.

    Attributes:
        name: Short name for run folders and messages.
        classes: Class names; the label is the position.
        category_ids: The source's own id of each class, for writing predictions back.
        records: The images.
        targets: float32 [N, 4] xyxy boxes in pixels of the image, clipped to it, and int64 [N] labels.
        crowds: The regions marked as crowd or difficult: never trained on, ignored in evaluation.
        areas: float32 [N], area of each object in square pixels as the source states it (COCO: of the mask), else of its box.
        warnings: What was dropped or changed.
        source: The annotation file or folder.
    """

    name: str
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: list[ImageRecord]
    targets: list[Target]
    crowds: list[Target]
    areas: list[Tensor]
    warnings: DataReport
    source: Path

    def __post_init__(self) -> None:
        lengths = {len(self.records), len(self.targets), len(self.crowds), len(self.areas)}
        if len(lengths) != 1:
            raise ValueError(f"records, targets, crowds and areas must be equally long, got {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        boxes = sum(self.class_counts())
        return f"DetectionData({self.name!r}, {len(self)} images, {boxes} boxes of {len(self.classes)} classes, {str(self.source)!r})"

    def subset(self, image_ids: Sequence[int], name: str | None = None) -> DetectionData:
        """The images with these ids, in this data set's order.

        Raises:
            ValueError: If an id is not there.
        """
        wanted = set(image_ids)
        rows = [i for i, record in enumerate(self.records) if record.id in wanted]
        if len(rows) != len(wanted):
            missing = sorted(wanted - {record.id for record in self.records})
            raise ValueError(f"image_ids must be ids of {self.source}, got unknown {missing[:EXAMPLES]}")
        return replace(
            self,
            name=name or self.name,
            records=[self.records[i] for i in rows],
            targets=[self.targets[i] for i in rows],
            crowds=[self.crowds[i] for i in rows],
            areas=[self.areas[i] for i in rows],
        )

    def class_counts(self) -> list[int]:
        """Number of boxes of each class."""
        labels = torch.cat([t["labels"] for t in self.targets]) if self.targets else torch.zeros(0, dtype=torch.int64)
        counts: list[int] = torch.bincount(labels, minlength=len(self.classes)).tolist()
        return counts

    def to_coco(self) -> dict[str, list[dict[str, object]]]:
        """The cleaned annotations as a COCO dictionary with the source's category ids, crowd regions included, for an evaluator."""
        images: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []
        for record, target, crowd, areas in zip(self.records, self.targets, self.crowds, self.areas, strict=True):
            h, w = record.size or (0, 0)
            images.append({"id": record.id, "file_name": record.path.name, "height": h, "width": w})
            for part, part_areas, is_crowd in ((target, areas.tolist(), 0), (crowd, _box_areas(crowd["boxes"]), 1)):
                for (x1, y1, x2, y2), label, area in zip(part["boxes"].tolist(), part["labels"].tolist(), part_areas, strict=True):
                    row = {"id": len(annotations) + 1, "image_id": record.id, "category_id": self.category_ids[label]}
                    annotations.append({**row, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": area, "iscrowd": is_crowd})
        categories: list[dict[str, object]] = [{"id": i, "name": n} for i, n in zip(self.category_ids, self.classes, strict=True)]
        return {"images": images, "annotations": annotations, "categories": categories}


def _box_areas(boxes: Tensor) -> list[float]:
    areas: list[float] = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).tolist()
    return areas


def check_same_classes(first: DetectionData, second: DetectionData) -> None:
    """Labels mean the same thing in both data sets.

    Raises:
        ValueError: If the class names or their order differ; the message lists the differences by name.
    """
    if first.classes == second.classes:
        return
    only_first = [c for c in first.classes if c not in second.classes]
    only_second = [c for c in second.classes if c not in first.classes]
    detail = (
        "the order differs" if not only_first and not only_second else f"only in the first: {only_first}, only in the second: {only_second}"
    )
    raise ValueError(
        f"class names of {first.source} and {second.source} must agree, but {detail} ({list(first.classes)} and {list(second.classes)})"
    )
