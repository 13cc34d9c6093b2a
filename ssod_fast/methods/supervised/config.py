"""Options of the supervised baseline."""

from __future__ import annotations

from dataclasses import dataclass

from ssod_fast.methods.ema import EMAConfig


@dataclass(frozen=True)
class SupervisedConfig:
    """The student trained on the labelled images alone: what every semi-supervised method must beat on the same split."""

    sup_weight: float = 1.0
    # None: the plain baseline. An EMAConfig adds an averaged model, for a comparison in which averaging is not the method's gain.
    ema: EMAConfig | None = None
