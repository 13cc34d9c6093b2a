"""`ssod-fast demo`."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from ssod_fast.demo import DemoConfig, run_demo

from .output import Output


@dataclass(frozen=True)
class DemoOptions:
    """Trains a supervised baseline and MixPL on synthetic scenes, on the CPU and without any download, and writes a report."""

    # Folder for everything; an earlier demonstration in it is replaced.
    out: Path = Path("runs/demo")
    # Seed of the labelled share, the initial weights and all training.
    seed: int = 0
    # Size of the demonstration.
    config: DemoConfig = field(default_factory=DemoConfig)


def run(arguments: list[str], output: Output) -> int:
    """Prints what came out of it."""
    options = tyro.cli(DemoOptions, prog="ssod-fast demo", args=arguments)
    stream = sys.stderr if output.as_json else sys.stdout
    result = run_demo(options.out, options.seed, options.config, quiet=output.quiet, say=lambda line: print(line, file=stream))
    output.result(dataclasses.asdict(result), "")
    return 0
