"""What the tests of compose share: the implementations to run, random mixes, and a slow oracle in float64."""

from __future__ import annotations

import importlib
import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from ssod_fast.ops.compose_plan import ComposePlan, Placement
from ssod_fast.structures import PaddedTargets, Target

images_module = importlib.import_module("ssod_fast.ops.compose")
boxes_module = importlib.import_module("ssod_fast.ops.compose_boxes")

IMPLEMENTATIONS: list[Any] = ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
if os.environ.get("TRITON_INTERPRET") == "1":
    IMPLEMENTATIONS.append("triton")  # the launchers on CPU tensors

MEAN, STD = (10, 20, 30), (2, 4, 5)  # of the cases that are checked by hand
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
PATCH = tuple[int, int, int, int]


def use(implementation: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Makes the public functions run on one implementation; the device its tensors must be on."""
    if implementation == "reference":
        monkeypatch.setattr(images_module, "_images", images_module._images_reference)
        monkeypatch.setattr(images_module, "_write", images_module._cache_write_reference)
        monkeypatch.setattr(boxes_module, "_boxes", boxes_module.reference)
    elif implementation == "triton":
        kernels = importlib.import_module("ssod_fast.kernels.compose")
        monkeypatch.setattr(images_module, "_images", kernels.compose_images)
        monkeypatch.setattr(images_module, "_write", kernels.cache_write)
        monkeypatch.setattr(boxes_module, "_boxes", importlib.import_module("ssod_fast.kernels.compose_boxes").compose_boxes)
    return torch.device("cuda" if implementation == "cuda" else "cpu")


def oracle(sources: Any, plan: ComposePlan, **options: Any) -> Tensor:
    """compose_images with values in float64 and no rounding to `out_dtype`, on the CPU."""
    wanted = options.get("out_dtype", torch.float32)

    def exact(*args: Any) -> Tensor:
        return images_module._images_reference(
            *args[:14], torch.float32 if wanted == torch.uint8 else torch.float64, *args[15:], torch.float64
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images_module, "_images", exact)
        result: Tensor = images_module.compose_images(sources, plan, **options)
    return result.clamp(0, 255) if wanted == torch.uint8 else result


def constant(height: int, width: int, value: int, device: torch.device) -> Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8, device=device)


def noise(rng: random.Random, height: int, width: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return (torch.rand(3, height, width, generator=generator) * 255).to(dtype)


def random_patches(rng: random.Random, most: int) -> list[PATCH]:
    corners = [(rng.randint(-5, 30), rng.randint(-5, 30)) for _ in range(rng.randint(0, most))]
    return [(x, y, x + rng.randint(0, 15), y + rng.randint(0, 15)) for x, y in corners]


def random_placement(rng: random.Random, src: int, hw: tuple[int, int], weight: float) -> Placement:
    options: dict[str, Any] = {
        "offset": (rng.randint(-20, 40), rng.randint(-20, 40)),
        "flip": rng.randint(0, 3),
        "weight": weight,
        "erase": random_patches(rng, 3),
    }
    if rng.random() < 0.5:
        return Placement.scaled(src, hw, rng.choice([0.3, 0.45, 0.5, 1, 1.3, 2.1]), **options)
    return Placement.resized(src, hw, (rng.randint(1, 50), rng.randint(1, 50)), **options)


def random_plan(rng: random.Random, sizes: list[tuple[int, int]]) -> ComposePlan:
    canvases = [(rng.randint(1, 60), rng.randint(1, 60)) for _ in range(rng.randint(1, 3))]
    places = rng.randint(0, 4)
    rows = []
    for _ in canvases:
        chosen = [rng.randrange(len(sizes)) for _ in range(rng.randint(0, places))]
        rows.append([random_placement(rng, src, sizes[src], rng.choice([1 / places, 0.2])) for src in chosen])
    erase = [[(3, 4, 9, 8)]] * len(canvases) if rng.random() < 0.3 else None
    return ComposePlan.from_placements(canvases, rows, erase)


def boxes_of(*rows: list[float], device: torch.device | None = None) -> PaddedTargets:
    """One image whose boxes are labelled 0, 1, 2, ..."""
    target = Target(boxes=torch.tensor(rows, dtype=torch.float32).reshape(-1, 4), labels=torch.arange(len(rows)))
    return PaddedTargets.from_list([target], device=device)
