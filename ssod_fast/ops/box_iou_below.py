"""Whether a box overlaps none of a set of others: the filter behind random negatives and ignore regions."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _boxes, _overlaps
from ._boxes import Rule
from ._registry import launcher, register
from .box_iou import EpsMode, Format, Mode


@overload
def box_iou_below(
    boxes: Tensor,
    others: Tensor,
    threshold: float,
    *,
    mode: Mode = ...,
    fmt: Format = ...,
    eps_mode: EpsMode = ...,
    eps: float | None = ...,
    offsets1: Tensor | None = ...,
    offsets2: Tensor | None = ...,
    return_max: Literal[False] = False,
) -> Tensor: ...
@overload
def box_iou_below(
    boxes: Tensor,
    others: Tensor,
    threshold: float,
    *,
    mode: Mode = ...,
    fmt: Format = ...,
    eps_mode: EpsMode = ...,
    eps: float | None = ...,
    offsets1: Tensor | None = ...,
    offsets2: Tensor | None = ...,
    return_max: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def box_iou_below(
    boxes: Tensor,
    others: Tensor,
    threshold: float,
    *,
    mode: Mode = "iou",
    fmt: Format = "xyxy",
    eps_mode: EpsMode = "zero",
    eps: float | None = None,
    offsets1: Tensor | None = None,
    offsets2: Tensor | None = None,
    return_max: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """True where **every** overlap of a box with the others is strictly below the threshold. Carries no gradient.

    A NaN pair makes its row False, because NaN is not below anything; the maxima skip such pairs. So a box that is not finite is False
    with maximum 0. A box without others is True. The matrix is never stored, and without `return_max` a row stops at its first hit.

    Args:
        boxes: [..., N, 4]; [ΣN, 4] with offsets.
        others: [..., M, 4]; [ΣM, 4] with offsets.
        threshold: cast to the compute dtype (float32, or float64 for float64 boxes) before it is compared.
        mode: see :func:`box_iou`, as `fmt`, `eps_mode` and `eps`.
        fmt: see :func:`box_iou`.
        eps_mode: see :func:`box_iou`.
        eps: see :func:`box_iou`.
        offsets1: int32 or int64 [B + 1] of `boxes` for ragged input; together with `offsets2` or not at all.
        offsets2: [B + 1] of `others`.
        return_max: also return the largest overlap of each box (NaN pairs skipped, 0 if there is none).

    Returns:
        bool [..., N], and with `return_max` the maxima [..., N] in the compute dtype.

    Raises:
        ValueError: for wrong shapes, devices, offsets, option names, or a NaN threshold.
        TypeError: for wrong dtypes, or a threshold that is no number.
    """
    _check_threshold(threshold)
    rule = _boxes.make_rule(mode, fmt, eps_mode, eps)
    boxes, others = _boxes.as_computable(boxes, others, "boxes", "others")
    offsets1, offsets2 = _boxes.check_batching(boxes, others, offsets1, offsets2, "boxes", "others")
    below, maxima = _op(boxes.detach(), others.detach(), offsets1, offsets2, threshold, *rule, return_max)
    return (below, maxima) if return_max else below


def _check_threshold(threshold: float) -> None:
    try:
        is_nan = math.isnan(threshold)
    except TypeError as error:
        raise TypeError(f"threshold must be a number, got {threshold!r}") from error
    if is_nan:
        raise ValueError("threshold must be a number, got nan")


def _reference(
    boxes: Tensor,
    others: Tensor,
    offsets1: Tensor | None,
    offsets2: Tensor | None,
    threshold: float,
    mode: int,
    fmt: int,
    eps_mode: int,
    eps: float,
    return_max: bool,
) -> tuple[Tensor, Tensor]:
    matrix, same, _, _ = _overlaps.batched_pairwise(boxes, others, offsets1, offsets2, Rule(mode, fmt, eps_mode, eps))
    below = ((matrix < torch.tensor(threshold, dtype=matrix.dtype)) | ~same).all(-1)
    if not return_max:
        return below, boxes.new_empty(0)
    if matrix.shape[-1] == 0:
        return below, boxes.new_zeros(below.shape)
    real = same & (matrix > -math.inf)  # neither NaN nor -inf
    maxima = matrix.masked_fill(~real, -math.inf).amax(-1)
    return below, maxima.masked_fill(~real.any(-1), 0)


def _fake(boxes: Tensor, others: Tensor, offsets1: Tensor | None, offsets2: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = boxes.shape[:-1]
    return boxes.new_empty(shape, dtype=torch.bool), boxes.new_empty(shape if rest[-1] else (0,))


register(
    "box_iou_below(Tensor boxes, Tensor others, Tensor? offsets1, Tensor? offsets2, float threshold, int mode, int fmt, int eps_mode, "
    "float eps, bool return_max) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    triton=launcher("box_iou_below", "box_iou_below"),
)
_op = torch.ops.ssod_fast.box_iou_below.default
