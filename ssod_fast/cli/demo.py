"""`ssod-fast demo`."""

from __future__ import annotations

import dataclasses

import tyro

from ssod_fast.demo import run_demo

from .output import Output


def run(arguments: list[str], output: Output) -> int:
    """Options are those of :func:`ssod_fast.demo.run_demo`."""
    result = tyro.cli(run_demo, prog="ssod-fast demo", args=arguments)
    value = dataclasses.asdict(result) if dataclasses.is_dataclass(result) and not isinstance(result, type) else {"result": result}
    output.result(value, "")
    return 0
