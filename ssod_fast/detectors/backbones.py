"""Feature pyramids on any of torchvision's convolutional classification networks, and on a tiny one for a CPU."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torchvision.models import get_model, list_models
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from .protocol import near
from .surgery import freeze_batch_norm
from .surgery import same_padding as pad_same
from .weights import WeightsFile, load_backbone

TINY = "tiny"
_DEEPEST = 5  # stages of a classification network: strides 2, 4, 8, 16, 32
_PROBE = 64  # side of the image that reveals the strides: the smallest with more than one cell at stride 32
_HEAD_MODULES = ("avgpool", "classifier", "fc")
# Channels-last or windowed feature maps, or several outputs while training.
_UNSUITABLE = ("vit", "swin", "maxvit", "inception", "googlenet")


@dataclass(frozen=True)
class Stage:
    """The last module of a network with a given stride."""

    name: str
    channels: int


@dataclass(frozen=True)
class BackboneOptions:
    """How a feature pyramid is built.

    Attributes:
        levels: first and last level; level l has stride 2**l. Levels above 5 are made from level 5.
        fpn_channels: channels of each level. 64 to 128 suit a CPU.
        frozen_bn: batch norm with fixed statistics and factors. True suits pretrained weights: detection batches are small.
        trainable_layers: how many of the five stages are trained, counted from the deepest.
        same_padding: pad strided convolutions as TensorFlow's "SAME" does, right and bottom first.
        max_pool: make level 6 by subsampling level 5, as Faster R-CNN does, instead of by a convolution.
        tiny_norm: normalisation of the tiny network, "group" or "batch"; without meaning for the others. Batch norm learns much faster from
            scratch where batches hold several images; group norm suits steps with one image.
    """

    levels: tuple[int, int]
    fpn_channels: int = 256
    frozen_bn: bool = False
    trainable_layers: int = _DEEPEST
    same_padding: bool = False
    max_pool: bool = False
    tiny_norm: Literal["group", "batch"] = "group"

    def __post_init__(self) -> None:
        first, last = self.levels
        if not 1 <= first <= min(last, _DEEPEST) or last > 7:
            raise ValueError(f"levels must be (first, last) with 1 <= first <= 5 and first <= last <= 7, got {self.levels}")
        if self.max_pool and last > 6:
            raise ValueError(f"levels must end at 6 or before with max pooling, got {self.levels}")
        if self.fpn_channels < 8 or self.fpn_channels % 8:
            raise ValueError(f"fpn_channels must be a positive multiple of 8, got {self.fpn_channels}")
        if not 0 <= self.trainable_layers <= _DEEPEST:
            raise ValueError(f"trainable_layers must lie in 0..{_DEEPEST}, got {self.trainable_layers}")
        if self.tiny_norm not in ("group", "batch"):
            raise ValueError(f'tiny_norm must be "group" or "batch", got {self.tiny_norm!r}')


def build_backbone(name: str, options: BackboneOptions, weights: WeightsFile | None = None) -> BackboneWithFPN:
    """A feature pyramid whose output maps are named "0", "1", ... from the finest on.

    Args:
        name: one of :func:`backbone_names`.
        options: levels, channels, what is trained.
        weights: of the classification network.

    Raises:
        ValueError: unknown name, levels that the network does not have, or weights that do not fit.
    """
    body, stages = build_body(
        name,
        weights,
        frozen_bn=options.frozen_bn,
        trainable_layers=options.trainable_layers,
        same_padding=options.same_padding,
        tiny_norm=options.tiny_norm,
    )
    return _pyramid(name, body, stages, options)


def build_body(
    name: str,
    weights: WeightsFile | None,
    *,
    frozen_bn: bool,
    trainable_layers: int,
    same_padding: bool,
    tiny_norm: Literal["group", "batch"],
) -> tuple[nn.Module, dict[int, Stage]]:
    """The convolutional part of a classification network, whose children run one after another, and its stages by level.

    Arguments are those of :func:`build_backbone` and :class:`BackboneOptions`.
    """
    network = TinyNet(tiny_norm) if name == TINY else _network(name)
    if weights is not None:
        load_backbone(network, weights)
    body = _body(network)
    if same_padding:
        pad_same(body)
    stages = find_stages(body)
    freeze_stages(body, stages, trainable_layers)
    if frozen_bn:
        freeze_batch_norm(body)
    return body, stages


def backbone_names() -> list[str]:
    """Networks that :func:`build_backbone` knows."""
    import torchvision.models

    return [TINY, *(name for name in list_models(module=torchvision.models) if not name.startswith(_UNSUITABLE))]


def _network(name: str) -> nn.Module:
    names = backbone_names()
    if name not in names:
        raise ValueError(f"unknown backbone {name!r}{near(name, names)}: expected {TINY} or a convolutional network of torchvision.models")
    return cast(nn.Module, get_model(name, weights=None))


def _body(network: Any) -> nn.Module:
    """The modules of a classification network that run one after another before its classifier."""
    for attribute in ("features", "layers"):
        if isinstance(getattr(network, attribute, None), nn.Sequential):
            return cast(nn.Module, getattr(network, attribute))
    children = OrderedDict((n, m) for n, m in network.named_children() if n not in _HEAD_MODULES)
    trunk = children.pop("trunk_output", None)  # RegNet nests its stages
    if trunk is not None:
        children.update(trunk.named_children())
    return nn.Sequential(children)


@torch.no_grad()
def find_stages(body: nn.Module) -> dict[int, Stage]:
    """The last module of each stride 2**l, by level l, found by sending a blank image through `body`."""
    modes = [(m, m.training) for m in body.modules()]
    body.eval()
    stages: dict[int, Stage] = {}
    x = torch.zeros(1, 3, _PROBE, _PROBE)
    for name, module in body.named_children():
        x = module(x)
        stride = _PROBE // x.shape[-1]
        stages[stride.bit_length() - 1] = Stage(name, int(x.shape[1]))
    for module, training in modes:
        module.training = training
    return {level: stage for level, stage in stages.items() if 1 <= level <= _DEEPEST}


def freeze_stages(body: nn.Module, stages: dict[int, Stage], trainable_layers: int) -> None:
    """Turns off the gradients of all but the `trainable_layers` deepest of the five stages."""
    level = _DEEPEST - trainable_layers
    if level == 0 or not any(k <= level for k in stages):
        return
    last = stages[max(k for k in stages if k <= level)].name
    for name, module in body.named_children():
        module.requires_grad_(False)
        if name == last:
            return


def _pyramid(name: str, body: nn.Module, stages: dict[int, Stage], options: BackboneOptions) -> BackboneWithFPN:
    first, last = options.levels
    wanted = range(first, min(last, _DEEPEST) + 1)
    lacking = [level for level in wanted if level not in stages]
    if lacking:
        raise ValueError(f"levels {options.levels} need strides {[2**k for k in lacking]}, which {name} does not have")
    names = {stages[level].name: str(i) for i, level in enumerate(wanted)}
    channels = [stages[level].channels for level in wanted]
    backbone = BackboneWithFPN(body, names, channels, options.fpn_channels, extra_blocks=NoExtraLevels())
    backbone.fpn.extra_blocks = _extra_levels(options)
    return backbone


def _extra_levels(options: BackboneOptions) -> ExtraFPNBlock | None:
    count, channels = options.levels[1] - _DEEPEST, options.fpn_channels
    if count <= 0:
        return None
    if options.max_pool:
        return LastLevelMaxPool()
    return LastLevelP6P7(channels, channels) if count == 2 else LevelP6(channels)


class NoExtraLevels(ExtraFPNBlock):  # type: ignore[misc]
    """Adds no level; `BackboneWithFPN` would add one by default."""

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """The levels as they are."""
        return results, names


class LevelP6(ExtraFPNBlock):  # type: ignore[misc]
    """Adds one level by a strided convolution of the last one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(channels, channels, 3, 2, 1)
        nn.init.kaiming_uniform_(self.p6.weight, a=1)
        nn.init.zeros_(cast(Tensor, self.p6.bias))

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """The levels [B, C, h, w] and one of half the size."""
        return [*results, self.p6(results[-1])], [*names, "p6"]


class TinyNet(nn.Module):
    """A network of 8 convolutions for images of 128 to 256 pixels on a CPU, trained from scratch.

    Group norm by default, because one mosaic or a handful of images per step gives poor batch statistics, and statistics of labelled, mixed
    and mosaic batches differ.

    Args:
        norm: "group" or "batch".
    """

    WIDTHS = (16, 32, 48, 64, 96)

    def __init__(self, norm: Literal["group", "batch"] = "group") -> None:
        super().__init__()
        blocks, before = [], 3
        for level, width in enumerate(self.WIDTHS, start=1):
            layers = [_conv_norm(before, width, 2, norm)]
            if level > 2:
                layers.append(_conv_norm(width, width, 1, norm))
            blocks.append(nn.Sequential(*layers))
            before = width
        self.features = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 96, H/32, W/32]."""
        return cast(Tensor, self.features(x))


def _conv_norm(before: int, width: int, stride: int, norm: str) -> nn.Sequential:
    conv = nn.Conv2d(before, width, 3, stride, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    normalise = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(width // 8, width)
    return nn.Sequential(conv, normalise, nn.ReLU(inplace=True))
