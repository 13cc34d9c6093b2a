"""Boxes as SVG over a picture, in layers that the page can switch off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ssod_fast.report.runs import Json
from ssod_fast.report.tables import text

MAX_BOXES = 60  # of one layer of one picture
MAX_WEAK = 6  # of them below the score threshold; more would only hide the picture
UNITS = 300.0  # line widths and text are given for a picture whose longer side is so many pixels wide
# Bright hues that stand out on photographs and stay apart for colour-blind readers; the class name stands beside the box.
CLASS_COLORS = ("#ffb000", "#56b4e9", "#ff6f4f", "#3ddc97", "#f0e442", "#e58fc4", "#b9a7ff", "#ffffff")

Row = tuple[list[float], int, float | None]  # box xyxy, label, score


@dataclass(frozen=True)
class Frame:
    """The picture that boxes are drawn in; width and height in its own pixels."""

    width: float
    height: float

    @property
    def unit(self) -> float:
        """Pixels of this picture in one unit of line width and text size."""
        return max(self.width, self.height) / UNITS


def rows(boxes: Json | None) -> list[Row]:
    """Boxes of one layer by falling score; those with non-finite numbers are left out."""
    if not isinstance(boxes, dict):
        return []
    corners, labels = boxes.get("boxes") or [], boxes.get("labels") or []
    scores = boxes.get("scores") or [None] * len(corners)
    found = [(box, int(label), score) for box, label, score in zip(corners, labels, scores, strict=False) if _is_drawable(box, score)]
    return sorted(found, key=lambda row: -(1.0 if row[2] is None else row[2]))[:MAX_BOXES]


def _is_drawable(box: Any, score: Any) -> bool:
    finite = len(box) == 4 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in box)
    return finite and (score is None or isinstance(score, (int, float)))


def above(found: Sequence[Row], threshold: float) -> list[Row]:
    """Boxes above the score threshold; boxes without a score are certain."""
    return [row for row in found if row[2] is None or row[2] > threshold]


def _below(found: Sequence[Row], threshold: float) -> list[Row]:
    """The best of the boxes that miss the threshold by no more than its half."""
    return [row for row in found if row[2] is not None and threshold / 2 < row[2] <= threshold][:MAX_WEAK]


def _rect(box: Sequence[float], attributes: str) -> str:
    x1, y1, x2, y2 = box
    return f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{max(0.0, x2 - x1):.1f}" height="{max(0.0, y2 - y1):.1f}" {attributes}/>'


def _color(label: int) -> str:
    return CLASS_COLORS[label % len(CLASS_COLORS)]


def _name(label: int, classes: Sequence[str]) -> str:
    return classes[label] if 0 <= label < len(classes) else f"class {label}"


def _solid(row: Row, frame: Frame, width: float) -> str:
    box, label, score = row
    opacity = 1.0 if score is None else 0.35 + 0.65 * score
    return _rect(box, f'stroke="{_color(label)}" stroke-width="{width * frame.unit:.2f}" stroke-opacity="{opacity:.2f}"')


def _caption(row: Row, classes: Sequence[str], frame: Frame) -> str:
    """Class and score at the upper edge of a box; the text grows to the left where it would leave the picture on the right."""
    (x1, y1, x2, _), label, score = row
    words = _name(label, classes) + ("" if score is None else f" {score:.2f}".replace(" 0.", " ."))
    unit, at_end = frame.unit, x1 > 0.6 * frame.width
    x = min(x2, frame.width) - unit if at_end else max(0.0, x1) + unit
    y = y1 - 3 * unit if y1 > 13 * unit else max(0.0, y1) + 11 * unit
    anchor = ' text-anchor="end"' if at_end else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" stroke-width="{2.6 * unit:.1f}" fill="{_color(label)}"{anchor}>{text(words)}</text>'


def named_boxes(found: Sequence[Row], classes: Sequence[str], frame: Frame) -> str:
    """Bold boxes with class and score, the best on top."""
    return "".join(_solid(row, frame, 2.2) + _caption(row, classes, frame) for row in reversed(found))


def layers(entry: Json, classes: Sequence[str], frame: Frame, threshold: float) -> str:
    """Truth dashed, student dotted, teacher solid: bold and named above the threshold, pale below it."""
    unit = frame.unit
    dashes = f'stroke-width="{1.5 * unit:.2f}" stroke-dasharray="{5 * unit:.1f} {4 * unit:.1f}"'
    dots = f'stroke-width="{1.6 * unit:.2f}" stroke-dasharray="{1.2 * unit:.1f} {2.4 * unit:.1f}"'
    truth = "".join(_rect(box, dashes) for box, _, _ in rows(entry.get("truth")))
    student = "".join(_rect(box, f'stroke="{_color(label)}" {dots}') for box, label, _ in above(rows(entry.get("student")), threshold))
    found = rows(entry.get("teacher"))
    weak = "".join(_solid(row, frame, 0.9) for row in _below(found, threshold))
    teacher = weak + named_boxes(above(found, threshold), classes, frame)
    return f'<g class="truth">{truth}</g><g class="student">{student}</g><g class="teacher">{teacher}</g>'


def picture(frame: Frame, href: str, body: str, alt: str) -> str:
    """A picture with layers; `href` is a data URI or, after a #, the id of an image that the page already holds."""
    size = f'width="{frame.width:g}" height="{frame.height:g}"'
    image = f'<use href="{href}"/>' if href.startswith("#") else f'<image href="{href}" {size} preserveAspectRatio="none"/>'
    view = f'style="--unit: {frame.unit:.3f}px" viewBox="0 0 {frame.width:g} {frame.height:g}"'
    return f'<svg class="shot" role="img" aria-label="{text(alt)}" {view}>{image}{body}</svg>'
