"""Predictions and targets of a DETR-like detector to time with, and the matchers of peers."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou

from boxes import optional

KINDS = ("early", "late", "clustered", "equal", "mixed")
LOOP = "per-image torch loop + scipy"
TRANSFORMERS = "transformers"
ULTRALYTICS = "ultralytics"
RFDETR = "RF-DETR"

Targets = list[dict[str, Tensor]]
Pairs = Sequence[tuple[Any, Any]]
Matcher = Callable[[Tensor, Tensor, Targets], Pairs]  # logits [B, Q, C], boxes [B, Q, 4] and targets to pairs


def detr_batch(
    kind: str, layers: int, batch: int, queries: int, targets: int | Sequence[int], classes: int, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Targets]:
    """Logits [L, B, Q, C], boxes [L, B, Q, 4] normalised cxcywh, and the targets of each image.

    Args:
        kind: `early`: untrained queries; `late`: about three near duplicates per target that know its class, the others background;
            `clustered`: the same in a crowd of three classes; `equal`: every query says the same; `mixed`: images early and late in turn.
        layers: L.
        batch: B.
        queries: Q.
        targets: per image, or one number for all.
        classes: C.
        device: where all of it goes.
        seed: of the random numbers.
    """
    rng = torch.Generator().manual_seed(seed)
    sizes = [targets] * batch if isinstance(targets, int) else list(targets)
    logits = torch.randn(layers, batch, queries, classes, generator=rng) - 4.6
    boxes = _boxes(rng, layers, batch, queries)
    wanted: Targets = []
    for image, n in enumerate(sizes):
        crowd = kind == "clustered"
        truth = _boxes(rng, n) * 0.2 + 0.4 if crowd else _boxes(rng, n)
        labels = torch.randint(0, 3 if crowd else classes, (n,), generator=rng)
        if kind in ("late", "clustered") or (kind == "mixed" and image % 2):
            _train(logits[:, image], boxes[:, image], truth, labels, rng)
        wanted.append({"labels": labels.to(device), "boxes": truth.to(device)})
    if kind == "equal":
        logits, boxes = logits[:, :, :1].repeat(1, 1, queries, 1), boxes[:, :, :1].repeat(1, 1, queries, 1)
    elif kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    return logits.to(device), boxes.to(device), wanted


def _boxes(rng: torch.Generator, *shape: int) -> Tensor:
    sides = torch.rand(*shape, 2, generator=rng) * 0.3 + 0.02
    return torch.cat([torch.rand(*shape, 2, generator=rng) * (1 - sides) + sides / 2, sides], -1)


def _train(logits: Tensor, boxes: Tensor, truth: Tensor, labels: Tensor, rng: torch.Generator) -> None:
    """Turns three queries per target, where there are as many, into near duplicates of it; in place, [L, Q, ...]."""
    layers, queries = logits.shape[:2]
    copies = torch.randperm(queries, generator=rng)[: 3 * len(labels)]
    target = torch.arange(len(copies)) % max(len(labels), 1)
    noise = torch.randn(layers, len(copies), 4, generator=rng) * 0.05 * truth[target, 2:].repeat(1, 2)
    boxes[:, copies] = truth[target] + noise
    logits[:, copies, labels[target]] = 2 + torch.randn(layers, len(copies), generator=rng)


def corners(boxes: Tensor) -> Tensor:
    """[..., 4] cxcywh to xyxy."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def image_cost(logits: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
    """2 focal + 5 L1 - 2 GIoU of one image, [Q, T], as one would write it in torch."""
    p = logits.sigmoid()[:, labels]
    negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    distance = torch.cdist(boxes, truth, p=1)
    return 5 * distance + 2 * (positive - negative) - 2 * generalized_box_iou(corners(boxes), corners(truth))


def torch_loop() -> Matcher | None:
    """Costs of one image after the other, each solved by scipy."""
    scipy = optional("scipy.optimize")
    if scipy is None:
        return None

    @torch.no_grad()
    def matcher(logits: Tensor, boxes: Tensor, targets: Targets) -> Pairs:
        pairs = []
        for x, y, target in zip(logits, boxes, targets, strict=True):
            i, j = scipy.linear_sum_assignment(image_cost(x, y, target["labels"], target["boxes"]).cpu().numpy())
            pairs.append((torch.as_tensor(i), torch.as_tensor(j)))
        return pairs

    return matcher


def transformers_matcher() -> Matcher | None:
    """The matcher of Deformable DETR, which computes costs across images."""
    module = optional("transformers.loss.loss_deformable_detr")
    if module is None:
        return None
    theirs = module.DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    return lambda logits, boxes, targets: theirs(
        {"logits": logits, "pred_boxes": boxes}, [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    )


def ultralytics_matcher() -> Matcher | None:
    """The matcher of RT-DETR there; it writes settings when it is imported, which go to a temporary folder."""
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
    os.environ.setdefault("YOLO_VERBOSE", "false")
    module = optional("ultralytics.models.utils.ops")
    if module is None:
        return None
    theirs = module.HungarianMatcher(cost_gain={"class": 2, "bbox": 5, "giou": 2})

    def matcher(logits: Tensor, boxes: Tensor, targets: Targets) -> Pairs:
        sizes = [len(t["labels"]) for t in targets]
        found = theirs(boxes, logits, torch.cat([t["boxes"] for t in targets]), torch.cat([t["labels"] for t in targets]), sizes)
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)  # it counts targets through all images
        return [(i, j - start) for (i, j), start in zip(found, starts, strict=True)]

    return matcher


def rfdetr_matcher() -> Matcher | None:
    """RF-DETR's matcher without its package, which imports a training stack that the matcher does not need."""
    module = _import_bare("rfdetr.models.matcher", ("rfdetr", "rfdetr.models", "rfdetr.models.heads", "rfdetr.utilities"))
    if module is None:
        print(f"  skip {RFDETR}: not installed")
        return None
    theirs = module.HungarianMatcher(cost_class=2, cost_bbox=5, cost_giou=2)
    return torch.no_grad()(lambda logits, boxes, targets: theirs({"pred_logits": logits, "pred_boxes": boxes}, targets))


def _import_bare(name: str, packages: Sequence[str]) -> Any | None:
    """Imports a module whose parent packages stay empty."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(packages[0])
    if spec is None or not spec.submodule_search_locations:
        return None
    root = spec.submodule_search_locations[0]
    for package in packages:
        shell = types.ModuleType(package)
        shell.__path__ = [os.path.join(root, *package.split(".")[1:])]
        sys.modules.setdefault(package, shell)
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def peer_matchers() -> dict[str, Matcher]:
    """All peers that are installed."""
    made = {
        LOOP: torch_loop(),
        TRANSFORMERS: transformers_matcher(),
        ULTRALYTICS: ultralytics_matcher(),
        RFDETR: rfdetr_matcher(),
    }
    return {name: matcher for name, matcher in made.items() if matcher is not None}


def transformers_loss(layers: int, classes: int) -> Callable[[Tensor, Tensor, Targets], Tensor] | None:
    """The loss of Deformable DETR over all layers [L, B, Q, ...], matching included."""
    module = optional("transformers.loss.loss_deformable_detr")
    if module is None:
        return None
    config = SimpleNamespace(
        class_cost=2,
        bbox_cost=5,
        giou_cost=2,
        num_labels=classes,
        focal_alpha=0.25,
        auxiliary_loss=True,
        decoder_layers=layers,
        bbox_loss_coefficient=5,
        giou_loss_coefficient=2,
    )

    def loss(logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
        total: Tensor = module.DeformableDetrForObjectDetectionLoss(logits[-1], labels, logits.device, boxes[-1], config, logits, boxes)[0]
        return total

    return loss
