"""Where a training step of Semi-DETR spends its time, and what each way of not computing things twice saves.

`python benchmarks/training/semi_detr_profile.py` takes the step as the released code runs it (the oracle of the tests: one image, layer and
box after the other where that code loops), leaves out one detour after the other, and ends with the step of this package. All of them must
give the same gradients. One row per stage, step and part goes to results/semi_detr_profile_cpu.csv, the table to
results/semi_detr_profile_cpu.md.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "tests"))  # the oracle

import semi_detr_literal  # noqa: E402
import semi_detr_oracle as oracle  # noqa: E402
from tiny_detector import make_batches  # noqa: E402

from ssod_fast.detectors import build_detector  # noqa: E402
from ssod_fast.methods import SemiDETR, SemiDETRConfig, SemiSupervisedDetector  # noqa: E402
from ssod_fast.methods.semi_detr import branches, consistency, hybrid, mining, teacher  # noqa: E402

SWITCH = 10  # of the method; iterations 0 and SWITCH stand for the stages
STAGES = {1: 0, 2: SWITCH}
PARTS = (
    "teacher backbone",
    "student backbone",
    "teacher encoder",
    "student encoder",
    "teacher decoder",
    "student decoder",
    "pseudo boxes",
    "matching and losses",
    "mining",
    "projector",
    "consistency loss",
    "backward",
    "rest",
)
# The released step, then what is left out, one after the other.
STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("as released", {}),
    ("matching, mining, suppression and losses of all images and layers at once (R7 to R11)", {"solver": "shipped"}),
    ("teacher's backbone once (R1)", {"backbone": False}),
    ("encoders once (R2)", {"encoder": False}),
    ("matching queries apart from the others (R3)", {"joint": False}),
    ("one group of consistency queries (R4)", {"groups": 1}),
    ("no denoising queries in the teacher (R5)", {"teacher_denoising": False}),
    ("nothing that is multiplied by 0 (R6)", {"dead_work": False}),
)
SHIPPED = "this package: matching queries once for all uses (R3)"


class Clock:
    """Adds up the processor time spent in named parts; a part within another counts for itself alone.

    Processor time, because what else a shared machine does while a step waits says nothing about the step.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time within goes to `name`."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def _charge(self) -> None:
        now = time.process_time()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """`function`, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed


def places(model: SemiSupervisedDetector) -> Iterator[tuple[Any, str, str]]:
    """Owner, attribute and part of every function that is timed."""
    for role, detector in (("student", model.student), ("teacher", model.teacher)):
        stages = {"extract": "backbone", "encode": "encoder", "select": "decoder", "decode": "decoder"}
        yield from ((detector.network, name, f"{role} {part}") for name, part in stages.items())
    yield model.trainable.projector, "forward", "projector"  # type: ignore[union-attr]
    yield consistency, "roi_features", "projector"
    yield semi_detr_literal, "roi_features", "projector"
    yield consistency, "consistency_loss", "consistency loss"
    yield oracle, "consistency_loss", "consistency loss"
    yield hybrid.HybridMatching, "losses", "matching and losses"
    yield branches.DetectionLosses, "denoised", "matching and losses"
    yield mining.CostMiner, "__call__", "mining"
    yield teacher, "teacher_detections", "pseudo boxes"
    yield oracle, "teacher_detections", "pseudo boxes"
    literal = {"detect": "pseudo boxes", "hybrid": "matching and losses", "denoising_losses": "matching and losses"}
    literal |= {"assignment": "mining", "cost_threshold": "mining", "consistency": "consistency loss"}
    yield from ((semi_detr_literal, name, part) for name, part in literal.items())


@contextmanager
def timed(model: SemiSupervisedDetector, clock: Clock) -> Iterator[None]:
    """Times the parts of whatever runs within."""
    replaced = []
    for owner, name, part in places(model):
        own = vars(owner).get(name)
        setattr(owner, name, clock.wrapped(getattr(owner, name), part))
        replaced.append((owner, name, own))
    try:
        yield
    finally:
        for owner, name, own in reversed(replaced):
            delattr(owner, name) if own is None else setattr(owner, name, own)


def make_model(args: argparse.Namespace) -> SemiSupervisedDetector:
    """A DINO with random weights whose classes are spread so that some twenty boxes of an image pass the threshold."""
    torch.manual_seed(0)
    sizes = {"width": args.width, "encoder_layers": args.layers, "decoder_layers": args.layers, "queries": args.queries, "ffn": args.ffn}
    student = build_detector(args.model, args.classes, frozen_bn=True, denoising=100, **sizes)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "classes" in name and name.endswith("weight"):
                parameter.normal_(std=args.spread * args.width**-0.5)  # of normed states
            elif "classes" in name:
                parameter.fill_(args.bias)
    model = SemiSupervisedDetector(student, SemiDETR(SemiDETRConfig(switch_at=SWITCH)))
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter) * parameter.std(correction=0))
    return model.train()


def slow_steps(model: SemiSupervisedDetector) -> Iterator[tuple[str, Callable[..., torch.Tensor]]]:
    """Name and total loss of every step, from the released one to that of this package."""
    slow = oracle.Slow()
    for name, change in STEPS:
        slow = dataclasses.replace(slow, **change)
        step = oracle.LiteralStep(model, slow)
        yield name, lambda *batches, step=step: sum(step(*batches).values())
    yield SHIPPED, lambda *batches: _shipped(model, *batches)


def _shipped(model: SemiSupervisedDetector, *batches: Any) -> torch.Tensor:
    model.method._last = -1  # type: ignore[attr-defined]  # else a second call would pass for an accumulated step, with other noise
    return model.training_step(*batches).loss


def measure(model: SemiSupervisedDetector, loss: Callable[..., torch.Tensor], batches: Any, it: int) -> tuple[dict[str, float], float]:
    """Processor seconds by part of one step with its backward, and the norm of the student's gradients."""
    model.zero_grad(set_to_none=True)
    clock = Clock()
    with timed(model, clock), clock.part("rest"):
        total = loss(*batches, it)
        with clock.part("backward"):
            total.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.student.parameters() if p.grad is not None])
    return {name: clock.seconds.get(name, 0.0) for name in PARTS}, float(norm)


def profile(model: SemiSupervisedDetector, batches: Any, stage: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of one stage: the median over `repeats` of every part, steps taking turns so that a slow moment hits all of them."""
    steps = list(slow_steps(model))
    norms: dict[str, float] = {}
    taken: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(repeats + 1):
        for name, loss in steps:
            seconds, norms[name] = measure(model, loss, batches, STAGES[stage])
            taken[name].append(seconds)
    worst = max(abs(norm / norms[SHIPPED] - 1) for norm in norms.values())
    if worst > 1e-3:
        raise SystemExit(f"stage {stage}: gradients differ by {worst:.2g} in their norm: {norms}")
    for name, _ in steps:
        warm = taken[name][1:]  # the first round pays for start-up
        for part in PARTS:
            yield {"stage": stage, "step": name, "part": part, "seconds": statistics.median(row[part] for row in warm)}
        yield {"stage": stage, "step": name, "part": "total", "seconds": statistics.median(sum(row.values()) for row in warm)}


def table(rows: list[dict[str, Any]], said: str) -> str:
    """Seconds by step and part, and how many times faster than the released step."""
    lines = [said]
    for stage in STAGES:
        mine = {(r["step"], r["part"]): r["seconds"] for r in rows if r["stage"] == stage}
        parts = [part for part in PARTS if any(mine[step, part] >= 5e-4 for step, _ in mine)]
        released = mine[STEPS[0][0], "total"]
        lines += ["", f"Stage {stage}:", "", f"| step | total | faster | {' | '.join(parts)} |", "|---|" + "---|" * (len(parts) + 2)]
        for step in dict.fromkeys(step for step, _ in mine):
            cells = " | ".join(f"{mine[step, part]:.3f}" for part in parts)
            lines.append(f"| {step} | {mine[step, 'total']:.2f} | {released / mine[step, 'total']:.2f} x | {cells} |")
    return "\n".join(lines) + "\n"


def describe(model: SemiSupervisedDetector, batches: Any, args: argparse.Namespace) -> str:
    """What was measured."""
    stats = model.training_step(*batches, 0).stats
    model.zero_grad(set_to_none=True)
    assert stats is not None
    kept, mined = stats.kept_count.float().mean(), stats.extra["mined_per_image"]
    counts = f"{stats.raw_count.float().mean():.0f} detections, {mined:.1f} mined and {kept:.1f} kept pseudo boxes per image"
    size = f"{args.layers} + {args.layers} layers of width {args.width}, {args.queries} queries, {args.classes} classes"
    images = f"{args.labeled} labelled and {args.unlabeled} unlabelled images of {args.height} x {args.width_px} pixels"
    return (
        f"Processor seconds of one step with its backward: {args.model} with {size}; {images}; {counts}; float32, {args.threads} thread of "
        f"a CPU. Medians of {args.repeats}. The projector's time includes the pooling of its input, the decoder's that of the heads."
    )


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="own:dino_resnet50")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6, help="of the encoder, and of the decoder")
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--bias", type=float, default=-4.8, help="mean of the logits: how rare high scores are")
    parser.add_argument("--spread", type=float, default=3.0, help="deviation of the logits")
    parser.add_argument("--labeled", type=int, default=1)
    parser.add_argument("--unlabeled", type=int, default=4)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width-px", type=int, default=320)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows and the table")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    model = make_model(args)
    batches = make_batches(0, args.labeled, args.unlabeled, (args.height, args.width_px))
    said = describe(model, batches, args)
    rows = [row for stage in STAGES for row in profile(model, batches, stage, args.repeats)]
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "semi_detr_profile_cpu.csv").open("w", newline="") as file:
        settings = {name: str(value) for name, value in vars(args).items() if name != "out"} | {"commit": commit()}
        writer = csv.DictWriter(file, [*rows[0], *settings], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "seconds": f"{row['seconds']:.5f}", **settings} for row in rows)
    (args.out / "semi_detr_profile_cpu.md").write_text(table(rows, said))
    print(table(rows, said))


if __name__ == "__main__":
    main()
