"""Assignment of one matrix by shortest augmenting paths: the plain form of what the kernels do.

Rows are added one by one (Crouse 2016, "On implementing 2D rectangular assignment algorithms"). Each sum of the reduced costs is formed in
this order and in float64, and among equal sums a fixed rule decides, so that the assignment is a function of the matrix alone, equal to
what scipy's solver finds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Reals = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass
class _Duals:
    """Prices of rows and columns, and who is assigned to whom (-1: nobody)."""

    rows: Reals  # [R]
    columns: Reals  # [C]
    column_of: Indices  # [R]
    row_of: Indices  # [C]


@dataclass
class _Paths:
    """Shortest paths from one row to all columns."""

    length: Reals  # [C]
    previous: Indices  # [C], the row before each column
    visited: list[int]  # columns in the order in which they were reached, the free one at the end


def shortest_path_assignment(cost: Reals) -> Indices:
    """Column of each row of a finite matrix [R, C] with R <= C. A row stays at -1 only where float64 overflows."""
    rows, columns = cost.shape
    duals = _Duals(np.zeros(rows), np.zeros(columns), np.full(rows, -1), np.full(columns, -1))
    for row in range(rows):
        paths = _shortest_paths(cost, duals, row)
        if paths is not None:
            _update(duals, paths, row)
            _augment(duals, paths, row)
    return duals.column_of


def _shortest_paths(cost: Reals, duals: _Duals, start: int) -> _Paths | None:
    """Dijkstra's search from a row to the nearest free column."""
    columns = cost.shape[1]
    remaining = np.arange(columns)[::-1].copy()
    paths = _Paths(np.full(columns, np.inf), np.full(columns, -1), [])
    row, distance = start, 0.0
    while True:
        length = ((distance + cost[row, remaining]) - duals.rows[row]) - duals.columns[remaining]
        shorter = length < paths.length[remaining]
        paths.length[remaining[shorter]] = length[shorter]
        paths.previous[remaining[shorter]] = row
        place = _nearest(paths.length[remaining], duals.row_of[remaining] < 0)
        column = int(remaining[place])
        distance = float(paths.length[column])
        if distance == np.inf:
            return None
        paths.visited.append(column)
        if duals.row_of[column] < 0:
            return paths
        remaining[place] = remaining[-1]
        remaining = remaining[:-1]
        row = int(duals.row_of[column])


def _nearest(length: Reals, free: npt.NDArray[np.bool_]) -> int:
    """Place of the minimum in the list of remaining columns: the last free one, or the first one if none of the minima is free."""
    ties = np.flatnonzero(length == length.min())
    free_ties = ties[free[ties]]
    return int(free_ties[-1] if free_ties.size else ties[0])


def _update(duals: _Duals, paths: _Paths, start: int) -> None:
    """New prices, with which the edges of the path cost nothing."""
    *passed, end = paths.visited
    distance = paths.length[end]
    duals.rows[start] += distance
    for column in passed:
        duals.rows[duals.row_of[column]] += distance - paths.length[column]
        duals.columns[column] -= distance - paths.length[column]


def _augment(duals: _Duals, paths: _Paths, start: int) -> None:
    """Walks the path back from its free column and exchanges assigned with unassigned edges."""
    column = paths.visited[-1]
    row = -1
    while row != start:
        row = int(paths.previous[column])
        duals.row_of[column] = row
        duals.column_of[row], column = column, int(duals.column_of[row])
