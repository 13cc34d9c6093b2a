"""What each of two processes does in tests/methods/test_ssd_det_ddp.py; a module of its own, as spawned processes import it by name."""

from __future__ import annotations

import torch
from mixpl_ranks import Driver
from ssd_det_cases import SMALL, gradients, make_detector, noisy_batch
from torch import Tensor, distributed

from ssod_fast.data.batches import LabeledBatch
from ssod_fast.methods import SemiSupervisedDetector, SSDDet, SSDDetConfig
from ssod_fast.structures import Target
from ssod_fast.training.backward import average_gradients


def build(rank: int) -> SemiSupervisedDetector:
    return SemiSupervisedDetector(make_detector(), SSDDet(SSDDetConfig(**SMALL), rank=rank)).train()


def batch_of(rank: int) -> LabeledBatch:
    """Boxes on rank 0, none on rank 1."""
    batch = noisy_batch(rank)
    if rank == 0:
        return batch
    return LabeledBatch(batch.images, [Target(boxes=t["boxes"][:0], labels=t["labels"][:0]) for t in batch.targets])


def alone(rank: int) -> dict[str, Tensor]:
    """Gradients of the rank's batch in a process of its own."""
    model = build(rank)
    torch.manual_seed(rank)
    model.training_step(batch_of(rank), None, 0).loss.backward()
    return gradients(*model.trained)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = build(rank)
    wrapped = torch.nn.parallel.DistributedDataParallel(model.student)
    model.run_student = wrapped
    torch.manual_seed(rank)
    model.training_step(batch_of(rank), None, 0, Driver(wrapped))
    average_gradients(model.trainable, 2)
    torch.save(gradients(*model.trained), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
