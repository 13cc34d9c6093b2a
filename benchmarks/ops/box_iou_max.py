"""Best partner of each box without the matrix, against torchvision's matrix and its maximum."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from boxes import box_sets, torchvision_pairwise
from harness import MIB, OURS, Call, Case, rotate
from ssod_fast.ops import box_iou, box_iou_max


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Anchor assignment: many anchors, up to a thousand objects."""
    shapes = ((1000, 100, 50.0), (4000, 20, 45.0)) if quick else ((10000, 1000, 50.0), (100000, 100, 45.0))
    gpu = device.type == "cuda"
    for rows, columns, target in shapes:
        wanted = (15.0 if columns == shapes[0][1] else None) if gpu else target
        yield max_case((rows, columns), "uniform", -1, device, wanted, ceiling=12 if gpu and wanted else None)
        yield max_case((rows, columns), "uniform", -2, device, None)
        for kind in ("disjoint", "equal"):
            yield max_case((rows, columns), kind, -1, device, wanted)


def max_case(
    shape: tuple[int, int], inputs: str, dim: int, device: torch.device, target: float | None, ceiling: float | None = None
) -> Case:
    """Value and index of the maximum along `dim`; the peak allows for the outputs alone."""
    pairs = box_sets(inputs, shape[:1], shape[1:], device)
    results = 12 * shape[dim + 1]
    peer = torchvision_pairwise("iou")
    providers: dict[str, Call] = {OURS: rotate(lambda a, b: box_iou_max(a, b, dim=dim), pairs)}  # type: ignore[call-overload]
    if peer is not None:
        providers["torchvision + max"] = rotate(lambda a, b: peer(a, b).max(dim), pairs)
    return Case(
        op="box_iou_max",
        name=f"{shape[0]}x{shape[1]}",
        mode=f"iou dim={dim}",
        dtype="float32",
        inputs=inputs,
        bytes=16 * sum(shape) + results,
        providers=providers,
        check=lambda: check(dim, *pairs[0]),
        targets={} if target is None else {"torchvision + max": target},
        ceiling_us=ceiling,
        peak_limit=results + 2 * MIB,
        note="arithmetic, not memory, is the limit: no matrix is written",
    )


def check(dim: int, boxes1: Tensor, boxes2: Tensor) -> None:
    """The maximum of our matrix to the last bit, at its lowest index; the matrix itself passes box_iou's gate."""
    matrix = box_iou(boxes1, boxes2)
    values, indices = box_iou_max(boxes1, boxes2, dim=dim)  # type: ignore[call-overload]
    torch.testing.assert_close(values, matrix.amax(dim), atol=0, rtol=0)
    first = (matrix == matrix.amax(dim, keepdim=True)).to(torch.uint8).argmax(dim)
    torch.testing.assert_close(indices, first)
