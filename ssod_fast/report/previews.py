"""Image strips: the same images at each evaluation, each JPEG embedded once, and the mixed inputs."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssod_fast.report import drawing
from ssod_fast.report.drawing import Frame
from ssod_fast.report.runs import Json, Run, last_value, series
from ssod_fast.report.tables import text

PREVIEW_FOLDER = "pseudo_preview"
MAX_RUNS = 4  # with images; more would make the page too heavy to send
MAX_STEPS = 4  # evaluations shown: first, two in the middle, last
MAX_IMAGES = 6  # images of one strip
MAX_IMAGES_OVERLAID = 4  # the same where several runs are shown
MAX_MIXED = 4  # mixed inputs of one evaluation
MAX_SIDE = 480  # pixels of an embedded JPEG
MAX_BYTES = 90_000  # of an embedded JPEG; larger files are encoded anew
KIND_NAMES = {"labeled": "labelled", "refined": "labelled, refined boxes"}  # the log is American; these boxes have no score
DEFAULT_THRESHOLD = 0.5  # split between strong and weak boxes where the run logged no threshold


@dataclass(frozen=True)
class Picture:
    """An image ready for the page: data URI and size in pixels of the file."""

    uri: str
    width: int
    height: int


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('previews need pillow: pip install "ssod-fast[train]"') from error
    return Image


def load_picture(path: Path) -> Picture | None:
    """Reads a JPEG for embedding, shrunk when it is large; None when it is missing or unreadable."""
    pillow = _pillow()
    try:
        with pillow.open(path) as image:
            image.load()
            width, height = image.size
            data = path.read_bytes()
            if max(width, height) > MAX_SIDE or len(data) > MAX_BYTES or image.format != "JPEG":
                data = _encode(image)
    except OSError:
        return None
    return Picture("data:image/jpeg;base64," + base64.b64encode(data).decode("ascii"), width, height)


def _encode(image: Any) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=78)
    return buffer.getvalue()


def pick(items: Sequence[Any], count: int) -> list[Any]:
    """`count` items spread evenly from the first to the last; all if there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _steps(folder: Path, stem: str) -> list[tuple[int, Path]]:
    found = ((re.fullmatch(rf"{stem}_(\d+)\.json", path.name), path) for path in sorted(folder.glob(f"{stem}_*.json")))
    return [(int(match[1]), path) for match, path in found if match]


def _read_list(path: Path) -> list[Json]:
    """The entries of a preview file, empty when it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return []
    return [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []


# --- the same images at each evaluation ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Strip:
    steps: list[int]
    entries: dict[tuple[int, Any], Json]  # (iteration, image id) -> entry
    image_ids: list[Any]


def _read_strip(folder: Path) -> _Strip | None:
    found = [(it, _read_list(path)) for it, path in _steps(folder, "step")]
    found = pick([(it, entries) for it, entries in found if entries], MAX_STEPS)
    if not found:
        return None
    entries = {(it, entry.get("image_id")): entry for it, rows in found for entry in rows}
    image_ids = list(dict.fromkeys(entry.get("image_id") for entry in found[-1][1]))
    return _Strip([it for it, _ in found], entries, image_ids)


def threshold_of(run: Run) -> float:
    """The score threshold of the pseudo labels as the run logged it last."""
    value = last_value(series(run.quality, "thr"))
    return value if math.isfinite(value) else DEFAULT_THRESHOLD


def strip(run: Run, prefix: str, max_images: int = MAX_IMAGES) -> str:
    """Rows of images, one column for each of up to four evaluations; empty text when the run has no previews.

    Args:
        run: the run.
        prefix: unique on the page; starts the ids of the embedded images.
        max_images: rows.
    """
    folder = run.folder / PREVIEW_FOLDER
    shown = _read_strip(folder)
    if shown is None:
        return ""
    rows = [_strip_row(run, shown, image_id, f"{prefix}-{i}", folder) for i, image_id in enumerate(shown.image_ids[:max_images])]
    return f'<div class="strip" style="--columns: {len(shown.steps)}">{"".join(rows)}</div>'


def _strip_row(run: Run, shown: _Strip, image_id: Any, key: str, folder: Path) -> str:
    entries = [(it, shown.entries[it, image_id]) for it in shown.steps if (it, image_id) in shown.entries]
    image = load_picture(folder / "images" / Path(str(entries[0][1].get("file"))).name) if entries else None
    if image is None:
        return f'<p class="missing">Image {text(image_id)} cannot be read.</p>'
    height, width = entries[0][1].get("hw") or (image.height, image.width)
    frame, threshold = Frame(float(width), float(height)), threshold_of(run)
    shared = f'<image id="{key}" href="{image.uri}" width="{width:g}" height="{height:g}" preserveAspectRatio="none"/>'
    cells = [
        f"<figure>{drawing.picture(frame, f'#{key}', drawing.layers(entry, run.classes, frame, threshold), _words(entry, it, threshold))}"
        f"<figcaption>iteration {it}</figcaption></figure>"
        for it, entry in entries
    ]
    return f'<div class="row"><svg class="store" aria-hidden="true">{shared}</svg>{"".join(cells)}</div>'


def _words(entry: Json, it: int, threshold: float) -> str:
    kept = len(drawing.above(drawing.rows(entry.get("teacher")), threshold))
    truth = f", {len(drawing.rows(entry['truth']))} true objects" if entry.get("truth") else ""
    return f"image {entry.get('image_id')} at iteration {it}: {kept} boxes above the threshold{truth}"


# --- what the student was fed -------------------------------------------------------------------------------------------------------


def mixed(run: Run) -> str:
    """The batches that the student really saw, with their boxes, at the first and the last evaluation that has mixed ones."""
    folder = run.folder / PREVIEW_FOLDER
    found = [(it, _read_list(path)) for it, path in _steps(folder, "mixed")]
    found = [(it, entries) for it, entries in found if entries]
    with_mixes = [(it, entries) for it, entries in found if any(entry.get("kind") != "labeled" for entry in entries)]
    shown = pick(with_mixes, 2) or found[-1:]
    cells = [
        cell for it, entries in shown for entry in _one_of_each_kind(entries) for cell in [_mixed_cell(run, folder, it, entry)] if cell
    ]
    return f'<div class="mixed">{"".join(cells)}</div>' if cells else ""


def _one_of_each_kind(entries: list[Json]) -> list[Json]:
    """A selection that shows every kind of input before it repeats one."""
    seen: dict[str, int] = {}
    order = []
    for i, entry in enumerate(entries):
        kind = str(entry.get("kind"))
        seen[kind] = seen.get(kind, -1) + 1
        order.append((seen[kind], i))
    return [entries[i] for _, i in sorted(order)[:MAX_MIXED]]


def _mixed_cell(run: Run, folder: Path, it: int, entry: Json) -> str:
    image = load_picture(folder / Path(str(entry.get("file"))).name)
    if image is None:
        return ""
    kind = KIND_NAMES.get(str(entry.get("kind")), str(entry.get("kind")))
    found = drawing.rows({**entry, "scores": None} if entry.get("kind") in KIND_NAMES else entry)
    frame = Frame(image.width, image.height)
    body = f'<g class="teacher">{drawing.named_boxes(found, run.classes, frame)}</g>'
    words = f"{kind}, iteration {it}, {len(found)} box{'es' if len(found) != 1 else ''}"
    return f"<figure>{drawing.picture(frame, image.uri, body, words)}<figcaption>{text(words)}</figcaption></figure>"
