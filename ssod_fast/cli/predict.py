"""`ssod-fast predict`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from ssod_fast.training.files import require_writable, write_json
from ssod_fast.training.tree import ConfigError
from ssod_fast.training.validate import predict

from .output import Output


@dataclass(frozen=True)
class PredictOptions:
    """Runs a detector on images and writes its boxes as JSON."""

    # Run folder, or one of its best_*.safetensors; of a folder the teacher if there is one.
    checkpoint: Annotated[Positional[Path], arg(metavar="CHECKPOINT")]
    # Folder, txt list, glob or COCO json.
    images: Annotated[Positional[str], arg(metavar="IMAGES")]
    # Model of a run folder; by default the teacher if there is one, else the student.
    which: Literal["teacher", "student"] | None = None
    # Scores below are left out.
    score_thr: float = 0.3
    # auto, cpu or cuda.
    device: str = "auto"
    # File to write; standard output without it.
    out: Path | None = None


def run(arguments: list[str], output: Output) -> int:
    """Boxes are xyxy in pixels of the original images."""
    options = tyro.cli(PredictOptions, prog="ssod-fast predict", args=arguments)
    if options.out is not None:
        _check_file(options.out)
    rows = predict(options.checkpoint, options.images, options.which or "both", options.score_thr, options.device)
    if options.out is None:
        print(json.dumps(rows))
        return 0
    write_json(options.out, rows)
    output.result({"file": str(options.out), "images": len(rows)}, f"{len(rows)} images: {options.out}")
    return 0


def _check_file(path: Path) -> None:
    """Finds out before the work whether its result can be written."""
    if path.is_dir():
        raise ConfigError(f"--out must be a file, got the folder {path}")
    require_writable(path.parent)
