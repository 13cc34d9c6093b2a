"""The log of a run: `metrics.jsonl`, one JSON object per line, and `results.csv`, which is derived from it."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .evaluation import STAT_NAMES
from .files import write_text

Line = dict[str, Any]


class MetricsLog:
    """Appends lines; each is flushed, so that a killed run loses none that was logged.

    Args:
        folder: the run folder.
        resume_at: iterations done so far. Lines written after them by a run that was killed are dropped: they will come again.
        active: False on ranks that do not log.
    """

    def __init__(self, folder: Path, resume_at: int = 0, active: bool = True) -> None:
        self.path, self.csv_path, self.active = folder / "metrics.jsonl", folder / "results.csv", active
        if active:
            truncate(self.path, resume_at)

    def write(self, kind: str, **values: Any) -> None:
        """Adds one line of type `kind`; numbers that are not finite become null."""
        if not self.active:
            return
        line = json.dumps(_finite({"type": kind, **values}), default=str)
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")

    def write_csv(self) -> None:
        """Writes results.csv anew."""
        if self.active:
            write_text(self.csv_path, results_csv(read_lines(self.path)))


def read_lines(path: Path) -> list[Line]:
    """All complete lines of a metrics file; a last line that was cut off by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for row in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(row)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def truncate(path: Path, iterations: int) -> None:
    """Keeps the lines of the first `iterations` iterations (none for 0) and drops a closing summary."""
    if iterations == 0:
        path.unlink(missing_ok=True)
        return
    keep = [line for line in read_lines(path) if line.get("type") != "summary" and line.get("it", 0) <= iterations]
    write_text(path, "".join(json.dumps(line) + "\n" for line in keep))


def results_csv(lines: Iterable[Line]) -> str:
    """One row per evaluation: iteration, time, learning rate, losses by branch, pseudo labels, the COCO numbers of both models.

    Without any evaluation, one row per train line.
    """
    rows: list[Line] = []
    lines = list(lines)
    if not any(line.get("type") == "eval" for line in lines):
        rows = [{"it": line["it"], **_train_columns(line)} for line in lines if line.get("type") == "train"]
    train: Line = {}
    for line in lines:
        if line.get("type") == "train":
            train = line
        elif line.get("type") == "eval":
            rows.append({"it": line["it"], **_train_columns(train), **_eval_columns(line)})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _train_columns(line: Line) -> Line:
    sums: dict[str, float] = {}
    for name, value in line.get("losses", {}).items():
        branch = name.partition("/")[0]
        sums[f"loss/{branch}"] = sums.get(f"loss/{branch}", 0.0) + (math.nan if value is None else value)
    pseudo = {f"pseudo/{name}": value for name, value in (line.get("pseudo") or {}).items()}
    watched = {f"diagnostics/{name}": value for name, value in (line.get("diagnostics") or {}).items()}
    return {"time": line.get("time"), "lr": line.get("lr"), "loss": line.get("loss"), **sums, **pseudo, **watched}


def _eval_columns(line: Line) -> Line:
    models = [m for m in ("teacher", "student") if line.get(m)]
    return {f"{model}/{name}": line[model][name] for model in models for name in STAT_NAMES}


def _finite(value: Any) -> Any:
    """The same tree with non-finite floats as None: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Means:
    """Running means of device scalars, read by the host only when asked for.

    Values that are not finite are left out of the mean and counted under their name, so that a log can say which loss broke.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._sums: dict[tuple[str, ...], Tensor] = {}  # by the names that came together: [n, 3] sum, finite, not finite

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds scalars. Costs no host sync and a handful of operations, however many scalars there are."""
        names = tuple(values)
        stacked = torch.stack([value.detach().double() for value in values.values()])
        finite = torch.isfinite(stacked)
        rows = torch.stack([torch.where(finite, stacked, 0.0), finite.double(), (~finite).double()], dim=1)
        self._sums[names] = self._sums[names] + rows if names in self._sums else rows

    def read(self) -> tuple[dict[str, float], dict[str, int]]:
        """Means (NaN if nothing finite came) and the counts of non-finite values that are above 0; one device read. Starts anew."""
        if not self._sums:
            return {}, {}
        names = [name for together in self._sums for name in together]
        table = torch.cat(list(self._sums.values())).tolist()
        self._sums.clear()
        totals: dict[str, tuple[float, float, float]] = {}
        for name, row in zip(names, table, strict=True):
            before = totals.get(name, (0.0, 0.0, 0.0))
            totals[name] = (before[0] + row[0], before[1] + row[1], before[2] + row[2])
        means = {name: (total / count if count else math.nan) for name, (total, count, _) in totals.items()}
        return means, {name: int(bad) for name, (_, _, bad) in totals.items() if bad}

    def state_dict(self) -> dict[str, Any]:
        """The sums of the window in progress, so that a resumed run logs the same means."""
        return {"sums": [(list(names), rows.cpu()) for names, rows in self._sums.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._sums = {tuple(names): rows.to(self.device) for names, rows in state["sums"]}
