"""The gradient of value by tiles of queries (csrc/ms_deform_attn_tiles.h), by threads of the CPU in place of those of a block."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cpp_module import build
from deform_cases import Case, fused_inputs, random_case
from deform_lanes import STARTS, TABLES, arguments_of, check, dtype_of, expected_plain, fused, gradient_of
from torch import Tensor

# (lanes, channels per lane and queries of a tile; channels that they serve, in slabs too)
SHAPES = (("f32_2x4_16", 8), ("f32_2x4_16", 20), ("f32_4x1_32", 7), ("f64_2x2_16", 4), ("f64_1x8_128", 8))
PYRAMIDS = (((5, 7), (3, 4), (2, 2)), ((10, 3), (5, 2), (1, 1)), ((3, 40), (35, 2)), ((1, 1), (1, 1)), ((0, 4), (3, 3), (4, 0)))


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return build("ms_deform_attn_tiles", Path(tmp_path_factory.mktemp("ms_deform_attn_tiles")))


def run(
    module: ModuleType, name: str, case: Case, inputs: tuple[Tensor, ...], grad: Tensor, lse: Tensor | None = None, **options: Any
) -> tuple[Tensor, int]:
    """Gradient of value, and how many vector atomics it took."""
    arguments = arguments_of(module, name, case, inputs, **options)
    out, atomics = getattr(module, name)(arguments, grad.numpy(), (grad if lse is None else lse).numpy())
    return torch.from_numpy(out), atomics


def encoder_case(shapes: Any, channels: int, name: str, points: Any = 2, batch: int = 2, heads: int = 2) -> Case:
    """A query per token; samples all over the maps and beyond."""
    queries = sum(h * w for h, w in shapes)
    filled = [(max(h, 1), max(w, 1)) for h, w in shapes]  # positions on empty maps count nothing, and must be numbers
    case = random_case(batch, queries, heads, channels, filled, points, dtype=dtype_of(name))
    return Case(case.value[:, :queries].contiguous(), list(shapes), case.locations, case.weights, case.num_points)


@pytest.mark.parametrize("shapes", PYRAMIDS, ids=str)
@pytest.mark.parametrize(("name", "channels"), SHAPES)
@pytest.mark.parametrize("method", [0, 1])
def test_tiles_equal_the_reference(tiles: ModuleType, name: str, channels: int, shapes: Any, method: int) -> None:
    case = encoder_case(shapes, channels, name)
    grad = gradient_of(case)
    actual, _ = run(tiles, name, case, (case.locations, case.weights), grad, method=method)
    check([actual], expected_plain(case, grad, method)[1:2])


@pytest.mark.parametrize("channels", [32, 36])
def test_blocks_as_cuda_has_them(tiles: ModuleType, channels: int) -> None:
    """256 threads: a full tile of 128 queries and a rest of 7, more samples than are sorted at a time, and a slab of one lane."""
    case = encoder_case(((9, 10), (5, 9)), channels, "f32_8x4_128", 5, batch=1, heads=1)
    grad = gradient_of(case)
    actual, _ = run(tiles, "f32_8x4_128", case, (case.locations, case.weights), grad)
    check([actual], expected_plain(case, grad)[1:2])


@pytest.mark.parametrize("points", [(1, 3, 0), (0, 0, 0), (5, 11, 2)], ids=str)
@pytest.mark.parametrize(("name", "channels"), SHAPES)
def test_any_number_of_points(tiles: ModuleType, name: str, channels: int, points: Any) -> None:
    case = encoder_case(PYRAMIDS[0], channels, name, points, batch=1)
    grad = gradient_of(case)
    actual, _ = run(tiles, name, case, (case.locations, case.weights), grad)
    check([actual], expected_plain(case, grad)[1:2])


@pytest.mark.parametrize(("name", "channels"), SHAPES)
@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_tiles_of_the_fused_op(tiles: ModuleType, name: str, channels: int, boxes: bool, shared: bool) -> None:
    case = encoder_case(PYRAMIDS[0], channels, name, (1, 3, 2))
    grad, inputs = gradient_of(case), fused_inputs(case, boxes, shared)
    inputs[2][0, 1, 0, ::2] = -math.inf
    inputs[2][0, 2, 1] = -math.inf
    arguments = (case.value, None, None, *inputs, [n for size in case.shapes for n in size], case.num_points, 0.7)
    lse = fused._reference(*arguments)[1]
    expected = fused._reference_backward(grad, *arguments, lse, False, False)[0]
    check([run(tiles, name, case, inputs, grad, lse, scale=0.7)[0]], [expected])


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("starts", STARTS, ids=str)
@pytest.mark.parametrize("method", [0, 1])
def test_sizes_that_do_not_fit(tiles: ModuleType, table: Any, starts: Any, method: int) -> None:
    """Sizes that only the device knows may be wrong: nothing outside of value is written."""
    case = encoder_case(PYRAMIDS[0], 4, "f64_2x2_16", batch=1)
    grad = gradient_of(case)
    first = None if starts is None else torch.tensor(starts)
    expected = expected_plain(case, grad, method, shapes=torch.tensor(table), starts=first)[1:2]
    case.shapes = list(table)
    options: dict[str, Any] = {"on_device": True, "starts": None if first is None else first.numpy(), "method": method}
    check([run(tiles, "f64_2x2_16", case, (case.locations, case.weights), grad, **options)[0]], expected)


def test_samples_that_are_nowhere(tiles: ModuleType) -> None:
    """They take no atomic and spoil nothing; a NaN that comes in reaches the tokens of its own samples alone."""
    case = encoder_case(PYRAMIDS[0], 8, "f32_2x4_16")
    for i, bad in enumerate((math.nan, math.inf, -math.inf, 1e30)):
        case.locations[0, i, :, 1, i % 2] = bad
        case.weights[0, i, :, 1] = math.nan
    case.weights[1, 4, 1, 2] = math.nan
    grad = gradient_of(case)
    grad[1, 7, 3] = math.nan
    actual, _ = run(tiles, "f32_2x4_16", case, (case.locations, case.weights), grad)
    check([actual], expected_plain(case, grad)[1:2])
    assert 0 < actual.isnan().sum() < 50
    case.locations.fill_(-3.0)
    actual, atomics = run(tiles, "f32_2x4_16", case, (case.locations, case.weights), grad)
    assert atomics == 0
    assert not actual.any()


def test_one_atomic_per_token_that_samples_share(tiles: ModuleType) -> None:
    """128 samples of 64 queries between the same four pixels; eight are sorted at a time, and a group of lanes takes them all."""
    case = encoder_case(((8, 8),), 8, "f32_4x1_32", batch=1, heads=1)
    case.locations.fill_(0.43)
    grad = gradient_of(case)
    actual, atomics = run(tiles, "f32_4x1_32", case, (case.locations, case.weights), grad)
    check([actual], expected_plain(case, grad)[1:2])
    assert atomics == 2 * 128 // 8 * 4  # two slabs of channels


def test_neighbours_share_atomics(tiles: ModuleType) -> None:
    """Queries that look around themselves; 128 of them in a tile, and eight groups of one lane whose parts may cut a run."""
    shapes = ((16, 20), (8, 10), (1, 1))
    case = encoder_case(shapes, 8, "f64_1x8_128", 4, batch=1, heads=1)
    axes = [((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in shapes]
    centres = torch.cat([torch.cartesian_prod(y, x).flip(1) for y, x in axes]).double()  # [S, 2]
    case.locations = centres[None, :, None, None] + 0.03 * (case.locations - 0.5)
    grad = gradient_of(case)
    actual, atomics = run(tiles, "f64_1x8_128", case, (case.locations, case.weights), grad)
    check([actual], expected_plain(case, grad)[1:2])
    assert 0 < atomics < 0.4 * 4 * case.weights.numel()


@pytest.mark.parametrize("change", ["weight", "location"])
def test_one_wrong_sample_shows(tiles: ModuleType, change: str) -> None:
    """The comparison notices one sample of hundreds that counts nothing, or is a pixel off."""
    case = encoder_case(PYRAMIDS[0], 4, "f64_2x2_16")
    case.locations[0, 20, 0, 0] = 0.4
    grad = gradient_of(case)
    actual, _ = run(tiles, "f64_2x2_16", case, (case.locations, case.weights), grad)
    check([actual], expected_plain(case, grad)[1:2])
    if change == "weight":
        case.weights[0, 20, 0, 0] = 0
    else:
        case.locations[0, 20, 0, 0, 0] += 1 / 7
    with pytest.raises(AssertionError):
        check([actual], expected_plain(case, grad)[1:2])
