"""Suppression of a whole batch: against torchvision image by image, and without a sync before the lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectors.models import DENSE, build, images
from no_sync import SyncError, no_sync
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms as torchvision_nms
from torchvision.ops import clip_boxes_to_image

from ssod_fast.detectors import from_torchvision, preprocess
from ssod_fast.detectors.suppress import as_targets, best_boxes, clip_boxes

SIZES = [(96, 128), (64, 64), (96, 100)]


def candidates(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes that reach beyond their images, some without area or not finite."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(3, 200, 2, generator=generator) * 160 - 20
    boxes = torch.cat([corner, corner + torch.rand(3, 200, 2, generator=generator) * 40 - 3], -1)
    boxes[0, 0, 1], boxes[1, 3, 2] = torch.nan, torch.inf
    return boxes, torch.rand(3, 200, generator=generator), torch.randint(4, (3, 200), generator=generator)


def one_by_one(boxes: Tensor, scores: Tensor, labels: Tensor, score_thr: float, topk: int) -> list[Tensor]:
    """The kept boxes of each image by torchvision's functions."""
    results = []
    for box, score, label, size in zip(boxes, scores, labels, SIZES, strict=True):
        box = clip_boxes_to_image(box, size)
        good = (score > score_thr) & box.isfinite().all(-1) & (box[:, 2:] > box[:, :2]).all(-1)
        box, score, label = box[good], score[good], label[good]
        results.append(box[torchvision_nms(box, score, label, 0.5)[:topk]])
    return results


@pytest.mark.parametrize(("score_thr", "topk"), [(0.0, 300), (0.5, 300), (0.2, 10), (0.99, 300)])
def test_equals_torchvision_image_by_image(score_thr: float, topk: int) -> None:
    boxes, scores, labels = candidates()
    clipped = clip_boxes(boxes, SIZES)
    with no_sync():
        kept = best_boxes(clipped, scores, labels, nms_thr=0.5, max_keep=topk, score_thr=score_thr)
    found = as_targets(kept, clipped, labels, scores)
    for target, expected in zip(found, one_by_one(boxes, scores, labels, score_thr, topk), strict=True):
        assert torch.equal(target["boxes"], expected)
        assert (target["scores"].diff() <= 0).all()


def test_a_threshold_above_one_suppresses_nothing() -> None:
    boxes, scores, labels = candidates()
    usable = (boxes.isfinite().all(-1) & (boxes[..., 2:] > boxes[..., :2]).all(-1)).sum(1)
    assert torch.equal(best_boxes(boxes, scores, labels, nms_thr=2.0, max_keep=200).count, usable)


@pytest.mark.parametrize("family", DENSE)
def test_dense_decoding_syncs_at_the_lists_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detector: Any = from_torchvision(build(family)).eval()
    batch = preprocess(images(*SIZES), detector.pixel_stats)
    raw = detector.raw_outputs(batch)
    detector.decode(raw)
    with no_sync(), pytest.raises(SyncError, match="tolist"):
        detector.decode(raw)
    monkeypatch.setattr("ssod_fast.detectors.dense.as_targets", lambda *_: [])
    with no_sync():
        assert detector.decode(raw) == []


@torch.no_grad()
def test_faster_rcnn_equals_torchvision() -> None:
    """Both stages against torchvision's own, which go image by image."""
    for seed in range(3):
        detector: Any = from_torchvision(build("fasterrcnn")).eval()
        model = detector.model
        for name, p in model.named_parameters():
            if "bbox_pred" in name or "cls_score" in name or "cls_logits" in name:
                p.mul_(6)
        batch = preprocess(images(*SIZES, seed=seed), detector.pixel_stats)
        found = detector.predict(batch, score_thr=0.05, topk=80)
        maps = detector._feature_maps(batch)
        proposals, _ = model.rpn(ImageList(batch.tensor, batch.sizes), maps, None)
        padded, counts = detector._proposals(maps, batch)
        model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0.05, 80
        expected, _ = model.roi_heads(maps, proposals, batch.sizes, None)
        for i in range(3):
            torch.testing.assert_close(padded[i, : counts[i]], proposals[i])
            assert (padded[i, counts[i] :] == 0).all()
            torch.testing.assert_close(found[i]["boxes"], expected[i]["boxes"], atol=1e-3, rtol=1e-5)
            torch.testing.assert_close(found[i]["scores"], expected[i]["scores"], atol=1e-5, rtol=1e-5)
            assert torch.equal(found[i]["labels"], expected[i]["labels"] - 1)
            assert len(found[i]["labels"]) > 5
