"""Labelled fractions of a data set, drawn by the protocols that published results use.

At least four incompatible draws are called "the COCO 10 % split". Every draw here is over positions in the source's image list, in its
order, and is recorded with its protocol, seed, image ids and hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .coco import check_unique_ids, load_coco
from .records import EXAMPLES, DetectionData, ImageRecord

PROTOCOLS = {"stac": "stac", "mmdet": "stac", "softteacher": "softteacher", "no_replacement": "softteacher"}
LISTED = ("ub_teacher", "from_file")
MAX_REDRAWS = 1000


@dataclass(frozen=True)
class SplitSource:
    """What a draw needs to know of a data set; the lists run in parallel, in the order of the source.

    Attributes:
        ids: Image ids.
        names: File names.
        classes: The classes that occur in each image, as labels or category ids; crowd regions do not count.
        all_classes: Every class of the data set that occurs at all, with its name.
        sha256: Hash of the source file, or None if it is none.
    """

    ids: list[int]
    names: list[str]
    classes: list[set[int]]
    all_classes: dict[int, str]
    sha256: str | None


@dataclass(frozen=True)
class Split:
    """A labelled and an unlabelled part that cover the data set.

    Attributes:
        labeled_ids: Image ids, sorted.
        unlabeled_ids: The others, sorted.
        manifest: How the draw was made, enough to repeat and to check it.
    """

    labeled_ids: list[int]
    unlabeled_ids: list[int]
    manifest: dict[str, Any]

    @property
    def tag(self) -> str:
        """`fold@percent`, the middle part of file names."""
        return f"{self.manifest['fold']}@{self.manifest['percent']}"

    @property
    def ids_hash(self) -> str:
        """SHA-256 of the labelled ids, what a training run records."""
        return str(self.manifest["labeled_sha256"])


@dataclass(frozen=True)
class SplitData:
    """The parts of a split in memory. `hidden` holds the truth of the unlabelled part and is for diagnostics alone."""

    labeled: DetectionData
    unlabeled: list[ImageRecord]
    hidden: DetectionData


def draw_split(
    data: DetectionData | SplitSource | dict[str, Any] | str | Path,
    percent: float,
    fold: int = 1,
    protocol: str = "softteacher",
    seed_offset: int = 0,
    cover_classes: bool = False,
    list_file: str | Path | None = None,
    index_base: str = "filtered",
) -> Split:
    """Draws a labelled fraction.

    Args:
        data: A data set, a COCO json, or its parsed content.
        percent: In (0, 100]; the number of images is int(percent / 100 * N), the formula of the official scripts.
        fold: 1-based fold, the seed of the draw (the run of `ub_teacher`'s list).
        protocol: "softteacher" (alias "no_replacement"), "stac" (alias "mmdet": with replacement, so fewer images than asked for),
            "ub_teacher" (reads `list_file`) or "from_file" (ids or file names in `list_file`).
        seed_offset: Added to the fold; SoftTeacher's own offset was a random shell number, so its folds cannot be drawn again.
        cover_classes: Redraw with seed + 1000 j until every class that occurs has a labelled image.
        list_file: For the two protocols that read one.
        index_base: For `ub_teacher`: "filtered" (positions among images with a box, sorted by id: detectron2) or "all" (the Paddle port).

    Raises:
        ValueError: If an argument is out of range, an image id occurs twice, the draw would be empty, or a list does not fit.
    """
    source = data if isinstance(data, SplitSource) else split_source(data)
    check_unique_ids(source.ids, "data")
    if not 0 < percent <= 100:
        raise ValueError(f"percent must lie in (0, 100], got {percent}")
    if protocol in PROTOCOLS:
        return _drawn(source, percent, fold, PROTOCOLS[protocol], seed_offset, cover_classes)
    if protocol not in LISTED:
        raise ValueError(f"protocol must be one of {', '.join((*PROTOCOLS, *LISTED))}, got {protocol!r}")
    if list_file is None:
        raise ValueError(f"protocol {protocol!r} needs list_file")
    if cover_classes:
        raise ValueError(f"cover_classes needs a drawn protocol, got {protocol!r}, whose list is fixed")
    from .split_lists import from_file, ub_teacher

    extra: dict[str, Any] = {}
    if protocol == "from_file":
        positions = from_file(source, Path(list_file))
    else:
        positions = ub_teacher(source, Path(list_file), percent, fold, index_base)
        extra["index_base"] = index_base
    extra["list_sha256"] = hashlib.sha256(Path(list_file).read_bytes()).hexdigest()
    return _split(source, positions, {"protocol": protocol, "percent": _short(percent), "fold": fold, **extra}, len(positions))


def split_source(data: DetectionData | dict[str, Any] | str | Path) -> SplitSource:
    """Reduces a data set to what a draw needs."""
    if isinstance(data, DetectionData):
        classes = [set(target["labels"].tolist()) for target in data.targets]
        names = dict(enumerate(data.classes))
        sha = hashlib.sha256(data.source.read_bytes()).hexdigest() if data.source.is_file() else None
        ids, files = [r.id for r in data.records], [r.path.name for r in data.records]
    else:
        raw = data if isinstance(data, dict) else load_coco(Path(data))
        sha = None if isinstance(data, dict) else hashlib.sha256(Path(data).read_bytes()).hexdigest()
        ids, files = [int(image["id"]) for image in raw["images"]], [str(image["file_name"]) for image in raw["images"]]
        names = {int(c["id"]): str(c.get("name", c["id"])) for c in raw["categories"]}
        present: dict[int, set[int]] = {i: set() for i in ids}
        for annotation in raw["annotations"]:
            image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
            if not annotation.get("iscrowd", 0) and image_id in present and category_id in names:
                present[image_id].add(category_id)
        classes = [present[i] for i in ids]
    occurring = set().union(*classes)
    return SplitSource(ids, files, classes, {c: n for c, n in names.items() if c in occurring}, sha)


def apply_split(data: DetectionData, split: Split) -> SplitData:
    """Cuts a data set in memory: the unlabelled part carries no target."""
    hidden = data.subset(split.unlabeled_ids, f"{data.name}-hidden")
    return SplitData(data.subset(split.labeled_ids, f"{data.name}-{split.tag}"), list(hidden.records), hidden)


def missing_classes(source: SplitSource, positions: Sequence[int]) -> list[str]:
    """Names of classes that occur in the data set, but in none of these images."""
    covered: set[int] = set().union(*(source.classes[p] for p in positions))
    return [name for c, name in source.all_classes.items() if c not in covered]


def _draw_stac(seed: int, n: int, k: int) -> list[int]:
    return [int(p) for p in np.random.RandomState(seed).choice(range(n), size=k)]


def _draw_softteacher(seed: int, n: int, k: int) -> list[int]:
    return [int(p) for p in np.random.RandomState(seed).choice(range(n), size=k, replace=False)]


DRAWS: dict[str, Callable[[int, int, int], list[int]]] = {"stac": _draw_stac, "softteacher": _draw_softteacher}


def _drawn(source: SplitSource, percent: float, fold: int, protocol: str, seed_offset: int, cover_classes: bool) -> Split:
    n = len(source.ids)
    k = int(percent / 100.0 * n)
    if k == 0:
        raise ValueError(f"percent too small: 0 of {n} images at {percent} %")
    seed = fold + seed_offset
    if not 0 <= seed < 2**32 - 1000 * MAX_REDRAWS:
        raise ValueError(f"fold + seed_offset must be >= 0 and small, got {fold} + {seed_offset}")
    for redraw in range(MAX_REDRAWS if cover_classes else 1):
        positions = DRAWS[protocol](seed + 1000 * redraw, n, k)
        missing = missing_classes(source, positions)
        if not (cover_classes and missing):
            how = {"protocol": protocol, "percent": _short(percent), "fold": fold, "seed": seed + 1000 * redraw}
            return _split(source, positions, {**how, "seed_offset": seed_offset, "redraws": redraw}, k)
    raise ValueError(
        f"cover_classes: {MAX_REDRAWS} draws of {k} of {n} images each missed a class (last: {', '.join(missing)}); "
        "raise percent or turn it off"
    )


def _split(source: SplitSource, positions: Sequence[int], how: dict[str, Any], requested: int) -> Split:
    """Turns drawn positions into ids and completes the manifest."""
    chosen = set(positions)
    if not chosen:
        raise ValueError("the draw holds no image")
    labeled = sorted(source.ids[p] for p in chosen)
    unlabeled = sorted(i for p, i in enumerate(source.ids) if p not in chosen)
    from .. import __version__

    manifest = {
        **how,
        "images": len(source.ids),
        "requested": requested,
        "unique": len(labeled),
        "missing_classes": missing_classes(source, sorted(chosen)),
        "labeled_ids": labeled,
        "labeled_sha256": ids_sha256(labeled),
        "source_sha256": source.sha256,
        "numpy": np.__version__,
        "ssod_fast": __version__,
    }
    return Split(labeled, unlabeled, manifest)


def ids_sha256(ids: Sequence[int]) -> str:
    """Hash of image ids joined by newlines, in the order given."""
    return hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest()


def _short(percent: float) -> int | float:
    """10.0 as 10, so that names read 1@10."""
    return int(percent) if float(percent).is_integer() else percent


def check_ids(source: SplitSource, wanted: Sequence[int]) -> list[int]:
    """Positions of image ids.

    Raises:
        ValueError: If an id is unknown.
    """
    position = {image_id: p for p, image_id in enumerate(source.ids)}
    unknown = [i for i in wanted if i not in position]
    if unknown:
        raise ValueError(f"list_file names {len(unknown)} images that the data set does not have, such as {unknown[:EXAMPLES]}")
    return [position[i] for i in wanted]
