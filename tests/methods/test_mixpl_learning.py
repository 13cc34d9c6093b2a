"""MixPL learns a task small enough for a test: two labelled images per step, a teacher that starts from nothing."""

from __future__ import annotations

import torch
from tiny_detector import TinyDetector, make_batches, rectangles
from torch import nn

from ssod_fast.methods import EMAConfig, MixPL, MixPLConfig, SemiSupervisedDetector
from ssod_fast.ops import paired_box_iou


def mean_overlap(detector: nn.Module, images: int = 24) -> float:
    """Mean over true boxes of the IoU with the best scored prediction of the same class around its centre."""
    generator = torch.Generator().manual_seed(999)
    total, count = 0.0, 0
    for _ in range(images):
        image, truth = rectangles(generator)
        said = detector.predict([image.float()], 0.3)[0]  # type: ignore[operator]
        for box, label in zip(truth["boxes"], truth["labels"], strict=True):
            centre = (box[:2] + box[2:]) / 2
            hits = (said["labels"] == label) & (said["boxes"][:, :2] < centre).all(1) & (said["boxes"][:, 2:] > centre).all(1)
            total += float(paired_box_iou(said["boxes"][hits][:1], box[None])) if hits.any() else 0.0
            count += 1
    return total / count


def test_teacher_learns_and_its_boxes_reach_the_student() -> None:
    torch.manual_seed(0)
    # The official share of 4/(4+i) suits long schedules; a constant one lets a short run be read.
    config = MixPLConfig(
        cls_pseudo_thr=0.4, mosaic_shape=((50, 50), (80, 80)), erase_patches=(1, 4), teacher_topk=40, ema=EMAConfig("constant", keep=0.9)
    )
    model = SemiSupervisedDetector(TinyDetector(), MixPL(config))
    before = mean_overlap(model.teacher)
    optimizer = torch.optim.Adam(model.student.parameters(), 1e-2)
    open_gates = torch.zeros(())
    for step in range(80):
        out = model.training_step(*make_batches(step), step)
        optimizer.zero_grad()
        out.loss.backward()
        nn.utils.clip_grad_norm_(model.student.parameters(), 5.0)
        optimizer.step()
        model.update_teacher(step)
        assert out.stats is not None
        open_gates += out.stats.extra["gate"]
    after = mean_overlap(model.teacher)
    assert before < 0.2
    assert after > 0.5
    assert open_gates > 20  # the unsupervised losses took part
