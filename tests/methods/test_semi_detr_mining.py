"""The two filters of pseudo boxes: mean plus deviation of scores, and a mixture fitted to matching costs."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from no_sync import no_sync
from scipy.optimize import linear_sum_assignment
from semi_detr_ranks import CASES, make_case, mine_case
from torch import Tensor, multiprocessing

from ssod_fast.methods.semi_detr import CostMiner, mean_std_filter, mean_std_threshold
from ssod_fast.ops import matching_cost
from ssod_fast.structures import PaddedTargets

COSTS = [-9, -8.6, -8.4, -8.3, -8.1, -7.8, -2.2, -1.9, -1.5, -1.2, -0.6, 0.3]


@pytest.mark.parametrize(
    ("scores", "threshold", "kept"),
    [
        ([0.9, 0.8, 0.3, 0.1, 0.05, 0.02], 0.7536063, 2),
        ([0.7], math.nan, 0),
        ([0.5, 0.5], 0.5, 2),
        ([0.1, 0.1, 0.1], 0.1, 3),
        ([0.9, 0.1], 1.0656854, 0),
        ([], math.nan, 0),
    ],
)
@pytest.mark.parametrize("padding", [0, 3])
def test_golden_mean_std(scores: list[float], threshold: float, kept: int, padding: int) -> None:
    row = torch.tensor([*scores, *[0.99] * padding])[None]  # what lies in padding rows must not matter
    count = torch.tensor([len(scores)], dtype=torch.int32)
    assert mean_std_threshold(row, count).item() == pytest.approx(threshold, abs=1e-7, nan_ok=True)
    keep = mean_std_filter(row, count)
    assert keep[0].tolist() == [i < kept for i in range(len(scores) + padding)]


def test_mean_std_per_image_without_sync() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.5, 0.5, math.nan]])
    with no_sync():
        keep = mean_std_filter(scores, torch.tensor([3, 2]))
    assert keep.tolist() == [[False, False, False], [True, True, False]]
    ours = mean_std_threshold(scores, torch.tensor([3, 2]))
    assert ours.tolist() == pytest.approx([(scores[0].mean() + scores[0].std()).item(), 0.5])


def test_mean_std_shapes() -> None:
    with pytest.raises(ValueError, match=r"scores must be \[B, N\] and count \[B\], got \[3\] and \[1\]"):
        mean_std_filter(torch.zeros(3), torch.tensor([3]))


def targets_with(costs: list[list[float]]) -> tuple[Tensor, Tensor, PaddedTargets]:
    """Queries and targets whose optimal pairs have exactly these L1 costs: a query per target, apart by that distance."""
    batch, rows = len(costs), max(len(row) for row in costs)
    boxes = torch.zeros(batch, rows, 4, dtype=torch.float64)
    boxes[..., 0] = 100.0 * torch.arange(rows)
    queries = boxes.clone()
    for image, row in enumerate(costs):
        queries[image, : len(row), 1] = torch.tensor(row, dtype=torch.float64)
    count = torch.tensor([len(row) for row in costs], dtype=torch.int32)
    plain = torch.zeros(batch, rows, dtype=torch.int64)
    return torch.zeros(batch, rows, 1, dtype=torch.float64), queries, PaddedTargets(boxes, plain, plain.double(), plain.double(), count)


def mine(costs: list[list[float]], **options: Any) -> Any:
    return CostMiner(cls_cost=0.0, l1_cost=1.0, giou_cost=0.0, **options)(*targets_with(costs))


def test_golden_mixture_over_images() -> None:
    """The published case, moved up by 10 to be distances, and spread over two images."""
    shifted = [cost + 10 for cost in COSTS]
    mined = mine([shifted[::2], [], shifted[1::2]])
    assert mined.threshold.item() == pytest.approx(-8.4 + 10, abs=1e-12)
    assert mined.keep.tolist() == [[True, True] + [False] * 4, [False] * 6, [True] + [False] * 5]
    assert mined.converged.item()
    assert mined.cost[1].tolist() == [math.inf] * 6
    assert mined.cost[0].tolist() == pytest.approx(shifted[::2])


@pytest.mark.parametrize(
    ("costs", "threshold", "kept"),
    [([[5.0, 9.0]], 5.0, [[True, False]]), ([[3.25]], 3.25, [[True]]), ([[2.0] * 5], 2.0, [[True] * 5]), ([[]], 0.0, [[]])],
)
def test_few_or_equal_costs(costs: list[list[float]], threshold: float, kept: list[list[bool]]) -> None:
    mined = mine(costs)
    assert mined.threshold.item() == threshold
    assert mined.keep.tolist() == kept


@pytest.mark.parametrize("seed", range(6))
def test_against_scipy_and_scikit_learn(seed: int) -> None:
    logits, boxes, targets = make_case((7, 0, 12), 40, seed=seed, dtype=torch.float64)
    mined = CostMiner()(logits, boxes, targets)
    full = matching_cost(logits, boxes, targets, eps=1e-12)  # [B, N, Q]
    pooled = []
    for image, n in enumerate(targets.count.tolist()):
        rows, columns = linear_sum_assignment(full[image, :n].numpy())
        assert mined.cost[image, rows].tolist() == full[image, rows, columns].tolist()
        assert (mined.cost[image, n:] == math.inf).all()
        pooled += mined.cost[image, :n].tolist()
    assert mined.threshold.item() in sklearn_thresholds(pooled)
    assert torch.equal(mined.keep, (mined.cost <= mined.threshold) & targets.valid)


def sklearn_thresholds(costs: list[float]) -> list[float]:
    """Costs that may be the threshold: those of the highest density, several where they are equal but for rounding."""
    from sklearn.mixture import GaussianMixture

    x = torch.tensor(costs, dtype=torch.float64).numpy()[:, None]
    start: dict[str, Any] = {"weights_init": [0.5, 0.5], "means_init": [x.min(0), x.max(0)], "precisions_init": [[[1.0]], [[1.0]]]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits that do not converge
        model = GaussianMixture(2, reg_covar=1e-5, **start).fit(x)
    good = model.predict(x) == 0
    density = model.score_samples(x)
    return x[good & (density >= density[good].max() - 1e-12), 0].tolist()


def test_more_boxes_than_queries() -> None:
    logits, boxes, targets = make_case((9,), 4)
    mined = CostMiner()(logits, boxes, targets)
    unmatched = mined.cost[0].isinf()
    assert unmatched.sum() == 5
    assert not mined.keep[0][unmatched].any()
    assert mined.keep.any()


def test_degenerate_and_non_finite_boxes() -> None:
    logits, boxes, targets = make_case((6,), 20)
    targets.boxes[0, 0, 2] = 0
    targets.boxes[0, 1] = 0
    targets.boxes[0, 2] = math.nan
    mined = CostMiner()(logits, boxes, targets)
    assert mined.cost[0].isinf().tolist() == [False, False, True, False, False, False]
    assert mined.threshold.isfinite()
    assert not mined.keep[0, 2]


def test_a_box_whose_costs_are_infinite_changes_no_other() -> None:
    logits, boxes, targets = make_case((6,), 20, seed=3)
    fewer = PaddedTargets(targets.boxes, targets.labels, targets.scores, targets.weights, targets.count - 1)
    targets.boxes[0, -1] = math.nan
    assert CostMiner()(logits, boxes, targets).threshold == CostMiner()(logits, boxes, fewer).threshold


def test_no_gradient_no_sync() -> None:
    logits, boxes, targets = make_case((6, 3), 20)
    with no_sync():
        mined = CostMiner()(logits.requires_grad_(), boxes.requires_grad_(), targets)
    assert not mined.cost.requires_grad


def test_autocast_changes_nothing() -> None:
    logits, boxes, targets = make_case((6, 3), 20)
    with torch.autocast("cpu", torch.bfloat16):
        low = CostMiner()(logits, boxes, targets)
    assert torch.equal(low.cost, CostMiner()(logits, boxes, targets).cost)
    assert low.cost.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scope": "node"}, 'scope must be "global" or "rank", got \'node\''), ({"capacity": -1}, "capacity must not be negative, got -1")],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CostMiner(**options)


def test_targets_that_are_no_padded_ones_are_named() -> None:
    logits, boxes, _ = make_case((2,), 20)
    with pytest.raises(TypeError, match=r"targets must be PaddedTargets, for example PaddedTargets.from_list\(...\), got list"):
        CostMiner()(logits, boxes, [])  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    """Ranks with different numbers of images and boxes share one threshold; a rank without boxes hangs nobody."""
    multiprocessing.spawn(mine_case, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for number, sizes in enumerate(CASES):
        both = [make_case(own, 30, seed=10 * number + rank) for rank, own in enumerate(sizes)]
        alone = [CostMiner()(*case) for case in both]
        pooled = torch.cat([mined.cost.flatten() for mined in alone])
        for rank, own in enumerate(alone):
            for kind in ("capacity", "longest"):
                keep, threshold = ranks[rank][kind][number]
                assert threshold == ranks[0]["capacity"][number][1]
                assert torch.equal(keep, own.cost <= threshold)
            assert torch.equal(ranks[rank]["rank"][number][0], own.keep)
        if pooled.isfinite().any():
            assert threshold in pooled
    assert all("capacity must be at least the rows of targets, 8, got 2" in rank["error"] for rank in ranks)
    (weights, many, pairs, one, cls), (other_weights, _, other_pairs, _, _) = (rank["norms"] for rank in ranks)
    assert many == pytest.approx((weights + other_weights) / 2, rel=1e-5)
    assert one == pytest.approx((pairs + other_pairs) / 2, rel=1e-5)
    assert cls == 1  # one-to-one classes are divided by the pairs of their own rank
