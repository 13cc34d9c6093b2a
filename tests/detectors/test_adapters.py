"""The adapters of the three torchvision families: labels, frames, bad boxes, modes, empty batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectors.models import DENSE, FAMILIES, build, empty_target, images, random_target
from torch import distributed, nn
from torchvision import tv_tensors

from ssod_fast.detectors import Detector, ImageBatch, capabilities, from_torchvision, preprocess
from ssod_fast.structures import PaddedTargets, Target

HW = (96, 128)


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_follows_the_protocol(family: str) -> None:
    detector = from_torchvision(build(family))
    assert isinstance(detector, Detector)
    assert detector.num_classes == 3
    assert detector.stride == 32
    assert detector.pixel_stats.mean == pytest.approx((123.675, 116.28, 103.53))
    assert detector.pixel_stats.std == pytest.approx((58.395, 57.12, 57.375))
    dense = {"supports_weights", "supports_padded", "raw_outputs", "decode"}
    assert capabilities(detector) == {"features"} | (dense if family in DENSE else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_losses_with_live_gradients(family: str) -> None:
    detector = from_torchvision(build(family))
    losses = detector(images(HW), [random_target(HW, 4)])
    assert all(value.dim() == 0 and torch.isfinite(value) for value in losses.values())
    total(losses).backward()
    assert all(p.grad is not None for p in detector.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("label", [0, 2])
def test_first_and_last_label_survive_a_round_trip(family: str, label: int) -> None:
    """A model that learns one box must give its label back, not the next one and not background."""
    torch.manual_seed(0)
    detector = from_torchvision(build(family))
    target = Target(boxes=torch.tensor([[24, 20, 88, 76.0]]), labels=torch.tensor([label]))
    optimizer = torch.optim.Adam(detector.parameters(), 2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        total(detector.losses(images(HW), [target])).backward()
        optimizer.step()
    best = detector.predict(images(HW), topk=1)[0]
    assert best["labels"].tolist() == [label]
    assert best["labels"].dtype == torch.int64


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("label", [-1, 3])
def test_other_labels_are_refused(family: str, label: int) -> None:
    detector = from_torchvision(build(family))
    target = Target(boxes=torch.tensor([[24, 20, 88, 76.0]]), labels=torch.tensor([label]))
    with pytest.raises(ValueError, match=rf"targets\[0\]\['labels'\] must lie in 0\.\.2 .*got {label}\.\.{label}"):
        detector.losses(images(HW), [target])


def test_faster_rcnn_has_one_more_output_for_background() -> None:
    detector = from_torchvision(build("fasterrcnn", num_classes=5))
    assert detector.num_classes == 5
    assert detector.model.roi_heads.box_predictor.cls_score.out_features == 6
    seen: list[torch.Tensor] = []

    def spy(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.extend(t["labels"] for t in args[3])

    detector.model.roi_heads.register_forward_pre_hook(spy)
    detector.losses(images(HW), [Target(boxes=torch.tensor([[0, 0, 40, 40], [9, 9, 60, 60.0]]), labels=torch.tensor([0, 4]))])
    assert seen[0].tolist() == [1, 5]


def test_targets_without_labels_are_named() -> None:
    target: Any = {"boxes": torch.tensor([[24, 20, 88, 76.0]])}
    with pytest.raises(ValueError, match=r"targets\[0\] must have 'labels', got the keys \['boxes'\]"):
        from_torchvision(build("fcos")).losses(images(HW)[:1], [target])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["list", "padded"])
def test_bad_boxes_are_left_out(family: str, form: str) -> None:
    detector = from_torchvision(build(family))
    boxes = torch.tensor([[10, 10, 60, 60], [5, 5, 5, 50], [50, 50, 20, 70], [float("nan"), 1, 9, 9], [0, 0, float("inf"), 9.0]])
    dirty = Target(boxes=boxes, labels=torch.zeros(5, dtype=torch.int64))
    clean = Target(boxes=boxes[:1], labels=dirty["labels"][:1])

    def losses(target: Target) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)  # Faster R-CNN samples anchors
        return detector.losses(images(HW), PaddedTargets.from_list([target]) if form == "padded" else [target])

    torch.testing.assert_close(losses(dirty), losses(clean))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (0, 2)])
def test_images_without_boxes_are_background(family: str, counts: tuple[int, int]) -> None:
    detector = from_torchvision(build(family))
    losses = detector.losses(images(HW, HW), [random_target(HW, n) if n else empty_target() for n in counts])
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(value.requires_grad for value in losses.values())
    total(losses).backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_predict_restores_every_mode_and_needs_no_gradient(family: str) -> None:
    detector = from_torchvision(build(family)).train()
    detector.model.backbone.eval()
    before = {name: module.training for name, module in detector.named_modules()}
    found = detector.predict(images(HW))
    assert {name: module.training for name, module in detector.named_modules()} == before
    assert not found[0]["boxes"].requires_grad
    detector.eval().predict(images(HW))
    assert not detector.training


@pytest.mark.parametrize("family", FAMILIES)
def test_predict_restores_the_mode_after_an_error(family: str) -> None:
    detector = from_torchvision(build(family)).train()
    with pytest.raises(RuntimeError):
        detector.predict(ImageBatch(torch.zeros(1, 3, 64, 64, dtype=torch.float16), [(64, 64)]).to("meta"))
    assert detector.training


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_lie_inside_of_the_true_image(family: str) -> None:
    """A small image in a large padded batch: nothing may lie in its padding."""
    detector = from_torchvision(build(family))
    sizes = [(40, 50), (96, 160)]
    found = detector.predict(images(*sizes))
    for (h, w), target in zip(sizes, found, strict=True):
        boxes = target["boxes"]
        assert len(boxes) > 0
        assert boxes.dtype == torch.float32
        assert boxes.min() >= 0
        assert boxes[:, 2].max() <= w
        assert boxes[:, 3].max() <= h
        assert (boxes[:, 2:] > boxes[:, :2]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_threshold_and_topk_are_respected(family: str) -> None:
    detector = from_torchvision(build(family))
    everything = detector.predict(images(HW))[0]
    assert len(everything["scores"]) > 5
    assert (everything["scores"].diff() <= 0).all()
    middle = float(everything["scores"].median())
    above = detector.predict(images(HW), score_thr=middle)[0]
    assert 0 < len(above["scores"]) < len(everything["scores"])
    assert above["scores"].min() > middle
    assert len(detector.predict(images(HW), topk=3)[0]["scores"]) == 3
    assert len(detector.predict(images(HW), score_thr=1.0)[0]["scores"]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_bad_arguments_of_predict(family: str) -> None:
    detector = from_torchvision(build(family))
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        detector.predict(images(HW), topk=0)
    with pytest.raises(ValueError, match=r"score_thr must lie in 0..1, got 1.5"):
        detector.predict(images(HW), score_thr=1.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_nms_threshold_is_a_setting(family: str) -> None:
    detector: Any = from_torchvision(build(family))
    detector.nms_thr = 0.9
    many = detector.predict(images(HW), topk=1000)[0]
    detector.nms_thr = 0.1
    assert len(detector.predict(images(HW), topk=1000)[0]["scores"]) < len(many["scores"])


@pytest.mark.parametrize("family", DENSE)
def test_predictions_equal_torchvision(family: str) -> None:
    """Same thresholds, same detections as the unwrapped model on the same normalised image, but for boxes without area."""
    model = build(family, score_thresh=0.02, detections_per_img=1000)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("cls_logits.bias"):
                p.fill_(-2.0)
            elif "head" in name and p.dim() == 4:
                p.mul_(8)
    reference = copy.deepcopy(model).eval()
    detector = from_torchvision(model)
    batch = preprocess(images(HW), detector.pixel_stats)
    reference.transform.min_size, reference.transform.max_size = (96,), 128
    with torch.no_grad():
        expected = reference([images(HW)[0].float() / 255])[0]
    solid = (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(1)
    expected = {name: value[solid][:50] for name, value in expected.items()}
    found = detector.predict(batch, score_thr=0.02, topk=50)[0]
    assert len(expected["scores"]) == 50
    torch.testing.assert_close(found["scores"], expected["scores"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["boxes"], expected["boxes"], atol=1e-2, rtol=1e-4)
    assert torch.equal(found["labels"], expected["labels"])


def test_faster_rcnn_predictions_equal_torchvision() -> None:
    model = build("fasterrcnn", box_score_thresh=0.1)
    reference = copy.deepcopy(model).eval()
    reference.transform.min_size, reference.transform.max_size = (96,), 128
    detector = from_torchvision(model)
    with torch.no_grad():
        expected = reference([images(HW)[0].float() / 255])[0]
    found = detector.predict(images(HW), score_thr=0.1, topk=100)[0]
    assert len(expected["scores"]) > 10
    torch.testing.assert_close(found["scores"], expected["scores"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["boxes"], expected["boxes"], atol=1e-2, rtol=1e-4)
    assert torch.equal(found["labels"] + 1, expected["labels"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_diverged_model_predicts_nothing_that_is_not_finite(family: str) -> None:
    detector = from_torchvision(build(family))
    with torch.no_grad():
        next(p for name, p in detector.named_parameters() if name.endswith(("bbox_reg.bias", "bbox_pred.bias"))).fill_(float("nan"))
    for target in detector.predict(images(HW)):
        assert torch.isfinite(target["boxes"]).all()
        assert torch.isfinite(target["scores"]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_reach_the_loss_or_are_refused(family: str) -> None:
    detector = from_torchvision(build(family))
    target = random_target(HW, 3)
    weighted = Target(**target, weights=torch.tensor([1.0, 0.2, 0.7]))
    if detector.supports_weights:
        assert total(detector.losses(images(HW), [weighted])) < total(detector.losses(images(HW), [target]))
        return
    with pytest.raises(ValueError, match=r"targets\[0\]\['weights'\] must be 1: Faster R-CNN does not support box weights"):
        detector.losses(images(HW), [weighted])
    detector.losses(images(HW), [Target(**target, weights=torch.ones(3))])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_resized_or_normalised_twice(family: str) -> None:
    detector = from_torchvision(build(family))
    batch = preprocess(images((50, 70)), detector.pixel_stats)
    seen: list[torch.Tensor] = []
    detector.model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    detector.predict(batch)
    detector.losses(batch, [random_target((50, 70), 2)])
    assert all(torch.equal(x, batch.tensor) for x in seen)
    assert len(seen) == 2
    with pytest.raises(RuntimeError, match="call the adapter's losses"):
        detector.model.eval()([torch.rand(3, 50, 70)])


@pytest.mark.parametrize("family", FAMILIES)
def test_tv_tensors_in_any_format(family: str) -> None:
    detector = from_torchvision(build(family))
    xyxy = torch.tensor([[10, 20, 60, 80.0]])
    cxcywh = tv_tensors.BoundingBoxes(torch.tensor([[35, 50, 50, 60.0]]), format="CXCYWH", canvas_size=HW)

    def losses(boxes: torch.Tensor) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return detector.losses(images(HW), [Target(boxes=boxes, labels=torch.tensor([1]))])

    torch.testing.assert_close(losses(cxcywh), losses(xyxy))


@pytest.mark.parametrize("family", FAMILIES)
def test_number_of_targets_is_checked(family: str) -> None:
    with pytest.raises(ValueError, match="targets must have one entry per image, expected 2, got 1"):
        from_torchvision(build(family)).losses(images(HW, HW), [empty_target()])


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_round_trip(family: str) -> None:
    first = from_torchvision(build(family))
    second = from_torchvision(build(family))
    with torch.no_grad():
        for p in second.parameters():
            p.add_(1)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.predict(images(HW)), first.predict(images(HW)), rtol=0, atol=0)


def test_faster_rcnn_losses_need_training_mode() -> None:
    with pytest.raises(RuntimeError, match="needs training mode"):
        from_torchvision(build("fasterrcnn")).eval().losses(images(HW), [random_target(HW, 2)])


def test_faster_rcnn_scales_come_from_the_padded_size() -> None:
    """33 pixels padded to 64: 8 cells / 33 pixels would be rounded to a stride of 4."""
    detector = from_torchvision(build("fasterrcnn"))
    detector.predict(images((33, 33)))
    assert detector.model.roi_heads.box_roi_pool.scales == [1 / 8, 1 / 16]


@pytest.mark.parametrize("family", FAMILIES)
def test_num_classes_is_checked(family: str) -> None:
    with pytest.raises(ValueError, match=r"num_classes is 4, but the model predicts 3 classes \(background not counted\)"):
        from_torchvision(build(family), num_classes=4)
    assert from_torchvision(build(family), num_classes=3).num_classes == 3


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="model must be a torchvision FasterRCNN, FCOS or RetinaNet, got Linear"):
        from_torchvision(nn.Linear(2, 2))
    detector = from_torchvision(build("fcos"))
    with pytest.raises(ValueError, match="is it wrapped already"):
        from_torchvision(detector.model)


@pytest.mark.parametrize("family", FAMILIES)
def test_learns_one_image(family: str) -> None:
    torch.manual_seed(0)
    detector = from_torchvision(build(family))
    canvas = torch.full((3, *HW), 90, dtype=torch.uint8)
    canvas[:, 16:56, 20:76] = torch.tensor([250, 30, 30], dtype=torch.uint8)[:, None, None]
    target = Target(boxes=torch.tensor([[20, 16, 76, 56.0]]), labels=torch.tensor([1]))
    optimizer = torch.optim.Adam(detector.parameters(), 2e-3)
    history = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = total(detector.losses([canvas], [target]))
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_works_under_autocast(family: str) -> None:
    detector = from_torchvision(build(family))
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.losses(images(HW), [random_target(HW, 4)])
        found = detector.predict(images(HW))[0]
    assert all(torch.isfinite(value) and value.dtype == torch.float32 for value in losses.values())
    total(losses).backward()
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    # Coordinates are not rounded to bfloat16 on the way.
    assert (found["boxes"] != found["boxes"].bfloat16().float()).any()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("family", FAMILIES)
def test_data_parallel_wraps_the_forward(family: str) -> None:
    """Every parameter takes part in each step, also without any box: the wrapper would wait for the others for ever."""
    detector = from_torchvision(build(family))
    wrapped = nn.parallel.DistributedDataParallel(detector)
    for targets in ([random_target(HW, 3)], [empty_target()], PaddedTargets.from_list([random_target(HW, 3)])):
        detector.zero_grad()
        total(wrapped(detector._batch(images(HW)), targets)).backward()
        assert all(p.grad is not None for p in detector.parameters())
