"""Boxes to time with, and the formulas of peers, shared by the benchmarks of the box-IoU family."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

ROTATION = 4  # prepared inputs per case


def uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Boxes [*shape, 4] xyxy in pixels: corners in 0..800, sides in 4..200."""
    corner = torch.rand(*shape, 2, generator=generator) * 800
    return torch.cat((corner, corner + torch.rand(*shape, 2, generator=generator) * 196 + 4), dim=-1)


def box_sets(kind: str, shape1: Sequence[int], shape2: Sequence[int], device: torch.device, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Several pairs of box sets [*shape1, 4], [*shape2, 4]: `uniform`, all pairs `disjoint`, or all boxes `equal`."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(ROTATION):
        boxes1, boxes2 = uniform(shape1, generator), uniform(shape2, generator)
        if kind == "disjoint":
            boxes2 = boxes2 + 1024
        elif kind == "equal":
            boxes1 = boxes1.new_tensor([10.0, 20.0, 110.0, 220.0]).expand_as(boxes1).contiguous()
            boxes2 = boxes1.new_tensor([10.0, 20.0, 110.0, 220.0]).expand_as(boxes2).contiguous()
        elif kind != "uniform":
            raise ValueError(f"kind: expected uniform, disjoint or equal, got {kind!r}")
        pairs.append((boxes1.to(device), boxes2.to(device)))
    return pairs


def optional(name: str) -> ModuleType | None:
    """An installed peer, or None with a line that says so."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"  skip {name}: not installed")
        return None


def torchvision_pairwise(mode: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """torchvision's all-pairs function of a mode: [..., N, 4], [..., M, 4] -> [..., N, M]."""
    names = {"iou": "box_iou", "giou": "generalized_box_iou", "diou": "distance_box_iou", "ciou": "complete_box_iou"}
    module = optional("torchvision.ops")
    return None if module is None else getattr(module, names[mode])


def torchvision_loss(mode: str) -> Callable[..., Tensor] | None:
    """torchvision's loss on matched pairs of a mode: [N, 4], [N, 4], reduction=."""
    names = {"giou": "generalized_box_iou_loss", "diou": "distance_box_iou_loss", "ciou": "complete_box_iou_loss"}
    module = optional("torchvision.ops")
    return None if module is None else getattr(module, names[mode])


def overlaps_with_max_eps(boxes1: Tensor, boxes2: Tensor, mode: str = "iou", eps: float = 1e-6) -> Tensor:
    """mmdet's `bbox_overlaps` on all pairs in eager torch: denominators raised to eps. [..., N, 4], [..., M, 4] -> [..., N, M]."""
    area1 = (boxes1[..., 2] - boxes1[..., 0]) * (boxes1[..., 3] - boxes1[..., 1])
    area2 = (boxes2[..., 2] - boxes2[..., 0]) * (boxes2[..., 3] - boxes2[..., 1])
    rows, columns = boxes1.unsqueeze(-2), boxes2.unsqueeze(-3)
    sides = (torch.min(rows[..., 2:], columns[..., 2:]) - torch.max(rows[..., :2], columns[..., :2])).clamp(min=0)
    overlap = sides[..., 0] * sides[..., 1]
    least = overlap.new_full((1,), eps)
    union = torch.max(area1.unsqueeze(-1) + area2.unsqueeze(-2) - overlap, least)
    if mode == "iou":
        return overlap / union
    hull = (torch.max(rows[..., 2:], columns[..., 2:]) - torch.min(rows[..., :2], columns[..., :2])).clamp(min=0)
    hull_area = torch.max(hull[..., 0] * hull[..., 1], least)
    return overlap / union - (hull_area - union) / hull_area


def iou_with_added_eps(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """The arithmetic of ultralytics' `box_iou` in eager torch: eps added to the union. [N, 4], [M, 4] -> [N, M]."""
    (low1, high1), (low2, high2) = boxes1.unsqueeze(1).chunk(2, 2), boxes2.unsqueeze(0).chunk(2, 2)
    overlap = (torch.min(high1, high2) - torch.max(low1, low2)).clamp(min=0).prod(2)
    return overlap / ((high1 - low1).prod(2) + (high2 - low2).prod(2) - overlap + eps)
