"""Detectors of the Deformable DETR family by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import nn

from ..backbones import TINY, backbone_names
from ..options import check_options
from ..protocol import near
from ..weights import WeightsFile
from .backbone import DETRBackbone
from .config import DETRConfig, deformable_detr, dino
from .criterion import DETRCriterion
from .detector import DETRDetector
from .network import DeformableDETR

OWN = "own:"
_FAMILIES: dict[str, Callable[..., DETRConfig]] = {"deformable_detr": deformable_detr, "dino": dino}
_NAME = re.compile(rf"({'|'.join(_FAMILIES)})_(.+)")
_BACKBONE = frozenset({"frozen_bn", "trainable_layers", "same_padding", "tiny_norm"})
_NETWORK = frozenset(field.name for field in fields(DETRConfig)) - {"num_classes"}
_CRITERION = frozenset(field.name for field in fields(DETRCriterion))
# For images of 64 to 256 pixels on a CPU.
_TINY_NETWORK = {
    "queries": 40,
    "width": 64,
    "heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "ffn": 128,
    "levels": 3,
}


def build_own(name: str, num_classes: int, file: WeightsFile | None, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A detector of this package.

    Args:
        name: `{deformable_detr|dino}_{backbone}`.
        num_classes: without background.
        file: weights of the classification network.
        options: fields of :class:`DETRConfig` and :class:`DETRCriterion`, what is trained of the backbone, and `nms_thr`.

    Returns:
        The detector, and the options completed by the defaults that depend on the name and the file.

    Raises:
        ValueError: unknown name or option, with the nearest ones.
    """
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in backbone_names():
        raise ValueError(_unknown(name, match))
    family, backbone = match[1], match[2]
    values = {**_defaults(family, backbone, file), **options}
    check_options(values, _BACKBONE | _NETWORK | _CRITERION | {"nms_thr"}, OWN + name)
    config = _FAMILIES[family](num_classes, **_only(values, _NETWORK))
    body = DETRBackbone(backbone, file, **_only(values, _BACKBONE))
    detector = DETRDetector(DeformableDETR(config, body), DETRCriterion(**_only(values, _CRITERION)), nms_thr=values.get("nms_thr"))
    return detector, values


def _defaults(family: str, backbone: str, file: WeightsFile | None) -> dict[str, Any]:
    values: dict[str, Any] = {"frozen_bn": False, "trainable_layers": 5, "same_padding": False}
    if file is not None:
        values = {"frozen_bn": True, "trainable_layers": 3, "same_padding": file.same_padding}
    if backbone == TINY:
        values |= _TINY_NETWORK
        values |= {"denoising": 10} if family == "dino" else {}
    return values


def _only(values: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


def _unknown(name: str, match: re.Match[str] | None) -> str:
    if match is not None:
        hint = near(match[2], backbone_names())
        return f"unknown detector {OWN}{name}: {match[2]!r} is no convolutional network of torchvision.models{hint}"
    hint = near(name, [f"{family}_{backbone}" for family in _FAMILIES for backbone in (TINY, "mobilenet_v2", "resnet50")])
    return f"unknown detector {OWN}{name}: expected {{{'|'.join(_FAMILIES)}}}_{{backbone}}, for example {OWN}dino_resnet50{hint}"
