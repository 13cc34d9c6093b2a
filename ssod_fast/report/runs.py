"""Reads a run folder for the report and never fails on a broken one: what is missing is listed in words instead."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]
Series = tuple[list[int], list[float]]  # iterations, values (NaN where a value is missing or not finite)

BASELINE_METHOD = "supervised"
# Methods that look at labelled images alone.
WITHOUT_PSEUDO_LABELS = (BASELINE_METHOD, "ssd_det")
# Methods whose published numbers are those of the student; the teacher is shown beside it.
REPORTS_STUDENT = ("semi_detr",)
# Files of a run folder without which the page says what it cannot show.
METRICS_FILE = "metrics.jsonl"


class NoRunError(ValueError):
    """A folder that holds no run."""


@dataclass(frozen=True)
class Run:
    """One training run as far as it can be read.

    Attributes:
        folder: the run folder.
        label: short unique name on the page.
        info: the `run` line of metrics.jsonl (method, classes, counts, seed, resolved config).
        train: training lines, ascending and unique in `it`; after a resume the later line wins.
        evals: evaluation lines, likewise.
        quality: pseudo-label quality lines, likewise.
        events: messages in the order in which they were written.
        summary: the closing line, empty when the run did not finish.
        env: versions and hardware.
        problems: what is missing or damaged, one sentence each.
    """

    folder: Path
    label: str
    info: Json
    train: list[Json]
    evals: list[Json]
    quality: list[Json]
    events: list[Json]
    summary: Json
    env: Json
    problems: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        """Name of the method, `unknown` when the run line is missing."""
        return str(self.info.get("method", "unknown"))

    @property
    def is_baseline(self) -> bool:
        """Whether this is the supervised baseline."""
        return self.method == BASELINE_METHOD

    @property
    def has_pseudo_labels(self) -> bool:
        """Whether the method is one that learns from unlabelled images."""
        return self.method not in WITHOUT_PSEUDO_LABELS

    @property
    def classes(self) -> list[str]:
        """Class names in label order."""
        return [str(name) for name in self.info.get("classes") or []]

    @property
    def config(self) -> Json:
        """The resolved config, flattened to dotted keys."""
        return flatten(self.info.get("config") or {})

    @property
    def last_iteration(self) -> int:
        """The last iteration that any line mentions."""
        return max((int(line["it"]) for line in (*self.train, *self.evals)), default=0)

    @property
    def knows_hidden_truth(self) -> bool:
        """Whether pseudo labels were judged by the truth of the unlabelled images, not by the validation images as a stand-in."""
        return any(line.get("source") == "hidden" for line in self.quality)

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher was evaluated."""
        return any(line.get("teacher") for line in self.evals)

    @property
    def main_model(self) -> str:
        """The reported model: the teacher where there is one and the method's publication does not report the student."""
        return "teacher" if self.has_teacher and self.method not in REPORTS_STUDENT else "student"


def flatten(tree: Any, prefix: str = "") -> Json:
    """Nested mappings as one mapping with dotted keys; other values are kept as they are."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: Json = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def number(value: Any) -> float:
    """Float of a JSON value; NaN for None, text, booleans, infinities and other things that cannot be plotted."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return math.nan
    return float(value)


def get(tree: Any, path: str) -> Any:
    """Value at `a/b/c`, None when a step is missing. Keys that contain a slash themselves are found as well."""
    if isinstance(tree, dict) and path in tree:
        return tree[path]
    head, _, rest = path.partition("/")
    return get(tree[head], rest) if rest and isinstance(tree, dict) and head in tree else None


def series(lines: Iterable[Json], path: str) -> Series:
    """The values at `path` of all lines that carry it; metric values of -1 (COCO's "no ground truth") become NaN."""
    points = [(int(line["it"]), number(get(line, path))) for line in lines if get(line, path) is not None]
    return [it for it, _ in points], [math.nan if value == -1.0 else value for _, value in points]


def has_values(curve: Series) -> bool:
    """Whether there is at least one finite value."""
    return any(math.isfinite(value) for value in curve[1])


def last_value(curve: Series) -> float:
    """The last finite value, NaN if none."""
    return next((value for value in reversed(curve[1]) if math.isfinite(value)), math.nan)


def iterations_total(run: Run) -> int | None:
    """Planned length of the schedule, None when the config does not name it."""
    config = run.config
    for key in ("iters", "iterations", "schedule.iters", "schedule.iterations", "max_iters"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return None


def duration_seconds(run: Run) -> float:
    """Wall-clock time of the run as its own lines state it, NaN if unknown."""
    named = [number(run.summary.get(key)) for key in ("seconds", "duration", "duration_s", "time", "wall_s")]
    stated = [value for value in named if math.isfinite(value)]
    logged = [number(line.get("time")) for line in (*run.train, *run.evals)]
    return stated[0] if stated else max((value for value in logged if math.isfinite(value)), default=math.nan)


def _parse_lines(path: Path, problems: list[str]) -> Iterator[Json]:
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = text.splitlines()
    for i, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            line = json.loads(row)
        except json.JSONDecodeError:
            cause = "the run was probably stopped while writing it" if i == len(rows) else "damaged"
            problems.append(f"{METRICS_FILE}: line {i} is not valid JSON ({cause}); it was left out.")
            continue
        if isinstance(line, dict) and isinstance(line.get("type"), str):
            yield line
        else:
            problems.append(f"{METRICS_FILE}: line {i} is not an object with a type; it was left out.")


def _unique_by_iteration(lines: Iterable[Json]) -> list[Json]:
    """One line for each iteration in ascending order; a resumed run repeats iterations and its later line wins."""
    kept = {int(line["it"]): line for line in lines if isinstance(line.get("it"), int)}
    return [kept[it] for it in sorted(kept)]


def _read_json(path: Path, problems: list[str]) -> Json:
    if not path.is_file():
        problems.append(f"{path.name} is missing.")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError:
        problems.append(f"{path.name} is not valid JSON.")
        return {}
    return content if isinstance(content, dict) else {}


def _describe_gaps(run: Run) -> list[str]:
    """Sentences about what a complete run would have and this one has not."""
    gaps = []
    if not run.info:
        gaps.append("The line that describes the run is missing: method, classes and config are unknown.")
    if not run.summary:
        total = iterations_total(run)
        planned = f" of {total}" if total else ""
        gaps.append(f"The run did not finish (no closing line): the last logged iteration is {run.last_iteration}{planned}.")
    if not run.train:
        gaps.append("No training line: there are no loss curves.")
    if not run.evals:
        gaps.append("No evaluation line: there is no AP.")
    if run.has_pseudo_labels and not run.quality:
        gaps.append("No pseudo-label quality was logged: without hidden or validation truth, precision and recall are unknown.")
    if broken := _non_finite_iterations(run):
        shown = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        gaps.append(f"The loss is not finite in {len(broken)} logged iteration(s): {shown}.")
    return gaps


def _non_finite_iterations(run: Run) -> list[int]:
    return [int(line["it"]) for line in run.train if "loss" in line and math.isnan(number(line["loss"]))]


def read_run(folder: Path, label: str | None = None) -> Run:
    """Reads one run folder.

    Args:
        folder: the folder that holds metrics.jsonl.
        label: name on the page; default: the name in the run line, else the folder name.

    Raises:
        NoRunError: the folder does not exist or has no metrics.jsonl, so that there is nothing to report.
    """
    if not folder.is_dir():
        raise NoRunError(f"runs: expected a run folder, got {str(folder)!r}, which is not a folder")
    if not (folder / METRICS_FILE).is_file():
        raise NoRunError(f"runs: expected a run folder with {METRICS_FILE}, got {str(folder)!r} without it")
    problems: list[str] = []
    by_type: dict[str, list[Json]] = {}
    for line in _parse_lines(folder / METRICS_FILE, problems):
        by_type.setdefault(line["type"], []).append(line)
    info = (by_type.get("run") or [{}])[-1]
    run = Run(
        folder=folder,
        label=label or str(info.get("name") or folder.name),
        info=info,
        train=_unique_by_iteration(by_type.get("train", [])),
        evals=_unique_by_iteration(by_type.get("eval", [])),
        quality=_unique_by_iteration(_best_quality_source(by_type.get("quality", []))),
        events=by_type.get("event", []),
        summary=(by_type.get("summary") or [{}])[-1],
        env=_read_json(folder / "env.json", problems),
        problems=problems,
    )
    problems.extend(_describe_gaps(run))
    return run


def _best_quality_source(lines: list[Json]) -> list[Json]:
    """Hidden truth of the unlabelled images where it was given, else the validation set as a stand-in; never both in one curve."""
    hidden = [line for line in lines if line.get("source") == "hidden"]
    return hidden or lines


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads several run folders and makes their labels unique.

    Raises:
        ValueError: no folder was given, or one of them cannot be reported.
    """
    if not folders:
        raise ValueError("runs: expected at least one run folder, got none")
    runs = [read_run(Path(folder)) for folder in folders]
    labels = [run.label for run in runs]
    unique = [run.label if labels.count(run.label) == 1 else _long_label(run, i) for i, run in enumerate(runs, start=1)]
    if len(set(unique)) < len(unique):
        unique = [f"{label} #{i}" for i, label in enumerate(unique, start=1)]
    return [_relabel(run, label) for run, label in zip(runs, unique, strict=True)]


def _long_label(run: Run, position: int) -> str:
    return f"{run.folder.parent.name}/{run.folder.name}" if run.folder.parent.name else f"{run.label} #{position}"


def _relabel(run: Run, label: str) -> Run:
    return run if run.label == label else Run(**{**run.__dict__, "label": label})
