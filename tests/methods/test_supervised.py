"""The supervised baseline."""

from __future__ import annotations

import pytest
import torch
from tiny_detector import TinyDetector, make_batches

from ssod_fast.methods import METHODS, EMAConfig, SemiSupervisedDetector, SupervisedConfig, SupervisedMethod


def test_loss_is_the_students() -> None:
    model = SemiSupervisedDetector(TinyDetector(), SupervisedMethod(SupervisedConfig(sup_weight=2.0)))
    labeled, unlabeled = make_batches(0)
    out = model.training_step(labeled, None, 0)
    expected = TinyDetector().losses(labeled.images, labeled.targets)
    assert sorted(out.losses) == ["sup/loss_box", "sup/loss_cls"]
    torch.testing.assert_close(out.loss, 2 * (expected["loss_cls"] + expected["loss_box"]))
    assert out.stats is None
    assert model.teacher is None
    out.loss.backward()
    assert model.student.classify.weight.grad is not None
    again = SemiSupervisedDetector(TinyDetector(), SupervisedMethod(SupervisedConfig(sup_weight=2.0))).training_step(labeled, unlabeled, 0)
    assert torch.equal(again.loss, out.loss)  # unlabelled images are not looked at


def test_labelled_images_are_needed() -> None:
    model = SemiSupervisedDetector(TinyDetector(), SupervisedMethod())
    with pytest.raises(TypeError, match="labeled must be a LabeledBatch, got None"):
        model.training_step(None, make_batches(0)[1], 0)


def test_an_averaged_baseline() -> None:
    model = SemiSupervisedDetector(TinyDetector(), SupervisedMethod(SupervisedConfig(ema=EMAConfig("constant", keep=0.5))))
    assert model.update_teacher(0)


def test_images_without_boxes() -> None:
    labeled, _ = make_batches(0)
    for target in labeled.targets:
        target["boxes"], target["labels"] = target["boxes"][:0], target["labels"][:0]
    out = SemiSupervisedDetector(TinyDetector(), SupervisedMethod()).training_step(labeled, None, 0)
    assert torch.isfinite(out.loss)


def test_methods_by_name() -> None:
    assert sorted(METHODS) == ["mixpl", "mixpl_ssd_det", "semi_detr", "ssd_det", "supervised"]
    for name in ("supervised", "mixpl"):  # those that take any detector
        config, method = METHODS[name]
        built = method(config(), rank=1)  # type: ignore[arg-type]
        model = SemiSupervisedDetector(TinyDetector(), built)
        model.load_state_dict(model.state_dict())


def test_learns() -> None:
    torch.manual_seed(0)
    model = SemiSupervisedDetector(TinyDetector(), SupervisedMethod())
    optimizer = torch.optim.Adam(model.student.parameters(), 1e-2)
    losses = []
    for step in range(40):
        out = model.training_step(make_batches(step, labeled=4, unlabeled=1)[0], None, step)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])


def test_wrong_number_of_classes() -> None:
    with pytest.raises(ValueError, match="num_classes must be the detector's 2, got 5"):
        SemiSupervisedDetector(TinyDetector(), SupervisedMethod(), num_classes=5)
