from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ssod_fast.training.optim import (
    BufferGuard,
    OptimizerConfig,
    ScheduleConfig,
    StepGuard,
    build_optimizer,
    clip_gradients,
    set_learning_rate,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x)).square().mean()


def test_warmup_then_constant_then_drops() -> None:
    schedule = ScheduleConfig(warmup=500, warmup_start=0.001, milestones=(0.5, 0.9))
    assert schedule.factor(0, 10000) == 0.001
    assert schedule.factor(250, 10000) == pytest.approx(0.5005)
    assert schedule.factor(500, 10000) == schedule.factor(4999, 10000) == 1.0
    assert schedule.factor(5000, 10000) == pytest.approx(0.1)
    assert schedule.factor(9999, 10000) == pytest.approx(0.01)
    assert schedule.factor(10, 100) == 1.0  # a short run warms up for a tenth of it
    assert ScheduleConfig(warmup=0).factor(0, 5) == 1.0


def test_learning_rate_follows_the_batch() -> None:
    assert OptimizerConfig().learning_rate(1, scale=True) == pytest.approx(0.00125)
    assert OptimizerConfig(name="adamw").learning_rate(1, scale=False) == 1e-4
    root = OptimizerConfig(name="adamw", lr_scaling="sqrt")
    assert (root.learning_rate(8, True), root.learning_rate(2, True), root.learning_rate(2, False)) == pytest.approx((1e-4, 5e-5, 1e-4))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_step_with_nan_gradients_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    config = OptimizerConfig(name=name, backbone_lr_scale=0.5)
    guard = StepGuard(torch.device("cpu"))
    optimizers = [build_optimizer([m], config, 0.1) for m in (net, twin)]
    optimizers[0].found_inf = guard.found  # type: ignore[attr-defined]
    batches = [torch.randn(5, 3) for _ in range(4)]
    # The very first step is bad, and one in the middle: what remains equals a run without them.
    for bad, batch in [(True, batches[0]), *[(False, b) for b in batches[1:3]], (True, batches[0]), (False, batches[3])]:
        for model, optimizer in zip((net, twin), optimizers, strict=True):
            if bad and model is twin:
                continue
            optimizer.zero_grad()
            (model(batch) * (math.nan if bad else 1.0)).backward()
            norm = clip_gradients(list(model.parameters()), 20.0)
            if model is net:
                guard.observe(norm)
            optimizer.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    assert guard.read() == (2, 1)


def test_guard_counts_rows_of_bad_steps() -> None:
    guard = StepGuard(torch.device("cpu"))
    for value in (1.0, math.nan, math.inf, 1.0, math.nan):
        guard.observe(torch.tensor(value))
    assert guard.read() == (3, 2)
    other = StepGuard(torch.device("cpu"))
    other.load_state_dict(guard.state_dict())
    other.observe(torch.tensor(math.nan))
    assert other.read() == (4, 2)


def test_batch_norm_survives_a_skipped_step() -> None:
    norm = nn.BatchNorm1d(3)
    guard = BufferGuard([norm, nn.Linear(3, 3)])
    for value, skipped in ((1.0, 0.0), (math.nan, 1.0)):
        guard.save()
        before = norm.running_mean.clone()  # type: ignore[union-attr]
        norm(torch.randn(4, 3) + value)
        guard.restore_if(torch.tensor(skipped))
        assert torch.equal(norm.running_mean, before) == bool(skipped)  # type: ignore[arg-type]
        assert torch.isfinite(norm.running_var).all()  # type: ignore[arg-type]
    assert BufferGuard([nn.Linear(3, 3)]).buffers == []


def test_backbone_has_its_own_rate() -> None:
    optimizer = build_optimizer([Net()], OptimizerConfig(backbone_lr_scale=0.1), 1.0)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.5])


def test_clipping() -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 5.0)
    assert clip_gradients([p], 0.0).item() == 10.0
    assert p.grad.tolist() == [5.0] * 4
    assert clip_gradients([p], 2.0).item() == 10.0
    assert torch.allclose(p.grad, torch.ones(4), atol=1e-5)


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"optimizer.name must be .* got 'rmsprop'"):
        OptimizerConfig(name="rmsprop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'optimizer.lr_scaling must be "linear" or "sqrt", got \'cubic\''):
        OptimizerConfig(lr_scaling="cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"optimizer.clip_norm must not be negative, got -1"):
        OptimizerConfig(clip_norm=-1)
    with pytest.raises(ValueError, match=r"schedule.milestones must be shares of the run"):
        ScheduleConfig(milestones=(120000,))
    with pytest.raises(ValueError, match="no parameter that takes a gradient"):
        build_optimizer([Net().requires_grad_(False), nn.Linear(2, 2)], OptimizerConfig(), 0.1)
