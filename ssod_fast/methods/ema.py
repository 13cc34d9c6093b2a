"""Exponential moving average of a student's weights, with the schedules that semi-supervised detectors use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Schedule = Literal["constant", "warmup", "mmdet"]


@dataclass(frozen=True)
class EMAConfig:
    """How the teacher follows the student.

    `constant`: the teacher keeps the share `keep` at every update (Unbiased Teacher, keep 0.9996).
    `warmup`: keep_i = min(keep, 1 - 1/(i+1)), so the first update copies the student (SoftTeacher, keep 0.999).
    `mmdet`: the student's share is max(floor, gamma/(gamma+i)) (mmdetection's mean-teacher hook, MixPL).
    """

    schedule: Schedule = "constant"
    keep: float = 0.9996
    floor: float = 2e-4
    gamma: float = 4.0
    # Added to i in `warmup` and `mmdet`. 1 for methods that update before an iteration, where we update after the one before it: our
    # update after iteration i-1 is theirs before iteration i (Semi-DETR; its first update is the copy that every teacher begins as).
    ahead: int = 0
    # One update every `interval` iterations, after iterations interval-1, 2*interval-1, ...
    interval: int = 1
    # "copy" is right for trainable batch norm and equals "skip" (mmdetection's choice) where batch norm is frozen.
    buffers: Literal["copy", "skip"] = "copy"

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "warmup", "mmdet"):
            raise ValueError(f'schedule must be "constant", "warmup" or "mmdet", got {self.schedule!r}')
        if self.buffers not in ("copy", "skip"):
            raise ValueError(f'buffers must be "copy" or "skip", got {self.buffers!r}')
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep must lie in [0, 1], got {self.keep}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must lie in [0, 1], got {self.floor}")
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive, got {self.gamma}")
        if self.ahead < 0:
            raise ValueError(f"ahead must not be negative, got {self.ahead}")
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1, got {self.interval}")


def student_share(config: EMAConfig, step: int) -> float:
    """The weight of the student in the update after iteration `step` (0-based), were there one."""
    if config.schedule == "constant":
        return 1.0 - config.keep
    i = step + config.ahead
    if config.schedule == "warmup":
        return 1.0 - min(config.keep, 1.0 - 1.0 / (i + 1))
    return max(config.floor, config.gamma / (config.gamma + i))


class EMA:
    """Moves a teacher towards a student: `teacher = (1 - mu) * teacher + mu * student`.

    One multi-tensor lerp for all parameters; buffers are copied or left alone. No gradients, no host sync.
    """

    def __init__(self, config: EMAConfig) -> None:
        self.config = config
        self.updates = 0

    def update(self, teacher: nn.Module, student: nn.Module, step: int) -> bool:
        """Updates the teacher after the optimizer step of iteration `step` (0-based).

        Returns:
            Whether this iteration is one that updates.
        """
        if (step + 1) % self.config.interval != 0:
            return False
        lerp_parameters(teacher, student, student_share(self.config, step))
        if self.config.buffers == "copy":
            copy_buffers(teacher, student)
        self.updates += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        """The number of updates made."""
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.updates = int(state["updates"])


@torch.no_grad()
def lerp_parameters(teacher: nn.Module, student: nn.Module, share: float) -> None:
    """`teacher += share * (student - teacher)` for all parameters at once."""
    torch._foreach_lerp_(*_paired(teacher.parameters(), student.parameters(), "parameters"), share)


@torch.no_grad()
def copy_buffers(teacher: nn.Module, student: nn.Module) -> None:
    """`teacher := student` for all buffers (batch norm statistics and counters)."""
    ours, theirs = _paired(teacher.buffers(), student.buffers(), "buffers")
    if ours:
        torch._foreach_copy_(ours, theirs)


def copy_weights(teacher: nn.Module, student: nn.Module) -> None:
    """`teacher := student`, parameters and buffers, bit for bit."""
    with torch.no_grad():
        torch._foreach_copy_(*_paired(teacher.parameters(), student.parameters(), "parameters"))
    copy_buffers(teacher, student)


def _paired(teacher: Iterable[Tensor], student: Iterable[Tensor], what: str) -> tuple[list[Tensor], list[Tensor]]:
    ours, theirs = [t.detach() for t in teacher], [s.detach() for s in student]
    if len(ours) != len(theirs):
        raise ValueError(f"teacher and student must have the same {what}: got {len(ours)} and {len(theirs)}")
    return ours, theirs
