"""`ssod-fast noise`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from ssod_fast.data.noise import NoiseConfig, NoiseFiles, write_noise
from ssod_fast.training.files import require_writable
from ssod_fast.training.sets import DataError
from ssod_fast.training.tree import ConfigError

from .output import Output


@dataclass(frozen=True)
class NoiseOptions:
    """Moves the boxes of a labelled set at random, as papers on inaccurate annotations do, and writes COCO annotations and a manifest."""

    # COCO json, YOLO data.yaml, or a COCO, YOLO or VOC folder.
    data: Annotated[Positional[Path], arg(metavar="DATA")]
    # Largest shift and change of size as a share of the side.
    level: float = 0.4
    # Seed of the draws; published noise has 45.
    seed: int = 45
    # official: boxes end at the last pixel (W - 1, H - 1), as in the published generator; image: at the border of the image.
    clip: Literal["official", "image"] = "official"
    # Part of a folder; by default train, of VOC trainval.
    split: str | None = None
    # Format of a folder that could be read as several.
    format: Literal["coco", "yolo", "voc"] | None = None
    # Folder to write to.
    out: Path = Path("noisy")


def run(arguments: list[str], output: Output) -> int:
    """Writes the files and prints how far the boxes are from the clean ones."""
    options = tyro.cli(NoiseOptions, prog="ssod-fast noise", args=arguments)
    try:
        config = NoiseConfig(options.level, options.seed, options.clip)
    except ValueError as error:
        raise ConfigError(str(error).replace("noise_", "--")) from error
    require_writable(options.out)
    try:
        files = write_noise(options.data, options.out, config, options.split, options.format)
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error
    output.result({**files.manifest, "annotations": str(files.annotations), "manifest": str(files.manifest_file)}, describe(files))
    return 0


def describe(files: NoiseFiles) -> str:
    """A few lines for people."""
    m = files.manifest
    classes = ", ".join(f"{name} {iou:.3f}" for name, iou in files.noise.accuracy.per_class.items())
    lines = [
        f"noise {m['noise_level']:g}, seed {m['noise_seed']}, {m['noise_clip']} clip: {files.noise.accuracy}",
        f"by class: {classes}" if classes else "",
        *(f"kept clean: {line}" for line in str(files.noise.report).splitlines() if files.noise.report),
        f"boxes sha256 {m['boxes_sha256']}",
        f"written to {files.annotations} and {files.manifest_file.name}",
    ]
    return "\n".join(line for line in lines if line)
