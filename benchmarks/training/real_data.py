"""Supervised baseline against a semi-supervised method on real images, same labels, same schedule, several seeds.

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
BASELINE = "supervised"
TITLES = {"mixpl": "MixPL", "semi_detr": "Semi-DETR"}

# What all runs share.
COMMON: dict[str, Any] = {"percent": 10, "cover_classes": True}
# AdamW at 5e-4 and a drop at three quarters suit runs of this length; thresholds of torchvision's FCOS.
FCOS: dict[str, Any] = {
    "model": "torchvision:fcos_mobilenet_v2_fpn",
    "lr": 5e-4,
    "optimizer": {"name": "adamw", "weight_decay": 0.01},
    "schedule": {"warmup": 50, "milestones": [0.75]},
}
# The floor of the published moving average, 2e-4, belongs to 180,000 iterations. The baseline is averaged in the same way, so that the
# margin owes nothing to averaging.
EMA: dict[str, Any] = {"schedule": "mmdet", "floor": 0.02, "gamma": 4.0, "interval": 3}


@dataclass(frozen=True)
class Recipe:
    """Settings of one comparison.

    Attributes:
        data: folder of the images.
        batch: labelled and unlabelled images per step.
        common: settings of both runs.
        method: options of the semi-supervised method, its name among them.
        baseline: how the runs of the baseline are called; recipes with the same name share them.
    """

    data: str
    batch: tuple[int, int]
    common: dict[str, Any]
    method: dict[str, Any]
    baseline: str

    @property
    def methods(self) -> tuple[str, str]:
        """Names of the baseline and of the method."""
        return BASELINE, self.method["name"]


# Minutes on one core: small views, a narrow head.
SMALL_VIEWS: dict[str, Any] = {"short_side": [144, 240], "max_side": 336, "test_short_side": 192}
SMALL: dict[str, Any] = {
    **FCOS,
    "iters": 500,
    "model_options": ["fpn_channels=96", "head_convs=2", "levels=[3,5]"],
    "views": SMALL_VIEWS,
}
# A DINO that takes a sixth of a second per labelled batch: fewer layers, a ninth of the queries, no coarse level.
SMALL_DETR: dict[str, Any] = {
    "model": "own:dino_mobilenet_v2",
    "model_options": ["width=128", "encoder_layers=2", "decoder_layers=3", "queries=100", "levels=3", "ffn=256", "denoising=25"],
    "lr": 4e-4,
    "schedule": {"warmup": 50, "milestones": [0.85]},
    "iters": 1000,
    "views": {"short_side": [128, 192], "max_side": 272, "test_short_side": 160},
}
# Scores of so short a training are low, and one-to-one matching takes long to learn after one-to-many: half the published threshold, and a
# shorter first stage. Half the published weight, as for a batch of as many labelled as unlabelled images.
SHORT_SEMI_DETR: dict[str, Any] = {
    "name": "semi_detr",
    "burn_in": 200,
    "switch_at": 400,
    "cls_pseudo_thr": 0.25,
    "unsup_weight": 2.0,
    "denoising": 25,
}
RECIPES = {
    "bccd": Recipe("bccd", (2, 2), SMALL, {"name": "mixpl", "burn_in": 125}, "bccd"),
    # The unlabelled losses start when the labelled ones have had time to teach the smallest class too. Same baseline runs.
    "bccd_late": Recipe("bccd", (2, 2), SMALL, {"name": "mixpl", "burn_in": 300}, "bccd"),
    "bccd_detr": Recipe("bccd", (2, 2), SMALL_DETR, SHORT_SEMI_DETR, "bccd_detr"),
    # Stage 1 to the end: its models predict with suppression. Same baseline runs.
    "bccd_detr_o2m": Recipe("bccd", (2, 2), SMALL_DETR, {**SHORT_SEMI_DETR, "switch_at": SMALL_DETR["iters"]}, "bccd_detr"),
    "aquarium": Recipe(
        "aquarium",
        (4, 4),
        {
            **FCOS,
            "iters": 4000,
            "model_options": ["fpn_channels=128", "head_convs=2"],
            "views": {"short_side": [256, 640], "max_side": 768, "test_short_side": 448},
            "resample": 0.1,
        },
        {"name": "mixpl", "burn_in": 1000},
        "aquarium",
    ),
}


def config(data: Path, method: str, seed: int, recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """The settings of one run, as `ssod-fast train --config` reads them."""
    labeled, unlabeled = recipe.batch
    supervised = method == BASELINE
    options = {"name": BASELINE} if supervised else recipe.method
    return {
        **COMMON,
        **recipe.common,
        **({"iters": args.iters} if args.iters else {}),
        "labeled": str(data),
        "val": str(data / "annotations" / "instances_val.json"),
        "backbone_weights": str(BACKBONE),
        "method": {"ema": EMA, **options},
        "batch": str(labeled) if supervised else f"{labeled}:{unlabeled}",
        "fold": seed + 1,
        "seed": seed,
        "device": args.device,
        "threads": args.threads,
        "workers": args.workers,
        "out": str(args.out),
        "name": run_name(method, seed, args),
    }


def run_name(method: str, seed: int, args: argparse.Namespace) -> str:
    """Recipes may share the runs of the baseline."""
    return f"{RECIPES[args.set].baseline if method == BASELINE else args.set}-{method}-{seed}"


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


def table(rows: list[dict[str, Any]], methods: tuple[str, str]) -> str:
    """Mean and standard deviation over the seeds, and the method's margin per seed."""
    columns = [*METRICS, *(name for name in rows[0] if name.startswith("AP50 "))]
    lines = ["| run | network | seeds | " + " | ".join(columns) + " |", "|---|---|---|" + "---|" * len(columns)]
    for method in methods:
        for network in ("student", "teacher"):
            mine = [r for r in rows if r["method"] == method and r["network"] == network]
            cells = [spread([100 * float(r[name]) for r in mine]) for name in columns]
            shown = "moving average" if network == "teacher" else network
            lines.append(f"| {method} | {shown} | {len(mine)} | " + " | ".join(cells) + " |")
    for name in ("AP", "AP50"):
        teacher = {(r["method"], r["seed"]): 100 * float(r[name]) for r in rows if r["network"] == "teacher"}
        margins = [value - teacher[BASELINE, seed] for (method, seed), value in teacher.items() if method != BASELINE]
        each, title = ", ".join(f"{m:+.2f}" for m in margins), TITLES[methods[1]]
        lines += ["", f"{name} of {title} minus the baseline's (moving averages): {spread(margins)} points; by seed {each}."]
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
    jobs = [(method, seed) for method in reversed(recipe.methods) for seed in range(args.seeds)]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda job: train(data, *job, recipe, args), jobs))
    curves = [row for (method, seed), lines in zip(jobs, runs, strict=True) for row in curve(lines, method, seed)]
    last = max(int(row["it"]) for row in curves)
    rows = [{**row, "iters": last, "percent": 10, "device": args.device, "commit": commit()} for row in curves if row["it"] == last]
    stem = f"{args.set}_{args.device}"
    write_csv(RESULTS / f"{stem}_curves.csv", curves)
    write_csv(RESULTS / f"{stem}.csv", rows)
    (RESULTS / f"{stem}.md").write_text(table(rows, recipe.methods) + "\n")
    print(table(rows, recipe.methods))


if __name__ == "__main__":
    main()
