"""Thresholds from mixtures of two Gaussians, one program per fit. For GPUs without the CUDA kernels."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.gmm_threshold import _RULES, CONSTANT, EMPTY, NOT_CONVERGED, SINGLE
from ._common import on_device
from ._rows import row_bounds, row_range

INFINITY: tl.constexpr = tl.constexpr(math.inf)
LOG_2PI: tl.constexpr = tl.constexpr(math.log(2 * math.pi))
LEAST_MASS: tl.constexpr = tl.constexpr(10 * torch.finfo(torch.float64).eps)
EMPTY_, SINGLE_, CONSTANT_, NOT_CONVERGED_ = (tl.constexpr(bit) for bit in (EMPTY, SINGLE, CONSTANT, NOT_CONVERGED))
POSTERIOR: tl.constexpr = tl.constexpr(_RULES["posterior"])
MIN_BLOCK, MAX_BLOCK = 16, 1024


@triton.jit
def _samples(group, start, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a group's samples in float64, negated under REVERSE, about the group's origin; and which of them take part."""
    p_values, count, origin = group
    i_sample = start + tl.arange(0, BLOCK)
    x = tl.load(p_values + i_sample, mask=i_sample < count, other=float("nan")).to(tl.float64)
    used = tl.abs(x) < INFINITY
    x = tl.where(used, x, 0.0)
    if REVERSE:
        x = -x
    return x, tl.where(used, x - origin, 0.0), used


@triton.jit
def _log_joint(y, mean, variance, weight):
    """Log of weight times density of one component."""
    off = y - mean
    return tl.log(weight) - 0.5 * (LOG_2PI + tl.log(variance) + off * off / variance)


@triton.jit
def _log_sum(a, b):
    """ln(e^a + e^b)."""
    return tl.maximum(a, b) + tl.log(1.0 + tl.exp(-tl.abs(a - b)))


@triton.jit
def _extent(group, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Least and largest sample, and how many take part."""
    least, largest = tl.full((), INFINITY, tl.float64), tl.full((), -INFINITY, tl.float64)
    n_used, start = tl.full((), 0, tl.int32), tl.zeros_like(group[1])
    while start < group[1]:  # a range over a runtime bound does not run in the interpreter
        x, _, used = _samples(group, start, REVERSE, BLOCK)
        least = tl.minimum(least, tl.min(tl.where(used, x, INFINITY), 0))
        largest = tl.maximum(largest, tl.max(tl.where(used, x, -INFINITY), 0))
        n_used += tl.sum(used.to(tl.int32), 0)
        start += BLOCK
    return least, largest, n_used


@triton.jit
def _step(group, fit, reg_covar, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """One iteration: the new parameters, and the log-likelihood under the old ones."""
    mean0, mean1, variance0, variance1, weight0, weight1 = fit
    zero = tl.full((), 0.0, tl.float64)
    bound, mass0, mass1, sum0, sum1 = zero, zero, zero, zero, zero
    start = tl.zeros_like(group[1])
    while start < group[1]:
        _, y, used = _samples(group, start, REVERSE, BLOCK)
        a, b = _log_joint(y, mean0, variance0, weight0), _log_joint(y, mean1, variance1, weight1)
        norm = _log_sum(a, b)
        share0, share1 = tl.where(used, tl.exp(a - norm), 0.0), tl.where(used, tl.exp(b - norm), 0.0)
        bound += tl.sum(tl.where(used, norm, 0.0), 0)
        mass0, mass1 = mass0 + tl.sum(share0, 0), mass1 + tl.sum(share1, 0)
        sum0, sum1 = sum0 + tl.sum(share0 * y, 0), sum1 + tl.sum(share1 * y, 0)
        start += BLOCK
    mass0, mass1 = mass0 + LEAST_MASS, mass1 + LEAST_MASS
    new0, new1 = sum0 / mass0, sum1 / mass1
    square0, square1 = zero, zero
    start = tl.zeros_like(group[1])
    while start < group[1]:
        _, y, used = _samples(group, start, REVERSE, BLOCK)
        a, b = _log_joint(y, mean0, variance0, weight0), _log_joint(y, mean1, variance1, weight1)
        norm = _log_sum(a, b)
        share0, share1 = tl.where(used, tl.exp(a - norm), 0.0), tl.where(used, tl.exp(b - norm), 0.0)
        square0 += tl.sum(share0 * ((y - new0) * (y - new0)), 0)
        square1 += tl.sum(share1 * ((y - new1) * (y - new1)), 0)
        start += BLOCK
    total = mass0 + mass1
    return new0, new1, square0 / mass0 + reg_covar, square1 / mass1 + reg_covar, mass0 / total, mass1 / total, bound


@triton.jit
def _posterior(group, fit, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """The largest sample of the lower component on its side of the other's mean; -inf if there is none."""
    mean0, mean1, variance0, variance1, weight0, weight1 = fit
    found, start = tl.full((), -INFINITY, tl.float64), tl.zeros_like(group[1])
    while start < group[1]:
        x, y, used = _samples(group, start, REVERSE, BLOCK)
        second = _log_joint(y, mean1, variance1, weight1) > _log_joint(y, mean0, variance0, weight0)
        inner = used & (second == (mean1 < mean0)) & (y <= tl.maximum(mean0, mean1))
        found = tl.maximum(found, tl.max(tl.where(inner, x, -INFINITY), 0))
        start += BLOCK
    return found


@triton.jit
def _densest(group, fit, SECOND: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """The sample of one component where the mixture is densest, the least one if several are; +inf if there is none."""
    mean0, mean1, variance0, variance1, weight0, weight1 = fit
    best, found = tl.full((), -INFINITY, tl.float64), tl.full((), INFINITY, tl.float64)
    start = tl.zeros_like(group[1])
    while start < group[1]:
        x, y, used = _samples(group, start, REVERSE, BLOCK)
        a, b = _log_joint(y, mean0, variance0, weight0), _log_joint(y, mean1, variance1, weight1)
        candidate = used & (b > a) if SECOND else used & ~(b > a)
        density = _log_sum(a, b)
        density = tl.where(candidate & (density == density), density, -INFINITY)
        top = tl.max(density, 0)
        least = tl.min(tl.where(candidate & (density >= top), x, INFINITY), 0)
        found = tl.where(top > best, least, tl.where(top == best, tl.minimum(found, least), found))
        best = tl.maximum(best, top)
        start += BLOCK
    return found


@triton.jit
def _threshold(group, fit, least, RULE: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """The threshold by one of the rules; +inf without samples."""
    if RULE == POSTERIOR:
        found = _posterior(group, fit, REVERSE, BLOCK)
        found = tl.where(found > -INFINITY, found, least)
    else:
        found = _densest(group, fit, False, REVERSE, BLOCK)
        if found == INFINITY:
            found = _densest(group, fit, True, REVERSE, BLOCK)
    return found


@triton.jit(do_not_specialize=["total", "batch", "max_iter"])
def gmm_threshold_kernel(
    p_values,  # [N]
    p_bounds,  # int64 [P + 1], read under RAGGED
    p_counts,  # int64 [P], read under COUNTED
    p_threshold,  # [P]
    p_keep,  # bool [N], filled with False
    p_means,  # float64 [P, 2]
    p_variances,  # float64 [P, 2]
    p_weights,  # float64 [P, 2]
    p_iterations,  # int32 [P]
    p_bound,  # float64 [P]
    p_used,  # int32 [P]
    p_flag,  # int32 [P]
    total,  # N
    batch,  # P
    max_iter,
    REG_COVAR: tl.constexpr,
    TOL: tl.constexpr,
    REVERSE: tl.constexpr,
    RULE: tl.constexpr,
    RAGGED: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program fits the mixture of one group."""
    i_group = tl.program_id(0)
    begin, count = row_range(p_bounds, p_counts, i_group, total, batch, RAGGED, COUNTED)
    zero, tol = tl.full((), 0.0, tl.float64), tl.full((), TOL, tl.float64)  # compared as it stands, TOL would be a float32
    least, largest, n_used = _extent((p_values + begin, count, zero), REVERSE, BLOCK)
    some = n_used > 0
    origin, spread = tl.where(some, least, 0.0), tl.where(some, largest - least, 0.0)
    group = (p_values + begin, count, origin)

    mean0, mean1, variance0, variance1, weight0, weight1 = zero, spread, zero + 1.0, zero + 1.0, zero + 0.5, zero + 0.5
    bound, iterations, change = zero - INFINITY, tl.full((), 0, tl.int32), zero + INFINITY
    while (iterations < max_iter) & ~(change < tol):
        previous, fit = bound, (mean0, mean1, variance0, variance1, weight0, weight1)
        mean0, mean1, variance0, variance1, weight0, weight1, bound = _step(group, fit, REG_COVAR, REVERSE, BLOCK)
        bound = bound / tl.maximum(n_used, 1).to(tl.float64)
        change = tl.abs(bound - previous)
        iterations += 1
    found = _threshold(group, (mean0, mean1, variance0, variance1, weight0, weight1), least, RULE, REVERSE, BLOCK)
    found = tl.where(found < INFINITY, found, 0.0)
    start = tl.zeros_like(count)
    while start < count:
        x, _, used = _samples(group, start, REVERSE, BLOCK)
        i_sample = start + tl.arange(0, BLOCK)
        tl.store(p_keep + begin + i_sample, used & (x <= found), mask=i_sample < count)
        start += BLOCK

    mean0, mean1 = tl.where(some, mean0 + origin, 0.0), tl.where(some, mean1 + origin, 0.0)
    if REVERSE:
        found, mean0, mean1 = -found, -mean0, -mean1
    flag = tl.where(some, 0, EMPTY_) | tl.where(n_used == 1, SINGLE_, 0) | tl.where((n_used > 1) & (spread == 0), CONSTANT_, 0)
    flag |= tl.where(some & ~(change < tol), NOT_CONVERGED_, 0)
    tl.store(p_threshold + i_group, found.to(p_threshold.dtype.element_ty))
    tl.store(p_means + 2 * i_group, mean0)
    tl.store(p_means + 2 * i_group + 1, mean1)
    tl.store(p_variances + 2 * i_group, variance0)
    tl.store(p_variances + 2 * i_group + 1, variance1)
    tl.store(p_weights + 2 * i_group, weight0)
    tl.store(p_weights + 2 * i_group + 1, weight1)
    tl.store(p_iterations + i_group, tl.where(some, iterations, 0))
    tl.store(p_bound + i_group, tl.where(some, bound, 0.0))
    tl.store(p_used + i_group, n_used)
    tl.store(p_flag + i_group, flag)


def gmm_threshold(
    values: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    batch: int,
    reg_covar: float,
    tol: float,
    max_iter: int,
    reverse: bool,
    rule: int,
) -> tuple[Tensor, ...]:
    """`ssod_fast::gmm_threshold`: threshold, keep, statistics and counters."""
    values = values.contiguous()

    statistics = torch.empty(7 * batch, dtype=torch.float64, device=values.device)
    counters = torch.empty((3, batch), dtype=torch.int32, device=values.device)
    outputs = torch.empty(batch, dtype=values.dtype, device=values.device), torch.zeros_like(values, dtype=torch.bool), statistics, counters
    if batch == 0:
        return outputs
    total = values.numel()
    means, variances, weights, bound = statistics.split((2 * batch, 2 * batch, 2 * batch, batch))
    with on_device(values):
        gmm_threshold_kernel[(batch,)](
            *(values, *row_bounds(offsets, counts, total, outputs[0]), *outputs[:2]),
            *(means, variances, weights, counters[0], bound, counters[1], counters[2]),
            *(total, batch, max_iter, reg_covar, tol, reverse, rule, offsets is not None, counts is not None),
            BLOCK=min(max(triton.next_power_of_2(total // batch), MIN_BLOCK), MAX_BLOCK),  # larger groups take several blocks
            enable_fp_fusion=False,
        )
    return outputs
