"""Reading of run folders, complete and broken."""

from __future__ import annotations

import json
import math

import pytest

from ssod_fast.report.charts import _dash
from ssod_fast.report.runs import flatten, get, has_values, last_value, number, read_run, read_runs, series


def _write(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return folder


def test_flatten_and_get():
    tree = {"a": {"b": {"c": 1}, "d": [2]}, "sup/cls": 3}
    assert flatten(tree) == {"a.b.c": 1, "a.d": [2], "sup/cls": 3}
    assert get(tree, "a/b/c") == 1
    assert get(tree, "sup/cls") == 3
    assert get(tree, "a/x") is None


@pytest.mark.parametrize("value", [None, "1", True, math.inf, math.nan, [1]])
def test_number_refuses_what_cannot_be_plotted(value):
    assert math.isnan(number(value))


def test_series_turns_missing_truth_into_nan():
    its, values = series([{"it": 1, "AP": -1.0}, {"it": 2}, {"it": 3, "AP": 0.25}], "AP")
    assert its == [1, 3]
    assert math.isnan(values[0])
    assert values[1] == 0.25
    assert last_value((its, values)) == 0.25
    assert not has_values(([1], [math.nan]))


def test_resumed_run_keeps_the_later_line(tmp_path):
    folder = _write(
        tmp_path / "run",
        {"type": "train", "it": 10, "loss": 5.0},
        {"type": "train", "it": 20, "loss": 4.0},
        {"type": "train", "it": 10, "loss": 3.0},
    )
    run = read_run(folder)
    assert [(line["it"], line["loss"]) for line in run.train] == [(10, 3.0), (20, 4.0)]


def test_cut_line_is_named(tmp_path):
    run = read_run(_write(tmp_path / "run", {"type": "train", "it": 1, "loss": 1.0}, '{"type": "train", "it": 2, "lo'))
    assert len(run.train) == 1
    assert any("line 2 is not valid JSON (the run was probably stopped" in problem for problem in run.problems)


def test_damage_in_the_middle_and_lines_of_no_type(tmp_path):
    run = read_run(_write(tmp_path / "run", "garbage", [1, 2], {"type": "train", "it": 1, "loss": float("nan")}))
    text = " ".join(run.problems)
    assert "line 1 is not valid JSON (damaged)" in text
    assert "line 2 is not an object with a type" in text
    assert "not finite in 1 logged iteration(s): 1" in text
    assert "env.json is missing" in text


def test_hidden_truth_wins_over_the_stand_in(tmp_path):
    lines = [{"type": "quality", "it": 5, "source": s, "precision": p} for s, p in (("hidden", 0.5), ("val", 0.9))]
    assert series(read_run(_write(tmp_path / "run", *lines)).quality, "precision") == ([5], [0.5])


def test_labels_are_made_unique(tmp_path):
    a = _write(tmp_path / "a" / "mixpl", {"type": "run", "name": "mixpl"})
    b = _write(tmp_path / "b" / "mixpl", {"type": "run", "name": "mixpl"})
    assert [run.label for run in read_runs([a, b])] == ["a/mixpl", "b/mixpl"]
    assert [run.label for run in read_runs([a, a])] == ["a/mixpl #1", "a/mixpl #2"]


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="at least one run folder, got none"):
        read_runs([])
    with pytest.raises(ValueError, match=r"not a folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"run folder with metrics.jsonl, got"):
        read_run(tmp_path)


@pytest.mark.parametrize(("method", "teacher", "expected"), [("mixpl", 1, "teacher"), ("mixpl", 0, "student"), ("semi_detr", 1, "student")])
def test_reported_model(tmp_path, method, teacher, expected):
    line = {"type": "eval", "it": 5, "teacher": {"AP": 0.1} if teacher else None, "student": {"AP": 0.2}}
    run = read_run(_write(tmp_path / "run", {"type": "run", "method": method}, line))
    assert (run.main_model, run.has_teacher) == (expected, bool(teacher))
    dashes = {role: _dash(run, role) for role in ("teacher", "student")}
    assert dashes["student"] == ("--" if teacher else "-")
    assert dashes["teacher"] == "-"
