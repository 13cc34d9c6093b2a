"""Our Deformable DETR against that of transformers: same weights, same images, in one process.

    python benchmarks/detectors/deformable_detr.py [--device cpu|cuda] [--quick] [--threads 1] [--out FOLDER]

ResNet-50, random weights converted from transformers' model, offsets and attention weights moved off their initial values. A third provider
is transformers' model with our ops patched in. Rows go to the file of the machine in benchmarks/results/, and from there into
benchmarks/RESULTS.md. Needs transformers.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules of the harness
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "dropin"))

from transformers_models import shake

from harness import OURS, Case, Effort, rotate
from ssod_fast.detectors import ImageBatch
from ssod_fast.detectors.deformable_detr import DeformableDETR, DETRBackbone, DETRCriterion, DETRDetector
from ssod_fast.detectors.deformable_detr.convert import config_from_transformers, from_transformers
from ssod_fast.dropin import transformers as dropin
from ssod_fast.structures import PaddedTargets, Target
from whole_models import run_cases

OP = "deformable_detr"
PATCHED, UNPATCHED = "transformers, our ops", "transformers"
EFFORT = Effort(sample_s=0.004, case_s=60.0, min_rounds=3, max_rounds=12)
OBJECTS = 7
Size = tuple[int, int]
Call = Callable[["Scene"], Any]


@dataclass(frozen=True)
class Scene:
    """One batch, in our form and in theirs.

    Attributes:
        images: normalised, padded to the largest.
        targets: boxes xyxy in pixels.
        theirs: arguments of transformers' model.
    """

    images: ImageBatch
    targets: PaddedTargets
    theirs: dict[str, Any]


def scene(sizes: list[Size], device: torch.device, rng: torch.Generator) -> Scene:
    """Random images with seven boxes each."""
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    pixels, mask = torch.zeros(len(sizes), 3, height, width), torch.zeros(len(sizes), height, width, dtype=torch.int64)
    ours: list[Target] = []
    labels = []
    for i, (h, w) in enumerate(sizes):
        pixels[i, :, :h, :w], mask[i, :h, :w] = torch.randn(3, h, w, generator=rng), 1
        sides = torch.rand(OBJECTS, 2, generator=rng) * 0.3 + 0.05
        boxes = torch.cat([torch.rand(OBJECTS, 2, generator=rng) * (1 - sides) + sides / 2, sides], -1)
        classes = torch.randint(80, (OBJECTS,), generator=rng)
        ours.append(Target(boxes=box_convert(boxes, "cxcywh", "xyxy") * torch.tensor([w, h, w, h]), labels=classes))
        labels.append({"class_labels": classes.to(device), "boxes": boxes.to(device)})
    theirs = {"pixel_values": pixels.to(device), "pixel_mask": mask.to(device), "labels": labels}
    return Scene(ImageBatch(pixels.to(device), sizes), PaddedTargets.from_list(ours, device=device), theirs)


def their_model(quick: bool, two_stage: bool) -> nn.Module:
    """Deformable DETR with ResNet-50, 80 classes, losses of all layers, no dropout; with refinement and second stage if wanted."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    small = {"num_queries": 30, "two_stage_num_proposals": 30, "encoder_layers": 2, "decoder_layers": 2} if quick else {}
    config = DeformableDetrConfig(
        use_timm_backbone=False,
        backbone_config=ResNetConfig(out_features=["stage2", "stage3", "stage4"]),
        num_labels=80,
        auxiliary_loss=True,
        dropout=0.0,
        with_box_refine=two_stage,
        two_stage=two_stage,
        **small,
    )
    model = shake(DeformableDetrForObjectDetection(config))
    for name, parameter in model.model.backbone.named_parameters():
        # As published and as in ours; transformers freezes a ResNet of its own altogether.
        parameter.requires_grad_(any(f"stages.{i}." in name for i in (1, 2, 3)))
    return model


def our_detector(model: Any) -> DETRDetector:
    """The same network with the same weights and weights of losses."""
    given = model.config
    config = config_from_transformers(given)
    network = DeformableDETR(config, DETRBackbone("resnet50"))
    network.load_state_dict(from_transformers(model.state_dict(), config))
    criterion = DETRCriterion(
        cls_weight=1.0,
        l1_weight=given.bbox_loss_coefficient,
        giou_weight=given.giou_loss_coefficient,
        cls_cost=given.class_cost,
        l1_cost=given.bbox_cost,
        giou_cost=given.giou_cost,
    )
    detector = DETRDetector(network, criterion)
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (detector, model)]
    if counts[0] != counts[1]:
        raise RuntimeError(f"as many trained weights as in transformers expected, {counts[1]}, got {counts[0]}")
    return detector.to(memory_format=torch.channels_last)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Images of the published size; of half of it on a CPU. The second batch is padded."""
    large = (800, 1333) if device.type == "cuda" else (400, 667)
    height, width = (96, 128) if quick else large
    alone, pair = [(height, width)], [(height, width), (height * 3 // 4, width)]
    for name, two_stage, sizes in (("plain", False, alone), ("plain", False, pair), ("two-stage", True, alone)):
        torch.manual_seed(0)
        model = their_model(quick, two_stage).to(device)
        rng = torch.Generator().manual_seed(0)
        scenes = [scene(sizes, device, rng) for _ in range(2)]
        yield inference_case(name, model, scenes)
        yield training_case(name, model, scenes)


def inference_case(name: str, model: nn.Module, scenes: list[Scene]) -> Case:
    models = {OURS: our_detector(model).to(_device(model)), PATCHED: copy.deepcopy(model), UNPATCHED: model}
    dropin.patch(models[PATCHED])
    calls = {key: predict(one.eval()) for key, one in models.items()}
    return _case(f"{name} inference", scenes, calls, lambda: check_predictions(calls, scenes[0]), "gate: logits and boxes agree to 1e-3")


def training_case(name: str, model: nn.Module, scenes: list[Scene]) -> Case:
    models = {OURS: our_detector(model).to(_device(model)), PATCHED: copy.deepcopy(model), UNPATCHED: copy.deepcopy(model)}
    dropin.patch(models[PATCHED])
    dropin.set_loss(models[PATCHED])
    for one in models.values():
        one.train()
    note = "forward, loss, backward and AdamW; gate: losses of the decoder agree to 1e-3; ours trains the encoder's proposals too"
    calls = {key: step(one) for key, one in models.items()}
    return _case(f"{name} training step", scenes, calls, lambda: check_losses(models, scenes[0]), note)


def _case(mode: str, scenes: list[Scene], calls: dict[str, Call], check: Callable[[], None], note: str) -> Case:
    images = scenes[0].images.tensor
    return Case(
        op=OP,
        name="x".join(str(n) for n in images.shape),
        mode=f"R50 {mode}",
        dtype="float32",
        inputs="random weights",
        bytes=0,
        providers={key: rotate(call, [(s,) for s in scenes]) for key, call in calls.items()},
        check=check,
        targets={UNPATCHED: 1.0},
        target_timing="eager",
        note=note,
        eager_only=tuple(calls),
    )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def outputs(model: nn.Module, batch: Scene) -> tuple[Tensor, Tensor]:
    """Logits and boxes of the last layer."""
    if isinstance(model, DETRDetector):
        decoded, _ = model.network(batch.images)
        return decoded.logits[-1], decoded.boxes[-1]
    found = model(**{name: batch.theirs[name] for name in ("pixel_values", "pixel_mask")})
    return found.logits, found.pred_boxes


def loss(model: nn.Module, batch: Scene, *, of_encoder: bool = True) -> Tensor:
    """Sum of the losses; ours has those of the encoder's proposals too, which transformers does not train."""
    if isinstance(model, DETRDetector):
        terms = model(batch.images, batch.targets)
        return torch.stack([value for name, value in terms.items() if of_encoder or not name.startswith("enc_")]).sum()
    found: Tensor = model(**batch.theirs).loss
    return found


def predict(model: nn.Module) -> Call:
    return lambda batch: outputs(model, batch)


def step(model: nn.Module) -> Call:
    """One step of an optimiser of its own."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def run(batch: Scene) -> None:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def check_predictions(calls: dict[str, Call], batch: Scene) -> None:
    found, patched, expected = (call(batch) for call in calls.values())
    for ours in (found, patched):
        for value, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(value, theirs, rtol=1e-3, atol=1e-3)


def check_losses(models: dict[str, nn.Module], batch: Scene) -> None:
    """Losses of the decoder before any step."""
    with torch.no_grad():
        found, patched, expected = (loss(model, batch, of_encoder=False) for model in models.values())
    for ours in (found, patched):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    run_cases(__doc__, cases, EFFORT)
