"""The best partner of each box, without the matrix of all overlaps."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import _boxes, _overlaps
from ._boxes import Rule
from ._registry import launcher, register
from .box_iou import EpsMode, Format, Mode


class BoxMax(NamedTuple):
    """Largest overlap of each box and where it is found.

    Attributes:
        values: [..., N] or [..., M], float64 for float64 boxes, else float32; 0 for a box without any partner.
        indices: int64 of the same shape, the lowest index of the largest overlap; -1 for a box without any partner.
    """

    values: Tensor
    indices: Tensor


@overload
def box_iou_max(
    boxes1: Tensor,
    boxes2: Tensor,
    *,
    dim: Literal[-1, -2] = -1,
    mode: Mode = ...,
    fmt: Format = ...,
    eps_mode: EpsMode = ...,
    eps: float | None = ...,
    offsets1: Tensor | None = ...,
    offsets2: Tensor | None = ...,
) -> BoxMax: ...
@overload
def box_iou_max(
    boxes1: Tensor,
    boxes2: Tensor,
    *,
    dim: tuple[int, int],
    mode: Mode = ...,
    fmt: Format = ...,
    eps_mode: EpsMode = ...,
    eps: float | None = ...,
    offsets1: Tensor | None = ...,
    offsets2: Tensor | None = ...,
) -> tuple[BoxMax, BoxMax]: ...
def box_iou_max(
    boxes1: Tensor,
    boxes2: Tensor,
    *,
    dim: int | tuple[int, int] = -1,
    mode: Mode = "iou",
    fmt: Format = "xyxy",
    eps_mode: EpsMode = "zero",
    eps: float | None = None,
    offsets1: Tensor | None = None,
    offsets2: Tensor | None = None,
) -> BoxMax | tuple[BoxMax, BoxMax]:
    """Maximum of :func:`box_iou` along one or both dimensions, with indices, without the matrix.

    NaN pairs are skipped; a box without any partner gets value 0 and index -1. Among equal values the lowest index wins. The results never
    require grad: take the index, then :func:`paired_box_iou`.

    Args:
        boxes1: [..., N, 4]; [ΣN, 4] with offsets.
        boxes2: [..., M, 4]; [ΣM, 4] with offsets.
        dim: -1 (best in boxes2 per box of boxes1), -2 (best in boxes1 per box of boxes2) or (-1, -2), both.
        mode: see :func:`box_iou`, as `fmt`, `eps_mode` and `eps`.
        fmt: see :func:`box_iou`.
        eps_mode: see :func:`box_iou`.
        eps: see :func:`box_iou`.
        offsets1: int32 or int64 [B + 1] for ragged input, see :func:`ragged_box_iou`; together with `offsets2` or not at all.
        offsets2: [B + 1].

    Returns:
        `BoxMax(values, indices)` of shape [..., N] for dim -1 and [..., M] for dim -2, or the pair of both. Values are float32 (float64 for
        float64 boxes), indices int64; ragged indices count from the first box of the image.

    Raises:
        ValueError: for wrong shapes, devices, offsets, dim or option names.
        TypeError: for wrong dtypes.
    """
    if dim not in (-1, -2, (-1, -2), (-2, -1)):
        raise ValueError(f"dim must be -1, -2 or (-1, -2), got {dim!r}")
    dims = dim if isinstance(dim, tuple) else (dim,)
    rule = _boxes.make_rule(mode, fmt, eps_mode, eps)
    boxes1, boxes2 = _boxes.as_computable(boxes1, boxes2)
    offsets1, offsets2 = _boxes.check_batching(boxes1, boxes2, offsets1, offsets2)
    values1, indices1, values2, indices2 = _op(boxes1.detach(), boxes2.detach(), offsets1, offsets2, *rule, -1 in dims, -2 in dims)
    best = {-1: BoxMax(values1, indices1), -2: BoxMax(values2, indices2)}
    return (best[dims[0]], best[dims[1]]) if len(dims) == 2 else best[dims[0]]


def _best(matrix: Tensor, real: Tensor, dim: int, local: Tensor | None) -> tuple[Tensor, Tensor]:
    """Value and index of the first maximum among the `real` entries along `dim`."""
    if matrix.shape[dim] == 0:
        shape = matrix.sum(dim).shape
        return matrix.new_zeros(shape), matrix.new_full(shape, -1, dtype=torch.int64)
    matrix = matrix.masked_fill(~real, -math.inf)
    values = matrix.amax(dim)
    indices = (matrix == values.unsqueeze(dim)).to(torch.uint8).argmax(dim)
    if local is not None:
        indices = local[indices]
    none = ~real.any(dim)
    return values.masked_fill(none, 0), indices.masked_fill(none, -1)


def _reference(
    boxes1: Tensor,
    boxes2: Tensor,
    offsets1: Tensor | None,
    offsets2: Tensor | None,
    mode: int,
    fmt: int,
    eps_mode: int,
    eps: float,
    rows: bool,
    cols: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rule = Rule(mode, fmt, eps_mode, eps)
    matrix, same, local1, local2 = _overlaps.batched_pairwise(boxes1, boxes2, offsets1, offsets2, rule)
    real = same & (matrix > -math.inf)  # neither NaN nor -inf
    nothing = boxes1.new_empty(0), boxes1.new_empty(0, dtype=torch.int64)
    return (
        *(_best(matrix, real, -1, local2) if rows else nothing),
        *(_best(matrix, real, -2, local1) if cols else (t.clone() for t in nothing)),
    )


def _fake(boxes1: Tensor, boxes2: Tensor, offsets1: Tensor | None, offsets2: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    rows, cols = rest[-2:]
    shape1 = boxes1.shape[:-1] if rows else (0,)
    shape2 = boxes2.shape[:-1] if cols else (0,)
    return (
        boxes1.new_empty(shape1),
        boxes1.new_empty(shape1, dtype=torch.int64),
        boxes1.new_empty(shape2),
        boxes1.new_empty(shape2, dtype=torch.int64),
    )


register(
    "box_iou_max(Tensor boxes1, Tensor boxes2, Tensor? offsets1, Tensor? offsets2, int mode, int fmt, int eps_mode, float eps, "
    "bool rows, bool cols) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    triton=launcher("box_iou_max", "box_iou_max"),
)
_op = torch.ops.ssod_fast.box_iou_max.default
