"""What a run gets where its user says nothing: settings that follow from the method and from the family of the detector."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ssod_fast.methods import METHODS, MixPLConfig

from .tree import ConfigError, nearest

# Score thresholds of MixPL's released configs, by detector family. The released FCOS scores a box by class times centerness, torchvision's
# by the square root of that product: 0.3 there is 0.55 here. DINO stands for all detection transformers.
MIXPL_THRESHOLDS = {"detr": 0.4, "fcos": 0.55, "retinanet": 0.4, "fasterrcnn": 0.7}

# Settings of Deformable DETR, DINO and Semi-DETR. Their learning rate, 1e-4, belongs to about 8 to 16 labelled images per step.
DETR_OPTIMIZER: dict[str, Any] = {
    "name": "adamw",
    "weight_decay": 1e-4,
    "clip_norm": 0.1,
    "backbone_lr_scale": 0.1,
    "lr_scaling": "sqrt",
}
# Of the same recipes; 1 to 4 erased patches are Semi-DETR's and concern no run without strong views. MixPL's recipe for DINO has its own.
DETR_VIEWS: dict[str, Any] = {"short_side": [480, 800], "erase_patches": [1, 5]}

# SSD-Det's gradients are clipped harder; its learning rate per image is MixPL's.
SSD_DET_OPTIMIZER: dict[str, Any] = {"clip_norm": 10.0}

_TWO_STAGE = "torchvision:fasterrcnn_resnet50_fpn"
DEFAULT_MODELS = {"semi_detr": "own:dino_resnet50", "ssd_det": _TWO_STAGE, "mixpl_ssd_det": _TWO_STAGE}
"""By method, where not every detector will do."""


def is_detr(model: str) -> bool:
    """Whether a model's name is that of a detection transformer: own:... and hf:... all are."""
    return model.startswith(("own:", "hf:"))


def method_defaults(name: str, model: str) -> Any:
    """The method's options with the preset for a detector family.

    Raises:
        ConfigError: no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}{nearest(name, list(METHODS))}")
    options = METHODS[name][0]()
    if isinstance(options, MixPLConfig):
        family = "detr" if is_detr(model) else next((family for family in MIXPL_THRESHOLDS if family in model), "fasterrcnn")
        return dataclasses.replace(options, cls_pseudo_thr=MIXPL_THRESHOLDS[family])
    return options


def run_defaults(method: str, model: str | None) -> dict[str, Any]:
    """Settings outside of the method, as the tree of a config file holds them.

    Args:
        method: name of the method.
        model: name of the detector; None if nobody has named one.
    """
    tree: dict[str, Any] = {}
    if model is None and method in DEFAULT_MODELS:
        model = tree["model"] = DEFAULT_MODELS[method]
    if method == "semi_detr" or (model is not None and is_detr(model)):
        tree["optimizer"] = dict(DETR_OPTIMIZER)
        if method != "mixpl":
            tree["views"] = dict(DETR_VIEWS)
    if method == "ssd_det":
        tree["optimizer"] = dict(SSD_DET_OPTIMIZER)
    return tree


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both trees in one; where both have a value, that of `over`."""
    both = (key for key in base if isinstance(base[key], Mapping) and isinstance(over.get(key), Mapping))
    return {**base, **over, **{key: merged(base[key], over[key]) for key in both}}
