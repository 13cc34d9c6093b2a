"""What each of two processes does in tests/methods/test_semi_detr_mining.py, and cases that both sides can make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from ssod_fast.methods.semi_detr import CostMiner, one_to_many_losses, one_to_one_losses
from ssod_fast.methods.semi_detr.hybrid import assign_one_to_many
from ssod_fast.structures import PaddedTargets

# Boxes per image, of either rank.
CASES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((4, 4), (9, 2, 7)), ((5, 0), (0,)), ((0,), (0, 0))]


def make_case(
    sizes: tuple[int, ...], queries: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, PaddedTargets]:
    """Logits [B, Q, 3], boxes [B, Q, 4] and targets, cxcywh in shares of the image; each second target has a query nearby."""
    generator = torch.Generator().manual_seed(seed)

    def boxes(*shape: int) -> Tensor:
        size = 0.1 + 0.2 * torch.rand(*shape, 2, generator=generator, dtype=dtype)
        return torch.cat([size / 2 + (1 - size) * torch.rand(*shape, 2, generator=generator, dtype=dtype), size], -1)

    batch, rows = len(sizes), max(sizes)
    predicted, wanted = boxes(batch, queries), boxes(batch, rows)
    near = min(rows, queries)
    predicted[:, :near:2] = wanted[:, :near:2] + 0.02 * torch.randn(batch, (near + 1) // 2, 4, generator=generator, dtype=dtype)
    logits = torch.randn(batch, queries, 3, generator=generator, dtype=dtype)
    labels = torch.randint(0, 3, (batch, rows), generator=generator)
    ones = torch.ones(batch, rows, dtype=dtype)
    return logits, predicted, PaddedTargets(wanted, labels, ones, ones, torch.tensor(sizes, dtype=torch.int32))


def mine_case(rank: int, folder: str) -> None:
    """Mines all cases in three ways, and divides losses by means over the ranks."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    cases = [make_case(sizes[rank], 30, seed=10 * number + rank) for number, sizes in enumerate(CASES)]
    miners = {"capacity": CostMiner(capacity=27), "longest": CostMiner(), "rank": CostMiner("rank")}
    result: dict[str, Any] = {}
    for name, miner in miners.items():
        mined = [miner(*case) for case in cases]
        result[name] = [(m.keep, m.threshold) for m in mined]
    try:
        CostMiner(capacity=2)(*make_case((8,), 30))
    except ValueError as error:
        result["error"] = str(error)
    result["norms"] = divisors(*cases[0])
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def divisors(logits: Tensor, boxes: Tensor, targets: PaddedTargets) -> tuple[float, ...]:
    """What this rank has to divide, and by what the losses of its boxes were divided, in both stages."""
    _, assigned = assign_one_to_many(logits, boxes, targets)
    groups = [distributed.new_group([rank]) for rank in range(distributed.get_world_size())]
    own = groups[distributed.get_rank()]
    many = [one_to_many_losses(logits, boxes, targets, process_group=group).l1 for group in (own, None)]
    one = [one_to_one_losses(logits, boxes, targets, process_group=group) for group in (own, None)]
    total, pairs = assigned.weight.sum().clamp(min=1).item(), float(targets.count.sum())
    cls_ratio = (one[0].cls / one[1].cls).item()
    return total, total * (many[0] / many[1]).item(), pairs, pairs * (one[0].l1 / one[1].l1).item(), cls_ratio
