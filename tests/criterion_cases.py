"""Predictions and targets small enough to check by hand, random ones, and dense forms of the losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from ssod_fast.criterion import normalizer
from ssod_fast.ops import PackedTargets, pack_targets, paired_box_iou
from ssod_fast.ops._matches import Matches

LOGITS = [[0.0, 1.0], [2.0, -1.0], [-1.0, 0.5]]
BOXES = [[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.4], [0.7, 0.6, 0.1, 0.2]]
LABELS = [1, 0]
TARGET_BOXES = [[0.68, 0.6, 0.12, 0.2], [0.32, 0.3, 0.2, 0.4]]
QUERIES = [2, 1]


def golden(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """One image, three queries, two classes, two targets; target 0 takes query 2, target 1 query 1."""
    target = {"labels": torch.tensor(LABELS), "boxes": torch.tensor(TARGET_BOXES, dtype=dtype)}
    return torch.tensor([LOGITS], dtype=dtype), torch.tensor([BOXES], dtype=dtype), [target]


def matches_of(query: Tensor, packed: PackedTargets, queries: int, **options: Any) -> Matches:
    """Matches from query indices [L, E, G] that a test chose itself."""
    cost = torch.zeros(query.shape).masked_fill(query < 0, torch.inf)
    status = torch.zeros(query.shape[0], options.get("groups", 1), packed.batch, dtype=torch.uint8)
    return Matches(query, cost, status, packed.image, queries, packed.batch, offsets=packed.offsets, counts=packed.counts, **options)


def golden_matches(targets: list[dict[str, Tensor]]) -> Matches:
    return matches_of(torch.tensor([[QUERIES]]), pack_targets(targets), 3)


def random_case(
    layers: int = 3, queries: int = 9, classes: int = 4, sizes: tuple[int, ...] = (3, 0, 5), entries: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor, list[dict[str, Tensor]], Matches]:
    """float64 predictions [L, B, Q, C] and [L, B, Q, 4], targets, and arbitrary matches, one target unmatched in the last layer."""
    rng = torch.Generator().manual_seed(seed)

    def boxes(*shape: int) -> Tensor:
        size = torch.rand(*shape, 2, generator=rng, dtype=torch.float64) * 0.3 + 0.05
        return torch.cat([torch.rand(*shape, 2, generator=rng, dtype=torch.float64) * 0.6 + 0.2, size], -1)

    batch = len(sizes)
    logits = torch.randn(layers, batch, queries, classes, generator=rng, dtype=torch.float64) * 2
    targets = [{"labels": torch.randint(0, classes, (n,), generator=rng), "boxes": boxes(n)} for n in sizes]
    rows = [torch.cat([torch.randperm(queries, generator=rng)[: entries * n].view(entries, n) for n in sizes], 1) for _ in range(layers)]
    query = torch.stack(rows)
    query[-1, -1, -1] = -1
    packed = pack_targets(targets)
    return logits, boxes(layers, batch, queries), targets, matches_of(query, packed, queries, groups=entries)


def on_pairs(matches: Matches, packed: PackedTargets) -> list[tuple[int, int, int, int]]:
    """(layer, image, query, target row) of each pair."""
    found = []
    for layer, entry, row in (matches.query >= 0).nonzero().tolist():
        found.append((layer, int(packed.image[row]), int(matches.query[layer, entry, row]), row))
    return found


def dense_loss(name: str, logits: Tensor, boxes: Tensor, packed: PackedTargets, matches: Matches, weights: Tensor | None = None) -> Tensor:
    """The loss with dense targets [L, B, Q, C], as the papers write it; per layer, undivided. Weighted pairs mix with their background."""
    one_hot, quality, share = torch.zeros_like(logits), torch.zeros_like(logits), torch.ones_like(logits)
    for layer, image, query, row in on_pairs(matches, packed):
        at = (layer, image, query, int(packed.labels[row]))
        one_hot[at] = 1
        quality[at] = paired_box_iou(boxes[layer, image, query].detach(), packed.boxes[row], fmt="cxcywh")
        if weights is not None:
            share[at] = weights[row]
    found = _dense(name, logits, one_hot, quality)
    if weights is not None:
        found = share * found + (1 - share) * _dense(name, logits, torch.zeros_like(one_hot), torch.zeros_like(quality))
    return found.sum((1, 2, 3))


def _dense(name: str, x: Tensor, one_hot: Tensor, quality: Tensor) -> Tensor:
    p = x.sigmoid()
    bce = lambda target, weight: F.binary_cross_entropy_with_logits(x, target, weight=weight.detach(), reduction="none")  # noqa: E731
    if name == "focal":
        p_t = p * one_hot + (1 - p) * (1 - one_hot)
        alpha_t = 0.25 * one_hot + 0.75 * (1 - one_hot)
        return alpha_t * F.binary_cross_entropy_with_logits(x, one_hot, reduction="none") * (1 - p_t) ** 2
    if name == "vfl":
        return bce(quality, 0.75 * p**2 * (1 - one_hot) + quality)
    if name == "mal":
        return bce(quality**1.5, p**1.5 * (1 - one_hot) + one_hot)
    positive = (p**0.25 * quality**0.75).clamp(min=0.01).detach() * one_hot
    negative = torch.where(one_hot > 0, 1 - positive, p**2)
    return -positive * F.logsigmoid(x) - negative * F.logsigmoid(-x)


def save_normalizer(rank: int, folder: Path) -> None:
    """What each of two processes does: 8 targets on the first, none on the second. It is here because spawned processes import it."""
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    sizes = (3, 0, 5) if rank == 0 else (0,)
    targets = [{"labels": torch.zeros(n, dtype=torch.int64), "boxes": torch.zeros(n, 4)} for n in sizes]
    matches = matches_of(torch.full((1, 1, sum(sizes)), -1), pack_targets(targets), 9)
    torch.save(normalizer(matches), folder / f"{rank}.pt")
    distributed.destroy_process_group()
