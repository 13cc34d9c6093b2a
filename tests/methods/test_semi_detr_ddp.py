"""Semi-DETR in two processes: one mixture for all, equal gradients, those of the projector too; and the same as in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from semi_detr_models import make_views
from semi_detr_step_ranks import make_rank_model, work
from torch import Tensor, multiprocessing

from ssod_fast.criterion import gather
from ssod_fast.methods.semi_detr import hybrid, mining

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def test_ranks_agree(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    for step, (a, b) in enumerate(zip(first["seen"], second["seen"], strict=True)):
        assert a["kept"].sum() > 0 or step > 1
        assert (b["kept"].sum() > 0) == (step == 0)
        for name in ("student", "projector"):
            assert len(a[name]) == len(b[name])
            assert all(torch.equal(x, y) for x, y in zip(a[name], b[name], strict=True))
        assert bool(a["projector"]) == (step < 2)
        assert (a["thr"] is not None) == (step < 2)
        assert a["thr"] == b["thr"]
    assert sum(float(g.abs().sum()) for g in first["seen"][0]["projector"]) > 0
    for key, value in first["state"].items():
        # Batch norms of the projector keep statistics of their own rank; nobody reads them.
        if isinstance(value, Tensor) and "running" not in key:
            assert torch.equal(value, second["state"][key]), key


def test_gradients_are_the_mean_of_what_each_rank_computes(ranks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step in one process, rank after rank, with the costs pooled by hand."""
    costs: list[Tensor] = []
    counts = _mean_counts(monkeypatch)
    for rank in range(2):  # once to learn the costs and sums of both
        model = make_rank_model(rank)
        monkeypatch.setattr(mining.CostMiner, "_pool", lambda self, values: costs.append(values) or values)
        model.training_step(*make_views(rank, 2), 0)
    counts.averaged = True
    gradients = []
    for rank in range(2):
        model = make_rank_model(rank)
        counts.call = 0
        monkeypatch.setattr(mining.CostMiner, "_pool", lambda self, values: torch.cat(costs))
        out = model.training_step(*make_views(rank, 2), 0)
        assert out.stats is not None
        assert out.stats.extra["cost_thr"] == ranks[rank]["seen"][0]["thr"]
        out.loss.backward()
        gradients.append([p.grad for part in model.trained for p in part.parameters() if p.requires_grad])
    seen = ranks[0]["seen"][0]
    for (a, b), found in zip(zip(*gradients, strict=True), [*seen["student"], *seen["projector"]], strict=True):
        torch.testing.assert_close(found, (a + b) / 2, rtol=1e-9, atol=1e-10)


class _Counts:
    """Stands in for `mean_over_ranks` in one process: first records what each rank would send, then returns the means."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []
        self.averaged, self.call = False, 0

    def __call__(self, values: Tensor, **_: Any) -> Tensor:
        if not self.averaged:
            self.sent.append(values)
            return values
        half = len(self.sent) // 2
        mean = (self.sent[self.call] + self.sent[half + self.call]) / 2
        self.call += 1
        return mean


def _mean_counts(monkeypatch: pytest.MonkeyPatch) -> _Counts:
    counts = _Counts()
    monkeypatch.setattr(gather, "mean_over_ranks", counts)
    monkeypatch.setattr(hybrid, "mean_over_ranks", counts)
    return counts


def test_a_rank_without_unlabelled_images_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "unlabeled must not be empty on any rank of a distributed run" in rank["message"]


def test_a_rank_without_labelled_images_keeps_step_with_the_others(ranks: list[dict[str, Any]]) -> None:
    trained = len(ranks[0]["seen"][0]["student"])
    for first, second in zip(ranks[0]["alone"], ranks[1]["alone"], strict=True):
        assert len(first) == len(second) == trained
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, second, strict=True))
        assert sum(float(a.abs().sum()) for a in first) > 0
