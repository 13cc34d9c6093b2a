"""Training methods around any detector: one folder each, on a small mean-teacher base."""

from .ema import EMA, EMAConfig
from .mean_teacher import MeanTeacher
from .mixpl import MixPL, MixPLConfig
from .semi_supervised import Method, SemiSupervisedDetector
from .step import BackwardDriver, Preview, PseudoLabelStats, StepOutput
from .supervised import SupervisedConfig, SupervisedMethod

METHODS: dict[str, tuple[type[SupervisedConfig] | type[MixPLConfig], type[SupervisedMethod] | type[MixPL]]] = {
    "supervised": (SupervisedConfig, SupervisedMethod),
    "mixpl": (MixPLConfig, MixPL),
}
"""Name on the command line -> configuration and method."""

__all__ = [
    "EMA",
    "METHODS",
    "BackwardDriver",
    "EMAConfig",
    "MeanTeacher",
    "Method",
    "MixPL",
    "MixPLConfig",
    "Preview",
    "PseudoLabelStats",
    "SemiSupervisedDetector",
    "StepOutput",
    "SupervisedConfig",
    "SupervisedMethod",
]
