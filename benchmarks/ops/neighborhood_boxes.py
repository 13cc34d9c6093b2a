"""Bags of 125 and 45 proposals around noisy boxes against the operations of the official sampler and against its closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bags import COCO_RATIOS, COCO_SHAKES, Scene, closed_form_bags, closed_form_tables, official_bags, scenes
from harness import OURS, Call, Case, rotate
from ssod_fast.ops import neighborhood_boxes

OFFICIAL = "official operations"
CLOSED = "closed form in torch"  # takes lists of ratios and shakes, as we do
PREPARED = "closed form in torch, tables kept"
EXTRAS: Mapping[str, Any] = {"rois": True, "iof": True, "iou": True, "targets_std": (0.1, 0.1, 0.2, 0.2), "clip": True}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """COCO has 7 boxes per image; 20 and 60 are crowded images, where memory and launches of the official code grow."""
    gpu = device.type == "cuda"
    targets: dict[tuple[int, int], dict[str, float]] = {
        (2, 7): {OFFICIAL: 200, CLOSED: 11},
        (8, 20): {OFFICIAL: 250, CLOSED: 9},
        (2, 60): {OFFICIAL: 100, CLOSED: 9},
    }
    for shape in ((2, 7),) if quick else tuple(targets):
        crowded = gpu and shape == (8, 20)
        wanted = ({OFFICIAL: 500.0} if crowded else {}) if gpu else targets[shape]
        yield bag_case(shape, "uniform", device, wanted, ceiling=3 if crowded else None, wall_ceiling=20 if crowded else None)
    yield bag_case((2, 7), "uniform", device, {}, mode="R3", ratios=(1.0, 1.1, 0.9), shakes=(0.1,))
    if not quick:
        yield bag_case((8, 20), "uniform", device, {}, mode="R5 all outputs", extras=EXTRAS)


def bag_case(
    shape: tuple[int, int],
    inputs: str,
    device: torch.device,
    targets: Mapping[str, float],
    *,
    mode: str = "R5",
    ratios: tuple[float, ...] = COCO_RATIOS,
    shakes: tuple[float, ...] = COCO_SHAKES,
    extras: Mapping[str, Any] | None = None,
    ceiling: float | None = None,
    wall_ceiling: float | None = None,
) -> Case:
    """Bags of `shape` = (images, boxes per image); the peers make boxes and flags alone."""
    options = {"ratios": ratios, "shakes": shakes, **(extras or {})}
    inputs_of = [(scene,) for scene in scenes(*shape, inputs, device)]
    tables = closed_form_tables(device, ratios, shakes)
    providers: dict[str, Call] = {
        OURS: rotate(lambda s: neighborhood_boxes(s.boxes, s.image, s.hw, **options), inputs_of),
        CLOSED: rotate(lambda s: closed_form_bags(s, *closed_form_tables(device, ratios, shakes)), inputs_of),
        PREPARED: rotate(lambda s: closed_form_bags(s, *tables), inputs_of),
        OFFICIAL: rotate(lambda s: official_bags(s, ratios, shakes), inputs_of),
    }
    rows = shape[0] * shape[1] * len(ratios) ** 2 * (1 + 4 * len(shakes))
    return Case(
        op="neighborhood_boxes",
        name=f"{shape[0]}x{shape[1]}",
        mode=mode,
        dtype="float32",
        inputs=inputs,
        bytes=rows * (81 if extras else 17) + 24 * shape[0] * shape[1],
        providers=providers,
        check=lambda: check(inputs_of[0][0], ratios, shakes),
        targets=targets,
        target_timing="wall" if OFFICIAL in targets and device.type == "cuda" else "graph",
        ceiling_us=None if device.type == "cuda" and wall_ceiling else ceiling,
        wall_ceiling_us=wall_ceiling,
        eager_only=(OFFICIAL, CLOSED),  # they upload from the host
        note="the peers make boxes and flags only" if extras else "",
    )


def check(scene: Scene, ratios: tuple[float, ...], shakes: tuple[float, ...]) -> None:
    """Boxes within 5e-4 px of both peers, and the flags of the closed form away from the threshold."""
    bag = neighborhood_boxes(scene.boxes, scene.image, scene.hw, ratios=ratios, shakes=shakes, iof=True)
    official, flags = official_bags(scene, ratios, shakes)
    closed, closed_flags = closed_form_bags(scene, *closed_form_tables(scene.boxes.device, ratios, shakes))
    torch.testing.assert_close(bag.boxes.flatten(0, 1), official, atol=5e-4, rtol=0)
    torch.testing.assert_close(bag.boxes, closed, atol=5e-4, rtol=0)
    assert bag.iof is not None
    clear = (bag.iof - 0.7).abs() > 3e-4
    torch.testing.assert_close(bag.valid & clear, flags.view_as(bag.valid) & clear)
    torch.testing.assert_close(bag.valid & clear, closed_flags & clear)
