"""Training methods around any detector: one folder each, on a small mean-teacher base."""

from .ema import EMA, EMAConfig
from .mean_teacher import MeanTeacher
from .mixpl import MixPL, MixPLConfig
from .mixpl_ssd_det import MixPLSSDDet, MixPLSSDDetConfig
from .semi_detr import SemiDETR, SemiDETRConfig
from .semi_supervised import Method, SemiSupervisedDetector
from .ssd_det import SSDDet, SSDDetConfig
from .step import BackwardDriver, Preview, PseudoLabelStats, StepOutput
from .supervised import SupervisedConfig, SupervisedMethod

Options = SupervisedConfig | MixPLConfig | SemiDETRConfig | SSDDetConfig

METHODS: dict[str, tuple[type[Options], type[SupervisedMethod] | type[MixPL] | type[SemiDETR] | type[SSDDet]]] = {
    "supervised": (SupervisedConfig, SupervisedMethod),
    "mixpl": (MixPLConfig, MixPL),
    "semi_detr": (SemiDETRConfig, SemiDETR),
    "ssd_det": (SSDDetConfig, SSDDet),
    "mixpl_ssd_det": (MixPLSSDDetConfig, MixPLSSDDet),
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
    "MixPLSSDDet",
    "MixPLSSDDetConfig",
    "Options",
    "Preview",
    "PseudoLabelStats",
    "SSDDet",
    "SSDDetConfig",
    "SemiDETR",
    "SemiDETRConfig",
    "SemiSupervisedDetector",
    "StepOutput",
    "SupervisedConfig",
    "SupervisedMethod",
]
