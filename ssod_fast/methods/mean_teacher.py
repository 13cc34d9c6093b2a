"""A student and the teacher that follows it: the base of every semi-supervised method."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from .ema import EMA, EMAConfig, copy_weights


class MeanTeacher(nn.Module):
    """Holds a student and, if `ema` is given, its averaged copy.

    The teacher starts as a copy of the student, always is in eval mode, takes no gradients and never stands inside DDP.
    `state_dict()` holds both and the number of updates.

    Args:
        student: the detector that is trained.
        ema: how the teacher follows; None for no teacher.
        burn_in: the teacher becomes a plain copy of the student once more after this many iterations.
    """

    def __init__(self, student: nn.Module, ema: EMAConfig | None, burn_in: int = 0) -> None:
        super().__init__()
        self.student = student
        self.teacher = None if ema is None else make_teacher(student)
        self.ema = None if ema is None else EMA(ema)
        self.burn_in = burn_in

    def update_teacher(self, step: int) -> bool:
        """Moves the teacher after the optimizer step of iteration `step` (0-based).

        Returns:
            Whether the teacher changed.
        """
        if self.teacher is None or self.ema is None:
            return False
        if step + 1 == self.burn_in:
            copy_weights(self.teacher, self.student)
            return True
        return self.ema.update(self.teacher, self.student, step)

    def reset_teacher(self) -> None:
        """Makes the teacher a copy of the student, as after loading other weights into the student."""
        if self.teacher is not None:
            copy_weights(self.teacher, self.student)

    def train(self, mode: bool = True) -> MeanTeacher:
        """Sets the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """What `state_dict()` carries beside tensors of modules; subclasses add theirs."""
        return {} if self.ema is None else {"ema": self.ema.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores :meth:`get_extra_state`."""
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


def make_teacher(student: nn.Module) -> nn.Module:
    """A copy of the student in eval mode whose parameters take no gradient."""
    teacher = copy.deepcopy(student).eval()
    teacher.requires_grad_(False)
    teacher.zero_grad(set_to_none=True)
    return teacher
