"""`ssod-fast refine`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from ssod_fast.report.refined import write_pictures
from ssod_fast.training.files import require_writable
from ssod_fast.training.refine import RefinedSet, load_refiner, read_noisy, refine_set, write_refined
from ssod_fast.training.tree import ConfigError
from ssod_fast.training.validate import pick_device

from .output import Output


@dataclass(frozen=True)
class RefineOptions:
    """Corrects inaccurate boxes of a labelled set with the refiner of a run of SSD-Det, and writes COCO annotations for any detector."""

    # Folder of a run with --method ssd_det.
    run: Annotated[Positional[Path], arg(metavar="RUN")]
    # Set to correct, usually the one that the run was trained on: COCO json, YOLO data.yaml, or a COCO, YOLO or VOC folder.
    data: Annotated[Positional[Path], arg(metavar="DATA")]
    # Part of a folder.
    split: str = "train"
    # Pictures of given and refined boxes.
    pictures: int = 6
    # Images per batch.
    batch: int = 1
    # auto, cpu or cuda.
    device: str = "auto"
    # Loader processes.
    workers: int = 0
    # Folder to write to.
    out: Path = Path("refined")


def run(arguments: list[str], output: Output) -> int:
    """Writes the files and prints how far the boxes are from the clean ones, before and after, where those are known."""
    options = tyro.cli(RefineOptions, prog="ssod-fast refine", args=arguments)
    for name, least in (("pictures", 0), ("batch", 1), ("workers", 0)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    require_writable(options.out)
    refiner = load_refiner(options.run, pick_device(options.device))
    result = refine_set(read_noisy(options.data, refiner, options.split), refiner, options.batch, options.workers)
    file, manifest = write_refined(result, options.out, {"run": options.run.name, "data": result.given.source.name})
    pictures = write_pictures(result.given, result.refined, options.out / "pictures", options.pictures)
    shown = {"annotations": str(file), "pictures": [str(p) for p in pictures]}
    output.result({**manifest, **shown}, "\n".join([*describe(result), f"written to {file}, {len(pictures)} pictures beside it"]))
    return 0


def describe(result: RefinedSet) -> list[str]:
    """A few lines for people."""
    lines = [f"{result.moved.boxes} boxes of {len(result.given)} images refined: {_mean(result.moved.mean_iou)} IoU with the given ones"]
    if result.before is not None and result.after is not None:
        lines += [f"before: {result.before}", f"after:  {result.after}"]
        classes = (f"{name} {iou:.3f} -> {result.after.per_class[name]:.3f}" for name, iou in result.before.per_class.items())
        lines.append("by class: " + ", ".join(classes))
    if result.skipped:
        lines.append(f"{result.skipped} images could not be read: their boxes stay as they are")
    return lines


def _mean(value: float | None) -> str:
    return "no" if value is None else f"{value:.3f} mean"
