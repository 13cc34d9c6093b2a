"""Several queries for each target. For GPUs without the CUDA kernels.

Targets choose first: a program per layer, target and level keeps its best queries as sorted 64-bit keys. Then they contend: for each
query the largest key (value, lowest target) wins by an atomic maximum, whose result does not depend on the order. The last kernel weighs
what each target ended up with. Values of pairs are computed again where they are needed, which costs less than a matrix of them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._boxes import Rule as OverlapRule
from ..ops._one_to_many import _CIOU, ANY_TARGET, ATSS, BY_METRIC, TAL_ANY, Options
from ..ops._overlaps import corners
from ..ops.one_to_many_assign import _owners
from ._boxes import INFINITY, NO_FMA
from ._common import cdiv, on_device, true_div
from ._one_to_many import (
    ATSS_,
    INSIDE_MARGIN,
    NO_KEY,
    SIMOTA_,
    SOFT_LABEL_,
    TAL_,
    TAL_ANY_,
    Problem,
    Rule,
    background,
    index_of,
    inside,
    load_points,
    load_queries,
    load_target,
    make_keys,
    pair_values,
    reaches,
    top_keys,
    value_of,
)

BLOCK = 512  # queries that a program looks at together
SUM_QUERIES, SUM_CLASSES = 16, 64

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def class_sums_kernel(p, classes, o: tl.constexpr, QUERIES: tl.constexpr, CLASSES: tl.constexpr):
    """Sums over all classes what a class adds to a cost that is not the target's: one program, QUERIES queries of one image."""
    blocks = tl.cdiv(p.queries, QUERIES)  # all along the first axis of the grid: the others end at 65535
    i_block, i_plane = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    i_layer, i_image = (i_plane // p.batch).to(tl.int64), (i_plane % p.batch).to(tl.int64)
    i_query = i_block * QUERIES + tl.arange(0, QUERIES)
    p_query = p.scores + i_layer * p.score_layer + i_image * p.score_image + i_query[:, None].to(tl.int64) * p.score_query
    total = tl.zeros((QUERIES,), tl.float32)
    start = 0
    while start < classes:
        i_class = start + tl.arange(0, CLASSES)[None, :]
        mask = (i_query < p.queries)[:, None] & (i_class < classes)
        x = tl.load(p_query + i_class.to(tl.int64) * p.score_class, mask=mask, other=0.5)
        total += tl.sum(tl.where(mask, background(x, o), 0.0), axis=1)
        start += CLASSES
    tl.store(p.sums + (i_layer * p.batch + i_image) * p.queries + i_query, total, mask=i_query < p.queries)


@triton.jit
def reached_kernel(p, p_begin, o: tl.constexpr, BLOCK: tl.constexpr):
    """Which priors take part in an image because of any of its targets."""
    blocks = tl.cdiv(p.queries, BLOCK)
    i_image = (tl.program_id(0) // blocks).to(tl.int64)
    i_query = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask = i_query < p.queries
    found = i_query < 0
    row, end = tl.load(p_begin + i_image), tl.load(p_begin + i_image + 1)
    while row < end:
        image, _, box, _ = load_target(p, o, row)
        mine = i_query < tl.where(image == i_image, p.queries, 0)
        either, _ = reaches(p, o, i_query, mine, box)
        found = found | either
        row += 1
    tl.store(p.reached + i_image * p.queries + i_query, found, mask=mask)


@triton.jit
def _nearness(p, o: tl.constexpr, target, i_layer, i_query, mask):
    """Minus the squared distance of the query's point from the target's centre; -inf where it is not finite."""
    i_image, _, box, _ = target
    x, y = load_points(p, o, load_queries(p, o, i_layer, i_image, i_query, mask), i_query, mask)
    dx, dy = x - (box[0] + box[2]) * 0.5, y - (box[1] + box[3]) * 0.5
    distance = dx * dx + dy * dy
    return tl.where(distance < INFINITY, -distance, -INFINITY)


@triton.jit
def _sum_of_values(keys, SLOTS: tl.constexpr):
    """Sum of the values of sorted keys from the first to the last, one by one: its rounding decides a number of queries."""
    i_slot, total = tl.arange(0, SLOTS), tl.zeros((), tl.float32)
    values = tl.where(keys == NO_KEY, 0.0, value_of(keys))
    j = 0
    while j < SLOTS:
        total += tl.sum(tl.where(i_slot == j, values, 0.0))
        j += 1
    return total


@triton.jit
def choose_kernel(
    p,
    p_chosen,  # int32 [L, G, levels * topk]
    start,  # queries of this level
    stop,
    column,  # first column of this level
    columns,
    topk,
    o: tl.constexpr,
    DYNAMIC: tl.constexpr,
    SLOTS: tl.constexpr,  # a power of two >= topk
    BLOCK: tl.constexpr,
):
    """One program writes the best queries of one target, from the best on; -1 where there are fewer."""
    i_row, i_layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    target = load_target(p, o, i_row)
    best = tl.full((SLOTS,), NO_KEY, tl.int64)
    widest = tl.full((SLOTS,), NO_KEY, tl.int64)  # the largest overlaps
    stop = tl.where(target[0] >= 0, stop, start)
    while start < stop:
        i_query = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask = i_query < stop
        if o.rule == ATSS_:
            merit = _nearness(p, o, target, i_layer, i_query, mask)
            keep = mask & (merit > -INFINITY)
        else:
            iou, _, merit, near = pair_values(p, o, target, i_layer, i_query, mask)
            keep = merit > -INFINITY
            if o.rule != SIMOTA_ and o.rule != SOFT_LABEL_:
                keep = merit > 0
            if DYNAMIC:
                widest = top_keys(widest, make_keys(iou, i_query, near & (iou > 0)), topk, SLOTS)
        best = top_keys(best, make_keys(merit, i_query, keep), topk, SLOTS)
        start += BLOCK
    i_slot = tl.arange(0, SLOTS)
    most = topk
    if DYNAMIC:
        most = tl.maximum(_sum_of_values(widest, SLOTS).to(tl.int32), 1)
    chosen = tl.where(i_slot < most, index_of(best), -1)
    tl.store(p_chosen + (i_layer * tl.num_programs(0) + i_row) * columns + column + i_slot, chosen, mask=i_slot < topk)


@triton.jit
def _stands_out(iou, mask):
    """Whether overlaps reach the mean plus the standard deviation of the masked ones."""
    iou = tl.where(iou > 0, iou, 0.0).to(tl.float64)
    count = tl.sum(mask.to(tl.float64))
    mean = tl.sum(tl.where(mask, iou, 0.0)) / count
    gap = tl.where(mask, iou - mean, 0.0)
    return mask & (iou >= mean + tl.sqrt(tl.sum(gap * gap) / (count - 1)))


@triton.jit
def claim_kernel(
    p,
    p_chosen,  # int32 [L, G, columns]
    p_winner,  # int64 [L, B, Q], keys of targets
    p_wanted,  # int32 [L, B, Q], how many targets want a query; counted under ANY
    columns,
    o: tl.constexpr,
    METRIC: tl.constexpr,
    ANY: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One program claims the chosen queries of one target that also pass the rest of the rule."""
    i_row, i_layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    target = load_target(p, o, i_row)
    i_slot = tl.arange(0, SLOTS)
    i_query = tl.load(p_chosen + (i_layer * tl.num_programs(0) + i_row) * columns + i_slot, mask=i_slot < columns, other=-1).to(tl.int64)
    claimed = i_query >= 0
    iou, _, merit, _ = pair_values(p, o, target, i_layer, i_query, claimed)
    if o.rule == ATSS_:
        stands_out = _stands_out(iou, claimed)
    if o.rule == ATSS_ or (o.rule == TAL_ and o.prior_width > 0):
        x, y = load_points(p, o, load_queries(p, o, i_layer, target[0], i_query, claimed), i_query, claimed)
        claimed = claimed & inside(x, y, target[2], INSIDE_MARGIN)
    if o.rule == ATSS_:
        claimed = claimed & stands_out & (iou >= 0)
    value = iou
    if METRIC:
        value = merit
    i_out = (i_layer * p.batch + target[0]) * p.queries + i_query
    tl.atomic_max(p_winner + i_out, make_keys(value, i_row, claimed), mask=claimed)
    if ANY:
        tl.atomic_add(p_wanted + i_out, 1, mask=claimed)


@triton.jit
def contest_kernel(p, p_winner, p_wanted, o: tl.constexpr, METRIC: tl.constexpr, BLOCK: tl.constexpr):
    """One program lets one target contend for the queries of a block that several targets want and that it may serve."""
    i_row, i_layer = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    target = load_target(p, o, i_row)
    i_query = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    i_out = (i_layer * p.batch + target[0]) * p.queries + i_query
    mask = i_query < tl.where(target[0] >= 0, p.queries, 0)
    mask = mask & (tl.load(p_wanted + i_out, mask=mask, other=0) > 1)
    iou, _, merit, _ = pair_values(p, o, target, i_layer, i_query, mask)
    mask = mask & (merit > -INFINITY)
    value = iou
    if METRIC:
        value = merit
    tl.atomic_max(p_winner + i_out, make_keys(value, i_row, mask), mask=mask)


@triton.jit
def trim_kernel(p, p_winner, topk, o: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """One program gives up all but the `topk` best queries of one target."""
    i_row, i_layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    target = load_target(p, o, i_row)
    p_own = p_winner + (i_layer * p.batch + target[0]) * p.queries
    stop = tl.where(target[0] >= 0, p.queries, 0)
    best = tl.full((SLOTS,), NO_KEY, tl.int64)
    start = 0
    while start < stop:
        i_query = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask = i_query < stop
        mine = index_of(tl.load(p_own + i_query, mask=mask, other=NO_KEY)) == i_row
        _, _, merit, _ = pair_values(p, o, target, i_layer, i_query, mask & mine)
        best = top_keys(best, make_keys(merit, i_query, mine & (merit > -INFINITY)), topk, SLOTS)
        start += BLOCK
    least = tl.min(tl.where(tl.arange(0, SLOTS) < topk, best, tl.max(best)))
    start = 0
    while start < stop:
        i_query = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask = i_query < stop
        mine = index_of(tl.load(p_own + i_query, mask=mask, other=NO_KEY)) == i_row
        _, _, merit, _ = pair_values(p, o, target, i_layer, i_query, mask & mine)
        kept = (merit > -INFINITY) & (make_keys(merit, i_query, mine) >= least)
        tl.store(p_own + i_query, tl.full((BLOCK,), NO_KEY, tl.int64), mask=mine & ~kept)
        start += BLOCK


@triton.jit
def rescue_kernel(p, p_winner, p_begin, o: tl.constexpr, BLOCK: tl.constexpr):
    """One program gives the targets of one image that have no query, from the first to the last, their best one that nobody has."""
    i_image, i_layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p_own = p_winner + (i_layer * p.batch + i_image) * p.queries
    row, end = tl.load(p_begin + i_image), tl.load(p_begin + i_image + 1)
    while row < end:
        target = load_target(p, o, row)
        stop = tl.where(target[0] == i_image, p.queries, 0)
        served, best = 0, tl.full((), NO_KEY, tl.int64)
        start = 0
        while start < stop:
            i_query = (start + tl.arange(0, BLOCK)).to(tl.int64)
            mask = i_query < stop
            owner = index_of(tl.load(p_own + i_query, mask=mask, other=0))
            _, _, merit, _ = pair_values(p, o, target, i_layer, i_query, mask)
            best = tl.maximum(best, tl.max(make_keys(merit, i_query, mask & (owner < 0) & (merit > -INFINITY))))
            served = tl.maximum(served, tl.max((mask & (owner == row)).to(tl.int32)))
            start += BLOCK
        tl.debug_barrier()  # all have read before one writes
        i_query = index_of(best).to(tl.int64)
        tl.store(p_own + i_query, make_keys(value_of(best), row, i_query >= 0), mask=(served == 0) & (i_query >= 0))
        tl.debug_barrier()
        row += 1


@triton.jit
def finish_kernel(
    p,
    p_winner,  # int64 [L, B, Q]
    p_target,  # int64 [L, B, Q], holds -1
    p_metric,  # [L, B, Q], holds 0, as the next two
    p_iou,
    p_weight,
    p_count,  # int32 [L, G]
    o: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program counts the queries of one target and writes their results; under an alignment rule their weights need a second look."""
    i_row, i_layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    target = load_target(p, o, i_row)
    first = (i_layer * p.batch + target[0]) * p.queries
    stop = tl.where(target[0] >= 0, p.queries, 0)
    count, most_metric, most_iou = 0, tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    start = 0
    while start < stop:
        i_query = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask = i_query < stop
        mine = mask & (index_of(tl.load(p_winner + first + i_query, mask=mask, other=NO_KEY)) == i_row)
        iou, metric, _, _ = pair_values(p, o, target, i_layer, i_query, mine)
        count += tl.sum(mine.to(tl.int32))
        most_metric = tl.maximum(most_metric, tl.max(tl.where(mine, metric, 0.0)))
        most_iou = tl.maximum(most_iou, tl.max(tl.where(mine, iou, 0.0)))
        tl.store(p_target + first + i_query, tl.zeros((BLOCK,), tl.int64) + i_row, mask=mine)
        tl.store(p_metric + first + i_query, metric, mask=mine)
        tl.store(p_iou + first + i_query, iou, mask=mine)
        tl.store(p_weight + first + i_query, iou, mask=mine)
        start += BLOCK
    tl.store(p_count + i_layer * tl.num_programs(0) + i_row, count)
    if o.rule == TAL_ or o.rule == TAL_ANY_:
        start = 0
        while start < stop:
            i_query = (start + tl.arange(0, BLOCK)).to(tl.int64)
            mask = i_query < stop
            mine = mask & (index_of(tl.load(p_winner + first + i_query, mask=mask, other=NO_KEY)) == i_row)
            metric = tl.load(p_metric + first + i_query, mask=mine, other=0.0)  # what the same thread has written
            tl.store(p_weight + first + i_query, true_div(metric, most_metric + o.eps) * most_iou, mask=mine)
            start += BLOCK


def _problem(
    scores: Tensor | None,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    image: Tensor,
    priors: Tensor | None,
    image_hw: Tensor | None,
    o: Options,
) -> Problem:
    """The input as the kernels read it, with room for what they share between targets."""
    layers, batch, queries = boxes.shape[:3]
    if image_hw is not None:
        boxes = boxes * image_hw.flip(-1).repeat(1, 2)[:, None]
    angles = target_angles = boxes
    if o.rule == TAL_ANY:
        angles = corners(boxes, OverlapRule(_CIOU.mode, o.fmt, _CIOU.eps_mode, _CIOU.eps)).angle.contiguous()
        target_angles = corners(target_boxes, _CIOU).angle.contiguous()
    score_layer, score_image, score_query, score_class = (boxes if scores is None else scores).stride()
    box_layer, box_image, box_query, _ = boxes.stride()
    return Problem(
        boxes if scores is None else scores,
        boxes,
        angles,
        boxes if priors is None else priors,
        boxes.new_empty((layers, batch, queries) if o.by_cost else (0,)),
        boxes.new_empty((batch, queries) if o.by_cost else (0,), dtype=torch.bool),
        labels,
        target_boxes,
        target_angles,
        image,
        score_layer,
        score_image,
        score_query,
        score_class,
        box_layer,
        box_image,
        box_query,
        queries,
        batch,
    )


def _choose(p: Problem, rule: Rule, o: Options, layers: int, rows: int) -> Tensor:
    """The best queries of each target: int32 [L, G, levels * topk]."""
    topk, bounds = min(o.topk, p.queries), [0]
    for size in o.levels or [p.queries]:
        bounds.append(bounds[-1] + size)
    columns = topk * (len(bounds) - 1)
    chosen = p.image.new_empty((layers, rows, columns), dtype=torch.int32)
    for level, (start, stop) in enumerate(pairwise(bounds)):
        options = rule, o.dynamic_k, triton.next_power_of_2(topk), BLOCK
        choose_kernel[(rows, layers)](p, chosen, start, stop, level * topk, columns, topk, *options, **NO_FMA)
    return chosen


def _settle(p: Problem, rule: Rule, o: Options, chosen: Tensor, winner: Tensor, first_row: Tensor) -> None:
    """Fills the keys of the targets that get the queries, int64 [L, B, Q]."""
    layers, rows, columns = chosen.shape
    by_metric, by_any = bool(o.conflict & BY_METRIC), bool(o.conflict & ANY_TARGET)
    wanted = torch.zeros(winner.shape if by_any else (0,), dtype=torch.int32, device=winner.device)
    options = rule, by_metric, by_any, max(2, triton.next_power_of_2(columns))
    claim_kernel[(rows, layers)](p, chosen, winner, wanted, columns, *options, **NO_FMA)
    if by_any:
        contest_kernel[(rows, cdiv(p.queries, BLOCK), layers)](p, winner, wanted, rule, by_metric, BLOCK, **NO_FMA)
    if o.final_topk:
        topk = min(o.final_topk, p.queries)
        trim_kernel[(rows, layers)](p, winner, topk, rule, triton.next_power_of_2(topk), BLOCK, **NO_FMA)
    if o.keep_one:
        rescue_kernel[(p.batch, layers)](p, winner, first_row, rule, BLOCK, **NO_FMA)


def one_to_many_assign(
    scores: Tensor | None,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    priors: Tensor | None,
    image_hw: Tensor | None,
    *options: Any,
) -> Outputs:
    """`ssod_fast::one_to_many_assign`: target, metric, iou and weight [L, B, Q], and count [L, G]."""
    o = Options(*options)
    shape, rows = boxes.shape[:3], labels.shape[0]
    target = torch.full(shape, -1, dtype=torch.int64, device=boxes.device)
    metric, iou, weight = (boxes.new_zeros(shape) for _ in range(3))
    count = torch.zeros((shape[0], rows), dtype=torch.int32, device=boxes.device)
    if rows == 0 or target.numel() == 0:
        return target, metric, iou, weight, count
    image, real = _owners(offsets, counts, o.batch, rows, boxes.device)
    first_row = torch.searchsorted(image, torch.arange(o.batch + 1, device=boxes.device))
    if scores is not None and o.rule != ATSS:
        real = real & (labels >= 0) & (labels < scores.shape[-1])
    p = _problem(scores, boxes, labels, target_boxes, image.where(real, -1), priors, image_hw, o)
    rule = Rule(o.rule, o.from_logits, o.fmt, o.alpha, o.beta, o.eps, o.min_side, 0 if priors is None else priors.shape[1])
    with on_device(boxes):
        if o.by_cost and scores is not None:
            class_sums_kernel[(cdiv(shape[2], SUM_QUERIES) * shape[0] * shape[1],)](
                p, scores.shape[-1], rule, SUM_QUERIES, SUM_CLASSES, **NO_FMA
            )
            reached_kernel[(cdiv(shape[2], BLOCK) * shape[1],)](p, first_row, rule, BLOCK, **NO_FMA)
        winner = torch.full(shape, NO_KEY.value, dtype=torch.int64, device=boxes.device)
        _settle(p, rule, o, _choose(p, rule, o, shape[0], rows), winner, first_row)
        finish_kernel[(rows, shape[0])](p, winner, target, metric, iou, weight, count, rule, BLOCK, **NO_FMA)
    return target, metric, iou, weight, count
