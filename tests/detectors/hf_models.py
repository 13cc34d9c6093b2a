"""Small detectors of transformers behind their adapters, and images and targets for them."""

from __future__ import annotations

from typing import Any

import torch
from tiny_transformers import RESNET, build, rt_detr_options
from torch import Tensor

from ssod_fast.detectors import ImageBatch, from_transformers
from ssod_fast.detectors.transformers.families import FAMILIES
from ssod_fast.structures import Target

NAMES = list(FAMILIES)
MASKED = [name for name in NAMES if FAMILIES[name].frame == "image"]
UNMASKED = [name for name in NAMES if FAMILIES[name].frame == "canvas"]
RT_DETR: dict[str, Any] = {
    **{key: value for key, value in rt_detr_options().items() if key not in ("num_labels", "backbone", "use_pretrained_backbone")},
    "backbone_config": {"model_type": "rt_detr_resnet", **RESNET, "out_features": ["stage2", "stage3", "stage4"]},
}


def make(name: str, num_classes: int | None = None, **options: Any) -> Any:
    return from_transformers(build(name), num_classes, **options).train()


def batch_of(*sizes: tuple[int, int], canvas: tuple[int, int], seed: int = 0) -> ImageBatch:
    """Random images, the padding around them 0."""
    tensor = torch.zeros(len(sizes), 3, *canvas)
    generator = torch.Generator().manual_seed(seed)
    for row, (h, w) in zip(tensor, sizes, strict=True):
        row[:, :h, :w] = torch.randn(3, h, w, generator=generator)
    return ImageBatch(tensor, list(sizes))


def boxes_of(*rows: list[float], label: int = 1, **more: Tensor) -> Target:
    return Target(boxes=torch.tensor(rows, dtype=torch.float32).reshape(-1, 4), labels=torch.full((len(rows),), label), **more)  # type: ignore[typeddict-item]


PAIR = batch_of((64, 96), (48, 80), canvas=(64, 96))
TARGETS = [boxes_of([5, 6, 40, 50], [30, 10, 90, 60]), boxes_of([8, 4, 60, 40], label=2)]
NOTHING = boxes_of()


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def seeded(detector: Any, batch: ImageBatch, targets: Any) -> dict[str, Tensor]:
    """Losses with the same random denoising queries in each call."""
    torch.manual_seed(0)
    return detector.losses(batch, targets)  # type: ignore[no-any-return]
