"""Assembles the report: one HTML file that needs nothing else, neither network nor script."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ssod_fast.report import previews, tables
from ssod_fast.report.charts import Section, sections
from ssod_fast.report.plots import Panel
from ssod_fast.report.runs import Run, read_runs
from ssod_fast.report.style import STYLE
from ssod_fast.report.svg import inline, plain_light
from ssod_fast.report.tables import text
from ssod_fast.report.verdict import verdict

REPORT_FILE = "report.html"
PLOT_FOLDER = "plots"


def build_report(runs: Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Writes the report of one run, or of several runs overlaid, and its figures as SVG files beside it in `plots/`.

    Args:
        runs: run folders; one of them may be the supervised baseline, to which all others are then compared.
        out: HTML file to write. Default: `report.html` in the run folder, for several runs in their common parent folder.

    Returns:
        The path of the written file.

    Raises:
        ValueError: no run, or a folder without metrics.jsonl.
        ImportError: matplotlib or pillow is missing; the message names the extra to install.
    """
    folders = [Path(run) for run in runs]
    read = read_runs(folders)
    target = Path(out) if out is not None else _default_target(folders)
    target.parent.mkdir(parents=True, exist_ok=True)
    drawn = sections(read)
    _save_figures(drawn, target.parent / PLOT_FOLDER)
    _write_whole(target, page(read, drawn))
    return target


def _default_target(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0] / REPORT_FILE
    parents = {folder.resolve().parent for folder in folders}
    return (parents.pop() if len(parents) == 1 else folders[0].resolve().parent) / REPORT_FILE


def _write_whole(path: Path, content: str) -> None:
    """Writes under a temporary name first: a reader of the page never meets half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content, encoding="utf-8")
    partial.replace(path)


def _save_figures(drawn: Sequence[Section], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for section in drawn:
        for panel in section.panels:
            (folder / f"{panel.key}.svg").write_text(plain_light(panel.svg), encoding="utf-8")


def page(runs: Sequence[Run], drawn: Sequence[Section]) -> str:
    """The complete HTML text."""
    title = "ssod_fast: " + " / ".join(run.label for run in runs)
    body = "".join(
        (
            _head(runs),
            tables.problems(runs),
            f"<section><h2>Average precision</h2>{tables.ap_table(runs)}{tables.class_table(runs)}</section>",
            tables.legend(runs),
            *(_section(section) for section in drawn[:1]),
            _images(runs),
            *(_section(section) for section in drawn[1:]),
            f"<section><h2>Warnings and messages</h2>{tables.events(runs)}</section>",
            f"<section><h2>Settings</h2>{tables.config_table(runs)}{tables.env_table(runs)}</section>",
        )
    )
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f"{meta}<title>{text(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{body}</main></body></html>\n'


def _head(runs: Sequence[Run]) -> str:
    name = " against ".join(dict.fromkeys(run.method for run in runs)) if len(runs) > 1 else runs[0].label
    sentences = "".join(f"<li>{text(sentence)}</li>" for sentence in verdict(runs))
    return f'<header><h1>{text(name)}</h1><ul class="verdict">{sentences}</ul><h2>What was run</h2>{tables.overview(runs)}</header>'


def _section(section: Section) -> str:
    figures = "".join(_figure(panel) for panel in section.panels)
    return f'<section><h2>{text(section.title)}</h2><p class="note">{text(section.intro)}</p><div class="panels">{figures}</div></section>'


def _figure(panel: Panel) -> str:
    caption = f"<figcaption>{text(panel.caption)}</figcaption>" if panel.caption else ""
    return f"<figure><h3>{text(panel.title)}</h3>{inline(panel.svg, panel.key, text(panel.alt))}{caption}</figure>"


def _left_out(count: int) -> str:
    return f" Only the first {previews.MAX_RUNS} of {count} runs are shown." if count > previews.MAX_RUNS else ""


_FED = "Inputs of the losses exactly as they entered, with their boxes."
_LAYERS = {"teacher": "teacher (solid, pale = low score)", "student": "student (dotted)", "truth": "true objects (dashed white)"}


def _switches(images: str) -> str:
    """A checkbox for each kind of boxes that the images show."""
    shown = {name: words for name, words in _LAYERS.items() if re.search(f'<g class="{name}"><[^/]', images)}
    return "".join(f'<label><input type="checkbox" class="show-{name}" checked>{words}</label>' for name, words in shown.items())


def _images(runs: Sequence[Run]) -> str:
    """The image section of every run that wrote previews."""
    blocks = []
    rows = previews.MAX_IMAGES if len(runs) == 1 else previews.MAX_IMAGES_OVERLAID
    for i, run in enumerate(runs[: previews.MAX_RUNS]):
        strip, mixed = previews.strip(run, f"shot{i}", rows), previews.mixed(run)
        if not (strip or mixed):
            continue
        heading = f"<h3>{tables.swatch(i)}{text(run.label)}</h3>" if len(runs) > 1 else ""
        mixed_block = f'<h3>What the student was fed</h3><p class="note">{_FED}</p>{mixed}' if mixed else ""
        blocks.append(f"{heading}{strip}{mixed_block}")
    if not blocks:
        return '<section><h2>Images</h2><p class="missing">No run wrote preview images.</p></section>'
    words = (
        "The same images at up to four evaluations (on a narrow screen the first and the last). Bold and named: above the score threshold."
    )
    intro = f'<p class="note">{words}{_left_out(len(runs))}</p>'
    images = "".join(blocks)
    return f'<section class="images"><h2>Images</h2>{intro}<div class="switches">{_switches(images)}</div>{images}</section>'
