"""Image strips: boxes drawn as SVG over JPEGs that are embedded once, so that layers can be switched on the page."""

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

from ssod_fast.report.runs import Json, Run, last_value, series
from ssod_fast.report.tables import text

PREVIEW_FOLDER = "pseudo_preview"
MAX_RUNS = 4  # with images; more would make the page too heavy to send
MAX_STEPS = 4  # evaluations shown: first, two in the middle, last
MAX_IMAGES = 6  # images of one strip
MAX_MIXED = 4  # mixed inputs of one evaluation
MAX_BOXES = 60  # of one layer of one picture
MIN_SCORE = 0.05  # weaker boxes would only hide the picture
MAX_SIDE = 480  # pixels of an embedded JPEG
MAX_BYTES = 90_000  # of an embedded JPEG; larger files are encoded anew
UNITS = 300.0  # line widths and text are given for a picture whose longer side is so many pixels wide
DEFAULT_THRESHOLD = 0.5  # split between strong and weak boxes where the run logged no threshold
# Bright hues that stand out on photographs and stay apart for colour-blind readers; the class name stands beside the box.
CLASS_COLORS = ("#ffb000", "#56b4e9", "#ff6f4f", "#3ddc97", "#f0e442", "#e58fc4", "#b9a7ff", "#ffffff")


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


# --- boxes --------------------------------------------------------------------------------------------------------------------------


def _rows(boxes: Json | None) -> list[tuple[list[float], int, float | None]]:
    """(box, label, score) of one layer by falling score; boxes with non-finite numbers are left out."""
    if not isinstance(boxes, dict):
        return []
    corners, labels = boxes.get("boxes") or [], boxes.get("labels") or []
    scores = boxes.get("scores") or [None] * len(corners)
    rows = [(box, int(label), score) for box, label, score in zip(corners, labels, scores, strict=False) if _is_drawable(box, score)]
    rows.sort(key=lambda row: -(1.0 if row[2] is None else row[2]))
    return rows[:MAX_BOXES]


def _is_drawable(box: Any, score: Any) -> bool:
    finite = len(box) == 4 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in box)
    return finite and (score is None or (isinstance(score, (int, float)) and score >= MIN_SCORE))


def _rect(box: Sequence[float], attributes: str) -> str:
    x1, y1, x2, y2 = box
    return f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{max(0.0, x2 - x1):.1f}" height="{max(0.0, y2 - y1):.1f}" {attributes}/>'


def _name(label: int, classes: Sequence[str]) -> str:
    return classes[label] if 0 <= label < len(classes) else f"class {label}"


def _labelled_box(box: Sequence[float], label: int, score: float | None, classes: Sequence[str], unit: float, threshold: float) -> str:
    """A teacher box: colour by class; weak boxes are thin, pale and without text."""
    color = CLASS_COLORS[label % len(CLASS_COLORS)]
    is_kept = score is None or score > threshold
    opacity = 1.0 if score is None else 0.35 + 0.65 * score
    rect = _rect(box, f'stroke="{color}" stroke-width="{(2.2 if is_kept else 0.9) * unit:.2f}" stroke-opacity="{opacity:.2f}"')
    if not is_kept:
        return rect
    caption = _name(label, classes) + ("" if score is None else f" {score:.2f}".replace("0.", "."))
    x, y = box[0] + unit, box[1] - 3 * unit if box[1] > 13 * unit else box[1] + 11 * unit
    return rect + f'<text x="{x:.1f}" y="{y:.1f}" stroke-width="{2.6 * unit:.1f}" fill="{color}">{text(caption)}</text>'


def _student_box(box: Sequence[float], label: int, unit: float) -> str:
    color = CLASS_COLORS[label % len(CLASS_COLORS)]
    return _rect(box, f'stroke="{color}" stroke-width="{1.6 * unit:.2f}" stroke-dasharray="{1.2 * unit:.1f} {2.4 * unit:.1f}"')


def _layers(entry: Json, classes: Sequence[str], unit: float, threshold: float) -> str:
    dashes = f'stroke-width="{1.5 * unit:.2f}" stroke-dasharray="{5 * unit:.1f} {4 * unit:.1f}"'
    truth = "".join(_rect(box, dashes) for box, _, _ in _rows(entry.get("truth")))
    kept = [row for row in _rows(entry.get("student")) if row[2] is None or row[2] > threshold]
    student = "".join(_student_box(box, label, unit) for box, label, _ in kept)
    teacher = "".join(
        _labelled_box(box, label, score, classes, unit, threshold) for box, label, score in reversed(_rows(entry.get("teacher")))
    )
    return f'<g class="truth">{truth}</g><g class="student">{student}</g><g class="teacher">{teacher}</g>'


def _frame(width: float, height: float, href: str, body: str, alt: str) -> str:
    """A picture with layers; `href` is a data URI or the id of an image that the page already holds."""
    image = (
        f'<use href="{href}"/>'
        if href.startswith("#")
        else f'<image href="{href}" width="{width:g}" height="{height:g}" preserveAspectRatio="none"/>'
    )
    frame = f'style="--unit: {max(width, height) / UNITS:.3f}px" viewBox="0 0 {width:g} {height:g}"'
    return f'<svg class="shot" role="img" aria-label="{alt}" {frame}>{image}{body}</svg>'


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
    image_ids = list(dict.fromkeys(entry.get("image_id") for entry in found[-1][1]))[:MAX_IMAGES]
    return _Strip([it for it, _ in found], entries, image_ids)


def _alt(entry: Json, it: int, threshold: float) -> str:
    kept = sum(score is None or score > threshold for _, _, score in _rows(entry.get("teacher")))
    truth = f", {len(_rows(entry['truth']))} true objects" if entry.get("truth") else ""
    return text(f"image {entry.get('image_id')} at iteration {it}: {kept} boxes above the threshold{truth}")


def _size(entry: Json, picture: Picture) -> tuple[float, float]:
    """(width, height) of the original image, in whose pixels the boxes are."""
    hw = entry.get("hw") or (picture.height, picture.width)
    return float(hw[1]), float(hw[0])


def threshold_of(run: Run) -> float:
    """The score threshold of the pseudo labels as the run logged it last."""
    value = last_value(series(run.quality, "thr"))
    return value if math.isfinite(value) else DEFAULT_THRESHOLD


def strip(run: Run, prefix: str) -> str:
    """Rows of images, one column for each of up to four evaluations; empty text when the run has no previews."""
    folder = run.folder / PREVIEW_FOLDER
    shown = _read_strip(folder)
    if shown is None:
        return ""
    columns = len(shown.steps)
    rows = [_strip_row(run, shown, image_id, f"{prefix}-{i}", folder) for i, image_id in enumerate(shown.image_ids)]
    return f'<div class="strip" style="--columns: {columns}">{"".join(rows)}</div>'


def _strip_row(run: Run, shown: _Strip, image_id: Any, key: str, folder: Path) -> str:
    entries = [(it, shown.entries[it, image_id]) for it in shown.steps if (it, image_id) in shown.entries]
    picture = load_picture(folder / "images" / Path(str(entries[0][1].get("file"))).name) if entries else None
    if picture is None:
        return f'<p class="missing">Image {text(image_id)} cannot be read.</p>'
    width, height = _size(entries[0][1], picture)
    unit, threshold = max(width, height) / UNITS, threshold_of(run)
    image = f'<image id="{key}" href="{picture.uri}" width="{width:g}" height="{height:g}" preserveAspectRatio="none"/>'
    store = f'<svg class="store" aria-hidden="true">{image}</svg>'
    cells = [
        f"<figure>{_frame(width, height, f'#{key}', _layers(entry, run.classes, unit, threshold), _alt(entry, it, threshold))}"
        f"<figcaption>iteration {it}</figcaption></figure>"
        for it, entry in entries
    ]
    return f'<div class="row">{store}{"".join(cells)}</div>'


# --- mixed inputs -------------------------------------------------------------------------------------------------------------------


def mixed(run: Run) -> str:
    """The batches that the student really saw, with their boxes, at the first and the last evaluation."""
    folder = run.folder / PREVIEW_FOLDER
    found = [(it, _read_list(path)) for it, path in _steps(folder, "mixed")]
    shown = pick([(it, entries) for it, entries in found if entries], 2)
    cells = [
        cell for it, entries in shown for entry in _one_of_each_kind(entries) for cell in [_mixed_cell(run, folder, it, entry)] if cell
    ]
    return f'<div class="mixed">{"".join(cells)}</div>' if cells else ""


def _one_of_each_kind(entries: list[Json]) -> list[Json]:
    """A selection that shows every kind of input before it repeats one."""
    rank: dict[str, int] = {}
    order = []
    for i, entry in enumerate(entries):
        kind = str(entry.get("kind"))
        rank[kind] = rank.get(kind, -1) + 1
        order.append((rank[kind], i))
    return [entries[i] for _, i in sorted(order)[:MAX_MIXED]]


def _mixed_cell(run: Run, folder: Path, it: int, entry: Json) -> str:
    picture = load_picture(folder / Path(str(entry.get("file"))).name)
    if picture is None:
        return ""
    unit = max(picture.width, picture.height) / UNITS
    boxes = "".join(_labelled_box(box, label, score, run.classes, unit, 0.0) for box, label, score in _rows(entry))
    alt = text(f"{entry.get('kind')} input at iteration {it} with {len(_rows(entry))} boxes")
    frame = _frame(picture.width, picture.height, picture.uri, f'<g class="teacher">{boxes}</g>', alt)
    return f"<figure>{frame}<figcaption>{text(entry.get('kind', 'input'))}, iteration {it}, {len(_rows(entry))} boxes</figcaption></figure>"
