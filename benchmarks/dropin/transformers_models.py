"""Whole detectors of transformers with our ops patched in, against the same detectors as they are.

    python benchmarks/dropin/transformers_models.py [--device cpu|cuda] [--quick] [--threads 1] [--out FOLDER]

Real configurations with random weights; offsets and attention weights are moved off their initial values, so that positions lie between
pixels. Rows go to the file of the machine in benchmarks/results/, and from there into benchmarks/RESULTS.md. Needs transformers.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules of the harness

from harness import OURS, Case, Effort, rotate
from ssod_fast.dropin import transformers as dropin
from whole_models import run_cases

OP = "transformers_models"
CORE_ONLY, ATTENTION_ONLY, UNPATCHED = "ours, fused=False", "ours without set_loss", "transformers"
EFFORT = Effort(sample_s=0.004, case_s=30.0, min_rounds=3, max_rounds=20)
Size = tuple[int, int]
Labels = list[dict[str, Tensor]]
Batch = tuple[Tensor, Labels]


def rt_detr(quick: bool) -> nn.Module:
    """RT-DETR with ResNet-50-vd as published, 80 classes."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection

    small = {"num_queries": 30, "num_denoising": 10, "decoder_layers": 2} if quick else {}
    return shake(RTDetrForObjectDetection(RTDetrConfig(num_labels=80, **small)))


def deformable_detr(quick: bool) -> nn.Module:
    """Deformable DETR with ResNet-50 as published, 80 classes, losses of all layers."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    small = {"num_queries": 30, "encoder_layers": 2, "decoder_layers": 2} if quick else {}
    backbone = ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = DeformableDetrConfig(use_timm_backbone=False, backbone_config=backbone, num_labels=80, auxiliary_loss=True, **small)
    return shake(DeformableDetrForObjectDetection(config))


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """Random weights for what starts at zero, so that queries differ in where they look; about 2 px of spread."""
    for module in model.modules():
        if isinstance(getattr(module, "sampling_offsets", None), nn.Linear):
            nn.init.normal_(module.sampling_offsets.weight, std=2 / module.sampling_offsets.in_features**0.5)
            nn.init.normal_(module.attention_weights.weight, std=1 / module.attention_weights.in_features**0.5)
    return model


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Images of the published size; of half of it for Deformable DETR on a CPU, where one call takes most of a minute otherwise."""
    large = (800, 1333) if device.type == "cuda" else (400, 667)
    plans: dict[str, tuple[Callable[[bool], nn.Module], Size]] = {
        "RT-DETR R50": (rt_detr, (640, 640)),
        "Deformable-DETR R50": (deformable_detr, large),
    }
    for name, (build, size) in plans.items():
        torch.manual_seed(0)
        model = build(quick).to(device)
        yield inference_case(name, model, (96, 128) if quick else size, device)
        yield training_case(name, model, (96, 128) if quick else size, device)


def batches(size: Size, device: torch.device) -> list[Batch]:
    """Two images one at a time, with seven boxes each."""
    rng = torch.Generator().manual_seed(0)
    made = []
    for _ in range(2):
        sides = torch.rand(7, 2, generator=rng) * 0.3 + 0.05
        boxes = torch.cat([torch.rand(7, 2, generator=rng) * (1 - sides) + sides / 2, sides], -1)
        labels = [{"class_labels": torch.randint(80, (7,), generator=rng).to(device), "boxes": boxes.to(device)}]
        made.append((torch.randn(1, 3, *size, generator=rng).to(device), labels))
    return made


def inference_case(name: str, model: nn.Module, size: Size, device: torch.device) -> Case:
    models = {key: copy.deepcopy(model).eval() for key in (OURS, CORE_ONLY, UNPATCHED)}
    dropin.patch(models[OURS])
    dropin.patch(models[CORE_ONLY], fused=False)
    images = batches(size, device)
    return Case(
        op=OP,
        name=f"1x3x{size[0]}x{size[1]}",
        mode=f"{name} inference",
        dtype="float32",
        inputs="random weights",
        bytes=0,
        providers={key: rotate(predict(one), images) for key, one in models.items()},
        check=lambda: check_predictions(models, images[0]),
        note="gate: logits and boxes agree to 1e-3",
        eager_only=tuple(models),
    )


def training_case(name: str, model: nn.Module, size: Size, device: torch.device) -> Case:
    models = {key: copy.deepcopy(model).train() for key in (OURS, ATTENTION_ONLY, UNPATCHED)}
    dropin.patch(models[OURS])
    dropin.set_loss(models[OURS])
    dropin.patch(models[ATTENTION_ONLY])
    images = batches(size, device)
    return Case(
        op=OP,
        name=f"1x3x{size[0]}x{size[1]}",
        mode=f"{name} training step",
        dtype="float32",
        inputs="random weights",
        bytes=0,
        providers={key: rotate(step(one), images) for key, one in models.items()},
        check=lambda: check_losses(models, images[0]),
        note="forward, loss, backward and AdamW; gate: losses agree to 1e-3",
        eager_only=tuple(models),
    )


def predict(model: nn.Module) -> Callable[[Tensor, Labels], Any]:
    return torch.no_grad()(lambda images, _: model(pixel_values=images))


def step(model: nn.Module) -> Callable[[Tensor, Labels], None]:
    """One step of an optimiser of its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def run(images: Tensor, labels: Labels) -> None:
        model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def check_predictions(models: dict[str, nn.Module], batch: Batch) -> None:
    found, core, expected = (predict(model)(*batch) for model in models.values())
    for outputs in (found, core):
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes, rtol=1e-3, atol=1e-3)


def check_losses(models: dict[str, nn.Module], batch: Batch) -> None:
    """Losses before any step, with the same noise in denoising queries and dropout."""
    losses = []
    for model in models.values():
        torch.manual_seed(1)
        with torch.no_grad():
            losses.append(model(pixel_values=batch[0], labels=batch[1]).loss)
    for loss in losses[:-1]:
        torch.testing.assert_close(loss, losses[-1], rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    run_cases(__doc__, cases, EFFORT)
