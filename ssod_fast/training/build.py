"""Networks of a run: the student from its config, and the method around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ssod_fast.detectors import build_detector
from ssod_fast.detectors.protocol import NotADetectorError
from ssod_fast.methods import METHODS, SemiSupervisedDetector

from .checkpoint import find_detector, load_matching, read_detector_info
from .config import TrainConfig
from .tree import ConfigError


def build_student(config: TrainConfig[Any], classes: list[str], say: Callable[[str], None]) -> Any:
    """The detector with its starting weights. The same seed gives the same weights on every rank.

    Raises:
        ConfigError: unknown model or option, a model that is no detector, or weights that do not fit.
    """
    torch.manual_seed(config.seed)
    try:
        student = build_detector(
            config.model, len(classes), weights=config.weights, backbone_weights=config.backbone_weights, **config.model_kwargs
        )
        if config.init_from is not None:
            _init_from(student, config, classes, say)
    except (ValueError, OSError, NotADetectorError) as error:
        raise ConfigError(str(error)) from error
    except TypeError as error:
        if not config.model.startswith(("torchvision:", "own:", "hf:")):
            raise  # in a callable of the user, where it happened says more
        raise ConfigError(f"--model-options do not fit {config.model}: {error}") from error
    return student


def _init_from(student: nn.Module, config: TrainConfig[Any], classes: list[str], say: Callable[[str], None]) -> None:
    from safetensors.torch import load_file

    assert config.init_from is not None
    path = find_detector(config.init_from)
    info = read_detector_info(path)
    kept = load_matching(student, load_file(path))
    total = len(student.state_dict())
    if len(kept) == total:
        raise ValueError(f"init_from {path} has no tensor that fits {config.model}: it holds {info.model}")
    say(f"init: {total - len(kept)} of {total} tensors from the {info.which} in {path} ({info.it} iterations of {info.method})")
    if kept:
        say("init: not loaded " + ", ".join(kept[:8]) + (f" and {len(kept) - 8} more" if len(kept) > 8 else ""))
    if info.classes != classes:
        say(f"init: its classes were {', '.join(info.classes)}; this run has {', '.join(classes)}")


def build_method(config: TrainConfig[Any], student: Any, rank: int) -> SemiSupervisedDetector:
    """The student inside its method.

    Raises:
        ConfigError: the detector lacks what the method needs.
    """
    kind: Any = METHODS[config.method_name][1]
    try:
        return SemiSupervisedDetector(student, kind(config.method, rank=rank))
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
