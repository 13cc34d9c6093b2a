"""`ssod-fast report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from ssod_fast.report import build_report
from ssod_fast.training.tree import ConfigError

from .output import Output


@dataclass(frozen=True)
class ReportOptions:
    """Writes one self-contained page on one or several runs."""

    # Run folders.
    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="[RUN [RUN ...]]")]
    # File to write; without it report.html in the run folder, of several runs in the folder that holds them all.
    out: Path | None = None


def run(arguments: list[str], output: Output) -> int:
    """Prints where the page is."""
    options = tyro.cli(ReportOptions, prog="ssod-fast report", args=arguments)
    if not options.runs:
        raise ConfigError("report needs at least one run folder")
    path = build_report(list(options.runs), options.out)
    output.result({"report": str(path)}, f"report: {path}")
    return 0
