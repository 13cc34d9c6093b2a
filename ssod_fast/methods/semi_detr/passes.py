"""Runs a detection transformer so that nothing is computed twice: images once, matching queries once, other queries against what is kept.

Matching queries never look at others. So their states are final after one pass, and every later pass decodes its own queries alone, which
read the kept states in self-attention: the result is that of decoding all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssod_fast.detectors.deformable_detr.detector import join_queries
from ssod_fast.detectors.deformable_detr.groups import blocked_mask
from ssod_fast.detectors.deformable_detr.stages import Decoded, DETRStages, Memory, Proposals, Pyramid, Queries
from ssod_fast.detectors.protocol import ImageBatch


@dataclass(frozen=True)
class Look:
    """What a network makes of a batch, up to its matching queries.

    Attributes:
        pyramid: feature maps.
        memory: what the encoder makes of them.
        found: matching queries in all decoder layers, with `inputs` if other queries are to follow.
        proposals: of the encoder.
    """

    pyramid: Pyramid
    memory: Memory
    found: Decoded
    proposals: Proposals | None


@dataclass(frozen=True)
class QueryGroups:
    """Queries that look at their own group and at the matching queries.

    Attributes:
        queries: [B, N, ...].
        sizes: of the groups, which add up to N.
        hidden: bool [B, N], queries that no other may look at; None for none.
    """

    queries: Queries
    sizes: list[int]
    hidden: Tensor | None = None


def look(network: DETRStages, images: ImageBatch, *, keep_inputs: bool) -> Look:
    """Backbone, encoder and matching queries.

    Args:
        network: student or teacher.
        images: normalised batch.
        keep_inputs: whether :func:`decode_groups` will follow.
    """
    pyramid = network.extract(images)
    memory = network.encode(pyramid)
    queries, proposals = network.select(memory)
    return Look(pyramid, memory, network.decode(memory, queries, keep_inputs=keep_inputs), proposals)


def decode_groups(network: DETRStages, seen: Look, parts: Sequence[QueryGroups]) -> list[Decoded]:
    """Decodes further queries; gradients flow into the matching queries that they look at.

    Args:
        network: that of `seen`.
        seen: a look with inputs kept.
        parts: what to decode, in one pass.

    Returns:
        One result per part; none for none.
    """
    if not parts:
        return []
    queries = parts[0].queries
    for part in parts[1:]:
        queries = join_queries(queries, part.queries)
    decoded = network.decode(seen.memory, queries, blocked=_blocked(parts), context=seen.found.inputs)
    counts = [sum(part.sizes) for part in parts]
    pieces = [field.split(counts, dim=2) for field in (decoded.hidden, decoded.logits, decoded.boxes)]
    return [Decoded(*piece) for piece in zip(*pieces, strict=True)]


def _blocked(parts: Sequence[QueryGroups]) -> Tensor:
    """Bool [N, N], or [B, N, N] where some queries are hidden."""
    batch, device = parts[0].queries.content.shape[0], parts[0].queries.content.device
    blocked = blocked_mask([size for part in parts for size in part.sizes], 0, device)
    if all(part.hidden is None for part in parts):
        return blocked
    nothing = [torch.zeros(batch, sum(part.sizes), dtype=torch.bool, device=device) for part in parts]
    hidden = torch.cat([none if part.hidden is None else part.hidden for part, none in zip(parts, nothing, strict=True)], 1)
    return blocked | hidden[:, None]
