"""What a run says about itself before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .config import TrainConfig
from .console import table
from .sets import TrainingData

SHOWN_CLASSES = 12


def banner(
    config: TrainConfig[Any],
    data: TrainingData,
    *,
    it: int,
    processes: int,
    passes: tuple[float, float],
    lr: float,
    precision: str,
    evaluation: str,
) -> str:
    """The settings that decide about a run, one per line.

    Args:
        config: resolved.
        data: its images.
        it: iteration at which it continues; 0 for a new one.
        processes: number of processes.
        passes: over the labelled and the unlabelled images.
        lr: learning rate after scaling.
        precision: and device, in words.
        evaluation: images and program, in words.
    """
    classes = list(data.labeled.classes)
    shares = f"{config.accumulate} accumulated x {processes} process{'es' if processes > 1 else ''}"
    counts = f"{len(data.labeled)} labelled, {len(data.unlabeled or [])} unlabelled, {len(data.val or [])} for evaluation"
    rows = [
        ("run", f"{config.folder}" + (f", continued at iteration {it}" if it else "")),
        ("method", f"{config.method_name} on {config.model}"),
        ("stages", _stages(config)),
        ("images", counts),
        ("split", f"{config.percent:g} % fold {config.fold}, ids {str(data.split_hash)[:12]}" if config.percent else None),
        ("classes", f"{len(classes)}: {', '.join(classes[:SHOWN_CLASSES])}{', ...' if len(classes) > SHOWN_CLASSES else ''}"),
        ("steps", f"{config.iters} of {config.total_batch(processes)} images: {config.batch}{_draw(config)} x {shares}"),
        ("passes", f"{passes[0]:.1f} over the labelled, {passes[1]:.1f} over the unlabelled images"),
        ("lr", f"{lr:.3g} ({_optimizer(config)})"),
        ("precision", precision),
        ("weights", _weights(config)),
        ("evaluation", evaluation + (f", {_every(config)}, scores above {config.score_thr:g}" if data.val is not None else "")),
        ("hidden truth", f"of {len(data.hidden)} images, for the monitor only" if data.hidden is not None else None),
        ("seed", str(config.seed)),
    ]
    return table(rows)


def _optimizer(config: TrainConfig[Any]) -> str:
    optimizer = config.optimizer
    parts = [optimizer.name, f"weight decay {optimizer.weight_decay:g}"]
    parts += [f"gradients clipped to {optimizer.clip_norm:g}"] if optimizer.clip_norm else []
    parts += [f"backbone x {optimizer.backbone_lr_scale:g}"] if optimizer.backbone_lr_scale != 1 else []
    return ", ".join(parts)


def _draw(config: TrainConfig[Any]) -> str:
    return " on average" if config.batch_draw == "bernoulli" else ""


def _weights(config: TrainConfig[Any]) -> str:
    folder = config.model.removeprefix("hf:") if config.model.startswith("hf:") and Path(config.model[3:]).is_dir() else None
    return str(config.weights or config.backbone_weights or config.init_from or folder or "random")


def _every(config: TrainConfig[Any]) -> str:
    return f"every {config.eval_every} iterations" if config.eval_every != 1 else "every iteration"


def _stages(config: TrainConfig[Any]) -> str | None:
    """Of methods that change their matching on the way."""
    switch = getattr(config.method, "switch_at", None)
    return None if switch is None else f"one-to-many matching for {min(switch, config.iters)} iterations, then one-to-one"
