"""Seeded random draws of the planners, in a fast and in a legacy order."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
RngKind = Literal["philox", "numpy_legacy"]


class Draws(Protocol):
    """The draws a planner makes."""

    def integer(self, low: int, high: int) -> int:
        """Uniform in [low, high)."""
        ...

    def uniform(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        ...

    def beta(self, a: float, b: float) -> float:
        """Beta distributed."""
        ...

    def permutation(self, n: int) -> list[int]:
        """A random order of 0..n-1."""
        ...

    def patches(self, hw: tuple[int, int], count: tuple[int, int], ratio: tuple[float, float]) -> IntArray:
        """[n, 4] rectangles x0, y0, x1, y1 inside an image of (height, width), with its aspect ratio.

        n is uniform in [count[0], count[1]), the side of a patch a share of the image's side that is uniform in `ratio`.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The generator's state as plain Python values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        ...


def make_draws(kind: RngKind, seed: int, rank: int) -> Draws:
    """Draws for one process of a distributed run.

    Args:
        kind: "philox", or "numpy_legacy" for the generator and the order of draws of NumPy-based training code.
        seed: of the run, not negative.
        rank: of the process; each rank gets draws of its own.
    """
    if seed < 0 or rank < 0:
        raise ValueError(f"seed and rank must not be negative, got {seed} and {rank}")
    if kind == "philox":
        return PhiloxDraws(seed, rank)
    if kind == "numpy_legacy":
        return LegacyDraws(seed + rank)
    raise ValueError(f'rng must be "philox" or "numpy_legacy", got {kind!r}')


def draw_patches(generator: np.random.Generator, hw: tuple[int, int], count: tuple[int, int], ratio: tuple[float, float]) -> IntArray:
    """:meth:`Draws.patches` from two calls of NumPy's generator."""
    height, width = hw
    number = count[0] + int(generator.random() * (count[1] - count[0]))
    share, x, y = generator.random((3, number))
    side = ratio[0] + share * (ratio[1] - ratio[0])
    rects = np.empty((number, 4), np.int32)  # assignment truncates, as int() does
    rects[:, 2], rects[:, 3] = width * side, height * side
    rects[:, 0], rects[:, 1] = x * (width - rects[:, 2]), y * (height - rects[:, 3])
    rects[:, 2:] += rects[:, :2]
    return rects


class PhiloxDraws:
    """Counter-based generator; all patches of an image come from one call."""

    def __init__(self, seed: int, rank: int = 0) -> None:
        self._generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, rank])))

    def integer(self, low: int, high: int) -> int:
        return low + int(self._generator.random() * (high - low))

    def uniform(self, low: float, high: float) -> float:
        return low + float(self._generator.random()) * (high - low)

    def beta(self, a: float, b: float) -> float:
        return float(self._generator.beta(a, b))

    def permutation(self, n: int) -> list[int]:
        order: list[int] = self._generator.permutation(n).tolist()
        return order

    def patches(self, hw: tuple[int, int], count: tuple[int, int], ratio: tuple[float, float]) -> IntArray:
        return draw_patches(self._generator, hw, count, ratio)

    def state_dict(self) -> dict[str, Any]:
        state = _plain(self._generator.bit_generator.state)
        return {"philox": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.bit_generator.state = _arrays(_expect(state, "philox"), np.uint64)


class LegacyDraws:
    """NumPy's legacy generator (MT19937), one scalar draw after the other as code on the global NumPy stream makes them."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.RandomState(seed)

    def integer(self, low: int, high: int) -> int:
        return int(self._generator.randint(low, high))

    def uniform(self, low: float, high: float) -> float:
        return float(self._generator.random_sample()) * (high - low) + low

    def beta(self, a: float, b: float) -> float:
        return float(self._generator.beta(a, b))

    def permutation(self, n: int) -> list[int]:
        order: list[int] = self._generator.permutation(n).tolist()
        return order

    def patches(self, hw: tuple[int, int], count: tuple[int, int], ratio: tuple[float, float]) -> IntArray:
        height, width = hw
        rows = []
        for _ in range(self.integer(*count)):
            side = self.uniform(*ratio)
            patch_h, patch_w = int(height * side), int(width * side)
            x0, y0 = self.integer(0, width - patch_w), self.integer(0, height - patch_h)
            rows.append((x0, y0, x0 + patch_w, y0 + patch_h))
        return np.asarray(rows, np.int32).reshape(-1, 4)

    def state_dict(self) -> dict[str, Any]:
        return {"numpy_legacy": _plain(self._generator.get_state(legacy=False))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(_arrays(_expect(state, "numpy_legacy"), np.uint32))


def _expect(state: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind not in state:
        raise ValueError(f"the saved random state must be of rng={kind!r}, got {sorted(state)}")
    inner: dict[str, Any] = state[kind]
    return inner


def _plain(value: Any) -> Any:
    """Nested arrays as lists, so that a checkpoint loads with `weights_only=True`."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _arrays(value: Any, dtype: type) -> Any:
    if isinstance(value, dict):
        return {key: _arrays(entry, dtype) for key, entry in value.items()}
    return np.asarray(value, dtype) if isinstance(value, list) else value
