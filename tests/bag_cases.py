"""The samplers of noisy boxes in the order of operations that SSD-Det and P2BNet use, one image and one box at a time, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COCO_RATIOS = (1.0, 1.2, 1.3, 0.8, 0.7)
POINT_SCALES = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
POINT_RATIOS = (1 / 3, 1 / 2, 1 / 1.5, 1.0, 1.5, 2.0, 3.0)


def literal_bag(box: Tensor, hw: Sequence[float], ratios: Sequence[float], shakes: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The bag of one box [4] in an image (h, w): boxes [P, 4] and shares inside of the image [P].

    Sizes are scaled first and turned into corners; each shake then starts from the centre and size of those corners.
    """
    x1, y1, x2, y2 = box.double().tolist()
    boxes: list[list[float]] = []
    for ratio_w in ratios:
        for ratio_h in ratios:
            half_w, half_h = (x2 - x1) * ratio_w / 2, (y2 - y1) * ratio_h / 2
            middle_x, middle_y = (x1 + x2) / 2, (y1 + y2) / 2
            scaled = [middle_x - half_w, middle_y - half_h, middle_x + half_w, middle_y + half_h]
            boxes.append(scaled)
            boxes += [shaken(scaled, shake, way) for shake in shakes for way in range(4)]
    bag = torch.tensor(boxes, dtype=torch.float64)
    return bag, torch.tensor([share_inside(b, hw) for b in boxes], dtype=torch.float64)


def shaken(box: Sequence[float], shake: float, way: int) -> list[float]:
    """A box moved by `shake` of its size: left, right, up, down."""
    x1, y1, x2, y2 = box
    cx, cy, w, h = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
    cx += (-shake, shake, 0, 0)[way] * w
    cy += (0, 0, -shake, shake)[way] * h
    return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]


def share_inside(box: Sequence[float], hw: Sequence[float]) -> float:
    """Share of a box that lies in the image."""
    x1, y1, x2, y2 = box
    iw, ih = min(x2, hw[1]) - max(x1, 0.0), min(y2, hw[0]) - max(y1, 0.0)
    return max(iw, 0.0) * max(ih, 0.0) / max((x2 - x1) * (y2 - y1), 1e-6)


def noisy_boxes(count: int, hw: tuple[float, float] = (800, 1333), seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Boxes [count, 4] of an image (h, w), some of which reach beyond its edges."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([hw[1], hw[0]], dtype=torch.float64)
    half = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 150 + 4
    return torch.cat((centre - half, centre + half), 1).to(dtype)
