"""The benchmark of SSD-Det's step: all ways compute the same, times add up, what differs is refused."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SIZES = ["--channels", "4", "--hidden", "16", "--height", "128", "--width", "160", "--negatives", "10", "--boxes", "3", "--classes", "5"]


@pytest.fixture(scope="module")
def step() -> Iterator[ModuleType]:
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("ssd_det_step_benchmark", ROOT / "benchmarks" / "methods" / "ssd_det_step.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def test_ways_agree_and_parts_add_up(step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["step", *SIZES])
    args = step.parse()
    refiner, scene = (make(args, torch.device("cpu")) for make in (step.make_refiner, step.make_scene))
    before = {name: getattr(step.ours, name) for name in step.OURS}
    rows = step.profile(refiner, scene, repeats=1)
    assert {name: getattr(step.ours, name) for name in step.OURS} == before  # no timer stays behind
    found = {(row["step"], row["part"]): row for row in rows}
    for name, _ in step.STEPS:
        assert all(found[name, part]["seconds"] >= 0 for part in step.PARTS)
        assert found[name, "backward"]["seconds"] > 0
        assert found[name, "pooling"]["seconds"] > 0
    released, shipped = (found[name, "total"] for name in (step.STEPS[0][0], step.SHIPPED))
    assert shipped["waits"] == 0
    assert released["waits"] > 20
    assert released["operations"] > 4 * shipped["operations"]
    assert found[step.SHIPPED, "unused layers and features"]["seconds"] == 0
    text = step.table(rows, "said")
    assert text.startswith("said\n")
    assert "| as released |" in text
    assert "| 1.00 x |" in text


def test_other_results_are_no_measurement(step: ModuleType) -> None:
    good = step.Result(torch.zeros(1, 4), {"loss": torch.tensor(1.0)}, [torch.ones(3)])
    step.check(good, good, "way")
    for change, message in (
        ({"losses": {"loss": torch.tensor(1.1)}}, "way: loss is"),
        ({"boxes": torch.ones(1, 4)}, "way: refined boxes differ by 1.0 pixels"),
        ({"gradients": [torch.ones(3) * 1.1]}, "way: gradients differ by"),
    ):
        with pytest.raises(SystemExit, match=message):
            step.check(good, dataclasses.replace(good, **change), "way")


def test_table_follows_from_the_committed_rows(step: ModuleType) -> None:
    for file in (ROOT / "benchmarks" / "results").glob("ssd_det_step_*.csv"):
        text = file.with_suffix(".md").read_text()
        rows = list(csv.DictReader(file.open()))
        assert step.table(rows, text.splitlines()[0]) + "\n" == text
