"""Suppression of all images of a batch, against torchvision's batched_nms in a loop over images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from boxes import ROTATION, optional, uniform
from harness import OURS, Case, rotate
from ssod_fast.ops import batched_nms

THRESHOLD = 0.6
LOOP = "torchvision loop"
Images = tuple[Tensor, Tensor, Tensor]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Queries of a DETR, proposals of a first stage, points of a dense head; the best 300 and all."""
    shapes = ((4, 300, 80),) if quick else ((16, 300, 80), (16, 1000, 80), (8, 2000, 1), (4, 8400, 80))
    for shape in shapes:
        yield nms_case(shape, "objects", 300, device)
    many = shapes[-1]
    yield nms_case(many, "objects", None, device)
    for inputs in ("uniform", "disjoint", "equal"):
        yield nms_case(many, inputs, 300, device)
    if not quick:
        yield nms_case((4, 8400, 1), "objects", 300, device)


def nms_case(shape: tuple[int, int, int], inputs: str, max_keep: int | None, device: torch.device) -> Case:
    """B images of N boxes of C classes."""
    batch, n, classes = shape
    generator = torch.Generator().manual_seed(0)
    prepared = [tuple(t.to(device) for t in candidates(inputs, shape, generator)) for _ in range(ROTATION)]
    providers: dict[str, Any] = {OURS: rotate(lambda b, s, c: batched_nms(b, s, c, iou_threshold=THRESHOLD, max_keep=max_keep), prepared)}
    loop = torchvision_loop(max_keep)
    if loop is not None:
        providers[LOOP] = rotate(loop, prepared)
    return Case(
        op="batched_nms",
        name=f"{batch}x{n}",
        mode=f"{classes} classes, {'all' if max_keep is None else f'best {max_keep}'}",
        dtype="float32",
        inputs=inputs,
        bytes=batch * (28 * n + 8 * min(max_keep or n, n) + 8),
        providers=providers,
        check=lambda: check(max_keep, *prepared[0]),
        note="bound by comparisons of boxes and by the sort of scores",
        eager_only=(LOOP,),
    )


def candidates(kind: str, shape: tuple[int, int, int], generator: torch.Generator) -> Images:
    """Boxes [B, N, 4], scores and labels [B, N]: about 20 candidates per object, unrelated, far apart, or all equal."""
    batch, n, classes = shape
    scores = torch.rand(batch, n, generator=generator)
    if kind == "objects":
        count = max(n // 20, 1)
        which = torch.randint(count, (batch, n), generator=generator)
        objects = uniform((batch, count), generator).gather(1, which[..., None].expand(-1, -1, 4))
        labels = torch.randint(classes, (batch, count), generator=generator).gather(1, which)
        return objects + 6 * torch.randn(batch, n, 4, generator=generator), scores, labels
    labels = torch.randint(classes, (batch, n), generator=generator)
    boxes = uniform((batch, n), generator)
    if kind == "disjoint":
        boxes = boxes + 1024 * torch.arange(n)[:, None]
    elif kind == "equal":
        boxes = boxes[:, :1].expand(-1, n, -1).contiguous()
    return boxes, scores, labels


def torchvision_loop(max_keep: int | None) -> Callable[[Tensor, Tensor, Tensor], list[Tensor]] | None:
    """The peer: indices of each image's kept boxes, as predict functions everywhere compute them."""
    module: Any = optional("torchvision.ops")
    if module is None:
        return None
    return lambda boxes, scores, labels: [
        module.batched_nms(*image, THRESHOLD)[:max_keep] for image in zip(boxes, scores, labels, strict=True)
    ]


def check(max_keep: int | None, boxes: Tensor, scores: Tensor, labels: Tensor) -> None:
    """torchvision's nms of each class by itself: batched_nms shifts classes apart and rounds in doing so."""
    module: Any = optional("torchvision.ops")
    if module is None:
        raise RuntimeError("the gate of batched_nms compares with torchvision: install it")
    kept = batched_nms(boxes, scores, labels, iou_threshold=THRESHOLD, max_keep=max_keep)
    for b, (box, score, label) in enumerate(zip(boxes, scores, labels, strict=True)):
        keep = torch.zeros_like(score, dtype=torch.bool)
        for one in label.unique():
            members = (label == one).nonzero()[:, 0]
            keep[members[module.nms(box[members], score[members], THRESHOLD)]] = True
        order = score.sort(descending=True, stable=True).indices
        torch.testing.assert_close(kept.index[b, : kept.count[b]], order[keep[order]][:max_keep])
