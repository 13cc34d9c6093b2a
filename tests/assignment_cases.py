"""Cost matrices that tempt an assignment solver to be wrong, and scipy as the judge."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment as scipy_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor

KINDS = ("random", "integer", "binary", "equal", "huge", "cancelling", "duplicates")
Matrix = npt.NDArray[np.floating[Any]]


def cost_matrix(kind: str, targets: int, queries: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[T, Q] of one kind; all but the first are full of equal reduced costs."""
    rng = np.random.default_rng(seed)
    shape = (targets, queries)
    values: Matrix
    if kind == "random":
        values = rng.normal(size=shape)
    elif kind == "integer":
        values = rng.integers(-2, 3, shape).astype(float)
    elif kind == "binary":
        values = rng.integers(0, 2, shape).astype(float)
    elif kind == "equal":
        values = np.full(shape, rng.normal())
    elif kind == "huge":
        values = rng.integers(-1, 2, shape) * 1e30 + rng.normal(size=shape)
    elif kind == "cancelling":  # sums that are exact in float64 and not in float32
        values = rng.integers(0, 2, shape) * 2.0**24 + rng.integers(0, 4, shape)
    else:
        values = rng.normal(size=shape)[rng.integers(0, max(targets, 1), targets)] if targets else np.zeros(shape)
    return torch.tensor(values, dtype=dtype)


def scipy_queries(cost: Matrix) -> list[int]:
    """Query of each target of a finite [T, Q] matrix, -1 for none: scipy on the [Q, T] matrix, which is how matchers call it."""
    query, target = scipy_assignment(cost.T)
    found = np.full(cost.shape[0], -1)
    found[target] = query
    return found.tolist()  # type: ignore[no-any-return]


def filled(cost: Matrix) -> Matrix:
    """The float64 matrix with the price of invalid entries filled in."""
    valid = np.isfinite(cost)
    wide = cost.astype(np.float64)
    high, low = (wide[valid].max(), wide[valid].min()) if valid.any() else (0.0, 0.0)
    margin = max(1.0, 2.0**-40 * max(abs(high), abs(low)))
    return np.where(valid, wide, high + min(cost.shape) * (high - low) + margin)


def unavoidable_invalid_pairs(cost: Matrix) -> int:
    """How many pairs of any complete matching are invalid at least."""
    matching = maximum_bipartite_matching(csr_array(np.isfinite(cost)), "column")
    valid = int(np.count_nonzero(matching >= 0))
    return int(min(cost.shape)) - valid


def sprinkle_invalid(cost: Tensor, share: float, seed: int) -> Tensor:
    """A copy with NaN and infinities at random places."""
    rng = np.random.default_rng(seed)
    values = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=cost.dtype)[torch.tensor(rng.integers(0, 3, tuple(cost.shape)))]
    return torch.where(torch.tensor(rng.random(tuple(cost.shape)) < share), values, cost)
