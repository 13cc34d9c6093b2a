"""Evaluates a saved detector, and runs it on images; the work behind `ssod-fast val` and `ssod-fast predict`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ssod_fast.data.loader import EvalLoader
from ssod_fast.data.records import DetectionData
from ssod_fast.data.unlabeled import list_images
from ssod_fast.data.views import ViewConfig

from .checkpoint import DetectorInfo, find_detector, load_detector
from .evaluation import CocoEvaluator, CocoMetrics, show
from .predict import predict_all
from .sets import DataError, read_evaluation_set
from .tree import ConfigError, from_tree

Which = Literal["teacher", "student", "both"]
TOPK = 100


@dataclass(frozen=True)
class Evaluated:
    """A detector file and its numbers."""

    path: Path
    info: DetectorInfo
    metrics: CocoMetrics

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        about = {"file": str(self.path), "which": self.info.which, "model": self.info.model, "it": self.info.it}
        return {**about, "images": self.metrics.images, "backend": self.metrics.backend, **self.metrics.to_dict()}


def validate(
    checkpoint: Path, data: Path, which: Which = "both", split: str = "val", score_thr: float = 1e-3, device: str = "auto", workers: int = 0
) -> list[Evaluated]:
    """Evaluates the detectors of a file or run folder on a labelled set.

    Args:
        checkpoint: `best_*.safetensors`, or a run folder.
        data: COCO json, or a folder that holds one.
        which: models of a run folder; "both" takes those that exist.
        split: which annotation file of a folder.
        score_thr: detections at or below it are not evaluated.
        device: "auto", "cpu" or "cuda".
        workers: loader processes.

    Raises:
        DataError: the file or the data cannot be read, or the detector knows other classes.
        FileNotFoundError: no detector there.
    """
    where = pick_device(device)
    results = []
    for path in _files(checkpoint, which):
        detector, info = _load(path)
        val = _read(data, split, info)
        evaluator = CocoEvaluator(val.to_coco(), val.category_ids, val.classes, score_thr, TOPK)
        loader = EvalLoader(val, views_of(info), workers=workers)
        for batch, predictions in predict_all({"it": detector.to(where)}, loader, where, score_thr, TOPK):
            evaluator.update(batch.image_ids, predictions["it"])
        results.append(Evaluated(path, info, evaluator.compute()))
    return results


def _files(checkpoint: Path, which: Which) -> list[Path]:
    if checkpoint.is_file() or which != "both":
        return [find_detector(checkpoint, None if which == "both" else which)]
    files = [checkpoint / "weights" / f"best_{name}.safetensors" for name in ("teacher", "student")]
    return [f for f in files if f.is_file()] or [find_detector(checkpoint)]


def _load(path: Path) -> tuple[torch.nn.Module, DetectorInfo]:
    try:
        return load_detector(path)
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error


def _read(data: Path, split: str, info: DetectorInfo) -> DetectionData:
    try:
        val = read_evaluation_set(data, info.classes, split)
        if set(val.classes) != set(info.classes):
            known, found = ", ".join(info.classes), ", ".join(val.classes)
            raise DataError(f"the detector knows the classes {known}, but {val.source} has {found}: they must be the same")
        return val
    except DataError:
        raise
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error


def views_of(info: DetectorInfo) -> ViewConfig:
    """The test view that a detector was evaluated with in training."""
    return from_tree(ViewConfig, info.views, "views")


def pick_device(name: str) -> torch.device:
    """A GPU for "auto" if there is one.

    Raises:
        ConfigError: another name, or a GPU that is not there.
    """
    if name.split(":")[0] not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device must be auto, cpu or cuda, got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {name} was asked for, but torch sees no GPU: use --device cpu")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


def metrics_table(results: Sequence[Evaluated]) -> str:
    """Numbers in per cent, one column per model."""
    names = [r.info.which for r in results]
    width = max(14, *(len(c) + 2 for r in results for c in r.metrics.per_class))
    lines = [" " * width + "".join(f"{n:>12}" for n in names)]
    for stat in results[0].metrics.stats:
        lines.append(f"{stat:<{width}}" + "".join(f"{show(r.metrics[stat]):>12}" for r in results))
    lines.append("\n" + f"{'class':<{width}}" + "".join(f"{n + ' AP':>12}{'AP50':>8}" for n in names))
    for name in results[0].metrics.per_class:
        cells = (f"{show(r.metrics.per_class[name]):>12}{show(r.metrics.per_class50[name]):>8}" for r in results)
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def predict(checkpoint: Path, images: str, which: Which = "both", score_thr: float = 0.3, device: str = "auto") -> list[dict[str, Any]]:
    """Runs a detector on a folder, list or glob of images.

    Args:
        checkpoint: detector file or run folder; of a run folder the teacher if there is one.
        images: see :func:`ssod_fast.data.unlabeled.list_images`.
        which: "teacher" or "student"; "both" means the former here.
        score_thr: scores below are left out.
        device: "auto", "cpu" or "cuda".

    Returns:
        Per image: file, boxes xyxy in pixels of the original, class names, scores.

    Raises:
        DataError: the images cannot be read.
    """
    where = pick_device(device)
    detector, info = _load(find_detector(checkpoint, None if which == "both" else which))
    try:
        records = list_images(images)
        files = {r.id: str(r.path) for r in records}
        rows = []
        for batch, predictions in predict_all({"it": detector.to(where)}, EvalLoader(records, views_of(info)), where, score_thr, TOPK):
            for image_id, target in zip(batch.image_ids, predictions["it"], strict=True):
                names = [info.classes[c] for c in target["labels"].tolist()]
                rows.append(
                    {"file": files[image_id], "boxes": target["boxes"].tolist(), "classes": names, "scores": target["scores"].tolist()}
                )
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error
    return rows
