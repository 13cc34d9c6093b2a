"""What each of two processes does in tests/methods/test_mixpl_ddp.py; a module of its own, because spawned processes import it by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from tiny_detector import TinyDetector, make_batches
from torch import Tensor, distributed

from ssod_fast.methods import MixPL, MixPLConfig, SemiSupervisedDetector
from ssod_fast.structures import Target


class Teacher(TinyDetector):
    """Predicts one box per image on rank 0 and none on rank 1."""

    def predict(self, images: Any, score_thr: float = 0.0, topk: int = 300) -> list[Target]:
        n = 1 - distributed.get_rank()
        box = torch.tensor([[10.0, 10, 50, 40]])[:n]
        return [Target(boxes=box, labels=torch.zeros(n, dtype=torch.int64), scores=torch.ones(n)) for _ in range(len(images))]


class Driver:
    """Reduces gradients in the last branch only."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    @contextlib.contextmanager
    def branch(self, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else self.wrapped.no_sync():
            yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def work(rank: int, folder: str, skip: bool) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    config = MixPLConfig(cls_pseudo_thr=0.5, mosaic_shape=((40, 40), (90, 90)), erase_patches=None, skip_closed_gate=skip)
    model = SemiSupervisedDetector(Teacher(), MixPL(config, rank=rank))
    wrapped = torch.nn.parallel.DistributedDataParallel(model.student)
    model.run_student = wrapped
    gates = []
    for step in range(4):
        model.student.zero_grad()
        try:
            out = model.training_step(*make_batches(10 * step + rank), step, Driver(wrapped))
        except ValueError as error:
            torch.save(str(error), f"{folder}/{rank}.pt")
            break
        assert out.stats is not None
        gates.append(out.stats.extra["gate"].item())
    else:
        torch.save((gates, [p.grad for p in model.student.parameters()]), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
