"""Linear assignment by shortest augmenting paths, one program per problem. For GPUs without the CUDA kernels.

The optimum is the one that scipy's solver finds, ties included (Crouse 2016, "On implementing 2D rectangular assignment algorithms"):
rows are added in order, and every sum of the reduced costs is formed in float64 in the same order. There are no products, so no
contraction can change a result. A solver "row" is a target if there are fewer targets than queries, else a query.

Columns and rows of a problem live in global memory, in tiles of BLOCK columns, so that one compiled kernel serves every size. Whatever
one step writes, the next one reads after a barrier; and no step writes what its own slower warps may still have to read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import on_device
from ._rows import row_bounds, row_range

INFINITY: tl.constexpr = tl.constexpr(float("inf"))
NOWHERE: tl.constexpr = tl.constexpr(2**62)  # beyond every packed (order, column)
MARGIN: tl.constexpr = tl.constexpr(2.0**-40)  # relative, of the price of an invalid entry
INVALID_ENTRIES, INVALID_PAIR, UNMATCHED_TARGET = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
MIN_BLOCK, MAX_BLOCK = 16, 1024
SIZES = ["rows", "queries", "batch", "groups", "repeats", "stride_layer", "stride_row"]  # no variant per value


@triton.jit(do_not_specialize=["rows", "queries", "groups", "stride_layer", "stride_row"])
def row_extrema_kernel(
    p_cost,  # [L, G, Q], contiguous in Q
    p_low,  # float64 [L, groups, G]: smallest finite entry, +inf if there is none
    p_high,  # float64 [L, groups, G]: largest finite entry, -inf if there is none
    p_first,  # int32 [L, groups, G]: lowest query of the smallest entry
    p_invalid,  # int32 [L, groups, G]: number of entries that are not finite
    rows,  # G
    queries,  # per group
    groups,
    stride_layer,
    stride_row,
    BLOCK: tl.constexpr,
):
    """One program reads one row of one group."""
    i_out = tl.program_id(0).to(tl.int64)
    i_row, i_group, i_layer = i_out % rows, (i_out // rows) % groups, i_out // rows // groups
    p_row = p_cost + i_layer * stride_layer + i_row * stride_row + i_group * queries
    low, high = tl.full((), INFINITY, tl.float64), tl.full((), -INFINITY, tl.float64)
    first, invalid = 0, 0
    start = 0
    while start < queries:  # a range over a runtime bound does not run in the interpreter
        i_query = start + tl.arange(0, BLOCK)
        inside = i_query < queries
        cost = tl.load(p_row + i_query, mask=inside, other=0).to(tl.float64)
        finite = inside & (tl.abs(cost) < INFINITY)
        smallest = tl.min(tl.where(finite, cost, INFINITY), 0)
        where = tl.min(tl.where(finite & (cost == smallest), i_query, queries), 0)
        first = tl.where(smallest < low, where, first)
        low = tl.minimum(low, smallest)
        high = tl.maximum(high, tl.max(tl.where(finite, cost, -INFINITY), 0))
        invalid += tl.sum((inside & ~finite).to(tl.int32), 0)
        start += BLOCK
    tl.store(p_low + i_out, low)
    tl.store(p_high + i_out, high)
    tl.store(p_first + i_out, first)
    tl.store(p_invalid + i_out, invalid)


@triton.jit
def _price_of_invalid(p_low, p_high, p_invalid, targets, pairs, BLOCK: tl.constexpr):
    """What an invalid entry costs, so that as few as possible are taken: max + pairs (max - min) + 1; and whether there is any.

    The 1 would vanish beside 1e30, so it grows with the largest magnitude.
    """
    lowest, highest = tl.full((), INFINITY, tl.float64), tl.full((), -INFINITY, tl.float64)
    invalid, start = 0, 0
    while start < targets:
        i_row = start + tl.arange(0, BLOCK)
        inside = i_row < targets
        lowest = tl.minimum(lowest, tl.min(tl.load(p_low + i_row, mask=inside, other=INFINITY), 0))
        highest = tl.maximum(highest, tl.max(tl.load(p_high + i_row, mask=inside, other=-INFINITY), 0))
        invalid = tl.maximum(invalid, tl.max(tl.load(p_invalid + i_row, mask=inside, other=0), 0))
        start += BLOCK
    margin = tl.maximum(tl.maximum(tl.abs(lowest), tl.abs(highest)) * MARGIN, 1.0)
    price = tl.where(lowest <= highest, highest + pairs.to(tl.float64) * (highest - lowest) + margin, 1.0)
    return price, invalid > 0


@triton.jit
def _entries(problem, i_row, i_column, mask, INTERLEAVE: tl.constexpr):
    """Entries (i_row, i_column) of the solver's matrix, float64, and their target row, copy and validity."""
    p_cost, stride, targets, repeats, swapped, price = problem
    entry, query = tl.where(swapped, i_column, i_row), tl.where(swapped, i_row, i_column)
    if INTERLEAVE:
        target, copy = entry // repeats, entry % repeats
    else:
        target, copy = entry % targets, entry // targets
    cost = tl.load(p_cost + target * stride + query, mask=mask, other=0).to(tl.float64)
    valid = tl.abs(cost) < INFINITY
    return tl.where(valid, cost, price), target, copy, valid


@triton.jit
def _scan(problem, duals, links, i_row, distance, left, removed, place, columns, INTERLEAVE: tl.constexpr, BLOCK: tl.constexpr):
    """Shortens paths through row `i_row` to the remaining columns; the nearest of them, its distance and its place.

    Among equally near columns a free one wins over a taken one; of several free ones the last in the list of remaining columns wins,
    of several taken ones the first. The column that the previous step `removed` left its place to the last one, at place `left`.
    """
    p_u, p_v, p_shortest = duals
    p_place, p_path, p_owner = links[0], links[1], links[2]
    u = tl.load(p_u + i_row)
    nearest, choice = tl.full((), INFINITY, tl.float64), tl.full((), NOWHERE, tl.int64)
    start = tl.zeros_like(columns)
    while start < columns:
        i_column = start + tl.arange(0, BLOCK)
        inside = i_column < columns
        at = tl.load(p_place + i_column, mask=inside, other=-1)
        at = tl.where(i_column == removed, -1, at)
        at = tl.where(at == left, place, at)
        remains = at >= 0
        cost = _entries(problem, i_row, i_column, remains, INTERLEAVE)[0]
        length = ((distance + cost) - u) - tl.load(p_v + i_column, mask=remains, other=0)
        shortest = tl.load(p_shortest + i_column, mask=remains, other=INFINITY)
        shorter = remains & (length < shortest)
        shortest = tl.where(shorter, length, shortest)
        taken = tl.load(p_owner + i_column, mask=remains, other=-1) >= 0
        order = tl.where(taken, columns + at, columns - 1 - at)
        low = tl.min(shortest, 0)
        candidates = remains & (shortest == low)
        best = tl.min(tl.where(candidates, (order.to(tl.int64) << 32) | i_column.to(tl.int64), NOWHERE), 0)
        choice = tl.where(low < nearest, best, tl.where(low == nearest, tl.minimum(choice, best), choice))
        nearest = tl.minimum(nearest, low)
        tl.debug_barrier()
        tl.store(p_place + i_column, at, mask=inside)
        tl.store(p_path + i_column, tl.zeros_like(i_column) + i_row, mask=shorter)
        tl.store(p_shortest + i_column, shortest, mask=shorter)
        start += BLOCK
    tl.debug_barrier()
    order, column = (choice >> 32).to(tl.int32), (choice & 0xFFFFFFFF).to(tl.int32)
    return column, nearest, tl.where(order < columns, columns - 1 - order, order - columns)


@triton.jit
def _augment(problem, duals, links, i_new, columns, INTERLEAVE: tl.constexpr, BLOCK: tl.constexpr):
    """Adds row `i_new` along the shortest path to a free column."""
    p_u, p_v, p_shortest = duals
    p_place, p_path, p_owner, p_column = links
    start = tl.zeros_like(columns)
    while start < columns:
        i_column = start + tl.arange(0, BLOCK)
        inside = i_column < columns
        tl.store(p_place + i_column, columns - 1 - i_column, mask=inside)
        tl.store(p_path + i_column, tl.zeros_like(i_column) + i_new, mask=inside)
        tl.store(p_shortest + i_column, tl.full((BLOCK,), INFINITY, tl.float64), mask=inside)
        start += BLOCK
    tl.debug_barrier()

    column, distance, place = _scan(
        problem, duals, links, i_new, tl.full((), 0.0, tl.float64), columns, columns, columns, columns, INTERLEAVE, BLOCK
    )
    left = columns - 1
    owner = tl.load(p_owner + column)
    while owner >= 0:
        column, distance, place = _scan(problem, duals, links, owner, distance, left, column, place, columns, INTERLEAVE, BLOCK)
        left -= 1
        owner = tl.load(p_owner + column)

    start = tl.zeros_like(columns)
    while start < columns:
        i_column = start + tl.arange(0, BLOCK)
        inside = i_column < columns
        visited = inside & (tl.load(p_place + i_column, mask=inside, other=0) < 0)
        i_row = tl.load(p_owner + i_column, mask=visited, other=0)
        change = distance - tl.load(p_shortest + i_column, mask=visited, other=0)
        u, v = tl.load(p_u + i_row, mask=visited, other=0), tl.load(p_v + i_column, mask=visited, other=0)
        tl.debug_barrier()
        tl.store(p_u + i_row, u + change, mask=visited)
        tl.store(p_v + i_column, v - change, mask=visited)
        start += BLOCK
    u = tl.load(p_u + i_new)
    tl.debug_barrier()
    tl.store(p_u + i_new, u + distance)

    i_row = tl.load(p_path + column)
    while i_row != i_new:
        following = tl.load(p_column + i_row)
        tl.debug_barrier()
        tl.store(p_owner + column, i_row)
        tl.store(p_column + i_row, column)
        column = following
        i_row = tl.load(p_path + column)
    tl.store(p_owner + column, i_new)
    tl.store(p_column + i_new, column)


@triton.jit
def _solve(problem, duals, links, p_low, p_first, n_rows, columns, INTERLEAVE: tl.constexpr, BLOCK: tl.constexpr):
    """Adds all rows in order. A row whose cheapest column is free takes it: nobody's price is on that column yet."""
    targets, repeats, swapped, price = problem[2], problem[3], problem[4], problem[5]
    p_u, p_v = duals[0], duals[1]
    p_owner, p_column = links[2], links[3]
    start = tl.zeros_like(columns)
    while start < columns:
        i_column = start + tl.arange(0, BLOCK)
        inside = i_column < columns
        tl.store(p_u + i_column, tl.zeros((BLOCK,), tl.float64), mask=inside)
        tl.store(p_v + i_column, tl.zeros((BLOCK,), tl.float64), mask=inside)
        tl.store(p_owner + i_column, tl.full((BLOCK,), -1, tl.int32), mask=inside)
        tl.store(p_column + i_column, tl.full((BLOCK,), -1, tl.int32), mask=inside)
        start += BLOCK
    tl.debug_barrier()
    i_row = tl.zeros_like(columns)
    while i_row < n_rows:
        target = i_row // repeats if INTERLEAVE else i_row % targets
        column = tl.load(p_first + target, mask=~swapped, other=0)
        owner = tl.load(p_owner + column)
        if swapped | (owner >= 0):
            _augment(problem, duals, links, i_row, columns, INTERLEAVE, BLOCK)
        else:
            low = tl.load(p_low + target)
            tl.debug_barrier()
            tl.store(p_u + i_row, tl.where(low < INFINITY, low, price))
            tl.store(p_owner + column, i_row)
            tl.store(p_column + i_row, column)
        tl.debug_barrier()
        i_row += 1


@triton.jit(do_not_specialize=SIZES)
def linear_assignment_kernel(
    p_cost,  # [L, G, Q], contiguous in Q
    p_bounds,  # int64 [B + 1], read under RAGGED
    p_counts,  # int64 [B], read under COUNTED
    p_low,  # of row_extrema_kernel, [L, groups, G] each
    p_high,
    p_first,
    p_invalid,
    p_duals,  # float64 [3, L, groups, B * queries + G * repeats]: workspace
    p_links,  # int32 [4, L, groups, B * queries + G * repeats]: workspace
    p_query,  # int64 [L, groups * repeats, G], filled with -1
    p_matched,  # [L, groups * repeats, G], filled with +inf
    p_status,  # uint8 [L, groups, B]
    rows,  # G
    queries,  # per group
    batch,
    groups,
    repeats,
    stride_layer,
    stride_row,
    RAGGED: tl.constexpr,
    COUNTED: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program solves one problem: the targets of an image against the queries of a group in one layer."""
    i_problem = tl.program_id(0)
    i_image, i_slice = i_problem % batch, (i_problem // batch).to(tl.int64)  # a slice is a group of a layer
    i_layer, i_group = i_slice // groups, i_slice % groups
    begin, count = row_range(p_bounds, p_counts, i_image, rows, batch, RAGGED, COUNTED)
    targets = count.to(tl.int32)
    entries = targets * repeats
    swapped = entries >= queries
    n_rows, columns = tl.minimum(entries, queries), tl.maximum(entries, queries)

    i_first = i_slice * rows + begin
    price, invalid = _price_of_invalid(p_low + i_first, p_high + i_first, p_invalid + i_first, targets, n_rows, BLOCK)
    p_cost += i_layer * stride_layer + begin * stride_row + i_group * queries
    problem = (p_cost, tl.cast(stride_row, tl.int64), targets, repeats, swapped, price)
    slots = tl.cast(rows, tl.int64) * repeats + tl.cast(batch, tl.int64) * queries
    i_slot = i_slice * slots + i_image.to(tl.int64) * queries + begin * repeats
    plane = slots * (tl.num_programs(0) // batch)
    duals = (p_duals + i_slot, p_duals + plane + i_slot, p_duals + 2 * plane + i_slot)
    links = (p_links + i_slot, p_links + plane + i_slot, p_links + 2 * plane + i_slot, p_links + 3 * plane + i_slot)
    _solve(problem, duals, links, p_low + i_first, p_first + i_first, n_rows, columns, INTERLEAVE, BLOCK)

    p_owner, p_column = links[2], links[3]
    status = tl.where(invalid, INVALID_ENTRIES, 0)
    start = tl.zeros_like(columns)
    while start < entries:
        i_entry = start + tl.arange(0, BLOCK)
        inside = i_entry < entries
        partner = tl.load(tl.where(swapped, p_owner, p_column) + i_entry, mask=inside, other=-1)
        paired = partner >= 0
        i_row, i_column = tl.where(swapped, partner, i_entry), tl.where(swapped, i_entry, partner)
        cost, target, copy, valid = _entries(problem, i_row, i_column, paired, INTERLEAVE)
        status |= tl.where(tl.max((paired & ~valid).to(tl.int32), 0) > 0, INVALID_PAIR, 0)
        kept = paired & (valid | (not DROP))
        status |= tl.where(tl.max((inside & ~kept).to(tl.int32), 0) > 0, UNMATCHED_TARGET, 0)
        i_out = ((i_layer * groups + i_group) * repeats + copy) * rows + begin + target
        tl.store(p_query + i_out, i_group * queries + partner, mask=kept)
        tl.store(p_matched + i_out, cost.to(p_matched.dtype.element_ty), mask=kept & valid)
        start += BLOCK
    tl.store(p_status + i_slice * batch + i_image, status.to(tl.uint8))


def linear_assignment(
    cost: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    keys: Tensor | None,
    batch: int,
    groups: int,
    repeats: int,
    interleave: bool,
    drop_invalid: bool,
    any_ties: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ssod_fast::linear_assignment`: query int64 [L, groups * repeats, G], matched cost, status uint8 [L, groups, B].

    `keys` are not read: which entries are invalid takes a pass over the matrix, and its minima come with it. Nor are `any_ties`: scipy's
    optimum is an optimum.
    """
    layers, rows, all_queries = cost.shape
    queries = all_queries // groups
    query = torch.full((layers, groups * repeats, rows), -1, dtype=torch.int64, device=cost.device)
    matched = torch.full_like(query, float("inf"), dtype=cost.dtype)
    status = torch.zeros((layers, groups, batch), dtype=torch.uint8, device=cost.device)
    if status.numel() == 0:
        return query, matched, status
    if cost.stride(-1) != 1:
        cost = cost.contiguous()
    extrema = [torch.empty((layers, groups, rows), dtype=d, device=cost.device) for d in (torch.float64,) * 2 + (torch.int32,) * 2]
    slots = batch * queries + rows * repeats
    duals = torch.empty((3, layers, groups, slots), dtype=torch.float64, device=cost.device)
    links = torch.empty((4, layers, groups, slots), dtype=torch.int32, device=cost.device)
    block = min(max(triton.next_power_of_2(queries), MIN_BLOCK), MAX_BLOCK)
    strides = cost.stride(0), cost.stride(1)
    with on_device(cost):
        if rows:
            row_extrema_kernel[(layers * groups * rows,)](cost, *extrema, rows, queries, groups, *strides, BLOCK=block)
        linear_assignment_kernel[(layers * groups * batch,)](
            *(cost, *row_bounds(offsets, counts, rows, query), *extrema, duals, links, query, matched, status),
            *(rows, queries, batch, groups, repeats, *strides),
            RAGGED=offsets is not None,
            COUNTED=counts is not None,
            INTERLEAVE=interleave,
            DROP=drop_invalid,
            BLOCK=block,
            enable_fp_fusion=False,  # the price of an invalid entry has a product
        )
    return query, matched, status
