"""The maths of the IoU family in plain PyTorch: specification, fallback on every device, and oracle of the tests.

`csrc/boxes.h` repeats it pair by pair in the same order of operations, so that results agree to the last bit where only sums, products,
comparisons and divisions are involved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._boxes import ADD, CIOU, DIOU, GIOU, IOF, IOU, MAX, NONE, XYWH, XYXY, ZERO, Rule

_CIOU_SCALE = 4 / math.pi**2


class Corners(NamedTuple):
    """Boxes as planes: corners, area and the angle atan(w / h) that CIoU compares. A box that is not finite has area NaN, corners 0."""

    x1: Tensor
    y1: Tensor
    x2: Tensor
    y2: Tensor
    w: Tensor
    h: Tensor
    area: Tensor
    angle: Tensor

    def unsqueeze(self, dim: int) -> Corners:
        """The same boxes with a new dimension, for broadcasting."""
        return Corners(*(plane.unsqueeze(dim) for plane in self))


def corners(boxes: Tensor, rule: Rule) -> Corners:
    """Converts boxes [..., 4] of `rule.fmt` to planes [...]."""
    finite = boxes.isfinite().all(-1)
    a, b, c, d = boxes.where(finite.unsqueeze(-1), 0).unbind(-1)
    if rule.fmt == XYXY:
        x1, y1, x2, y2 = a, b, c, d
    elif rule.fmt == XYWH:
        x1, y1, x2, y2 = a, b, a + c, b + d
    else:
        x1, y1, x2, y2 = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    w, h = x2 - x1, y2 - y1
    if rule.eps_mode == ZERO:
        w, h = w.clamp(min=0), h.clamp(min=0)
        angle = torch.atan2(w, h)
    else:
        angle = torch.atan(w / h)
    area = (w * h).where(finite, math.nan)
    return Corners(x1, y1, x2, y2, w, h, area, angle)


class _Eps(NamedTuple):
    """The eps modes of the peers in one form: denominators are max(x, floor) + add."""

    floor: float
    area: float  # added to union and enclosing area
    other: float  # added to the diagonal and to CIoU's weight


def _eps_terms(rule: Rule) -> _Eps:
    if rule.eps_mode == MAX:
        return _Eps(rule.eps, 0.0, 0.0)
    if rule.eps_mode == ADD:
        return _Eps(-math.inf, rule.eps, rule.eps)
    if rule.eps_mode == NONE:
        return _Eps(-math.inf, 0.0, rule.eps)
    return _Eps(-math.inf, 0.0, 0.0)


class _Quotient(NamedTuple):
    """num / den with its guard, and the factor that its gradient carries (0 where the guard holds)."""

    value: Tensor
    live: Tensor | float
    den: Tensor


def _quotient(num: Tensor, den: Tensor, add: float, rule: Rule) -> _Quotient:
    if rule.eps_mode != ZERO:
        return _Quotient(num / (den + add), 1.0, den + add)
    guard = den <= 0  # false for NaN, which stays NaN
    return _Quotient((num / den).where(~guard, 0), (~guard).to(den.dtype), den.where(~guard, 1))


def _half_tie(smaller: Tensor, larger: Tensor) -> Tensor:
    """Share of the gradient that a minimum (maximum) hands to `smaller` (`larger`): 1, one half in a tie, or 0."""
    return (smaller < larger).to(smaller.dtype) + 0.5 * (smaller == larger).to(smaller.dtype)


class _Pair(NamedTuple):
    """Intermediate values of one pair."""

    iw: Tensor  # sides of the intersection before the clamp at 0
    ih: Tensor
    inter: Tensor
    raw_union: Tensor
    union: Tensor
    ew: Tensor  # sides of the enclosing box before the clamp
    eh: Tensor
    dx: Tensor  # twice the distance of the centres
    dy: Tensor


def _pair(a: Corners, b: Corners, rule: Rule) -> _Pair:
    iw = torch.minimum(a.x2, b.x2) - torch.maximum(a.x1, b.x1)
    ih = torch.minimum(a.y2, b.y2) - torch.maximum(a.y1, b.y1)
    inter = iw.clamp(min=0) * ih.clamp(min=0)
    union = a.area + (b.area - b.area) if rule.mode == IOF else (a.area + b.area) - inter  # b.area - b.area: 0, or NaN for a bad box
    return _Pair(
        iw=iw,
        ih=ih,
        inter=inter,
        raw_union=union,
        union=union.clamp(min=_eps_terms(rule).floor),
        ew=torch.maximum(a.x2, b.x2) - torch.minimum(a.x1, b.x1),
        eh=torch.maximum(a.y2, b.y2) - torch.minimum(a.y1, b.y1),
        dx=(a.x1 + a.x2) - (b.x1 + b.x2),
        dy=(a.y1 + a.y2) - (b.y1 + b.y2),
    )


def _enclosing(p: _Pair, rule: Rule) -> tuple[Tensor, Tensor]:
    """Enclosing area, before and after the floor of eps_mode "max"."""
    raw = p.ew.clamp(min=0) * p.eh.clamp(min=0)
    return raw, raw.clamp(min=_eps_terms(rule).floor)


def _distance(p: _Pair, rule: Rule) -> tuple[Tensor, Tensor, _Quotient]:
    """Squared diagonal of the enclosing box, squared distance of the centres, and their quotient."""
    ew, eh = p.ew.clamp(min=0), p.eh.clamp(min=0)
    diagonal = ew * ew + eh * eh
    rho = (p.dx * p.dx + p.dy * p.dy) / 4
    return diagonal, rho, _quotient(rho, diagonal.clamp(min=_eps_terms(rule).floor), _eps_terms(rule).other, rule)


def _aspect(a: Corners, b: Corners, iou: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Difference of the angles, v and its weight alpha of CIoU (Zheng et al. 2020, equations 9 to 11)."""
    turn = b.angle - a.angle
    v = _CIOU_SCALE * (turn * turn)
    if rule.eps_mode == ZERO:
        alpha = (v / ((1 - iou) + v)).where(v != 0, 0)
    else:
        alpha = v / ((1 - iou + v).clamp(min=_eps_terms(rule).floor) + _eps_terms(rule).other)
    return turn, v, alpha


def overlaps(a: Corners, b: Corners, rule: Rule, nan_zero: bool) -> Tensor:
    """Overlap of broadcast pairs, element by element."""
    p = _pair(a, b, rule)
    eps = _eps_terms(rule)
    value = _quotient(p.inter, p.union, eps.area, rule).value
    if rule.mode == GIOU:
        _, enclosing = _enclosing(p, rule)
        value = value - _quotient(enclosing - p.union, enclosing, eps.area, rule).value
    if rule.mode in (DIOU, CIOU):
        iou = value
        value = iou - _distance(p, rule)[2].value
        if rule.mode == CIOU:
            _, v, alpha = _aspect(a, b, iou, rule)
            value = value - alpha * v
    return value.where(~value.isnan(), 0) if nan_zero else value


class _Partials(NamedTuple):
    """Derivatives of the overlap with respect to what `_pair` computes; None where the mode does not use it."""

    inter: Tensor
    union: Tensor
    enclosing: Tensor | None = None
    diagonal: Tensor | None = None
    rho: Tensor | None = None
    turn: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> _Partials:
        """`change` applied to every derivative that the mode uses."""
        inter, union, *others = self
        return _Partials(change(inter), change(union), *[None if part is None else change(part) for part in others])


def _passes_floor(raw: Tensor, floor: float) -> Tensor:
    """Gradient share of max(raw, floor), a tie split in half."""
    return _half_tie(torch.full_like(raw, floor), raw)


def _partials(a: Corners, b: Corners, p: _Pair, rule: Rule) -> _Partials:
    eps = _eps_terms(rule)
    iou, live, den = _quotient(p.inter, p.union, eps.area, rule)
    d_inter = live / den
    d_union = -live * p.inter / (den * den)
    if rule.mode == GIOU:
        raw, enclosing = _enclosing(p, rule)
        _, live, den = _quotient(enclosing - p.union, enclosing, eps.area, rule)
        d_enclosing = live * ((enclosing - p.union) / (den * den) - 1 / den) * _passes_floor(raw, eps.floor)
        d_union = (d_union + live / den) * _passes_floor(p.raw_union, eps.floor)
        return _Partials(d_inter, d_union, enclosing=d_enclosing)
    d_union = d_union * _passes_floor(p.raw_union, eps.floor)
    if rule.mode in (IOU, IOF):
        return _Partials(d_inter, d_union)
    diagonal, rho, (_, live, den) = _distance(p, rule)
    d_diagonal = live * rho / (den * den) * _passes_floor(diagonal, eps.floor)
    d_turn = None
    if rule.mode == CIOU:
        turn, _, alpha = _aspect(a, b, iou, rule)
        d_turn = -alpha * (2 * _CIOU_SCALE) * turn
    return _Partials(d_inter, d_union, diagonal=d_diagonal, rho=-live / den, turn=d_turn)


def _silence_nan(parts: _Partials, value: Tensor) -> _Partials:
    keep = ~value.isnan()
    return parts.map(lambda part: part.where(keep, 0))


def _side_gradients(box: Corners, d_area: Tensor, d_angle: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """Gradients of a box's own width and height."""
    d_w, d_h = d_area * box.h, d_area * box.w
    if d_angle is not None:
        square = box.w * box.w + box.h * box.h
        scale = (d_angle / square).where(square > 0, 0)
        d_w, d_h = d_w + scale * box.h, d_h - scale * box.w
    if rule.eps_mode == ZERO:
        d_w = d_w * (box.x2 - box.x1 >= 0).to(d_w.dtype)
        d_h = d_h * (box.y2 - box.y1 >= 0).to(d_h.dtype)
    return d_w, d_h


def _axis(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, d_inner: Tensor, d_outer: Tensor | None) -> list[Tensor]:
    """Gradients of the ends (a1, a2, b1, b2) along one axis, from those of the intersection's and the enclosing box's side."""
    grads = [
        -d_inner * _half_tie(b1, a1),
        d_inner * _half_tie(a2, b2),
        -d_inner * _half_tie(a1, b1),
        d_inner * _half_tie(b2, a2),
    ]
    if d_outer is not None:
        grads[0] = grads[0] - d_outer * _half_tie(a1, b1)
        grads[1] = grads[1] + d_outer * _half_tie(b2, a2)
        grads[2] = grads[2] - d_outer * _half_tie(b1, a1)
        grads[3] = grads[3] + d_outer * _half_tie(a2, b2)
    return grads


def _outer_gradients(p: _Pair, parts: _Partials) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the enclosing box's sides; a clamp passes its gradient where the argument is >= 0."""
    ew, eh = p.ew.clamp(min=0), p.eh.clamp(min=0)
    keep_w, keep_h = (p.ew >= 0).to(ew.dtype), (p.eh >= 0).to(eh.dtype)
    if parts.enclosing is not None:
        return parts.enclosing * eh * keep_w, parts.enclosing * ew * keep_h
    if parts.diagonal is not None:
        return parts.diagonal * 2 * ew * keep_w, parts.diagonal * 2 * eh * keep_h
    return None, None


def _to_format(dx1: Tensor, dy1: Tensor, dx2: Tensor, dy2: Tensor, fmt: int) -> Tensor:
    """Gradients of corners as gradients of the four numbers of `fmt`, [..., 4]."""
    if fmt == XYXY:
        planes = [dx1, dy1, dx2, dy2]
    elif fmt == XYWH:
        planes = [dx1 + dx2, dy1 + dy2, dx2, dy2]
    else:
        planes = [dx1 + dx2, dy1 + dy2, (dx2 - dx1) / 2, (dy2 - dy1) / 2]
    return torch.stack(planes, -1)


def overlap_gradients(grad: Tensor, boxes1: Corners, boxes2: Corners, rule: Rule, nan_zero: bool) -> tuple[Tensor, Tensor]:
    """Gradients of broadcast pairs with respect to both boxes, [..., 4] each; ties and clamps as in torch's autograd."""
    a, b = boxes1, boxes2
    p = _pair(a, b, rule)
    parts = _partials(a, b, p, rule)
    if nan_zero:
        parts = _silence_nan(parts, overlaps(a, b, rule, nan_zero=False))
    parts = parts.map(lambda part: part * grad)
    d_area = parts.union
    d_inter = parts.inter if rule.mode == IOF else parts.inter - parts.union
    d_iw = d_inter * p.ih.clamp(min=0) * (p.iw >= 0).to(p.iw.dtype)
    d_ih = d_inter * p.iw.clamp(min=0) * (p.ih >= 0).to(p.ih.dtype)
    d_ew, d_eh = _outer_gradients(p, parts)
    ax1, ax2, bx1, bx2 = _axis(a.x1, a.x2, b.x1, b.x2, d_iw, d_ew)
    ay1, ay2, by1, by2 = _axis(a.y1, a.y2, b.y1, b.y2, d_ih, d_eh)
    aw, ah = _side_gradients(a, d_area, None if parts.turn is None else -parts.turn, rule)
    bw, bh = _side_gradients(b, torch.zeros_like(d_area) if rule.mode == IOF else d_area, parts.turn, rule)
    mx, my = torch.zeros_like(d_iw), torch.zeros_like(d_iw)
    if parts.rho is not None:
        mx, my = parts.rho * p.dx / 2, parts.rho * p.dy / 2
    grad1 = _to_format(ax1 - aw + mx, ay1 - ah + my, ax2 + aw + mx, ay2 + ah + my, rule.fmt)
    grad2 = _to_format(bx1 - bw - mx, by1 - bh - my, bx2 + bw - mx, by2 + bh - my, rule.fmt)
    return grad1, grad2


def pairwise(boxes1: Tensor, boxes2: Tensor, rule: Rule, nan_zero: bool) -> Tensor:
    """Overlaps [..., N, M] of all pairs of boxes1 [..., N, 4] and boxes2 [..., M, 4]."""
    return overlaps(corners(boxes1, rule).unsqueeze(-1), corners(boxes2, rule).unsqueeze(-2), rule, nan_zero)


def image_of_row(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image index, position inside that image, and whether there is such an image, each [rows]; never out of range."""
    bounds = offsets.clamp(0, rows).cummax(0).values
    row = torch.arange(rows, device=offsets.device)
    image = torch.searchsorted(bounds, row, right=True) - 1
    owned = (image >= 0) & (image < bounds.shape[0] - 1)
    image = image.clamp(0, max(bounds.shape[0] - 2, 0))
    return image, row - bounds[image], owned


def ragged_pairwise(
    boxes1: Tensor, offsets1: Tensor, boxes2: Tensor, offsets2: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs of all images [ΣN, ΣM], which of them lie in one image, and each box's position inside its image."""
    image1, local1, owned1 = image_of_row(offsets1, boxes1.shape[0])
    image2, local2, owned2 = image_of_row(offsets2, boxes2.shape[0])
    same = (image1[:, None] == image2[None, :]) & owned1[:, None] & owned2[None, :]
    return pairwise(boxes1, boxes2, rule, nan_zero=False), same, local1, local2


def batched_pairwise(
    boxes1: Tensor, boxes2: Tensor, offsets1: Tensor | None, offsets2: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Dense or ragged pairs: overlaps, which of them belong to one image, and (ragged only) each box's position inside its image."""
    if offsets1 is None or offsets2 is None:
        matrix = pairwise(boxes1, boxes2, rule, nan_zero=False)
        return matrix, torch.ones_like(matrix, dtype=torch.bool), None, None
    return ragged_pairwise(boxes1, offsets1, boxes2, offsets2, rule)
