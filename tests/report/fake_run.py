"""Writes run folders as the trainer does, with curves of a plausible shape, for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

CLASSES = ["disc", "square", "triangle", "ring", "cross", "star"]
TRUTH = [420, 210, 96, 48, 20, 9]
PLAIN = ("supervised", "ssd_det")  # without teacher and pseudo labels
SIZE = (160, 120)  # width, height of the preview images


def write_run(
    folder: Path,
    *,
    method: str = "mixpl",
    seed: int = 0,
    iters: int = 600,
    finished: bool = True,
    quality: bool = True,
    previews: bool = True,
    classes: list[str] | None = None,
    name: str | None = None,
) -> Path:
    """A run folder with metrics.jsonl, env.json and previews; methods in PLAIN have neither teacher nor pseudo labels."""
    rng = random.Random(f"{method}{seed}")
    names = classes or CLASSES
    folder.mkdir(parents=True)
    rows = [_run_line(name or folder.name, method, seed, iters, names)]
    for it in range(10, iters + 1, 10):
        rows.append(_train_line(rng, it, iters, method))
        if it % max(10, iters // 6 // 10 * 10) == 0:
            rows.append(_eval_line(rng, it, iters, method, names))
            if quality and method not in PLAIN:
                rows.append(_quality_line(rng, it, iters, names))
    rows += [{"type": "event", "level": "info", "it": 0, "message": f"{len(names)} classes, 40 labelled images"}]
    if method not in PLAIN:
        rows.append({"type": "event", "level": "warning", "it": 200, "message": f"class '{names[-1]}' got 0 pseudo labels"})
    if finished:
        rows.append({"type": "summary", "it": iters, "seconds": 171.3})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    versions = {"ssod_fast": "0.1.0", "python": "3.11.2", "torch": "2.11.0", "torchvision": "0.26.0", "device": "cpu", "threads": 2}
    (folder / "env.json").write_text(json.dumps(versions))
    if previews and method not in PLAIN:
        _write_previews(rng, folder / "pseudo_preview", iters, names)
    return folder


def _run_line(name: str, method: str, seed: int, iters: int, classes: list[str]) -> dict:
    config = {
        "method": {"name": method},
        "iters": iters,
        "lr": 0.02,
        "seed": seed,
        "batch": "4:4",
        "views": {"short_side": [96, 160], "max_side": 192},
        "ema": {"floor": 2e-3},
        "name": name,
    }
    if method not in PLAIN:
        config["method"] |= {"cls_pseudo_thr": 0.4, **({"switch_at": iters // 2} if method == "semi_detr" else {"cache_size": 8})}
    head = {
        "type": "run",
        "name": name,
        "method": method,
        "classes": classes,
        "labeled": 40,
        "unlabeled": 0 if method in PLAIN else 360,
    }
    return head | {"split_hash": "9f2176a1b9c34de0aa12", "seed": seed, "config": config}


def _train_line(rng: random.Random, it: int, iters: int, method: str) -> dict:
    fall = math.exp(-3 * it / iters)
    losses = {f"sup/{term}": base * (0.25 + 0.75 * fall) * rng.uniform(0.85, 1.15) for term, base in _TERMS}
    line = {"type": "train", "it": it, "time": it * 0.28, "lr": 0.02 * min(1.0, it / 50), "it_per_s": rng.uniform(3.2, 3.8)}
    if method not in PLAIN:
        kinds = ("unsup",) if method == "semi_detr" else ("mixup", "mosaic")
        losses |= {f"{kind}/{term}": 0.6 * base * (0.4 + 0.6 * fall) * rng.uniform(0.7, 1.3) for kind in kinds for term, base in _TERMS}
        line["pseudo"] = _pseudo(rng, it / iters, method)
    if method == "ssd_det":
        line["diagnostics"] = _diagnostics(rng, it / iters)
    split = {"data": 0.05, "teacher": 0.2, "mix": 0.02, "student": 0.63, "optimizer": 0.1}
    return line | {"loss": sum(losses.values()), "losses": losses, "time_split": split}


def _diagnostics(rng: random.Random, share: float) -> dict:
    levels = {"noisy": 0.45, "stage1": 0.45 + 0.1 * share, "refined": 0.45 + 0.2 * share}
    means = {f"bag{stage}": 0.4 + 0.09 * stage * share for stage in range(3)}
    best = {f"bag{stage}_max": 0.6 + 0.09 * stage * share for stage in range(3)}
    return {f"{name}_iou": value + rng.uniform(-0.01, 0.01) for name, value in {**levels, **means, **best}.items()}


_TERMS = (("classification", 1.1), ("bbox_regression", 0.7), ("bbox_ctrness", 0.68))


def _pseudo(rng: random.Random, share: float, method: str) -> dict:
    kept = max(0.0, 3.2 * share + rng.uniform(-0.5, 0.5))
    common = {"raw_per_image": 60 - 30 * share, "kept_per_image": kept, "max_score": min(0.97, 0.3 + 0.7 * share)}
    if method == "semi_detr":  # nothing is mined in the second stage
        mined = {"mined_per_image": 0.7 * kept, "cost_thr": -2.0 * share} if share < 0.5 else {}
        return common | {"reliable_per_image": kept + 1} | mined
    return common | {"gate": float(kept > 0.6 and rng.random() < 0.85), "mosaic_gate": float(kept > 0.3)}


def _metrics(rng: random.Random, level: float, classes: list[str]) -> dict:
    per_class = {name: max(0.0, level * (1.2 - 0.15 * i) + rng.uniform(-0.02, 0.02)) for i, name in enumerate(classes)}
    sizes = {"AP_small": level * 0.5, "AP_medium": level * 1.1, "AP_large": -1.0}
    means = {"AP": level, "AP50": 1.7 * level, "AP75": 0.9 * level, "AR1": level, "AR10": 1.2 * level, "AR100": 1.3 * level}
    return means | sizes | {"per_class": per_class, "per_class50": {name: 1.6 * value for name, value in per_class.items()}}


def _eval_line(rng: random.Random, it: int, iters: int, method: str, classes: list[str]) -> dict:
    top = 0.26 if method in PLAIN else 0.33
    level = top * (1 - math.exp(-3 * it / iters))
    line = {"type": "eval", "it": it, "student": _metrics(rng, level * 0.93 if method not in PLAIN else level, classes)}
    return line if method in PLAIN else line | {"teacher": _metrics(rng, level, classes)}


def _quality_line(rng: random.Random, it: int, iters: int, classes: list[str]) -> dict:
    share = it / iters
    table = {
        name: {
            "precision": 0.9 - 0.1 * i,
            "recall": max(0.0, 0.7 * share - 0.1 * i),
            "pseudo": int(truth * max(0.0, 0.8 * share - 0.1 * i)),
            "truth": truth,
        }
        for i, (name, truth) in enumerate(zip(classes, TRUTH + [5] * len(classes), strict=False))
    }
    thr = [i / 20 for i in range(1, 20)]
    curve = {"thr": thr, "precision": [0.3 + 0.65 * t for t in thr], "recall": [0.8 * share * (1 - t**2) for t in thr]}
    line = {"type": "quality", "it": it, "source": "hidden", "thr": 0.4, "precision": 0.6 + 0.25 * share, "recall": 0.1 + 0.45 * share}
    line |= {"mean_iou": 0.68 + 0.1 * share, "kept_per_image": 3.2 * share, "raw_per_image": 60 - 30 * share, "truth_per_image": 5.4}
    sizes = {"recall_small": 0.2 * share, "recall_medium": 0.6 * share, "recall_large": 0.8 * share}
    return line | sizes | {"per_class": table, "curve": curve}


# --- previews -----------------------------------------------------------------------------------------------------------------------


def _boxes(rng: random.Random, classes: list[str], count: int) -> dict:
    boxes = []
    for _ in range(count):
        x, y, w, h = rng.uniform(2, 110), rng.uniform(2, 80), rng.uniform(12, 48), rng.uniform(10, 38)
        boxes.append([x, y, min(x + w, SIZE[0]), min(y + h, SIZE[1])])
    return {"boxes": boxes, "labels": [rng.randrange(len(classes)) for _ in boxes]}


def _paint(rng: random.Random, truth: dict) -> Image.Image:
    image = Image.new("RGB", SIZE, tuple(rng.randrange(60, 120) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for x in range(0, SIZE[0], 8):
        draw.line([(x, 0), (x, SIZE[1])], fill=tuple(rng.randrange(60, 130) for _ in range(3)))
    for box, label in zip(truth["boxes"], truth["labels"], strict=True):
        draw.ellipse(box, fill=((label * 90) % 255, (label * 50 + 80) % 255, 200 - label * 20))
    return image


def _guess(rng: random.Random, truth: dict, share: float) -> dict:
    boxes = [[v + rng.uniform(-4, 4) for v in box] for box in truth["boxes"]]
    return {"boxes": boxes, "labels": truth["labels"], "scores": [min(0.99, share * rng.uniform(0.4, 1.1)) for _ in boxes]}


def _write_previews(rng: random.Random, folder: Path, iters: int, classes: list[str]) -> None:
    (folder / "images").mkdir(parents=True)
    truths = [_boxes(rng, classes, rng.randrange(2, 7)) for _ in range(10)]
    for i, truth in enumerate(truths):
        _paint(rng, truth).save(folder / "images" / f"{i}.jpg", quality=85)
    for it in range(iters // 6, iters + 1, iters // 6):
        entries = [
            {"image_id": i, "file": f"images/{i}.jpg", "hw": [SIZE[1], SIZE[0]], "scale": 1.0, "truth": truth}
            | {"teacher": _guess(rng, truth, it / iters), "student": _guess(rng, truth, it / iters)}
            for i, truth in enumerate(truths)
        ]
        (folder / f"step_{it:06d}.json").write_text(json.dumps(entries))
        (folder / f"mixed_{it:06d}.json").write_text(
            json.dumps([_mixed(rng, folder, it, k, kind, classes) for k, kind in enumerate(_KINDS)])
        )


_KINDS = ("mixup", "mixup", "mosaic", "labeled")


def _mixed(rng: random.Random, folder: Path, it: int, k: int, kind: str, classes: list[str]) -> dict:
    content = _boxes(rng, classes, 5)
    file = f"mixed_{it:06d}_{k}.jpg"
    _paint(rng, content).save(folder / file, quality=85)
    return {"file": file, "kind": kind} | content | {"scores": [rng.uniform(0.4, 1) for _ in content["boxes"]]}
