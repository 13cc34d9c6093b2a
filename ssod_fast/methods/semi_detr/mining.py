"""Which pseudo boxes are worth learning from: a threshold per image on scores, and one on matching costs (Semi-DETR, arXiv 2307.08095)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ssod_fast.ops import gmm_threshold, match
from ssod_fast.ops.gmm_threshold import NOT_CONVERGED
from ssod_fast.structures import PaddedTargets

from .hybrid import COST_EPS

Scope = Literal["global", "rank"]


def mean_std_threshold(scores: Tensor, count: Tensor) -> Tensor:
    """Mean plus standard deviation (of a sample, with n - 1) of the scores of each image.

    Accumulated in float64, in which the mean of equal float32 scores is exactly that score.

    Args:
        scores: [B, N].
        count: int [B], how many scores of each image are real; the rest may hold anything.

    Returns:
        float64 [B], NaN for images with fewer than two scores.

    Raises:
        ValueError: for shapes that do not fit.
    """
    if scores.dim() != 2 or count.shape != scores.shape[:1]:
        raise ValueError(f"scores must be [B, N] and count [B], got {list(scores.shape)} and {list(count.shape)}")
    real = torch.arange(scores.shape[1], device=scores.device) < count[:, None]
    values, n = torch.where(real, scores.double(), 0), count.double()
    mean = values.sum(1) / n
    spread = torch.where(real, values - mean[:, None], 0).square().sum(1)
    return mean + (spread / (n - 1)).sqrt()


def mean_std_filter(scores: Tensor, count: Tensor) -> Tensor:
    """Keeps the scores that reach :func:`mean_std_threshold`; none in an image with fewer than two.

    Few scores that lie far apart can all stay below the threshold: of 0.9 and 0.1 neither is kept.

    Args:
        scores: [B, N].
        count: int [B], how many scores of each image are real.

    Returns:
        Bool [B, N].

    Raises:
        ValueError: for shapes that do not fit.
    """
    threshold = mean_std_threshold(scores, count)
    real = torch.arange(scores.shape[1], device=scores.device) < count[:, None]
    return real & (scores.double() >= threshold[:, None])


class Mined(NamedTuple):
    """Result of :class:`CostMiner`.

    Attributes:
        keep: bool [B, N], pseudo boxes whose cost does not exceed the threshold.
        cost: [B, N], what each pseudo box costs; +inf for padding and for boxes that found no query.
        threshold: scalar in the dtype of the costs, one of them unchanged; 0 if there is none.
        converged: bool scalar, whether the mixture settled before the last permitted iteration.
    """

    keep: Tensor
    cost: Tensor
    threshold: Tensor
    converged: Tensor


class CostMiner:
    """Keeps pseudo boxes that the student nearly agrees with: those of low cost in a matching with its queries.

    Each pseudo box is matched with one query. A mixture of two Gaussians is fitted to the costs of all boxes, whatever their class or
    image, and the box with the highest density in the better component is the threshold (:func:`~ssod_fast.ops.gmm_threshold`). About half
    of that component passes. No gradient flows, and nothing waits for the device but where `capacity` says so.

    Args:
        scope: "global" fits one mixture to the costs of all ranks, which then must all call this; "rank" to those of this process.
        capacity: most rows B * N of any rank, padding included. With it, ranks exchange costs without waiting for the device; without it
            they first agree on the largest number of rows, which waits once. Of no matter outside of distributed training.
        cls_cost: weight of the focal class cost.
        l1_cost: weight of the L1 distance of normalised boxes.
        giou_cost: weight of the GIoU.
        process_group: the ranks of scope "global", by default all.

    Raises:
        ValueError: for an unknown scope and a capacity below 0.
    """

    def __init__(
        self,
        scope: Scope = "global",
        *,
        capacity: int | None = None,
        cls_cost: float = 2.0,
        l1_cost: float = 5.0,
        giou_cost: float = 2.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if scope not in ("global", "rank"):
            raise ValueError(f'scope must be "global" or "rank", got {scope!r}')
        if capacity is not None and capacity < 0:
            raise ValueError(f"capacity must not be negative, got {capacity}")
        self.scope, self.capacity, self.process_group = scope, capacity, process_group
        self.cls_cost, self.l1_cost, self.giou_cost = cls_cost, l1_cost, giou_cost

    @torch.no_grad()
    def __call__(self, logits: Tensor, boxes: Tensor, targets: PaddedTargets) -> Mined:
        """Mines the pseudo boxes of one step.

        Args:
            logits: [B, Q, C] of the last decoder layer.
            boxes: [B, Q, 4] cxcywh, normalised.
            targets: pseudo boxes [B, N], cxcywh normalised, of the same images.

        Returns:
            :class:`Mined`.

        Raises:
            ValueError: as :func:`~ssod_fast.ops.match`, and for more rows than `capacity`.
            TypeError: as :func:`~ssod_fast.ops.match`.
        """
        cost = self.costs(logits, boxes, targets)
        fit = gmm_threshold(self._pool(cost.flatten()))
        threshold = fit.threshold[0]
        keep = cost.isfinite() & (cost <= threshold)
        return Mined(keep, cost, threshold, (fit.flag[0] & NOT_CONVERGED) == 0)

    def costs(self, logits: Tensor, boxes: Tensor, targets: PaddedTargets) -> Tensor:
        """[B, N]: the cost of each pseudo box and the query that optimal matching gives it; +inf where there is none."""
        if not isinstance(targets, PaddedTargets):
            raise TypeError(f"targets must be PaddedTargets, for example PaddedTargets.from_list(...), got {type(targets).__name__}")
        matches = match(logits, boxes, targets, eps=COST_EPS, w_class=self.cls_cost, w_box=self.l1_cost, w_giou=self.giou_cost)
        return matches.cost[0, 0].view(targets.labels.shape)

    def _pool(self, costs: Tensor) -> Tensor:
        """The costs [M] of all processes in scope, filled up with +inf, which takes no part in a fit."""
        if self.scope == "rank" or not (dist.is_available() and dist.is_initialized()):
            return costs
        rows = self._rows(costs)
        if costs.shape[0] > rows:
            raise ValueError(f"capacity must be at least the rows of targets, {costs.shape[0]}, got {rows}")
        mine = costs.new_full((rows,), torch.inf)
        mine[: costs.shape[0]] = costs
        pooled = costs.new_empty(dist.get_world_size(self.process_group) * rows)
        dist.all_gather_into_tensor(pooled, mine, group=self.process_group)
        return pooled

    def _rows(self, costs: Tensor) -> int:
        """How many rows every rank sends."""
        if self.capacity is not None:
            return self.capacity
        longest = torch.tensor(costs.shape[0], device=costs.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=self.process_group)
        return int(longest)
