"""The refiner's step of SSD-Det against an eager composition of the released sequence of operations, in one run.

`python benchmarks/methods/ssd_det_step.py` takes one refiner and one set of feature maps and runs forward and backward in two ways: as this
package does it, and as the released code does it, one operation after the other: bags built image by image in loops over ratios and shakes,
pooling level by level behind a `nonzero`, with torchvision's gradient, boxes merged image by image, numbers for the log read in every step,
and work for predicted overlaps whose results nobody uses. Then the detours are left out one after the other. Losses, refined boxes and
gradients of all ways must agree. One row per way and part goes to results/ssd_det_step_<device>.csv, the table to
results/ssd_det_step_<device>.md.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ssd_det_released import Clock, Detours, Eager, NoClock, Scene

from ssod_fast.methods.ssd_det import Levels, NoisyBoxes, Refiner, SSDDetConfig
from ssod_fast.methods.ssd_det import refiner as ours
from ssod_fast.structures import Target

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
STRIDES = (4, 8, 16, 32)
PARTS = (
    "bags",
    "pooling",
    "layers",
    "unused layers and features",
    "negatives",
    "merging",
    "numbers for the log",
    "losses and rest",
    "backward",
)
SHIPPED = "this package"


STEPS: tuple[tuple[str, Detours | None], ...] = (
    ("as released", Detours()),
    ("no unused work", Detours(unused=False)),
    ("no reads for the log", Detours(unused=False, logging=False)),
    ("pooling of this package", Detours(unused=False, logging=False, levels=False)),
    ("boxes merged at once", Detours(unused=False, logging=False, levels=False, merging=False)),
    (SHIPPED, None),
)


class Counter(TorchDispatchMode):
    """Counts operations, and those that make a GPU's host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view:
            self.operations += 1
        masks = name in ("index", "index_put", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        self.waits += name in ("_local_scalar_dense", "nonzero", "masked_select") or masks
        return func(*args, **(kwargs or {}))


# What of this package's step belongs to which part.
OURS = {
    "neighbours": "bags",
    "encode_boxes": "bags",
    "decode_boxes": "bags",
    "pool_boxes": "pooling",
    "_run": "layers",
    "merge_boxes": "merging",
    "relative_overlaps": "merging",
    "usable_boxes": "merging",
    "clip_to_image": "merging",
    "random_negative_boxes": "negatives",
    "_measure": "numbers for the log",
}


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Lets a clock see the parts of this package's step."""
    before: dict[str, Callable[..., Any]] = {name: getattr(ours, name) for name in OURS}

    def timed(name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with clock.part(OURS[name]):
                return before[name](*args, **kwargs)

        return run

    try:
        for name in OURS:
            setattr(ours, name, timed(name))
        yield
    finally:
        for name, function in before.items():
            setattr(ours, name, function)


def forward(refiner: Refiner, scene: Scene, detours: Detours | None, clock: Clock) -> tuple[Tensor, Mapping[str, Tensor]]:
    """One step in one of the ways."""
    if detours is not None:
        return Eager(refiner, detours, clock).step(scene)
    noisy = NoisyBoxes.pack(scene.targets, scene.sizes, scene.uniforms.device)
    found = refiner(scene.levels, noisy, scene.uniforms)
    return found.boxes, found.losses


@dataclass(frozen=True)
class Result:
    """What a step gave, for the comparison of the ways."""

    boxes: Tensor
    losses: dict[str, Tensor]
    gradients: list[Tensor]


def run(refiner: Refiner, scene: Scene, detours: Detours | None, clock: Clock) -> Result:
    """Forward and backward; every moment counts for a part."""
    leaves = [*scene.levels.maps, *refiner.parameters()]
    for leaf in leaves:
        leaf.grad = None
    with clock.part("losses and rest"):
        boxes, losses = forward(refiner, scene, detours, clock)
        total = torch.stack(list(losses.values())).sum()
    with clock.part("backward"):
        total.backward()
    return Result(boxes, {k: v.detach() for k, v in losses.items()}, [_gradient(leaf) for leaf in leaves])


def _gradient(leaf: Tensor) -> Tensor:
    """A copy; a level that no box is pooled from may have none."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()


def check(expected: Result, got: Result, step: str) -> None:
    """The ways compute the same thing, or a comparison of their times means nothing.

    Raises:
        SystemExit: boxes, losses or gradients differ.
    """
    for name, loss in expected.losses.items():
        if not torch.allclose(loss, got.losses[name], rtol=1e-3, atol=1e-6):
            raise SystemExit(f"{step}: {name} is {float(got.losses[name])}, expected {float(loss)}")
    if not torch.allclose(expected.boxes, got.boxes, atol=0.05):
        raise SystemExit(f"{step}: refined boxes differ by {float((expected.boxes - got.boxes).abs().max())} pixels")
    a, b = (torch.cat([g.flatten() for g in result.gradients]) for result in (expected, got))
    if float((a - b).norm()) > 5e-3 * float(a.norm()):
        raise SystemExit(f"{step}: gradients differ by {float((a - b).norm() / a.norm())} of their norm")


def profile(refiner: Refiner, scene: Scene, repeats: int) -> list[dict[str, Any]]:
    """Medians over interleaved repeats, one row per way and part."""
    device = scene.uniforms.device
    parts: dict[str, list[dict[str, float]]] = defaultdict(list)
    totals: dict[str, list[float]] = defaultdict(list)
    counted = {step: count(refiner, scene, detours) for step, detours in STEPS}
    expected = run(refiner, scene, None, NoClock(device))
    for step, detours in STEPS:  # also warms up
        check(expected, run(refiner, scene, detours, NoClock(device)), step)
    for _ in range(repeats):
        for step, detours in STEPS:
            clock = Clock(device)
            began = clock.now()
            run(refiner, scene, detours, NoClock(device))
            totals[step].append(clock.now() - began)
            with watched(clock):
                run(refiner, scene, detours, clock)
            parts[step].append(clock.seconds)
    rows = []
    for step, _ in STEPS:
        common = {"step": step, "operations": counted[step].operations, "waits": counted[step].waits}
        rows += [{**common, "part": part, "seconds": statistics.median(s.get(part, 0.0) for s in parts[step])} for part in PARTS]
        rows.append({**common, "part": "total", "seconds": statistics.median(totals[step])})
    return rows


def count(refiner: Refiner, scene: Scene, detours: Detours | None) -> Counter:
    """Operations and waits of a forward pass."""
    with Counter() as counter:
        forward(refiner, scene, detours, NoClock(scene.uniforms.device))
    return counter


def table(rows: list[dict[str, Any]], said: str) -> str:
    """Time, operations and waits of every way, then the parts of the first and the last."""
    seconds = {(row["step"], row["part"]): float(row["seconds"]) for row in rows}
    first = {row["step"]: row for row in rows if row["part"] == "total"}
    lines = [said, "", "| step | ms | as released / it | operations, forward | waits for a GPU, forward |", "|---|---|---|---|---|"]
    start = seconds[STEPS[0][0], "total"]
    for step, row in first.items():
        mine = seconds[step, "total"]
        lines.append(f"| {step} | {1e3 * mine:.1f} | {start / mine:.2f} x | {row['operations']} | {row['waits']} |")
    ends = (STEPS[0][0], SHIPPED)
    lines += ["", "| part, ms | " + " | ".join(ends) + " |", "|---|---|---|"]
    lines += [f"| {part} | " + " | ".join(f"{1e3 * seconds[step, part]:.1f}" for step in ends) + " |" for part in PARTS]
    return "\n".join(lines)


def make_scene(args: argparse.Namespace, device: torch.device) -> Scene:
    """Random maps and boxes inside of their images, of sides from 16 to 200 pixels."""
    draw = torch.Generator().manual_seed(0)
    h, w = args.height, args.width
    maps = [torch.randn(args.images, args.channels, h // s, w // s, generator=draw).to(device).requires_grad_() for s in STRIDES]
    targets = []
    for _ in range(args.images):
        side = 16 + torch.rand(args.boxes, 2, generator=draw) * (min(200, h, w) - 16)
        low = torch.rand(args.boxes, 2, generator=draw) * (torch.tensor([w, h]) - side)
        labels = torch.randint(args.classes, (args.boxes,), generator=draw)
        targets.append(Target(boxes=torch.cat([low, low + side], 1).to(device), labels=labels.to(device)))
    uniforms = torch.rand(args.images, args.negatives, 4, generator=draw).to(device)
    return Scene(Levels(maps, STRIDES), targets, [(h, w)] * args.images, uniforms)


def make_refiner(args: argparse.Namespace, device: torch.device) -> Refiner:
    """Weights in which proposals differ, as after some training."""
    torch.manual_seed(0)
    refiner = Refiner(SSDDetConfig(hidden=args.hidden, negatives=args.negatives), args.channels, args.classes)
    for name, parameter in refiner.named_parameters():
        if name.endswith("weight") and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=(0.2 if "reg" in name else 1.0) / parameter.shape[1] ** 0.5)
    return refiner.to(device)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--boxes", type=int, default=7, help="per image; COCO has 7.3")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--channels", type=int, default=None, help="of the pyramid; default 256, on the CPU 64")
    parser.add_argument("--hidden", type=int, default=None, help="of the layers; default 1024, on the CPU 256")
    parser.add_argument("--negatives", type=int, default=500)
    parser.add_argument("--height", type=int, default=None, help="of the images; default 800, on the CPU 416")
    parser.add_argument("--width", type=int, default=None, help="of the images; default 1216, on the CPU 608")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    small = args.device == "cpu"
    for name, defaults in {"channels": (256, 64), "hidden": (1024, 256), "height": (800, 416), "width": (1216, 608)}.items():
        setattr(args, name, getattr(args, name) or defaults[small])
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    rows = profile(make_refiner(args, device), make_scene(args, device), args.repeats)
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} thread"
    size = f"{args.images} images of {args.height} x {args.width} with {args.boxes} boxes each, {args.classes} classes"
    said = (
        f"{name}, torch {torch.__version__}: {size}, {args.channels} channels, {args.hidden} units, {args.negatives} negatives per image."
    )
    facts = {**vars(args), "torch": torch.__version__, "commit": done.stdout.strip() or "unknown"}
    rows = [{**row, **facts} for row in rows]
    stem = RESULTS / f"ssd_det_step_{args.device}"
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    stem.with_suffix(".md").write_text(table(rows, said) + "\n")
    print(table(rows, said))


if __name__ == "__main__":
    main()
