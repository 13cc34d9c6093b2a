"""The convolutional part: any of torchvision's classification networks, cut into maps of stride 8, 16 and 32."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ..backbones import build_body
from ..weights import WeightsFile

_LEVELS = (3, 4, 5)


class DETRBackbone(nn.Module):
    """Feature maps of stride 8, 16 and 32.

    Args:
        name: one of `ssod_fast.detectors.backbones.backbone_names()`.
        weights: of the classification network.
        frozen_bn: batch norm with fixed statistics and factors, as in DETR. Not for training from scratch.
        trainable_layers: how many of the five stages are trained, counted from the deepest. DETR trains 3.
        same_padding: pad strided convolutions as TensorFlow's "SAME" does.
        tiny_norm: normalisation of the network "tiny".

    Attributes:
        channels: of the three maps.

    Raises:
        ValueError: unknown name or option, a network that lacks one of the strides, or weights that do not fit.
    """

    def __init__(
        self,
        name: str,
        weights: WeightsFile | None = None,
        *,
        frozen_bn: bool = True,
        trainable_layers: int = 3,
        same_padding: bool = False,
        tiny_norm: Literal["group", "batch"] = "group",
    ) -> None:
        super().__init__()
        if not 0 <= trainable_layers <= 5:
            raise ValueError(f"trainable_layers must lie in 0..5, got {trainable_layers}")
        if tiny_norm not in ("group", "batch"):
            raise ValueError(f'tiny_norm must be "group" or "batch", got {tiny_norm!r}')
        body, stages = build_body(
            name, weights, frozen_bn=frozen_bn, trainable_layers=trainable_layers, same_padding=same_padding, tiny_norm=tiny_norm
        )
        lacking = [2**level for level in _LEVELS if level not in stages]
        if lacking:
            raise ValueError(f"backbone {name!r} must have the strides 8, 16 and 32, it lacks {lacking}")
        self._outputs = [stages[level].name for level in _LEVELS]
        self.channels = [stages[level].channels for level in _LEVELS]
        names = [child for child, _ in body.named_children()]
        unused = names[names.index(self._outputs[-1]) + 1 :]
        for child in unused:
            delattr(body, child)
        self.body = body

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> maps [B, C, H / s, W / s] of stride s = 8, 16, 32."""
        maps = []
        for name, module in self.body.named_children():
            x = module(x)
            if name in self._outputs:
                maps.append(x)
        return maps
