"""The report in a few plain sentences: what was reached, against what, and whether the pseudo labels can be trusted."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from ssod_fast.report.charts import final_metrics, last_per_class
from ssod_fast.report.runs import Run, last_value, number, series

# Config keys that name a run rather than change it.
_NAMING_KEYS = (
    "name",
    "out",
    "overwrite",
    "resume",
    "dry_run",
    "workers",
    "cache_mb",
    "threads",
    "report",
    "log_every",
    "preview_images",
    "eval_every",
    "save_every",
)
# Where the data lies; the labelled images are compared by the hash of their ids instead.
_DATA_KEYS = ("labeled", "unlabeled", "hidden_gt")
# What repeats of one experiment differ in.
_DRAW_KEYS = ("seed", "method.seed", "fold", "seed_offset")
GOOD_PRECISION = 0.7
LOW_RECALL = 0.05  # of a class, below which its pseudo boxes teach nothing
NAMED_CLASSES = 5
LOW_GATE = 0.3
LEVEL = 1.0  # AP50 points that two evaluations of one model easily differ by


def verdict(runs: Sequence[Run]) -> list[str]:
    """Plain sentences for the head of the page; unescaped text."""
    sentences = _comparison(runs) + [_reached(group, _who(group, runs)) for group in repeats(runs)]
    for run in runs:
        if not run.is_baseline:
            sentences += [s for s in (_refined(run), _pseudo_quality(run), _gate(run), _teacher_student(run)) if s]
    return sentences + [s for run in runs for s in [_warnings(run)] if s]


def final_ap(run: Run, metric: str = "AP50", role: str | None = None) -> float:
    """The metric of the reported model at the last evaluation in percent, NaN if there is none."""
    value = number(final_metrics(run, role or run.main_model).get(metric))
    return math.nan if value == -1.0 else 100.0 * value


def repeats(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of runs that differ in seed and fold alone; means over others would mean nothing."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_experiment(run), []).append(run)
    return list(groups.values())


def _experiment(run: Run) -> str:
    """Identity of what was run, how far it came included. A run that logged no settings repeats no other."""
    ignored = {*_NAMING_KEYS, *_DRAW_KEYS, "hidden_gt"}
    settings = {key: value for key, value in run.config.items() if key not in ignored} or run.label
    reached = run.evals[-1]["it"] if run.evals else None
    return json.dumps([run.method, settings, run.info.get("labeled"), reached], sort_keys=True, default=str)


def _who(group: Sequence[Run], runs: Sequence[Run]) -> str:
    """The method, or the names of the runs where the method alone does not say which."""
    if sum(run.method == group[0].method for run in runs) == len(group):
        return "the supervised baseline" if group[0].is_baseline else group[0].method
    names = ", ".join(run.label for run in group)
    return f"the supervised baseline {names}" if group[0].is_baseline else names


def _mean_text(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} (mean ± standard deviation of {len(values)} runs)"


def _reached(group: Sequence[Run], name: str) -> str:
    scored = [run for run in group if math.isfinite(final_ap(run))]
    if not scored:
        return f"{', '.join(run.label for run in group)}: no AP was measured."
    who = name[0].upper() + name[1:] if group[0].is_baseline else f"The {scored[0].main_model} of {name}"
    ap50, ap = (_mean_text([final_ap(run, metric) for run in scored]) for metric in ("AP50", "AP"))
    last = scored[0].evals[-1]["it"]
    return f"{who} reaches AP50 {ap50}, AP {ap} after {last} iterations."


def _comparison(runs: Sequence[Run]) -> list[str]:
    """Difference between each semi-supervised experiment and the baseline most like it, and whether the comparison is fair."""
    groups = repeats([run for run in runs if math.isfinite(final_ap(run))])
    baselines = [group for group in groups if group[0].is_baseline]
    sentences = []
    for group in groups:
        if group[0].is_baseline or not baselines:
            continue
        baseline = min(baselines, key=lambda other: len(_differences(group[0], other[0])))
        gap = statistics.mean(final_ap(run) for run in group) - statistics.mean(final_ap(run) for run in baseline)
        word = "above" if gap > 0 else "below"
        repeated = [] if len(group) == len(baseline) else ["number of repeats"]
        fairness = _fairness([*repeated, *_differences(group[0], baseline[0])])
        sentences.append(f"{_who(group, runs)} is {abs(gap):.1f} AP50 points {word} {_who(baseline, runs)}. {fairness}")
    return sentences


def differing_settings(run: Run, baseline: Run) -> list[str]:
    """Dotted config keys that both runs have with different values, except those that only name the run or belong to the method."""
    a, b = run.config, baseline.config
    ignored = {*_NAMING_KEYS, *_DATA_KEYS}
    shared = [key for key in a if key in b and not key.startswith("method") and key not in ignored]
    return [key for key in shared if _labeled_part(key, a[key]) != _labeled_part(key, b[key])]


def _labeled_part(key: str, value: Any) -> Any:
    """The labelled images of a batch such as "4:4"; every other value as it is."""
    return value.partition(":")[0] if key == "batch" and isinstance(value, str) else value


def _labelled_images(run: Run) -> Any:
    """Identity of the labelled images: the hash of the draw, without a draw the path."""
    return run.info.get("split_hash") or run.config.get("labeled")


def _differences(run: Run, baseline: Run) -> list[str]:
    """What two runs differ in beside the method."""
    differing = differing_settings(run, baseline)
    if _labelled_images(run) != _labelled_images(baseline):
        differing.insert(0, "labelled split")
    if run.info.get("labeled") != baseline.info.get("labeled"):
        differing.insert(0, "number of labelled images")
    return differing


def _fairness(differing: Sequence[str]) -> str:
    if not differing:
        return "Both share the labelled images, the seed and every setting that both have."
    return "Careful, the runs differ in more than the method: " + ", ".join(differing[:8]) + (", ..." if len(differing) > 8 else "") + "."


def _refined(run: Run) -> str:
    """What a refiner made of inaccurate boxes, in the last part of training."""
    noisy, refined = (_recent(run, f"diagnostics/{name}_iou") for name in ("noisy", "refined"))
    if not (math.isfinite(noisy) and math.isfinite(refined)):
        return ""
    word = "better" if refined > noisy else "worse: do not use them"
    return f"{run.label}: refined boxes overlap the clean ones by {refined:.3f} on average, annotated ones by {noisy:.3f}; they are {word}."


def _recent(run: Run, path: str) -> float:
    """Mean over the last tenth of the log, NaN without a value."""
    values = [value for value in series(run.train, path)[1] if math.isfinite(value)]
    return statistics.mean(values[-max(1, len(values) // 10) :]) if values else math.nan


def _pseudo_quality(run: Run) -> str:
    if not run.quality:
        return ""
    last = {key: last_value(series(run.quality, key)) for key in ("precision", "recall", "kept_per_image", "truth_per_image", "thr")}
    if not math.isfinite(last["precision"]):
        return f"{run.label}: no pseudo label was kept at the last evaluation, so their precision is unknown."
    trust = "can be trusted" if last["precision"] >= GOOD_PRECISION else "are often wrong: raise the threshold or burn in longer"
    missed = _missed_classes(run)
    counts = f" ({last['kept_per_image']:.1f} of {last['truth_per_image']:.1f} per image)" if math.isfinite(last["truth_per_image"]) else ""
    threshold = f" above score {last['thr']:g}" if math.isfinite(last["thr"]) else ""
    source = "the hidden truth" if run.knows_hidden_truth else "the validation images, as a stand-in"
    return (
        f"{run.label}: judged by {source}, {100 * last['precision']:.0f} % of the pseudo boxes{threshold} are right and they find "
        f"{100 * last['recall']:.0f} % of the objects{counts}; they {trust}."
        + (f" Of some classes they find almost nothing: {missed}." if missed else "")
    )


def _missed_classes(run: Run) -> str:
    """Names of the classes that occur and whose objects the pseudo labels (almost) never find."""
    rows = {name: row for name, row in last_per_class(run).items() if isinstance(row, dict) and number(row.get("truth")) > 0}
    missed = [name for name, row in rows.items() if not number(row.get("recall")) >= LOW_RECALL]
    return ", ".join(missed[:NAMED_CLASSES]) + (f" and {len(missed) - NAMED_CLASSES} more" if len(missed) > NAMED_CLASSES else "")


def _gate(run: Run) -> str:
    values = [value for value in series(run.train, "pseudo/gate")[1] if math.isfinite(value)]
    if not values:
        return ""
    rate = statistics.mean(values)
    tail = " For most of the run the unlabelled images taught nothing: lower the threshold or burn in longer." if rate < LOW_GATE else ""
    return f"{run.label}: the pseudo-label loss was on in {100 * rate:.0f} % of the logged steps that had pseudo labels.{tail}"


def _teacher_student(run: Run) -> str:
    teacher, student = final_ap(run, role="teacher"), final_ap(run, role="student")
    if not (math.isfinite(teacher) and math.isfinite(student)):
        return ""
    gap = teacher - student
    if abs(gap) <= LEVEL:
        return f"{run.label}: teacher ({teacher:.1f}) and student ({student:.1f}) are level in AP50."
    if gap < 0:
        return f"{run.label}: the teacher ({teacher:.1f}) is worse than its student ({student:.1f}): its moving average is too slow."
    return f"{run.label}: the teacher is {gap:.1f} AP50 points ahead of its student."


def _warnings(run: Run) -> str:
    count = sum(event.get("level") == "warning" for event in run.events)
    return f"{run.label}: {count} warning{'s' if count > 1 else ''} during training, listed below." if count else ""
