from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ssod_fast.training import evaluation
from ssod_fast.training.evaluation import BACKENDS, STAT_NAMES, CocoEvaluator, complete_truth, pick_backend, show


def golden_truth() -> dict[str, Any]:
    boxes = [[10 + 30 * (k % 6), 20, 20, 40] for k in range(10)]
    annotations = [
        {"id": k, "image_id": 1 if k < 6 else 2, "category_id": 7, "bbox": b, "area": 800, "iscrowd": 0} for k, b in enumerate(boxes)
    ]
    images = [{"id": i, "width": 200, "height": 200} for i in (1, 2)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "thing"}]}


def golden_predictions() -> dict[int, dict[str, torch.Tensor]]:
    truth = golden_truth()["annotations"]
    rows: dict[int, list[list[float]]] = {1: [], 2: []}
    hits = iter(truth)
    for i, kind in enumerate("TTFTTFTFFTT"):
        score = 0.95 - 0.05 * i
        if kind == "T":
            t = next(hits)
            x, y, w, h = t["bbox"]
            rows[t["image_id"]].append([x + 1, y, x + 1 + w, y + h, score])
        else:
            rows[1].append([10, 120, 30, 160, score])
    return {k: as_target(np.array(v)) for k, v in rows.items()}


def as_target(rows: np.ndarray, labels: np.ndarray | None = None) -> dict[str, torch.Tensor]:
    rows = rows.reshape(-1, 5)
    labels = np.zeros(len(rows), np.int64) if labels is None else labels
    return {"boxes": torch.from_numpy(rows[:, :4]), "scores": torch.from_numpy(rows[:, 4]), "labels": torch.from_numpy(labels)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_numbers(backend: str) -> None:
    evaluator = CocoEvaluator(golden_truth(), [7], ["thing"], backend=backend)
    predictions = golden_predictions()
    evaluator.update(predictions.keys(), predictions.values())
    metrics = evaluator.compute()
    expected = {"AP": 0.50109297, "AP50": 0.55676996, "AP75": 0.55676996, "AP_small": 0.50109297, "AP_medium": -1, "AP_large": -1}
    expected |= {"AR1": 0.18, "AR10": 0.63, "AR100": 0.63, "AR_small": 0.63, "AR_medium": -1, "AR_large": -1}
    assert metrics.stats == pytest.approx(expected, abs=1e-8)
    assert metrics.per_class == {"thing": pytest.approx(0.50109297, abs=1e-8)}
    assert metrics.per_class50 == {"thing": pytest.approx(0.55676996, abs=1e-8)}
    assert metrics.precision50.shape == (1, 101)
    assert metrics.backend == backend


def random_case(seed: int, n_images: int = 30, n_classes: int = 5) -> tuple[dict[str, Any], dict[int, dict[str, torch.Tensor]]]:
    rng = np.random.default_rng(seed)
    ids = [3 * c + 2 for c in range(n_classes)]
    annotations: list[dict[str, Any]] = []
    predictions = {}
    for image_id in range(10, 10 + n_images):
        n = int(rng.integers(0, 8))
        corner, side = rng.uniform(0, 400, (n, 2)), np.exp(rng.uniform(np.log(8), np.log(250), (n, 2)))
        labels = rng.integers(0, n_classes - 1, n)  # the last class has no truth
        for (x, y), (w, h), label in zip(corner, side, labels, strict=True):
            crowd = int(rng.random() < 0.1)
            row = {"image_id": image_id, "category_id": ids[label], "bbox": [x, y, w, h], "iscrowd": crowd, "area": w * h * 0.8}
            annotations.append({**row, "id": len(annotations)})
        hits = np.concatenate([corner, corner + side], 1) + rng.normal(0, 6, (n, 4))
        noise = rng.uniform(0, 300, (4, 2))
        boxes = np.concatenate([hits, np.concatenate([noise, noise + rng.uniform(5, 90, (4, 2))], 1)])
        boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], 1)
        scores = rng.random((n + 4, 1)).round(2)  # ties on purpose
        predictions[image_id] = as_target(np.concatenate([boxes, scores], 1), np.concatenate([labels, rng.integers(0, n_classes, 4)]))
    images = [{"id": i, "width": 640, "height": 640} for i in predictions]
    return {"images": images, "annotations": annotations, "categories": [{"id": i, "name": f"c{i}"} for i in reversed(ids)]}, predictions


def oracle(truth: dict[str, Any], results: list[dict[str, Any]]) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {**truth, "info": {}, "annotations": [{**a, "id": i + 1} for i, a in enumerate(truth["annotations"])]}
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


@pytest.mark.parametrize("seed", range(4))
def test_equals_pycocotools_on_random_data(seed: int) -> None:
    truth, predictions = random_case(seed)
    ids = sorted(c["id"] for c in truth["categories"])
    evaluator = CocoEvaluator(truth, ids, [f"c{i}" for i in ids], backend="faster_coco_eval")
    evaluator.update(predictions.keys(), predictions.values())
    metrics = evaluator.compute()
    run = oracle(truth, evaluator.predictions())
    assert list(metrics.stats) == list(STAT_NAMES)
    np.testing.assert_allclose(list(metrics.stats.values()), run.stats, atol=1e-6, rtol=0)
    for k, class_id in enumerate(ids):
        precision = run.eval["precision"][:, :, k, 0, -1]
        expected = precision[precision > -1].mean() if (precision > -1).any() else -1
        assert metrics.per_class[f"c{class_id}"] == pytest.approx(expected, abs=1e-6)
    assert metrics.per_class[f"c{ids[-1]}"] == -1


def test_fallback_when_faster_coco_eval_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, predictions = random_case(9)
    ids = sorted(c["id"] for c in truth["categories"])
    names = [f"c{i}" for i in ids]
    fast = CocoEvaluator(truth, ids, names, backend="faster_coco_eval")
    fast.update(predictions.keys(), predictions.values())
    expected = fast.compute()

    real_import = evaluation.importlib.import_module

    def without_faster(name: str, *args: Any) -> Any:
        if name.startswith("faster_coco_eval"):
            raise ImportError(name)
        return real_import(name, *args)

    monkeypatch.setattr(evaluation.importlib, "import_module", without_faster)
    slow = CocoEvaluator(truth, ids, names)
    assert slow.backend == "pycocotools"
    slow.update(predictions.keys(), predictions.values())
    assert slow.compute().stats == pytest.approx(expected.stats, abs=1e-6)
    assert slow.compute().per_class == pytest.approx(expected.per_class, abs=1e-6)


def test_backend_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(evaluation.importlib, "import_module", nothing)
    with pytest.raises(ImportError, match=r"pip install \"ssod-fast\[train\]\""):
        pick_backend()
    with pytest.raises(ValueError, match="backend must be one of"):
        pick_backend("torchmetrics")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_detections_are_zeros(backend: str) -> None:
    evaluator = CocoEvaluator(golden_truth(), [7], ["thing"], backend=backend)
    assert evaluator.compute()["AP"] == 0
    evaluator.update([1, 2], [as_target(np.zeros((0, 5)))] * 2)
    metrics = evaluator.compute()
    assert metrics.stats == {n: (-1 if n.endswith(("medium", "large")) else 0) for n in STAT_NAMES}
    assert metrics.per_class == {"thing": 0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_truth_is_not_available(backend: str) -> None:
    truth = {**golden_truth(), "annotations": []}
    evaluator = CocoEvaluator(truth, [7], ["thing"], backend=backend)
    predictions = golden_predictions()
    evaluator.update(predictions.keys(), predictions.values())
    metrics = evaluator.compute()
    assert set(metrics.stats.values()) == {-1}
    assert show(metrics["AP"]) == "n/a"
    assert show(0.5011) == "50.11"


def test_threshold_top_k_and_non_finite_rows() -> None:
    rows = np.array([[0, 0, 5, 5, 0.5], [0, 0, 5, 5, 1e-3], [0, 0, math.nan, 5, 0.9], [1, 1, 5, 5, 0.7], [2, 2, 5, 5, 0.6]])
    evaluator = CocoEvaluator(golden_truth(), [7], ["thing"], max_dets=2)
    evaluator.update([2], [as_target(rows)])
    assert [r["score"] for r in evaluator.predictions()] == [0.7, 0.6]
    assert evaluator.predictions()[0] == {"image_id": 2, "category_id": 7, "bbox": [1, 1, 4, 4], "score": 0.7}
    evaluator.reset()
    assert evaluator.predictions() == []


def test_image_seen_twice_counts_once() -> None:
    evaluator = CocoEvaluator(golden_truth(), [7], ["thing"])
    predictions = golden_predictions()
    for _ in range(2):
        evaluator.update(predictions.keys(), predictions.values())
    assert len(evaluator.predictions()) == 11


def test_bad_truth_is_named() -> None:
    with pytest.raises(ValueError, match="missing: categories"):
        complete_truth({"images": [], "annotations": []})
    with pytest.raises(ValueError, match="annotation 4 must have a bbox of 4 numbers"):
        complete_truth({"images": [], "categories": [], "annotations": [{"id": 4, "bbox": [1, 2, 3]}]})
    with pytest.raises(ValueError, match="category_ids and classes must have one length, got 1 and 2"):
        CocoEvaluator(golden_truth(), [7], ["a", "b"])
