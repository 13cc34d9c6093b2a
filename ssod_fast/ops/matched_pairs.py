"""Pairs of queries and targets in the order of the queries: what an assignment by target looks like from the side of the queries."""

from __future__ import annotations

import torch
from torch import Tensor

from ._registry import register


def matched_pairs(
    query: Tensor, *, offsets: Tensor | None, counts: Tensor | None, batch: int, queries: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the pairs of one layer by image and query. Nothing waits for the device.

    Args:
        query: int64 [E, G], index among `queries`, -1 for none.
        offsets: int64 [B + 1] of ragged rows, or None.
        counts: int64 [B] of padded rows, or None.
        batch: B.
        queries: Q.

    Returns:
        Queries [E * G] and their targets within the image [E * G], both -1 behind the last pair; and the number of pairs per image [B];
        int64.
    """
    found: tuple[Tensor, Tensor, Tensor] = _op(query.contiguous(), offsets, counts, batch, queries)
    return found


def _reference(query: Tensor, offsets: Tensor | None, counts: Tensor | None, batch: int, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    row = torch.arange(query.shape[1], device=query.device)
    if offsets is None:
        width = max(row.shape[0] // max(batch, 1), 1)
        image, first = row // width, row // width * width
    else:
        image = torch.searchsorted(offsets[1:], row, right=True).clamp(max=max(batch - 1, 0))
        first = offsets[image]
    place = torch.where(query < 0, batch * queries, image * queries + query).view(-1)  # [E * G]
    order = place.argsort()
    unmatched = place[order] == batch * queries
    target = (row - first)[order % max(row.shape[0], 1)]
    count = row.new_zeros(batch).scatter_add_(0, image, (query >= 0).sum(0))
    return query.reshape(-1)[order], target.masked_fill_(unmatched, -1), count


def _fake(query: Tensor, offsets: Tensor | None, counts: Tensor | None, batch: int, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.numel()), query.new_empty(query.numel()), query.new_empty(batch)


register(
    "matched_pairs(Tensor query, Tensor? offsets, Tensor? counts, int batch, int queries) -> (Tensor query, Tensor target, Tensor count)",
    reference=_reference,
    fake=_fake,
    composed=True,
)
_op = torch.ops.ssod_fast.matched_pairs.default
