"""Thresholds from mixtures of two Gaussians, against scikit-learn's loop over groups and a batched EM in eager torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from boxes import ROTATION, optional
from harness import OURS, Case, rotate
from ssod_fast.ops import gmm_threshold

SKLEARN, TORCH = "scikit-learn loop", "batched torch EM"
REG, TOL, MAX_ITER = 1e-5, 1e-3, 100


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """One fit per step over all costs (pseudo-label mining), and one fit per target over its candidates (PAA)."""
    gpu = device.type == "cuda"
    single = ((30, 120.0 if gpu else 160.0), (300, 120.0 if gpu else 110.0), (1000, 120.0 if gpu else 35.0))
    for n, target in single[:1] if quick else single:
        for inputs in ("clusters", "ties", "one cluster"):
            targets = {SKLEARN: target} if inputs == "clusters" else {}
            yield gmm_case(1, n, inputs, device, targets, ceiling=20 if gpu else None)
    for groups in (20,) if quick else (100, 1000):
        targets = {SKLEARN: 280.0, TORCH: 14.0} if groups == 100 and not gpu else {}
        yield gmm_case(groups, 45, "clusters", device, targets, sklearn=groups < 1000)


def gmm_case(
    groups: int,
    n: int,
    inputs: str,
    device: torch.device,
    targets: dict[str, float],
    *,
    ceiling: float | None = None,
    sklearn: bool = True,
) -> Case:
    """`groups` fits of `n` samples."""
    generator = torch.Generator().manual_seed(0)
    prepared = [(samples(inputs, groups, n, generator).to(device),) for _ in range(ROTATION)]
    providers: dict[str, Any] = {OURS: rotate(gmm_threshold, prepared)}
    peer = sklearn_thresholds() if sklearn else None
    if peer is not None:
        providers[SKLEARN] = rotate(peer, prepared)
    providers[TORCH] = rotate(torch_thresholds, prepared)
    return Case(
        op="gmm_threshold",
        name=f"{groups}x{n}",
        mode="density",
        dtype="float32",
        inputs=inputs,
        bytes=groups * (5 * n + 69),
        providers=providers,
        check=lambda: check(*prepared[0]),
        targets=targets,
        ceiling_us=ceiling,
        note="fit, labels and densities; bound by the number of iterations, not by memory",
        eager_only=(SKLEARN, TORCH),
    )


def samples(kind: str, groups: int, n: int, generator: torch.Generator) -> Tensor:
    """Matching costs [groups, n]: a good and a bad cluster, the same rounded so that many are equal, or a single cluster."""
    good = torch.randn(groups, n, generator=generator) - 8
    bad = 1.5 * torch.randn(groups, n, generator=generator) - 3
    if kind == "one cluster":
        return good
    mixed = good.where(torch.rand(groups, n, generator=generator) < 0.5, bad)
    return mixed.mul(4).round().div(4) if kind == "ties" else mixed


def sklearn_thresholds() -> Callable[[Tensor], list[float]] | None:
    """What Semi-DETR and PAA do: fit, labels and densities of one group after the other, on the host."""
    module: Any = optional("sklearn.mixture")
    if module is None:
        return None

    def threshold(values: Any) -> float:
        model = module.GaussianMixture(
            2,
            covariance_type="diag",
            weights_init=[0.5, 0.5],
            means_init=[values.min(0), values.max(0)],
            precisions_init=[[1.0], [1.0]],
            reg_covar=REG,
            tol=TOL,
            max_iter=MAX_ITER,
        )
        labels = model.fit(values).predict(values)
        density = model.score_samples(values)
        chosen = labels == (0 if (labels == 0).any() else 1)
        return float(values[chosen][density[chosen].argmax(), 0])

    def thresholds(values: Tensor) -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fits that do not converge
            return [threshold(row[:, None]) for row in values.cpu().double().numpy()]

    return thresholds


def torch_thresholds(values: Tensor) -> Tensor:
    """A batched EM [P, N] -> [P] in eager torch: every group iterates until the last one has converged."""
    x = values.double()[..., None]  # [P, N, 1]
    means = torch.cat((x.amin(1), x.amax(1)), -1)[:, None]  # [P, 1, 2]
    variances, weights = torch.ones_like(means), torch.full_like(means, 0.5)
    bound = x.new_full((len(x),), -math.inf)
    running = torch.ones_like(bound, dtype=torch.bool)
    for _ in range(MAX_ITER):
        joint = log_joint(x, means, variances, weights)
        norm = joint.logsumexp(-1, keepdim=True)
        share = (joint - norm).exp()
        mass = share.sum(1, keepdim=True) + 10 * torch.finfo(torch.float64).eps
        center = (share * x).sum(1, keepdim=True) / mass
        spread = (share * (x - center).square()).sum(1, keepdim=True) / mass + REG
        keep = running[:, None, None]
        means, variances = center.where(keep, means), spread.where(keep, variances)
        weights = (mass / mass.sum(-1, keepdim=True)).where(keep, weights)
        latest = norm.mean((1, 2))
        running = running & ((latest - bound).abs() >= TOL)
        bound = latest
        if not running.any():
            break
    joint = log_joint(x, means, variances, weights)
    first = joint[..., 0] >= joint[..., 1]
    chosen = first == first.any(1, keepdim=True)
    best = joint.logsumexp(-1).where(chosen, -math.inf).argmax(1, keepdim=True)
    return values.gather(1, best)[:, 0]


def log_joint(x: Tensor, means: Tensor, variances: Tensor, weights: Tensor) -> Tensor:
    """Log of weight times density: [P, N, 1] and [P, 1, 2] -> [P, N, 2]."""
    return weights.log() - 0.5 * (math.log(2 * math.pi) + variances.log() + (x - means).square() / variances)


def check(values: Tensor) -> None:
    """Thresholds of scikit-learn, or of the batched EM where it is not installed; equal densities leave a choice."""
    peer = sklearn_thresholds()
    expected = torch_thresholds(values).cpu() if peer is None else torch.tensor(peer(values))
    found = gmm_threshold(values)
    different = found.threshold.cpu() != expected.float()
    for p in different.nonzero()[:, 0].tolist():
        means, variances, weights = (t[p].cpu() for t in (found.means, found.variances, found.weights))
        pair = torch.stack((found.threshold[p].cpu(), expected[p].float())).double()[:, None]
        density = log_joint(pair, means, variances, weights).logsumexp(-1)
        torch.testing.assert_close(density[0], density[1], atol=1e-9, rtol=0)
