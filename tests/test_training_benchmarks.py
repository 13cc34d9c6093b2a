"""The training benchmarks: settings that the trainer takes, and a profile of a step that adds up."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ssod_fast.training.config import config_from_tree, resolve

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> ModuleType:
    """A script of benchmarks/training, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"training_benchmark_{name}", ROOT / "benchmarks" / "training" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def real_data() -> ModuleType:
    return load("real_data")


def test_every_recipe_is_a_run_that_the_trainer_takes(real_data: ModuleType) -> None:
    for name, recipe in real_data.RECIPES.items():
        args = argparse.Namespace(set=name, iters=None, device="cpu", threads=1, workers=0, out="runs")
        runs = [resolve(config_from_tree(real_data.config(Path("d"), method, 1, recipe, args))) for method in recipe.methods]
        baseline, semi = runs
        assert (baseline.method_name, semi.method_name) == recipe.methods
        assert (baseline.iters, baseline.lr, baseline.views, baseline.optimizer) == (semi.iters, semi.lr, semi.views, semi.optimizer)
        assert baseline.per_batch[0] == semi.per_batch[0]
        assert baseline.method.ema == semi.method.ema
        assert baseline.name.startswith(recipe.baseline)


def test_tables_follow_from_the_committed_rows(real_data: ModuleType) -> None:
    results = ROOT / "benchmarks" / "results"
    found = [name for name in real_data.RECIPES if (results / f"{name}_cpu.csv").is_file()]
    assert "bccd" in found
    for name in found:
        rows = list(csv.DictReader((results / f"{name}_cpu.csv").open()))
        assert real_data.table(rows, real_data.RECIPES[name].methods) + "\n" == (results / f"{name}_cpu.md").read_text()


@pytest.fixture(scope="module")
def semi_detr_profile() -> Iterator[ModuleType]:
    before = list(sys.path)
    yield load("semi_detr_profile")
    sys.path[:] = before


def test_clock_gives_every_moment_to_the_innermost_part(semi_detr_profile: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr(semi_detr_profile.time, "process_time", lambda: next(now))
    clock = semi_detr_profile.Clock()
    with clock.part("outer"), clock.part("inner"):
        pass
    assert dict(clock.seconds) == {"outer": 2.0 + 4.0, "inner": 3.0}


def test_profile_of_a_step_adds_up(semi_detr_profile: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--width", "32", "--layers", "1", "--queries", "20", "--ffn", "32", "--height", "64", "--width-px", "64", "--classes", "5"]
    monkeypatch.setattr(sys, "argv", ["profile", "--model", "own:dino_tiny", "--unlabeled", "1", *sizes])
    args = semi_detr_profile.parse()
    model = semi_detr_profile.make_model(args)
    batches = semi_detr_profile.make_batches(0, args.labeled, args.unlabeled, (args.height, args.width_px))
    before = {name: value for name, value in vars(model.student.network).items() if callable(value)}
    rows = [row for stage in (1, 2) for row in semi_detr_profile.profile(model, batches, stage, repeats=1)]
    assert {name: value for name, value in vars(model.student.network).items() if callable(value)} == before  # no timer stays behind
    seconds = {(row["stage"], row["step"], row["part"]): row["seconds"] for row in rows}
    steps = dict.fromkeys(step for _, step, _ in seconds)
    assert len(steps) == 9
    for stage in (1, 2):
        for step in steps:
            parts = sum(seconds[stage, step, part] for part in semi_detr_profile.PARTS)
            assert parts == pytest.approx(seconds[stage, step, "total"])
            assert seconds[stage, step, "backward"] > 0
    shipped = semi_detr_profile.SHIPPED
    assert seconds[1, shipped, "projector"] > 0
    assert seconds[2, shipped, "projector"] == seconds[2, shipped, "mining"] == 0
    table = semi_detr_profile.table(rows, "said")
    assert table.count("| as released |") == 2
    assert "1.00 x" in table


def test_a_step_with_other_gradients_is_no_measurement(semi_detr_profile: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = iter([1.0] * 7 + [2.0])
    monkeypatch.setattr(semi_detr_profile, "slow_steps", lambda model: [(name, None) for name in (*"abcdefg", semi_detr_profile.SHIPPED)])
    monkeypatch.setattr(semi_detr_profile, "measure", lambda *args: ({}, next(norms)))
    with pytest.raises(SystemExit, match=r"gradients differ by 0\.5 in their norm"):
        list(semi_detr_profile.profile(None, None, 1, 0))


@pytest.fixture(scope="module")
def ssd_det() -> Iterator[ModuleType]:
    before = list(sys.path)
    yield load("ssd_det")
    sys.path[:] = before


def test_recipes_for_inaccurate_boxes_are_runs_that_the_trainer_takes(ssd_det: ModuleType) -> None:
    for name, recipe in ssd_det.RECIPES.items():
        args = argparse.Namespace(set=name, iters=None, device="cpu", threads=1, workers=0, out=Path("runs"))
        runs = [resolve(config_from_tree(ssd_det.config(run, 1, Path("d.json"), recipe, args))) for run in ssd_det.TITLES]
        assert [run.method_name for run in runs] == ["supervised", "ssd_det", "supervised"]
        for other in runs[1:]:
            for setting in ("iters", "lr", "batch", "views", "optimizer", "schedule", "model", "model_options", "seed"):
                assert getattr(other, setting) == getattr(runs[0], setting)


def test_tables_of_inaccurate_boxes_follow_from_the_committed_rows(ssd_det: ModuleType) -> None:
    results = ROOT / "benchmarks" / "results"
    for file in results.glob("ssd_det_*_curves.csv"):
        stem = file.stem.removesuffix("_curves")
        rows, curves = (list(csv.DictReader((results / f"{name}.csv").open())) for name in (stem, file.stem))
        assert ssd_det.table(rows, curves) + "\n" == (results / f"{stem}.md").read_text()


def test_table_of_inaccurate_boxes_counts_margins_by_seed(ssd_det: ModuleType) -> None:
    boxes = {f"{name} {key}": "0.5" for name in ("noisy", "refined") for key in ("mean_iou", "share_50", "share_75")}
    rows = [
        {"run": run, "seed": seed, "seconds": "10", **dict.fromkeys(ssd_det.METRICS, str(0.1 + 0.2 * better + 0.1 * seed)), **boxes}
        for seed in range(2)
        for better, run in enumerate((ssd_det.PLAIN, ssd_det.METHOD))
    ]
    rows[1]["refined mean_iou"], rows[3]["refined mean_iou"] = "0.6", "0.8"
    curves = [{"seed": seed, "it": it, **dict.fromkeys(ssd_det.SHOWN, str(it / 10))} for seed in range(2) for it in range(10)]
    text = ssd_det.table(rows, curves)
    assert "SSD-Det, noisy boxes minus plain, noisy boxes: AP50 20.00 ± 0.00 points (+20.00, +20.00); AP 20.00" in text
    assert "Margin of the refined boxes: 0.2000 ± 0.1414; by seed +0.1000, +0.3000." in text
    assert "| refined_iou | 0.0000 ± 0.0000 | 0.9000 ± 0.0000 |" in text
