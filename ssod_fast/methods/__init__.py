"""Training methods around any detector: one folder each, on a small mean-teacher base."""

from .ema import EMA, EMAConfig
from .mean_teacher import MeanTeacher
from .mixpl import MixPL, MixPLConfig
from .semi_detr import SemiDETR, SemiDETRConfig
from .semi_supervised import Method, SemiSupervisedDetector
from .step import BackwardDriver, Preview, PseudoLabelStats, StepOutput
from .supervised import SupervisedConfig, SupervisedMethod

Options = SupervisedConfig | MixPLConfig | SemiDETRConfig

METHODS: dict[str, tuple[type[Options], type[SupervisedMethod] | type[MixPL] | type[SemiDETR]]] = {
    "supervised": (SupervisedConfig, SupervisedMethod),
    "mixpl": (MixPLConfig, MixPL),
    "semi_detr": (SemiDETRConfig, SemiDETR),
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
    "Options",
    "Preview",
    "PseudoLabelStats",
    "SemiDETR",
    "SemiDETRConfig",
    "SemiSupervisedDetector",
    "StepOutput",
    "SupervisedConfig",
    "SupervisedMethod",
]
