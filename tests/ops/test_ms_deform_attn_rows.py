"""What lanes of a GPU do for deformable attention (csrc/ms_deform_attn_rows*.h), done by threads of the CPU."""

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

# (name of the lanes, channels that they serve)
LANES = (("f32_2x4", 8), ("f32_4x2", 8), ("f32_8x4", 32), ("f32_2x4_slabs", 20), ("f32_4x1_slabs", 7), ("f64_4x1_slabs", 3))


@pytest.fixture(scope="module")
def lanes(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return build("ms_deform_attn", Path(tmp_path_factory.mktemp("ms_deform_attn")))


def run(module: ModuleType, name: str, case: Case, inputs: tuple[Tensor, ...], grad: Tensor, **options: Any) -> list[Tensor]:
    """Result and gradients by lanes."""
    arguments = arguments_of(module, name, case, inputs, **options)
    out, lse = getattr(module, f"forward_{name}")(arguments)
    grads = [torch.from_numpy(g) for g in getattr(module, f"backward_{name}")(arguments, grad.numpy(), lse)]
    if len(inputs) == 2:
        del grads[1]
        return [torch.from_numpy(out), *grads]
    grads[1] = grads[1].sum(2).view(inputs[0].shape)  # over the heads
    return [torch.from_numpy(out), torch.from_numpy(lse), *grads]


@pytest.mark.parametrize("points", [2, (1, 3, 0), (5, 4, 2)], ids=str)
@pytest.mark.parametrize(("name", "channels"), LANES)
@pytest.mark.parametrize("method", [0, 1])
def test_lanes_equal_the_reference(lanes: ModuleType, name: str, channels: int, points: Any, method: int) -> None:
    case = random_case(2, 7, 2, channels, points=points, dtype=dtype_of(name))
    grad = gradient_of(case)
    check(run(lanes, name, case, (case.locations, case.weights), grad, method=method), expected_plain(case, grad, method))


@pytest.mark.parametrize("points", [(1, 3, 0), (5, 4, 2)], ids=str)
@pytest.mark.parametrize(("name", "channels"), LANES)
@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_fused_lanes_equal_the_reference(lanes: ModuleType, name: str, channels: int, points: Any, boxes: bool, shared: bool) -> None:
    case = random_case(2, 5, 2, channels, points=points, dtype=dtype_of(name))
    grad, inputs = gradient_of(case), fused_inputs(case, boxes, shared)
    inputs[2][0, 1, 0, ::2] = -math.inf
    inputs[2][0, 2, 1] = -math.inf
    inputs[2][1, 0, 0, 1] = math.nan
    arguments = (case.value, None, None, *inputs, [n for size in case.shapes for n in size], case.num_points, 0.7)
    out, lse = fused._reference(*arguments)
    expected = [out, lse, *fused._reference_backward(grad, *arguments, lse, True, False)]
    check(run(lanes, name, case, inputs, grad, scale=0.7), expected)


@pytest.mark.parametrize("sizes", [((8, 8), (4, 4)), ((10, 3), (5, 2), (1, 1)), ((3, 40),)], ids=str)
def test_queries_in_strips(lanes: ModuleType, sizes: Any) -> None:
    tokens = sum(h * w for h, w in sizes)
    case = random_case(2, tokens, 1, 8, sizes, 1)
    grad = gradient_of(case)
    check(run(lanes, "f32_2x4", case, (case.locations, case.weights), grad), expected_plain(case, grad))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("starts", STARTS, ids=str)
@pytest.mark.parametrize("queries", [4, 51])
def test_sizes_that_do_not_fit(lanes: ModuleType, table: Any, starts: Any, queries: int) -> None:
    """Sizes that only the device knows may be wrong: nothing outside of value is read or written."""
    case = random_case(1, queries, 1, 8)
    room = torch.full((1, 251, 1, 8), math.nan)
    room[:, 100:151] = case.value
    grad = gradient_of(case)
    first = None if starts is None else torch.tensor(starts)
    expected = expected_plain(case, grad, shapes=torch.tensor(table), starts=first)
    case.shapes = list(table)
    options = {"on_device": True, "starts": None if first is None else first.numpy()}
    check(run(lanes, "f32_2x4", case, (case.locations, case.weights), grad, **options), expected)


def test_samples_that_are_nowhere(lanes: ModuleType) -> None:
    case = random_case(1, 6, 2, 8)
    case.value[0, 3] = math.nan
    for i, bad in enumerate((math.nan, math.inf, -math.inf, 1e30)):
        case.locations[0, i, :, 1, i % 2] = bad
        case.weights[0, i, 0, 1] = math.nan
    case.weights[0, 4, 1, 2] = math.nan
    grad = gradient_of(case)
    for method in (0, 1):
        check(run(lanes, "f32_2x4", case, (case.locations, case.weights), grad, method=method), expected_plain(case, grad, method))


def ordered(
    module: ModuleType, case: Case, inputs: tuple[Tensor, ...], grad: Tensor, lse: Tensor, run: int, parts: int, **options: Any
) -> Tensor:
    """Gradient of value by owners of tokens."""
    name = "f64" if case.value.dtype == torch.float64 else "f32"
    arguments = arguments_of(module, name, case, inputs, **options)
    return torch.from_numpy(getattr(module, f"ordered_{name}")(arguments, grad.numpy(), lse.numpy(), run, parts))


@pytest.mark.parametrize("run", [1, 7, 64])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", [0, 1])
def test_owners_of_tokens_equal_the_reference(lanes: ModuleType, run: int, parts: int, dtype: torch.dtype, method: int) -> None:
    case = random_case(2, 5, 2, 5, points=(1, 3, 0), dtype=dtype)
    case.locations[0, 1, :, 1] = math.nan
    grad = gradient_of(case)
    actual = ordered(lanes, case, (case.locations, case.weights), grad, grad, run, parts, method=method)
    check([actual], expected_plain(case, grad, method)[1:2])


@pytest.mark.parametrize("boxes", [True, False])
def test_owners_of_tokens_of_the_fused_op(lanes: ModuleType, boxes: bool) -> None:
    case = random_case(2, 5, 2, 5, points=(1, 3, 2))
    grad, inputs = gradient_of(case), fused_inputs(case, boxes)
    arguments = (case.value, None, None, *inputs, [n for size in case.shapes for n in size], case.num_points, 0.7)
    lse = fused._reference(*arguments)[1]
    expected = fused._reference_backward(grad, *arguments, lse, False, False)[0]
    check([ordered(lanes, case, inputs, grad, lse, 16, 2, scale=0.7)], [expected])


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("starts", STARTS, ids=str)
def test_owners_of_tokens_with_sizes_that_do_not_fit(lanes: ModuleType, table: Any, starts: Any) -> None:
    case = random_case(1, 9, 1, 3)
    grad = gradient_of(case)
    first = None if starts is None else torch.tensor(starts)
    expected = expected_plain(case, grad, shapes=torch.tensor(table), starts=first)[1:2]
    case.shapes = list(table)
    options = {"on_device": True, "starts": None if first is None else first.numpy()}
    check([ordered(lanes, case, (case.locations, case.weights), grad, grad, 16, 2, **options)], expected)


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32])
def test_groups_meet_in_no_slot_and_no_bank(lanes: ModuleType, size: int) -> None:
    """Eight lanes at a time read or write 16 bytes each, and eight neighbouring slots are all banks there are."""
    groups, room = getattr(lanes, f"slots_{size}")()
    slots = [slot for group in groups for slot in group]  # by lane of the warp
    assert len(set(slots)) == 32
    assert 0 <= min(slots) <= max(slots) < room
    for first in range(0, 32, 8):
        assert len({slot % 8 for slot in slots[first : first + 8]}) == 8
        for sample in range(size):
            read = {groups[lane // size][sample] for lane in range(first, first + 8)}
            assert len({slot % 8 for slot in read}) == len(read)


def test_golden_strip_order(lanes: ModuleType) -> None:
    columns = [[x + 3 * y for y in range(8)] for x in range(3)]
    assert lanes.strip_order(10, 3).tolist() == [*columns[0], *columns[1], *columns[2], 24, 27, 25, 28, 26, 29]


@pytest.mark.parametrize("height", [1, 7, 8, 9, 16, 23])
@pytest.mark.parametrize("width", [1, 2, 5, 64])
def test_strip_order_takes_every_pixel_once(lanes: ModuleType, height: int, width: int) -> None:
    assert sorted(lanes.strip_order(height, width).tolist()) == list(range(height * width))
