"""Small Deformable DETR networks whose every parameter matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssod_fast.detectors.deformable_detr import DeformableDETR, DETRConfig, deformable_detr, dino
from ssod_fast.detectors.protocol import ImageBatch

WIDTH = 32
PADDED = [(64, 96), (50, 70)]
FULL = [(64, 96), (64, 96)]
SMALL = {"queries": 20, "width": WIDTH, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "ffn": 48, "points": 2}


class Trunk(nn.Module):
    """Maps of stride 8, 16 and 32 by a convolution each."""

    channels = (6, 8, 10)

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, 6, 8), (6, 8, 2), (8, 10, 2)]
        self.convolutions = nn.ModuleList(nn.Conv2d(before, after, stride, stride) for before, after, stride in sizes)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for convolution in self.convolutions:
            x = convolution(x).tanh()
            maps.append(x)
        return maps


def config(kind: str, **changes: Any) -> DETRConfig:
    """ "plain", "refine", "anchors", "two_stage" or "dino"."""
    if kind in ("two_stage", "dino"):
        make = deformable_detr if kind == "two_stage" else dino
        return make(3, **{**SMALL, **changes})
    options = {"plain": {}, "refine": {"box_refine": True, "own_heads": True}, "anchors": {"box_refine": True, "box_positions": True}}
    return DETRConfig(3, **{**SMALL, **options[kind], **changes})


def network(kind: str, **changes: Any) -> DeformableDETR:
    """Random also where the initialisation is zero, so that boxes move and attention depends on queries."""
    torch.manual_seed(0)
    net = DeformableDETR(config(kind, **changes), Trunk())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return net


def images(sizes: list[tuple[int, int]] = PADDED, dtype: torch.dtype = torch.float32) -> ImageBatch:
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(len(sizes), 3, 64, 96, generator=generator, dtype=torch.float64).to(dtype)
    for image, (h, w) in zip(tensor, sizes, strict=True):
        image[:, h:] = 0
        image[:, :, w:] = 0
    return ImageBatch(tensor, sizes)
