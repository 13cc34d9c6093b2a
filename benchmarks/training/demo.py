"""The demonstration over several seeds: does MixPL beat the supervised baseline, and by how much?

`python benchmarks/training/demo.py` runs `ssod-fast demo` for seeds 0, 1, 2 (other labels and initial weights, the same scenes), writes one
row per run and network to results/demo_cpu.csv, and means, standard deviations and margins to results/demo_cpu.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssod_fast.demo import BASELINE, METHOD, DemoConfig, DemoResult, run_demo

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium")
NETWORKS = ((BASELINE, "student"), (BASELINE, "teacher"), (METHOD, "student"), (METHOD, "teacher"))


def last(lines: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The last line of a kind; empty if there is none."""
    return next((line for line in reversed(lines) if line["type"] == kind), {})


def rows_of(result: DemoResult, seed: int, config: DemoConfig) -> Iterator[dict[str, Any]]:
    """One row for each run and network."""
    for method, network in NETWORKS:
        lines = [json.loads(line) for line in (result.runs[method] / "metrics.jsonl").read_text().splitlines()]
        found, quality = last(lines, "eval"), last(lines, "quality")
        row = {"method": method, "network": network, "seed": seed, "iters": config.iters, "images": config.train_images}
        row |= {"percent": config.percent, "labeled": lines[0]["labeled"], "split_hash": lines[0]["split_hash"][:12]}
        row |= {name: f"{found[network][name]:.5f}" for name in METRICS}
        row |= {name: f"{quality[name]:.4f}" if quality.get(name) is not None else "" for name in ("precision", "recall")}
        yield row | {"seconds": f"{result.seconds[method]:.0f}", "threads": config.threads, "commit": commit()}


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def points(rows: list[dict[str, Any]], method: str, network: str, metric: str) -> list[float]:
    """The metric of each seed in percent."""
    return [100 * float(row[metric]) for row in rows if (row["method"], row["network"]) == (method, network)]


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, and MixPL's margin for each seed: both averaged models, and both models without averaging."""
    first = rows[0]
    lines = [
        f"Synthetic scenes, {first['labeled']} of {first['images']} training images labelled, {first['iters']} steps,",
        f"CPU, {first['threads']} thread of computation.",
        "Teacher: the running average of the weights, which the baseline has, too. Mean ± standard deviation over the seeds, in percent.",
        "",
        "| run | network | seeds | " + " | ".join(METRICS) + " | seconds |",
        "|---|---|---|" + "---|" * (len(METRICS) + 1),
    ]
    for method, network in NETWORKS:
        cells = [spread(points(rows, method, network, metric)) for metric in METRICS]
        seconds = [float(row["seconds"]) for row in rows if row["method"] == method]
        count = len(points(rows, method, network, "AP"))
        lines.append(f"| {method} | {network} | {count} | " + " | ".join(cells) + f" | {statistics.mean(seconds):.0f} |")
    lines.append("")
    for network in ("teacher", "student"):
        for metric in ("AP50", "AP"):
            pairs = zip(points(rows, METHOD, network, metric), points(rows, BASELINE, network, metric), strict=True)
            margins = [ours - base for ours, base in pairs]
            each = ", ".join(f"{margin:+.1f}" for margin in margins)
            lines.append(f"- margin of MixPL, {network} against {network}, {metric}: {spread(margins)} ({each})")
    return "\n".join(lines)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=DemoConfig.threads)
    parser.add_argument("--iters", type=int, default=DemoConfig.iters, help="steps of a run; fewer for a smoke test")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "demo_seeds", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows and the table")
    args = parser.parse_args()
    config = DemoConfig(iters=args.iters, threads=args.threads)
    results = [(seed, run_demo(args.runs / f"seed{seed}", seed, config, quiet=True)) for seed in range(args.seeds)]
    rows = [row for seed, result in results for row in rows_of(result, seed, config)]
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "demo_cpu.csv", rows)
    (args.out / "demo_cpu.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
