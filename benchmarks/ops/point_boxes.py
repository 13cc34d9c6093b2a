"""Coarse bags of 42 boxes around points against the same formula in torch, image by image and all at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bags import IMAGE_HW, Scene, scenes
from harness import OURS, Call, Case, rotate
from ssod_fast.ops import point_boxes

SCALES = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
RATIOS = (1 / 3, 1 / 2, 1 / 1.5, 1.0, 1.5, 2.0, 3.0)
LOOP = "torch per image"
CLOSED = "closed form in torch"


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """As many points as boxes in the cases of neighborhood_boxes."""
    for shape in ((2, 7),) if quick else ((2, 7), (8, 20), (2, 60)):
        yield point_case(shape, device)


def point_case(shape: tuple[int, int], device: torch.device) -> Case:
    """The points are the centres of the boxes of a scene."""
    inputs = [(scene, (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2) for scene in scenes(*shape, "uniform", device)]
    inputs = [(scene, torch.minimum(points, scene.hw[0].flip(0) - 1)) for scene, points in inputs]
    table = torch.tensor([(s * r, s / r) for s in SCALES for r in RATIOS], device=device)
    providers: dict[str, Call] = {
        OURS: rotate(lambda s, p: point_boxes(p, s.image, s.hw, scales=SCALES, ratios=RATIOS), inputs),
        CLOSED: rotate(lambda s, p: closed_form(s.hw[s.image], p, table), inputs),
        LOOP: rotate(per_image, inputs),
    }
    rows = shape[0] * shape[1] * len(SCALES) * len(RATIOS)
    return Case(
        op="point_boxes",
        name=f"{shape[0]}x{shape[1]}",
        mode="symmetry",
        dtype="float32",
        inputs="uniform",
        bytes=17 * rows + 16 * shape[0] * shape[1],
        providers=providers,
        check=lambda: check(*inputs[0], table),
        eager_only=(LOOP,),  # it uploads from the host
    )


def closed_form(hw: Tensor, points: Tensor, table: Tensor) -> Tensor:
    """Boxes [G, 42, 4] of all points at once; hw [G, 2], table [42, 2]."""
    base, limit = hw.amin(1)[:, None, None] / 100, hw.flip(1)[:, None]
    centre = points[:, None]
    size = torch.minimum(table * base, torch.minimum(2 * centre, 2 * (limit - centre)))
    return torch.cat((centre - size / 2, centre + size / 2), -1)


def per_image(scene: Scene, points: Tensor) -> Tensor:
    """Image by image, with lists of scales and ratios that are uploaded each time."""
    height, width = IMAGE_HW
    bags = []
    for own in points.split(scene.per_image):
        base = min(height, width) / 100
        scales, ratios = own.new_tensor(SCALES)[:, None], own.new_tensor(RATIOS)[None]
        w, h = (scales * base * ratios).reshape(1, -1), (scales * base / ratios).reshape(1, -1)
        x, y = own[:, :1], own[:, 1:]
        w, h = torch.min(w, torch.min(2 * x, 2 * (width - x))), torch.min(h, torch.min(2 * y, 2 * (height - y)))
        bags.append(torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1))
    return torch.cat(bags)


def check(scene: Scene, points: Tensor, table: Tensor) -> None:
    """Both peers make the same boxes."""
    boxes, valid = point_boxes(points, scene.image, scene.hw, scales=SCALES, ratios=RATIOS)
    torch.testing.assert_close(boxes, closed_form(scene.hw[scene.image], points, table), atol=5e-4, rtol=0)
    torch.testing.assert_close(boxes, per_image(scene, points), atol=5e-4, rtol=0)
    assert valid.all()
