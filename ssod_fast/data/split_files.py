"""Writes a split as files: labelled, unlabelled without annotations, hidden truth, manifest."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .coco import find_coco_json, find_images_dir, load_coco
from .split import Split, draw_split, split_source


@dataclass(frozen=True)
class SplitFiles:
    """Paths of one written fold.

    Attributes:
        labeled: `<stem>.{fold}@{percent}.json`.
        unlabeled: `...-unlabeled.json`, whose `annotations` are empty.
        hidden: `...-hidden.json`, the truth of the unlabelled images, for diagnostics alone.
        manifest: `split.json`, shared by all folds of a folder.
    """

    labeled: Path
    unlabeled: Path
    hidden: Path
    manifest: Path


def write_split(source: str | Path, out_dir: str | Path, split: Split) -> SplitFiles:
    """Writes the four files of a split.

    Args:
        source: The COCO json the split was drawn from.
        out_dir: Where to; made if missing. The images stay where they are, and the files say where that is.
        split: The draw.

    Raises:
        ValueError: If `split` was drawn from another file.
    """
    file = Path(source)
    raw = load_coco(file)
    if split_source(file).sha256 != split.manifest["source_sha256"]:
        raise ValueError(f"split was drawn from another file than {file}: the SHA-256 differs")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{file.stem}.{split.tag}"
    files = SplitFiles(out / f"{stem}.json", out / f"{stem}-unlabeled.json", out / f"{stem}-hidden.json", out / "split.json")
    info = {**(raw.get("info") or {}), "images_dir": os.path.relpath(find_images_dir(raw, file), out), "split": split.tag}
    _write(files.labeled, _part(raw, set(split.labeled_ids), info))
    hidden = _part(raw, set(split.unlabeled_ids), info)
    _write(files.hidden, hidden)
    _write(files.unlabeled, {**hidden, "annotations": []})
    _add_to_manifest(files.manifest, file, split)
    return files


def split_main(
    source: str | Path,
    out_dir: str | Path,
    percent: float = 10.0,
    folds: int = 1,
    protocol: str = "softteacher",
    seed_offset: int = 0,
    cover_classes: bool = False,
    list_file: str | Path | None = None,
    index_base: str = "filtered",
) -> list[tuple[Split, SplitFiles]]:
    """Draws and writes folds 1 .. `folds`; what `ssod-fast split` calls.

    Args:
        source: A COCO json or a folder with one.
        out_dir: Where the files go.
        percent: Labelled share.
        folds: How many.
        protocol: See `draw_split`, like the remaining arguments.
        seed_offset: Added to each fold's seed.
        cover_classes: Redraw until no class is missed.
        list_file: For `ub_teacher` and `from_file`.
        index_base: For `ub_teacher`.

    Returns:
        The draws and the paths of their files.
    """
    if folds < 1:
        raise ValueError(f"folds must be >= 1, got {folds}")
    file = find_coco_json(Path(source))
    parsed = split_source(file)
    results = []
    for fold in range(1, folds + 1):
        split = draw_split(parsed, percent, fold, protocol, seed_offset, cover_classes, list_file, index_base)
        results.append((split, write_split(file, out_dir, split)))
    return results


def describe(split: Split) -> str:
    """One line for people, a second one if a class is missed."""
    m = split.manifest
    fewer = f" ({m['requested']} asked for, drawn with replacement)" if m["unique"] != m["requested"] else ""
    seed = f" seed {m['seed']}" if "seed" in m else ""
    text = f"{split.tag} {m['protocol']}{seed}: {m['unique']} of {m['images']} images labelled{fewer}, ids {m['labeled_sha256'][:12]}"
    missed = m["missing_classes"]
    return f"{text}\n  no labelled box of: {', '.join(missed)} (cover_classes redraws)" if missed else text


def _part(raw: dict[str, Any], ids: set[int], info: dict[str, Any]) -> dict[str, Any]:
    return {
        "info": info,
        "licenses": raw.get("licenses", []),
        "images": [image for image in raw["images"] if image["id"] in ids],
        "annotations": [a for a in raw["annotations"] if a.get("image_id") in ids],
        "categories": raw["categories"],
    }


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content))


def _add_to_manifest(file: Path, source: Path, split: Split) -> None:
    """Keeps the entries of other folds and percentages of the same source."""
    known = json.loads(file.read_text()) if file.is_file() else {}
    entries = known.get("splits", {}) if known.get("source_sha256") == split.manifest["source_sha256"] else {}
    entries[split.tag] = split.manifest
    content = {"source": source.name, "source_sha256": split.manifest["source_sha256"], "splits": entries}
    file.write_text(json.dumps(content, indent=1))
