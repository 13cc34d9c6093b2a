"""`ssod-fast predict`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from ssod_fast.training.files import write_json
from ssod_fast.training.validate import Which, predict

from .output import Output


@dataclass(frozen=True)
class PredictOptions:
    """Runs a detector on images and writes its boxes as JSON."""

    # Run folder, or one of its best_*.safetensors; of a folder the teacher if there is one.
    checkpoint: Positional[Path]
    # Folder, txt list, glob or COCO json.
    images: Positional[str]
    # Model of a run folder.
    which: Which = "both"
    # Scores below are left out.
    score_thr: float = 0.3
    # auto, cpu or cuda.
    device: str = "auto"
    # File to write; standard output without it.
    out: Path | None = None


def run(arguments: list[str], output: Output) -> int:
    """Boxes are xyxy in pixels of the original images."""
    options = tyro.cli(PredictOptions, prog="ssod-fast predict", args=arguments)
    rows = predict(options.checkpoint, options.images, options.which, options.score_thr, options.device)
    if options.out is None:
        print(json.dumps(rows))
        return 0
    write_json(options.out, rows)
    output.result({"file": str(options.out), "images": len(rows)}, f"{len(rows)} images: {options.out}")
    return 0
