"""HTML tables and lists of the report. Every text from a run folder passes through `text`."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from ssod_fast.report.charts import MAX_CLASSES, class_names
from ssod_fast.report.runs import Json, Run, duration_seconds, flatten, get, iterations_total, number, series
from ssod_fast.report.svg import series_variable

METRICS = (
    ("AP", "AP"),
    ("AP50", "AP50"),
    ("AP75", "AP75"),
    ("AP_small", "small"),
    ("AP_medium", "medium"),
    ("AP_large", "large"),
    ("AR100", "AR100"),
)
MAX_EVENTS = 60
_VERSION_KEYS = ("ssod_fast", "python", "torch", "torchvision", "cuda", "gpus", "processor", "threads", "device", "commit")
_SCHEDULE_KEYS = ("model", "batch", "lr", "optimizer.name", "precision", "method.burn_in", "score_thr")


def text(value: Any) -> str:
    """Escaped text of any value."""
    return html.escape(str(value))


def points(value: float) -> str:
    """A metric in [0, 1] as percent points; `n/a` when it was not measured (NaN or COCO's -1)."""
    return "n/a" if not math.isfinite(value) or value == -1.0 else f"{100 * value:.1f}"


def swatch(index: int) -> str:
    """A small square in the colour of run `index`."""
    return f'<span class="swatch" style="background: var({series_variable(index)})"></span>'


def legend(runs: Sequence[Run]) -> str:
    """Names and colours of the runs."""
    items = "".join(f"<li>{swatch(i)}{text(run.label)}</li>" for i, run in enumerate(runs))
    return f'<ul class="legend" aria-label="Colours of the runs">{items}</ul>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    """A table in a frame that scrolls sideways by itself; cells are HTML."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join("<tr>" + f'<th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


# --- what was run -------------------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """`1 h 05 min`, `3 min 20 s` or `12 s`; `unknown` for NaN."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _classes(run: Run) -> str:
    names = run.classes
    if not names:
        return "unknown"
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return text(f"{len(names)}: {shown}")


def _schedule(run: Run) -> str:
    total = iterations_total(run)
    parts = [f"{run.last_iteration} of {total} iterations" if total else f"{run.last_iteration} iterations"]
    config = run.config
    parts += [f"{key} {config[key]}" for key in _SCHEDULE_KEYS if config.get(key)]
    return text(", ".join(parts))


def _versions(run: Run) -> str:
    env = flatten(run.env)
    short = {key.rsplit(".", 1)[-1]: value for key, value in env.items()}
    named = [f"{key} {short[key]}" for key in _VERSION_KEYS if short.get(key)]
    return text(", ".join(named)) or "unknown"


def _counts(run: Run) -> str:
    labeled, unlabeled = run.info.get("labeled"), run.info.get("unlabeled")
    return f"{_count(labeled)} labelled, {_count(unlabeled)} unlabelled"


def _count(value: Any) -> str:
    return "no" if value in (0, None) else text(value)


def _split_hash(run: Run) -> str:
    drawn = run.info.get("split_hash")
    return f"<code>{text(str(drawn)[:16])}</code>" if drawn else "not drawn"


def overview(runs: Sequence[Run]) -> str:
    """One column for each run: method, data, seed, schedule, duration, versions."""
    facts = (
        ("method", lambda run: f"<strong>{text(run.method)}</strong>"),
        ("images", _counts),
        ("classes", _classes),
        *((("split hash", _split_hash),) if any(run.info.get("split_hash") for run in runs) else ()),
        ("seed", lambda run: text(run.info.get("seed", "unknown"))),
        ("schedule", _schedule),
        ("duration", lambda run: duration(duration_seconds(run))),
        ("versions", _versions),
        ("folder", lambda run: f"<code>{text(run.folder.name)}</code>"),
    )
    head = ["", *(f"{swatch(i)}{text(run.label)}" for i, run in enumerate(runs))]
    return table(head, [[name, *(fact(run) for run in runs)] for name, fact in facts], kind="facts")


# --- AP -----------------------------------------------------------------------------------------------------------------------------


def _best(run: Run, role: str) -> Json | None:
    """The evaluation with the highest AP of this model."""
    found = [line for line in run.evals if math.isfinite(number(get(line, f"{role}/AP")))]
    return max(found, key=lambda line: number(line[role]["AP"]), default=None)


def _last(run: Run, role: str) -> Json | None:
    return next((line for line in reversed(run.evals) if isinstance(line.get(role), dict)), None)


def _baseline(runs: Sequence[Run]) -> Json | None:
    """Metrics of the supervised run at its last evaluation, the yardstick of all differences."""
    base = next((run for run in runs if run.is_baseline), None)
    line = _last(base, base.main_model) if base else None
    return line[base.main_model] if line and base else None


def _cell(value: float, reference: float) -> str:
    """A metric and, where there is a baseline, its difference."""
    if not (math.isfinite(value) and math.isfinite(reference)) or -1.0 in (value, reference):
        return points(value)
    gap = 100 * (value - reference)
    kind = "up" if gap >= 0.05 else "down" if gap <= -0.05 else "same"
    return f'{points(value)} <span class="gap {kind}">{gap:+.1f}</span>'


def _ap_row(name: str, line: Json, role: str, reference: Json | None) -> list[str]:
    cells = [_cell(number(line[role].get(key)), number((reference or {}).get(key))) for key, _ in METRICS]
    return [name, text(line["it"]), *cells]


def ap_table(runs: Sequence[Run]) -> str:
    """Last and best evaluation of the teacher and the student of each run, with differences against the supervised run."""
    baseline = _baseline(runs)
    rows = []
    for i, run in enumerate(runs):
        for role in ("teacher", "student"):
            last, best = _last(run, role), _best(run, role)
            reference = None if run.is_baseline else baseline
            name = f"{swatch(i)}{text(run.label)} {role}"
            if last:
                rows.append(_ap_row(name, last, role, reference))
            if best and last and best["it"] != last["it"]:
                rows.append(_ap_row(f'{name} <span class="muted">(best)</span>', best, role, reference))
    if not rows:
        return '<p class="missing">No evaluation was logged.</p>'
    supervised = [run.label for run in runs if run.is_baseline]
    which = "the supervised run" + (f" {supervised[0]}" if len(supervised) > 1 else "")
    note = f" Small numbers: difference to {text(which)} at its last evaluation." if baseline and len(runs) > 1 else ""
    caption = f'<p class="note">In percent, on the validation images. "Best" is chosen on the same images and therefore flatters.{note}</p>'
    return table(["model", "iteration", *(name for _, name in METRICS)], rows, kind="numbers") + caption


def class_table(runs: Sequence[Run]) -> str:
    """AP and AP50 of every class at the last evaluation of each run's reported model."""
    found = [(_last(run, run.main_model) or {}).get(run.main_model, {}) for run in runs]
    names = [name for name in class_names(runs) if any(name in (entry.get("per_class") or {}) for entry in found)]
    if not names:
        return ""
    base = _baseline(runs) or {}
    head = ["class", *(f"{swatch(i)}{text(run.label)} {label}" for i, run in enumerate(runs) for label in ("AP", "AP50"))]
    rows = [
        [text(name), *(cell for run, entry in zip(runs, found, strict=True) for cell in _class_cells(name, run, entry, base))]
        for name in names
    ]
    return _collapsed(f"AP of {len(names)} classes", table(head, rows, kind="numbers"), is_open=len(names) <= MAX_CLASSES // 2)


def _class_cells(name: str, run: Run, entry: Json, base: Json) -> list[str]:
    keys = ("per_class", "per_class50")
    reference = {} if run.is_baseline else base
    return [_cell(number((entry.get(key) or {}).get(name)), number((reference.get(key) or {}).get(name))) for key in keys]


# --- messages, gaps, config ---------------------------------------------------------------------------------------------------------


def _collapsed(title: str, body: str, *, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{text(title)}</summary>{body}</details>"


def problems(runs: Sequence[Run]) -> str:
    """What is missing or damaged, in words; empty when everything is there."""
    items = [f"<li><strong>{text(run.label)}</strong>: {text(problem)}</li>" for run in runs for problem in run.problems]
    return f'<section class="missing"><h2>What is missing</h2><ul>{"".join(items)}</ul></section>' if items else ""


def events(runs: Sequence[Run]) -> str:
    """Warnings and messages of all runs in the order of the iterations."""
    found = [
        (int(number(e.get("it", 0)) or 0) if math.isfinite(number(e.get("it", 0))) else 0, i, e)
        for i, run in enumerate(runs)
        for e in run.events
    ]
    if not found:
        return '<p class="note">No message was logged.</p>'
    found.sort(key=lambda item: item[:2])
    warnings = [item for item in found if item[2].get("level") == "warning"]
    others = [item for item in found if item[2].get("level") != "warning"]
    shown = "".join(_event(*item) for item in warnings[:MAX_EVENTS]) or '<li class="muted">No warning.</li>'
    rest = f'<li class="muted">and {len(warnings) - MAX_EVENTS} more</li>' if len(warnings) > MAX_EVENTS else ""
    quiet = (
        _collapsed(f"{len(others)} other messages", f'<ul class="events">{"".join(_event(*item) for item in others[:MAX_EVENTS])}</ul>')
        if others
        else ""
    )
    return f'<ul class="events">{shown}{rest}</ul>{quiet}'


def _event(it: int, index: int, event: Json) -> str:
    level = "warning" if event.get("level") == "warning" else "info"
    where = f'<span class="muted">it {it}</span> <span class="level">{level}</span>'
    return f'<li class="{level}">{swatch(index)}{where} {text(event.get("message", ""))}</li>'


def config_table(runs: Sequence[Run]) -> str:
    """All resolved settings, one column for each run; rows that differ are marked and come first."""
    configs = [run.config for run in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config if key))
    if not keys:
        return '<p class="missing">The config was not logged.</p>'
    rows = [(key, [text(config[key]) if key in config else "(none)" for config in configs]) for key in keys]
    rows.sort(key=lambda row: len(set(row[1])) == 1)
    cells = [[f"<code>{text(key)}</code>", *(_mark(value, values) for value in values)] for key, values in rows]
    head = ["setting", *(f"{swatch(i)}{text(run.label)}" for i, run in enumerate(runs))]
    return _collapsed(f"Config ({len(keys)} settings)", table(head, cells, kind="config"))


def _mark(value: str, values: list[str]) -> str:
    return value if len(set(values)) == 1 else f"<mark>{value}</mark>"


def env_table(runs: Sequence[Run]) -> str:
    """Versions and hardware, collapsed."""
    envs = [flatten(run.env) if run.env else {} for run in runs]
    keys = list(dict.fromkeys(key for env in envs for key in env))
    if not keys:
        return ""
    head = ["", *(f"{swatch(i)}{text(run.label)}" for i, run in enumerate(runs))]
    rows = [[text(key), *(text(env.get(key, "(none)")) for env in envs)] for key in keys]
    return _collapsed("Environment", table(head, rows, kind="config"))


def summary_line(run: Run) -> str:
    """One line about a run for the page description."""
    ap50 = series(run.evals, f"{run.main_model}/AP50")[1]
    return text(f"{run.label}: AP50 {points(ap50[-1])}") if ap50 else text(run.label)
