"""`ssod-fast split`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

from ssod_fast.data.coco import find_coco_json
from ssod_fast.data.split import LISTED, draw_split
from ssod_fast.data.split_files import write_split
from ssod_fast.training.files import require_writable
from ssod_fast.training.sets import DataError

from .output import Output


@dataclass(frozen=True)
class SplitOptions:
    """Draws labelled parts of a COCO set and writes them: labelled, unlabelled (without annotations), hidden truth, manifest."""

    # COCO json, or a folder that holds one (its train split where it has several).
    annotations: Annotated[Positional[Path], arg(metavar="JSON")]
    # Shares to label, per cent.
    percent: tuple[float, ...] = (10.0,)
    # Number of folds: 1 to this.
    folds: int = 5
    # One fold alone.
    fold: int | None = None
    # softteacher (no_replacement), stac (mmdet), ub_teacher or from_file.
    protocol: str = "softteacher"
    # Added to the seed of the draw.
    seed_offset: int = 0
    # Draw again until every class has a labelled image; off for the published draws as they are.
    cover_classes: bool = True
    # List that ub_teacher and from_file read.
    list_file: Path | None = None
    # Folder to write to.
    out: Path = Path("splits")


def run(arguments: list[str], output: Output) -> int:
    """Writes the files and prints counts and id hashes."""
    options = tyro.cli(SplitOptions, prog="ssod-fast split", args=arguments)
    folds = range(1, options.folds + 1) if options.fold is None else (options.fold,)
    require_writable(options.out)
    try:
        source = find_coco_json(options.annotations, "train")
        rows = [_write(options, source, percent, fold) for percent in options.percent for fold in folds]
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error
    lines = [f"{r['fold']}@{r['percent']:g}: {r['labeled']} labelled, {r['unlabeled']} unlabelled, ids {r['sha256'][:12]}" for r in rows]
    output.result({"out": str(options.out), "splits": rows}, "\n".join([*lines, f"written to {options.out}"]))
    return 0


def _write(options: SplitOptions, source: Path, percent: float, fold: int) -> dict[str, Any]:
    cover = options.cover_classes and options.protocol not in LISTED  # a list is what it is
    split = draw_split(source, percent, fold, options.protocol, options.seed_offset, cover, options.list_file)
    files = write_split(source, options.out, split)
    counts = {"labeled": len(split.labeled_ids), "unlabeled": len(split.unlabeled_ids)}
    return {"percent": percent, "fold": fold, **counts, "sha256": split.ids_hash, "files": dataclasses.asdict(files)}
