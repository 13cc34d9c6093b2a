"""The result of an assignment, for all layers, groups and images at once, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .matched_pairs import matched_pairs

INVALID_ENTRIES = 1  # bits of Matches.status
INVALID_PAIR = 2
UNMATCHED_TARGET = 4


def count_pairs(sizes: tuple[int, ...], queries: int, groups: int, repeats: int) -> tuple[int, ...]:
    """Number of pairs of each image: every solve pairs as many as the smaller side has."""
    most = queries // groups
    return tuple([groups * min(repeats * size, most) for size in sizes])


@dataclass(frozen=True)
class Matches:
    """Which query each of the G target rows takes, for L layers and E = groups * repeats queries per target and layer.

    Shapes depend on what the host knows, so nothing here waits for the device except :meth:`pairs`.

    Attributes:
        query: int64 [L, E, G], index among all Q queries; -1 for an unmatched target and for padding rows.
        cost: float32 (float64 for a float64 cost) [L, E, G]; +inf where unmatched or matched on an invalid entry.
        status: uint8 [L, groups, B]; bit 0: invalid (non-finite) entries are present, bit 1: a pair sits on one, bit 2: fewer pairs than
            targets.
        image: int64 [G], the image of each row.
        queries: Q.
        batch: B.
        groups: number of query groups, each matched with all targets.
        repeats: number of queries that each target takes within a group.
        offsets: int64 [B + 1] of ragged rows, else None.
        counts: [B] of padded rows, else None.
        pair_counts: number of pairs per image, in any layer, where the host knows it.
    """

    query: Tensor
    cost: Tensor
    status: Tensor
    image: Tensor
    queries: int
    batch: int
    groups: int = 1
    repeats: int = 1
    offsets: Tensor | None = None
    counts: Tensor | None = None
    pair_counts: tuple[int, ...] | None = None

    @property
    def layers(self) -> int:
        """Number of layers, L."""
        return self.query.shape[0]

    @property
    def matched(self) -> Tensor:
        """Bool [L, E, G]: whether the target row takes a query."""
        return self.query >= 0

    def pairs(self, layer: int = 0, device: torch.device | str = "cpu") -> list[tuple[Tensor, Tensor]]:
        """The classic form of one layer: per image (query indices ascending, target indices within the image), int64.

        With `device="cpu"` this copies from the device. On the device it waits only where the host does not know the number of pairs:
        after `invalid="drop"`, and for targets that did not come as a list.

        Args:
            layer: which layer, 0 .. L - 1.
            device: where the indices shall be.

        Raises:
            IndexError: for a layer that is not there.
        """
        if not 0 <= layer < self.layers:
            raise IndexError(f"layer must lie in [0, {self.layers}), got {layer}")
        counts = None if self.counts is None else self.counts.to(torch.int64)
        query, target, found = matched_pairs(self.query[layer], offsets=self.offsets, counts=counts, batch=self.batch, queries=self.queries)
        lengths: list[int] = found.tolist() if self.pair_counts is None else list(self.pair_counts)
        total = sum(lengths)
        query, target = query[:total].to(device), target[:total].to(device)
        return list(zip(query.split_with_sizes(lengths), target.split_with_sizes(lengths), strict=True))
