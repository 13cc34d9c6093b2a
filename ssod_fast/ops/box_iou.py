"""Overlap of all pairs of two sets of boxes: IoU, IoF, GIoU, DIoU, CIoU, dense or ragged."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from . import _boxes, _overlaps
from ._boxes import Rule
from ._registry import launcher, register

Mode = Literal["iou", "iof", "giou", "diou", "ciou"]
Format = Literal["xyxy", "xywh", "cxcywh"]
EpsMode = Literal["zero", "none", "max", "add"]
NanMode = Literal["propagate", "zero"]


def box_iou(
    boxes1: Tensor,
    boxes2: Tensor,
    *,
    mode: Mode = "iou",
    fmt: Format = "xyxy",
    eps_mode: EpsMode = "zero",
    eps: float | None = None,
    nan: NanMode = "propagate",
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Overlap of every box of `boxes1` with every box of `boxes2`, without any temporary of the result's size.

    Finite degenerate boxes give 0 overlap in the default `eps_mode`, never NaN; the other modes reproduce their peer. Gradients flow to
    both sets (the pairs are recomputed in the backward; only the boxes are saved).

    Args:
        boxes1: [..., N, 4], any real dtype; half and integer boxes are computed in float32.
        boxes2: [..., M, 4], leading dimensions as in `boxes1`.
        mode: "iou"; "iof", which divides by the area of boxes1; "giou" (Rezatofighi et al. 2019); "diou", "ciou" (Zheng et al. 2020).
        fmt: format of both sets, "xyxy", "xywh" (corner and size) or "cxcywh"; any unit, the same for both.
        eps_mode: treatment of vanishing denominators: "zero" (the quotient is 0), "none" (torchvision's pairwise functions, DETR), "max"
            (mmdet's floor) or "add" (torchvision's losses, ultralytics).
        eps: by default 1e-7 for "none" (DIoU and CIoU only) and "add", 1e-6 for "max".
        nan: "propagate" keeps NaN of pairs with a box that is not finite, "zero" turns them into 0.
        dtype: dtype of the result; by default float64 if either input is float64, else float32.
        out: contiguous tensor to write to, which shares no memory with the boxes; no input may require grad then.

    Returns:
        [..., N, M].

    Raises:
        ValueError: for wrong shapes, devices, option names or `out`.
        TypeError: for complex or boolean boxes or a result dtype that is not floating.
    """
    rule = _boxes.make_rule(mode, fmt, eps_mode, eps)
    nan_zero = _boxes.nan_is_zero(nan)
    boxes1, boxes2 = _boxes.as_computable(boxes1, boxes2)
    _boxes.check_pairwise(boxes1, boxes2)
    if dtype is None:
        dtype = boxes1.dtype
    else:
        _boxes.check_dtype(dtype)
    if out is not None:
        return _into(boxes1, boxes2, rule, nan_zero, dtype, out)
    if torch.is_grad_enabled() and (boxes1.requires_grad or boxes2.requires_grad):
        result: Tensor = _BoxIoU.apply(boxes1, boxes2, (*rule, nan_zero), dtype)  # type: ignore[no-untyped-call]
        return result
    return _forward(boxes1, boxes2, *rule, nan_zero, dtype)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor, fmt: Format = "xyxy", **options: Any) -> Tensor:
    """:func:`box_iou` with mode "giou"; torchvision's name and argument order."""
    _check_free(options, "generalized_box_iou", "giou")
    return box_iou(boxes1, boxes2, mode="giou", fmt=fmt, **options)


def distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7, fmt: Format = "xyxy", **options: Any) -> Tensor:
    """:func:`box_iou` with mode "diou"; torchvision's name and argument order (`eps` counts in eps modes other than "zero")."""
    _check_free(options, "distance_box_iou", "diou")
    return box_iou(boxes1, boxes2, mode="diou", eps=eps, fmt=fmt, **options)


def complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7, fmt: Format = "xyxy", **options: Any) -> Tensor:
    """:func:`box_iou` with mode "ciou"; torchvision's name and argument order (`eps` counts in eps modes other than "zero")."""
    _check_free(options, "complete_box_iou", "ciou")
    return box_iou(boxes1, boxes2, mode="ciou", eps=eps, fmt=fmt, **options)


def ragged_box_iou(
    boxes1: Tensor,
    offsets1: Tensor,
    boxes2: Tensor,
    offsets2: Tensor,
    *,
    max_boxes2: int,
    pad_value: float = 0.0,
    mode: Mode = "iou",
    fmt: Format = "xyxy",
    eps_mode: EpsMode = "zero",
    eps: float | None = None,
    nan: NanMode = "propagate",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Overlaps inside each image of a batch whose images own different numbers of boxes. Never synchronises; carries no gradient.

    Args:
        boxes1: [ΣN, 4], the boxes of all images one after another.
        offsets1: int32 or int64 [B + 1]: image b owns rows offsets1[b] to offsets1[b + 1] - 1. Checked on the host, clamped on a device.
        boxes2: [ΣM, 4].
        offsets2: [B + 1].
        max_boxes2: columns of the result, at least the largest M_b.
        pad_value: fills the columns beyond M_b.
        mode: see :func:`box_iou`, as the remaining options.
        fmt: see :func:`box_iou`.
        eps_mode: see :func:`box_iou`.
        eps: see :func:`box_iou`.
        nan: see :func:`box_iou`.
        dtype: see :func:`box_iou`.

    Returns:
        [ΣN, max_boxes2]: row i, column j is the overlap of box i with box j of its own image.

    Raises:
        ValueError: for wrong shapes, devices, offsets or option names, or if boxes require grad.
        TypeError: for wrong dtypes.
    """
    rule = _boxes.make_rule(mode, fmt, eps_mode, eps)
    nan_zero = _boxes.nan_is_zero(nan)
    boxes1, boxes2 = _boxes.as_computable(boxes1, boxes2)
    _boxes.refuse_grad("ragged_box_iou", boxes1, boxes2)
    offsets1, offsets2, largest = _boxes.check_ragged(boxes1, offsets1, boxes2, offsets2)
    if not isinstance(max_boxes2, Integral | torch.SymInt):
        raise TypeError(f"max_boxes2 must be an integer, got {max_boxes2!r}")
    if max_boxes2 < (largest or 0):
        raise ValueError(f"max_boxes2 must be at least the largest number of boxes of an image ({largest or 0}), got {max_boxes2}")
    dtype = dtype or boxes1.dtype
    _boxes.check_dtype(dtype)
    return _ragged(boxes1, offsets1, boxes2, offsets2, max_boxes2, pad_value, *rule, nan_zero, dtype)


def _check_free(options: dict[str, Any], function: str, mode: Mode) -> None:
    """Refuses a second mode."""
    if "mode" in options:
        raise TypeError(f"mode must not be given: {function} fixes it to {mode!r}, got {options['mode']!r}; box_iou takes any")


def _into(boxes1: Tensor, boxes2: Tensor, rule: Rule, nan_zero: bool, dtype: torch.dtype, out: Tensor) -> Tensor:
    """Checks `out` and writes to it."""
    shape = [*boxes1.shape[:-1], boxes2.shape[-2]]
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if list(out.shape) != shape or out.dtype != dtype or out.device != boxes1.device or not out.is_contiguous():
        layout = "contiguous" if out.is_contiguous() else "non-contiguous"
        raise ValueError(
            f"out must be a contiguous {dtype} tensor of shape {shape} on {boxes1.device}, "
            f"got a {layout} {out.dtype} tensor of shape {list(out.shape)} on {out.device}"
        )
    if not torch.compiler.is_compiling() and (_overlap_in_memory(out, boxes1) or _overlap_in_memory(out, boxes2)):
        raise ValueError("out must not share memory with boxes1 or boxes2, which are read while it is written")
    if torch.is_grad_enabled() and (boxes1.requires_grad or boxes2.requires_grad or out.requires_grad):
        raise ValueError("out cannot be used when boxes1, boxes2 or out require grad: drop out or detach the boxes")
    _out(boxes1, boxes2, *rule, nan_zero, out)
    return out


def _overlap_in_memory(out: Tensor, boxes: Tensor) -> bool:
    """Whether a contiguous tensor and the span of another lie in the same bytes of one storage."""
    one_storage = torch._C._is_alias_of(out, boxes)  # type: ignore[attr-defined]
    if out.numel() == 0 or boxes.numel() == 0 or not one_storage:
        return False
    span = 1 + sum((size - 1) * stride for size, stride in zip(boxes.shape, boxes.stride(), strict=True))
    begin1, begin2 = out.storage_offset() * out.element_size(), boxes.storage_offset() * boxes.element_size()
    return begin1 < begin2 + span * boxes.element_size() and begin2 < begin1 + out.numel() * out.element_size()


def _reference(
    boxes1: Tensor, boxes2: Tensor, mode: int, fmt: int, eps_mode: int, eps: float, nan_zero: bool, dtype: torch.dtype
) -> Tensor:
    return _overlaps.pairwise(boxes1, boxes2, Rule(mode, fmt, eps_mode, eps), nan_zero).to(dtype)


def _reference_out(boxes1: Tensor, boxes2: Tensor, mode: int, fmt: int, eps_mode: int, eps: float, nan_zero: bool, out: Tensor) -> None:
    out.copy_(_overlaps.pairwise(boxes1, boxes2, Rule(mode, fmt, eps_mode, eps), nan_zero))


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
    a, b = _overlaps.corners(boxes1, rule).unsqueeze(-1), _overlaps.corners(boxes2, rule).unsqueeze(-2)
    grad1, grad2 = _overlaps.overlap_gradients(grad, a, b, rule, nan_zero)
    return grad1.sum(-2) if need1 else boxes1.new_empty(0), grad2.sum(-3) if need2 else boxes2.new_empty(0)


def _reference_ragged(
    boxes1: Tensor,
    offsets1: Tensor,
    boxes2: Tensor,
    offsets2: Tensor,
    max_boxes2: int,
    pad_value: float,
    mode: int,
    fmt: int,
    eps_mode: int,
    eps: float,
    nan_zero: bool,
    dtype: torch.dtype,
) -> Tensor:
    rule = Rule(mode, fmt, eps_mode, eps)
    rows, cols = boxes1.shape[0], boxes2.shape[0]
    if rows == 0 or cols == 0 or offsets1.shape[0] == 1:
        return boxes1.new_full((rows, max_boxes2), pad_value, dtype=dtype)
    image, _, owned = _overlaps.image_of_row(offsets1, rows)
    bounds = offsets2.clamp(0, cols).cummax(0).values
    column = bounds[image][:, None] + torch.arange(max_boxes2, device=boxes1.device)  # [ΣN, max_boxes2]
    real = (column < bounds[image + 1][:, None]) & owned[:, None]
    others = boxes2[column.clamp(max=cols - 1)]  # [ΣN, max_boxes2, 4]
    value = _overlaps.overlaps(_overlaps.corners(boxes1, rule).unsqueeze(-1), _overlaps.corners(others, rule), rule, nan_zero)
    return value.masked_fill(~real, pad_value).to(dtype)


def _fake(boxes1: Tensor, boxes2: Tensor, mode: int, fmt: int, eps_mode: int, eps: float, nan_zero: bool, dtype: torch.dtype) -> Tensor:
    return boxes1.new_empty((*boxes1.shape[:-1], boxes2.shape[-2]), dtype=dtype)


def _fake_out(boxes1: Tensor, boxes2: Tensor, mode: int, fmt: int, eps_mode: int, eps: float, nan_zero: bool, out: Tensor) -> None:
    return None


def _fake_backward(grad: Tensor, boxes1: Tensor, boxes2: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need1, need2 = rest[-2:]
    return boxes1.new_empty(boxes1.shape if need1 else (0,)), boxes2.new_empty(boxes2.shape if need2 else (0,))


def _fake_ragged(boxes1: Tensor, offsets1: Tensor, boxes2: Tensor, offsets2: Tensor, max_boxes2: int, *rest: Any) -> Tensor:
    return boxes1.new_empty((boxes1.shape[0], max_boxes2), dtype=rest[-1])


_RULE = "int mode, int fmt, int eps_mode, float eps"
register(
    f"box_iou(Tensor boxes1, Tensor boxes2, {_RULE}, bool nan_zero, ScalarType dtype) -> Tensor",
    reference=_reference,
    fake=_fake,
    triton=launcher("box_iou", "box_iou"),
)
register(
    # `overlap` is the mode: torch's functionalisation of mutating ops has an argument of that name itself.
    f"box_iou.out(Tensor boxes1, Tensor boxes2, {_RULE.replace('mode', 'overlap', 1)}, bool nan_zero, Tensor(a!) out) -> ()",
    reference=_reference_out,
    fake=_fake_out,
    triton=launcher("box_iou", "box_iou_out"),
)
register(
    f"box_iou_backward(Tensor grad, Tensor boxes1, Tensor boxes2, {_RULE}, bool nan_zero, bool need1, bool need2) -> (Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    triton=launcher("box_iou", "box_iou_backward"),
)
register(
    "ragged_box_iou(Tensor boxes1, Tensor offsets1, Tensor boxes2, Tensor offsets2, SymInt max_boxes2, float pad_value, "
    f"{_RULE}, bool nan_zero, ScalarType dtype) -> Tensor",
    reference=_reference_ragged,
    fake=_fake_ragged,
    triton=launcher("box_iou", "ragged_box_iou"),
)
_forward: Callable[..., Tensor] = torch.ops.ssod_fast.box_iou.default
_out = torch.ops.ssod_fast.box_iou.out
_backward = torch.ops.ssod_fast.box_iou_backward.default
_ragged: Callable[..., Tensor] = torch.ops.ssod_fast.ragged_box_iou.default


class _BoxIoU(torch.autograd.Function):
    """Saves the boxes alone and recomputes the pairs in the backward."""

    @staticmethod
    def forward(ctx: Any, boxes1: Tensor, boxes2: Tensor, options: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(boxes1, boxes2)
        ctx.options = options
        return _forward(boxes1, boxes2, *options, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        boxes1, boxes2 = ctx.saved_tensors
        need1, need2, *_ = ctx.needs_input_grad
        grad1, grad2 = _backward(grad.to(boxes1.dtype), boxes1, boxes2, *ctx.options, need1, need2)
        grads = grad1 if need1 else None, grad2 if need2 else None
        if torch.is_grad_enabled():  # somebody will differentiate again
            grads = _boxes.once("box_iou", (grad, boxes1, boxes2), grads)
        return *grads, None, None
