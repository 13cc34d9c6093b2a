"""`ssod-fast val`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from ssod_fast.training.validate import Which, metrics_table, validate

from .output import Output


@dataclass(frozen=True)
class ValOptions:
    """Evaluates the detectors of a run on a labelled set."""

    # Run folder, or one of its best_*.safetensors.
    checkpoint: Annotated[Positional[Path], arg(metavar="CHECKPOINT")]
    # COCO json, YOLO data.yaml, or a COCO, YOLO or VOC folder.
    data: Annotated[Positional[Path], arg(metavar="DATA")]
    # Models of a run folder.
    which: Which = "both"
    # Which annotation file of a folder.
    split: str = "val"
    # Detections at or below it are not evaluated; it moves AP, so it is printed.
    score_thr: float = 1e-3
    # auto, cpu or cuda.
    device: str = "auto"
    # Loader processes.
    workers: int = 0


def run(arguments: list[str], output: Output) -> int:
    """Prints the 12 COCO numbers and AP per class."""
    options = tyro.cli(ValOptions, prog="ssod-fast val", args=arguments)
    results = validate(options.checkpoint, options.data, options.which, options.split, options.score_thr, options.device, options.workers)
    metrics = results[0].metrics
    header = f"{metrics.images} images, scores above {options.score_thr:g}, top 100, {metrics.backend}; per cent\n"
    output.result({"score_thr": options.score_thr, "results": [r.to_dict() for r in results]}, header + metrics_table(results))
    return 0
