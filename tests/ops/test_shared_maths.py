"""The maths that CPU and CUDA kernels share (csrc/boxes.h), called pair by pair through a module that only this test builds."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch
from box_cases import GOLDEN, GOLDEN_GRADS, GOLDEN_MODES, MODES, A, random_boxes, rules
from conftest import ROOT

from ssod_fast.ops import _overlaps
from ssod_fast.ops._boxes import Rule, make_rule


@pytest.fixture(scope="module")
def maths(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The compiled module, built with the flags that the package is built with."""
    import pybind11  # here, so that the GPU tests beside this file are collected without it

    library = Path(tmp_path_factory.mktemp("shared_maths")) / f"shared_maths{sysconfig.get_config_var('EXT_SUFFIX')}"
    source = ROOT / "tests" / "cpp" / "shared_maths.cpp"
    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [os.environ.get("CXX", "c++"), "-O1", "-std=c++20", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"]
    subprocess.run([*command, *(f"-I{path}" for path in includes), str(source), "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("shared_maths", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("column", range(4), ids=GOLDEN_MODES)
def test_golden_table(maths: ModuleType, column: int) -> None:
    for box, values in GOLDEN.items():
        mode = MODES.index(GOLDEN_MODES[column])
        assert maths.overlap_f64(A, box, mode, 0, 0, 0.0) == pytest.approx(values[column], abs=1e-9)
        assert maths.overlap_f32(A, box, mode, 0, 0, 0.0) == pytest.approx(values[column], abs=1e-6)


@pytest.mark.parametrize(("mode", "box"), list(GOLDEN_GRADS), ids=str)
def test_golden_gradients(maths: ModuleType, mode: str, box: tuple[float, ...]) -> None:
    grad, _ = maths.gradients_f64(A, box, MODES.index(mode), 0, 0, 0.0, 1.0, False)
    assert grad == pytest.approx(GOLDEN_GRADS[mode, box], abs=1e-10)


def corners(boxes: torch.Tensor, rule: Rule) -> _overlaps.Corners:
    return _overlaps.corners(boxes, rule)


@pytest.mark.parametrize(("mode", "fmt", "eps_mode", "eps"), rules())
def test_equals_python_reference(maths: ModuleType, mode: str, fmt: str, eps_mode: str, eps: float) -> None:
    rule = make_rule(mode, fmt, eps_mode, eps)
    boxes1, boxes2 = random_boxes(40, dtype=torch.float64), random_boxes(40, seed=1, dtype=torch.float64).flip(0)
    a, b = corners(boxes1, rule), corners(boxes2, rule)
    expected = _overlaps.overlaps(a, b, rule, nan_zero=False)
    pairs = list(zip(boxes1.tolist(), boxes2.tolist(), strict=True))
    actual = torch.tensor([maths.overlap_f64(x, y, *rule) for x, y in pairs], dtype=torch.float64)
    torch.testing.assert_close(actual, expected, atol=1e-14, rtol=1e-14, equal_nan=True)
    for nan_zero in (False, True):
        grads = torch.tensor([maths.gradients_f64(x, y, *rule, 0.7, nan_zero) for x, y in pairs], dtype=torch.float64)
        reference = _overlaps.overlap_gradients(torch.full((40,), 0.7, dtype=torch.float64), a, b, rule, nan_zero)
        torch.testing.assert_close(grads, torch.stack(reference, 1), atol=1e-12, rtol=1e-12, equal_nan=True)
