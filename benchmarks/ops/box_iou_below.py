"""Boxes that overlap none of a set, without the matrix, against torchvision's matrix and a comparison."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from boxes import box_sets, torchvision_pairwise
from harness import MIB, OURS, Call, Case, rotate
from ssod_fast.ops import box_iou, box_iou_below

THRESHOLD = 0.3


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Candidates against the positives of an image: hits early (uniform), at once (equal), never (disjoint: no row may stop)."""
    shapes = ((1000, 100),) if quick else ((500, 1750), (10000, 1000))
    for shape in shapes:
        for inputs in ("uniform", "disjoint", "equal"):
            yield below_case(shape, inputs, device, return_max=False)
        yield below_case(shape, "uniform", device, return_max=True)


def below_case(shape: tuple[int, int], inputs: str, device: torch.device, return_max: bool) -> Case:
    """The decision alone, or with the largest overlap."""
    pairs = box_sets(inputs, shape[:1], shape[1:], device)
    results = shape[0] * (5 if return_max else 1)
    peer = torchvision_pairwise("iou")
    providers: dict[str, Call] = {
        OURS: rotate(lambda a, b: box_iou_below(a, b, THRESHOLD, return_max=return_max), pairs)  # type: ignore[call-overload]
    }
    if peer is not None and return_max:
        providers["torchvision + max"] = rotate(lambda a, b: (best := peer(a, b).amax(1), best < THRESHOLD), pairs)
    elif peer is not None:
        providers["torchvision + all"] = rotate(lambda a, b: (peer(a, b) < THRESHOLD).all(1), pairs)
    return Case(
        op="box_iou_below",
        name=f"{shape[0]}x{shape[1]}",
        mode="iou return_max" if return_max else "iou",
        dtype="float32",
        inputs=inputs,
        bytes=16 * sum(shape) + results,
        providers=providers,
        check=lambda: check(*pairs[0]),
        peak_limit=results + 2 * MIB,
    )


def check(boxes: Tensor, others: Tensor) -> None:
    """The decision and the maximum that our matrix gives; the matrix itself passes box_iou's gate."""
    best = box_iou(boxes, others).amax(1)
    below, maxima = box_iou_below(boxes, others, THRESHOLD, return_max=True)
    torch.testing.assert_close(below, best < THRESHOLD)
    torch.testing.assert_close(maxima, best, atol=0, rtol=0)
    torch.testing.assert_close(box_iou_below(boxes, others, THRESHOLD), best < THRESHOLD)
