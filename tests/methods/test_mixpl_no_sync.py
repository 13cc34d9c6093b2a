"""The MixPL step makes no host sync once the teacher has run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from no_sync import SyncError, no_sync
from tiny_detector import TinyDetector, make_batches
from torch import Tensor, nn

from ssod_fast.detectors import build_detector
from ssod_fast.methods import MixPL, MixPLConfig, SemiSupervisedDetector
from ssod_fast.methods.mixpl.pseudo import above_threshold
from ssod_fast.methods.step import LossBook
from ssod_fast.structures import PaddedTargets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # where a GPU is, these are tests of it


class ListOnly(TinyDetector):
    """The same detector, but it wants lists, whose lengths the host has to know."""

    supports_padded = False


class SyncingLoss(TinyDetector):
    """A detector whose loss gathers positives with a boolean mask, as most do."""

    def losses(self, images: Any, targets: Any) -> dict[str, Tensor]:
        losses = super().losses(images, targets)
        return {"loss_cls": losses["loss_cls"] + targets.boxes[targets.labels >= 0].sum() * 0}


def model_with(student: nn.Module, **options: Any) -> SemiSupervisedDetector:
    config = MixPLConfig(**{"mosaic_shape": ((40, 40), (90, 90)), "cls_pseudo_thr": 0.1, **options})
    return SemiSupervisedDetector(student.to(DEVICE), MixPL(config))


def guarded_steps(model: SemiSupervisedDetector, steps: int = 4) -> list[Any]:
    """The part after the teacher under the guard: until the cache is full, when it becomes full, and after."""
    results = []
    for step in range(steps):
        _, unlabeled = make_batches(step, device=DEVICE)
        predictions = model.method.predict(model, unlabeled)  # type: ignore[attr-defined]
        book = LossBook(None)
        with no_sync():
            stats, previews = model.method.unsupervised_losses(  # type: ignore[attr-defined]
                book, model, predictions, unlabeled, step, want_preview=True
            )
            output = book.output(stats, previews)
        results.append(output)
    return results


@pytest.mark.parametrize("interp", ["nearest", "bilinear"])
@pytest.mark.parametrize("gate", ["batch_min", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_sync_after_the_teacher(interp: str, gate: str, dtype: torch.dtype) -> None:
    model = model_with(TinyDetector(), interp=interp, gate=gate)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = guarded_steps(model)
    assert [sorted({key.split("/")[0] for key in output.losses}) for output in outputs] == [["mixup"]] * 2 + [["mixup", "mosaic"]] * 2
    assert all(torch.isfinite(output.loss) for output in outputs)
    assert [output.stats.extra["gate"].item() for output in outputs][-1] == 1  # boxes were there: the guard saw the whole way


@pytest.mark.parametrize("family", ["fcos", "retinanet"])
def test_no_sync_with_torchvision_detectors(family: str) -> None:
    student = build_detector(f"torchvision:{family}_tiny_fpn", 2, fpn_channels=8, head_convs=1)
    outputs = guarded_steps(model_with(student, cls_pseudo_thr=0.0, teacher_score_thr=0.0, erase_patches=None))
    assert {key.split("/")[0] for key in outputs[-1].losses} == {"mixup", "mosaic"}
    assert outputs[-1].stats.extra["gate"].item() == 1
    assert torch.isfinite(outputs[-1].loss)


def test_no_sync_without_any_pseudo_box() -> None:
    outputs = guarded_steps(model_with(TinyDetector(), cls_pseudo_thr=1.0))
    assert all(output.loss == 0 for output in outputs)


def test_backward_does_not_sync() -> None:
    model = model_with(TinyDetector())
    loss = guarded_steps(model)[-1].loss
    with no_sync():
        loss.backward()


def test_the_guard_fails_for_a_boolean_mask() -> None:
    targets = PaddedTargets.empty(2, 3, device=DEVICE)
    with no_sync():
        above_threshold(targets, 0.5)
    with pytest.raises((SyncError, RuntimeError), match="synchroni"), no_sync():
        _ = targets.boxes[targets.scores > 0.5]


@pytest.mark.parametrize("student", [SyncingLoss, ListOnly])
def test_the_guard_fails_for_a_student_that_syncs(student: type[TinyDetector]) -> None:
    with pytest.raises((SyncError, RuntimeError), match="synchroni"):
        guarded_steps(model_with(student()))


@pytest.mark.parametrize("options", [{"gate": "per_image"}, {"skip_closed_gate": True}])
def test_the_guard_fails_for_switches_that_ask_the_host(options: dict[str, Any]) -> None:
    with pytest.raises((SyncError, RuntimeError), match="synchroni"):
        guarded_steps(model_with(TinyDetector(), **options))


def test_results_hold_device_tensors_only() -> None:
    stats = guarded_steps(model_with(TinyDetector()), steps=1)[0].stats
    tensors = [value for value in dataclasses.asdict(stats).values() if isinstance(value, Tensor)]
    assert tensors
    assert all(value.device.type == torch.device(DEVICE).type and not value.requires_grad for value in tensors)
