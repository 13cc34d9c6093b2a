from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from ssod_fast.training.evaluation import STAT_NAMES
from ssod_fast.training.files import atomic, previous, require_writable, write_text
from ssod_fast.training.metrics import Means, MetricsLog, read_lines, results_csv


def test_lines_and_csv(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write("run", name="x")
    log.write("train", it=2, time=0.5, lr=0.1, loss=3.0, losses={"sup/a": 1.0, "sup/b": 1.5, "mixup/a": 0.5}, pseudo={"gate": 1.0})
    student = dict.fromkeys(STAT_NAMES, 0.25)
    log.write("eval", it=2, student={**student, "per_class": {}}, teacher=None)
    log.write_csv()
    header, row = (tmp_path / "results.csv").read_text().splitlines()
    values = dict(zip(header.split(","), row.split(","), strict=True))
    assert values["it"] == "2"
    assert (values["loss/sup"], values["loss/mixup"], values["pseudo/gate"]) == ("2.5", "0.5", "1.0")
    assert values["student/AP50"] == "0.25"
    assert "teacher/AP" not in values


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write("train", it=1, loss=math.nan, losses={"sup/a": math.inf})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"type": "train", "it": 1, "loss": None, "losses": {"sup/a": None}}


def test_resume_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write("run", name="x")
    for it in range(1, 6):
        log.write("train", it=it)
    log.write("summary", it=5)
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"type": "train", "it"')
    MetricsLog(tmp_path, resume_at=3)
    assert [line.get("it") for line in read_lines(tmp_path / "metrics.jsonl")] == [None, 1, 2, 3]
    MetricsLog(tmp_path)
    assert read_lines(tmp_path / "metrics.jsonl") == []


def test_csv_columns_grow_when_a_branch_appears() -> None:
    stats = dict.fromkeys(STAT_NAMES, 0.0)
    lines = [
        {"type": "train", "it": 1, "losses": {"sup/a": 1.0}},
        {"type": "eval", "it": 1, "student": stats},
        {"type": "train", "it": 2, "losses": {"sup/a": 1.0, "mosaic/a": 2.0}},
        {"type": "eval", "it": 2, "student": stats},
    ]
    header, first, second = (row.split(",") for row in results_csv(lines).splitlines())
    column = header.index("loss/mosaic")
    assert (first[column], second[column]) == ("", "2.0")


def test_means_name_the_loss_that_broke() -> None:
    means = Means()
    means.add({"sup/a": torch.tensor(1.0), "mixup/a": torch.tensor(float("nan"))})
    means.add({"sup/a": torch.tensor(3.0), "mixup/a": torch.tensor(4.0)})
    copy = Means()
    copy.load_state_dict(means.state_dict())
    assert means.read() == ({"sup/a": 2.0, "mixup/a": 4.0}, {"mixup/a": 1})
    assert means.read() == ({}, {})
    assert copy.read() == ({"sup/a": 2.0, "mixup/a": 4.0}, {"mixup/a": 1})


def test_atomic_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail() -> None:
        with atomic(path, keep_previous=True) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic(path, keep_previous=True) as temporary:
        temporary.write_text("new")
    assert (path.read_text(), previous(path).read_text()) == ("new", "old")


def test_atomic_files_have_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("")
    with atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("x")
        temporary.chmod(0o600)
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


def test_unwritable_run_folder_is_named(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(PermissionError, match=r"cannot write to the folder .*choose another with --out"):
        require_writable(blocker / "run")
