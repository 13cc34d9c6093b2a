"""Pictures for the report: the same unlabelled images at every evaluation, and the mixed inputs exactly as the student saw them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssod_fast.data.batches import LabeledBatch
from ssod_fast.data.image_io import UnreadableImageError, read_image
from ssod_fast.data.records import ImageRecord
from ssod_fast.detectors import PixelStats
from ssod_fast.methods.step import Preview
from ssod_fast.structures import Target

from .files import write_json

MAX_SIDE = 480  # of an original
MAX_MIXED_SIDE = 640
MIN_SCORE = 0.05
MAX_BOXES = 50
QUALITY = 88


class PreviewWriter:
    """Writes `pseudo_preview/` of a run folder.

    Args:
        folder: the run folder.
        records: images that may be shown; `count` of them, evenly spread, always are.
        count: number of images.
    """

    def __init__(self, folder: Path, records: Sequence[ImageRecord], count: int) -> None:
        self.folder = folder / "pseudo_preview"
        self.records = spread(records, count)
        self._files: dict[int, tuple[str, tuple[int, int]]] = {}

    def write_step(self, it: int, rows: Iterable[tuple[int, dict[str, Target], tuple[Tensor, Tensor] | None]]) -> None:
        """Writes what the models see in the chosen images.

        Args:
            it: iterations done.
            rows: image id, detections by model, and truth boxes and labels if known; all in pixels of the original.
        """
        entries = []
        for image_id, models, truth in rows:
            if not self._write_image(image_id):
                continue
            file, hw = self._files[image_id]
            boxes = {name: _rows(models.get(name)) for name in ("teacher", "student")}
            known = None if truth is None else {"boxes": _round(truth[0]), "labels": truth[1].tolist()}
            entries.append({"image_id": image_id, "file": file, "hw": list(hw), **boxes, "truth": known})
        if entries:
            write_json(self.folder / f"step_{it:06d}.json", entries)

    def _write_image(self, image_id: int) -> bool:
        """Writes the shrunk original once; False if it cannot be read."""
        if image_id in self._files:
            return True
        record = next(r for r in self.records if r.id == image_id)
        try:
            pixels = read_image(record.path, record.size)
        except UnreadableImageError:
            return False
        name = f"images/{image_id}.jpg"
        _save_jpeg(pixels, self.folder / name, MAX_SIDE)
        self._files[image_id] = (name, (int(pixels.shape[1]), int(pixels.shape[2])))
        return True

    def write_mixed(self, it: int, previews: Sequence[Preview], labeled: LabeledBatch, stats: PixelStats) -> None:
        """Writes the student's inputs of one step with the boxes that its losses used."""
        entries: list[dict[str, Any]] = []
        for kind, image, target in [*_labeled_inputs(labeled), *_mixed_inputs(previews, stats)]:
            name = f"mixed_{it:06d}_{len(entries)}.jpg"
            scale = _save_jpeg(image, self.folder / name, MAX_MIXED_SIDE)
            scores = target["scores"].tolist() if "scores" in target else [1.0] * len(target["labels"])
            rows = {"boxes": _round(target["boxes"] * scale), "labels": target["labels"].tolist(), "scores": scores}
            entries.append({"file": name, "kind": kind, **rows})
        write_json(self.folder / f"mixed_{it:06d}.json", entries)


def spread(records: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    """`count` records, evenly spread over the list; all of them if there are fewer."""
    places = np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int)
    return [records[i] for i in dict.fromkeys(places.tolist())]


def _labeled_inputs(labeled: LabeledBatch) -> list[tuple[str, Tensor, Target]]:
    return [
        ("labeled", image.cpu(), Target(boxes=t["boxes"].cpu(), labels=t["labels"].cpu()))
        for image, t in zip(labeled.images, labeled.targets, strict=True)
    ]


def _mixed_inputs(previews: Sequence[Preview], stats: PixelStats) -> list[tuple[str, Tensor, Target]]:
    """Undoes the normalisation; images are cut to their true size."""
    mean, std = torch.tensor(stats.mean).view(3, 1, 1), torch.tensor(stats.std).view(3, 1, 1)
    inputs = []
    for preview in previews:
        targets = preview.targets.to("cpu").to_list()
        for tensor, (h, w), target in zip(preview.images.tensor.float().cpu(), preview.images.sizes, targets, strict=True):
            pixels = (tensor[:, :h, :w] * std + mean).round().clamp(0, 255).to(torch.uint8)
            inputs.append((preview.kind, pixels, target))
    return inputs


def _save_jpeg(pixels: Tensor, path: Path, max_side: int) -> float:
    """Writes uint8 [3, h, w], shrunk to `max_side`; returns the scale."""
    path.parent.mkdir(parents=True, exist_ok=True)
    h, w = int(pixels.shape[1]), int(pixels.shape[2])
    scale = min(1.0, max_side / max(h, w))
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if scale < 1:
        image = image.resize((max(1, round(w * scale)), max(1, round(h * scale))), Image.Resampling.BILINEAR)
    image.save(path, quality=QUALITY)
    return scale


def _rows(target: Target | None) -> dict[str, Any] | None:
    """The best boxes as JSON; None where the model does not exist."""
    if target is None:
        return None
    order = torch.argsort(target["scores"], descending=True)[:MAX_BOXES]
    order = order[target["scores"][order] >= MIN_SCORE]
    scores = [round(s, 4) for s in target["scores"][order].tolist()]
    return {"boxes": _round(target["boxes"][order]), "labels": target["labels"][order].tolist(), "scores": scores}


def _round(boxes: Tensor) -> list[list[float]]:
    return [[round(v, 1) for v in row] for row in boxes.tolist()]
