"""The command of benchmarks that time whole models: their cases one after the other, into the rows of the machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from harness import QUICK, Case, Effort, Row
from machine import describe
from report import merge, write_report
from run import HERE, RESULTS, time_cases


def run_cases(doc: str | None, cases: Callable[[torch.device, bool], Iterable[Case]], effort: Effort) -> None:
    """Parses the command line, times what `cases(device, quick)` yields and writes rows and report."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="small images, few samples: proves that everything runs")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads (default: 1)")
    parser.add_argument("--out", type=Path, help="folder of the csv file (default: benchmarks/results)")
    args = parser.parse_args()
    out: Path | None = args.out or (None if args.quick else RESULTS)
    machine = describe(args.device, args.threads)
    rows: list[Row] = []
    for case in cases(torch.device(args.device), args.quick):
        rows += time_cases([case], machine, QUICK if args.quick else effort)
        if out is not None:  # after every case, so that an interrupted run keeps what it has
            merge(out / f"{machine.slug}.csv", rows)
    if out is not None:
        write_report(out, HERE / "RESULTS.md" if out == RESULTS else out / "RESULTS.md")
