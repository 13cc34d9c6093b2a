"""Sources of unlabelled images. Whatever the source holds beside images, annotations included, is never read."""

from __future__ import annotations

import glob
from pathlib import Path

from .coco import check_unique_ids, find_images_dir, image_record, load_coco
from .image_io import SUFFIXES, is_image
from .records import ImageRecord


def list_images(source: str | Path) -> list[ImageRecord]:
    """Lists the images of a folder (recursively), a txt list, a glob pattern, a COCO json, or a single file.

    Args:
        source: What to list. Lines of a txt file are relative to its folder; empty lines and lines that start with # are skipped.
            Of a COCO json only the list of images is used.

    Returns:
        Records in sorted order (json: in its own order, with its ids and sizes), ids from 0.

    Raises:
        FileNotFoundError: If the source or a listed file does not exist.
        ValueError: If there is no image.
    """
    path = Path(source)
    if path.suffix.lower() == ".json" and path.is_file():
        return _from_coco(path)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if is_image(f) and f.is_file())
    elif path.suffix.lower() == ".txt" and path.is_file():
        files = _from_list(path)
    elif path.is_file() and is_image(path):
        files = [path]
    elif glob.has_magic(str(source)):
        files = sorted(f for name in glob.iglob(str(source), recursive=True) if is_image(f := Path(name)) and f.is_file())
    else:
        raise FileNotFoundError(f"{source} does not exist: expected a folder of images, a txt list, a glob pattern, or a COCO json")
    if not files:
        raise ValueError(f"{source} holds no image: expected files ending in {', '.join(SUFFIXES)} (any case)")
    return [ImageRecord(i, file) for i, file in enumerate(files)]


def _from_list(path: Path) -> list[Path]:
    lines = (line.strip() for line in path.read_text().splitlines())
    files = [path.parent / line for line in lines if line and not line.startswith("#")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{path} lists {len(missing)} files that do not exist, such as {', '.join(missing[:5])}")
    return files


def _from_coco(path: Path) -> list[ImageRecord]:
    raw = load_coco(path, needed=("images",))
    check_unique_ids([image["id"] for image in raw["images"]], path)
    folder = find_images_dir(raw, path)
    records = [image_record(image, folder) for image in raw["images"]]
    missing = [str(r.path) for r in records if not r.path.is_file()]
    if len(missing) == len(records):
        raise FileNotFoundError(f"{path}: none of its {len(records)} images exists, such as {', '.join(missing[:5])}")
    return records  # a few missing files are met, skipped and counted by the loader like unreadable ones
