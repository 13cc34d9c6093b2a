"""Planners of one image per canvas: letterbox and half resolution. They draw nothing."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from ssod_fast.ops.compose_plan import ComposePlan, Placement

from ._base import Size, Sizes, check_choice, check_sizes, fit_scale, place_rounded


class LetterboxPlanner:
    """Fits each image into a canvas of fixed size, aspect ratio kept.

    Args:
        size: (height, width) of the canvas.
        rounding: "floor" gives floor(h * s) with boxes times s (MixPL, the DETR family), "round" the nearest size of at least 1 with
            boxes times the achieved ratio (YOLO style).
        anchor: where the image lies on the canvas.
        scale_up: whether images smaller than the canvas are enlarged.
    """

    def __init__(
        self,
        size: Size,
        *,
        rounding: Literal["floor", "round"] = "floor",
        anchor: Literal["top_left", "center"] = "top_left",
        scale_up: bool = True,
    ) -> None:
        check_sizes("size", [size])
        check_choice("rounding", rounding, ("floor", "round"))
        check_choice("anchor", anchor, ("top_left", "center"))
        self._size, self._rounding, self._anchor, self._scale_up = size, rounding, anchor, scale_up

    def plan(self, sizes: Sizes) -> ComposePlan:
        """One canvas per image; `sizes` are (height, width)."""
        check_sizes("sizes", sizes)
        return ComposePlan.from_placements([self._size] * len(sizes), [[self._place(i, size)] for i, size in enumerate(sizes)])

    def _place(self, src: int, size: Size) -> Placement:
        scale = fit_scale(size, self._size)
        if not self._scale_up:
            scale = min(scale, 1.0)
        placed = Placement.scaled(src, size, scale) if self._rounding == "floor" else place_rounded(src, size, scale)
        return dataclasses.replace(placed, offset=self._offset(placed.out_hw))

    def _offset(self, out_hw: Size) -> tuple[int, int]:
        if self._anchor == "top_left":
            return 0, 0
        return (self._size[1] - out_hw[1]) // 2, (self._size[0] - out_hw[0]) // 2


class HalfResPlanner:
    """Halves each image, for methods that look at an image at two resolutions (LSM, SED).

    Args:
        rounding: "ceil" gives ceil(h / 2), with which the halved image's feature pyramid matches the next level of the full one for every
            height; "floor" gives floor(h / 2), which needs cropping for one height in eight.
    """

    def __init__(self, rounding: Literal["ceil", "floor"] = "ceil") -> None:
        check_choice("rounding", rounding, ("ceil", "floor"))
        self._rounding = rounding

    def plan(self, sizes: Sizes) -> ComposePlan:
        """One canvas per image, of half its size; `sizes` are (height, width)."""
        check_sizes("sizes", sizes)
        halves = [self._half(size) for size in sizes]
        places = [[Placement(i, half, inv=(2.0, 2.0), box_scale=(0.5, 0.5))] for i, half in enumerate(halves)]
        return ComposePlan.from_placements(halves, places)

    def _half(self, size: Size) -> Size:
        divide = math.ceil if self._rounding == "ceil" else math.floor
        return max(1, divide(size[0] / 2)), max(1, divide(size[1] / 2))
