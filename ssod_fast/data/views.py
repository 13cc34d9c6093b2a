"""Views of an image for training and testing, with the matrix that carries boxes from the original into each view.

The recipe is MixPL's (official configs of Czm369/MixPL): resize and flip for everyone, one colour operation for the labelled and the strong
view, one geometric operation for the strong view alone. SoftTeacher and its heirs, Semi-DETR among them, also erase patches of the strong
view, which MixPL leaves to its mixing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..ops.planners._random import draw_patches
from ..ops.planners.mixpl import check_erasing
from ..structures import Target
from .geometry import Matrix, flip, map_boxes, resize, rotate_matrix, shear_matrix, translate_matrix, warp
from .photometric import COLOUR_OPS

Rng = np.random.Generator


def _rotate(size: tuple[int, int], config: ViewConfig, magnitude: float) -> Matrix:
    return rotate_matrix(size, config.rotate_degrees * magnitude)


def _shear_x(size: tuple[int, int], config: ViewConfig, magnitude: float) -> Matrix:
    return shear_matrix(degrees_x=config.shear_degrees * magnitude)


def _shear_y(size: tuple[int, int], config: ViewConfig, magnitude: float) -> Matrix:
    return shear_matrix(degrees_y=config.shear_degrees * magnitude)


def _translate_x(size: tuple[int, int], config: ViewConfig, magnitude: float) -> Matrix:
    return translate_matrix(dx=config.translate * magnitude * size[1])


def _translate_y(size: tuple[int, int], config: ViewConfig, magnitude: float) -> Matrix:
    return translate_matrix(dy=config.translate * magnitude * size[0])


# Name -> matrix for a picture of `size` at a magnitude in [-1, 1].
GEOMETRIC_OPS: dict[str, Callable[[tuple[int, int], ViewConfig, float], Matrix]] = {
    "rotate": _rotate,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}


@dataclass(frozen=True)
class ViewConfig:
    """How views are made; lengths in pixels."""

    short_side: tuple[int, int] = (400, 1200)  # drawn anew for every view, both ends included: scale jitter is the main weak augmentation
    max_side: int = 1333  # the long side never exceeds this, whatever the short side asks for
    test_short_side: int = 800  # with max_side: the usual (1333, 800) test scale of COCO
    flip: float = 0.5  # probability of a horizontal flip
    colour_ops: tuple[str, ...] = tuple(COLOUR_OPS)  # one of them for labelled and strong views; no name for none
    geometric_ops: tuple[str, ...] = tuple(GEOMETRIC_OPS)  # one of them for strong views; no name for none
    rotate_degrees: float = 30.0  # largest angle either way
    shear_degrees: float = 30.0  # largest angle either way
    translate: float = 0.1  # largest shift as a share of the side
    fill: int = 128  # grey of what comes from outside of the picture
    # Bounds of the number of patches erased from strong views, upper end excluded. Semi-DETR: 1 5; MixPL: none, it erases while it mixes.
    erase_patches: tuple[int, int] | None = None
    erase_ratio: tuple[float, float] = (0.0, 0.2)  # bounds of a patch's share of both sides of the picture
    erase_fill: int = 125  # grey of erased patches

    def __post_init__(self) -> None:
        low, high = self.short_side
        if not 1 <= low <= high:
            raise ValueError(f"short_side must be (low, high) with 1 <= low <= high, got {self.short_side}")
        if self.max_side < 1 or self.test_short_side < 1:
            raise ValueError(f"max_side and test_short_side must be >= 1, got {self.max_side} and {self.test_short_side}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be a probability, got {self.flip}")
        for name in ("fill", "erase_fill"):
            if not 0 <= getattr(self, name) <= 255:
                raise ValueError(f"{name} must lie in [0, 255], got {getattr(self, name)}")
        check_erasing(self.erase_patches, self.erase_ratio)
        if not (0 <= self.rotate_degrees <= 180 and 0 <= self.shear_degrees < 90 and 0 <= self.translate < 1):
            got = f"{self.rotate_degrees}, {self.shear_degrees} and {self.translate}"
            raise ValueError(f"rotate_degrees must lie in [0, 180], shear_degrees in [0, 90) and translate in [0, 1), got {got}")
        _check_names("colour_ops", self.colour_ops, tuple(COLOUR_OPS))
        _check_names("geometric_ops", self.geometric_ops, tuple(GEOMETRIC_OPS))

    def scaled(self, factor: float) -> ViewConfig:
        """The same recipe at another image size: all lengths times `factor`."""
        low, high, longest, test = (max(1, round(v * factor)) for v in (*self.short_side, self.max_side, self.test_short_side))
        return dataclasses.replace(self, short_side=(low, high), max_side=longest, test_short_side=test)


@dataclass(frozen=True)
class View:
    """A picture made from an original, and how points got there.

    Attributes:
        image: uint8 [3, h, w].
        matrix: float64 [3, 3], original pixels -> pixels of this view.
    """

    image: Tensor
    matrix: Matrix

    @property
    def size(self) -> tuple[int, int]:
        """(h, w)."""
        return int(self.image.shape[1]), int(self.image.shape[2])

    def then(self, result: tuple[Tensor, Matrix]) -> View:
        """This view after one more operation."""
        image, matrix = result
        return View(image, matrix @ self.matrix)


def fitted_size(size: tuple[int, int], short_side: int, max_side: int) -> tuple[int, int]:
    """(h, w) with the same aspect ratio: short side as asked unless the long side would exceed `max_side`; never below 1."""
    h, w = size
    scale = min(short_side / min(h, w), max_side / max(h, w))
    return max(1, int(h * scale + 0.5)), max(1, int(w * scale + 0.5))


def labeled_view(image: Tensor, target: Target, config: ViewConfig, rng: Rng) -> tuple[View, Target]:
    """Resize, flip, one colour operation.

    Args:
        image: uint8 [3, h, w].
        target: Boxes in the pixels of `image`.
        config: The recipe.
        rng: Source of every draw.

    Returns:
        The view and the target in its frame; boxes that vanish are left out.
    """
    view = _colour(_resize_flip(image, config, rng), config, rng)
    return view, target_in_view(target, view)


def weak_strong_views(image: Tensor, config: ViewConfig, rng: Rng) -> tuple[View, View]:
    """The teacher's view (resize, flip) and the student's.

    The student's has its own resize and flip, a colour and a geometric operation in random order, then erased patches if asked for.
    """
    weak = _resize_flip(image, config, rng)
    strong = _resize_flip(image, config, rng)
    steps = (_colour, _geometric) if rng.random() < 0.5 else (_geometric, _colour)
    for step in steps:
        strong = step(strong, config, rng)
    return weak, _erase(strong, config, rng)


def test_view(image: Tensor, config: ViewConfig) -> View:
    """Resize to the test size; nothing random."""
    size = fitted_size((image.shape[1], image.shape[2]), config.test_short_side, config.max_side)
    return View(*resize(image, size))


test_view.__test__ = False  # type: ignore[attr-defined]  # the name is the field's; it is no pytest case


def target_in_view(target: Target, view: View) -> Target:
    """Moves a target from the original frame into a view and leaves out the boxes that vanish there; other keys are kept."""
    boxes, keep = map_boxes(target["boxes"], view.matrix, view.size)
    moved = target.copy()
    moved["boxes"], moved["labels"] = boxes[keep], target["labels"][keep]
    if "weights" in target:
        moved["weights"] = target["weights"][keep]
    if "scores" in target:
        moved["scores"] = target["scores"][keep]
    if "clean_boxes" in target:
        moved["clean_boxes"] = map_boxes(target["clean_boxes"], view.matrix, view.size)[0][keep]
    return moved


def _resize_flip(image: Tensor, config: ViewConfig, rng: Rng) -> View:
    short = int(rng.integers(config.short_side[0], config.short_side[1] + 1))
    view = View(*resize(image, fitted_size((image.shape[1], image.shape[2]), short, config.max_side)))
    return view.then(flip(view.image)) if rng.random() < config.flip else view


def _colour(view: View, config: ViewConfig, rng: Rng) -> View:
    if not config.colour_ops:
        return view
    name = config.colour_ops[rng.integers(len(config.colour_ops))]
    return View(COLOUR_OPS[name](view.image, rng), view.matrix)


def _geometric(view: View, config: ViewConfig, rng: Rng) -> View:
    if not config.geometric_ops:
        return view
    name = config.geometric_ops[rng.integers(len(config.geometric_ops))]
    matrix = GEOMETRIC_OPS[name](view.size, config, float(rng.uniform(-1, 1)))
    return view.then((warp(view.image, matrix, config.fill), matrix))


def _erase(view: View, config: ViewConfig, rng: Rng) -> View:
    if config.erase_patches is None:
        return view
    image = view.image.clone()
    for x1, y1, x2, y2 in draw_patches(rng, view.size, config.erase_patches, config.erase_ratio).tolist():
        image[:, y1:y2, x1:x2] = config.erase_fill
    return View(image, view.matrix)


def _check_names(argument: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{argument} must be among {', '.join(known)}, got {', '.join(map(repr, unknown))}")
