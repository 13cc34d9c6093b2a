"""Thresholds from a mixture of two Gaussians, one fit per group of samples, all fits in one call and on the device."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ._image_rows import brief
from ._registry import launcher, register

EMPTY, SINGLE, CONSTANT, NOT_CONVERGED = 1, 2, 4, 8  # bits of GMMThreshold.flag
_RULES = {"density": 0, "posterior": 1}
_HALF = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float32, torch.float64, *_HALF)


class GMMThreshold(NamedTuple):
    """P fitted mixtures and the samples that they keep. Statistics are float64 whatever the samples are.

    Beside the fields there are views of them: `means`, `variances` and `weights` [P, 2], `lower_bound` [P], all float64, and `iterations`,
    `n_used` and `flag`, int32 [P].

    Attributes:
        threshold: [P], dtype of the samples: one of the samples, unchanged; 0 where a group has none.
        keep: bool, shape of the samples: whether a sample is at or below its group's threshold (at or above it with `reverse`).
        statistics: [7 * P], what `means`, `variances`, `weights` and `lower_bound` are views of: one tensor costs less than four.
        counters: int32 [3, P], what `iterations`, `n_used` and `flag` are views of.
    """

    threshold: Tensor
    keep: Tensor
    statistics: Tensor
    counters: Tensor

    @property
    def means(self) -> Tensor:
        """[P, 2]; the first component is the one that began at the least sample (at the largest with `reverse`)."""
        return self._pairs(0)

    @property
    def variances(self) -> Tensor:
        """[P, 2], `reg_covar` included."""
        return self._pairs(1)

    @property
    def weights(self) -> Tensor:
        """[P, 2], sums 1."""
        return self._pairs(2)

    @property
    def lower_bound(self) -> Tensor:
        """[P], mean log-likelihood of the last E-step before the parameters settled."""
        return self.statistics[6 * self.counters.shape[1] :]

    @property
    def iterations(self) -> Tensor:
        """int32 [P]."""
        return self.counters[0]

    @property
    def n_used(self) -> Tensor:
        """int32 [P], samples that are finite."""
        return self.counters[1]

    @property
    def flag(self) -> Tensor:
        """int32 [P]; bits: 1 no sample, 2 a single one, 4 several equal ones, 8 `max_iter` reached before `tol`."""
        return self.counters[2]

    def _pairs(self, block: int) -> Tensor:
        groups = self.counters.shape[1]
        return self.statistics[2 * block * groups : 2 * (block + 1) * groups].view(groups, 2)


def gmm_threshold(
    values: Tensor,
    *,
    offsets: Tensor | None = None,
    counts: Tensor | None = None,
    reg_covar: float = 1e-5,
    tol: float = 1e-3,
    max_iter: int = 100,
    reverse: bool = False,
    rule: Literal["density", "posterior"] = "density",
) -> GMMThreshold:
    """Splits costs (low is good) or scores (high is good, `reverse`) into two clusters per group and says which samples the good one keeps.

    Expectation-maximisation as scikit-learn runs it with weights 1/2, means at the extremes and variances 1 to begin with; thresholds and
    numbers of iterations agree with it on float64 data. The order of samples does not matter, and NaN and infinite ones take no part: they
    change nothing and are never kept. Nothing waits for the device, and no gradient flows.

    The rule `"density"` is that of cost-based pseudo-label mining (Semi-DETR) and PAA: the sample with the highest density of the mixture
    among those that belong to the good component. It lies near that component's mode, so about half of the component passes; of
    two samples whose densities are equal but for rounding, the implementation decides which one is the threshold. The rule
    `"posterior"` keeps all of it: the worst sample that belongs to the good component with a probability of at least 1/2 and lies on its
    side of the other component's mean (the better of the two means is the good component's).

    Args:
        values: floating samples: [N] with or without `offsets`, or [P, N], one group per row.
        offsets: int [P + 1], group p owns the samples `offsets[p]` to `offsets[p + 1]` of [N]. Not read on a device: clamped into range.
        counts: int [P], how many samples of each row of [P, N] are real; the rest may hold anything.
        reg_covar: added to variances, > 0.
        tol: EM stops once the mean log-likelihood changes by less.
        max_iter: at most so many iterations.
        reverse: high values are good: the result for `values` is the negated result for `-values`.
        rule: `"density"` or `"posterior"`.

    Returns:
        :class:`GMMThreshold`; P = 1 for samples [N] without offsets.

    Raises:
        ValueError: for wrong shapes, devices, offsets on the host that do not rise from 0 to N, and options out of range.
        TypeError: for samples that are not floating, offsets or counts that are not int32 or int64, and options of a wrong type.
    """
    _check_options(reg_covar, tol, max_iter, reverse)
    rule_id = _RULES.get(rule) if isinstance(rule, str) else None
    if rule_id is None:
        raise ValueError(f"rule must be 'density' or 'posterior', got {rule!r}")
    offsets, counts, groups = _check_samples(values, offsets, counts)
    samples = values.detach() if values.requires_grad else values
    if samples.dtype in _HALF:
        samples = samples.float()
    result = GMMThreshold(*_op(samples.contiguous(), offsets, counts, groups, reg_covar, tol, max_iter, reverse, rule_id))
    if samples.dtype is not values.dtype:
        return result._replace(threshold=result.threshold.to(values.dtype))  # exact: it is one of the samples
    return result


def _check_options(reg_covar: float, tol: float, max_iter: int, reverse: bool) -> None:
    for name, value in (("reg_covar", reg_covar), ("tol", tol)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not isinstance(max_iter, int) or isinstance(max_iter, bool):
        raise TypeError(f"max_iter must be an int, got {max_iter!r}")
    if not isinstance(reverse, bool):
        raise TypeError(f"reverse must be a bool, got {reverse!r}")
    if not 0 < reg_covar < math.inf:
        raise ValueError(f"reg_covar must be a finite number > 0, got {reg_covar!r}")
    if not 0 <= tol < math.inf:
        raise ValueError(f"tol must be a finite number >= 0, got {tol!r}")
    if not 1 <= max_iter < 2**31:
        raise ValueError(f"max_iter must lie in 1..{2**31 - 1}, got {max_iter}")


def _check_samples(values: Tensor, offsets: Tensor | None, counts: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Checks what belongs to which group; returns the index tensors as int64 and the number of groups."""
    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a tensor, got {type(values).__name__}")
    if values.dtype not in _FLOATS:
        raise TypeError(f"values must be float16, bfloat16, float32 or float64, got {values.dtype}")
    if offsets is not None:
        if counts is not None:
            raise ValueError("offsets and counts must not be given together")
        if values.dim() != 1:
            raise ValueError(f"values must have shape [N] when offsets are given, got {list(values.shape)}")
        offsets = _check_index("offsets", offsets, values)
        if offsets.shape[0] < 1:
            raise ValueError("offsets must have shape [P + 1], got [0]")
        return offsets, None, offsets.shape[0] - 1
    if values.dim() not in (1, 2):
        raise ValueError(f"values must have shape [N] or [P, N], got {list(values.shape)}")
    if counts is None:
        return None, None, 1 if values.dim() == 1 else values.shape[0]
    if values.dim() != 2:
        raise ValueError(f"values must have shape [P, N] when counts are given, got {list(values.shape)}")
    counts = _check_index("counts", counts, values)
    if counts.shape[0] != values.shape[0]:
        raise ValueError(f"counts must have shape [{values.shape[0]}], got {list(counts.shape)}")
    return None, counts, values.shape[0]


def _check_index(name: str, index: Tensor, values: Tensor) -> Tensor:
    if not isinstance(index, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(index).__name__}")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got shape {list(index.shape)}")
    if index.device != values.device:
        raise ValueError(f"{name} and values must be on one device, got {index.device} and {values.device}")
    if type(index) is Tensor and index.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_host_index(name, index, values.shape[-1])
    return index.to(torch.int64).contiguous()


def _check_host_index(name: str, index: Tensor, samples: int) -> None:
    """Checks index values that lie on the host; reading them there costs no synchronisation."""
    found: list[int] = index.numpy().tolist()
    if name == "counts":
        if any(not 0 <= n <= samples for n in found):
            raise ValueError(f"counts must lie in 0..{samples}, got {brief(found)}")
    elif not found or found[0] != 0 or found[-1] != samples or any(a > b for a, b in pairwise(found)):
        raise ValueError(f"offsets must rise from 0 to the number of samples ({samples}), got {brief(found)}")


class _Groups(NamedTuple):
    """Flat samples and the group of each; samples that take no part belong to the spare group P.

    Attributes:
        x: float64 [N], negated for `reverse`; 0 where a sample takes no part.
        owner: int64 [N], group of each sample.
        used: bool [N].
        size: P + 1.
    """

    x: Tensor
    owner: Tensor
    used: Tensor
    size: int

    def sum(self, terms: Tensor) -> Tensor:
        """[N] or [N, 2] -> [P + 1] or [P + 1, 2]."""
        return terms.new_zeros(self.size, *terms.shape[1:]).index_add(0, self.owner, terms)

    def least(self, terms: Tensor, where: Tensor) -> Tensor:
        """[P + 1], +inf where a group has no such sample."""
        empty = terms.new_full((self.size,), math.inf)
        return empty.scatter_reduce(0, self.owner, terms.where(where, math.inf), "amin")

    def largest(self, terms: Tensor, where: Tensor) -> Tensor:
        """[P + 1], -inf where a group has no such sample."""
        return -self.least(-terms, where)


def _group(values: Tensor, offsets: Tensor | None, counts: Tensor | None, groups: int, reverse: bool) -> _Groups:
    flat = values.flatten()
    rows = torch.arange(flat.shape[0], device=flat.device)
    if offsets is not None:
        ends = offsets.clamp(0, flat.shape[0])
        owner = torch.searchsorted(ends, rows, right=True) - 1
        inside = (owner >= 0) & (owner < groups)
    else:
        width = max(flat.shape[0] // max(groups, 1), 1)
        owner = rows // width
        inside = torch.ones_like(rows, dtype=torch.bool) if counts is None else rows % width < counts[owner]
    used = inside & flat.isfinite()
    x = flat.double().where(used, 0)
    return _Groups(-x if reverse else x, owner.where(used, groups), used, groups + 1)


def _log_joint(y: Tensor, means: Tensor, variances: Tensor, weights: Tensor) -> Tensor:
    """Log of weight times density of both components, [N, 2], from samples [N] and parameters [N, 2]."""
    distance = (y[:, None] - means).square() / variances
    return weights.log() - 0.5 * (math.log(2 * math.pi) + variances.log() + distance)


class _Fit(NamedTuple):
    """Parameters [P + 1, 2] about an origin per group, lower bound, iterations, and whether the fit has converged."""

    means: Tensor
    variances: Tensor
    weights: Tensor
    bound: Tensor
    iterations: Tensor
    done: Tensor

    def where(self, keep: Tensor, other: _Fit) -> _Fit:
        """This fit where `keep` [P + 1], else the other."""
        return _Fit(*(a.where(keep if a.dim() == 1 else keep[:, None], b) for a, b in zip(self, other, strict=True)))


def _start(spread: Tensor) -> _Fit:
    """Means at the extremes, which lie `spread` apart."""
    zero, half = torch.zeros_like(spread), torch.full_like(spread, 0.5)
    pair = torch.stack((half, half), -1)
    return _Fit(torch.stack((zero, spread), -1), 2 * pair, pair, zero - math.inf, zero.int(), zero > 0)


def _step(groups: _Groups, y: Tensor, count: Tensor, fit: _Fit, reg_covar: float, tol: float) -> _Fit:
    """One iteration of every fit that has not converged."""
    of = groups.owner
    joint = _log_joint(y, fit.means[of], fit.variances[of], fit.weights[of])
    norm = torch.logaddexp(joint[:, 0], joint[:, 1])
    share = (joint - norm[:, None]).exp() * groups.used[:, None]
    mass = groups.sum(share) + 10 * torch.finfo(torch.float64).eps
    means = groups.sum(share * y[:, None]) / mass
    variances = groups.sum(share * (y[:, None] - means[of]).square()) / mass + reg_covar
    bound = groups.sum(norm.where(groups.used, 0)) / count
    done = (bound - fit.bound).abs() < tol
    stepped = _Fit(means, variances, mass / mass.sum(-1, keepdim=True), bound, fit.iterations + 1, done)
    return fit.where(fit.done, stepped)


def _choose(groups: _Groups, y: Tensor, fit: _Fit, rule: int) -> Tensor:
    """The threshold of every group, [P + 1]."""
    of = groups.owner
    joint = _log_joint(y, fit.means[of], fit.variances[of], fit.weights[of])
    second = joint[:, 1] > joint[:, 0]
    if rule == _RULES["posterior"]:
        swapped = fit.means[:, 1] < fit.means[:, 0]
        inner = groups.used & (second == swapped[of]) & (y <= fit.means.amax(-1)[of])
        found = groups.largest(groups.x, inner)
        return found.where(found > -math.inf, groups.least(groups.x, groups.used))
    density = torch.logaddexp(joint[:, 0], joint[:, 1]).nan_to_num(nan=-math.inf)
    first_exists = groups.sum((groups.used & ~second).double()) > 0
    candidate = groups.used & (second != first_exists[of])
    best = groups.largest(density, candidate)
    return groups.least(groups.x, candidate & (density >= best[of]))


def _reference(
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
    groups = _group(values, offsets, counts, batch, reverse)
    n_used = groups.sum(groups.used.double())
    count = n_used.clamp(min=1)
    origin = groups.least(groups.x, groups.used).nan_to_num(posinf=0)
    spread = groups.largest(groups.x, groups.used).nan_to_num(neginf=0) - origin
    y = (groups.x - origin[groups.owner]).where(groups.used, 0)  # about the least sample: no offset of the data costs digits
    fit = _start(spread)
    for _ in range(max_iter):  # to the end: to ask whether all are done would wait for the device
        fit = _step(groups, y, count, fit, reg_covar, tol)
    threshold = _choose(groups, y, fit, rule).nan_to_num(posinf=0)
    keep = groups.used & (groups.x <= threshold[groups.owner])
    sign = -1.0 if reverse else 1.0
    some = n_used > 0
    flag = EMPTY * ~some + SINGLE * (n_used == 1) + CONSTANT * ((n_used > 1) & (spread == 0)) + NOT_CONVERGED * (~fit.done & some)
    statistics = [sign * (fit.means + origin[:, None]) * some[:, None], fit.variances, fit.weights, fit.bound.where(some, 0)]
    counters = torch.stack((fit.iterations * some, n_used, flag)).int()[:, :batch]
    threshold = (sign * threshold[:batch]).to(values.dtype)
    return threshold, keep.view_as(values), torch.cat([s[:batch].flatten() for s in statistics]), counters.contiguous()


def _fake(values: Tensor, offsets: Tensor | None, counts: Tensor | None, batch: int, *_: Any) -> tuple[Tensor, ...]:
    return (
        values.new_empty(batch),
        torch.empty_like(values, dtype=torch.bool, memory_format=torch.contiguous_format),
        values.new_empty(7 * batch, dtype=torch.float64),
        values.new_empty(3, batch, dtype=torch.int32),
    )


_OUTPUTS = ", ".join(f"Tensor {name}" for name in GMMThreshold._fields)
register(
    "gmm_threshold(Tensor values, Tensor? offsets, Tensor? counts, int batch, float reg_covar, float tol, int max_iter, bool reverse, "
    f"int rule) -> ({_OUTPUTS})",
    reference=_reference,
    fake=_fake,
    triton=launcher("gmm_threshold", "gmm_threshold"),
)
_op = torch.ops.ssod_fast.gmm_threshold.default
