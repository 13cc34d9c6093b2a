"""The result of an assignment, for all layers, groups and images at once, on the device."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

INVALID_ENTRIES = 1  # bits of Matches.status
INVALID_PAIR = 2
UNMATCHED_TARGET = 4


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

    @property
    def layers(self) -> int:
        """Number of layers, L."""
        return self.query.shape[0]

    def pairs(self, layer: int = 0, device: torch.device | str = "cpu") -> list[tuple[Tensor, Tensor]]:
        """The classic form of one layer: per image (query indices ascending, target indices within the image), int64.

        This waits for the device: the lengths of the lists depend on its data.
        """
        query, begin, sizes = self.query[layer].cpu(), *self._host_rows()
        pairs = []
        for first, size in zip(begin, sizes, strict=True):
            taken = query[:, first : first + size]
            entry, target = (taken >= 0).nonzero(as_tuple=True)
            chosen = taken[entry, target]
            order = chosen.argsort()
            pairs.append((chosen[order].to(device), target[order].to(device)))
        return pairs

    def _host_rows(self) -> tuple[list[int], list[int]]:
        """First row and number of rows of each image, read from the device."""
        if self.counts is not None:
            width = self.query.shape[-1] // max(self.batch, 1)
            return [b * width for b in range(self.batch)], self.counts.tolist()
        if self.offsets is None:
            return [0] * self.batch, [self.query.shape[-1]] * self.batch
        offsets = self.offsets.tolist()
        return offsets[:-1], [b - a for a, b in itertools.pairwise(offsets)]
