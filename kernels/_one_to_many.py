"""What a pair of a query and a target is worth under each rule of one-to-many assignment, and keys that rank such values.

The formulas and their order are those of :mod:`ssod_fast.ops._one_to_many`. Everything is float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..ops import _one_to_many as ops
from ..ops._boxes import ADD, CIOU, IOU, MAX, XYXY
from ._boxes import INFINITY, load_box, overlap, planes
from ._common import at_least, log1p, true_div

IOU_, CIOU_, MAX_, ADD_, XYXY_ = (tl.constexpr(value) for value in (IOU, CIOU, MAX, ADD, XYXY))
TAL_, TAL_ANY_, SIMOTA_, SOFT_LABEL_, ATSS_ = (tl.constexpr(value) for value in ops.RULES.values())
IOU_EPS, CIOU_EPS = tl.constexpr(ops._IOU.eps), tl.constexpr(ops._CIOU.eps)
INSIDE_MARGIN, POINT_MARGIN = tl.constexpr(ops.INSIDE_MARGIN), tl.constexpr(ops.POINT_MARGIN)
CENTER_RADIUS, SOFT_CENTER = tl.constexpr(ops.CENTER_RADIUS), tl.constexpr(ops.SOFT_CENTER)
IOU_WEIGHT, OFF_CENTER, MIN_LOG = tl.constexpr(ops.IOU_WEIGHT), tl.constexpr(ops.OFF_CENTER), tl.constexpr(ops.MIN_LOG)
LOG2_10 = tl.constexpr(math.log2(10))
NO_KEY, MAX_KEY = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)
LOW_BITS = tl.constexpr(2**31 - 1)


class Problem(NamedTuple):
    """What the kernels read of the input."""

    scores: Tensor  # [L, B, Q, C]
    boxes: Tensor  # [L, B, Q, 4], in the frame of the targets
    angles: Tensor  # [L, B, Q] contiguous, read for CIoU only, as the targets' angles
    priors: Tensor  # [Q, width] contiguous
    sums: Tensor  # [L, B, Q] contiguous: the share of a cost that is the same for all targets
    reached: Tensor  # bool [B, Q] contiguous: the priors that take part where a cost rules
    labels: Tensor  # int64 [G]
    targets: Tensor  # [G, 4] xyxy, contiguous
    target_angles: Tensor  # [G]
    image: Tensor  # int64 [G], -1 for a row that takes no part
    score_layer: int  # strides
    score_image: int
    score_query: int
    score_class: int
    box_layer: int
    box_image: int
    box_query: int
    queries: int
    batch: int


class Rule(NamedTuple):
    """What the kernels are compiled for."""

    rule: int
    from_logits: bool
    fmt: int
    alpha: float
    beta: float
    eps: float
    min_side: float
    prior_width: int  # 0: there are none


@triton.jit
def softplus(x):
    """ln(1 + e^x)."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return true_div(tl.full(x.shape, 1.0, x.dtype), 1.0 + tl.exp(-x))


@triton.jit
def probability(x, o: tl.constexpr):
    """Of scores that are logits, or probabilities, which are clamped to 0..1; NaN stays."""
    if o.from_logits:
        p = sigmoid(x)
    else:
        p = tl.where(x < 0, 0.0, x)
        p = tl.where(p > 1, 1.0, p)
    return p


@triton.jit
def background(x, o: tl.constexpr):
    """What a class that is not the target's adds to a cost: the share that is summed per query; for simota ln(1 - p), negative."""
    if o.rule == SOFT_LABEL_:
        p = sigmoid(x)
        value = softplus(x) * (p * p)
    elif o.from_logits:
        value = at_least(-softplus(x), MIN_LOG)
    else:
        value = at_least(log1p(-probability(x, o)), MIN_LOG)
    return value


@triton.jit
def power(x, EXPONENT: tl.constexpr):
    """x ** EXPONENT for x >= 0, whole exponents by squaring and .5 as a root, as the reference does it."""
    if EXPONENT == 0.5:
        result = tl.sqrt_rn(x)
    elif EXPONENT % 1 == 0 and EXPONENT <= 64:
        result = tl.full(x.shape, 1.0, x.dtype)
        for bit in tl.static_range(7):
            if (EXPONENT // 2**bit) % 2 == 1:
                result = result * x
            x = x * x
    else:
        result = tl.exp(EXPONENT * tl.log(x))  # 0 at 0
    return result


@triton.jit
def load_target(p, o: tl.constexpr, i_row):
    """A target: its image (-1: it takes no part), its label, its corners as they are and its planes for overlaps."""
    x1, y1 = tl.load(p.targets + i_row * 4), tl.load(p.targets + i_row * 4 + 1)
    x2, y2 = tl.load(p.targets + i_row * 4 + 2), tl.load(p.targets + i_row * 4 + 3)
    a, b, c, d, w, h, area = planes(x1, y1, x2, y2, XYXY_, MAX_)
    angle = area
    if o.rule == TAL_ANY_:
        angle = tl.load(p.target_angles + i_row)
    return tl.load(p.image + i_row), tl.load(p.labels + i_row), (x1, y1, x2, y2), (a, b, c, d, w, h, area, angle)


@triton.jit
def load_queries(p, o: tl.constexpr, i_layer, i_image, i_query, mask):
    """Planes of the queries' boxes."""
    i_box = i_layer * p.box_layer + i_image * p.box_image + i_query * p.box_query
    i_angle = (i_layer * p.batch + i_image) * p.queries + i_query
    MODE: tl.constexpr = CIOU_ if o.rule == TAL_ANY_ else IOU_
    return load_box(p.boxes, p.angles, i_box, i_angle, mask, o.fmt, MAX_, MODE)


@triton.jit
def load_points(p, o: tl.constexpr, boxes, i_query, mask):
    """Centres of the priors, or of the boxes where there are none; NaN for a box that is not finite."""
    if o.prior_width > 0:
        x = tl.load(p.priors + i_query * o.prior_width, mask=mask, other=0.0)
        y = tl.load(p.priors + i_query * o.prior_width + 1, mask=mask, other=0.0)
    else:
        finite = boxes[6] == boxes[6]
        x = tl.where(finite, (boxes[0] + boxes[2]) * 0.5, float("nan"))
        y = tl.where(finite, (boxes[1] + boxes[3]) * 0.5, float("nan"))
    return x, y


@triton.jit
def inside(x, y, corners, MARGIN: tl.constexpr):
    """Whether points lie in a box by more than MARGIN."""
    x1, y1, x2, y2 = corners
    return (x - x1 > MARGIN) & (y - y1 > MARGIN) & (x2 - x > MARGIN) & (y2 - y > MARGIN)


@triton.jit
def _grown(low, high, MIN_SIDE: tl.constexpr):
    """Both ends of a side, which is enlarged to MIN_SIDE about its centre if it is smaller."""
    small, center = high - low < MIN_SIDE, (low + high) * 0.5
    return tl.where(small, center - MIN_SIDE / 2, low), tl.where(small, center + MIN_SIDE / 2, high)


@triton.jit
def _central(p, x, y, i_query, mask, corners):
    """Whether points (x, y) lie in the central region of a box."""
    x1, y1, x2, y2 = corners
    reach_x = tl.load(p.priors + i_query * 4 + 2, mask=mask, other=0.0) * CENTER_RADIUS
    reach_y = tl.load(p.priors + i_query * 4 + 3, mask=mask, other=0.0) * CENTER_RADIUS
    dx, dy = x - (x1 + x2) * 0.5, y - (y1 + y2) * 0.5
    return (reach_x + dx > 0) & (reach_y + dy > 0) & (reach_x - dx > 0) & (reach_y - dy > 0)


@triton.jit
def reaches(p, o: tl.constexpr, i_query, mask, corners):
    """Whether priors take part in the cost of a rule because of this target, and whether it costs nothing extra where they lie."""
    x = tl.load(p.priors + i_query * 4, mask=mask, other=0.0)
    y = tl.load(p.priors + i_query * 4 + 1, mask=mask, other=0.0)
    within = inside(x, y, corners, 0.0)
    both, either = within, within
    if o.rule == SIMOTA_:
        central = _central(p, x, y, i_query, mask, corners)
        both, either = within & central, within | central
    return either & mask, both & mask


@triton.jit
def _simota_cost(p, o: tl.constexpr, x, total, iou, corners, i_query, mask):
    """Binary cross-entropy over all classes - 3 ln u + 1e5 off the centre."""
    if o.from_logits:
        log_p = at_least(-softplus(-x), MIN_LOG)
    else:
        log_p = at_least(tl.log(probability(x, o)), MIN_LOG)
    classes = -(total - background(x, o) + log_p)
    _, central = reaches(p, o, i_query, mask, corners)
    return classes + tl.log(iou + o.eps) * -IOU_WEIGHT + tl.where(central, 0.0, OFF_CENTER)


@triton.jit
def _soft_label_cost(p, o: tl.constexpr, x, total, iou, corners, i_query, mask):
    """Quality focal loss against the soft label u - 3 ln u + 10^(distance in strides - 3)."""
    x1, y1, x2, y2 = corners
    miss = iou - sigmoid(x)
    classes = total - background(x, o) + (softplus(x) - x * iou) * (miss * miss)
    dx = tl.load(p.priors + i_query * 4, mask=mask, other=0.0) - (x1 + x2) * 0.5
    dy = tl.load(p.priors + i_query * 4 + 1, mask=mask, other=0.0) - (y1 + y2) * 0.5
    stride = tl.load(p.priors + i_query * 4 + 2, mask=mask, other=1.0)
    distance = true_div(tl.sqrt_rn(dx * dx + dy * dy), stride)
    return classes + tl.log(iou + o.eps) * -IOU_WEIGHT + tl.exp2((distance - SOFT_CENTER) * LOG2_10)


@triton.jit
def pair_values(p, o: tl.constexpr, target, i_layer, i_query, mask):
    """Of one target with queries of its image: the overlap (NaN for boxes that are not finite), the rule's metric, what the rule maximises
    (-inf: impossible), and whether the prior is where the rule wants it.
    """
    i_image, label, corners, b = target
    a = load_queries(p, o, i_layer, i_image, i_query, mask)
    if o.rule == TAL_ANY_:
        iou = overlap(b, a, CIOU_, ADD_, CIOU_EPS)
    else:
        iou = overlap(b, a, IOU_, MAX_, IOU_EPS)
    iou = tl.where(iou < 0, 0.0, iou)  # NaN stays: such pairs are impossible
    near, metric, merit = mask, iou, iou
    if o.rule != ATSS_:
        i_score = i_layer * p.score_layer + i_image * p.score_image + i_query * p.score_query + label * p.score_class
        x = tl.load(p.scores + i_score, mask=mask, other=0.5)
    if o.rule == SIMOTA_ or o.rule == SOFT_LABEL_:
        total = tl.load(p.sums + (i_layer * p.batch + i_image) * p.queries + i_query, mask=mask, other=0.0)
        near = tl.load(p.reached + i_image * p.queries + i_query, mask=mask, other=0) != 0
        if o.rule == SIMOTA_:
            metric = _simota_cost(p, o, x, total, iou, corners, i_query, mask)
        else:
            metric = _soft_label_cost(p, o, x, total, iou, corners, i_query, mask)
        merit = tl.where(tl.abs(metric) < INFINITY, -metric, -INFINITY)
    elif o.rule == ATSS_:
        merit = tl.where(iou > 0, iou, -INFINITY)
    else:
        metric = power(probability(x, o), o.alpha) * power(iou, o.beta)
        merit = tl.where((iou > 0) & (metric >= 0), metric, -INFINITY)
    if o.rule == TAL_ANY_:
        px, py = load_points(p, o, a, i_query, mask)
        x1, x2 = _grown(corners[0], corners[2], o.min_side)
        y1, y2 = _grown(corners[1], corners[3], o.min_side)
        near = mask & inside(px, py, (x1, y1, x2, y2), POINT_MARGIN)
    return iou, metric, tl.where(near, merit, -INFINITY), near


@triton.jit
def make_keys(value, index, keep):
    """int64 keys that order by value, then by falling index, so that of equal values the lowest index is the largest key."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)  # -0 counts as 0
    order = tl.where(bits < 0, bits ^ LOW_BITS, bits).to(tl.int64)
    return tl.where(keep, (order << 32) | (index ^ LOW_BITS).to(tl.int64), NO_KEY)


@triton.jit
def index_of(keys):
    """The index in a key, -1 in no key."""
    return tl.where(keys == NO_KEY, -1, (keys & LOW_BITS) ^ LOW_BITS).to(tl.int32)


@triton.jit
def value_of(keys):
    """The value in a key."""
    order = (keys >> 32).to(tl.int32)
    return tl.where(order < 0, order ^ LOW_BITS, order).to(tl.float32, bitcast=True)


@triton.jit
def top_keys(best, keys, topk, SLOTS: tl.constexpr):
    """The `topk` <= SLOTS largest of two sets of keys, from the largest down; `best` is such a set already."""
    i_slot = tl.arange(0, SLOTS)
    if tl.max(keys) > tl.min(tl.where(i_slot < topk, best, MAX_KEY)):
        merged = tl.full((SLOTS,), NO_KEY, tl.int64)
        previous = tl.full((), MAX_KEY, tl.int64)
        j = 0
        while j < topk:
            ours, theirs = tl.where(best < previous, best, NO_KEY), tl.where(keys < previous, keys, NO_KEY)
            previous = tl.maximum(tl.max(ours), tl.max(theirs))
            merged = tl.where(i_slot == j, previous, merged)
            j = tl.where(previous == NO_KEY, topk, j + 1)
        best = merged
    return best
