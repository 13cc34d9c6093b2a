"""Builds detectors by name: a head of torchvision on any of its classification networks, or whatever a user's function returns."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign

from .anchors import CentredAnchorGenerator
from .backbones import TINY, BackboneOptions, backbone_names, build_backbone
from .deformable_detr.build import OWN, build_own
from .from_torchvision import from_torchvision
from .options import check_options
from .protocol import near, require
from .transformers import from_transformers
from .transformers.build import HF, build_hf
from .transformers.families import FAMILIES
from .weights import WeightsFile, load_detector, read_weights

TORCHVISION = "torchvision:"
# Built by torchvision's own function, because their backbones or heads differ from what the general scheme makes.
OFFICIAL = (
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn_v2",
)
# torchvision's counts of proposals are made for images of 800 x 1333 pixels.
_TINY_PROPOSALS = {
    "rpn_pre_nms_top_n_train": 400,
    "rpn_post_nms_top_n_train": 200,
    "rpn_pre_nms_top_n_test": 200,
    "rpn_post_nms_top_n_test": 100,
    "rpn_batch_size_per_image": 128,
    "box_batch_size_per_image": 64,
}
_MODELS: dict[str, type[nn.Module]] = {"fcos": FCOS, "retinanet": RetinaNet, "fasterrcnn": FasterRCNN}
_NAME = re.compile(rf"({'|'.join(_MODELS)})_(.+)_fpn")
# Arguments of torchvision's models that are built here, or that concern the replaced resize-and-normalise step.
_OWN_ARGUMENTS = re.compile(
    r"self|backbone|num_classes|min_size|max_size|image_.*|.*anchor_generator|head|.*_head|.*_predictor|.*_pool|.*_matcher|kwargs"
)


@dataclass(frozen=True)
class HeadOptions:
    """How heads are built.

    Attributes:
        head_convs: convolutions of each branch before its output (FCOS, RetinaNet). 1 or 2 suit a CPU.
        anchor_scale: side of the smallest anchor in strides (RetinaNet 4, Faster R-CNN 8); without meaning for FCOS.
        aspect_ratios: heights over widths of anchors; without meaning for FCOS.
        representation_size: width of the two linear layers of Faster R-CNN.
        prior_distance: box sides that an untrained FCOS predicts, in strides. torchvision starts at 0, where its ReLU blocks half of the
            gradients; from a positive start small detectors learn boxes sooner.
    """

    head_convs: int = 4
    anchor_scale: float = 4.0
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    representation_size: int = 1024
    prior_distance: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.head_convs <= 4:
            raise ValueError(f"head_convs must lie in 1..4, got {self.head_convs}")
        for name in ("anchor_scale", "representation_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.aspect_ratios or min(self.aspect_ratios) <= 0:
            raise ValueError(f"aspect_ratios must be positive numbers, got {self.aspect_ratios}")
        if self.prior_distance < 0:
            raise ValueError(f"prior_distance must not be negative, got {self.prior_distance}")


def build_detector(
    name: str,
    num_classes: int,
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    **options: Any,
) -> nn.Module:
    """Builds a detector that follows the protocol. Nothing is downloaded.

    The result has an attribute `build_options`: `options` completed by what was derived from the weights files, so that
    `build_detector(name, num_classes, **build_options)` builds the same structure without them.

    Args:
        name: `torchvision:{fcos|retinanet|fasterrcnn}_{backbone}_fpn`, where backbone is `tiny` or a convolutional network of
            torchvision.models (`fcos_mobilenet_v2_fpn`); one of torchvision's `_v2` and `_320` names;
            `own:{deformable_detr|dino}_{backbone}`; `hf:` and a family of transformers or a local folder with a checkpoint of one, see
            :func:`~ssod_fast.detectors.transformers.build.build_hf`; or `package.module:callable`, which is called with `num_classes` and
            the options and returns a detector, or a model of torchvision or transformers that has an adapter.
        num_classes: without background.
        weights: file with the weights of the whole detector.
        backbone_weights: file with the weights of the classification network.
        options: fields of :class:`BackboneOptions` and :class:`HeadOptions`, and thresholds and counts of the torchvision model, for
            example `nms_thresh`; for `own:` names see :func:`~ssod_fast.detectors.deformable_detr.build.build_own`. By default a backbone
            with pretrained weights gets frozen batch norm and trains its three deepest stages, and it is padded as its weights file says.

    Raises:
        ValueError: unknown name or option (with the nearest ones), or files that do not fit.
        NotADetectorError: what the callable returns lacks a part of the protocol.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    backbone_file = None if backbone_weights is None else read_weights(backbone_weights)
    if name.startswith(TORCHVISION):
        detector, resolved = _build_torchvision(name.removeprefix(TORCHVISION), num_classes, backbone_file, options)
    elif name.startswith(OWN):
        detector, resolved = build_own(name.removeprefix(OWN), num_classes, backbone_file, options)
    elif name.startswith(HF):
        detector, resolved = build_hf(name.removeprefix(HF), num_classes, backbone_file, options)
    else:
        detector, resolved = _call(name, num_classes, backbone_weights, options), options
    if weights is not None:
        load_detector(detector, read_weights(weights))
    detector.build_options = cast(Any, resolved)
    converted: Any = detector
    # Convolutions then keep their outputs channels-last too, which suits CPUs and is what tensor cores read.
    return cast(nn.Module, converted.to(memory_format=torch.channels_last))


def _call(name: str, num_classes: int, backbone_weights: str | Path | None, options: dict[str, Any]) -> nn.Module:
    module, colon, attribute = name.partition(":")
    if not colon:
        expected = "torchvision:NAME, own:NAME, hf:NAME, hf:FOLDER or package.module:callable"
        raise ValueError(f"unknown detector {name!r}: expected {expected}, for example {_example(name)}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        hint = "" if isinstance(error, AttributeError) else "; put the folder of the package on PYTHONPATH, or install it"
        raise ValueError(f"detector {name!r} cannot be imported: {error}{hint}") from error
    if backbone_weights is not None:
        options = {**options, "backbone_weights": backbone_weights}
    _check_call(name, function, {"num_classes": num_classes, **options})
    built = function(num_classes=num_classes, **options)
    detector = _adapted(built, num_classes)
    require(detector, for_method=f"training with {name!r}")
    return detector


def _adapted(built: Any, num_classes: int) -> nn.Module:
    """What a user's function has returned, with an adapter around plain models."""
    if isinstance(built, FCOS | RetinaNet | FasterRCNN):
        return from_torchvision(built, num_classes)
    if type(built).__name__ in {family.model for family in FAMILIES.values()}:
        return from_transformers(built, num_classes)
    return cast(nn.Module, built)


def _check_call(name: str, function: Any, options: dict[str, Any]) -> None:
    """Whether a user's function takes the arguments; a TypeError from inside of it stays what it is."""
    if not callable(function):
        raise ValueError(f"detector {name!r} must be a function that returns a detector, got {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # compiled functions may have none
        return
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(f"detector {name!r} cannot be called with {', '.join(options)}: {error}; it takes {signature}") from error


def _example(name: str) -> str:
    """The names closest to what was typed."""
    common = [f"{family}_{backbone}_fpn" for family in _MODELS for backbone in (TINY, "mobilenet_v2", "resnet50")]
    hint = near(name.rpartition(":")[2], [*common, *OFFICIAL])
    return f"{TORCHVISION}fcos_resnet50_fpn{hint}"


def _build_torchvision(name: str, classes: int, file: WeightsFile | None, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    if name in OFFICIAL:
        return _build_official(name, classes, file, options), options
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in backbone_names():
        raise ValueError(_unknown(name, match))
    family, backbone = match[1], match[2]
    values = {**_defaults(family, backbone, file), **options}
    pyramid, heads, rest = _sort_options(family, name, values)
    model = _ASSEMBLE[family](build_backbone(backbone, pyramid, file), classes, pyramid, heads, rest)
    return from_torchvision(model, classes), values


def _build_official(name: str, classes: int, file: WeightsFile | None, options: dict[str, Any]) -> nn.Module:
    family = name.partition("_")[0]
    check_options(options, _model_options(family), name)
    if file is not None:
        raise ValueError(
            f"{name} takes no backbone_weights: give weights of the whole detector, or choose torchvision:{family}_resnet50_fpn"
        )
    outputs = classes + (family == "fasterrcnn")
    return from_torchvision(getattr(detection, name)(weights=None, weights_backbone=None, num_classes=outputs, **options), classes)


def _unknown(name: str, match: re.Match[str] | None) -> str:
    if match is not None:
        return (
            f"unknown detector {name!r}: {match[2]!r} is no convolutional network of torchvision.models{near(match[2], backbone_names())}"
        )
    return f"unknown detector {name!r}: expected {{fcos|retinanet|fasterrcnn}}_{{backbone}}_fpn, for example {_example(name)}"


def _defaults(family: str, backbone: str, file: WeightsFile | None) -> dict[str, Any]:
    """Options that depend on the family, the backbone and its weights; the rest is in the dataclasses."""
    two_stage = family == "fasterrcnn"
    values: dict[str, Any] = {"levels": (2, 6) if two_stage else (3, 7), "anchor_scale": 8.0 if two_stage else 4.0}
    if file is not None:
        values |= {"frozen_bn": True, "trainable_layers": 3, "same_padding": file.same_padding}
    if backbone == TINY:
        # One convolution per branch learns synthetic scenes sooner than two: AP50 .30, .35 against .24, .22 after 300 steps (2 seeds).
        values |= {"levels": (2, 5) if two_stage else (3, 5), "fpn_channels": 64, "head_convs": 1, "prior_distance": 2.0}
        values |= {"anchor_scale": 4.0 if two_stage else 2.0, "representation_size": 256}
        values |= _TINY_PROPOSALS if two_stage else {}
    return values


def _sort_options(family: str, name: str, values: dict[str, Any]) -> tuple[BackboneOptions, HeadOptions, dict[str, Any]]:
    pyramid_names = {field.name for field in fields(BackboneOptions)} - {"max_pool"}
    head_names = {field.name for field in fields(HeadOptions)}
    check_options(values, pyramid_names | head_names | _model_options(family), name)
    # Lists come from YAML and JSON files.
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    pyramid = BackboneOptions(max_pool=family == "fasterrcnn", **{k: v for k, v in values.items() if k in pyramid_names})
    heads = HeadOptions(**{k: v for k, v in values.items() if k in head_names})
    return pyramid, heads, {k: v for k, v in values.items() if k not in pyramid_names | head_names}


def _model_options(family: str) -> set[str]:
    """Thresholds and counts that torchvision's model takes."""
    return {p for p in inspect.signature(_MODELS[family].__init__).parameters if not _OWN_ARGUMENTS.fullmatch(p)}


def _generator(pyramid: BackboneOptions, sizes: Sequence[tuple[float, ...]], ratios: tuple[float, ...]) -> AnchorGenerator:
    kind = CentredAnchorGenerator if pyramid.same_padding else AnchorGenerator
    return kind(tuple(sizes), (ratios,) * len(sizes))


def _strides(pyramid: BackboneOptions) -> list[int]:
    return [2**level for level in range(pyramid.levels[0], pyramid.levels[1] + 1)]


def _fcos(backbone: BackboneWithFPN, classes: int, pyramid: BackboneOptions, heads: HeadOptions, rest: dict[str, Any]) -> nn.Module:
    generator = _generator(pyramid, [(s,) for s in _strides(pyramid)], (1.0,))
    channels = pyramid.fpn_channels
    norm = partial(nn.GroupNorm, channels // 8)  # 8 channels per group, torchvision's 32 groups at 256 channels
    head = FCOSHead(256, 1, classes, 1)
    head.classification_head = FCOSClassificationHead(channels, 1, classes, heads.head_convs, norm_layer=norm)
    head.regression_head = FCOSRegressionHead(channels, 1, heads.head_convs, norm_layer=norm)
    nn.init.constant_(head.regression_head.bbox_reg.bias, heads.prior_distance)
    return cast(nn.Module, FCOS(backbone, classes, anchor_generator=generator, head=head, **rest))


def _retinanet(backbone: BackboneWithFPN, classes: int, pyramid: BackboneOptions, heads: HeadOptions, rest: dict[str, Any]) -> nn.Module:
    sides = [heads.anchor_scale * s for s in _strides(pyramid)]
    # Three sizes per octave, whole pixels as in torchvision.
    sizes = [tuple(int(side * 2 ** (k / 3)) for k in range(3)) for side in sides]
    generator = _generator(pyramid, sizes, heads.aspect_ratios)
    head = RetinaNetHead(pyramid.fpn_channels, generator.num_anchors_per_location()[0], classes)
    for branch in (head.classification_head, head.regression_head):
        branch.conv = branch.conv[: heads.head_convs]
    return cast(nn.Module, RetinaNet(backbone, classes, anchor_generator=generator, head=head, **rest))


def _faster_rcnn(backbone: BackboneWithFPN, classes: int, pyramid: BackboneOptions, heads: HeadOptions, rest: dict[str, Any]) -> nn.Module:
    generator = _generator(pyramid, [(int(heads.anchor_scale * s),) for s in _strides(pyramid)], heads.aspect_ratios)
    pooled = [str(i) for i in range(min(pyramid.levels[1], 5) - pyramid.levels[0] + 1)]
    return cast(
        nn.Module,
        FasterRCNN(
            backbone,
            rpn_anchor_generator=generator,
            box_roi_pool=MultiScaleRoIAlign(pooled, 7, 2),
            box_head=TwoMLPHead(pyramid.fpn_channels * 49, heads.representation_size),
            box_predictor=FastRCNNPredictor(heads.representation_size, classes + 1),
            **rest,
        ),
    )


_ASSEMBLE: dict[str, Callable[..., nn.Module]] = {"fcos": _fcos, "retinanet": _retinanet, "fasterrcnn": _faster_rcnn}
