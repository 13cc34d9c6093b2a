"""All pairs: IoU, GIoU, DIoU and CIoU against torchvision, torch.compile of it, powerboxes, kornia, and the formulas of other peers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from boxes import box_sets, iou_with_added_eps, optional, overlaps_with_max_eps, torchvision_pairwise
from harness import MIB, OURS, Call, Case, rotate, with_threads
from ssod_fast.ops import box_iou

Pairs = list[tuple[Tensor, Tensor]]
SLACK = 2 * MIB  # resolution of the peak, and the boxes themselves


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Pairwise overlaps, fresh and into `out`, batched, on two threads, and with the backward."""
    yield from (gpu_cases if device.type == "cuda" else cpu_cases)(device, quick)


def cpu_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """The shapes of an anchor head (1000 and 10000 boxes) and of a DETR matcher (16 images, 900 queries, 100 objects)."""
    small, large = ((200, 100), (1000, 200)) if quick else ((1000, 1000), (10000, 1000))
    for mode, fresh, into in (("iou", 24, 36), ("giou", 32, 48), ("diou", None, None), ("ciou", 30, None)):
        yield forward_case(mode, small, "uniform", device, fresh, peers=("torchvision", "torch.compile", "powerboxes", "formulas"))
        yield forward_case(mode, small, "uniform", device, into, out=True)
        for kind in ("disjoint", "equal"):
            yield forward_case(mode, small, kind, device, fresh)
    for mode, fresh, into in (("iou", 18, 115), ("giou", 31, 125)):
        yield forward_case(mode, large, "uniform", device, fresh, limit_peak=True)
        yield forward_case(mode, large, "uniform", device, into, out=True)
    batch = (2, 90, 10) if quick else (16, 900, 100)
    yield forward_case("iou", batch, "uniform", device, 34)
    yield forward_case("giou", batch, "uniform", device, 44, peers=("torchvision", "formulas"))
    yield threads_case("iou", large, device)
    yield threads_case("giou", large, device)
    shape = (300, 100) if quick else (3000, 1000)
    yield backward_case("iou", shape, device, None)
    yield backward_case("giou", shape, device, 40)


def gpu_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """1e7 pairs, where the store is the limit, and the matcher's batch, where launches are."""
    large, batch = ((1000, 200), (2, 90, 10)) if quick else ((10000, 1000), (16, 900, 100))
    for mode, target, ceiling in (("iou", 15, 12), ("giou", 25, 15), ("ciou", None, None)):
        for kind in ("uniform", "disjoint", "equal"):
            peers = ("torchvision", "kornia") if kind == "uniform" else ("torchvision",)
            yield forward_case(mode, large, kind, device, target, peers=peers, ceiling=ceiling, limit_peak=True)
    for mode in ("iou", "giou"):
        yield forward_case(mode, batch, "uniform", device, 10, peers=("torchvision", "loop", "formulas"), ceiling=4)
    yield backward_case("giou", (300, 100) if quick else (3000, 1000), device, None)


def forward_case(
    mode: str,
    shape: tuple[int, ...],
    inputs: str,
    device: torch.device,
    target: float | None,
    *,
    peers: tuple[str, ...] = ("torchvision",),
    out: bool = False,
    ceiling: float | None = None,
    limit_peak: bool = False,
) -> Case:
    """One forward workload; `shape` is (N, M) or (B, N, M)."""
    pairs = box_sets(inputs, shape[:-1], (*shape[:-2], shape[-1]), device)
    matrix = 4 * torch.Size(shape).numel()
    providers: dict[str, Call] = {OURS: ours_call(mode, pairs, shape, out)}
    for peer in peers:
        providers |= PEERS[peer](mode, pairs)
    return Case(
        op="box_iou",
        name="x".join(map(str, shape)) + (" out=" if out else ""),
        mode=mode,
        dtype="float32",
        inputs=inputs,
        bytes=matrix + sum(boxes.numel() * 4 for boxes in pairs[0]),
        providers=providers,
        check=lambda: check_forward(mode, *pairs[0]),
        targets=forward_targets(mode, target, "torch.compile" in peers, "formulas" in peers and len(shape) == 3),
        ceiling_us=ceiling,
        peak_limit=matrix + SLACK if limit_peak else None,
        eager_only=("kornia",),
    )


def forward_targets(mode: str, target: float | None, compiled: bool, batched_formulas: bool) -> dict[str, float]:
    """Required ratios: the given one against torchvision, fixed ones against the other peers."""
    targets: dict[str, float] = {} if target is None else {"torchvision": target}
    if compiled and mode in ("iou", "giou"):
        targets["torch.compile of torchvision"] = {"iou": 12, "giou": 14}[mode]
    if compiled and mode == "iou":
        targets["powerboxes float64"] = 22
    if batched_formulas and target is not None:
        targets["mmdet formula"] = target
    return targets


def ours_call(mode: str, pairs: Pairs, shape: tuple[int, ...], out: bool) -> Call:
    """Our op, into fresh memory or into one tensor that every call reuses."""
    if not out:
        return rotate(lambda a, b: box_iou(a, b, mode=mode), pairs)  # type: ignore[arg-type]
    result = torch.empty(shape, device=pairs[0][0].device)
    return rotate(lambda a, b: box_iou(a, b, mode=mode, out=result), pairs)  # type: ignore[arg-type]


def torchvision_peer(mode: str, pairs: Pairs) -> dict[str, Call]:
    """torchvision's eager function."""
    function = torchvision_pairwise(mode)
    return {} if function is None else {"torchvision": rotate(function, pairs)}


def compiled_peer(mode: str, pairs: Pairs) -> dict[str, Call]:
    """The same under torch.compile; the first call, which compiles, lies before the clock. Only the two modes that have targets."""
    function = torchvision_pairwise(mode)
    if function is None or mode not in ("iou", "giou"):
        return {}
    return {"torch.compile of torchvision": rotate(torch.compile(function, dynamic=False), pairs)}


def powerboxes_peer(mode: str, pairs: Pairs) -> dict[str, Call]:
    """powerboxes on float64 numpy arrays, which it computes in; the conversion is not timed."""
    module = optional("powerboxes") if mode in ("iou", "giou") else None
    if module is None:
        return {}
    function = module.iou_distance if mode == "iou" else module.giou_distance
    return {"powerboxes float64": rotate(function, [(a.double().numpy(), b.double().numpy()) for a, b in pairs])}


def formula_peers(mode: str, pairs: Pairs) -> dict[str, Call]:
    """What mmdet and ultralytics compute, in eager torch."""
    calls: dict[str, Call] = {}
    if mode in ("iou", "giou"):
        calls["mmdet formula"] = rotate(lambda a, b: overlaps_with_max_eps(a, b, mode), pairs)
    if mode == "iou" and pairs[0][0].dim() == 2:
        calls["ultralytics formula"] = rotate(iou_with_added_eps, pairs)
    return calls


def kornia_peer(mode: str, pairs: Pairs) -> dict[str, Call]:
    """kornia's IoU, which asserts on the host."""
    module = optional("kornia.metrics") if mode == "iou" else None
    return {} if module is None else {"kornia": rotate(module.mean_iou_bbox, pairs)}


def loop_peer(mode: str, pairs: Pairs) -> dict[str, Call]:
    """torchvision image by image, as matchers do it."""
    function = torchvision_pairwise(mode)
    if function is None:
        return {}
    return {"torchvision in a loop": rotate(lambda a, b: [function(*one) for one in zip(a, b, strict=True)], pairs)}


PEERS: dict[str, Callable[[str, Pairs], dict[str, Call]]] = {
    "torchvision": torchvision_peer,
    "torch.compile": compiled_peer,
    "powerboxes": powerboxes_peer,
    "formulas": formula_peers,
    "kornia": kornia_peer,
    "loop": loop_peer,
}


def threads_case(mode: str, shape: tuple[int, int], device: torch.device) -> Case:
    """Two threads against one, on our own op with a reused result."""
    pairs = box_sets("uniform", shape[:1], shape[1:], device)
    call = ours_call(mode, pairs, shape, out=True)
    return Case(
        op="box_iou",
        name="x".join(map(str, shape)) + " out=, 2 threads",
        mode=mode,
        dtype="float32",
        inputs="uniform",
        bytes=4 * shape[0] * shape[1],
        providers={OURS: with_threads(call, 2), "ours, 1 thread": with_threads(call, 1)},
        check=lambda: check_forward(mode, *pairs[0]),
        targets={"ours, 1 thread": 1.6},
        note="scaling over threads, whatever --threads says",
    )


def backward_case(mode: str, shape: tuple[int, int], device: torch.device, target: float | None) -> Case:
    """Forward and backward to both sets; the gradient of the matrix is prepared."""
    pairs = [tuple(boxes.requires_grad_() for boxes in pair) for pair in box_sets("uniform", shape[:1], shape[1:], device)]
    inputs = list(zip(pairs, itertools.repeat(torch.rand(shape, device=device)), strict=False))
    matrix = 4 * shape[0] * shape[1]

    def step(function: Callable[..., Tensor]) -> Callable[[Any, Tensor], Any]:
        return lambda pair, grad: torch.autograd.grad(function(*pair), pair, grad)

    def ours(boxes1: Tensor, boxes2: Tensor) -> Tensor:
        return box_iou(boxes1, boxes2, mode=mode)  # type: ignore[arg-type]

    providers: dict[str, Call] = {OURS: rotate(step(ours), inputs)}
    peer = torchvision_pairwise(mode)
    if peer is not None:
        providers["torchvision"] = rotate(step(peer), inputs)
    return Case(
        op="box_iou",
        name="x".join(map(str, shape)),
        mode=f"{mode} forward+backward",
        dtype="float32",
        inputs="uniform",
        bytes=2 * matrix,
        providers=providers,
        check=lambda: check_backward(mode, inputs[0]),
        targets={} if target is None else {"torchvision": target},
        peak_limit=matrix + SLACK,
        note="the matrix is written once and its gradient read once; the peak must not exceed the matrix and the boxes",
    )


def check_forward(mode: str, boxes1: Tensor, boxes2: Tensor) -> None:
    """Against the same overlap from torchvision in float64; IoU and GIoU on the CPU bit-equal to its float32."""
    ours = box_iou(boxes1, boxes2, mode=mode)  # type: ignore[arg-type]
    peer = torchvision_pairwise(mode)
    if peer is None:
        raise RuntimeError("the gate of box_iou compares with torchvision: install it")
    torch.testing.assert_close(ours.double(), peer(boxes1.double(), boxes2.double()), atol=1e-6, rtol=1e-5)
    if mode in ("iou", "giou") and boxes1.device.type == "cpu":
        torch.testing.assert_close(ours, peer(boxes1, boxes2), atol=0, rtol=0)


def check_backward(mode: str, one: tuple[Any, Tensor]) -> None:
    """Against torchvision's autograd in float64."""
    pair, grad = one
    peer = torchvision_pairwise(mode)
    if peer is None:
        raise RuntimeError("the gate of box_iou compares with torchvision: install it")
    ours = torch.autograd.grad(box_iou(*pair, mode=mode), pair, grad)  # type: ignore[arg-type]
    wide = [boxes.detach().double().requires_grad_() for boxes in pair]
    for got, expected in zip(ours, torch.autograd.grad(peer(*wide), wide, grad.double()), strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)
