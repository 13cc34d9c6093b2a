"""Splits that are read from a file: Unbiased Teacher's public seed list, and plain lists of ids or names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .split import SplitSource


def from_file(source: SplitSource, file: Path) -> list[int]:
    """Positions of the images that a file names, one per line or as a json list, by id or by file name.

    Raises:
        ValueError: If an entry is unknown, or the file names no image.
    """
    from .split import check_ids

    text = file.read_text()
    entries = json.loads(text) if text.lstrip().startswith("[") else [line.strip() for line in text.splitlines() if line.strip()]
    if not entries:
        raise ValueError(f"{file} names no image")
    by_name = {Path(name).name: image_id for name, image_id in zip(source.names, source.ids, strict=True)}
    wanted = [_to_id(entry, by_name) for entry in entries]
    unknown = [str(entry) for entry, image_id in zip(entries, wanted, strict=True) if image_id is None]
    if unknown:
        raise ValueError(f"{file} names {len(unknown)} images that the data set does not have, such as {', '.join(unknown[:5])}")
    return check_ids(source, [i for i in wanted if i is not None])


def _to_id(entry: Any, by_name: dict[str, int]) -> int | None:
    name = Path(str(entry)).name
    if name in by_name:
        return by_name[name]
    return int(entry) if str(entry).lstrip("-").isdigit() else None


def ub_teacher(source: SplitSource, file: Path, percent: float, run: int, index_base: str) -> list[int]:
    """Positions from Unbiased Teacher's list file (json: percent -> run -> indices).

    Args:
        source: The data set.
        file: The list file.
        percent: A percent of the file, such as 10.
        run: A run of the file, such as 1.
        index_base: "filtered": indices count images with a non-crowd box, sorted by id (what detectron2 trains on); "all": the whole list.

    Raises:
        ValueError: If the file lacks the percent or run, its length does not fit, or an index is out of range.
    """
    if index_base not in ("filtered", "all"):
        raise ValueError(f'index_base must be "filtered" or "all", got {index_base!r}')
    lists = json.loads(file.read_text())
    per_run = next((value for key, value in lists.items() if float(key) == float(percent)), None)
    if per_run is None:
        raise ValueError(f"percent must be one of {file}: {', '.join(lists)}, got {percent}")
    if str(run) not in per_run:
        raise ValueError(f"fold must be a run of {file}: {', '.join(per_run)}, got {run}")
    indices = [int(i) for i in per_run[str(run)]]
    filtered = sorted((p for p, c in enumerate(source.classes) if c), key=lambda p: source.ids[p])
    base = filtered if index_base == "filtered" else list(range(len(source.ids)))
    _check_list(file, indices, percent, len(base), index_base)
    return [base[i] for i in indices]


def _check_list(file: Path, indices: list[int], percent: float, n: int, index_base: str) -> None:
    outside = [i for i in indices if not 0 <= i < n]
    if outside:
        raise ValueError(f"{file}: indices must lie in [0, {n}), the {index_base} image list, got {outside[:5]}")
    expected = int(percent / 100.0 * n)
    # The list was drawn from 117,266 images; index_base="all" applies the same numbers to a longer list on purpose.
    if index_base == "filtered" and len(indices) != expected:
        other = 'index_base="all" reproduces the Paddle port'
        raise ValueError(
            f"{file} has {len(indices)} indices at {percent} %, {expected} fit the {n} filtered images of this data set ({other})"
        )
