from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import cpp_module
import pytest
import torch
from box_cases import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import no_sync
from torch import Tensor

from ssod_fast.ops import GMMThreshold, gmm_threshold
from ssod_fast.ops.gmm_threshold import CONSTANT, EMPTY, NOT_CONVERGED, SINGLE, _reference

TWO_CLUSTERS = [0.1, 0.2, 0.25, 0.3, 0.35, 2, 2.2, 2.5, 2.7, 3]
COSTS = [-9, -8.6, -8.4, -8.3, -8.1, -7.8, -2.2, -1.9, -1.5, -1.2, -0.6, 0.3]


def by_reference(values: Tensor, **options: Any) -> GMMThreshold:
    """The reference where a compiled kernel would run."""
    full: dict[str, Any] = {"offsets": None, "counts": None, "reg_covar": 1e-5, "tol": 1e-3, "max_iter": 100, "reverse": False}
    rule = {"density": 0, "posterior": 1}[options.pop("rule", "density")]
    full |= options
    groups = values.shape[0] if values.dim() == 2 else 1
    groups = groups if full["offsets"] is None else len(full["offsets"]) - 1
    index = [full.pop(name) for name in ("offsets", "counts")]
    return GMMThreshold(*_reference(values, *index, groups, *full.values(), rule))


def samples(seed: int, *, offset: float = 0.0, ties: bool = False) -> Tensor:
    """Two clusters of random sizes and widths, float64 [n], shuffled."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

    def cluster(size: int) -> Tensor:
        centre, width = uniform(-8, 0), uniform(0.05, 2)
        return centre + width * torch.randn(size, generator=generator, dtype=torch.float64)

    x = torch.cat([cluster(1 + int(uniform(0, 60))), cluster(1 + int(uniform(0, 60)))])
    x = x[torch.randperm(len(x), generator=generator)]
    return (x.round(decimals=1) if ties else x) + offset


def by_sklearn(values: Tensor, **options: Any) -> tuple[list[float], Any]:
    """Samples that scikit-learn leaves as possible thresholds (several where densities are equal but for rounding), and its model."""
    from sklearn.mixture import GaussianMixture

    x = values.double().numpy()[:, None]
    model = GaussianMixture(
        2,
        covariance_type="full",
        weights_init=[0.5, 0.5],
        means_init=[x.min(0), x.max(0)],
        precisions_init=[[[1.0]], [[1.0]]],
        **({"reg_covar": 1e-5} | options),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        labels = model.fit(x).predict(x)
    chosen = labels == (0 if (labels == 0).any() else 1)
    density = model.score_samples(x)
    return x[chosen & (density >= density[chosen].max() - 1e-12), 0].tolist(), model


def assert_like_sklearn(result: GMMThreshold, values: Tensor, **options: Any) -> None:
    allowed, model = by_sklearn(values, **options)
    assert result.threshold.item() in allowed
    assert result.iterations.item() == model.n_iter_
    assert result.lower_bound.item() == pytest.approx(model.lower_bound_, abs=1e-9)
    assert result.means[0].tolist() == pytest.approx(model.means_[:, 0].tolist(), abs=1e-6)
    assert result.variances[0].tolist() == pytest.approx(model.covariances_[:, 0, 0].tolist(), abs=1e-6)
    assert result.weights[0].tolist() == pytest.approx(model.weights_.tolist(), abs=1e-6)


def assert_equal_fits(a: GMMThreshold, b: GMMThreshold) -> None:
    """Equal but for rounding in the statistics."""
    torch.testing.assert_close(a.statistics, b.statistics, atol=1e-9, rtol=1e-9)
    assert a.counters.dtype == b.counters.dtype == torch.int32
    for name in ("threshold", "keep", "counters"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def parts(result: GMMThreshold) -> dict[str, Tensor]:
    """What a result says of each group, [P, ...]."""
    names = ("threshold", "means", "variances", "weights", "lower_bound", "iterations", "n_used", "flag")
    return {name: getattr(result, name) for name in names}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden(device: str, dtype: torch.dtype) -> None:
    result = gmm_threshold(torch.tensor(TWO_CLUSTERS, dtype=dtype, device=device))
    assert result.threshold.dtype == dtype
    assert result.threshold.item() == 0.25
    assert result.keep.tolist() == [True] * 3 + [False] * 7
    assert result.iterations.item() == 5
    assert result.means.tolist()[0] == pytest.approx([0.24, 2.48], abs=1e-6)
    assert result.variances.tolist()[0] == pytest.approx([0.00741, 0.12561], abs=1e-6)
    assert result.weights.tolist()[0] == pytest.approx([0.5, 0.5], abs=1e-6)
    assert result.lower_bound.item() == pytest.approx(-0.3668539, abs=1e-6)
    assert (result.n_used.item(), result.flag.item()) == (10, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_golden_pair(device: str) -> None:
    result = gmm_threshold(torch.tensor([1.0, 2.0], device=device))
    assert (result.threshold.item(), result.iterations.item()) == (1, 3)
    assert result.means.tolist()[0] == pytest.approx([1.3670364, 1.6329636], abs=1e-6)
    assert result.variances.tolist()[0] == pytest.approx([0.2323307] * 2, abs=1e-6)
    assert result.lower_bound.item() == pytest.approx(-0.7249839, abs=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_golden_mining_costs(device: str) -> None:
    result = gmm_threshold(torch.tensor(COSTS, device=device))
    assert result.threshold.item() == torch.tensor(-8.4).item()
    assert result.keep.sum().item() == 3
    assert result.iterations.item() == 3
    assert result.means.tolist()[0] == pytest.approx([-8.366667, -1.183333], abs=1e-6)
    assert result.variances.sqrt().tolist()[0] == pytest.approx([0.377137, 0.835503], abs=1e-6)
    posterior = gmm_threshold(torch.tensor(COSTS, device=device), rule="posterior")
    assert posterior.keep.tolist() == [True] * 6 + [False] * 6
    assert gmm_threshold(torch.tensor([-5.0, -1.0], device=device)).threshold.item() == -5
    assert gmm_threshold(torch.tensor([-3.25], device=device)).threshold.item() == -3.25


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0.0, 1e3, -1e3])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_sklearn(device: str, offset: float, ties: bool) -> None:
    for seed in range(60):
        values = samples(seed, offset=offset, ties=ties)
        if seed % 3 == 0:
            values = values.float()
        assert_like_sklearn(gmm_threshold(values.to(device)), values)


def test_equals_sklearn_under_other_options() -> None:
    for seed in range(30):
        values = samples(seed)
        for options in ({"reg_covar": 1e-2}, {"tol": 1e-8, "max_iter": 400}, {"max_iter": 2}):
            result = gmm_threshold(values, **options)
            _, model = by_sklearn(values, **options)
            assert_like_sklearn(result, values, **options)
            assert bool(result.flag & NOT_CONVERGED) != model.converged_


def test_equals_sklearn_on_many_samples() -> None:
    values = torch.cat([samples(seed) for seed in range(80)])
    assert len(values) > 3000
    assert_like_sklearn(gmm_threshold(values), values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", ["density", "posterior"])
@pytest.mark.parametrize("reverse", [False, True])
def test_equals_reference(device: str, rule: Any, reverse: bool) -> None:
    sizes = [0, 1, 2, 3, 7, 8, 9, 40, 0, 1000]
    values = torch.cat([torch.cat([samples(7 * i + k) for k in range(30)])[:n] for i, n in enumerate(sizes)])
    values[::50] = math.nan
    values[7::90] = math.inf
    values[11::90] = -math.inf
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    for dtype in (torch.float32, torch.float64):
        typed = values.to(dtype)
        result = gmm_threshold(typed.to(device), offsets=offsets.to(device), rule=rule, reverse=reverse)
        expected = by_reference(typed, offsets=offsets, rule=rule, reverse=reverse)
        assert_equal_fits(GMMThreshold(*(r.cpu() for r in result)), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", ["density", "posterior"])
def test_special_groups(device: str, rule: Any) -> None:
    nan = math.nan
    values = torch.tensor([[nan, math.inf, nan], [nan, 7, nan], [4, 4, 4], [4, nan, 4], [1, 2, 9]], device=device)
    result = gmm_threshold(values, rule=rule)
    assert result.flag.tolist() == [EMPTY, SINGLE, CONSTANT, CONSTANT, 0]
    assert result.n_used.tolist() == [0, 1, 3, 2, 3]
    assert result.threshold[:4].tolist() == [0, 7, 4, 4]
    assert result.keep[:4].tolist() == [[False] * 3, [False, True, False], [True] * 3, [True, False, True]]
    assert result.iterations[0].item() == 0
    assert result.means[:4].tolist() == [[0, 0], [7, 7], [4, 4], [4, 4]]
    assert result.variances[:4].tolist() == [[pytest.approx(1e-5)] * 2] * 4
    assert all(r.isfinite().all() for r in result)


@pytest.mark.parametrize("device", DEVICES)
def test_posterior_rule(device: str) -> None:
    for seed in range(20):
        values = samples(seed).to(device)
        result = gmm_threshold(values, rule="posterior")
        distance = (values[:, None] - result.means).square() / result.variances
        joint = result.weights.log() - 0.5 * (result.variances.log() + distance)
        low = int(result.means[0].argmin())
        labelled = (joint.argmax(1) == low) & (values <= result.means.max())
        expected = values[labelled].max() if labelled.any() else values.min()
        assert result.threshold.item() == expected.item()
    # A wide low cluster and a narrow high one: the far tail beyond the narrow one belongs to the wide one, and is not kept.
    narrow = torch.linspace(2.9, 3.1, 30)
    values = torch.cat([torch.linspace(-4, 2, 40), narrow, torch.tensor([6.0])]).to(device)
    result = gmm_threshold(values, rule="posterior")
    assert 1 < result.threshold.item() < 2.95
    assert not result.keep[-1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_laws(values: list[float], random: Any) -> None:
    x = torch.tensor(values)
    result = gmm_threshold(x)
    assert result.threshold.item() in x.tolist()
    assert torch.equal(result.keep, x <= result.threshold)
    assert result.keep.any()
    negated = gmm_threshold(-x, reverse=True)
    assert torch.equal(negated.threshold, -result.threshold)
    assert torch.equal(negated.keep, result.keep)
    assert torch.equal(negated.means, -result.means)
    mixed = torch.full((2 * len(values) + 3,), math.nan)
    mixed[1 : 1 + 2 * len(values) : 2] = x
    with_nan = gmm_threshold(mixed)
    assert torch.equal(with_nan.keep[1 : 1 + 2 * len(values) : 2], result.keep)
    assert with_nan.keep.sum() == result.keep.sum()
    assert all(torch.equal(a, b) for name, a, b in zip(result._fields, result, with_nan, strict=True) if name != "keep")


@pytest.mark.parametrize("device", DEVICES)
def test_order_and_shift_do_not_matter(device: str) -> None:
    for seed in range(20):
        values = samples(seed).to(device)
        result = gmm_threshold(values)
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).to(device)
        shuffled = gmm_threshold(values[order])
        assert_equal_fits(shuffled._replace(keep=result.keep), result)
        assert torch.equal(shuffled.keep, result.keep[order])
        shifted = gmm_threshold(values + 4096)
        assert torch.equal(shifted.keep, result.keep)
        assert torch.equal(shifted.iterations, result.iterations)
        torch.testing.assert_close(shifted.means - 4096, result.means, atol=1e-8, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_batch_is_singles_and_ragged_is_padded(device: str) -> None:
    groups = [samples(seed).float()[:n].to(device) for seed, n in enumerate((5, 0, 60, 1, 33, 16))]
    counts = torch.tensor([len(g) for g in groups], device=device)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    padded = torch.full((6, 64), -1e9, device=device)  # would be the threshold if it were read
    for row, group in zip(padded, groups, strict=True):
        row[: len(group)] = group
    ragged = gmm_threshold(torch.cat(groups), offsets=offsets.int())
    dense = gmm_threshold(padded, counts=counts.int())
    assert not dense.keep[torch.arange(64, device=device) >= counts[:, None]].any()
    for i, group in enumerate(groups):
        single = gmm_threshold(group)
        for name, value in parts(single).items():
            assert torch.equal(getattr(ragged, name)[i], value[0]), name
            assert torch.equal(getattr(dense, name)[i], value[0]), name
        assert torch.equal(ragged.keep[offsets[i] : offsets[i + 1]], single.keep)
        assert torch.equal(dense.keep[i, : counts[i]], single.keep)


def test_threads_agree() -> None:
    values = torch.stack([torch.cat([samples(seed + k) for k in range(40)])[:500] for seed in range(40)])
    threads, results = torch.get_num_threads(), []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(gmm_threshold(values))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_dtypes_and_layouts(device: str) -> None:
    values = samples(3)[:40].to(device)
    for dtype in (torch.float16, torch.bfloat16):
        half = values.to(dtype)
        result, wide = gmm_threshold(half), gmm_threshold(half.float())
        assert result.threshold.dtype == dtype
        assert result.threshold.float().item() == wide.threshold.item()
        assert torch.equal(result.keep, half <= result.threshold)
    spread = torch.stack([values, values], 1)[:, 0]
    assert not spread.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(gmm_threshold(spread), gmm_threshold(values), strict=True))
    square = torch.stack([values, values - 1]).T.contiguous().T
    assert torch.equal(gmm_threshold(square).keep, gmm_threshold(square.contiguous()).keep)
    assert not any(r.requires_grad for r in gmm_threshold(values.clone().requires_grad_()))


@pytest.mark.parametrize("device", DEVICES)
def test_empty(device: str) -> None:
    assert gmm_threshold(torch.zeros(0, device=device)).flag.tolist() == [EMPTY]
    assert gmm_threshold(torch.zeros(3, 0, device=device)).flag.tolist() == [EMPTY] * 3
    for shape in ((0, 5), (0, 0)):
        result = gmm_threshold(torch.zeros(shape, device=device))
        assert result.threshold.shape == (0,)
        assert result.keep.shape == shape
    none = gmm_threshold(torch.zeros(0, device=device), offsets=torch.zeros(1, dtype=torch.int64, device=device))
    assert none.means.shape == (0, 2)


def test_every_output_is_written(fill_uninitialised: None) -> None:
    values = torch.full((3, 40), math.nan)
    values[1] = samples(1)[:1]
    result = gmm_threshold(values, counts=torch.tensor([0, 20, 40]))
    assert all(r.isfinite().all() for r in result)
    assert result.keep.sum() == 20


def test_huge_values_choose_a_sample() -> None:
    values = torch.tensor([-1e308, 1e308, 0, 5], dtype=torch.float64)  # their squares overflow
    for rule in ("density", "posterior"):
        result, expected = gmm_threshold(values, rule=rule), by_reference(values, rule=rule)  # type: ignore[arg-type]
        assert result.threshold.item() in values.tolist()
        assert torch.equal(result.threshold, expected.threshold)
        assert torch.equal(result.keep, expected.keep)


def test_offsets_on_a_device_are_clamped() -> None:
    """The op itself never trusts offsets and counts: they are not read before the kernel runs."""
    values = samples(5)[:20].contiguous()
    for offsets in ([-5, 10, 99], [3, 10, 12], [12, 4, 20], [30, 40, 50]):
        bounds = torch.tensor(offsets)
        result = torch.ops.ssod_fast.gmm_threshold(values, bounds, None, 2, 1e-5, 1e-3, 100, False, 0)
        ends = bounds.clamp(0, 20).tolist()
        for i in range(2):
            single = gmm_threshold(values[ends[i] : max(ends[i], ends[i + 1])])
            assert torch.equal(result[0][i], single.threshold[0])
    result = torch.ops.ssod_fast.gmm_threshold(values.view(2, 10), None, torch.tensor([-1, 11]), 2, 1e-5, 1e-3, 100, False, 0)
    assert result[3][1].tolist() == [0, 10]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"values": [1.0]}, TypeError, "values must be a tensor, got list"),
        ({"values": torch.zeros(3, dtype=torch.int64)}, TypeError, "values must be float16, bfloat16, float32 or float64, got torch.int64"),
        ({"values": torch.zeros(2, 2, 2)}, ValueError, r"values must have shape \[N\] or \[P, N\], got \[2, 2, 2\]"),
        ({"rule": "mode"}, ValueError, "rule must be 'density' or 'posterior', got 'mode'"),
        ({"reg_covar": 0}, ValueError, "reg_covar must be a finite number > 0, got 0"),
        ({"reg_covar": math.inf}, ValueError, "reg_covar must be a finite number > 0, got inf"),
        ({"tol": -1.0}, ValueError, "tol must be a finite number >= 0, got -1.0"),
        ({"tol": "1"}, TypeError, "tol must be a number, got '1'"),
        ({"reg_covar": True}, TypeError, "reg_covar must be a number, got True"),
        ({"max_iter": 0}, ValueError, r"max_iter must lie in 1\.\.2147483647, got 0"),
        ({"max_iter": 1.5}, TypeError, r"max_iter must be an int, got 1\.5"),
        ({"max_iter": True}, TypeError, "max_iter must be an int, got True"),
        ({"reverse": 1}, TypeError, "reverse must be a bool, got 1"),
        ({"reverse": "no"}, TypeError, "reverse must be a bool, got 'no'"),
        ({"offsets": [0, 6]}, TypeError, "offsets must be a tensor, got list"),
        ({"offsets": torch.tensor([0.0, 6])}, TypeError, "offsets must be int32 or int64, got torch.float32"),
        ({"offsets": torch.tensor([[0, 6]])}, ValueError, r"offsets must have one dimension, got shape \[1, 2\]"),
        ({"offsets": torch.tensor([0, 5])}, ValueError, r"offsets must rise from 0 to the number of samples \(6\), got \[0, 5\]"),
        ({"offsets": torch.tensor([0, 4, 3, 6])}, ValueError, "offsets must rise from 0"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "offsets must rise from 0"),
        (
            {"values": torch.zeros(2, 3), "offsets": torch.tensor([0, 6])},
            ValueError,
            r"must have shape \[N\] when offsets are given",
        ),
        ({"offsets": torch.tensor([0, 6]), "counts": torch.tensor([6])}, ValueError, "offsets and counts must not be given together"),
        ({"counts": torch.tensor([6])}, ValueError, r"values must have shape \[P, N\] when counts are given, got \[6\]"),
        ({"values": torch.zeros(2, 3), "counts": torch.tensor([3])}, ValueError, r"counts must have shape \[2\], got \[1\]"),
        ({"values": torch.zeros(2, 3), "counts": torch.tensor([3, 4])}, ValueError, r"counts must lie in 0\.\.3, got \[3, 4\]"),
        ({"offsets": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "offsets and values must be on one device, got meta"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gmm_threshold(**{"values": torch.zeros(6), **arguments})


def test_opcheck() -> None:
    values, options = samples(2)[:12].contiguous(), (1e-5, 1e-3, 20, False, 0)
    op = torch.ops.ssod_fast.gmm_threshold.default
    torch.library.opcheck(op, (values, None, None, 1, *options))
    torch.library.opcheck(op, (values, torch.tensor([0, 5, 12]), None, 2, *options))
    torch.library.opcheck(op, (values.float().view(2, 6), None, torch.tensor([5, 6]), 2, *options))


def test_compile_and_no_sync() -> None:
    values, offsets = samples(4).float(), torch.tensor([0, 10])
    offsets = torch.cat([offsets, torch.tensor([len(values)])])

    def mine(x: Tensor) -> Tensor:
        result = gmm_threshold(x, offsets=offsets, rule="posterior")
        return result.keep & (x > -7) | (x < result.threshold.min())

    with no_sync():
        expected = mine(values)
        by_reference(values, offsets=offsets)
    assert torch.equal(torch.compile(mine, fullgraph=True, backend="aot_eager")(values), expected)


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cpp_module.build("gmm", Path(tmp_path_factory.mktemp("gmm")))


@pytest.mark.parametrize("threads", [1, 4, 32])
@pytest.mark.parametrize("rule", [0, 1])
def test_a_team_of_threads_finds_the_same(teams: Any, threads: int, rule: int) -> None:
    """What a CUDA block runs, run by threads of the CPU."""
    sizes = [0, 1, 2, 7, 64, 65, 130]
    values = torch.cat([torch.cat([samples(9 * i + k) for k in range(4)])[:n] for i, n in enumerate(sizes)])
    values[5::40] = math.nan
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    padded, counts = torch.cat([values, values[:13]])[: 4 * 70].view(4, 70).float(), torch.tensor([70, 3, 0, 44])
    for reverse in (False, True):
        options = (1e-5, 1e-3, 100, reverse, rule)
        found = teams.gmm_f64(threads, values.numpy(), offsets.numpy(), None, len(sizes), *options)
        expected = _reference(values, offsets, None, len(sizes), *options)
        assert_equal_fits(*(GMMThreshold(*map(torch.as_tensor, r)) for r in (found, expected)))
        found = teams.gmm_f32(threads, padded.numpy(), None, counts.numpy(), 4, *options)
        expected = _reference(padded, None, counts, 4, *options)
        found = (found[0], found[1].reshape(4, 70), *found[2:])
        assert_equal_fits(*(GMMThreshold(*map(torch.as_tensor, r)) for r in (found, expected)))


@pytest.mark.gpu
def test_cuda_graph_replays_changed_samples() -> None:
    values = torch.stack([samples(seed)[:2].repeat(20) for seed in range(8)]).float().cuda()
    counts = torch.full((8,), 40, device="cuda")
    gmm_threshold(values, counts=counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gmm_threshold(values, counts=counts)
    values.copy_(torch.stack([samples(50 + seed)[:2].repeat(20) for seed in range(8)]))
    counts.fill_(30)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, gmm_threshold(values, counts=counts), strict=True))


@pytest.mark.gpu
def test_side_stream() -> None:
    values = samples(1).cuda()
    stream, expected = torch.cuda.Stream(), gmm_threshold(values)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = gmm_threshold(values)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
