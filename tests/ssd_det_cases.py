"""Refiners and Faster R-CNNs small enough for tests of SSD-Det, and scenes with noisy boxes."""

from __future__ import annotations

from typing import Any

import torch
from tiny_detector import make_batches
from torch import Tensor

from ssod_fast.data.batches import LabeledBatch
from ssod_fast.detectors import build_detector
from ssod_fast.detectors.faster_rcnn import FasterRCNNDetector
from ssod_fast.methods import SemiSupervisedDetector, SSDDet, SSDDetConfig
from ssod_fast.methods.ssd_det import Levels, NoisyBoxes, Refiner
from ssod_fast.structures import Target

SMALL: dict[str, Any] = {"ratios": (1.0, 1.2), "shakes": (0.2,), "hidden": 16, "negatives": 8}
CHANNELS, CLASSES = 4, 3
SIZES = [(180, 230), (256, 200)]
STRIDES = (4, 8, 16, 32)


def make_refiner(*, outspoken: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Refiner:
    """A refiner with random weights; `outspoken` ones differ between proposals, others are as training starts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        refiner = Refiner(SSDDetConfig(**{**SMALL, **options}), CHANNELS, CLASSES).to(dtype)
        if outspoken:
            for name, parameter in refiner.named_parameters():
                if name.endswith("weight"):
                    torch.nn.init.normal_(parameter, std=0.7 / parameter.shape[1] ** 0.5)
                    parameter.data *= 0.2 if "reg" in name else 1.5
                elif "cls" in name:
                    torch.nn.init.normal_(parameter, std=0.5)
    return refiner


def make_levels(dtype: torch.dtype = torch.float64, seed: int = 1, batch: int = 2) -> Levels:
    """Random maps of a padded batch of 256 x 256 pixels, that take gradients."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(batch, CHANNELS, 256 // s, 256 // s, generator=generator, dtype=dtype).requires_grad_() for s in STRIDES]
    return Levels(maps, STRIDES)


def make_targets(counts: list[int], dtype: torch.dtype = torch.float64, seed: int = 2, clean: bool = False) -> list[Target]:
    """Random boxes inside of images of `SIZES`, for two levels of the pyramid."""
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for (height, width), count in zip(SIZES, counts, strict=True):
        size = torch.rand(count, 2, generator=generator, dtype=dtype) * 140 + 12
        low = torch.rand(count, 2, generator=generator, dtype=dtype) * (torch.tensor([width, height]) - size)
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        target = Target(boxes=torch.cat([low, low + size], 1), labels=labels)
        if clean:
            target["clean_boxes"] = target["boxes"] + 3
        targets.append(target)
    return targets


def make_noisy(counts: list[int], **options: Any) -> NoisyBoxes:
    return NoisyBoxes.pack(make_targets(counts, **options), SIZES, torch.device("cpu"))


def make_uniforms(count: int = 8, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    return torch.rand(batch, count, 4, generator=torch.Generator().manual_seed(3), dtype=dtype)


def make_detector(classes: int = 2, seed: int = 0, **options: Any) -> FasterRCNNDetector:
    """Faster R-CNN on the tiny backbone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        name = "torchvision:fasterrcnn_tiny_fpn"
        detector = build_detector(name, classes, **{"fpn_channels": 16, "representation_size": 32, **options})
    assert isinstance(detector, FasterRCNNDetector)
    return detector


def make_model(**options: Any) -> SemiSupervisedDetector:
    model = SemiSupervisedDetector(make_detector(), SSDDet(SSDDetConfig(**{**SMALL, **options})))
    return model.train()


def noisy_batch(seed: int, noise: float = 0.2, labeled: int = 2) -> LabeledBatch:
    """Coloured rectangles whose boxes are shifted and scaled; the right ones are `clean_boxes`."""
    batch, _ = make_batches(seed, labeled=labeled)
    generator = torch.Generator().manual_seed(1000 + seed)
    for target in batch.targets:
        clean = target["boxes"]
        size = (clean[:, 2:] - clean[:, :2]).repeat(1, 2)
        target["clean_boxes"] = clean
        target["boxes"] = clean + (torch.rand(clean.shape, generator=generator) * 2 - 1) * noise * size
    return batch


def gradients(*modules: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients of everything that is trained, by name; taken away from it."""
    named = [(f"{i}.{name}", p) for i, module in enumerate(modules) for name, p in module.named_parameters() if p.requires_grad]
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}
    for _, p in named:
        p.grad = None
    return found
