"""Overlap of a pair of boxes and its gradient, shared by the kernels of the box-IoU family.

The arithmetic and its order are those of the reference in `ssod_fast.ops`; launched with :data:`NO_FMA` no product is contracted
into a sum, and every quotient is an IEEE division, so values agree to the last bit with the reference on the same numbers. CIoU's
angles come from torch, once per box: Triton has no arctangent that its interpreter could run.

A box travels as a tuple of planes (x1, y1, x2, y2, w, h, area, angle) of one shape; pairs are formed by broadcasting.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._boxes import CIOU, Rule
from ..ops._overlaps import corners, image_of_row
from ._common import true_div

NO_FMA = {"enable_fp_fusion": False}  # launch option

IOF_: tl.constexpr = tl.constexpr(1)
GIOU_: tl.constexpr = tl.constexpr(2)
DIOU_: tl.constexpr = tl.constexpr(3)
CIOU_: tl.constexpr = tl.constexpr(4)
XYXY_: tl.constexpr = tl.constexpr(0)
XYWH_: tl.constexpr = tl.constexpr(1)
ZERO_: tl.constexpr = tl.constexpr(0)
NONE_: tl.constexpr = tl.constexpr(1)
MAX_: tl.constexpr = tl.constexpr(2)
ADD_: tl.constexpr = tl.constexpr(3)
CIOU_SCALE: tl.constexpr = tl.constexpr(4 / math.pi**2)
INFINITY: tl.constexpr = tl.constexpr(math.inf)


def angles(boxes: Tensor, rule: Rule) -> Tensor:
    """atan(w / h) of each box [...], contiguous, for CIoU; in the other modes, which never read it, the boxes themselves."""
    return corners(boxes, rule).angle.contiguous() if rule.mode == CIOU else boxes


def batched(boxes: Tensor) -> Tensor:
    """Boxes [..., N, 4] as [B, N, 4], without a copy where the strides allow."""
    return boxes.reshape(math.prod(boxes.shape[:-2]), *boxes.shape[-2:])


def two_dims(leading: int, *tensors: Tensor) -> tuple[list[Tensor], int]:
    """Views of the tensors whose first `leading` dimensions are merged to two, and the size of the second.

    All of them share those dimensions. Where their strides do not allow the merge (three different broadcasts, say) they are copied to one.
    """
    shape = tensors[0].shape[:leading]
    for split in range(leading - 1, -1, -1):
        outer, inner = shape[:split].numel(), shape[split:].numel()
        try:
            return [t.view(outer, inner, *t.shape[leading:]) for t in tensors], inner
        except RuntimeError:  # these strides do not merge
            continue
    return [t.reshape(1, shape.numel(), *t.shape[leading:]) for t in tensors], shape.numel()


def column_ranges(offsets1: Tensor, offsets2: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """First and last + 1 of the second set's boxes that each box of the first is paired with, int64 [rows] each; never out of range."""
    image, _, owned = image_of_row(offsets1, rows)
    bounds = offsets2.clamp(0, columns).cummax(0).values
    begin, end = bounds[image], bounds[(image + 1).clamp(max=bounds.shape[0] - 1)]
    return begin.where(owned, 0), end.where(owned, 0)


def gradient_like(boxes: Tensor, needed: bool) -> Tensor:
    """Memory for the gradient of `boxes`, contiguous; an empty tensor where it is not needed."""
    return torch.empty(boxes.shape if needed else (0,), dtype=boxes.dtype, device=boxes.device)


@triton.jit
def planes(a, b, c, d, FMT: tl.constexpr, EPS_MODE: tl.constexpr):
    """Corners, sides and area of boxes given as four numbers. One that is not finite gets area NaN and corners 0."""
    finite = (tl.abs(a) < INFINITY) & (tl.abs(b) < INFINITY) & (tl.abs(c) < INFINITY) & (tl.abs(d) < INFINITY)
    a, b, c, d = tl.where(finite, a, 0.0), tl.where(finite, b, 0.0), tl.where(finite, c, 0.0), tl.where(finite, d, 0.0)
    if FMT == XYXY_:
        x1, y1, x2, y2 = a, b, c, d
    elif FMT == XYWH_:
        x1, y1, x2, y2 = a, b, a + c, b + d
    else:
        x1, y1, x2, y2 = a - c * 0.5, b - d * 0.5, a + c * 0.5, b + d * 0.5
    w, h = x2 - x1, y2 - y1
    if EPS_MODE == ZERO_:
        w, h = tl.maximum(w, 0.0), tl.maximum(h, 0.0)
    area = tl.where(finite, w * h, float("nan"))
    return x1, y1, x2, y2, w, h, area


@triton.jit
def load_box(p_boxes, p_angle, i_box, i_angle, mask, FMT: tl.constexpr, EPS_MODE: tl.constexpr, MODE: tl.constexpr):
    """Loads boxes that start at element `i_box` and converts them to planes, see :func:`planes`."""
    a = tl.load(p_boxes + i_box, mask=mask, other=0.0)
    b = tl.load(p_boxes + i_box + 1, mask=mask, other=0.0)
    c = tl.load(p_boxes + i_box + 2, mask=mask, other=0.0)
    d = tl.load(p_boxes + i_box + 3, mask=mask, other=0.0)
    x1, y1, x2, y2, w, h, area = planes(a, b, c, d, FMT, EPS_MODE)
    if MODE == CIOU_:
        angle = tl.load(p_angle + i_angle, mask=mask, other=0.0)
    else:
        angle = area
    return x1, y1, x2, y2, w, h, area, angle


@triton.jit
def floored(x, EPS_MODE: tl.constexpr, EPS: tl.constexpr):
    """max(x, eps) under eps mode "max", else x; NaN stays."""
    if EPS_MODE == MAX_:
        x = tl.where(x < EPS, EPS, x)
    return x


@triton.jit
def guarded(num, den, ADD: tl.constexpr, EPS_MODE: tl.constexpr):
    """num / (den + ADD), and 0 where den <= 0 under eps mode "zero"; the factor of its gradient; the denominator that was used."""
    if EPS_MODE == ZERO_:
        guard = den <= 0  # false for NaN, which stays NaN
        den = tl.where(guard, 1.0, den)
        value = tl.where(guard, 0.0, true_div(num, den))
        live = tl.where(guard, 0.0, 1.0)
    else:
        den = den + ADD
        value = true_div(num, den)
        live = 1.0
    return value, live, den


@triton.jit
def half_tie(smaller, larger):
    """Share of the gradient that a minimum (maximum) hands to `smaller` (`larger`): 1, one half in a tie, or 0."""
    return tl.where(smaller < larger, 1.0, tl.where(smaller == larger, 0.5, 0.0))


@triton.jit
def passes_floor(raw, EPS_MODE: tl.constexpr, EPS: tl.constexpr):
    """Gradient share of max(raw, eps), a tie split in half."""
    if EPS_MODE == MAX_:
        share = half_tie(EPS, raw)
    else:
        share = 1.0
    return share


@triton.jit
def passes_clamp(x):
    """Gradient share of max(x, 0): 1 where x >= 0. A factor and no selection, so that NaN gradients stay NaN."""
    return tl.where(x >= 0, 1.0, 0.0)


@triton.jit
def sides(a, b):
    """Sides of the intersection and of the enclosing box, before they are clamped at 0."""
    iw = tl.minimum(a[2], b[2]) - tl.maximum(a[0], b[0])
    ih = tl.minimum(a[3], b[3]) - tl.maximum(a[1], b[1])
    ew = tl.maximum(a[2], b[2]) - tl.minimum(a[0], b[0])
    eh = tl.maximum(a[3], b[3]) - tl.minimum(a[1], b[1])
    return iw, ih, ew, eh


@triton.jit
def areas(a, b, iw, ih, MODE: tl.constexpr):
    """Intersection and union; the union of IoF is the area of `a`, NaN if `b` is not finite."""
    a_area, b_area = a[6], b[6]
    inter = tl.maximum(iw, 0.0) * tl.maximum(ih, 0.0)
    if MODE == IOF_:
        union = a_area + (b_area - b_area)
    else:
        union = (a_area + b_area) - inter
    return inter, union


@triton.jit
def distance(a, b, ew, eh):
    """Differences of the doubled centres, the squared distance of the centres, and the squared diagonal of the enclosing box."""
    dx = (a[0] + a[2]) - (b[0] + b[2])
    dy = (a[1] + a[3]) - (b[1] + b[3])
    rho = (dx * dx + dy * dy) * 0.25
    ew, eh = tl.maximum(ew, 0.0), tl.maximum(eh, 0.0)
    return dx, dy, rho, ew * ew + eh * eh


@triton.jit
def aspect(a, b, iou, EPS_MODE: tl.constexpr, EPS: tl.constexpr):
    """Difference of the angles, v and its weight alpha of CIoU (Zheng et al. 2020, equations 9 to 11)."""
    OTHER: tl.constexpr = EPS if EPS_MODE == NONE_ or EPS_MODE == ADD_ else 0.0
    turn = b[7] - a[7]
    v = CIOU_SCALE * (turn * turn)
    if EPS_MODE == ZERO_:
        zero = v == 0
        alpha = tl.where(zero, 0.0, true_div(v, tl.where(zero, 1.0, (1.0 - iou) + v)))
    else:
        alpha = true_div(v, floored(1.0 - iou + v, EPS_MODE, EPS) + OTHER)
    return turn, v, alpha


@triton.jit
def overlap(a, b, MODE: tl.constexpr, EPS_MODE: tl.constexpr, EPS: tl.constexpr):
    """Overlap of broadcast pairs."""
    AREA: tl.constexpr = EPS if EPS_MODE == ADD_ else 0.0
    OTHER: tl.constexpr = EPS if EPS_MODE == NONE_ or EPS_MODE == ADD_ else 0.0
    iw, ih, ew, eh = sides(a, b)
    inter, union = areas(a, b, iw, ih, MODE)
    union = floored(union, EPS_MODE, EPS)
    value, _, _ = guarded(inter, union, AREA, EPS_MODE)
    if MODE == GIOU_:
        enclosing = floored(tl.maximum(ew, 0.0) * tl.maximum(eh, 0.0), EPS_MODE, EPS)
        gap, _, _ = guarded(enclosing - union, enclosing, AREA, EPS_MODE)
        value = value - gap
    if MODE == DIOU_ or MODE == CIOU_:
        iou = value
        _, _, rho, diagonal = distance(a, b, ew, eh)
        apart, _, _ = guarded(rho, floored(diagonal, EPS_MODE, EPS), OTHER, EPS_MODE)
        value = iou - apart
        if MODE == CIOU_:
            _, v, alpha = aspect(a, b, iou, EPS_MODE, EPS)
            value = value - alpha * v
    return value


@triton.jit
def side_gradients(box, d_area, d_angle, MODE: tl.constexpr, EPS_MODE: tl.constexpr):
    """Gradients of a box's own width and height, through its area and its angle."""
    w, h = box[4], box[5]
    d_w, d_h = d_area * h, d_area * w
    if MODE == CIOU_:
        square = w * w + h * h
        some = square > 0
        scale = tl.where(some, true_div(d_angle, tl.where(some, square, 1.0)), 0.0)
        d_w, d_h = d_w + scale * h, d_h - scale * w
    if EPS_MODE == ZERO_:
        d_w, d_h = d_w * passes_clamp(box[2] - box[0]), d_h * passes_clamp(box[3] - box[1])
    return d_w, d_h


@triton.jit
def axis_gradients(a1, a2, b1, b2, d_inner, d_outer):
    """Gradients of the ends (a1, a2, b1, b2) along one axis, from those of the intersection's and the enclosing box's side."""
    low_a, low_b = half_tie(b1, a1), half_tie(a1, b1)
    high_a, high_b = half_tie(a2, b2), half_tie(b2, a2)
    return (
        -d_inner * low_a - d_outer * low_b,
        d_inner * high_a + d_outer * high_b,
        -d_inner * low_b - d_outer * low_a,
        d_inner * high_b + d_outer * high_a,
    )


@triton.jit
def partials(a, b, grad, MODE: tl.constexpr, EPS_MODE: tl.constexpr, EPS: tl.constexpr):
    """Gradients of intersection, union, enclosing sides (w, h), doubled centre differences (x, y) and angle difference, times `grad`."""
    AREA: tl.constexpr = EPS if EPS_MODE == ADD_ else 0.0
    OTHER: tl.constexpr = EPS if EPS_MODE == NONE_ or EPS_MODE == ADD_ else 0.0
    iw, ih, ew, eh = sides(a, b)
    inter, raw_union = areas(a, b, iw, ih, MODE)
    union = floored(raw_union, EPS_MODE, EPS)
    iou, live, den = guarded(inter, union, AREA, EPS_MODE)
    d_inter = true_div(grad * live, den)
    d_union = true_div(-grad * live * iou, den)  # not inter / den**2: equal boxes then cancel to exactly 0
    none = tl.zeros_like(d_inter)
    d_ew, d_eh, d_dx, d_dy, d_turn = none, none, none, none, none
    if MODE == GIOU_:
        raw = tl.maximum(ew, 0.0) * tl.maximum(eh, 0.0)
        enclosing = floored(raw, EPS_MODE, EPS)
        _, live, den = guarded(enclosing - union, enclosing, AREA, EPS_MODE)
        rest = true_div(enclosing - union, den * den) - true_div(tl.full(den.shape, 1.0, den.dtype), den)
        d_enclosing = grad * live * rest * passes_floor(raw, EPS_MODE, EPS)
        d_union += true_div(grad * live, den)
        d_ew, d_eh = d_enclosing * tl.maximum(eh, 0.0) * passes_clamp(ew), d_enclosing * tl.maximum(ew, 0.0) * passes_clamp(eh)
    if MODE == DIOU_ or MODE == CIOU_:
        dx, dy, rho, diagonal = distance(a, b, ew, eh)
        _, live, den = guarded(rho, floored(diagonal, EPS_MODE, EPS), OTHER, EPS_MODE)
        d_diagonal = true_div(grad * live * rho, den * den) * passes_floor(diagonal, EPS_MODE, EPS)
        d_rho = true_div(-grad * live, den)
        d_ew, d_eh = d_diagonal * (2.0 * tl.maximum(ew, 0.0)), d_diagonal * (2.0 * tl.maximum(eh, 0.0))
        d_dx, d_dy = d_rho * dx * 0.5, d_rho * dy * 0.5
        if MODE == CIOU_:
            turn, _, alpha = aspect(a, b, iou, EPS_MODE, EPS)
            d_turn = grad * -alpha * (2 * CIOU_SCALE) * turn
    d_union *= passes_floor(raw_union, EPS_MODE, EPS)
    return d_inter, d_union, d_ew, d_eh, d_dx, d_dy, d_turn


@triton.jit
def overlap_gradients(a, b, grad, MODE: tl.constexpr, EPS_MODE: tl.constexpr, EPS: tl.constexpr, NAN_ZERO: tl.constexpr):
    """Gradients of the corners (x1, y1, x2, y2) of `a`, then of `b`, for broadcast pairs; ties and clamps as in torch's autograd."""
    if NAN_ZERO:
        value = overlap(a, b, MODE, EPS_MODE, EPS)
        silent = value != value
    d_inter, d_union, d_ew, d_eh, d_dx, d_dy, d_turn = partials(a, b, grad, MODE, EPS_MODE, EPS)
    if NAN_ZERO:
        d_inter, d_union = tl.where(silent, 0.0, d_inter), tl.where(silent, 0.0, d_union)
        d_ew, d_eh = tl.where(silent, 0.0, d_ew), tl.where(silent, 0.0, d_eh)
        d_dx, d_dy, d_turn = tl.where(silent, 0.0, d_dx), tl.where(silent, 0.0, d_dy), tl.where(silent, 0.0, d_turn)
    iw, ih, _, _ = sides(a, b)
    d_b_area = d_union
    if MODE == IOF_:
        d_b_area = tl.zeros_like(d_union)
    else:
        d_inter -= d_union
    d_iw = d_inter * tl.maximum(ih, 0.0) * passes_clamp(iw)
    d_ih = d_inter * tl.maximum(iw, 0.0) * passes_clamp(ih)
    ax1, ax2, bx1, bx2 = axis_gradients(a[0], a[2], b[0], b[2], d_iw, d_ew)
    ay1, ay2, by1, by2 = axis_gradients(a[1], a[3], b[1], b[3], d_ih, d_eh)
    aw, ah = side_gradients(a, d_union, -d_turn, MODE, EPS_MODE)
    bw, bh = side_gradients(b, d_b_area, d_turn, MODE, EPS_MODE)
    return (
        ax1 - aw + d_dx,
        ay1 - ah + d_dy,
        ax2 + aw + d_dx,
        ay2 + ah + d_dy,
        bx1 - bw - d_dx,
        by1 - bh - d_dy,
        bx2 + bw - d_dx,
        by2 + bh - d_dy,
    )


@triton.jit
def store_gradient(p_grad, i_box, dx1, dy1, dx2, dy2, mask, FMT: tl.constexpr):
    """Stores gradients of corners as those of the four numbers of the format."""
    if FMT == XYXY_:
        a, b, c, d = dx1, dy1, dx2, dy2
    elif FMT == XYWH_:
        a, b, c, d = dx1 + dx2, dy1 + dy2, dx2, dy2
    else:
        a, b, c, d = dx1 + dx2, dy1 + dy2, (dx2 - dx1) * 0.5, (dy2 - dy1) * 0.5
    tl.store(p_grad + i_box, a, mask=mask)
    tl.store(p_grad + i_box + 1, b, mask=mask)
    tl.store(p_grad + i_box + 2, c, mask=mask)
    tl.store(p_grad + i_box + 3, d, mask=mask)
