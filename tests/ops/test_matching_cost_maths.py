"""What the CPU and CUDA kernels of the matching cost share, run on CPU threads through a module that only this test builds."""

from __future__ import annotations

import importlib
import os
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.cpp_extension
from conftest import ROOT
from cost_cases import CLASS_MODES, random_case
from cpp_module import build
from torch import Tensor

from ssod_fast.ops.matching_cost import CostArguments, cost_arguments, row_keys

op_file = importlib.import_module("ssod_fast.ops.matching_cost")


@pytest.fixture(scope="module")
def maths(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return build("matching_cost", Path(tmp_path_factory.mktemp("matching_cost")))


def units(actual: np.ndarray[Any, Any], exact: np.ndarray[Any, Any]) -> float:
    """Largest error in units in the last place of float32."""
    return float(np.max(np.abs(actual.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)))


def test_exponential(maths: ModuleType) -> None:
    x = np.concatenate([-np.linspace(0, 86.9, 200_001), -np.logspace(-30, 0, 10_001)]).astype(np.float32)
    assert units(maths.exp_down(x), np.exp(x.astype(np.float64))) <= 2
    ends = maths.exp_down(np.array([0, -0.0, -88, -1e30, -np.inf, np.nan], np.float32))
    assert ends[:5].tolist() == [1, 1, 0, 0, 0]
    assert np.isnan(ends[5])
    payloads = np.array([0x7FC00001, 0x7F800001, 0xFFFFFFFF, 0x7FABCDEF], np.uint32).view(np.float32)
    assert np.isnan(maths.exp_down(payloads)).all()


def test_logarithms(maths: ModuleType) -> None:
    everywhere = np.concatenate([np.logspace(-37, 0.4, 200_001), np.linspace(0.5, 2, 100_001)]).astype(np.float32)
    near_one = np.linspace(0.5, 1.01, 100_001).astype(np.float32)
    for function, x in ((maths.log_normal, everywhere), (maths.log_near_one, near_one)):
        exact = np.log(x.astype(np.float64))
        error = np.abs(function(x) - exact)
        assert (error <= 1.3e-7 * np.maximum(1, np.abs(exact))).all()
        assert (error <= 1e-6 * np.abs(exact)).all()
        assert function(np.ones(1, np.float32))[0] == 0


def run(maths: ModuleType, team: tuple[int, int, int], arguments: CostArguments) -> tuple[Tensor, Tensor]:
    name = "matching_cost_f64" if arguments.boxes.dtype is torch.float64 else "matching_cost_f32"
    plain = [a.numpy() if isinstance(a, Tensor) else a for a in arguments]
    cost, keys = getattr(maths, name)(*team, *plain)
    return torch.from_numpy(cost), torch.from_numpy(keys)


@pytest.mark.parametrize("mode", CLASS_MODES)
@pytest.mark.parametrize("team", [(4, 6, 1), (8, 3, 1), (32, 6, 2), (8, 1, 3)], ids=str)
def test_team_equals_op(maths: ModuleType, mode: Any, team: tuple[int, int, int]) -> None:
    for dtype, options in (
        (torch.float32, {}),
        (torch.float32, {"gamma": 1.5, "giou_eps_mode": "max", "box_format": "xyxy"}),
        (torch.float64, {"image_hw": torch.tensor([(2.0, 3.0)] * 4)}),
    ):
        logits, boxes, targets = random_case((5, 0, 9, 1), 13, dtype=dtype)
        logits[0, 0, 2] = torch.nan
        extra = torch.randn(2, 15, 13, dtype=dtype)
        arguments, _ = cost_arguments(logits, boxes, targets, class_mode=mode, extra_cost=extra, **options)  # type: ignore[arg-type]
        cost, keys = run(maths, team, arguments)
        expected, _ = torch.ops.ssod_fast.matching_cost(*arguments, True)
        tolerance = {"atol": 1e-6, "rtol": 1e-6} if mode == "softmax" or dtype is torch.float64 else {"atol": 0, "rtol": 0}
        torch.testing.assert_close(cost, expected, equal_nan=True, **tolerance)
        if dtype is torch.float32:
            assert torch.equal(keys, row_keys(cost))


@pytest.mark.parametrize("team", [(4, 6, 1), (16, 2, 2)], ids=str)
def test_team_fills_rows_of_no_image(maths: ModuleType, team: tuple[int, int, int]) -> None:
    logits, boxes, targets = random_case((4, 0, 3), 9)
    arguments, _ = cost_arguments(logits, boxes, targets)
    cases = [{"offsets": torch.tensor(o)} for o in ([1, 3, 3, 5], [0, 7, 7, 7], [-2, 3, 9, 20], [3, 3, 3, 3])]
    for case in cases:
        wanted = arguments._replace(**case)
        for actual, expected in zip(run(maths, team, wanted), torch.ops.ssod_fast.matching_cost(*wanted, True), strict=True):
            assert torch.equal(actual, expected)
    wide = arguments._replace(
        offsets=None,
        counts=torch.tensor([2, 0, 9]),
        labels=torch.tensor([0, 1, 99, 99, 99, 99, 2, -1, 6]),
        target_boxes=torch.rand(9, 4),
    )
    cost, keys = run(maths, team, wide)
    expected, expected_keys = torch.ops.ssod_fast.matching_cost(*wide, True)
    torch.testing.assert_close(cost, expected, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(keys, expected_keys)
    assert cost[:, 7:].isnan().all()


def test_planes_of_queries_can_be_read(tmp_path: Path) -> None:
    """All of them, also the one of angles, which costs have no use for."""
    program = tmp_path / "query_planes"
    includes = [ROOT / "csrc", *torch.utils.cpp_extension.include_paths()]
    command = [os.environ.get("CXX", "c++"), "-O1", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    subprocess.run([*command, *(f"-I{path}" for path in includes), ROOT / "tests/cpp/query_planes.cpp", "-o", program], check=True)
    assert subprocess.run([program], check=False).returncode == 0
