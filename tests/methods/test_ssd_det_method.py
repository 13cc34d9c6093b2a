"""SSD-Det as a method: its step, what it saves, what a user gets of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from no_sync import no_sync
from ssd_det_cases import CLASSES, SMALL, gradients, make_detector, make_model, make_targets, noisy_batch
from tiny_detector import TinyDetector, make_batches
from torch.utils._python_dispatch import TorchDispatchMode

from ssod_fast.data.batches import LabeledBatch
from ssod_fast.detectors import build_detector
from ssod_fast.detectors.faster_rcnn import FasterRCNNDetector
from ssod_fast.methods import EMAConfig, SemiSupervisedDetector, SSDDet, SSDDetConfig, SupervisedMethod
from ssod_fast.methods.inputs import detector_batch
from ssod_fast.methods.ssd_det import NoisyBoxes, refine
from ssod_fast.methods.ssd_det.bags import check_boxes
from ssod_fast.methods.ssd_det.method import RefineAndDetect, levels_of
from ssod_fast.nn import pyramid
from ssod_fast.structures import Target

REFINER = {"loss_mil1", "loss_mil2", "loss_negative", "loss_sisd", "loss_spsd1", "loss_spsd2"}
DETECTOR = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}


def without_boxes(batch: LabeledBatch) -> LabeledBatch:
    return LabeledBatch(batch.images, [Target(boxes=t["boxes"][:0], labels=t["labels"][:0]) for t in batch.targets])


def crowd(count: int) -> LabeledBatch:
    """One image with `count` boxes, one with a single one."""
    batch, _ = make_batches(0)
    generator = torch.Generator().manual_seed(7)
    low = torch.rand(count, 2, generator=generator) * 40
    many = Target(boxes=torch.cat([low, low + 14], 1), labels=torch.randint(0, 2, (count,), generator=generator))
    return LabeledBatch(batch.images, [many, Target(boxes=low.new_tensor([[5, 5, 30, 40]]), labels=torch.tensor([1]))])


def test_step() -> None:
    model = make_model()
    before = [p.clone() for module in model.trained for p in module.parameters()]
    out = model.training_step(noisy_batch(0), None, 0, want_preview=True)
    assert {name.removeprefix("sup/") for name in out.losses} == REFINER | DETECTOR
    assert all(loss.isfinite() and loss >= 0 for loss in out.losses.values())
    torch.testing.assert_close(out.loss, torch.stack(list(out.losses.values())).sum())
    assert out.stats is None
    assert {"bag0_iou", "bag2_iou", "noisy_iou", "refined_iou", "left_out"} < set(out.diagnostics)
    (preview,) = out.previews
    assert (preview.kind, preview.targets.count.tolist()) == ("refined", [2, 2])
    out.loss.backward()
    grads = gradients(*model.trained)
    assert len(grads) == sum(p.requires_grad for module in model.trained for p in module.parameters())
    assert all(grad.isfinite().all() for grad in grads.values())
    assert any((grad != 0).any() for name, grad in grads.items() if "backbone" in name)
    assert all(torch.equal(p, old) for p, old in zip((p for m in model.trained for p in m.parameters()), before, strict=True))


def test_the_detector_learns_refined_boxes_with_the_methods_weights() -> None:
    model = make_model(det_weight=3.0, rpn_box_weight=0.5)
    batch = noisy_batch(0)
    images = detector_batch(model.student, batch.images)
    program = RefineAndDetect(model.trainable, batch.targets, torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    losses = program(model.student, images)
    torch.manual_seed(1)  # the detector draws anchors and proposals
    plain = model.student.losses(images, program.refined)
    for name in DETECTOR:
        torch.testing.assert_close(losses[name], plain[name] * (0.5 if name == "loss_rpn_box_reg" else 3.0))
    noisy = torch.cat([t["boxes"] for t in batch.targets])
    assert (torch.cat([t["boxes"] for t in program.refined]) != noisy).any()
    for target, source in zip(program.refined, batch.targets, strict=True):
        assert torch.equal(target["labels"], source["labels"])


def test_one_pass_of_the_backbone() -> None:
    model = make_model(max_boxes_per_image=1)
    calls = []
    model.student.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    model.training_step(noisy_batch(0), None, 0)
    assert len(calls) == 1


def test_inference_is_plain_faster_rcnn() -> None:
    """The saved detector has the modules, weights and operations of one that never met the method."""
    model, plain = make_model(), SemiSupervisedDetector(make_detector(), SupervisedMethod())
    out = model.training_step(noisy_batch(0), None, 0)
    out.loss.backward()
    assert [(n, type(m)) for n, m in model.student.named_modules()] == [(n, type(m)) for n, m in plain.student.named_modules()]
    assert {n: v.shape for n, v in model.student.state_dict().items()} == {n: v.shape for n, v in plain.student.state_dict().items()}
    assert len(list(model.student.model.backbone._forward_hooks)) == 0
    plain.student.load_state_dict(model.student.state_dict())
    images = noisy_batch(3).images
    ours, theirs = (recorded(detector, images) for detector in (model.student, plain.student))
    assert ours == theirs
    assert len(ours) > 50


class Recorder(TorchDispatchMode):
    """Names of all operations, with the shapes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((str(func), list(result.shape) if isinstance(result, torch.Tensor) else []))
        return result


def recorded(detector: Any, images: list[torch.Tensor]) -> list[tuple[str, list[int]]]:
    """Every operation of a prediction; the first call finds out the scales of the pooling."""
    detector.predict(images)
    with Recorder() as recorder:
        detector.predict(images)
    return recorder.operations


@pytest.mark.parametrize("options", [{}, {"stage2_bag": "resample"}, {"sisd": False}], ids=str)
def test_batches_without_boxes(options: dict[str, Any]) -> None:
    model = make_model(**options)
    out = model.training_step(without_boxes(noisy_batch(0)), None, 0)
    assert all(loss == 0 for name, loss in out.losses.items() if name.removeprefix("sup/") in REFINER)
    assert out.losses["sup/loss_objectness"] > 0
    out.loss.backward()
    assert len(gradients(*model.trained)) == sum(p.requires_grad for module in model.trained for p in module.parameters())


def test_crowded_images_are_bounded() -> None:
    model, batch = make_model(max_boxes_per_image=10, rois_per_pass=64), crowd(70)
    images = detector_batch(model.student, batch.images)
    levels = levels_of(model.student, model.student.pyramid(images), images)
    noisy = NoisyBoxes.pack(batch.targets, images.sizes, images.tensor.device)
    seen: list[int] = []
    model.trainable.register_forward_pre_hook(lambda _, args: seen.extend((len(args[1]), len(args[3]))))
    program = RefineAndDetect(model.trainable, batch.targets, torch.Generator().manual_seed(0))
    found = program.refine(levels, noisy)
    assert seen == [11, 60]  # the others keep negatives away
    assert found.diagnostics["left_out"] == 60
    torch.testing.assert_close(found.boxes, model.trainable.refine(levels, noisy).boxes)  # the others are refined all the same
    torch.testing.assert_close(found.scores, model.trainable.refine(levels, noisy).scores)
    out = model.training_step(batch, None, 0)
    out.loss.backward()
    assert out.loss.isfinite()


def test_resume_is_exact() -> None:
    """Random draws of negatives and of boxes continue where a saved run stopped."""

    def steps(model: SemiSupervisedDetector, which: range) -> list[torch.Tensor]:
        losses = []
        for step in which:
            torch.manual_seed(step)  # the trainer saves this one
            losses.append(model.training_step(crowd(6), None, step).losses["sup/loss_negative"])
        return losses

    through = make_model(max_boxes_per_image=3)
    expected = steps(through, range(4))
    assert len({loss.item() for loss in expected}) == 4
    first, second = make_model(max_boxes_per_image=3), make_model(max_boxes_per_image=3, seed=5)
    steps(first, range(2))
    second.load_state_dict(first.state_dict())
    assert torch.equal(torch.stack(steps(second, range(2, 4))), torch.stack(expected[2:]))


def test_ranks_and_seeds_draw_differently() -> None:
    draws = [SSDDet(SSDDetConfig(seed=seed), rank=rank).generator.initial_seed() for seed in range(3) for rank in range(3)]
    assert len(set(draws)) == 9
    first, second, third = make_model(), make_model(), make_model(seed=1)
    weights = [model.trainable.shared_fcs[0].weight for model in (first, second, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    SSDDet(SSDDetConfig(**SMALL)).check(first.student)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is taken from the run's own generator


def test_refiner_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the step but the detector, which waits as plain Faster R-CNN does."""
    monkeypatch.setattr(pyramid, "_pool_chosen", pyramid._pool_all)  # as on a device
    model, batch = make_model(max_boxes_per_image=10), crowd(20)
    images = detector_batch(model.student, batch.images)
    program = RefineAndDetect(model.trainable, batch.targets, torch.Generator().manual_seed(0))
    with no_sync():
        check_boxes(batch.targets, 2)  # of data on the host
        levels = levels_of(model.student, model.student.pyramid(images), images)
        found = program.refine(levels, NoisyBoxes.pack(batch.targets, images.sizes, images.tensor.device))
        torch.stack(list(found.losses.values())).sum().backward()


def test_refine() -> None:
    model, batch = make_model(), noisy_batch(0)
    model.student.train()
    modes: list[tuple[bool, bool, bool]] = []
    model.trainable.fc_iou.register_forward_hook(lambda m, _, out: modes.append((model.student.training, m.training, out.requires_grad)))
    found = refine(model.student, model.trainable, batch.images, batch.targets)
    assert modes == [(False, False, False)]
    assert model.student.training
    program = RefineAndDetect(model.trainable, batch.targets, torch.Generator())
    model.student.eval()
    images = detector_batch(model.student, batch.images)
    levels = levels_of(model.student, model.student.pyramid(images), images)
    expected = program.refine(levels, NoisyBoxes.pack(batch.targets, images.sizes, images.tensor.device))
    torch.testing.assert_close(torch.cat([t["boxes"] for t in found]), expected.boxes)
    torch.testing.assert_close(torch.cat([t["scores"] for t in found]), expected.scores)
    for target, source in zip(found, batch.targets, strict=True):
        assert torch.equal(target["labels"], source["labels"])
        assert not target["boxes"].requires_grad
    assert refine(model.student, model.trainable, batch.images, without_boxes(batch).targets)[0]["boxes"].shape == (0, 4)
    with pytest.raises(ValueError, match="targets must have one entry per image, expected 2, got 1"):
        refine(model.student, model.trainable, batch.images, batch.targets[:1])


def test_pooling_that_names_more_levels_than_there_are() -> None:
    """torchvision's models of MobileNet have a single stride, twice, and ask for four levels."""
    detector = build_detector("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", CLASSES).train()
    assert isinstance(detector, FasterRCNNDetector)
    model = SemiSupervisedDetector(detector, SSDDet(SSDDetConfig(**SMALL)))
    images = detector_batch(detector, noisy_batch(0).images)
    assert levels_of(detector, detector.pyramid(images), images).strides == [32, 32]
    assert model.train().training_step(noisy_batch(0), None, 0).loss.isfinite()


def test_strides_of_the_pooled_levels() -> None:
    model = make_model()
    images = detector_batch(model.student, [torch.zeros(3, 70, 130, dtype=torch.uint8)])
    assert levels_of(model.student, model.student.pyramid(images), images).strides == [4, 8, 16, 32]


def test_refines_better_after_training() -> None:
    """Rectangles with 30 % noise: bags and refined boxes come nearer to the right ones than the noisy boxes are."""
    options = {"hidden": 64, "negatives": 32, "shakes": (0.2,), "ratios": (1.0, 1.3, 0.7)}
    model = make_model(**options)
    optimizer = torch.optim.AdamW([p for module in model.trained for p in module.parameters()], 2e-3)
    torch.manual_seed(0)
    history = []
    for step in range(60):
        out = model.training_step(noisy_batch(step % 24, 0.3), None, step)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append({name: value.item() for name, value in out.diagnostics.items()})
    late = {name: sum(row[name] for row in history[-24:]) / 24 for name in history[0]}
    assert late["bag2_iou"] > late["bag0_iou"] + 0.03
    assert late["refined_iou"] > late["noisy_iou"]


# Input


def test_needs_faster_rcnn() -> None:
    for student in (TinyDetector(), build_detector("torchvision:fcos_tiny_fpn", 2, fpn_channels=8)):
        with pytest.raises(TypeError, match=r"ssd_det needs torchvision's Faster R-CNN .*, got (TinyDetector|FCOSDetector)"):
            SemiSupervisedDetector(student, SSDDet())
    method = SSDDet(SSDDetConfig(**SMALL))
    method.check(make_detector())
    with pytest.raises(
        ValueError, match=r"a method serves one model: its \(channels, classes\) are \(16, 2\), got a detector of \(16, 5\)"
    ):
        method.check(make_detector(5))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("boxes", [[1.0, 2, float("nan"), 9]], r"targets\[1\]\['boxes'\] must be finite, got \[1.0, 2.0, nan, 9.0\]"),
        ("boxes", [[1.0, 2, float("inf"), 9]], r"targets\[1\]\['boxes'\] must be finite"),
        ("boxes", [[9.0, 2, 1, 9]], r"targets\[1\]\['boxes'\] must be xyxy with x1 <= x2 and y1 <= y2, got \[9.0, 2.0, 1.0, 9.0\]"),
        ("labels", [3], r"targets\[1\]\['labels'\] must lie in 0..2 \(0-based, background has no label\), got 3..3"),
        ("labels", [-1], r"targets\[1\]\['labels'\] must lie in 0..2"),
    ],
)
def test_broken_targets(field: str, value: Any, message: str) -> None:
    targets: list[Any] = make_targets([1, 1])
    check_boxes(targets, CLASSES)
    targets[1][field] = torch.tensor(value)
    with pytest.raises(ValueError, match=message):
        check_boxes(targets, CLASSES)


def test_a_step_refuses_broken_targets() -> None:
    batch = noisy_batch(0)
    batch.targets[0]["labels"] = batch.targets[0]["labels"] + 7
    with pytest.raises(ValueError, match=r"targets\[0\]\['labels'\] must lie in 0..1"):
        make_model().training_step(batch, None, 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stage2_bag": "shake"}, ValueError, "stage2_bag must be one of regress, resample, got 'shake'"),
        ({"sisd_score": "ins"}, ValueError, "sisd_score must be one of cls, cls_ins, got 'ins'"),
        ({"sisd": 1}, TypeError, "sisd must be True or False, got 1"),
        ({"ratios": ()}, ValueError, "ratios must not be empty"),
        ({"ratios": (1.0, 0.0)}, ValueError, "ratios must be finite and > 0"),
        ({"shakes": (float("nan"),)}, ValueError, "shakes must be finite"),
        ({"iof_thr": 1.0}, ValueError, r"iof_thr must lie in \[0, 1\), got 1.0"),
        ({"negative_iou": -0.1}, ValueError, r"negative_iou must lie in \[0, 1\)"),
        ({"topk": 0}, ValueError, "topk must be finite and at least 1, got 0"),
        ({"negatives": -1}, ValueError, "negatives must be finite and at least 0, got -1"),
        ({"det_weight": -1.0}, ValueError, "det_weight must be finite and at least 0, got -1.0"),
        ({"sisd_weight": "5"}, TypeError, "sisd_weight must be a number, got '5'"),
        ({"max_boxes_per_image": 2.5}, TypeError, "max_boxes_per_image must be an integer, got 2.5"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SSDDetConfig(**options)


def test_defaults_are_the_released_ones() -> None:
    config = SSDDetConfig()
    assert config.bag_size == 125
    assert SSDDetConfig(ratios=(1.0, 1.1, 0.9), shakes=(0.1,)).bag_size == 45
    model = SemiSupervisedDetector(make_detector(), SSDDet(SSDDetConfig(ema=EMAConfig())))
    assert model.teacher is not None
    assert make_model().teacher is None
