"""Corrects the boxes of a labelled set with the refiner of a finished run; the work behind `ssod-fast refine`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssod_fast.data.box_accuracy import BoxAccuracy, box_accuracy
from ssod_fast.data.export import as_coco, xywh
from ssod_fast.data.geometry import map_boxes
from ssod_fast.data.loader import EvalLoader
from ssod_fast.data.records import DetectionData
from ssod_fast.data.views import ViewConfig
from ssod_fast.methods.ssd_det import Refiner, refine
from ssod_fast.structures import Target

from .build import build_method, build_student
from .checkpoint import has_last, load_detector, load_last
from .config import TrainConfig, config_from_tree, read_tree
from .files import write_json, write_text
from .run_folder import last_path
from .sets import DataError, read_evaluation_set
from .tree import ConfigError

# Boxes and images of a set, as `refine` of SSD-Det takes and gives them: views of several images and their targets to refined targets.
Refine = Callable[[list[torch.Tensor], list[Target]], list[Target]]


@dataclass(frozen=True)
class SavedRefiner:
    """A refiner ready to run.

    Attributes:
        run: function from views and targets to refined targets.
        classes: class names by label that it was trained with.
        views: supplies the test size.
        device: where it computes.
    """

    run: Refine
    classes: list[str]
    views: ViewConfig
    device: torch.device


@dataclass(frozen=True)
class RefinedSet:
    """A labelled set before and after.

    Attributes:
        given: as read.
        refined: the same images and rows with corrected boxes and a score for each.
        before: overlap of the given boxes with the clean ones; None where those are unknown.
        after: the same of the refined boxes.
        moved: overlap of the refined boxes with the given ones.
        skipped: images that could not be read, whose boxes stay as they are.
    """

    given: DetectionData
    refined: DetectionData
    before: BoxAccuracy | None
    after: BoxAccuracy | None
    moved: BoxAccuracy
    skipped: int


def load_refiner(run: Path, device: torch.device) -> SavedRefiner:
    """Student and refiner of a run as they were at its last checkpoint. A run that was not evaluated yet needs its starting weights.

    Raises:
        FileNotFoundError: no run there, or one without a checkpoint.
        ConfigError: a run of a method that has no refiner, or one whose starting weights are needed and gone.
    """
    if not (run / "config.yaml").is_file() or not has_last(last_path(run)):
        raise FileNotFoundError(f"no refiner at {run}: expected the folder of a run with config.yaml and weights/last.pt")
    config = config_from_tree(read_tree(run / "config.yaml"))
    state, _ = load_last(last_path(run))
    model = build_method(config, _structure(run, config, state["classes"]), rank=0)
    refiner = model.trainable
    if not isinstance(refiner, Refiner):
        raise ConfigError(f"{run} is a run of --method {config.method_name}, which has no refiner: train one with --method ssd_det")
    state["model"]["_extra_state"]["method"] = state["ranks"][0]["method"]
    model.load_state_dict(state["model"])
    model.to(device)
    return SavedRefiner(lambda images, targets: refine(model.student, refiner, images, targets), state["classes"], config.views, device)


def _structure(run: Path, config: TrainConfig[Any], classes: list[str]) -> Any:
    """A detector of the run's structure, which follows from its options and from the weights that it started from."""
    saved = sorted(last_path(run).parent.glob("best_*.safetensors"))
    if saved:  # these say it all; the starting weights may be gone
        return load_detector(saved[0])[0]
    return build_student(dataclasses.replace(config, init_from=None), classes, lambda _: None)


def read_noisy(path: Path, refiner: SavedRefiner, split: str = "train") -> DetectionData:
    """The set whose boxes are to be corrected, its labels in the order of the refiner's classes.

    Raises:
        DataError: it cannot be read, or has other classes.
    """
    try:
        data = read_evaluation_set(path, refiner.classes, split)
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error
    if list(data.classes) != refiner.classes:
        known, found = ", ".join(refiner.classes), ", ".join(data.classes)
        raise DataError(f"the refiner knows the classes {known}, but {data.source} has {found}: they must be the same")
    return data


def refine_set(data: DetectionData, refiner: SavedRefiner, batch_size: int = 1, workers: int = 0) -> RefinedSet:
    """Runs the refiner over every image with its boxes.

    Args:
        data: the set, labels as :func:`read_noisy` gives them.
        refiner: a refiner.
        batch_size: images per batch.
        workers: loader processes.
    """
    loader = EvalLoader(data, refiner.views, batch_size, workers)
    given = {record.id: target for record, target in zip(data.records, data.targets, strict=True)}
    found: dict[int, Target] = {}
    for batch in loader:
        views = batch.to(refiner.device)
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in batch.images]
        matrices = [matrix.numpy() for matrix in batch.matrix]
        inside = [_move(given[i], m, hw, refiner.device) for i, m, hw in zip(batch.image_ids, matrices, sizes, strict=True)]
        results = refiner.run(views.images, inside)
        for i, matrix, hw, result in zip(batch.image_ids, matrices, batch.original_hw, results, strict=True):
            found[i] = _move_back(given[i], result, np.linalg.inv(matrix), hw)
    targets = [found.get(record.id, _unrefined(target)) for record, target in zip(data.records, data.targets, strict=True)]
    areas = [(t["boxes"][:, 2:] - t["boxes"][:, :2]).prod(1) for t in targets]
    refined = dataclasses.replace(data, name=f"{data.name}-refined", targets=targets, areas=areas)
    return _compared(data, refined, len(data) - len(found))


def _move(target: Target, matrix: np.ndarray, size: tuple[int, int], device: torch.device) -> Target:
    """All boxes of a target in another frame, on `device`."""
    boxes, _ = map_boxes(target["boxes"], matrix, size)
    return Target(boxes=boxes.to(device), labels=target["labels"].to(device))


def _move_back(given: Target, result: Target, matrix: np.ndarray, size: tuple[int, int]) -> Target:
    """Refined boxes in pixels of the original, row by row; a box of which nothing would be left stays as it was given."""
    boxes, keep = map_boxes(result["boxes"].detach().float().cpu(), matrix, size)
    moved = given.copy()
    moved["boxes"] = torch.where(keep[:, None], boxes, given["boxes"])
    moved["scores"] = result["scores"].detach().float().cpu()
    return moved


def _unrefined(target: Target) -> Target:
    kept = target.copy()
    kept["scores"] = torch.zeros(len(target["labels"]))
    return kept


def _compared(given: DetectionData, refined: DetectionData, skipped: int) -> RefinedSet:
    labels = _joined(given, "labels")
    old, new = _joined(given, "boxes"), _joined(refined, "boxes")
    before = after = None
    if all("clean_boxes" in target for target in given.targets):
        clean = _joined(given, "clean_boxes")
        before, after = (box_accuracy(boxes, clean, labels, given.classes) for boxes in (old, new))
    return RefinedSet(given, refined, before, after, box_accuracy(new, old, labels, given.classes), skipped)


def _joined(data: DetectionData, key: str) -> torch.Tensor:
    return torch.cat([target[key] for target in data.targets])  # type: ignore[literal-required]


def write_refined(result: RefinedSet, folder: Path, about: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Writes corrected COCO annotations and a manifest.

    Each annotation has the refined box as `bbox`, the given one as `noisy_bbox`, the refiner's confidence as `refined_score` and, where it
    is known, the clean one as `true_bbox`.

    Args:
        result: what to write.
        folder: where to.
        about: further entries of the manifest.

    Returns:
        The json and the content of the manifest.
    """
    content = as_coco(result.refined, folder)
    rows = (row for row in content["annotations"] if not row["iscrowd"])
    for given, refined in zip(result.given.targets, result.refined.targets, strict=True):
        for box, score in zip(given["boxes"].tolist(), refined["scores"].tolist(), strict=True):
            next(rows).update(noisy_bbox=xywh(box), refined_score=round(score, 5))
    source = result.given.source
    file = folder / f"{source.stem if source.is_file() else result.given.name}_refined.json"
    write_text(file, json.dumps(content))
    boxes = _joined(result.refined, "boxes").numpy().astype("<f4").tobytes()
    manifest = {
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "boxes_sha256": hashlib.sha256(boxes).hexdigest(),
        **about,
        **{name: None if part is None else part.to_dict() for name, part in (("before", result.before), ("after", result.after))},
        "moved": result.moved.to_dict(),
        "skipped_images": result.skipped,
    }
    write_json(file.with_suffix(".manifest.json"), manifest)
    return file, manifest
