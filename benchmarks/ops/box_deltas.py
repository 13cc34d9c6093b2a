"""The box codec against torchvision's coder: encoding bags, decoding deltas, and the gradient to the deltas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from boxes import ROTATION, optional, uniform
from harness import OURS, Call, Case, rotate
from ssod_fast.ops import decode_boxes, encode_boxes

PEER = "torchvision BoxCoder"
Step = Callable[[Tensor, Tensor], Any]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """14 boxes with 125 proposals each are a step of SSD-Det, 20000 rows a crowded one."""
    for rows in (1750,) if quick else (1750, 20000):
        for mode in ("encode", "decode", "decode forward+backward"):
            yield codec_case(mode, rows, device)


def codec_case(mode: str, rows: int, device: torch.device) -> Case:
    """Both take boxes and deltas of one shape, float32."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(ROTATION):
        proposals = uniform((rows,), generator).to(device)
        other = uniform((rows,), generator).to(device) if mode == "encode" else torch.randn(rows, 4, generator=generator).to(device)
        inputs.append((proposals, other.requires_grad_(mode.endswith("backward"))))
    return Case(
        op="box_deltas",
        name=str(rows),
        mode=mode,
        dtype="float32",
        inputs="uniform",
        bytes=rows * (112 if mode.endswith("backward") else 48),
        providers=dict(providers(mode, inputs)),
        check=lambda: check(mode, *inputs[0]),
    )


def providers(mode: str, inputs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[str, Call]]:
    """Ours and, where torchvision is installed, its coder."""
    for name, (encode, decode) in codecs().items():
        step = {"encode": encode, "decode": decode, "decode forward+backward": with_gradient(decode)}[mode]
        yield name, rotate(step, inputs)


def codecs() -> dict[str, tuple[Step, Step]]:
    """Encoder (proposals, targets) and decoder (proposals, deltas) of each provider."""
    found: dict[str, tuple[Step, Step]] = {OURS: (encode_boxes, decode_boxes)}
    module = optional("torchvision.models.detection._utils")
    if module is not None:
        coder = module.BoxCoder((10.0, 10.0, 5.0, 5.0))
        found[PEER] = (lambda p, t: coder.encode_single(t, p), lambda p, d: coder.decode_single(d, p))
    return found


def with_gradient(decode: Step) -> Step:
    """Decodes, and differentiates the sum with respect to the deltas."""
    return lambda proposals, deltas: torch.autograd.grad(decode(proposals, deltas).sum(), deltas)[0]


def check(mode: str, proposals: Tensor, other: Tensor) -> None:
    """The results of torchvision in float64, of which the coder clamps large log sizes as ours does."""
    wide = {name: codec for name, codec in codecs().items() if name != OURS}.get(PEER, (encode_boxes, decode_boxes))
    pick = 0 if mode == "encode" else 1
    ours, peer = (encode_boxes, decode_boxes)[pick], wide[pick]
    if mode.endswith("backward"):
        ours, peer = with_gradient(ours), with_gradient(peer)
    expected = peer(proposals.double(), other.detach().double().requires_grad_(other.requires_grad))
    torch.testing.assert_close(ours(proposals, other).double(), expected.double(), atol=2e-3, rtol=1e-4)
