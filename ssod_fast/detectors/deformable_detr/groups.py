"""Which queries of a decoder may look at which others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssod_fast.structures import upload


def blocked_mask(groups: Sequence[int], matching: int, device: torch.device | str | None = None) -> Tensor:
    """Mask of self-attention for queries in the order [group 0, group 1, ..., matching queries].

    A query may attend to its own group and to the matching queries; matching queries attend to matching queries alone, so that what they
    say does not depend on queries made from targets (DN-DETR, Li et al., arXiv 2203.01305, section 4.4).

    Args:
        groups: number of queries of each group.
        matching: number of queries that are matched with objects; 0 where they are given to the decoder as its context.
        device: where the mask is needed.

    Returns:
        bool [Q, Q], True where the query of the row must not attend to that of the column. Nothing waits for the device.

    Raises:
        ValueError: a negative size.
    """
    sizes = [*groups, matching]
    if min(sizes) < 0:
        raise ValueError(f"groups and matching must not be negative, got {list(groups)} and {matching}")
    host = torch.tensor([group for group, size in enumerate(sizes) for _ in range(size)], dtype=torch.int64)
    owner = upload(host, torch.device("cpu" if device is None else device))  # [Q]
    return (owner[:, None] != owner) & (owner != len(groups))
