"""Endless, shuffled orders of images in which any position can be computed without its predecessors.

A stream is a concatenation of epochs, each a permutation drawn from (seed, name, epoch). What happens at iteration i of rank r is therefore
a pure function of (seed, r, i): a run resumes from the iteration number alone, and the number of worker processes changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# First word of every seed, so that no two purposes ever share a generator.
PURPOSE = {"labeled": 1, "unlabeled": 2, "groups": 3, "counts": 4, "labeled_view": 5, "unlabeled_view": 6}
GROUP_BLOCK = 256  # iterations in which every aspect group gets exactly its share


def generator(purpose: str, seed: int, *where: int) -> np.random.Generator:
    """The generator of one draw, identified by its purpose and place."""
    return np.random.default_rng([PURPOSE[purpose], seed, *where])


@lru_cache(maxsize=16)
def _permutation(purpose: str, seed: int, group: int, epoch: int, length: int) -> NDArray[np.int64]:
    return generator(purpose, seed, group, epoch).permutation(length)


@dataclass(frozen=True)
class Stream:
    """An endless order over `rows`."""

    purpose: str
    seed: int
    rows: NDArray[np.int64]  # [m] rows of the data set, repetitions allowed
    group: int = 0

    def __len__(self) -> int:
        """Positions per epoch."""
        return len(self.rows)

    def at(self, position: int) -> int:
        """The row at a position >= 0."""
        epoch, place = divmod(position, len(self.rows))
        return int(self.rows[_permutation(self.purpose, self.seed, self.group, epoch, len(self.rows))[place]])


@dataclass(frozen=True)
class GroupOrder:
    """Which of two groups an iteration draws from; within each block of iterations group 1 gets its share, in shuffled places."""

    seed: int
    share: float  # of group 1, in [0, 1]

    def at(self, iteration: int) -> tuple[int, int]:
        """The group, and how many earlier iterations drew from it."""
        if self.share in (0.0, 1.0):
            return int(self.share), iteration
        block, place = divmod(iteration, GROUP_BLOCK)
        before = int(block * GROUP_BLOCK * self.share)
        order = self._block(block, int((block + 1) * GROUP_BLOCK * self.share) - before)
        group = int(order[place])
        ones = before + int(order[:place].sum())
        return group, ones if group else iteration - ones

    def _block(self, block: int, ones: int) -> NDArray[np.int64]:
        return generator("groups", self.seed, block).permutation(np.arange(GROUP_BLOCK) < ones).astype(np.int64)


def bernoulli_counts(seed: int, rank: int, iteration: int, labeled: int, unlabeled: int) -> tuple[int, int]:
    """SoftTeacher's sampling: each slot is labelled with probability labeled / (labeled + unlabeled), and at least one of each is present.

    Returns:
        Numbers of labelled and unlabelled images of this iteration; they always add up to labeled + unlabeled.
    """
    total = labeled + unlabeled
    drawn = int((generator("counts", seed, rank, iteration).random(total) < labeled / total).sum())
    drawn = min(max(drawn, 1), total - 1)
    return drawn, total - drawn


def expected_labeled(labeled: int, unlabeled: int) -> float:
    """Mean of the first number of :func:`bernoulli_counts`."""
    total = labeled + unlabeled
    share = labeled / total
    return total * share + (1 - share) ** total - share**total


def aspect_groups(sizes: Sequence[tuple[int, int] | None]) -> NDArray[np.int64]:
    """int64 [n]: 0 for w < h, 1 for w >= h; unknown sizes count as 1."""
    return np.array([1 if size is None or size[1] >= size[0] else 0 for size in sizes], np.int64)
