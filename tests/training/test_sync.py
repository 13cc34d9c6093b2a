"""A training step asks the host for nothing: proven on the CPU with the mode that fails on every operation that would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from no_sync import SyncError, no_sync

from ssod_fast.training.trainer import RunStart, Trainer

from .conftest import MakeConfig


class Prefetched(Trainer):
    """Takes batches that were decoded before the guarded region."""

    def _next_batch(self) -> Any:
        return self.ready.pop(0)


def prepared(config: Any, steps: int) -> Prefetched:
    trainer = Prefetched(config)
    trainer._build(RunStart("new", None, []))
    trainer.ready = [trainer.loader.batch(i) for i in range(steps)]
    return trainer


def test_supervised_iterations_do_not_sync(make_config: MakeConfig) -> None:
    trainer = prepared(make_config("supervised", dry_run=True, batch="2"), 3)
    trainer._iterate(want_preview=False)
    with no_sync():
        for _ in range(2):
            trainer._iterate(want_preview=False)
    with pytest.raises(SyncError), no_sync():
        trainer.means.read()  # the log is what reads


def test_mixpl_iterations_sync_in_the_teacher_only(make_config: MakeConfig) -> None:
    """The detector's own post-processing (NMS) waits for the device; nothing around it does."""
    trainer = prepared(make_config(dry_run=True), 6)
    for _ in range(4):  # fills the cache
        trainer._iterate(want_preview=False)
    method: Any = trainer.model.method
    predictions = [method.predict(trainer.model, unlabeled) for _, unlabeled in trainer.ready]
    method.predict = lambda model, unlabeled: predictions.pop(0)
    with no_sync():
        for _ in range(2):
            trainer._iterate(want_preview=False)
    assert torch.isfinite(trainer.means.read()[0]["loss"] * torch.ones(()))
