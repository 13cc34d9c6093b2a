"""A DINO and a Deformable DETR small enough for tests of Semi-DETR, and views that differ from each other."""

from __future__ import annotations

import math
from typing import Any

import torch
from tiny_detector import make_batches
from torch import Tensor, nn

from ssod_fast.data.batches import LabeledBatch, UnlabeledBatch
from ssod_fast.detectors.deformable_detr.backbone import DETRBackbone
from ssod_fast.detectors.deformable_detr.config import DETRConfig, deformable_detr, dino
from ssod_fast.detectors.deformable_detr.detector import DETRDetector
from ssod_fast.detectors.deformable_detr.network import DeformableDETR
from ssod_fast.methods import SemiDETR, SemiDETRConfig, SemiSupervisedDetector

SMALL: dict[str, Any] = {"width": 32, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "queries": 20, "ffn": 64, "points": 2}


class Cast(nn.Module):
    """A backbone that takes images of any floating dtype."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.channels = body.channels

    def forward(self, images: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.body(images.to(next(self.body.parameters()).dtype))
        return maps


def make_detector(family: str = "dino", *, outspoken: bool = True, classes: int = 3, seed: int = 3, **options: Any) -> DETRDetector:
    """A detector with random weights.

    Args:
        family: "dino" or "deformable_detr".
        outspoken: scores spread over 0..1 and boxes over the image; otherwise they are as training starts.
        classes: number of classes.
        seed: of the weights.
        options: other fields of the configuration.
    """
    make, noise = (dino, {"denoising": 6}) if family == "dino" else (deformable_detr, {})
    config: DETRConfig = make(classes, **{**SMALL, **noise, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = DETRDetector(DeformableDETR(config, Cast(DETRBackbone("tiny", None))))
        if outspoken:
            _speak_up(detector.network)
    return detector


@torch.no_grad()
def _speak_up(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if "classes" in name:
            parameter.copy_(torch.randn_like(parameter) * 0.5 if name.endswith("weight") else torch.full_like(parameter, -1.5))
        elif "boxes" in name and name.endswith("layers.2.weight"):
            parameter.add_(torch.randn_like(parameter) * 0.5)
        elif "content" in name:
            parameter.copy_(torch.randn_like(parameter))


def make_model(family: str = "dino", *, dtype: torch.dtype = torch.float64, switch_at: int = 10, **options: Any) -> SemiSupervisedDetector:
    """A student, a teacher that is not quite like it, and the method with `options`; options of the detector with a leading `net_`."""
    of_network = {name[4:]: options.pop(name) for name in list(options) if name.startswith("net_")}
    student = make_detector(family, **of_network)
    config = SemiDETRConfig(**{"switch_at": switch_at, "denoising": 6, "cls_pseudo_thr": 0.95, **options})
    model = SemiSupervisedDetector(student, SemiDETR(config)).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * parameter.abs().mean())
    model.train()
    return model


def make_views(seed: int, unlabeled: int = 2, hw: tuple[int, int] = (64, 80)) -> tuple[LabeledBatch, UnlabeledBatch]:
    """Random batches; weak views are half the originals, strong ones smaller still, turned a little and mirrored, and differ in size."""
    labeled, pairs = make_batches(seed, labeled=2, unlabeled=unlabeled, hw=hw)
    turn, scale = math.radians(4), 0.9
    c, s = scale * math.cos(turn), scale * math.sin(turn)
    matrix = torch.tensor([[-c, s, hw[1] * 0.9], [s, c, 1.0], [0, 0, 1]], dtype=torch.float64)
    size = [(hw[0] - 8 * (i % 2), hw[1] - 16 * (i % 2)) for i in range(unlabeled)]
    strong = [image[:, :h, :w].contiguous() for image, (h, w) in zip(pairs.strong, size, strict=True)]
    half = torch.tensor([0.5, 0.5, 1], dtype=torch.float64).diag()
    weak_matrix, strong_matrix = (m.expand(unlabeled, 3, 3).clone() for m in (half, matrix @ half))
    original_hw = [(2 * hw[0], 2 * hw[1])] * unlabeled
    return labeled, UnlabeledBatch(pairs.weak, strong, weak_matrix, strong_matrix, original_hw, pairs.image_ids)


def gradients(model: SemiSupervisedDetector) -> dict[str, Tensor]:
    """Gradients of everything that is trained, by name; zeros where there is none."""
    named = [(name, p) for part in model.trained for name, p in part.named_parameters() if p.requires_grad]
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}
    for _, p in named:
        p.grad = None
    return found
