"""Synthetic scenes with exact boxes: textured objects on textured grounds, long-tailed classes, small to large, partly hidden.

Every image is drawn by its own generator, seeded with (seed, split, index): image 7 is the same picture whether 10 or 1,000 are written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[Any]  # float32 [h, w], or [h, w, 3] where it says so
Rng = np.random.Generator


# Shapes: signed distance to the outline in units of the object's radius, negative inside; u to the right, v down.
def _disk(u: Plane, v: Plane) -> Plane:
    return np.hypot(u, v) - 0.95


def _square(u: Plane, v: Plane) -> Plane:
    return np.maximum(np.abs(u), np.abs(v)) - 0.8


def _triangle(u: Plane, v: Plane) -> Plane:
    return np.maximum(v - 0.6, 0.5 * (1.732 * np.abs(u) - v - 1.0))


def _ring(u: Plane, v: Plane) -> Plane:
    return np.abs(np.hypot(u, v) - 0.66) - 0.3


def _cross(u: Plane, v: Plane) -> Plane:
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - 0.34, b - 0.95), np.maximum(a - 0.95, b - 0.34))


def _star(u: Plane, v: Plane) -> Plane:
    outline: Plane = 0.7 + 0.25 * np.cos(5 * np.arctan2(v, u))
    return 0.8 * (np.hypot(u, v) - outline)


# Textures: share of the second colour in [0, 1]; p is the number of periods across the object.
def _stripes(u: Plane, v: Plane, p: float, rng: Rng) -> Plane:
    return (np.sin(np.pi * p * u) > 0).astype(np.float32)


def _checker(u: Plane, v: Plane, p: float, rng: Rng) -> Plane:
    return ((np.floor(p * u) + np.floor(p * v)) % 2).astype(np.float32)


def _dots(u: Plane, v: Plane, p: float, rng: Rng) -> Plane:
    return ((p * u % 1 - 0.5) ** 2 + (p * v % 1 - 0.5) ** 2 < 0.09).astype(np.float32)


def _rings(u: Plane, v: Plane, p: float, rng: Rng) -> Plane:
    return (np.sin(np.pi * 1.5 * p * np.hypot(u, v)) > 0).astype(np.float32)


def _gradient(u: Plane, v: Plane, p: float, rng: Rng) -> Plane:
    return np.clip(0.5 + 0.6 * u, 0, 1)


def _speckle(u: Plane, v: Plane, p: float, rng: Rng) -> Plane:
    return _cloud(u.shape, max(3, int(2 * p)), rng)


@dataclass(frozen=True)
class ObjectClass:
    """One class: its name, outline, surface and usual hue (0..1); hues of neighbouring classes overlap, so colour alone does not decide."""

    name: str
    shape: Callable[[Plane, Plane], Plane]
    texture: Callable[[Plane, Plane, float, Rng], Plane]
    hue: float


CLASSES: tuple[ObjectClass, ...] = (
    ObjectClass("striped_disk", _disk, _stripes, 0.02),
    ObjectClass("checker_square", _square, _checker, 0.17),
    ObjectClass("dotted_triangle", _triangle, _dots, 0.33),
    ObjectClass("ringed_cross", _cross, _rings, 0.50),
    ObjectClass("gradient_ring", _ring, _gradient, 0.66),
    ObjectClass("speckled_star", _star, _speckle, 0.83),
)


@dataclass(frozen=True)
class SceneConfig:
    """What a scene holds; sizes are fractions of the image's short side."""

    size: tuple[int, int] = (160, 192)  # (h, w); not square, so that swapped axes cannot go unnoticed
    objects: tuple[int, int] = (2, 6)  # per image, both ends included
    object_size: tuple[float, float] = (0.13, 0.55)  # log-uniform diameter: as many small as large objects per octave
    tail: float = 1.0  # class k is drawn with probability ~ (k + 1) ** -tail: the rarest of six classes has 7 % of the objects
    hue_spread: float = 0.10  # standard deviation around the class's hue; 1/6 would make colour useless
    tilt: float = 0.35  # objects turn by up to this many radians either way
    min_visible: float = 0.55  # an object is never hidden by more than the rest
    distractors: tuple[int, int] = (1, 4)  # plain shapes that belong to no class: only texture tells them apart
    noise: float = 5.0  # standard deviation of the sensor noise, in grey levels

    def __post_init__(self) -> None:
        if min(self.size) < 16:
            raise ValueError(f"size must be at least (16, 16), got {self.size}")
        if not 0 <= self.objects[0] <= self.objects[1]:
            raise ValueError(f"objects must be (low, high) with 0 <= low <= high, got {self.objects}")
        if not 0 < self.object_size[0] <= self.object_size[1] <= 1:
            raise ValueError(f"object_size must be (low, high) with 0 < low <= high <= 1, got {self.object_size}")


@dataclass(frozen=True)
class ScenePaths:
    """Where a generated data set lies."""

    root: Path
    images: Path
    train: Path
    val: Path


def write_scenes(
    out_dir: str | Path,
    n_train: int = 400,
    n_val: int = 100,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    config: SceneConfig | None = None,
    suffix: str = "png",
) -> ScenePaths:
    """Writes images/ and annotations/instances_{train,val}.json (COCO) below `out_dir`.

    Args:
        out_dir: Folder, made if missing; files of the same names are replaced.
        n_train: Number of training images.
        n_val: Number of validation images.
        seed: Same seed, same pixels.
        size: (h, w) in pixels, a shorthand for `config.size`.
        config: Contents of a scene; defaults to `SceneConfig()`.
        suffix: "png" (lossless) or "jpg" (faster to decode, quality 92).

    Returns:
        The paths of what was written.

    Raises:
        ValueError: If a count is negative or `suffix` is unknown.
    """
    if n_train < 0 or n_val < 0:
        raise ValueError(f"n_train and n_val must be >= 0, got {n_train} and {n_val}")
    if suffix not in ("png", "jpg"):
        raise ValueError(f'suffix must be "png" or "jpg", got {suffix!r}')
    config = config or SceneConfig()
    if size is not None:
        config = SceneConfig(**{**config.__dict__, "size": size})
    root = Path(out_dir)
    paths = ScenePaths(root, root / "images", *(root / "annotations" / f"instances_{s}.json" for s in ("train", "val")))
    paths.images.mkdir(parents=True, exist_ok=True)
    paths.train.parent.mkdir(parents=True, exist_ok=True)
    for number, (stem, count, target) in enumerate((("train", n_train, paths.train), ("val", n_val, paths.val))):
        scenes = ((f"{stem}_{i:05d}.{suffix}", *draw_scene(np.random.default_rng([seed, number, i]), config)) for i in range(count))
        target.write_text(json.dumps(_write_images(scenes, paths.images)))
    return paths


def _write_images(scenes: Any, folder: Path) -> dict[str, Any]:
    """Saves each picture and gathers the COCO dictionary."""
    from PIL import Image

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, pixels, boxes, labels in scenes:
        options: dict[str, Any] = {"quality": 92} if name.endswith("jpg") else {"compress_level": 1}
        Image.fromarray(pixels).save(folder / name, **options)
        image_id = len(images) + 1
        images.append({"id": image_id, "file_name": name, "height": pixels.shape[0], "width": pixels.shape[1]})
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label + 1, "bbox": box, "area": box[2] * box[3]}
            annotations.append({**row, "iscrowd": 0})
    categories = [{"id": k + 1, "name": c.name} for k, c in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def draw_scene(rng: Rng, config: SceneConfig) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.int64]]:
    """Draws one scene.

    Args:
        rng: Source of all randomness.
        config: Contents.

    Returns:
        uint8 [h, w, 3] pixels; float64 [n, 4] xyxy boxes of the *visible* pixels; int64 [n] labels.
    """
    canvas = _ground(config.size, rng)
    for _ in range(rng.integers(config.distractors[0], config.distractors[1] + 1)):
        _paint_distractor(canvas, config, rng)
    owner = np.full(config.size, -1, np.int32)  # [h, w] index of the object that is seen there
    areas: list[int] = []
    labels: list[int] = []
    for _ in range(rng.integers(config.objects[0], config.objects[1] + 1)):
        label = _draw_label(config.tail, rng)
        area = _place(canvas, owner, areas, CLASSES[label], config, rng)
        if area:
            areas.append(area)
            labels.append(label)
    canvas = canvas * rng.uniform(0.8, 1.15) + rng.normal(0, config.noise, canvas.shape)
    boxes = [_extent(owner == k) for k in range(len(labels))]
    return np.clip(canvas, 0, 255).astype(np.uint8), np.array(boxes, np.float64).reshape(-1, 4), np.array(labels, np.int64)


def _draw_label(tail: float, rng: Rng) -> int:
    weights = np.arange(1, len(CLASSES) + 1) ** -float(tail)
    return int(rng.choice(len(CLASSES), p=weights / weights.sum()))


def _place(canvas: Plane, owner: NDArray[np.int32], areas: Sequence[int], kind: ObjectClass, config: SceneConfig, rng: Rng) -> int:
    """Finds a place that hides no other object too much and paints the object there; returns its area in pixels, 0 if there is no place."""
    low, high = np.log(config.object_size)
    radius = 0.5 * min(config.size) * float(np.exp(rng.uniform(low, high)))
    for _ in range(12):
        window, u, v = _local_frame(config, radius, rng)
        alpha = np.clip(0.5 - kind.shape(u, v) * radius, 0, 1)
        solid = alpha > 0.5
        if solid.any() and _leaves_visible(owner, owner[window], solid, areas, config.min_visible):
            colours = _object_colours(kind.hue, config.hue_spread, rng)
            mix = kind.texture(u, v, rng.uniform(2.0, 3.2), rng)
            _blend(canvas[window], alpha, mix, *colours)
            owner[window][solid] = len(areas)
            return int(solid.sum())
    return 0


def _leaves_visible(
    owner: NDArray[np.int32], seen: NDArray[np.int32], solid: NDArray[np.bool_], areas: Sequence[int], share: float
) -> bool:
    """True if every object under `solid` keeps at least `share` of its area in view."""
    covered = seen[solid]
    below = np.unique(covered[covered >= 0]).tolist()
    return all((owner == k).sum() - (covered == k).sum() >= share * areas[k] for k in below)


def _local_frame(config: SceneConfig, radius: float, rng: Rng) -> tuple[tuple[slice, slice], Plane, Plane]:
    """A random place: the window of the image it covers and the object's own axes there, in radii."""
    h, w = config.size
    cx, cy = rng.uniform(0.6 * radius, w - 0.6 * radius), rng.uniform(0.6 * radius, h - 0.6 * radius)
    stretch = rng.uniform(0.8, 1.25)
    reach = radius * 1.3
    rows = slice(max(0, int(cy - reach)), min(h, int(cy + reach) + 1))
    cols = slice(max(0, int(cx - reach)), min(w, int(cx + reach) + 1))
    y, x = np.mgrid[rows, cols].astype(np.float32)
    x, y = (x + 0.5 - cx) / (radius * stretch), (y + 0.5 - cy) * stretch / radius
    angle = rng.uniform(-config.tilt, config.tilt)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return (rows, cols), c * x + s * y, c * y - s * x


def _paint_distractor(canvas: Plane, config: SceneConfig, rng: Rng) -> None:
    radius = 0.5 * min(config.size) * rng.uniform(*config.object_size)
    window, u, v = _local_frame(config, radius, rng)
    kind = CLASSES[rng.integers(len(CLASSES))]
    alpha = np.clip(0.5 - kind.shape(u, v) * radius, 0, 1)
    colour = _rgb(rng.uniform(), rng.uniform(0.2, 0.8), rng.uniform(0.3, 0.9))
    _blend(canvas[window], alpha, np.zeros_like(alpha), colour, colour)


def _object_colours(hue: float, spread: float, rng: Rng) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A light and a dark colour near the class's hue."""
    hue = hue + rng.normal(0, spread)
    light = _rgb(hue, rng.uniform(0.35, 0.9), rng.uniform(0.75, 1.0))
    dark = _rgb(hue + rng.uniform(-0.1, 0.1), rng.uniform(0.4, 0.9), rng.uniform(0.1, 0.4))
    return light, dark


def _ground(size: tuple[int, int], rng: Rng) -> Plane:
    """float32 [h, w, 3] background: clouds between two colours, sometimes with faint stripes or a fine grain."""
    mix = 0.6 * _cloud(size, int(rng.integers(2, 6)), rng) + 0.4 * _cloud(size, int(rng.integers(8, 32)), rng)
    if rng.uniform() < 0.5:
        y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
        angle, period = rng.uniform(0, np.pi), rng.uniform(6, 30)
        mix = mix + 0.12 * np.sin((np.cos(angle) * x + np.sin(angle) * y) * (2 * np.pi / period))
    first, second = (_rgb(rng.uniform(), rng.uniform(0.1, 0.6), rng.uniform(0.25, 0.85)) for _ in range(2))
    ground = first + mix[..., None] * (second - first)
    return np.asarray(ground, np.float32)


def _cloud(size: tuple[int, ...], cells: int, rng: Rng) -> Plane:
    """Smooth noise in [0, 1]: a random grid of about `cells` x `cells`, enlarged."""
    from PIL import Image

    grid = Image.fromarray(rng.uniform(0, 1, (cells, cells)).astype(np.float32))
    smooth: Plane = np.asarray(grid.resize((size[1], size[0]), Image.Resampling.BICUBIC)).clip(0, 1)
    return smooth


def _blend(window: Plane, alpha: Plane, mix: Plane, first: NDArray[np.float32], second: NDArray[np.float32]) -> None:
    colour = first + mix[..., None] * (second - first)
    window += alpha[..., None] * (colour - window)


def _rgb(hue: float, saturation: float, value: float) -> NDArray[np.float32]:
    import colorsys

    return np.array([255 * c for c in colorsys.hsv_to_rgb(hue % 1.0, saturation, value)], np.float32)


def _extent(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """xyxy of the true pixels, right and bottom exclusive."""
    cols, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1
