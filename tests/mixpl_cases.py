"""MixPL on a tiny detector, and teachers that say what a test wants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_detector import TinyDetector, make_batches
from torch import nn

from ssod_fast.methods import MixPL, MixPLConfig, SemiSupervisedDetector, StepOutput
from ssod_fast.structures import Target

SMALL: dict[str, Any] = {"mosaic_shape": ((40, 40), (90, 90)), "cls_pseudo_thr": 0.1, "teacher_topk": 30}


def make_model(student: nn.Module | None = None, **options: Any) -> SemiSupervisedDetector:
    config = MixPLConfig(**{**SMALL, **options})
    return SemiSupervisedDetector(TinyDetector() if student is None else student, MixPL(config))


def run(model: SemiSupervisedDetector, steps: range, lr: float = 1e-3) -> list[StepOutput]:
    """Plain training on batches that depend on the step alone."""
    outputs = []
    for step in steps:
        out = model.training_step(*make_batches(step), step)
        out.loss.backward()
        with torch.no_grad():
            for parameter in model.student.parameters():
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad
        model.student.zero_grad()
        model.update_teacher(step)
        outputs.append(out)
    return outputs


class Says(TinyDetector):
    """A teacher that predicts what a function of (step of the call, image) says."""

    def __init__(self, say: Callable[[int, int], list[tuple[list[float], float]]]) -> None:
        super().__init__()
        self.say, self.calls = say, 0

    def predict(self, images: Any, score_thr: float = 0.0, topk: int = 300) -> list[Target]:
        result = []
        for i in range(len(images)):
            rows = self.say(self.calls, i)
            boxes = torch.tensor([box for box, _ in rows], dtype=torch.float32).reshape(-1, 4)
            scores = torch.tensor([score for _, score in rows], dtype=torch.float32)
            result.append(Target(boxes=boxes, labels=torch.zeros(len(rows), dtype=torch.int64), scores=scores))
        self.calls += 1
        return result


BOX = [10.0, 10.0, 50.0, 40.0]


def says(counts: list[int], score: float = 0.9) -> Says:
    return Says(lambda call, image: [(BOX, score)] * counts[image])
