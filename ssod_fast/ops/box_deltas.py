"""Boxes as offsets and log sizes relative to proposals: the codec of R-CNN heads, with gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _boxes
from ._registry import launcher, register

MIN_SIZE = 1e-6  # px: sides below it are raised to it by the encoder, so that its result is finite
STD = (0.1, 0.1, 0.2, 0.2)
MAX_LOG_SIZE = abs(math.log(16 / 1000))


def encode_boxes(proposals: Tensor, targets: Tensor, std: Sequence[float] = STD) -> Tensor:
    """Deltas ((gx - px) / pw, (gy - py) / ph, ln(gw / pw), ln(gh / ph)) / std from proposals (p) to targets (g).

    Sides below 1e-6 are raised to 1e-6, where they carry no gradient. Source: R-CNN (arXiv 1311.2524, appendix C).

    Args:
        proposals: [..., 4] xyxy; half and integer boxes are computed in float32. Gradients flow to both sets.
        targets: [..., 4] xyxy, broadcast against `proposals` without being expanded in memory (a bag [G, P, 4] against its box [G, 1, 4]).
        std: four divisors > 0 for x, y, w and h.

    Returns:
        [..., 4], float64 if either input is float64, else float32.

    Raises:
        ValueError: for shapes that do not broadcast, different devices, bad divisors.
        TypeError: for complex or boolean boxes.
    """
    scales = check_std("std", std)
    proposals, targets = _broadcast(proposals, targets, "proposals", "targets")
    if torch.is_grad_enabled() and (proposals.requires_grad or targets.requires_grad):
        result: Tensor = _Encode.apply(proposals, targets, scales)  # type: ignore[no-untyped-call]
        return result
    return _encode(proposals, targets, *scales)


def decode_boxes(proposals: Tensor, deltas: Tensor, std: Sequence[float] = STD, clamp: float = MAX_LOG_SIZE) -> Tensor:
    """The boxes xyxy that `deltas` make of `proposals`: the inverse of :func:`encode_boxes`. Not clipped to an image.

    Args:
        proposals: [..., 4] xyxy; half and integer input is computed in float32. Gradients flow to both inputs.
        deltas: [..., 4], broadcast against `proposals`.
        std: four factors > 0 for x, y, w and h.
        clamp: log sizes, after their factor, are clamped to -clamp..clamp, and carry no gradient beyond; by default |ln(16 / 1000)|.

    Returns:
        [..., 4], float64 if either input is float64, else float32.

    Raises:
        ValueError: for shapes that do not broadcast, different devices, bad factors, a negative clamp.
        TypeError: for complex or boolean input.
    """
    scales = check_std("std", std)
    _check_clamp(clamp)
    proposals, deltas = _broadcast(proposals, deltas, "proposals", "deltas")
    if torch.is_grad_enabled() and (proposals.requires_grad or deltas.requires_grad):
        result: Tensor = _Decode.apply(proposals, deltas, (*scales, clamp))  # type: ignore[no-untyped-call]
        return result
    return _decode(proposals, deltas, *scales, clamp)


def check_std(name: str, std: Sequence[float]) -> list[float]:
    """Four finite numbers > 0."""
    try:
        values = [*std]
        fits = len(values) == 4 and all(0 < v < math.inf for v in values)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{name} must be four numbers, got {std!r}") from error
    if not fits:
        raise ValueError(f"{name} must be four finite numbers > 0, got {values}")
    return values


def _check_clamp(clamp: float) -> None:
    try:
        fits = 0 <= clamp < math.inf
    except TypeError as error:
        raise TypeError(f"clamp must be a number, got {clamp!r}") from error
    if not fits:
        raise ValueError(f"clamp must be a finite number >= 0, got {clamp!r}")


def _broadcast(proposals: Tensor, others: Tensor, name1: str, name2: str) -> tuple[Tensor, Tensor]:
    """Both in the compute dtype and as stride-0 views of one shape; autograd sums over what they repeat."""
    proposals, others = _boxes.as_computable(proposals, others, name1, name2)
    if proposals.shape == others.shape:
        return proposals, others
    try:
        proposals, others = torch.broadcast_tensors(proposals, others)
    except RuntimeError as error:
        raise ValueError(f"{name1} and {name2} must broadcast, got {list(proposals.shape)} and {list(others.shape)}") from error
    return proposals, others


Quad = tuple[Tensor, Tensor, Tensor, Tensor]


def _centres(boxes: Tensor) -> Quad:
    """Centre and size of xyxy boxes: cx, cy, w, h."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


def _to_corner_grads(cx: Tensor, cy: Tensor, w: Tensor, h: Tensor) -> Tensor:
    """Gradients of centre and size as gradients of x1, y1, x2, y2."""
    return torch.stack((cx / 2 - w, cy / 2 - h, cx / 2 + w, cy / 2 + h), -1)


def _passes(size: Tensor) -> Tensor:
    """Share of the gradient that the floor of a side passes on, as torch's clamp does."""
    return (size >= MIN_SIZE).to(size.dtype)


def _reference_encode(proposals: Tensor, targets: Tensor, sx: float, sy: float, sw: float, sh: float) -> Tensor:
    px, py, pw, ph = _centres(proposals)
    gx, gy, gw, gh = _centres(targets)
    pw, ph, gw, gh = (size.clamp(min=MIN_SIZE) for size in (pw, ph, gw, gh))
    return torch.stack(((gx - px) / pw / sx, (gy - py) / ph / sy, (gw / pw).log() / sw, (gh / ph).log() / sh), -1)


def _reference_encode_backward(
    grad: Tensor, proposals: Tensor, targets: Tensor, sx: float, sy: float, sw: float, sh: float, need1: bool, need2: bool
) -> tuple[Tensor, Tensor]:
    px, py, raw_pw, raw_ph = _centres(proposals)
    gx, gy, raw_gw, raw_gh = _centres(targets)
    pw, ph, gw, gh = (size.clamp(min=MIN_SIZE) for size in (raw_pw, raw_ph, raw_gw, raw_gh))
    dx, dy, dw, dh = grad.unbind(-1)
    to_x, to_y, to_w, to_h = dx / sx / pw, dy / sy / ph, dw / sw, dh / sh
    grad_pw = -(to_x * ((gx - px) / pw) + to_w / pw) * _passes(raw_pw)
    grad_ph = -(to_y * ((gy - py) / ph) + to_h / ph) * _passes(raw_ph)
    grad1 = _to_corner_grads(-to_x, -to_y, grad_pw, grad_ph)
    grad2 = _to_corner_grads(to_x, to_y, to_w / gw * _passes(raw_gw), to_h / gh * _passes(raw_gh))
    return grad1 if need1 else proposals.new_empty(0), grad2 if need2 else proposals.new_empty(0)


def _reference_decode(proposals: Tensor, deltas: Tensor, sx: float, sy: float, sw: float, sh: float, clamp: float) -> Tensor:
    px, py, pw, ph = _centres(proposals)
    dx, dy, dw, dh = deltas.unbind(-1)
    gx, gy = px + pw * (dx * sx), py + ph * (dy * sy)
    gw, gh = pw * (dw * sw).clamp(-clamp, clamp).exp(), ph * (dh * sh).clamp(-clamp, clamp).exp()
    return torch.stack((gx - gw / 2, gy - gh / 2, gx + gw / 2, gy + gh / 2), -1)


def _reference_decode_backward(
    grad: Tensor, proposals: Tensor, deltas: Tensor, sx: float, sy: float, sw: float, sh: float, clamp: float, need1: bool, need2: bool
) -> tuple[Tensor, Tensor]:
    _, _, pw, ph = _centres(proposals)
    dx, dy, dw, dh = deltas.unbind(-1)
    x1, y1, x2, y2 = grad.unbind(-1)
    to_x, to_y, to_w, to_h = x1 + x2, y1 + y2, (x2 - x1) / 2, (y2 - y1) / 2
    log_w, log_h = dw * sw, dh * sh
    scale_w, scale_h = log_w.clamp(-clamp, clamp).exp(), log_h.clamp(-clamp, clamp).exp()
    in_w, in_h = (log_w.abs() <= clamp).to(pw.dtype), (log_h.abs() <= clamp).to(ph.dtype)
    grad1 = _to_corner_grads(to_x, to_y, to_x * (dx * sx) + to_w * scale_w, to_y * (dy * sy) + to_h * scale_h)
    columns = to_x * pw * sx, to_y * ph * sy, to_w * (pw * scale_w) * sw * in_w, to_h * (ph * scale_h) * sh * in_h
    return grad1 if need1 else proposals.new_empty(0), torch.stack(columns, -1) if need2 else proposals.new_empty(0)


def _fake(proposals: Tensor, others: Tensor, *_: Any) -> Tensor:
    return proposals.new_empty(proposals.shape)


def _fake_backward(grad: Tensor, proposals: Tensor, others: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need1, need2 = rest[-2:]
    return proposals.new_empty(proposals.shape if need1 else (0,)), proposals.new_empty(proposals.shape if need2 else (0,))


_STD = "float sx, float sy, float sw, float sh"
_NEEDS = "bool need1, bool need2"
register(
    f"encode_boxes(Tensor proposals, Tensor targets, {_STD}) -> Tensor",
    reference=_reference_encode,
    fake=_fake,
    triton=launcher("box_deltas", "encode_boxes"),
)
register(
    f"encode_boxes_backward(Tensor grad, Tensor proposals, Tensor targets, {_STD}, {_NEEDS}) -> (Tensor, Tensor)",
    reference=_reference_encode_backward,
    fake=_fake_backward,
    triton=launcher("box_deltas", "encode_boxes_backward"),
)
register(
    f"decode_boxes(Tensor proposals, Tensor deltas, {_STD}, float clamp) -> Tensor",
    reference=_reference_decode,
    fake=_fake,
    triton=launcher("box_deltas", "decode_boxes"),
)
register(
    f"decode_boxes_backward(Tensor grad, Tensor proposals, Tensor deltas, {_STD}, float clamp, {_NEEDS}) -> (Tensor, Tensor)",
    reference=_reference_decode_backward,
    fake=_fake_backward,
    triton=launcher("box_deltas", "decode_boxes_backward"),
)
_encode: Callable[..., Tensor] = torch.ops.ssod_fast.encode_boxes.default
_encode_backward = torch.ops.ssod_fast.encode_boxes_backward.default
_decode: Callable[..., Tensor] = torch.ops.ssod_fast.decode_boxes.default
_decode_backward = torch.ops.ssod_fast.decode_boxes_backward.default


def _backward(name: str, op: Callable[..., tuple[Tensor, Tensor]], ctx: Any, grad: Tensor) -> Any:
    """Gradients to both inputs of a codec op, as far as they are wanted."""
    proposals, others = ctx.saved_tensors
    need1, need2, _ = ctx.needs_input_grad
    grad1, grad2 = op(grad if grad.stride(-1) == 1 else grad.contiguous(), proposals, others, *ctx.options, need1, need2)
    grads = grad1 if need1 else None, grad2 if need2 else None
    if torch.is_grad_enabled():  # somebody will differentiate again
        grads = _boxes.once(name, (grad, proposals, others), grads)
    return *grads, None


class _Encode(torch.autograd.Function):
    """A thin Function costs less per call than a registered autograd formula, and nothing where no gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, proposals: Tensor, targets: Tensor, options: Sequence[float]) -> Tensor:
        ctx.save_for_backward(proposals, targets)
        ctx.options = options
        return _encode(proposals, targets, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _backward("encode_boxes", _encode_backward, ctx, grad)


class _Decode(torch.autograd.Function):
    """As above."""

    @staticmethod
    def forward(ctx: Any, proposals: Tensor, deltas: Tensor, options: Sequence[float]) -> Tensor:
        ctx.save_for_backward(proposals, deltas)
        ctx.options = options
        return _decode(proposals, deltas, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _backward("decode_boxes", _decode_backward, ctx, grad)
