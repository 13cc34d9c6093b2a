"""Times the ops of ssod_fast against their peers.

    python benchmarks/run.py [--ops box_iou,...] [--device cpu|cuda] [--quick] [--threads 1] [--out FOLDER]
    python benchmarks/run.py --report-only

Raw rows go to one csv file per machine kind in benchmarks/results/, from which benchmarks/RESULTS.md is generated. A quick run is a
smoke test: a few noisy samples that are written only where --out names a folder.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from harness import FULL, QUICK, Case, Effort, Row, run_case
from machine import Machine, describe
from report import merge, time_text, write_report

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CaseBuilder = Callable[[torch.device, bool], Iterator[Case]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default=",".join(available()), help="file stems of benchmarks/ops, separated by commas (default: all)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="small shapes, few samples: proves that everything runs")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads (default: 1)")
    parser.add_argument("--out", type=Path, help="folder of the csv files and of RESULTS.md's input (default: benchmarks/results)")
    parser.add_argument("--report-only", action="store_true", help="only generate RESULTS.md from the csv files")
    return parser.parse_args()


def available() -> list[str]:
    """Stems of all benchmark files."""
    return sorted(path.stem for path in (HERE / "ops").glob("*.py"))


def load(stem: str) -> CaseBuilder:
    """The `cases` function of one file, loaded by path: the folder name `ops` is never imported.

    Raises:
        SystemExit: there is no such file.
    """
    path = HERE / "ops" / f"{stem}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise SystemExit(f"--ops: no benchmark named {stem!r}; there are {', '.join(available())}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(CaseBuilder, module.cases)


def run_op(stem: str, machine: Machine, quick: bool) -> list[Row]:
    """All cases of one op, printed as they finish."""
    return time_cases(load(stem)(torch.device(machine.kind), quick), machine, QUICK if quick else FULL)


def time_cases(cases: Iterable[Case], machine: Machine, effort: Effort) -> list[Row]:
    """Runs cases one by one; a quick effort judges nothing."""
    rows: list[Row] = []
    for case in cases:
        print(case, flush=True)
        if effort is QUICK:  # targets are about the full shapes
            case = replace(case, targets={}, ceiling_us=None, wall_ceiling_us=None, overhead_us={}, peak_limit=None)
        rows += (done := run_case(case, machine, effort))
        for row in done:
            ratio = f" {row.ratio:8.1f}x" if row.ratio is not None else " " * 10
            print(f"  {row.timing:5s} {row.provider:32s} {time_text(row.median_us):>9s}{ratio} {row.verdict}", flush=True)
    return rows


def main() -> None:
    args = arguments()
    out: Path | None = args.out or (None if args.quick else RESULTS)
    if not args.report_only:
        builders = args.ops.split(",")
        for stem in builders:  # a misspelt name fails before anything is timed
            load(stem)
        machine = describe(args.device, args.threads)
        print(f"{machine.device}, {machine.threads} thread(s), {machine.bandwidth / 2**30:.1f} GiB/s, commit {machine.commit}")
        for stem in builders:
            rows = run_op(stem, machine, args.quick)
            if out is not None:  # after every op, so that an interrupted run keeps what it has
                merge(out / f"{machine.slug}.csv", rows)
    if out is not None or args.report_only:
        folder = out or RESULTS
        write_report(folder, HERE / "RESULTS.md" if folder == RESULTS else folder / "RESULTS.md")


if __name__ == "__main__":
    main()
