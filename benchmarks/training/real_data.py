"""Supervised baseline against MixPL on real images, same labels, same schedule, several seeds.

`python benchmarks/training/real_data.py bccd` takes the images from SSOD_FAST_DATA (default ../shared), draws 10 % labels per seed, trains
both methods through the command line that users have, and writes one row per run and network to results/<set>_<device>.csv, the curves of
every run to results/<set>_<device>_curves.csv and the table to results/<set>_<device>.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DATA = Path(os.environ.get("SSOD_FAST_DATA", ROOT.parent / "shared")).resolve()
BACKBONE = DATA / "weights" / "mobilenet_v2_imagenet_backbone_fp16.safetensors"
METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
METHODS = ("supervised", "mixpl")


# What both methods share. AdamW at 5e-4 and a drop at three quarters suit runs of this length; thresholds of torchvision's FCOS.
COMMON: dict[str, Any] = {
    "model": "torchvision:fcos_mobilenet_v2_fpn",
    "percent": 10,
    "cover_classes": True,
    "lr": 5e-4,
    "optimizer": {"name": "adamw", "weight_decay": 0.01},
    "schedule": {"warmup": 50, "milestones": [0.75]},
}
# The floor of the published moving average, 2e-4, belongs to 180,000 iterations. The baseline is averaged in the same way, so that the
# margin owes nothing to averaging.
EMA: dict[str, Any] = {"schedule": "mmdet", "floor": 0.02, "gamma": 4.0, "interval": 3}


@dataclass(frozen=True)
class Recipe:
    """Settings of one comparison: those of both runs, the batch of each, what only MixPL has, and the folder of the images."""

    common: dict[str, Any]
    batch: tuple[int, int]
    mixpl: dict[str, Any]
    data: str


# Minutes on one core: small views, a narrow head.
SMALL: dict[str, Any] = {
    "iters": 500,
    "model_options": ["fpn_channels=96", "head_convs=2", "levels=[3,5]"],
    "views": {"short_side": [144, 240], "max_side": 336, "test_short_side": 192},
}
RECIPES = {
    "bccd": Recipe(SMALL, (2, 2), {"burn_in": 125}, "bccd"),
    # The unlabelled losses start when the labelled ones have had time to teach the smallest class too. Same baseline runs.
    "bccd_late": Recipe(SMALL, (2, 2), {"burn_in": 300}, "bccd"),
    "aquarium": Recipe(
        {
            "iters": 4000,
            "model_options": ["fpn_channels=128", "head_convs=2"],
            "views": {"short_side": [256, 640], "max_side": 768, "test_short_side": 448},
            "resample": 0.1,
        },
        (4, 4),
        {"burn_in": 1000},
        "aquarium",
    ),
}


def config(data: Path, method: str, seed: int, recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """The settings of one run, as `ssod-fast train --config` reads them."""
    labeled, unlabeled = recipe.batch
    semi = {"name": "mixpl", "ema": EMA, **recipe.mixpl}
    return {
        **COMMON,
        **recipe.common,
        **({"iters": args.iters} if args.iters else {}),
        "labeled": str(data),
        "val": str(data / "annotations" / "instances_val.json"),
        "backbone_weights": str(BACKBONE),
        "method": semi if method == "mixpl" else {"name": method, "ema": EMA},
        "batch": f"{labeled}:{unlabeled}" if method == "mixpl" else str(labeled),
        "fold": seed + 1,
        "seed": seed,
        "device": args.device,
        "threads": args.threads,
        "workers": args.workers,
        "out": str(args.out),
        "name": run_name(method, seed, args),
    }


def run_name(method: str, seed: int, args: argparse.Namespace) -> str:
    """Recipes on the same images share the runs of the baseline."""
    return f"{args.set if method == 'mixpl' else RECIPES[args.set].data}-{method}-{seed}"


def train(data: Path, method: str, seed: int, recipe: Recipe, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs one training; the same call again continues or skips it. Returns the lines of its metrics file."""
    folder = args.out / run_name(method, seed, args)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = args.out / f"{folder.name}.yaml"
    settings.write_text(yaml.safe_dump(config(data, method, seed, recipe, args)))
    with (args.out / f"{folder.name}.log").open("a") as log:
        line = [sys.executable, "-m", "ssod_fast.cli", "train", "--config", str(settings)]
        done = subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{folder.name} ended with {done.returncode}: see {log.name}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(lines: list[dict[str, Any]], method: str, seed: int) -> Iterator[dict[str, Any]]:
    """Every evaluation of a run, with the pseudo-label quality measured there."""
    quality = {line["it"]: line for line in lines if line["type"] == "quality"}
    for line in lines:
        if line["type"] != "eval":
            continue
        found = quality.get(line["it"], {})
        for network in ("teacher", "student"):
            if line.get(network):
                row = {"method": method, "seed": seed, "it": line["it"], "network": network}
                row |= {name: f"{line[network][name]:.5f}" for name in METRICS}
                row |= {f"AP50 {name}": f"{value:.5f}" for name, value in line[network]["per_class50"].items()}
                row |= {f"pseudo {name}": rounded(found.get(name)) for name in ("precision", "recall", "mean_iou", "kept_per_image")}
                classes = found.get("per_class", {})
                row |= {f"pseudo recall {name}": rounded(classes.get(name, {}).get("recall")) for name in line[network]["per_class50"]}
                yield row


def rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, and MixPL's margin per seed."""
    columns = [*METRICS, *(name for name in rows[0] if name.startswith("AP50 "))]
    lines = ["| run | network | seeds | " + " | ".join(columns) + " |", "|---|---|---|" + "---|" * len(columns)]
    for method in METHODS:
        for network in ("student", "teacher"):
            mine = [r for r in rows if r["method"] == method and r["network"] == network]
            cells = [spread([100 * float(r[name]) for r in mine]) for name in columns]
            shown = "moving average" if network == "teacher" else network
            lines.append(f"| {method} | {shown} | {len(mine)} | " + " | ".join(cells) + " |")
    for name in ("AP", "AP50"):
        teacher = {(r["method"], r["seed"]): 100 * float(r[name]) for r in rows if r["network"] == "teacher"}
        margins = [value - teacher["supervised", seed] for (method, seed), value in teacher.items() if method == "mixpl"]
        each = ", ".join(f"{m:+.2f}" for m in margins)
        lines += ["", f"{name} of MixPL minus the baseline's (moving averages): {spread(margins)} points; by seed {each}."]
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=sorted(RECIPES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iters", type=int, default=None, help="instead of the recipe's; the rows say how many there were")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of a run")
    parser.add_argument("--out", type=Path, default=ROOT / "runs")
    return parser.parse_args()


def main() -> None:
    args = parse()
    recipe = RECIPES[args.set]
    data = DATA / "data" / recipe.data
    # The long runs first, so that none of them ends alone.
    jobs = [(method, seed) for method in reversed(METHODS) for seed in range(args.seeds)]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda job: train(data, *job, recipe, args), jobs))
    curves = [row for (method, seed), lines in zip(jobs, runs, strict=True) for row in curve(lines, method, seed)]
    last = max(int(row["it"]) for row in curves)
    rows = [{**row, "iters": last, "percent": 10, "device": args.device, "commit": commit()} for row in curves if row["it"] == last]
    stem = f"{args.set}_{args.device}"
    write_csv(RESULTS / f"{stem}_curves.csv", curves)
    write_csv(RESULTS / f"{stem}.csv", rows)
    (RESULTS / f"{stem}.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
