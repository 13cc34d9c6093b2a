"""A method with a small network of its own, and what one process of a distributed run of it does."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssod_fast.methods import METHODS, StepOutput, SupervisedConfig, SupervisedMethod
from ssod_fast.methods.inputs import detector_batch
from ssod_fast.methods.step import LossBook
from ssod_fast.methods.supervised.method import run_supervised

NAME = "colours"


@dataclass(frozen=True)
class ColourConfig(SupervisedConfig):
    # Iterations in which the network of the method is used.
    until: int = 1000


class ColourMethod(SupervisedMethod):
    """The labelled loss, and a network that learns to say 1 for the mean colour of every image."""

    def __init__(self, config: ColourConfig, *, rank: int = 0) -> None:
        super().__init__(config, rank=rank)
        self.until = config.until
        # Ranks start from other weights; the trainer has to see to it that they do not stay so.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rank)
            self.trainable: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))  # type: ignore[assignment]

    def step(self, model: Any, labeled: Any, unlabeled: Any, step: int, driver: Any = None, want_preview: bool = False) -> StepOutput:
        book = LossBook(driver)
        if step < self.until:
            book.run("own", lambda: {"colour": self._loss(detector_batch(model.student, labeled.images).tensor)}, weight=1.0, last=False)
        run_supervised(book, model, labeled, weight=1.0, last=True)
        return book.output()

    def _loss(self, images: Tensor) -> Tensor:
        said: Tensor = self.trainable(images.float().mean((2, 3)))
        return (said - 1).square().mean()


def register() -> None:
    METHODS[NAME] = (ColourConfig, ColourMethod)


def work(rank: int, folder: str, config: dict[str, Any], port: int) -> None:
    """Trains as one of two processes and writes the weights and gradients of the method's network."""
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    register()
    from ssod_fast.training.config import config_from_tree
    from ssod_fast.training.trainer import Trainer

    class Recording(Trainer):
        def _optimizer_step(self) -> None:
            own = [p.grad.clone() for p in self.model.trainable.parameters() if p.grad is not None]  # type: ignore[union-attr]
            seen.append(own)
            super()._optimizer_step()

    seen: list[list[Tensor]] = []
    trainer = Recording(config_from_tree(config))
    trainer.run()
    network = trainer.model.trainable
    assert network is not None
    torch.save({"weights": [p.detach() for p in network.parameters()], "local": seen}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
