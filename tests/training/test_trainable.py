"""Networks that a method trains beside the student."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import trainable_method
from torch import multiprocessing, nn
from trainable_method import NAME, ColourConfig, ColourMethod

from ssod_fast.methods import METHODS, SemiSupervisedDetector, SupervisedMethod
from ssod_fast.methods.ema import EMAConfig
from ssod_fast.training.backward import average_gradients, broadcast_weights
from ssod_fast.training.checkpoint import load_detector, load_last
from ssod_fast.training.config import TrainConfig, tree_of
from ssod_fast.training.optim import OptimizerConfig
from ssod_fast.training.trainer import RunStart, Trainer, train

from .conftest import MakeConfig
from .test_trainer import Stopping, assert_same_weights, curves


@pytest.fixture
def colour_run(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> MakeConfig:
    """A run of the method that has a network of its own."""
    monkeypatch.setitem(METHODS, NAME, (ColourConfig, ColourMethod))

    def make(until: int = 1000, **changes: Any) -> TrainConfig[Any]:
        method = ColourConfig(until=until, ema=EMAConfig("constant", keep=0.5))
        return dataclasses.replace(make_config("supervised", batch="2", **changes), method=method)

    return make


def prepared(config: TrainConfig[Any]) -> Trainer:
    trainer = Trainer(dataclasses.replace(config, dry_run=True))
    trainer._build(RunStart("new", None, []))
    return trainer


def own_weights(trainer: Trainer) -> list[torch.Tensor]:
    assert trainer.model.trainable is not None
    return [p.detach().clone() for p in trainer.model.trainable.parameters()]


def test_methods_without_a_network_train_the_student_alone() -> None:
    model = SemiSupervisedDetector(trainable_student(), SupervisedMethod())
    assert model.trainable is None
    assert model.trained == [model.student]
    assert not [name for name in model.state_dict() if name.startswith("trainable")]


def trainable_student() -> nn.Module:
    from tiny_detector import TinyDetector

    return TinyDetector()


def test_the_network_follows_the_model_and_is_in_no_average() -> None:
    method = ColourMethod(ColourConfig(ema=EMAConfig("constant", keep=0.5)))
    model = SemiSupervisedDetector(trainable_student(), method).eval()
    assert model.trainable is method.trainable
    assert not method.trainable.training
    assert model.train().trainable.training  # type: ignore[union-attr]
    assert model.trained == [model.student, method.trainable]
    names = [name for name, _ in model.named_parameters()]
    assert sum(name.startswith("trainable.") for name in names) == 6
    assert sum(p.numel() for p in model.teacher.parameters()) == sum(p.numel() for p in model.student.parameters())
    before = [p.clone() for p in method.trainable.parameters()]
    model.update_teacher(0)
    assert all(torch.equal(a, b) for a, b in zip(before, method.trainable.parameters(), strict=True))
    assert model.double().trainable[0].weight.dtype == torch.float64  # type: ignore[index,union-attr]


def test_optimizer_moves_it_and_the_clip_sees_it(colour_run: MakeConfig) -> None:
    trainer = prepared(colour_run(optimizer=OptimizerConfig("adamw", clip_norm=1e-3)))
    grouped = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    own = trainer.model.trainable
    assert own is not None
    assert {id(p) for p in own.parameters()} <= grouped
    assert {id(p) for p in own.parameters()} <= {id(p) for p in trainer.parameters}
    before, norms = own_weights(trainer), []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (norms.append(torch.cat([p.grad.flatten() for p in trainer.parameters]).norm()), step())  # type: ignore
    trainer._iterate(want_preview=False)
    assert norms[0].item() == pytest.approx(1e-3, rel=1e-3)  # of both together
    assert any(not torch.equal(a, b) for a, b in zip(before, own_weights(trainer), strict=True))


def test_without_gradients_nothing_moves(colour_run: MakeConfig) -> None:
    """Weight decay included: a network that a later stage does not use stays as it is."""
    trainer = prepared(colour_run(until=1, optimizer=OptimizerConfig("adamw", weight_decay=0.1)))
    trainer._iterate(want_preview=False)
    before = own_weights(trainer)
    trainer._iterate(want_preview=False)
    assert all(torch.equal(a, b) for a, b in zip(before, own_weights(trainer), strict=True))


def test_its_statistics_survive_a_skipped_step(colour_run: MakeConfig) -> None:
    trainer = prepared(colour_run())
    trainer._iterate(want_preview=False)
    norm: Any = trainer.model.trainable[1]  # type: ignore[index]
    before, weights = norm.running_mean.clone(), own_weights(trainer)
    healthy = trainer.model.run_student
    trainer.model.run_student = lambda images, targets: {k: v * float("nan") for k, v in healthy(images, targets).items()}
    trainer._iterate(want_preview=False)
    assert torch.equal(norm.running_mean, before)
    assert all(torch.equal(a, b) for a, b in zip(weights, own_weights(trainer), strict=True))


def test_interrupted_run_continues_bit_for_bit(colour_run: MakeConfig) -> None:
    whole, parts = colour_run(name="whole"), colour_run(name="parts")
    train(whole)
    assert Stopping(parts).run().it == 4
    assert train(parts).it == 6
    assert curves(parts.folder) == curves(whole.folder)
    assert_same_weights(parts.folder, whole.folder)
    saved = load_last(parts.folder / "weights" / "last.pt")[0]["model"]
    assert sum(name.startswith("trainable.") for name in saved) == 9  # with the buffers of its batch norm
    assert saved["trainable.1.num_batches_tracked"] == 6
    detector, _ = load_detector(parts.folder / "weights" / "best_student.safetensors")
    assert not [name for name in detector.state_dict() if name.startswith("trainable")]


def test_one_process_needs_no_collective() -> None:
    network = nn.Linear(2, 1)
    network.weight.grad = torch.ones(1, 2)
    broadcast_weights(network, 1)
    average_gradients(network, 1)
    average_gradients(None, 2)
    assert network.weight.grad.tolist() == [[1.0, 1.0]]
    assert network.bias.grad is None


@pytest.mark.slow
def test_two_ranks_stay_alike(colour_run: MakeConfig, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = colour_run(until=2, iters=3, accumulate=2, eval_every=3, threads=1, optimizer=OptimizerConfig("adamw"))
    multiprocessing.spawn(trainable_method.work, (str(tmp_path), tree_of(config), port), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert [len(row) for row in first["local"]] == [6, 6, 0]  # nothing is reduced where nothing has gradients
    assert any(not torch.equal(a, b) for a, b in zip(first["local"][0], second["local"][0], strict=True))  # other images
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
