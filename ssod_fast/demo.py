"""The demonstration: synthetic scenes, a supervised baseline and MixPL on the same few labels, one report. CPU, no download, minutes.

Both runs share everything that both have: labelled images, detector and its initial weights, labelled batch, steps, learning rate,
augmentation, moving average and evaluation. MixPL differs by what it is: it also looks at the unlabelled images.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssod_fast.data.synthetic import SceneConfig
    from ssod_fast.training.config import TrainConfig

BASELINE, METHOD = "supervised", "mixpl"
SCENE_FOLDER = "scenes"


@dataclass(frozen=True)
class DemoConfig:
    """Size of the demonstration; the defaults fit two CPU cores and six minutes."""

    # Enough unlabelled images that the student cannot learn them by heart, few enough to draw in seconds.
    train_images: int = 250
    # Drawn like the others; both runs are judged by the same ones.
    val_images: int = 100
    # (height, width) in pixels; not square, so that swapped axes would show.
    size: tuple[int, int] = (96, 120)
    # Share of the training images that keep their labels.
    percent: float = 10.0
    # Optimizer steps of either run.
    iters: int = 1600
    # Labelled and unlabelled images per step.
    batch: tuple[int, int] = (4, 4)
    # Learning rate of either run.
    lr: float = 2e-3
    # Of the computation. Pictures of this size give a second core little to do, and on a busy machine threads wait for each other.
    threads: int = 1
    # Evaluations of a run.
    evaluations: int = 5
    # Unlabelled images whose boxes the report shows.
    preview_images: int = 8

    def __post_init__(self) -> None:
        for name in ("train_images", "val_images", "iters", "evaluations", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.percent < 100:
            raise ValueError(f"percent must lie in (0, 100): MixPL needs unlabelled images, got {self.percent}")
        if min(self.batch) < 1:
            raise ValueError(f"batch must hold at least one labelled and one unlabelled image, got {self.batch}")


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration found.

    Attributes:
        report: the HTML file.
        runs: run folder by method.
        metrics: COCO numbers in [0, 1] of the reported model by method, as in metrics.jsonl.
        seconds: duration of training and evaluation by method.
    """

    report: Path
    runs: dict[str, Path]
    metrics: dict[str, dict[str, Any]]
    seconds: dict[str, float]

    @property
    def margin(self) -> float:
        """AP50 of MixPL minus AP50 of the baseline, in points."""
        return 100.0 * float(self.metrics[METHOD]["AP50"] - self.metrics[BASELINE]["AP50"])


def run_demo(
    out: str | Path = "runs/demo", seed: int = 0, config: DemoConfig | None = None, quiet: bool = False, say: Callable[[str], None] = print
) -> DemoResult:
    """Draws the scenes, trains both runs, writes the report and prints the result in words.

    Args:
        out: folder for everything; an earlier demonstration in it is replaced.
        seed: of the scenes' labelled share, the initial weights and all training.
        config: size of the demonstration.
        quiet: no progress of the two trainings.
        say: receives the lines of the result.

    Raises:
        ImportError: a package of the extra `[train]` is missing.
    """
    config = config or DemoConfig()
    _require_extra()
    from ssod_fast.data.synthetic import write_scenes
    from ssod_fast.report import build_report

    root = Path(out)
    say(
        f"drawing {config.train_images} + {config.val_images} scenes of {config.size[1]} x {config.size[0]} pixels in {root / SCENE_FOLDER}"
    )
    write_scenes(root / SCENE_FOLDER, config.train_images, config.val_images, seed=0, config=_scene(config))
    results = {method: _train(training_config(root, method, seed, config), quiet) for method in (BASELINE, METHOD)}
    report = build_report([result.folder for result in results.values()], root / "report.html")
    outcome = DemoResult(
        report=report,
        runs={method: result.folder for method, result in results.items()},
        metrics={method: _reported(result.metrics) for method, result in results.items()},
        seconds={method: result.seconds for method, result in results.items()},
    )
    for line in summary(outcome, config):
        say(line)
    return outcome


def _require_extra() -> None:
    try:
        import accelerate  # noqa: F401
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
        import tyro  # noqa: F401
    except ImportError as error:
        raise ImportError(f'the demonstration needs the package {error.name}: pip install "ssod-fast[train]"') from error


def _scene(config: DemoConfig) -> SceneConfig:
    """Scenes that a tiny detector learns within minutes: objects of a fifth of the image or more, classes told by texture and hue."""
    from ssod_fast.data.synthetic import SceneConfig

    return SceneConfig(size=config.size, objects=(1, 5), object_size=(0.2, 0.6), hue_spread=0.06, tail=0.7, distractors=(0, 2))


def training_config(root: Path, method: str, seed: int, config: DemoConfig) -> TrainConfig[Any]:
    """Settings of one of the two runs; everything but the method's own options is the same.

    Args:
        root: folder of the demonstration, scenes included.
        method: "supervised" or "mixpl".
        seed: of the split and of training.
        config: size of the demonstration.
    """
    from ssod_fast.data.views import ViewConfig
    from ssod_fast.training.config import TrainConfig
    from ssod_fast.training.optim import OptimizerConfig, ScheduleConfig

    short = min(config.size)
    labeled, unlabeled = config.batch
    return TrainConfig(
        labeled=root / SCENE_FOLDER,
        method=_method(method, config),
        model="torchvision:fcos_tiny_fpn",
        model_options=("tiny_norm=batch", "head_convs=1", "nms_thresh=0.6"),
        iters=config.iters,
        batch=f"{labeled}:{unlabeled}" if method == METHOD else str(labeled),
        lr=config.lr,
        precision="fp32",
        device="cpu",
        seed=seed,
        threads=config.threads,
        workers=1,  # makes the views on the second core while the first one computes; changes no number
        percent=config.percent,
        fold=seed + 1,
        cover_classes=True,
        eval_every=max(1, config.iters // config.evaluations),
        log_every=max(1, min(20, config.iters // 20)),
        preview_images=config.preview_images,
        out=root,
        name=method,
        overwrite=True,
        report=False,
        views=ViewConfig(short_side=(round(0.8 * short), round(1.2 * short)), max_side=2 * short, test_short_side=short),
        optimizer=OptimizerConfig(name="adamw", reference_batch=labeled),
        schedule=ScheduleConfig(warmup=50, milestones=(0.75,)),
    )


def _method(name: str, config: DemoConfig) -> Any:
    from ssod_fast.methods import EMAConfig, MixPLConfig, SupervisedConfig

    # The published floor of 2e-4 averages over 15,000 iterations; this one over 60, which suits a thousand.
    ema = EMAConfig("mmdet", floor=0.05, gamma=4.0, interval=3)
    if name == BASELINE:
        return SupervisedConfig(ema=ema)  # the baseline is averaged, too, so that averaging is no part of the margin
    short = min(config.size)
    return MixPLConfig(
        cls_pseudo_thr=0.55,
        gate="sum",  # scenes without any confident object are common here, and one of them would silence the whole batch
        unsup_weight=1.0,
        mosaic_shape=((short // 2, short // 2), (5 * short // 6, 5 * short // 6)),  # official range, 400 to 800 for views of 400 to 1200
        # Weights are random at first. Then labels alone bring the baseline little further, and three of four pseudo boxes are right.
        burn_in=3 * config.iters // 8,
        ema=ema,
    )


@dataclass(frozen=True)
class _Finished:
    folder: Path
    metrics: dict[str, Any]
    seconds: float


def _train(config: TrainConfig[Any], quiet: bool) -> _Finished:
    import torch

    from ssod_fast.training.trainer import train

    threads, began = torch.get_num_threads(), time.perf_counter()
    try:
        result = train(config, quiet)
    finally:
        torch.set_num_threads(threads)  # a setting of the whole process, which may go on to do something else
    if result.status != "finished":  # Ctrl-C saves and returns; half a demonstration has no result
        raise KeyboardInterrupt
    return _Finished(result.folder, result.metrics, time.perf_counter() - began)


def _reported(metrics: dict[str, Any]) -> dict[str, Any]:
    """Numbers of the reported model: the averaged one."""
    return dict(metrics.get("teacher") or metrics["student"])


def summary(result: DemoResult, config: DemoConfig) -> list[str]:
    """The result in words, one line each."""
    labeled = int(config.percent / 100 * config.train_images)
    rows = [("", "AP50", "AP", "seconds")]
    names = {BASELINE: f"supervised, {labeled} labelled images", METHOD: f"MixPL, the same + {config.train_images - labeled} unlabelled"}
    for method, name in names.items():
        numbers = result.metrics[method]
        rows.append((name, f"{100 * numbers['AP50']:.1f}", f"{100 * numbers['AP']:.1f}", f"{result.seconds[method]:.0f}"))
    lines = [f"{name:<42}{ap50:>8}{ap:>8}{seconds:>9}" for name, ap50, ap, seconds in rows]
    word = "better" if result.margin > 0 else "worse"
    lines.append(f"MixPL is {abs(result.margin):.1f} AP50 points {word} than the baseline, with the same labels, steps and learning rate.")
    return [*lines, f"report: {result.report}"]
