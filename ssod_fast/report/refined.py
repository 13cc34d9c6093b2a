"""Pictures of corrected boxes: given, refined and, where known, clean ones on the image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssod_fast.data.image_io import UnreadableImageError, read_image
from ssod_fast.data.records import DetectionData
from ssod_fast.report.previews import pick

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

MAX_SIDE = 1024  # pixels of a picture
MARGIN = 22  # for the legend below it
# Bright, and apart for colour-blind readers; drawn in this order, so that the refined box lies on top.
COLORS = {"clean": "#ffffff", "given": "#ff6f4f", "refined": "#3ddc97"}


def write_pictures(given: DetectionData, refined: DetectionData, folder: Path, count: int) -> list[Path]:
    """Writes JPEGs of `count` images with boxes, spread evenly over the set.

    Args:
        given: the set before.
        refined: the same images and rows after.
        folder: where to; made if there is something to write.
        count: number of pictures; fewer where there are fewer images with boxes.
    """
    rows = [i for i, target in enumerate(given.targets) if len(target["labels"])]
    written = []
    for row in rows[:1] if count == 1 else pick(rows, count):
        record, target = given.records[row], given.targets[row]
        layers = {"clean": target.get("clean_boxes"), "given": target["boxes"], "refined": refined.targets[row]["boxes"]}
        try:
            image = read_image(record.path, record.size)
        except UnreadableImageError:
            continue
        path = folder / f"{record.path.stem}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        _draw(image, {name: boxes.tolist() for name, boxes in layers.items() if boxes is not None}).save(path, quality=90)
        written.append(path)
    return written


def _draw(pixels: Any, layers: dict[str, list[list[float]]]) -> Any:
    """The image of uint8 [3, h, w] with its boxes, and a legend below."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    scale = min(1.0, MAX_SIDE / max(image.size))
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    canvas = Image.new("RGB", (image.width, image.height + MARGIN), "#202020")
    canvas.paste(image)
    brush = ImageDraw.Draw(canvas)
    for name, boxes in layers.items():
        for box in boxes:
            corners = [scale * v for v in box]
            brush.rectangle((*(round(v) for v in corners[:2]), *(round(v) for v in corners[2:])), outline=COLORS[name], width=2)
    canvas.paste("#202020", (0, image.height, image.width, image.height + MARGIN))  # over what reaches below the image
    _legend(brush, list(layers), image.height)
    return canvas


def _legend(brush: ImageDraw, names: list[str], top: int) -> None:
    x = 8.0
    for name in names:
        brush.rectangle((x, top + 6, x + 12, top + 16), outline=COLORS[name], width=2)
        brush.text((x + 18, top + 5), name, fill=COLORS[name])
        x += 30 + brush.textlength(name)
