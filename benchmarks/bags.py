"""Noisy boxes of several images to time samplers with, and the samplers of SSD-Det and P2BNet as sequences of eager tensor operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from boxes import ROTATION, overlaps_with_max_eps, uniform

COCO_RATIOS = (1.0, 1.2, 1.3, 0.8, 0.7)
COCO_SHAKES = (0.2,)
IMAGE_HW = (800, 1000)


@dataclass(frozen=True)
class Scene:
    """B images with the same number of boxes each."""

    boxes: Tensor  # [G, 4] xyxy, pixels
    image: Tensor  # int64 [G]
    offsets: Tensor  # int64 [B + 1]
    hw: Tensor  # [B, 2]
    per_image: int

    @property
    def lists(self) -> tuple[Tensor, ...]:
        """The boxes of each image, as the official code takes them."""
        return self.boxes.split(self.per_image)


def scenes(images: int, per_image: int, inputs: str, device: torch.device) -> list[Scene]:
    """Several scenes: boxes `uniform` over the image, or all `equal`, which leaves random boxes the most hits."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(ROTATION):
        boxes = uniform((images * per_image,), generator)
        if inputs == "equal":
            boxes = boxes[:1].expand_as(boxes).contiguous()
        image = torch.arange(images).repeat_interleave(per_image)
        hw = torch.tensor([IMAGE_HW], dtype=torch.float32).repeat(images, 1)
        offsets = torch.arange(images + 1) * per_image
        result.append(Scene(boxes.to(device), image.to(device), offsets.to(device), hw.to(device), per_image))
    return result


def to_centres(boxes: Tensor) -> Tensor:
    """xyxy to (cx, cy, w, h), column by column."""
    x1, y1, x2, y2 = boxes.split((1, 1, 1, 1), dim=-1)
    return torch.cat([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=-1)


def to_corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) to xyxy, column by column."""
    cx, cy, w, h = boxes.split((1, 1, 1, 1), dim=-1)
    return torch.cat([cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h], dim=-1)


def official_image(boxes: Tensor, hw: Sequence[int], ratios: Sequence[float], shakes: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The proposals [n * P, 4] of one image and their flags [n * P, 1]: a Python loop over pairs of ratios, corners in between, a loop over
    shakes, and the size of the image uploaded for the test of the shares. Five ratios and a shake take 545 operations other than views,
    seven fewer than were counted in the original.
    """
    scaled = []
    for ratio_w in ratios:
        for ratio_h in ratios:
            centres = to_centres(boxes)
            centres[:, 2] *= ratio_w
            centres[:, 3] *= ratio_h
            scaled.append(to_corners(centres).unsqueeze(1))
    base = torch.cat(scaled, dim=1)  # [n, R * R, 4]
    moved = [base.unsqueeze(2), *(shaken(base, shake) for shake in shakes)]
    proposals = torch.cat(moved, dim=2).reshape(-1, 4)
    return proposals, share_inside(proposals, hw) > 0.7


def shaken(base: Tensor, shake: float) -> Tensor:
    """Four moved copies of boxes [n, m, 4], as [n, m, 4, 4]."""
    centres = to_centres(base)
    cx, cy, w, h = centres[..., 0], centres[..., 1], centres[..., 2], centres[..., 3]
    left, right = torch.stack([cx - shake * w, cy], dim=-1), torch.stack([cx + shake * w, cy], dim=-1)
    up, down = torch.stack([cx, cy - shake * h], dim=-1), torch.stack([cx, cy + shake * h], dim=-1)
    places = torch.stack([left, right, up, down], dim=2)
    return to_corners(torch.cat([places, centres[..., 2:].unsqueeze(2).expand_as(places)], dim=-1))


def share_inside(proposals: Tensor, hw: Sequence[int]) -> Tensor:
    """Share [N, 1] of each proposal inside of the image, through a matrix of overlaps with one box."""
    image = proposals.new_tensor([[0.0, 0.0, float(hw[1]), float(hw[0])]])  # an upload per image
    low, high = torch.max(proposals[:, None, :2], image[None, :, :2]), torch.min(proposals[:, None, 2:], image[None, :, 2:])
    side = (high - low).clamp(min=0)
    area = (proposals[:, 2] - proposals[:, 0]) * (proposals[:, 3] - proposals[:, 1])
    return side[..., 0] * side[..., 1] / torch.max(area[:, None], area.new_tensor([1e-6]))


def official_bags(scene: Scene, ratios: Sequence[float] = COCO_RATIOS, shakes: Sequence[float] = COCO_SHAKES) -> tuple[Tensor, Tensor]:
    """All images of a scene, one after the other."""
    parts = [official_image(boxes, IMAGE_HW, ratios, shakes) for boxes in scene.lists]
    return torch.cat([boxes for boxes, _ in parts]), torch.cat([valid for _, valid in parts])


def closed_form_bags(scene: Scene, ratios: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The best that eager tensor operations do: all boxes at once, with tables made beforehand. ratios [R * R, 2], steps [S, 2]."""
    low, high = scene.boxes[:, None, None, :2], scene.boxes[:, None, None, 2:]
    size = (high - low) * ratios[:, None]  # [G, R * R, 1, 2]
    centre = (low + high) / 2 + size * steps
    half = size / 2
    bags = torch.cat((centre - half, centre + half), -1).flatten(1, 2)  # [G, P, 4]
    limit = scene.hw.flip(1)[scene.image][:, None]
    side = (torch.minimum(bags[..., 2:], limit) - bags[..., :2].clamp(min=0)).clamp(min=0)
    area = (bags[..., 2:] - bags[..., :2]).prod(-1).clamp(min=1e-6)
    return bags, side.prod(-1) / area > 0.7


def closed_form_tables(device: torch.device, ratios: Sequence[float], shakes: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Ratios [R * R, 2] and steps [S, 2] for :func:`closed_form_bags`."""
    pairs = torch.tensor([(w, h) for w in ratios for h in ratios])
    steps = torch.tensor([(0.0, 0.0)] + [step for o in shakes for step in ((-o, 0.0), (o, 0.0), (0.0, -o), (0.0, o))])
    return pairs.to(device), steps.to(device)


def official_negatives(scene: Scene, bags: Tensor, count: int, threshold: float = 0.3) -> tuple[Tensor, Tensor]:
    """Random boxes [B * count, 4] and their flags: four draws on the host per image, and the matrix of overlaps with its proposals."""
    boxes, flags = [], []
    for own in bags.split(scene.per_image):
        height, width = IMAGE_HW
        x1 = -0.2 * width + (width + 0.2 * width) * torch.rand(count)
        y1 = -0.2 * height + (height + 0.2 * height) * torch.rand(count)
        x2 = x1 + (1.2 * width - x1) * torch.rand(count)
        y2 = y1 + (1.2 * height - y1) * torch.rand(count)
        drawn = torch.stack([x1, y1, x2, y2], dim=1).to(own.device)
        overlaps = overlaps_with_max_eps(drawn, own.reshape(-1, 4))
        boxes.append(drawn)
        flags.append((overlaps < threshold).sum(dim=1) == overlaps.shape[1])
    return torch.cat(boxes), torch.cat(flags)


def closed_form_negatives(scene: Scene, bags: Tensor, uniforms: Tensor, threshold: float = 0.3) -> tuple[Tensor, Tensor]:
    """All images at once from uniform numbers [B, N, 4]; possible where every image has as many boxes."""
    size = scene.hw.flip(1)[:, None]
    low = -0.2 * size + 1.2 * size * uniforms[..., :2]
    boxes = torch.cat((low, low + (1.2 * size - low) * uniforms[..., 2:]), -1)
    overlaps = overlaps_with_max_eps(boxes, bags.view(len(size), -1, 4))
    return boxes, (overlaps < threshold).all(-1)
