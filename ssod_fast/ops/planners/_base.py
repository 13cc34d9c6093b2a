"""What the planners share: a seeded state, and sums on sizes."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from ssod_fast.ops.compose_plan import Placement

from ._random import RngKind, make_draws

Size = tuple[int, int]
Sizes = Sequence[Size]


class RandomPlanner:
    """A planner with its own generator: the same state and sizes give the same plan.

    Args:
        seed: of the run.
        rank: of the process in a distributed run.
        rng: "philox" or "numpy_legacy".
    """

    def __init__(self, seed: int = 0, rank: int = 0, rng: RngKind = "philox") -> None:
        self._draws = make_draws(rng, seed, rank)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, in plain Python values."""
        return self._draws.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._draws.load_state_dict(state)


def fit_scale(size: Size, target: Size) -> float:
    """The largest factor with which an image of `size` fits into `target`, both (height, width)."""
    return min(target[0] / size[0], target[1] / size[1])


def place_rounded(src: int, size: Size, scale: float, flip: int = 0) -> Placement:
    """Resizes to the nearest size of at least 1, sampled at in / out (libraries that resize to a size work so)."""
    out_hw = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    return Placement.resized(src, size, out_hw, flip=flip)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def largest(sizes: Sizes) -> Size:
    """Elementwise maximum of sizes."""
    return max(h for h, _ in sizes), max(w for _, w in sizes)


def is_pair(value: object, kind: type = object) -> bool:
    """Whether `value` is a sequence of two instances of `kind`."""
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(part, kind) for part in value)


def check_sizes(name: str, sizes: Sizes) -> None:
    """Raises unless every size is a pair of positive integers."""
    for i, size in enumerate(sizes):
        if not is_pair(size, int) or min(size) < 1:
            raise ValueError(f"{name}[{i}] must be two positive integers (height, width), got {size!r}")


def check_bounds(name: str, bounds: Sequence[Size]) -> None:
    """Raises unless `bounds` are two sizes."""
    if not is_pair(bounds):
        raise ValueError(f"{name} must be two sizes ((height, width), (height, width)), got {bounds!r}")
    check_sizes(name, bounds)


def check_pair(name: str, value: Sequence[float], low: float, high: float) -> None:
    """Raises unless low <= value[0] <= value[1] <= high."""
    if not is_pair(value, Real) or not low <= value[0] <= value[1] <= high:
        raise ValueError(f"{name} must be two increasing numbers in [{low}, {high}], got {value!r}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
