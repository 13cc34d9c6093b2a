"""Schedules and updates of the teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ssod_fast.methods.ema import EMA, EMAConfig, student_share
from ssod_fast.methods.schedules import ramp


def networks() -> tuple[nn.Module, nn.Module]:
    teacher, student = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
    nn.init.zeros_(teacher[0].weight)
    nn.init.ones_(student[0].weight)
    student[1].running_mean.fill_(5)
    student[1].num_batches_tracked.fill_(7)
    return teacher, student


@pytest.mark.parametrize(
    ("step", "share"), [(2, 4 / 6), (5, 4 / 9), (8, 1 / 3), (95, 0.04040404), (19994, 0.00020002), (19996, 2e-4), (10**6, 2e-4)]
)
def test_mmdet_share(step: int, share: float) -> None:
    assert student_share(EMAConfig("mmdet"), step) == pytest.approx(share, abs=5e-9)


def test_mmdet_share_at_round_steps() -> None:
    assert [student_share(EMAConfig("mmdet"), i) for i in (0, 4, 36)] == [1, 0.5, 0.1]


def test_warmup_keep() -> None:
    config = EMAConfig("warmup", keep=0.999)
    keeps = [1 - student_share(config, i) for i in (0, 1, 2, 9, 998, 999)]
    assert keeps == pytest.approx([0, 0.5, 2 / 3, 0.9, 0.998999, 0.999], abs=1e-6)


def test_warmup_before_an_iteration() -> None:
    # Semi-DETR's teacher keeps 0, .5, .9, .998999 and .999 before iterations 0, 1, 9, 998 and 999; it starts as the copy that 0 means.
    config = EMAConfig("warmup", keep=0.999, ahead=1)
    keeps = [1 - student_share(config, i - 1) for i in (1, 9, 998, 999, 5000)]
    assert keeps == pytest.approx([0.5, 0.9, 0.998999, 0.999, 0.999], abs=1e-6)
    assert 1 - student_share(EMAConfig("warmup", keep=0.999), 0) == 0


def test_mmdet_ahead() -> None:
    assert student_share(EMAConfig("mmdet", ahead=4), 0) == student_share(EMAConfig("mmdet"), 4)


@pytest.mark.parametrize(("updates", "expected"), [(1000, 0.32973359), (2500, 0.63219415)])
def test_constant_after_many_updates(updates: int, expected: float) -> None:
    teacher, student = (nn.Linear(1, 1, bias=False).double() for _ in range(2))
    nn.init.zeros_(teacher.weight)
    nn.init.ones_(student.weight)
    ema = EMA(EMAConfig("constant", keep=0.9996))
    for step in range(updates):
        assert ema.update(teacher, student, step)
    assert teacher.weight.item() == pytest.approx(expected, abs=1e-8)


def test_interval_updates_after_the_third_the_sixth() -> None:
    teacher, student = networks()
    ema = EMA(EMAConfig("mmdet", interval=3))
    assert [step for step in range(9) if ema.update(teacher, student, step)] == [2, 5, 8]
    # 1 - (1 - 2/3)(1 - 4/9)(1 - 1/3)
    torch.testing.assert_close(teacher[0].weight, torch.full((2, 3), 1 - (1 / 3) * (5 / 9) * (2 / 3)))
    assert ema.state_dict() == {"updates": 3}


@pytest.mark.parametrize(("buffers", "mean", "count"), [("copy", 5.0, 7), ("skip", 0.0, 0)])
def test_buffers(buffers: Any, mean: float, count: int) -> None:
    teacher, student = networks()
    EMA(EMAConfig("constant", keep=0.5, buffers=buffers)).update(teacher, student, 0)
    assert teacher[1].running_mean.tolist() == [mean] * 2
    assert teacher[1].num_batches_tracked.item() == count
    assert teacher[0].weight.unique().tolist() == [0.5]


def test_equal_weights_stay_bit_for_bit() -> None:
    teacher, student = (nn.Linear(50, 50) for _ in range(2))
    teacher.load_state_dict(student.state_dict())
    EMA(EMAConfig("constant", keep=0.9996)).update(teacher, student, 0)
    assert torch.equal(teacher.weight, student.weight)


def test_no_graph_and_no_parameter_is_replaced() -> None:
    teacher, student = networks()
    before = teacher[0].weight
    EMA(EMAConfig()).update(teacher, student, 0)
    assert teacher[0].weight is before
    assert before.grad_fn is None


def test_ramp() -> None:
    assert [ramp(i, start=5000, length=2000) for i in (4999, 5000, 5001, 6000, 7000, 9000)] == [0, 0, 0.0005, 0.5, 1, 1]
    assert [ramp(i, start=3, length=0) for i in (2, 3)] == [0, 1]
    with pytest.raises(ValueError, match="length must not be negative"):
        ramp(0, start=0, length=-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosine"}, 'schedule must be "constant", "warmup" or "mmdet"'),
        ({"buffers": "lerp"}, "buffers must be"),
        ({"keep": 1.1}, r"keep must lie in \[0, 1\]"),
        ({"floor": -1}, r"floor must lie in \[0, 1\]"),
        ({"gamma": 0}, "gamma must be positive"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"ahead": -1}, "ahead must not be negative, got -1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMAConfig(**options)


def test_other_network_is_refused() -> None:
    with pytest.raises(ValueError, match="must have the same parameters: got 1 and 2"):
        EMA(EMAConfig()).update(nn.Linear(2, 2, bias=False), nn.Linear(2, 2), 0)
