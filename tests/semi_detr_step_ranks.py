"""What each of two processes does in tests/methods/test_semi_detr_ddp.py; a module, because spawned processes import it by name."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator
from typing import Any

import torch
from semi_detr_models import make_model, make_views
from torch import Tensor, distributed

from ssod_fast.data.batches import LabeledBatch
from ssod_fast.training.backward import average_gradients

STEPS = (0, 1, 2, 3)  # stage 2 begins at 2
PATIENCE = datetime.timedelta(seconds=60)  # a rank that waits longer than that waits in vain


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


def make_rank_model(rank: int) -> Any:
    """The same networks on all ranks."""
    model = make_model(switch_at=2, cls_pseudo_thr=0.6)
    model.method.rank = rank  # type: ignore[attr-defined]
    return model


def work(rank: int, folder: str) -> None:
    """Steps with optimizer and average; what this rank saw and where it ended. From the second step on, rank 1 finds no pseudo box."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=PATIENCE)
    model = make_rank_model(rank)
    wrapped = torch.nn.parallel.DistributedDataParallel(model.student)
    model.run_student = wrapped
    parameters = [p for part in model.trained for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    seen = []
    for step in STEPS:
        if step and rank:
            model.method.config = dataclasses.replace(model.method.config, teacher_score_thr=1.0)
        out = model.training_step(*make_views(10 * step + rank, 2), step, Driver(wrapped))
        average_gradients(model.trainable, 2)
        assert out.stats is not None
        seen.append(
            {
                "thr": out.stats.extra.get("cost_thr"),
                "kept": out.stats.kept_count,
                "student": [p.grad.clone() for p in model.student.parameters() if p.grad is not None],
                "projector": [p.grad.clone() for p in model.trainable.parameters() if p.grad is not None],
            }
        )
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(step)
    alone = [labelled_on_rank_0(model, wrapped, rank, step) for step in (0, 2)]
    try:
        model.training_step(make_views(0)[0], None, 0, Driver(wrapped))
    except ValueError as error:
        message = str(error)
    torch.save({"seen": seen, "alone": alone, "state": model.state_dict(), "message": message}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def labelled_on_rank_0(model: Any, wrapped: Any, rank: int, step: int) -> list[Tensor]:
    """Gradients of a step in which rank 1 has no labelled image, which still takes part in every mean over the ranks."""
    labeled, unlabeled = make_views(10 * step + rank, 4 if rank else 2)  # four images on either
    model.training_step(LabeledBatch([], []) if rank else labeled, unlabeled, step, Driver(wrapped))
    found = [p.grad.clone() for p in model.student.parameters() if p.grad is not None]
    model.zero_grad()
    return found
