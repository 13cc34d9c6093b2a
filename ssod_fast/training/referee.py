"""Evaluates teacher and student, keeps the best of each, and writes the pictures of every evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssod_fast.data.batches import LabeledBatch
from ssod_fast.data.loader import EvalLoader
from ssod_fast.data.records import ImageRecord
from ssod_fast.detectors import PixelStats
from ssod_fast.methods import SemiSupervisedDetector
from ssod_fast.methods.step import Preview
from ssod_fast.structures import Target

from .checkpoint import DetectorInfo, save_detector
from .config import TrainConfig
from .evaluation import CocoEvaluator, CocoMetrics
from .files import write_json
from .predict import Autocast, predict_all, same_random_numbers
from .previews import MIN_SCORE, PreviewWriter
from .quality import HiddenTruth, PseudoQuality
from .sets import TrainingData
from .tree import to_tree

TOPK = 100
CACHE_MB = 256
MANY_IMAGES = 300  # below, starting processes takes longer than decoding here


@dataclass(frozen=True)
class Verdict:
    """One evaluation.

    Attributes:
        models: numbers by model ("teacher", "student"), as in metrics.jsonl.
        quality: pseudo-label quality of the teacher on the validation set, where no hidden truth is known.
    """

    models: dict[str, dict[str, Any]]
    quality: dict[str, Any] | None


class Referee:
    """Judges the models of a run.

    Args:
        config: the run's.
        data: validation set, images to show, hidden truth.
        device: of the models.
        rank: of this process; each evaluates its share.
        processes: number of processes.
    """

    def __init__(self, config: TrainConfig[Any], data: TrainingData, device: torch.device, rank: int, processes: int) -> None:
        self.config, self.data, self.device, self.rank = config, data, device, rank
        self.best: dict[str, float] = {}
        self.last: dict[str, dict[str, Any]] = {}
        self.evaluators: dict[str, CocoEvaluator] = {}
        self.loader: EvalLoader | None = None
        if data.val is not None:
            workers = config.workers if len(data.val) > MANY_IMAGES else 0
            self.loader = EvalLoader(data.val, config.views, workers=workers, rank=rank, world_size=processes, cache_mb=CACHE_MB)
            self.val_truth = HiddenTruth([r.id for r in data.val.records], data.val.targets)
        shown: Sequence[ImageRecord] = data.unlabeled or (data.val.records if data.val is not None else [])
        self.shown_truth = data.hidden if data.unlabeled else getattr(self, "val_truth", None)
        self.previews = PreviewWriter(config.folder, shown, config.preview_images)
        self.preview_loader = (
            EvalLoader(self.previews.records, config.views, cache_mb=CACHE_MB) if shown and config.preview_images else None
        )

    @property
    def description(self) -> str:
        """The evaluation in words."""
        if self.data.val is None:
            return "none (no --val)"
        return f"{len(self.data.val)} images with {self._evaluator('student').backend}"

    def evaluate(self, model: SemiSupervisedDetector, it: int, final: bool, autocast: Autocast, method: str) -> Verdict | None:
        """Evaluates all models of `model`; keeps and writes what improved. None without a validation set."""
        models = {"student": model.student} if model.teacher is None else {"teacher": model.teacher, "student": model.student}
        with same_random_numbers():
            verdict = self._judge(models, autocast) if self.loader is not None else None
            if self.rank == 0:
                self._keep(models, verdict, it, method)
                self._show(models, it, autocast)
                if final and verdict is not None:
                    write_json(self.config.folder / "predictions.json", self._evaluator(next(iter(models))).predictions())
        return verdict

    def _evaluator(self, name: str) -> CocoEvaluator:
        if name not in self.evaluators:
            val = self.data.val
            assert val is not None
            self.evaluators[name] = CocoEvaluator(val.to_coco(), val.category_ids, val.classes, self.config.score_thr, TOPK)
        return self.evaluators[name]

    def _judge(self, models: dict[str, Any], autocast: Autocast) -> Verdict:
        assert self.loader is not None
        quality = self._proxy_quality(models)
        for name in models:
            self._evaluator(name).reset()
        for batch, predictions in predict_all(models, self.loader, self.device, self.config.score_thr, TOPK, autocast):
            for name, targets in predictions.items():
                self._evaluator(name).update(batch.image_ids, targets)
            for image_id, target in zip(batch.image_ids, predictions.get("teacher", []), strict=False):
                if quality is not None:
                    quality.add(target, self.val_truth[image_id])
        metrics: dict[str, CocoMetrics] = {}
        for name in models:
            self._evaluator(name).gather()
            metrics[name] = self._evaluator(name).compute()
        if quality is not None:
            quality.gather()
        self.last = {name: m.to_dict() for name, m in metrics.items()}
        return Verdict(self.last, None if quality is None else quality.result())

    def _proxy_quality(self, models: dict[str, Any]) -> PseudoQuality | None:
        """Measures the teacher on the validation set when the truth of the unlabelled images is unknown."""
        thr = getattr(self.config.method, "cls_pseudo_thr", None)
        if "teacher" not in models or thr is None or self.data.hidden is not None:
            return None
        return PseudoQuality(self.config_classes, thr)

    @property
    def config_classes(self) -> list[str]:
        """Class names by label."""
        return list(self.data.labeled.classes)

    def _keep(self, models: dict[str, Any], verdict: Verdict | None, it: int, method: str) -> None:
        """Writes the detectors that are better than before; without a validation set the newest ones."""
        for name, detector in models.items():
            ap = -1.0 if verdict is None else verdict.models[name]["AP"]
            if verdict is not None and name in self.best and ap <= self.best[name]:
                continue
            if verdict is not None:
                self.best[name] = ap
            numbers = {} if verdict is None else {k: v for k, v in verdict.models[name].items() if isinstance(v, float)}
            info = DetectorInfo(
                model=self.config.model,
                model_options=to_tree(getattr(detector, "build_options", self.config.model_kwargs)),
                classes=self.config_classes,
                category_ids=list(self.data.labeled.category_ids),
                views=to_tree(dataclasses.asdict(self.config.views)),
                which=name,
                method=method,
                it=it,
                metrics=numbers,
            )
            save_detector(self.config.folder / "weights" / f"best_{name}.safetensors", detector, info)

    def _show(self, models: dict[str, Any], it: int, autocast: Autocast) -> None:
        if self.preview_loader is None:
            return
        rows: list[tuple[int, dict[str, Target], tuple[Tensor, Tensor] | None]] = []
        with contextlib.suppress(OSError):  # images that cannot be read are no reason to stop
            for batch, predictions in predict_all(models, self.preview_loader, self.device, MIN_SCORE, TOPK, autocast):
                for i, image_id in enumerate(batch.image_ids):
                    truth = self.shown_truth
                    known = truth[image_id] if truth is not None and image_id in truth else None
                    rows.append((image_id, {name: targets[i] for name, targets in predictions.items()}, known))
        self.previews.write_step(it, rows)

    def write_mixed(self, it: int, previews: Sequence[Preview], labeled: LabeledBatch, stats: PixelStats) -> None:
        """Writes the inputs of one step."""
        if self.config.preview_images:
            self.previews.write_mixed(it, previews, labeled, stats)
