"""Inputs of one-to-many assignment and the op sequences of public assigners, one image at a time, in eager torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, one_hot

from boxes import optional, uniform

Targets = list[dict[str, Tensor]]
Assigned = tuple[Tensor, Tensor]  # target of each query within its image or -1, weight


def detections(
    layers: int, batch: int, queries: int, targets: int, classes: int, device: torch.device, seed: int, centers: Tensor | None = None
) -> tuple[Tensor, Tensor, Targets]:
    """Logits [L, B, Q, C], boxes [L, B, Q, 4] in pixels, targets. Images of odd index look trained: half of the boxes and labels fit."""
    generator = torch.Generator().manual_seed(seed)
    wanted = [
        {"boxes": uniform((targets,), generator), "labels": torch.randint(0, classes, (targets,), generator=generator)}
        for _ in range(batch)
    ]
    boxes, logits = uniform((layers, batch, queries), generator), torch.randn(layers, batch, queries, classes, generator=generator) - 4
    if centers is not None:
        half = torch.rand(layers, batch, queries, 2, generator=generator) * 98 + 4
        boxes = torch.cat([centers - half, centers + half], -1)
    near = queries // 2
    for image in range(1, batch, 2):
        of = torch.randint(0, targets, (layers, near), generator=generator)
        if centers is None:
            boxes[:, image, :near] = wanted[image]["boxes"][of] + torch.randn(layers, near, 4, generator=generator) * 8
        labels = wanted[image]["labels"][of][..., None]
        logits[:, image, :near].scatter_add_(-1, labels, torch.rand(labels.shape, generator=generator) * 6)
    on_device = [{key: value.to(device) for key, value in t.items()} for t in wanted]
    return logits.to(device), boxes.to(device), on_device


def grid_points(side: int, strides: tuple[int, ...], device: torch.device) -> Tensor:
    """Priors [Q, 4] (x, y, stride, stride): the cell centres of every level of a square image."""
    levels = []
    for stride in strides:
        line = (torch.arange(side // stride) + 0.5) * stride
        points = torch.cartesian_prod(line, line).flip(-1)
        levels.append(torch.cat([points, torch.full_like(points, stride)], -1))
    return torch.cat(levels).to(device)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """[N, M], the union raised to 1e-6."""
    low, high = torch.max(a[:, None, :2], b[:, :2]), torch.min(a[:, None, 2:], b[:, 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    areas = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b))
    area_a, area_b = areas
    return inter / (area_a[:, None] + area_b - inter).clamp(min=1e-6)


def semi_detr_image(logits: Tensor, boxes: Tensor, target: dict[str, Tensor], topk: int = 13) -> Assigned:
    """Semi-DETR's one-to-many assignment of an image: copies of the whole matrix, then a loop over the targets."""
    labels = target["labels"]
    iou = pairwise_iou(boxes, target["boxes"])
    metric = logits.sigmoid()[:, labels] * iou**6
    values, candidates = metric.topk(topk, dim=0)
    positive = values > 0
    claimed = torch.full_like(iou, -1.0)
    columns = torch.arange(len(labels), device=labels.device).expand_as(candidates)
    claimed[candidates[positive], columns[positive]] = iou[candidates[positive], columns[positive]]
    best, owner = claimed.max(1)
    owner = torch.where(best >= 0, owner, -1)
    taken = owner >= 0
    own_metric, weight = torch.zeros_like(best), torch.zeros_like(best)
    own_metric[taken] = metric[taken, owner[taken]]
    for row in range(len(labels)):
        mine = owner == row
        if mine.any():
            m = own_metric[mine]
            weight[mine] = m / (m.max() + 1e-7) * iou[mine, row].max()
    return owner, weight


def simota_image(probabilities: Tensor, boxes: Tensor, priors: Tensor, target: dict[str, Tensor], topk: int = 10) -> Assigned:
    """SimOTA of an image: a one-hot [Q, G, C] for the class cost, then a loop over the targets with k on the device."""
    gts, labels, classes = target["boxes"], target["labels"], probabilities.shape[1]
    points, reach = priors[:, None, :2], 2.5 * priors[:, None, 2:]
    center = (gts[:, :2] + gts[:, 2:]) / 2
    inside = torch.cat([points - gts[:, :2], gts[:, 2:] - points], -1).amin(-1) > 0
    central = torch.cat([points - (center - reach), (center + reach) - points], -1).amin(-1) > 0
    valid = inside.any(1) | central.any(1)
    iou = pairwise_iou(boxes[valid], gts)
    hot = one_hot(labels, classes).float()[None].repeat(len(iou), 1, 1)
    wide = probabilities[valid][:, None].repeat(1, len(labels), 1)
    cost = binary_cross_entropy(wide, hot, reduction="none").sum(-1) - 3 * (iou + 1e-7).log() + 1e5 * ~(inside & central)[valid]
    matching = torch.zeros_like(cost)
    counts = iou.topk(min(topk, len(iou)), dim=0).values.sum(0).int().clamp(min=1)
    for row in range(len(labels)):
        chosen = cost[:, row].topk(int(counts[row]), largest=False).indices
        matching[chosen, row] = 1
    several = matching.sum(1) > 1
    if several.any():
        best = cost[several].argmin(1)
        matching[several] = 0
        matching[several.nonzero()[:, 0], best] = 1
    owner = torch.full((len(boxes),), -1, device=boxes.device)
    weight = torch.zeros(len(boxes), device=boxes.device)
    taken = matching.sum(1) > 0
    where = valid.nonzero()[:, 0][taken]
    owner[where], weight[where] = matching[taken].argmax(1), (matching * iou).sum(1)[taken]
    return owner, weight


def ultralytics_assigner() -> Callable[..., Any] | None:
    """TaskAlignedAssigner as YOLOv8 and later configure it, or None."""
    module = optional("ultralytics.utils.tal")
    return None if module is None else module.TaskAlignedAssigner(topk=10, num_classes=80, alpha=0.5, beta=6.0, stride=[8, 16, 32])
