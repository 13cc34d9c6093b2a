"""Planner of mosaics with 4 or 9 tiles, in the two layouts that detectors use."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from ssod_fast.ops.compose_plan import FLIP_X, ComposePlan, Placement

from ._base import (
    RandomPlanner,
    Size,
    Sizes,
    check_bounds,
    check_choice,
    check_pair,
    check_sizes,
    fit_scale,
    largest,
    place_rounded,
    round_up,
)


class MosaicPlanner(RandomPlanner):
    """Puts tiles into a grid of 2x2 or 3x3, around its inner cell lines.

    "centre_touch" (MixPL): all tiles fit into a target drawn per canvas, touch the inner lines of the grid and are never cropped; the
    canvas grows to hold them.
    "yolo_window": tiles are resized to a long side of `size`, the point that they touch (with 9 tiles: the window) is placed at random,
    and a window of `size` is cut out.

    Args:
        layout: "centre_touch" or "yolo_window".
        tiles: 4 or 9.
        target: for "centre_touch", smallest and largest (height, width) of a tile; the upper end excluded, equal ends fix the size.
        size: for "yolo_window", side of the window in pixels.
        cell_multiple: for "centre_touch", height and width of a cell are rounded up to a multiple of it.
        flip_p: probability that a tile is mirrored.
        options: seed, rank and rng, see :class:`RandomPlanner`.
    """

    def __init__(
        self,
        *,
        layout: Literal["centre_touch", "yolo_window"] = "centre_touch",
        tiles: Literal[4, 9] = 4,
        target: tuple[Size, Size] = ((400, 400), (800, 800)),
        size: int = 640,
        cell_multiple: int = 16,
        flip_p: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_choice("layout", layout, ("centre_touch", "yolo_window"))
        check_choice("tiles", tiles, (4, 9))
        check_bounds("target", target)
        check_sizes("size", [(size, size)])
        check_pair("flip_p", (flip_p, flip_p), 0, 1)
        self._layout, self._grid, self._target = layout, 2 if tiles == 4 else 3, target
        self._size, self._cell_multiple, self._flip_p = size, cell_multiple, flip_p

    def plan(self, sizes: Sizes, canvases: int = 1, groups: Sequence[Sequence[int]] | None = None) -> ComposePlan:
        """Mosaics of the sources.

        Args:
            sizes: (height, width) of every source.
            canvases: how many mosaics; each draws its tiles at random, without repetition if there are enough sources.
            groups: the sources of each mosaic instead, row by row of the grid.
        """
        check_sizes("sizes", sizes)
        chosen = (
            [self._choose(len(sizes)) for _ in range(canvases)] if groups is None else [self._given(group, len(sizes)) for group in groups]
        )
        make = self._centre_touch if self._layout == "centre_touch" else self._window
        rows = [make([self._tile(src, sizes[src]) for src in group], sizes) for group in chosen]
        return ComposePlan.from_placements([canvas for canvas, _ in rows], [places for _, places in rows])

    def _choose(self, n: int) -> list[int]:
        tiles = self._grid**2
        if n == 0:
            raise ValueError("sizes must name at least one source, got none")
        if n >= tiles:
            return self._draws.permutation(n)[:tiles]
        return [self._draws.integer(0, n) for _ in range(tiles)]

    def _given(self, group: Sequence[int], n: int) -> list[int]:
        if len(group) != self._grid**2 or not all(0 <= src < n for src in group):
            raise ValueError(f"every group must name {self._grid**2} sources in 0..{n - 1}, got {list(group)}")
        return list(group)

    def _tile(self, src: int, size: Size) -> Placement:
        """A tile before its size is known: the source and its flip."""
        return Placement(src, size, flip=FLIP_X if self._draws.uniform(0, 1) < self._flip_p else 0)

    def _centre_touch(self, tiles: list[Placement], sizes: Sizes) -> tuple[Size, list[Placement]]:
        target = draw_size(self._draws.integer, self._target)
        scaled = [Placement.scaled(t.src, sizes[t.src], fit_scale(sizes[t.src], target), flip=t.flip) for t in tiles]
        return touching_grid(scaled, self._grid, self._cell_multiple)

    def _window(self, tiles: list[Placement], sizes: Sizes) -> tuple[Size, list[Placement]]:
        side = self._size
        square = (side, side)
        scaled = [place_rounded(t.src, sizes[t.src], fit_scale(sizes[t.src], square), t.flip) for t in tiles]
        line_x, line_y = (int(self._draws.uniform(0.5 * side, 1.5 * side)) for _ in range(2))
        if self._grid == 2:
            # The lines cross at a random point of a canvas of twice the size; the window is its middle.
            shift = (line_x - side - side // 2, line_y - side - side // 2)
        else:
            # The tiles stand still and the window moves; it always shows an inner line of the grid.
            shift = (-line_x, -line_y)
        placed = [_moved(tile, cell_offset(tile.out_hw, i, self._grid, square), shift) for i, tile in enumerate(scaled)]
        return square, placed


def touching_grid(tiles: Sequence[Placement], grid: int, cell_multiple: int) -> tuple[Size, list[Placement]]:
    """Places tiles row by row into grid x grid equal cells so that they touch the inner lines; also the size of the canvas."""
    cell = largest([tile.out_hw for tile in tiles])
    cell = (round_up(cell[0], cell_multiple), round_up(cell[1], cell_multiple))
    placed = [_moved(tile, cell_offset(tile.out_hw, i, grid, cell), (0, 0)) for i, tile in enumerate(tiles)]
    return (grid * cell[0], grid * cell[1]), placed


def cell_offset(out_hw: Size, index: int, grid: int, cell: Size) -> tuple[int, int]:
    """(x, y) of a tile in cell `index`: outer tiles lie against the inner lines, middle ones in the middle of their cell."""
    row, column = divmod(index, grid)
    return _along(column, grid, cell[1], out_hw[1]), _along(row, grid, cell[0], out_hw[0])


def draw_size(integer: Any, bounds: tuple[Size, Size]) -> Size:
    """(height, width) uniform between two sizes, the upper end excluded; equal ends are a fixed size and draw nothing."""
    low, high = ((min(a, b) for a, b in zip(*bounds, strict=True)), (max(a, b) for a, b in zip(*bounds, strict=True)))
    height, width = (a if a == b else integer(a, b) for a, b in zip(low, high, strict=True))
    return height, width


def _along(cell_index: int, grid: int, cell: int, side: int) -> int:
    if cell_index == 0:
        return cell - side
    if cell_index == grid - 1:
        return cell_index * cell
    return cell_index * cell + (cell - side) // 2


def _moved(tile: Placement, offset: tuple[int, int], shift: tuple[int, int]) -> Placement:
    return dataclasses.replace(tile, offset=(offset[0] + shift[0], offset[1] + shift[1]))
