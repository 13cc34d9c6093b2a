"""Which figures the report shows: every figure overlays all runs, colour = run, line style = role."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ssod_fast.report import plots
from ssod_fast.report.plots import Bars, Curve, Panel
from ssod_fast.report.runs import Json, Run, Series, get, last_value, number, series

ROLE_DASH = {"teacher": "-", "student": "--"}
METRIC_NAMES = {"AP": "AP (IoU .50 to .95)", "AP50": "AP50", "AP75": "AP75"}
SIZES = ("small", "medium", "large")
MAX_CLASSES = 30


@dataclass(frozen=True)
class Section:
    """A group of figures under one heading."""

    title: str
    intro: str
    panels: list[Panel]


def sections(runs: Sequence[Run]) -> list[Section]:
    """All figures that the data of the runs allows, in reading order; sections without a figure are left out."""
    stand_in = _stand_in(runs)
    plan = [
        ("Accuracy", "Average precision on the validation images, in percent. Solid: teacher, dashed: student.", accuracy(runs)),
        ("Pseudo labels over time", f"What the teacher tells the student about the unlabelled images.{stand_in}", pseudo_over_time(runs)),
        ("Pseudo labels in detail", f"State at the last evaluation that was logged.{stand_in}", pseudo_detail(runs)),
        ("Refined boxes", "How well boxes of the training images overlap the known clean ones.", refined_boxes(runs)),
        ("Losses and learning rate", "Pale: as logged, full: running mean.", losses(runs)),
        ("Time", "Where a training step spends its time.", time_panels(runs)),
    ]
    return [Section(title, intro, [p for p in panels if p]) for title, intro, panels in plan if any(panels)]


def _stand_in(runs: Sequence[Run]) -> str:
    """A sentence on what the pseudo labels were judged by, where that is not the unlabelled images themselves."""
    judged = [run for _, run in _semi(runs) if run.quality]
    proxies = [run.label for run in judged if not run.knows_hidden_truth]
    whose = "" if len(proxies) == len(judged) else f" of {', '.join(proxies)}"
    text = f" The truth of the unlabelled images{whose} is unknown: precision, recall and true objects are those of the validation images,"
    return f"{text} as a stand-in." if proxies else ""


def percent(curve: Series) -> Series:
    """Values times 100."""
    return curve[0], [100.0 * value for value in curve[1]]


def _per_run(runs: Iterable[Run], make: Callable[[Run], Series], *, dash: str = "-", smooth: bool = False, name: str = "") -> list[Curve]:
    return [Curve(f"{run.label}{name}", make(run), i, dash, smooth) for i, run in enumerate(runs)]


def _role_curves(runs: Sequence[Run], metric: str) -> list[Curve]:
    return [
        Curve(f"{run.label} {role}", percent(series(run.evals, f"{role}/{metric}")), i, _dash(run, role))
        for role in ("student", "teacher")
        for i, run in enumerate(runs)
    ]


def _dash(run: Run, role: str) -> str:
    """A run without a teacher has one model only, drawn solid."""
    return ROLE_DASH[role if run.has_teacher else "teacher"]


def accuracy(runs: Sequence[Run]) -> list[Panel | None]:
    """AP curves of both models and the AP of every class at the end."""
    marks = _switches(runs)
    caption = "Dotted: from here on each object is matched with one query." if marks else ""
    curves = [
        plots.lines(f"ap_{m.lower()}", title, _role_curves(runs, m), span=(0, None), marks=marks, caption=caption)
        for m, title in METRIC_NAMES.items()
    ]
    return [*curves, _size_ap(runs), _class_ap(runs)]


def _switches(runs: Sequence[Run]) -> list[float]:
    """Iterations at which runs pass from one-to-many to one-to-one matching, of those that came so far."""
    found = ((run, number(run.config.get("method.switch_at"))) for run in runs)
    return sorted({it for run, it in found if 0 < it < run.last_iteration})


def _size_ap(runs: Sequence[Run]) -> Panel | None:
    groups = [
        Bars(run.label, [last_value(percent(series(run.evals, f"{run.main_model}/AP_{size}"))) for size in SIZES], i)
        for i, run in enumerate(runs)
    ]
    return plots.bars(
        "ap_size", "AP by object size", SIZES, groups, xlabel="AP", caption="Last evaluation; COCO's size limits (32 and 96 pixels)."
    )


def final_metrics(run: Run, role: str) -> Json:
    """The model's entry in the last evaluation that has one, empty if none."""
    return next((line[role] for line in reversed(run.evals) if isinstance(line.get(role), dict)), {})


def class_names(runs: Sequence[Run]) -> list[str]:
    """Class names of all runs, in label order, each once."""
    return list(dict.fromkeys(name for run in runs for name in run.classes))


def _class_ap(runs: Sequence[Run]) -> Panel | None:
    found = [final_metrics(run, run.main_model).get("per_class") or {} for run in runs]
    names = [name for name in class_names(runs) if any(name in table for table in found)][:MAX_CLASSES]
    values = [[_class_value(table, name) for name in names] for table in found]
    groups = [Bars(run.label, row, i) for i, (run, row) in enumerate(zip(runs, values, strict=True))]
    high = max((value for row in values for value in row if math.isfinite(value)), default=0.0)
    span = (-0.03 * high, None) if high else (-0.03, 1.0)  # a dot at 0 is seen whole
    return plots.dots(
        "ap_class", "AP by class", names, groups, xlabel="AP", span=span, caption="Last evaluation, the reported model of each run."
    )


def _class_value(table: Json, name: str) -> float:
    value = number(table.get(name))
    return math.nan if value == -1.0 else 100.0 * value


def _semi(runs: Sequence[Run]) -> list[tuple[int, Run]]:
    return [(i, run) for i, run in enumerate(runs) if not run.is_baseline]


def _quality_curves(runs: Sequence[Run], key: str, *, dash: str = "-", name: str = "") -> list[Curve]:
    return [Curve(f"{run.label}{name}", series(run.quality, key), i, dash) for i, run in _semi(runs)]


def _pseudo_curves(runs: Sequence[Run], key: str, dash: str = "-", name: str = "") -> list[Curve]:
    return [Curve(f"{run.label}{name}", series(run.train, f"pseudo/{key}"), i, dash, smooth=True) for i, run in _semi(runs)]


def pseudo_over_time(runs: Sequence[Run]) -> list[Panel | None]:
    """Precision, recall, box quality, counts, gates and the best score."""
    gates = [*_pseudo_curves(runs, "gate", name=" mixup gate"), *_pseudo_curves(runs, "mosaic_gate", "--", " mosaic gate")]
    best = [*_pseudo_curves(runs, "max_score"), *_quality_curves(runs, "thr", dash=":", name=" threshold")]
    mined = [*_pseudo_curves(runs, "mined_per_image", name=" mined"), *_pseudo_curves(runs, "reliable_per_image", "--", " reliable")]
    return [
        plots.lines(
            "pseudo_precision",
            "Precision of kept boxes",
            _quality_curves(runs, "precision"),
            span=(0, 1.02),
            caption="Share that is right: class and IoU ≥ .5.",
        ),
        plots.lines(
            "pseudo_recall",
            "Recall of kept boxes",
            _quality_curves(runs, "recall"),
            span=(0, 1.02),
            caption="Share of the true objects that are found.",
        ),
        plots.lines("pseudo_iou", "Mean IoU of the right boxes", _quality_curves(runs, "mean_iou"), span=(0.5, 1.0)),
        plots.lines("pseudo_count", "Boxes per image", _count_curves(runs), span=(0, None), caption=_count_caption(runs)),
        plots.lines("pseudo_raw", "Boxes before the score filter, per image", _pseudo_curves(runs, "raw_per_image"), span=(0, None)),
        plots.lines(
            "pseudo_gate",
            "Open rate of the gates",
            gates,
            span=(-0.02, 1.05),
            caption="Solid: mixup, dashed: mosaic. A shut gate switches the pseudo-label loss off.",
        ),
        plots.lines(
            "pseudo_mined",
            "Boxes mined by their matching cost, per image",
            mined,
            span=(0, None),
            caption="Dashed: boxes above their image's own score threshold, solid: those of them that the student matches at a low cost.",
        ),
        plots.lines("pseudo_cost", "Highest cost at which a box is mined", _pseudo_curves(runs, "cost_thr")),
        plots.lines("pseudo_score", "Highest teacher score", best, span=(0, 1.02), caption="Dotted: threshold of the score filter."),
    ]


def _count_curves(runs: Sequence[Run]) -> list[Curve]:
    kept = _pseudo_curves(runs, "kept_per_image", name=" kept")
    return [*kept, *_quality_curves(runs, "truth_per_image", dash=":", name=" truth")]


def _count_caption(runs: Sequence[Run]) -> str:
    has_truth = any(series(run.quality, "truth_per_image")[0] for run in runs)
    return "Solid: kept after the score filter, dotted: true objects." if has_truth else "Kept after the score filter."


def pseudo_detail(runs: Sequence[Run]) -> list[Panel | None]:
    """Threshold curve, recall by size, and the class tail of every run with pseudo-label quality."""
    described = [(i, run) for i, run in _semi(runs) if run.quality]
    tails = [panel for i, run in described for panel in (_tail(i, run, len(described)), _class_quality(i, run, len(described)))]
    return [_threshold_curve(described), _precision_recall(described), _size_recall(described), *tails]


def _last_curve(run: Run) -> Json:
    return next((line["curve"] for line in reversed(run.quality) if isinstance(line.get("curve"), dict)), {})


def _curve_series(curve: Json, x: str, y: str) -> tuple[list[float], list[float]]:
    return [number(v) for v in curve.get(x) or []], [number(v) for v in curve.get(y) or []]


def _threshold_curve(described: list[tuple[int, Run]]) -> Panel | None:
    styles = {"precision": "-", "recall": "--"}
    curves = [
        Curve(f"{run.label} {part}", _curve_series(_last_curve(run), "thr", part), i, dash)  # type: ignore[arg-type]  # thresholds on x
        for part, dash in styles.items()
        for i, run in described
    ]
    marks = sorted({last_value(series(run.quality, "thr")) for _, run in described} - {math.nan})
    caption = "Solid: precision, dashed: recall, dotted: the threshold in use."
    return plots.lines(
        "threshold",
        "Precision and recall over the threshold",
        curves,
        xlabel="score threshold",
        span=(0, 1.02),
        marks=marks,
        caption=caption,
    )


def _precision_recall(described: list[tuple[int, Run]]) -> Panel | None:
    curves = [Curve(run.label, _curve_series(_last_curve(run), "recall", "precision"), i) for i, run in described]  # type: ignore[arg-type]
    return plots.lines(
        "precision_recall", "Precision over recall", curves, xlabel="recall", span=(0, 1.02), caption="One point for each threshold."
    )


def _size_recall(described: list[tuple[int, Run]]) -> Panel | None:
    groups = [Bars(run.label, [last_value(series(run.quality, f"recall_{size}")) for size in SIZES], i) for i, run in described]
    return plots.bars("size_recall", "Recall of kept boxes by object size", SIZES, groups, xlabel="recall")


def last_per_class(run: Run) -> Json:
    """Pseudo-label quality of every class when it was last measured, empty if never."""
    return next((line["per_class"] for line in reversed(run.quality) if line.get("per_class")), {})


def _tail_classes(table: Json) -> list[str]:
    """Classes from head to tail by their number of true objects."""
    return sorted(table, key=lambda name: (-_or_zero(get(table, f"{name}/truth")), name))[:MAX_CLASSES]


def _or_zero(value: object) -> float:
    result = number(value)
    return result if math.isfinite(result) else 0.0


def _suffix(run: Run, count: int) -> str:
    return f": {run.label}" if count > 1 else ""


def _entry(table: Json, name: str, key: str) -> float:
    return number(table[name].get(key)) if isinstance(table[name], dict) else math.nan


def _tail(index: int, run: Run, count: int) -> Panel | None:
    table = last_per_class(run)
    names = _tail_classes(table)
    groups = [
        Bars("true objects", [_entry(table, name, "truth") for name in names], -1),
        Bars("pseudo boxes", [_entry(table, name, "pseudo") for name in names], index),
    ]
    title = f"Objects by class, head to tail{_suffix(run, count)}"
    return plots.bars(
        f"tail_{index}", title, names, groups, log=True, caption="Grey: true objects, coloured: kept pseudo boxes. Logarithmic above 10."
    )


def _class_quality(index: int, run: Run, count: int) -> Panel | None:
    table = last_per_class(run)
    names = _tail_classes(table)
    groups = [
        Bars("recall", [_entry(table, name, "recall") for name in names], index, "D"),
        Bars("precision", [_entry(table, name, "precision") for name in names], index),
    ]
    title = f"Pseudo-label quality by class{_suffix(run, count)}"
    return plots.dots(
        f"class_quality_{index}", title, names, groups, span=(-0.03, 1.03), caption="Filled dot: precision, hollow diamond: recall."
    )


def refined_boxes(runs: Sequence[Run]) -> list[Panel | None]:
    """Overlap of inaccurate boxes, and of what a refiner made of them, with the clean ones, where these are known."""
    return [
        plots.lines(
            "refined_iou",
            "Mean IoU of boxes with the clean ones",
            _diagnostic_curves(runs, {"noisy": ":", "stage1": "--", "refined": "-"}, "{}_iou"),
            caption="Dotted: as annotated, dashed: after stage I, solid: refined. Means over the batches between two lines of the log.",
        ),
        plots.lines(
            "bag_iou",
            "Mean IoU of the proposals of a bag",
            _diagnostic_curves(runs, {"bag0": ":", "bag1": "--", "bag2": "-"}, "{}_iou"),
            caption=_BAGS,
        ),
        plots.lines(
            "bag_best_iou",
            "IoU of the best proposal of a bag",
            _diagnostic_curves(runs, {"bag0": ":", "bag1": "--", "bag2": "-"}, "{}_max_iou"),
            caption=_BAGS,
        ),
    ]


_BAGS = "Dotted: around the annotated box, dashed: after the first regression, solid: after the second."


def _diagnostic_curves(runs: Sequence[Run], parts: dict[str, str], key: str) -> list[Curve]:
    return [
        Curve(f"{run.label} {part}", series(run.train, f"diagnostics/{key.format(part)}"), i, dash, smooth=True)
        for part, dash in parts.items()
        for i, run in enumerate(runs)
    ]


def loss_keys(runs: Sequence[Run]) -> list[str]:
    """Names of all loss terms, supervised terms first, otherwise in order of appearance."""
    names = dict.fromkeys(key for run in runs for line in run.train for key in line.get("losses") or {})
    return sorted(names, key=lambda key: not key.startswith("sup"))


def losses(runs: Sequence[Run]) -> list[Panel | None]:
    """Total loss, every term, learning rate."""
    total = plots.lines("loss", "Total loss", _per_run(runs, lambda run: series(run.train, "loss"), smooth=True))
    terms = [_loss_term(runs, key) for key in loss_keys(runs)]
    note = "Equal curves cover each other." if len(runs) > 1 else ""
    rate = plots.lines("lr", "Learning rate", _per_run(runs, lambda run: series(run.train, "lr")), span=(0, None), caption=note)
    return [total, *terms, rate]


def _loss_term(runs: Sequence[Run], key: str) -> Panel | None:
    curves = _per_run(runs, lambda run: _term_series(run, key), smooth=True)
    stem = "loss_" + "".join(c if c.isalnum() else "_" for c in key)
    return plots.lines(stem, f"Loss {key}", curves)


def _term_series(run: Run, key: str) -> Series:
    """A loss term by its literal name, which may hold a slash."""
    rows = [(int(line["it"]), (line.get("losses") or {}).get(key)) for line in run.train]
    return [it for it, value in rows if value is not None], [number(value) for _, value in rows if value is not None]


def time_panels(runs: Sequence[Run]) -> list[Panel | None]:
    """Shares of the step time and the speed."""
    speed = plots.lines("speed", "Iterations per second", _per_run(runs, lambda run: series(run.train, "it_per_s")), span=(0, None))
    timed = [run for run in runs if any(isinstance(line.get("time_split"), dict) for line in run.train)]
    names = list(dict.fromkeys(key for run in timed for line in run.train for key in line.get("time_split") or {}))
    means = {run.label: {name: _mean(series(run.train, f"time_split/{name}")[1]) for name in names} for run in timed}
    totals = {label: sum(parts.values()) or 1.0 for label, parts in means.items()}
    parts: dict[str, Sequence[float]] = {name: [means[run.label][name] / totals[run.label] for run in timed] for name in names}
    return [plots.stacked("time_split", "Time split", [run.label for run in timed], parts), speed]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else 0.0
