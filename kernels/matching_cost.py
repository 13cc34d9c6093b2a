"""Cost of matching every target with every query of its image. For GPUs without the CUDA kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._boxes import GIOU, Rule
from ..ops.matching_cost import FOCAL, FOCAL_LOGITS, NO_CLASS, SOFTMAX, UNKNOWN_KEY
from ._boxes import NO_FMA, load_box, overlap
from ._common import log1p, on_device, true_div
from ._rows import image_of_row, row_bounds

INFINITY: tl.constexpr = tl.constexpr(float("inf"))
FOCAL_: tl.constexpr = tl.constexpr(FOCAL)
FOCAL_LOGITS_: tl.constexpr = tl.constexpr(FOCAL_LOGITS)
SOFTMAX_: tl.constexpr = tl.constexpr(SOFTMAX)
NO_CLASS_: tl.constexpr = tl.constexpr(NO_CLASS)
UNKNOWN_KEY_: tl.constexpr = tl.constexpr(UNKNOWN_KEY)
IMAGES: tl.constexpr = tl.constexpr(64)  # bounds that one step of the search for a row's image reads
MIN_BLOCK, MAX_BLOCK = 16, 512
SIZES = ["rows", "queries", "classes", "batch"]  # no variant per value
STRIDES = ["stride_logit_layer", "stride_logit_image", "stride_logit_query", "stride_box_layer", "stride_box_image", "stride_box_query"]


@triton.jit
def _power(x, GAMMA: tl.constexpr):
    if GAMMA == 2:
        result = x * x
    elif GAMMA == 1:
        result = x
    elif GAMMA == 0:
        result = tl.full(x.shape, 1.0, x.dtype)
    else:
        result = tl.exp(GAMMA * tl.log(x))  # 0 at 0
    return result


@triton.jit
def _focal(x, MODE: tl.constexpr, ALPHA: tl.constexpr, GAMMA: tl.constexpr, EPS: tl.constexpr):
    """Focal cost of logits: the positive minus the negative part of the focal loss."""
    e = tl.exp(-tl.abs(x))
    small = true_div(e, 1.0 + e)
    large = 1.0 - small
    p, q = tl.where(x >= 0, large, small), tl.where(x >= 0, 1.0 - large, large)
    if MODE == FOCAL_:
        minus_log_p, minus_log_q = -tl.log(p + EPS), -tl.log(q + EPS)
    else:
        rest = log1p(e)
        minus_log_p, minus_log_q = tl.maximum(-x, 0.0) + rest, tl.maximum(x, 0.0) + rest
    return ALPHA * (_power(q, GAMMA) * minus_log_p) - (1 - ALPHA) * (_power(p, GAMMA) * minus_log_q)


@triton.jit
def _distance(p_box, i_box, p_target, mask, p_hw, SCALED: tl.constexpr):
    """Sum of the absolute differences of the four numbers of boxes and one target, divided by the size of the image under SCALED."""
    total = tl.zeros(i_box.shape, p_box.dtype.element_ty)
    for c in tl.static_range(4):
        ours, theirs = tl.load(p_box + i_box + c, mask=mask, other=0.0), tl.load(p_target + c)
        if SCALED:
            side = tl.load(p_hw + 1 - c % 2)
            ours, theirs = true_div(ours, side), true_div(theirs, side)
        total += tl.abs(ours - theirs)
    return total


@triton.jit
def _key(least, query):
    """Orders by the cost as float32, then by the query; -0 counts as 0."""
    bits = tl.where(least == 0, 0.0, least).to(tl.float32).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (order << 32) | query.to(tl.int64)


@triton.jit(do_not_specialize=SIZES + STRIDES)
def matching_cost_kernel(
    p_logits,  # [L, B, Q, C], contiguous in C
    p_total,  # [L, B, Q]: log of the sum of exponentials, read in mode softmax
    p_boxes,  # [L, B, Q, 4]
    p_labels,  # int64 [G]
    p_target_boxes,  # [G, 4]
    p_bounds,  # int64 [B + 1], read under RAGGED
    p_counts,  # int64 [B], read under COUNTED
    p_image_hw,  # [B, 2], read under SCALED
    p_extra,  # [L, G, Q], read under EXTRA
    p_cost,  # [L, G, Q]
    p_keys,  # int64 [L, G], written under KEYS
    rows,  # G
    queries,
    classes,
    batch,
    stride_logit_layer,
    stride_logit_image,
    stride_logit_query,
    stride_box_layer,
    stride_box_image,
    stride_box_query,
    CLASS_MODE: tl.constexpr,
    ALPHA: tl.constexpr,
    GAMMA: tl.constexpr,
    EPS: tl.constexpr,
    W_CLASS: tl.constexpr,
    W_BOX: tl.constexpr,
    W_GIOU: tl.constexpr,
    MODE: tl.constexpr,
    FMT: tl.constexpr,
    EPS_MODE: tl.constexpr,
    GIOU_EPS: tl.constexpr,
    RAGGED: tl.constexpr,
    COUNTED: tl.constexpr,
    SCALED: tl.constexpr,
    EXTRA: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program computes one row: a target against all queries of its image in one layer."""
    i_out = tl.program_id(0).to(tl.int64)
    i_row, i_layer = i_out % rows, i_out // rows
    i_image, owned = image_of_row(p_bounds, p_counts, i_row, rows, batch, RAGGED, COUNTED, IMAGES)
    p_target, p_hw = p_target_boxes + i_row * 4, p_image_hw + i_image * 2
    target = load_box(p_target_boxes, p_target_boxes, i_row * 4, i_row, owned, FMT, EPS_MODE, MODE)
    label = tl.load(p_labels + i_row)
    labelled = (label >= 0) & (label < classes)
    p_logits += i_layer * stride_logit_layer + i_image * stride_logit_image + tl.where(labelled, label, 0)
    p_boxes += i_layer * stride_box_layer + i_image * stride_box_image
    dtype = p_cost.dtype.element_ty
    least, where, invalid = tl.full((), INFINITY, dtype), tl.full((), 0, tl.int64), tl.full((), 0, tl.int32)
    start = tl.zeros_like(i_row)
    while start < queries:  # a range over a runtime bound does not run in the interpreter
        i_query = start + tl.arange(0, BLOCK)
        inside = i_query < queries
        i_box = i_query * stride_box_query
        cost = W_BOX * _distance(p_boxes, i_box, p_target, inside, p_hw, SCALED)
        if CLASS_MODE != NO_CLASS_:
            x = tl.load(p_logits + i_query * stride_logit_query, mask=inside & labelled, other=float("nan")).to(dtype)
            if CLASS_MODE == FOCAL_ or CLASS_MODE == FOCAL_LOGITS_:
                x = _focal(x, CLASS_MODE, ALPHA, GAMMA, EPS)
            elif CLASS_MODE == SOFTMAX_:
                i_total = (i_layer * batch + i_image) * queries + i_query
                x = -tl.exp(x - tl.load(p_total + i_total, mask=inside, other=0.0))
            else:
                x = -x
            cost = cost + W_CLASS * x
        box = load_box(p_boxes, p_boxes, i_box, i_box, inside, FMT, EPS_MODE, MODE)
        cost = cost - W_GIOU * overlap(box, target, MODE, EPS_MODE, GIOU_EPS)
        if EXTRA:
            cost = cost + tl.load(p_extra + i_out * queries + i_query, mask=inside, other=0.0)
        cost = tl.where(owned, cost, INFINITY)
        tl.store(p_cost + i_out * queries + i_query, cost, mask=inside)
        if KEYS:
            finite = inside & (tl.abs(cost) < INFINITY)
            low = tl.min(tl.where(finite, cost, INFINITY), 0)
            first = tl.min(tl.where(finite & (cost == low), i_query, queries), 0)
            where = tl.where(low < least, first, where)
            least = tl.minimum(least, low)
            invalid += tl.sum((inside & ~finite).to(tl.int32), 0)
        start += BLOCK
    if KEYS:
        tl.store(p_keys + i_out, tl.where(invalid == 0, _key(least, where), UNKNOWN_KEY_))


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    image_hw: Tensor | None,
    extra_cost: Tensor | None,
    batch: int,
    class_mode: int,
    alpha: float,
    gamma: float,
    eps: float,
    w_class: float,
    w_box: float,
    w_giou: float,
    fmt: int,
    eps_mode: int,
    giou_eps: float,
    row_min: bool,
) -> tuple[Tensor, Tensor]:
    """`ssod_fast::matching_cost`: cost [L, G, Q] and keys int64 [L, G], [0] without `row_min`."""
    dtype = torch.float64 if torch.float64 in (logits.dtype, boxes.dtype) else torch.float32
    (layers, _, queries, _), rows = boxes.shape, labels.shape[0]
    cost = torch.full((layers, rows, queries), float("inf"), dtype=dtype, device=boxes.device)
    keys = torch.full((layers, rows) if row_min else (0,), UNKNOWN_KEY, dtype=torch.int64, device=boxes.device)
    if cost.numel() == 0 or batch == 0:
        return cost, keys
    boxes, target_boxes = _contiguous_last(boxes.to(dtype)), target_boxes.to(dtype).contiguous()
    logits = _contiguous_last(logits)
    total = logits.to(dtype).logsumexp(-1) if class_mode == SOFTMAX else cost
    hw = cost if image_hw is None else image_hw.to(dtype).contiguous()
    extra = cost if extra_cost is None else extra_cost.to(dtype).contiguous()
    with on_device(cost):
        matching_cost_kernel[(layers * rows,)](
            *(logits, total, boxes, labels.contiguous(), target_boxes, *row_bounds(offsets, counts, rows, keys), hw, extra, cost, keys),
            *(rows, queries, logits.shape[-1], batch, *logits.stride()[:3], *boxes.stride()[:3]),
            *(class_mode, alpha, gamma, eps, w_class, w_box, w_giou, *Rule(GIOU, fmt, eps_mode, giou_eps)),
            *(offsets is not None, counts is not None, image_hw is not None, extra_cost is not None, row_min),
            min(max(triton.next_power_of_2(queries), MIN_BLOCK), MAX_BLOCK),
            **NO_FMA,
        )
    return cost, keys


def _contiguous_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
