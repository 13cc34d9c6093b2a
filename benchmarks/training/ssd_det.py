"""Training on inaccurate boxes: SSD-Det against the same detector without it, on real images with 40 % label noise, several seeds.

`python benchmarks/training/ssd_det.py bccd` takes the images from SSOD_FAST_DATA (default ../shared). Per seed it moves all training boxes
with a noise seed of its own, trains the plain detector and SSD-Det on them, corrects the boxes with the refiner, and (with `--retrain`)
trains the plain detector once more on the corrected ones, everything through the command line that users have. One row per seed and run
goes to results/ssd_det_<set>_<device>.csv, the overlap with the clean boxes over training to ..._curves.csv, plots of it to
..._refined_iou.svg, ..._bag_iou.svg and ..._bag_best_iou.svg, the table to ....md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from real_data import BACKBONE, DATA, METRICS, RESULTS, ROOT, SMALL_VIEWS, commit, spread, write_csv

LEVEL = 0.4
PLAIN, METHOD, RETRAINED = "supervised", "ssd_det", "retrained"
TITLES = {PLAIN: "plain, noisy boxes", METHOD: "SSD-Det, noisy boxes", RETRAINED: "plain, refined boxes"}
SHOWN = ("noisy_iou", "stage1_iou", "refined_iou", "bag0_iou", "bag1_iou", "bag2_iou", "bag0_max_iou", "bag1_max_iou", "bag2_max_iou")


@dataclass(frozen=True)
class Recipe:
    """Settings of one comparison.

    Attributes:
        data: folder of the images.
        common: settings of all runs.
        method: options of SSD-Det.
    """

    data: str
    common: dict[str, Any]
    method: dict[str, Any]


# AdamW suits runs of this length; the released recipe, SGD over 12 epochs of COCO, is far longer.
OPTIMIZER: dict[str, Any] = {"name": "adamw", "weight_decay": 0.01, "clip_norm": 10.0}
RECIPES = {
    # Minutes on one core: small views, narrow layers, bags of 45 instead of 125 proposals.
    "bccd": Recipe(
        "bccd",
        {
            "model": "torchvision:fasterrcnn_mobilenet_v2_fpn",
            "model_options": ["fpn_channels=64", "representation_size=256", "levels=[2,5]"],
            "batch": "2",
            "iters": 600,
            "lr": 5e-4,
            "optimizer": OPTIMIZER,
            "schedule": {"warmup": 50, "milestones": [0.75]},
            "views": SMALL_VIEWS,
        },
        {"hidden": 256, "ratios": [1.0, 1.2, 0.8], "negatives": 100},
    ),
    "aquarium": Recipe(
        "aquarium",
        {
            "model": "torchvision:fasterrcnn_mobilenet_v2_fpn",
            "model_options": ["levels=[2,5]"],
            "batch": "4",
            "iters": 3000,
            "lr": 3e-4,
            "optimizer": OPTIMIZER,
            "schedule": {"warmup": 200, "milestones": [0.75]},
            "views": {"short_side": [256, 640], "max_side": 768, "test_short_side": 448},
        },
        {},
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What one seed gave: final numbers by run, and the diagnostics of SSD-Det over training."""

    rows: list[dict[str, Any]]
    curve: list[dict[str, Any]]


def command(args: argparse.Namespace, name: str, *words: str) -> None:
    """Runs `ssod-fast` with its output in a log file."""
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"{name}.log").open("a") as log:
        done = subprocess.run([sys.executable, "-m", "ssod_fast.cli", *words], stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name} ended with {done.returncode}: see {log.name}")


def config(run: str, seed: int, labeled: Path, recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """The settings of one run, as `ssod-fast train --config` reads them."""
    return {
        **recipe.common,
        **({"iters": args.iters} if args.iters else {}),
        "labeled": str(labeled),
        "val": str(DATA / "data" / recipe.data / "annotations" / "instances_val.json"),
        "backbone_weights": str(BACKBONE),
        "method": {"name": METHOD, **recipe.method} if run == METHOD else {"name": PLAIN},
        "eval_every": (args.iters or recipe.common["iters"]),
        "log_every": max(1, (args.iters or recipe.common["iters"]) // 60),
        "seed": seed,
        "device": args.device,
        "threads": args.threads,
        "workers": args.workers,
        "out": str(args.out),
        "name": run_name(run, seed, args),
    }


def run_name(run: str, seed: int, args: argparse.Namespace) -> str:
    return f"inaccurate-{args.set}-{run}-{seed}"


def train(run: str, seed: int, labeled: Path, recipe: Recipe, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs one training; the same call again continues or skips it. Returns the lines of its metrics file."""
    name = run_name(run, seed, args)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = args.out / f"{name}.yaml"
    settings.write_text(yaml.safe_dump(config(run, seed, labeled, recipe, args)))
    command(args, name, "train", "--config", str(settings))
    return [json.loads(line) for line in (args.out / name / "metrics.jsonl").read_text().splitlines()]


def one_seed(seed: int, recipe: Recipe, args: argparse.Namespace) -> Outcome:
    """Noise, runs and refinement of one seed."""
    folder = args.out / f"inaccurate-{args.set}-boxes-{seed}"
    source = DATA / "data" / recipe.data / "annotations" / "instances_train.json"
    draw = ["--level", str(LEVEL), "--seed", str(45 + seed), "--out", str(folder)]
    command(args, folder.name, "noise", str(source), *draw)
    noisy = next(file for file in folder.glob("*_noise-*.json") if "manifest" not in file.name and "refined" not in file.name)
    lines = {run: train(run, seed, noisy, recipe, args) for run in (METHOD, PLAIN)}
    run_folder = args.out / run_name(METHOD, seed, args)
    command(args, folder.name, "refine", str(run_folder), str(noisy), "--device", args.device, "--out", str(folder))
    refined = folder / f"{noisy.stem}_refined.json"
    if args.retrain:
        lines[RETRAINED] = train(RETRAINED, seed, refined, recipe, args)
    boxes = boxes_of(*(json.loads(file.with_suffix(".manifest.json").read_text()) for file in (noisy, refined)))
    rows = [{"run": run, "seed": seed, **last_metrics(found), **boxes} for run, found in lines.items()]
    return Outcome(rows, list(curve(lines[METHOD], seed)))


def boxes_of(noise: dict[str, Any], refined: dict[str, Any]) -> dict[str, str]:
    """Overlap of the training boxes with the clean ones before and after, and what identifies the noisy ones."""
    parts = {"noisy": refined["before"], "refined": refined["after"]}
    found = {f"{name} {key}": f"{part[key]:.4f}" for name, part in parts.items() for key in ("mean_iou", "share_50", "share_75")}
    return {**found, "noise seed": str(noise["noise_seed"]), "noise sha256": noise["boxes_sha256"]}


def last_metrics(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The student's last evaluation."""
    last = [line for line in lines if line["type"] == "eval"][-1]
    seconds = next((line["seconds"] for line in lines if line["type"] == "summary"), None)
    return {"it": last["it"], "seconds": seconds, **{name: f"{last['student'][name]:.5f}" for name in METRICS}}


def curve(lines: list[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """Diagnostics of every line of the log."""
    for line in lines:
        if line["type"] == "train" and line.get("diagnostics"):
            yield {"seed": seed, "it": line["it"], **{name: f"{line['diagnostics'][name]:.4f}" for name in SHOWN}}


def table(rows: list[dict[str, Any]], curves: list[dict[str, Any]]) -> str:
    """AP of the runs, overlap of the boxes, and the margins per seed."""
    lines = ["| run | seeds | " + " | ".join(METRICS) + " | seconds |", "|---|---|" + "---|" * (len(METRICS) + 1)]
    runs = list(dict.fromkeys(r["run"] for r in rows))
    for run in runs:
        mine = [r for r in rows if r["run"] == run]
        cells = [spread([100 * float(r[name]) for r in mine]) for name in METRICS]
        seconds = statistics.mean(float(r["seconds"]) for r in mine)
        lines.append(f"| {TITLES[run]} | {len(mine)} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    for run in runs:
        if run != PLAIN:
            gaps = "; ".join(f"{name} {margins(rows, run, name)}" for name in ("AP50", "AP"))
            lines += ["", f"{TITLES[run]} minus {TITLES[PLAIN]}: {gaps}."]
    return "\n".join([*lines, "", *box_lines(rows), "", *curve_lines(curves)])


def margins(rows: list[dict[str, Any]], run: str, name: str) -> str:
    """Difference to the plain detector, mean and by seed."""
    values = {(r["run"], r["seed"]): 100 * float(r[name]) for r in rows}
    gaps = [value - values[PLAIN, seed] for (who, seed), value in values.items() if who == run]
    return f"{spread(gaps)} points ({', '.join(f'{gap:+.2f}' for gap in gaps)})"


def box_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Boxes of the training set before and after the refiner."""
    mine = [r for r in rows if r["run"] == METHOD]
    lines = ["| training boxes | mean IoU with the clean ones | IoU >= .5, % | IoU >= .75, % |", "|---|---|---|---|"]
    for name in ("noisy", "refined"):
        iou = spread_of([float(r[f"{name} mean_iou"]) for r in mine])
        shares = (spread([100 * float(r[f"{name} {key}"]) for r in mine]) for key in ("share_50", "share_75"))
        lines.append(f"| {name} | {iou} | " + " | ".join(shares) + " |")
    gaps = [float(r["refined mean_iou"]) - float(r["noisy mean_iou"]) for r in mine]
    return [*lines, "", f"Margin of the refined boxes: {spread_of(gaps)}; by seed {', '.join(f'{gap:+.4f}' for gap in gaps)}."]


def curve_lines(curves: list[dict[str, Any]]) -> list[str]:
    """Overlap with the clean boxes in training: mean over the first and the last tenth of the log of each seed, then over the seeds."""
    lines = ["| IoU with the clean boxes in training | first tenth | last tenth |", "|---|---|---|"]
    seeds = list(dict.fromkeys(row["seed"] for row in curves))
    for name in SHOWN:
        ends = []
        for seed in seeds:
            values = [float(row[name]) for row in curves if row["seed"] == seed]
            part = max(1, len(values) // 10)
            ends.append((statistics.mean(values[:part]), statistics.mean(values[-part:])))
        lines.append(f"| {name} | {spread_of([e[0] for e in ends])} | {spread_of([e[1] for e in ends])} |")
    return lines


def spread_of(values: list[float]) -> str:
    """Mean and standard deviation of overlaps."""
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"


def write_plots(folders: list[Path], stem: str) -> None:
    """The figures of the report, one colour per seed."""
    from ssod_fast.report.charts import refined_boxes
    from ssod_fast.report.runs import read_runs
    from ssod_fast.report.svg import plain_light

    for panel in refined_boxes(read_runs(folders)):
        if panel is not None:
            (RESULTS / f"{stem}_{panel.key}.svg").write_text(plain_light(panel.svg))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=sorted(RECIPES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iters", type=int, default=None, help="instead of the recipe's; the rows say how many there were")
    parser.add_argument("--retrain", action="store_true", help="also train the plain detector on the refined boxes")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of a run")
    parser.add_argument("--out", type=Path, default=ROOT / "runs")
    return parser.parse_args()


def main() -> None:
    args = parse()
    recipe = RECIPES[args.set]
    with ThreadPoolExecutor(args.jobs) as pool:
        outcomes = list(pool.map(lambda seed: one_seed(seed, recipe, args), range(args.seeds)))
    made_at = {"device": args.device, "commit": commit()}
    rows = [{**row, **made_at} for outcome in outcomes for row in outcome.rows]
    curves = [row for outcome in outcomes for row in outcome.curve]
    stem = f"ssd_det_{args.set}_{args.device}"
    write_csv(RESULTS / f"{stem}.csv", rows)
    write_csv(RESULTS / f"{stem}_curves.csv", curves)
    (RESULTS / f"{stem}.md").write_text(table(rows, curves) + "\n")
    write_plots([args.out / run_name(METHOD, seed, args) for seed in range(args.seeds)], stem)
    print(table(rows, curves))


if __name__ == "__main__":
    main()
