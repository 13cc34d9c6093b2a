"""Overlap of matched pairs of boxes, with gradient: the value behind GIoU, DIoU and CIoU losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from . import _boxes, _overlaps
from ._boxes import Rule
from ._registry import launcher, register
from .box_iou import EpsMode, Format, Mode, NanMode


def paired_box_iou(
    boxes1: Tensor,
    boxes2: Tensor,
    *,
    mode: Mode = "iou",
    fmt: Format = "xyxy",
    eps_mode: EpsMode = "zero",
    eps: float | None = None,
    nan: NanMode = "propagate",
) -> Tensor:
    """Overlap of boxes1[i] with boxes2[i]: the diagonal of :func:`box_iou`, computed alone.

    Args:
        boxes1: [..., 4], any real dtype; half and integer boxes are computed in float32. Gradients flow to both sets.
        boxes2: [..., 4], broadcast against `boxes1` without being expanded in memory (a bag [G, P, 4] against its box [G, 1, 4]).
        mode: see :func:`box_iou`, as the remaining options.
        fmt: see :func:`box_iou`.
        eps_mode: see :func:`box_iou`.
        eps: see :func:`box_iou`.
        nan: see :func:`box_iou`.

    Returns:
        [...], float64 if either input is float64, else float32.

    Raises:
        ValueError: for shapes that do not broadcast, different devices, unknown option names.
        TypeError: for complex or boolean boxes.
    """
    rule = _boxes.make_rule(mode, fmt, eps_mode, eps)
    nan_zero = _boxes.nan_is_zero(nan)
    boxes1, boxes2 = _boxes.as_computable(boxes1, boxes2)
    if boxes1.shape != boxes2.shape:
        boxes1, boxes2 = _broadcast(boxes1, boxes2)
    if torch.is_grad_enabled() and (boxes1.requires_grad or boxes2.requires_grad):
        result: Tensor = _PairedBoxIoU.apply(boxes1, boxes2, (*rule, nan_zero))  # type: ignore[no-untyped-call]
        return result
    return _forward(boxes1, boxes2, *rule, nan_zero)


def paired_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    *,
    mode: Mode = "giou",
    fmt: Format = "xyxy",
    eps_mode: EpsMode = "zero",
    eps: float | None = None,
    nan: NanMode = "propagate",
    weight: Tensor | None = None,
    reduction: Literal["none", "sum", "mean"] = "sum",
) -> Tensor:
    """weight · (1 - overlap) of matched pairs; free of boolean indexing, so it neither synchronises nor breaks a compiled graph.

    Args:
        boxes1: [..., 4].
        boxes2: [..., 4], broadcast against `boxes1`.
        mode: see :func:`box_iou`, as `fmt`, `eps_mode`, `eps` and `nan`.
        fmt: see :func:`box_iou`.
        eps_mode: see :func:`box_iou`.
        eps: see :func:`box_iou`.
        nan: see :func:`box_iou`.
        weight: broadcastable to [...] without enlarging it, or None for 1.
        reduction: "none", "sum", or "mean" over the pairs (0 if there is none).

    Returns:
        [...] or a scalar.

    Raises:
        ValueError: as :func:`paired_box_iou`, and for an unknown reduction or a weight of another shape.
        TypeError: as :func:`paired_box_iou`, and for a weight that is no tensor.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
    loss = 1 - paired_box_iou(boxes1, boxes2, mode=mode, fmt=fmt, eps_mode=eps_mode, eps=eps, nan=nan)
    if weight is not None:
        _check_weight(weight, loss.shape)
        loss = loss * weight
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(loss.numel(), 1)


def _check_weight(weight: Tensor, shape: torch.Size) -> None:
    """Refuses weights that a product with the pairs would enlarge: [N, 1] against [N] would become [N, N]."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    fits = weight.dim() <= len(shape) and all(
        given in (1, wanted) for given, wanted in zip(reversed(weight.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"weight must broadcast to the pairs, of shape {list(shape)}, got {list(weight.shape)}")


def _broadcast(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Stride-0 views of one shape; autograd sums over what they repeat."""
    try:
        boxes1, boxes2 = torch.broadcast_tensors(boxes1, boxes2)
    except RuntimeError as error:
        raise ValueError(f"boxes1 and boxes2 must broadcast, got {list(boxes1.shape)} and {list(boxes2.shape)}") from error
    return boxes1, boxes2


def _reference(boxes1: Tensor, boxes2: Tensor, mode: int, fmt: int, eps_mode: int, eps: float, nan_zero: bool) -> Tensor:
    rule = Rule(mode, fmt, eps_mode, eps)
    return _overlaps.overlaps(_overlaps.corners(boxes1, rule), _overlaps.corners(boxes2, rule), rule, nan_zero)


def _reference_backward(
    grad: Tensor,
    boxes1: Tensor,
    boxes2: Tensor,
    mode: int,
    fmt: int,
    eps_mode: int,
    eps: float,
    nan_zero: bool,
    need1: bool,
    need2: bool,
) -> tuple[Tensor, Tensor]:
    rule = Rule(mode, fmt, eps_mode, eps)
    a, b = _overlaps.corners(boxes1, rule), _overlaps.corners(boxes2, rule)
    grad1, grad2 = _overlaps.overlap_gradients(grad, a, b, rule, nan_zero)
    return grad1 if need1 else boxes1.new_empty(0), grad2 if need2 else boxes2.new_empty(0)


def _fake(boxes1: Tensor, boxes2: Tensor, mode: int, fmt: int, eps_mode: int, eps: float, nan_zero: bool) -> Tensor:
    return boxes1.new_empty(boxes1.shape[:-1])


def _fake_backward(grad: Tensor, boxes1: Tensor, boxes2: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need1, need2 = rest[-2:]
    return boxes1.new_empty(boxes1.shape if need1 else (0,)), boxes2.new_empty(boxes2.shape if need2 else (0,))


_RULE = "int mode, int fmt, int eps_mode, float eps, bool nan_zero"
register(
    f"paired_box_iou(Tensor boxes1, Tensor boxes2, {_RULE}) -> Tensor",
    reference=_reference,
    fake=_fake,
    triton=launcher("paired_box_iou", "paired_box_iou"),
)
register(
    f"paired_box_iou_backward(Tensor grad, Tensor boxes1, Tensor boxes2, {_RULE}, bool need1, bool need2) -> (Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    triton=launcher("paired_box_iou", "paired_box_iou_backward"),
)
_forward: Callable[..., Tensor] = torch.ops.ssod_fast.paired_box_iou.default
_backward = torch.ops.ssod_fast.paired_box_iou_backward.default


class _PairedBoxIoU(torch.autograd.Function):
    """A thin Function costs less per call than a registered autograd formula, and nothing where no gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, boxes1: Tensor, boxes2: Tensor, options: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(boxes1, boxes2)
        ctx.options = options
        return _forward(boxes1, boxes2, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        boxes1, boxes2 = ctx.saved_tensors
        need1, need2, _ = ctx.needs_input_grad
        grad1, grad2 = _backward(grad, boxes1, boxes2, *ctx.options, need1, need2)
        grads = grad1 if need1 else None, grad2 if need2 else None
        if torch.is_grad_enabled():  # somebody will differentiate again
            grads = _boxes.once("paired_box_iou", (grad, boxes1, boxes2), grads)
        return *grads, None
