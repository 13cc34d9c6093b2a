"""The pair of student and teacher."""

from __future__ import annotations

import torch
from tiny_detector import TinyDetector
from torch import nn

from ssod_fast.methods import EMAConfig, MeanTeacher


def changed(pair: MeanTeacher, value: float = 1.0) -> None:
    with torch.no_grad():
        for parameter in pair.student.parameters():
            parameter.add_(value)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_teacher_is_a_frozen_copy_in_eval_mode() -> None:
    student = TinyDetector()
    student.classify.weight.grad = torch.ones_like(student.classify.weight)
    pair = MeanTeacher(student, EMAConfig())
    assert equal(pair.teacher, pair.student)
    assert not any(p.requires_grad for p in pair.teacher.parameters())
    assert all(p.grad is None for p in pair.teacher.parameters())
    assert student.classify.weight.grad is not None
    assert pair.training
    assert not pair.teacher.training
    pair.eval().train()
    assert pair.student.training
    assert not any(m.training for m in pair.teacher.modules())
    assert all(p.requires_grad for p in pair.student.parameters())


def test_follows_by_its_schedule() -> None:
    pair = MeanTeacher(TinyDetector(), EMAConfig("constant", keep=0.75, interval=2))
    before = pair.teacher.classify.weight.clone()
    changed(pair)
    assert [pair.update_teacher(step) for step in range(2)] == [False, True]
    torch.testing.assert_close(pair.teacher.classify.weight, before + 0.25)


def test_becomes_the_student_at_the_end_of_burn_in() -> None:
    pair = MeanTeacher(TinyDetector(), EMAConfig("constant", keep=0.9), burn_in=3)
    for step in range(3):
        changed(pair)
        assert equal(pair.teacher, pair.student) is False
        pair.update_teacher(step)
    assert equal(pair.teacher, pair.student)
    changed(pair)
    pair.update_teacher(3)
    assert not equal(pair.teacher, pair.student)


def test_without_ema_there_is_no_teacher() -> None:
    pair = MeanTeacher(TinyDetector(), None)
    assert pair.teacher is None
    assert not pair.update_teacher(0)
    pair.reset_teacher()
    pair.train()
    assert not any(key.startswith("teacher") for key in pair.state_dict())


def test_reset_teacher() -> None:
    pair = MeanTeacher(TinyDetector(), EMAConfig())
    changed(pair)
    pair.reset_teacher()
    assert equal(pair.teacher, pair.student)


def test_state_dict_holds_both_and_the_count() -> None:
    first, second = (MeanTeacher(TinyDetector(seed=seed), EMAConfig("constant", keep=0.5)) for seed in (0, 1))
    changed(first)
    first.update_teacher(0)
    second.load_state_dict(first.state_dict())
    assert equal(first.teacher, second.teacher)
    assert equal(first.student, second.student)
    assert second.ema is not None
    assert second.ema.updates == 1
