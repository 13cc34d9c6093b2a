"""One-to-many assignment of a step's layers and images against public assigners, most of which take one image at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from assigners import Targets, detections, grid_points, semi_detr_image, simota_image, ultralytics_assigner
from harness import MIB, OURS, Call, Case, rotate
from ssod_fast.ops import OneToMany, one_to_many_assign, pack_targets

CLASSES = 80
SEMI_DETR, SIMOTA, ULTRALYTICS = "Semi-DETR ops, per image", "SimOTA ops, per image", "ultralytics"
Inputs = list[tuple[Tensor, Tensor, Targets]]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """DETR-like predictions on all decoder layers, and dense heads."""
    gpu = device.type == "cuda"
    if quick:
        shapes: tuple[tuple[int, int, int, int, float], ...] = ((2, 2, 60, 7, 1.0),)
    else:
        shapes = ((7, 4, 900, 10, 30.0), (7, 4, 900, 100, 20.0), (7, 16, 300, 20, 30.0))
    for layers, batch, queries, targets, wanted in shapes:
        yield tal_case(layers, batch, queries, targets, device, None if gpu or quick else wanted)
    if gpu and not quick:
        yield tal_case(7, 4, 900, 30, device, 1000.0, ceiling_us=15.0)
    for batch, targets, side in ((2, 5, 128),) if quick else ((16, 20, 640), (4, 100, 640)):
        yield ultralytics_case(batch, targets, side, device, None if gpu or quick else 25.0)
    simota_side, targets = (128, 6) if quick else (400, 100)
    yield simota_case(simota_side, targets, device, None if gpu or quick else 200.0)
    for rule in ("soft_label", "atss"):
        yield dense_case(rule, 128 if quick else 640, 5 if quick else 20, device)


def bytes_of(layers: int, batch: int, queries: int, targets: int) -> int:
    """Boxes, one score per query, outputs; the scores of other classes need not be read."""
    return layers * batch * queries * (16 + 4 + 20) + batch * targets * 24 + layers * batch * targets * 4


def packed(inputs: Inputs) -> list[tuple[Any, ...]]:
    return [(scores, boxes, pack_targets(targets)) for scores, boxes, targets in inputs]


def case(op_inputs: tuple[int, int, int, int], mode: str, providers: dict[str, Call], check: Callable[[], None], **limits: Any) -> Case:
    """The name counts layers x images, as every one of them is a problem of its own."""
    layers, batch, queries, targets = op_inputs
    peers = tuple(name for name in providers if name != OURS)
    return Case(
        op="one_to_many_assign",
        name=f"{layers * batch}x{queries}x{targets}",
        mode=mode,
        dtype="float32",
        inputs="mixed",
        bytes=bytes_of(*op_inputs),
        providers=providers,
        check=check,
        peak_limit=layers * batch * (queries * 56 + targets * 12) + 4 * MIB,
        note="bytes count one score per query; which ones matter is known only after the overlaps",
        eager_only=peers,  # boolean indexing and loops over targets
        **limits,
    )


def tal_case(layers: int, batch: int, queries: int, targets: int, device: torch.device, wanted: float | None, **limits: Any) -> Case:
    """Semi-DETR's assignment from logits."""
    inputs = [detections(layers, batch, queries, targets, CLASSES, device, seed) for seed in range(3)]

    def ours(logits: Tensor, boxes: Tensor, rows: Any) -> OneToMany:
        return one_to_many_assign(logits, boxes, rows, from_logits=True)

    def peer(logits: Tensor, boxes: Tensor, rows: Targets) -> list[Any]:
        return [semi_detr_image(logits[i, b], boxes[i, b], rows[b]) for i in range(layers) for b in range(batch)]

    providers = {OURS: rotate(ours, packed(inputs)), SEMI_DETR: rotate(peer, inputs)}
    ratio = {} if wanted is None else {"targets": {SEMI_DETR: wanted}, "target_timing": "event"}
    return case(
        (layers, batch, queries, targets), "tal", providers, lambda: agree(ours(*inputs[0]), peer(*inputs[0]), targets), **ratio, **limits
    )


def simota_case(side: int, targets: int, device: torch.device, wanted: float | None) -> Case:
    """One image with many targets: what the one-hot [Q, G, C] of the peer is worst at."""
    priors = grid_points(side, (8, 16, 32), device)
    inputs = [dense_inputs(1, targets, priors, side, device, seed) for seed in range(3)]

    def ours(scores: Tensor, boxes: Tensor, rows: Any) -> OneToMany:
        return one_to_many_assign(scores, boxes, rows, rule="simota", priors=priors)

    def peer(scores: Tensor, boxes: Tensor, rows: Targets) -> list[Any]:
        return [simota_image(scores[b], boxes[b], priors, rows[b]) for b in range(len(rows))]

    providers = {OURS: rotate(ours, packed(inputs)), SIMOTA: rotate(peer, inputs)}
    ratio = {} if wanted is None else {"targets": {SIMOTA: wanted}}
    return case((1, 1, len(priors), targets), "simota", providers, lambda: agree(ours(*inputs[0]), peer(*inputs[0]), targets), **ratio)


def ultralytics_case(batch: int, targets: int, side: int, device: torch.device, wanted: float | None) -> Case:
    """The assignment of YOLOv8 and later, all images in one call of either."""
    priors = grid_points(side, (8, 16, 32), device)
    inputs = [dense_inputs(batch, targets, priors, side, device, seed) for seed in range(3)]

    def ours(scores: Tensor, boxes: Tensor, rows: Any) -> OneToMany:
        return one_to_many_assign(scores, boxes, rows, rule="tal_any", priors=priors)

    providers: dict[str, Call] = {OURS: rotate(ours, packed(inputs))}
    assigner = ultralytics_assigner()
    stacked = [(s, b, *(torch.stack([t[key] for t in rows]) for key in ("labels", "boxes"))) for s, b, rows in inputs]

    def peer(scores: Tensor, boxes: Tensor, labels: Tensor, gts: Tensor) -> Any:
        assert assigner is not None
        return assigner(scores, boxes, priors[:, :2], labels[..., None], gts, torch.ones_like(gts[..., :1], dtype=torch.bool))

    def check() -> None:
        if assigner is None:
            return
        _, _, scores, _, owner = peer(*stacked[0])
        weight = scores.amax(-1)
        results = [(owner[b].where(weight[b] > 0, -1), weight[b]) for b in range(batch)]
        agree(ours(*inputs[0]), results, targets)

    if assigner is not None:
        providers[ULTRALYTICS] = rotate(peer, stacked)
    ratio = {} if wanted is None else {"targets": {ULTRALYTICS: wanted}}
    return case((1, batch, len(priors), targets), "tal_any", providers, check, **ratio)


def dense_case(rule: Any, side: int, targets: int, device: torch.device) -> Case:
    """Rules without a peer here; a batch must give what its images give one by one."""
    priors = grid_points(side, (8, 16, 32), device)
    options = {"priors": priors} if rule == "soft_label" else {"levels": [(side // stride) ** 2 for stride in (8, 16, 32)]}
    inputs = [dense_inputs(4, targets, priors, side, device, seed) for seed in range(3)]
    if rule == "soft_label":
        inputs = [(scores.logit(), boxes, rows) for scores, boxes, rows in inputs]

    def ours(scores: Tensor, boxes: Tensor, rows: Any) -> OneToMany:
        return one_to_many_assign(scores, boxes, rows, rule=rule, **options)

    def check() -> None:
        scores, boxes, rows = inputs[0]
        whole = ours(scores, boxes, rows)
        for b in range(len(rows)):
            alone = ours(scores[b : b + 1], boxes[b : b + 1], rows[b : b + 1])
            first = b * targets
            torch.testing.assert_close(whole.target[b].sub(first).clamp(min=-1), alone.target[0], rtol=0, atol=0)
            torch.testing.assert_close(whole.weight[b], alone.weight[0], rtol=0, atol=0)

    return case((1, 4, len(priors), targets), rule, {OURS: rotate(ours, packed(inputs))}, check)


def dense_inputs(batch: int, targets: int, priors: Tensor, side: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Targets]:
    """Probabilities [B, Q, C], boxes [B, Q, 4] around their priors, targets within the image."""
    logits, boxes, rows = detections(1, batch, len(priors), targets, CLASSES, device, seed, centers=priors[:, :2].cpu())
    scale = side / 1000
    return logits[0].sigmoid(), boxes[0], [{"boxes": t["boxes"] * scale, "labels": t["labels"]} for t in rows]


def agree(ours: OneToMany, peers: list[Any], targets: int) -> None:
    """Equal targets but for at most one in a thousand (the peers round the overlap otherwise), and equal weights there."""
    layered = ours.target.flatten(0, -2)
    for problem, (owner, weight) in enumerate(peers):
        image = problem % (len(layered) if ours.target.dim() == 2 else ours.target.shape[1])
        mine = torch.where(layered[problem] < 0, -1, layered[problem] - image * targets)
        same = mine == owner
        if (~same).sum() > max(1, len(same) // 1000) or not (mine >= 0).any():
            raise AssertionError(f"problem {problem}: {int((~same).sum())} of {len(same)} queries have another target")
        torch.testing.assert_close(ours.weight.flatten(0, -2)[problem][same], weight[same], rtol=2e-2, atol=1e-3)
