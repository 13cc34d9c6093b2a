"""COCO evaluation: one thin class around faster-coco-eval, or pycocotools where that is missing."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ssod_fast.structures import Target

STAT_NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")
BACKENDS = ("faster_coco_eval", "pycocotools")
NO_TRUTH = -1.0  # what the COCO protocol reports where there is nothing to find; shown as n/a


@dataclass(frozen=True)
class CocoMetrics:
    """Numbers of one evaluation in [0, 1]; -1 where there is no truth of that kind.

    Attributes:
        stats: the 12 COCO numbers under `STAT_NAMES`.
        per_class: AP at IoU .50:.95 by class name.
        per_class50: AP at IoU .5 by class name.
        precision50: [C, 101] precision at IoU .5 over the recalls 0, .01, ... 1 (-1 for a class without truth).
        images: number of images evaluated.
        backend: package that computed them.
    """

    stats: dict[str, float]
    per_class: dict[str, float]
    per_class50: dict[str, float]
    precision50: np.ndarray = field(repr=False, compare=False)
    images: int = 0
    backend: str = ""

    def __getitem__(self, name: str) -> float:
        return self.stats[name]

    def to_dict(self) -> dict[str, Any]:
        """The 12 numbers and both per-class tables, as plain JSON values."""
        return {**self.stats, "per_class": self.per_class, "per_class50": self.per_class50}


def show(value: float) -> str:
    """A metric as per cent with two digits, or `n/a` where there was no truth."""
    return "n/a" if value < 0 else f"{100 * value:.2f}"


def pick_backend(name: str | None = None) -> str:
    """Name of the evaluation package to use.

    Args:
        name: one of `BACKENDS` to insist on it, None for the first that can be imported.

    Raises:
        ValueError: unknown name.
        ImportError: none is installed.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    for candidate in BACKENDS if name is None else (name,):
        with contextlib.suppress(ImportError):
            importlib.import_module(candidate)
            return candidate
    raise ImportError('evaluation needs faster-coco-eval (or pycocotools): pip install "ssod-fast[train]"')


class CocoEvaluator:
    """Collects detections on every rank and computes the COCO numbers once all images were seen.

    Args:
        truth: COCO dictionary with `images`, `annotations` and `categories`; crowd annotations are ignore regions.
        category_ids: COCO category id of each contiguous label, so label i means `category_ids[i]`.
        classes: class names in the same order.
        score_thr: detections at or below this score are not evaluated. It moves AP (.05 instead of .001 costs about a point on COCO).
        max_dets: detections kept per image, best first.
        backend: see :func:`pick_backend`.
    """

    def __init__(
        self,
        truth: Mapping[str, Any],
        category_ids: Sequence[int],
        classes: Sequence[str],
        score_thr: float = 1e-3,
        max_dets: int = 100,
        backend: str | None = None,
    ) -> None:
        if len(category_ids) != len(classes):
            raise ValueError(f"category_ids and classes must have one length, got {len(category_ids)} and {len(classes)}")
        self.truth = complete_truth(truth)
        self.category_ids = list(category_ids)
        self.classes = list(classes)
        self.score_thr, self.max_dets = score_thr, max_dets
        self.backend = pick_backend(backend)
        self._rows: dict[int, np.ndarray] = {}

    def reset(self) -> None:
        """Forgets all detections."""
        self._rows.clear()

    def update(self, image_ids: Iterable[int], predictions: Iterable[Target | Mapping[str, torch.Tensor]]) -> None:
        """Adds the detections of some images.

        Args:
            image_ids: COCO image ids.
            predictions: per image boxes [N, 4] xyxy in pixels of the original image, labels [N] 0-based, scores [N].
        """
        for image_id, prediction in zip(image_ids, predictions, strict=True):
            self._rows[int(image_id)] = self._best_rows(prediction)

    def _best_rows(self, prediction: Target | Mapping[str, torch.Tensor]) -> np.ndarray:
        """[N, 6] float64 (x1, y1, x2, y2, score, label): above the threshold, best first, at most max_dets."""
        columns = (prediction["boxes"].double(), prediction["scores"].double()[:, None], prediction["labels"].double()[:, None])
        rows = torch.cat(columns, dim=1).cpu().numpy()
        rows = rows[np.isfinite(rows).all(1) & (rows[:, 4] > self.score_thr)]
        best: np.ndarray = rows[np.argsort(-rows[:, 4], kind="stable")[: self.max_dets]]
        return best

    def gather(self) -> None:
        """Joins the detections of all ranks; an image that several ranks saw (padding of the sampler) counts once."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        parts: list[dict[int, np.ndarray] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self._rows)
        for part in parts:
            for image_id, rows in (part or {}).items():
                self._rows.setdefault(image_id, rows)

    def predictions(self) -> list[dict[str, Any]]:
        """Detections as COCO results (xywh, category ids of the data set), in order of image id."""
        results = []
        for image_id in sorted(self._rows):
            for x1, y1, x2, y2, score, label in self._rows[image_id].tolist():
                box = [x1, y1, x2 - x1, y2 - y1]
                results.append({"image_id": image_id, "category_id": self.category_ids[int(label)], "bbox": box, "score": score})
        return results

    def compute(self) -> CocoMetrics:
        """The numbers over all images of the truth. Call :meth:`gather` first when there are several ranks."""
        results = self.predictions()
        if not self.truth["annotations"]:
            return self._constant(NO_TRUTH)
        if not results:
            return self._constant(0.0)
        run = _run_faster if self.backend == "faster_coco_eval" else _run_pycocotools
        stats, precision = run(self.truth, results)
        return self._metrics(stats, precision)

    def _metrics(self, stats: Sequence[float], precision: np.ndarray) -> CocoMetrics:
        """Precision is [T, R, K, A, M] with classes in order of category id."""
        order = {c: i for i, c in enumerate(sorted(c["id"] for c in self.truth["categories"]))}
        columns = [order[c] for c in self.category_ids]
        by_class = precision[:, :, columns, 0, -1]  # [T, R, C]: all sizes, largest number of detections
        return CocoMetrics(
            stats={name: float(value) for name, value in zip(STAT_NAMES, stats, strict=True)},
            per_class={name: _mean_valid(by_class[:, :, i]) for i, name in enumerate(self.classes)},
            per_class50={name: _mean_valid(by_class[0, :, i]) for i, name in enumerate(self.classes)},
            precision50=by_class[0].T.copy(),
            images=len(self.truth["images"]),
            backend=self.backend,
        )

    def _constant(self, value: float) -> CocoMetrics:
        """Metrics of a run without detections (0 where there is truth) or without truth (-1)."""
        present = {a["category_id"] for a in self.truth["annotations"] if not a["iscrowd"]}
        per_class = {n: value if c in present else NO_TRUTH for n, c in zip(self.classes, self.category_ids, strict=True)}
        stats = {name: value if _has_truth(self.truth, name) else NO_TRUTH for name in STAT_NAMES}
        precision = np.array([[v] * 101 for v in per_class.values()]).reshape(-1, 101)
        return CocoMetrics(stats, per_class, dict(per_class), precision, len(self.truth["images"]), self.backend)


_SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}


def _has_truth(truth: Mapping[str, Any], stat: str) -> bool:
    """Whether an object exists that this number counts."""
    low, high = _SIZES.get(stat.rpartition("_")[2], (0.0, 1e10))
    return any(not a["iscrowd"] and low <= a["area"] <= high for a in truth["annotations"])


def complete_truth(truth: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a COCO dictionary with the fields that evaluators insist on: ids from 1, iscrowd, area, image sizes left as they are.

    Raises:
        ValueError: a key is missing, or an annotation has no box.
    """
    missing = [key for key in ("images", "annotations", "categories") if key not in truth]
    if missing:
        raise ValueError(f"truth must have the keys images, annotations and categories, missing: {', '.join(missing)}")
    annotations = []
    for i, annotation in enumerate(truth["annotations"], start=1):
        if len(annotation.get("bbox", ())) != 4:
            raise ValueError(f"truth annotation {annotation.get('id', i)} must have a bbox of 4 numbers, got {annotation.get('bbox')!r}")
        x, y, w, h = map(float, annotation["bbox"])
        row = {"image_id": annotation["image_id"], "category_id": annotation["category_id"], "bbox": [x, y, w, h]}
        # id 0 would be read as "unmatched" by pycocotools.
        annotations.append({**row, "id": i, "iscrowd": int(annotation.get("iscrowd", 0)), "area": float(annotation.get("area", w * h))})
    return {"info": {}, "images": list(truth["images"]), "annotations": annotations, "categories": list(truth["categories"])}


def _mean_valid(values: np.ndarray) -> float:
    """Mean of the entries that are not -1, or -1 if there are none."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else NO_TRUTH


def _run_faster(truth: dict[str, Any], results: list[dict[str, Any]]) -> tuple[list[float], np.ndarray]:
    from faster_coco_eval import COCO, COCOeval_faster

    coco = COCO(truth)
    evaluation = COCOeval_faster(coco, coco.loadRes(results), iouType="bbox", print_function=lambda *_: None)
    evaluation.run()
    return list(evaluation.stats[:12]), np.asarray(evaluation.eval["precision"])


def _run_pycocotools(truth: dict[str, Any], results: list[dict[str, Any]]) -> tuple[list[float], np.ndarray]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints and cannot be told not to
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return list(evaluation.stats), np.asarray(evaluation.eval["precision"])
