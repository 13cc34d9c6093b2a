"""500 random boxes per image against all proposals of the image, without the matrix, against the official operations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bags import COCO_RATIOS, COCO_SHAKES, Scene, closed_form_negatives, official_negatives, scenes
from harness import MIB, OURS, Call, Case, rotate
from ssod_fast.ops import neighborhood_boxes, random_negative_boxes

OFFICIAL = "official operations"
CLOSED = "closed form in torch"
COUNT = 500


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Boxes over the whole image, and all in one place, where a box either hits at once or meets nothing."""
    gpu = device.type == "cuda"
    targets: dict[tuple[int, int], dict[str, float]] = {(2, 7): {OFFICIAL: 45}, (8, 20): {OFFICIAL: 65}, (2, 60): {OFFICIAL: 90}}
    for shape in ((2, 7),) if quick else tuple(targets):
        crowded = gpu and shape == (8, 20)
        yield negative_case(shape, "uniform", device, ({OFFICIAL: 100} if crowded else {}) if gpu else targets[shape])
    shape = (2, 7) if quick else (8, 20)
    yield negative_case(shape, "equal", device, {})
    yield negative_case(shape, "uniform", device, {}, return_max=True)


def negative_case(
    shape: tuple[int, int], inputs: str, device: torch.device, targets: Mapping[str, float], *, return_max: bool = False
) -> Case:
    """Negatives of `shape` = (images, boxes per image) with bags of 125 proposals. Drawing the numbers is part of every provider."""
    inputs_of = [(scene, bags_of(scene)) for scene in scenes(*shape, inputs, device)]
    size = (shape[0], COUNT, 4)

    def ours(scene: Scene, bags: Tensor) -> object:
        return random_negative_boxes(torch.rand(size, device=device), scene.hw, bags, scene.offsets, return_max=return_max)

    providers: dict[str, Call] = {
        OURS: rotate(ours, inputs_of),
        CLOSED: rotate(lambda s, b: closed_form_negatives(s, b, torch.rand(size, device=device)), inputs_of),
        OFFICIAL: rotate(lambda s, b: official_negatives(s, b, COUNT), inputs_of),
    }
    positives, results = shape[0] * shape[1] * 125, shape[0] * COUNT
    return Case(
        op="random_negative_boxes",
        name=f"{shape[0]}x{shape[1]}",
        mode="return_max" if return_max else "keep",
        dtype="float32",
        inputs=inputs,
        bytes=16 * positives + results * (33 + 4 * return_max),
        providers=providers,
        check=lambda: check(*inputs_of[0]),
        targets=targets,
        target_timing="wall" if device.type == "cuda" else "graph",
        eager_only=(OFFICIAL,),  # it draws on the host
        peak_limit=64 * positives + results * 64 + 2 * MIB,
        note="drawing the random numbers included",
    )


def bags_of(scene: Scene) -> Tensor:
    """Bags [G, 125, 4] of a scene."""
    return neighborhood_boxes(scene.boxes, scene.image, scene.hw, ratios=COCO_RATIOS, shakes=COCO_SHAKES).boxes


def check(scene: Scene, bags: Tensor) -> None:
    """Boxes and flags of the closed form, which has the matrix."""
    uniforms = torch.rand(len(scene.hw), COUNT, 4, generator=torch.Generator().manual_seed(1)).to(bags.device)
    boxes, keep = closed_form_negatives(scene, bags, uniforms)
    ours = random_negative_boxes(uniforms, scene.hw, bags, scene.offsets)
    torch.testing.assert_close(ours.boxes, boxes, atol=5e-4, rtol=0)
    assert (ours.keep != keep).sum() <= 1  # a pair within rounding of the threshold
