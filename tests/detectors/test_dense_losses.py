"""The dense losses against torchvision's own, on the same head outputs and anchors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detectors.models import DENSE, build, empty_target, images, random_target
from no_sync import SyncError, no_sync
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from ssod_fast.detectors import from_torchvision
from ssod_fast.detectors.dense_loss import focal_rows, giou_loss
from ssod_fast.structures import PaddedTargets, Target

SIZES = [(96, 128), (128, 75), (64, 64)]


def torchvision_losses(model: Any, raw: Any, targets: list[Target]) -> dict[str, Tensor]:
    head = {"cls_logits": raw.logits, "bbox_regression": raw.deltas}
    anchors = [raw.grid.boxes] * len(targets)
    if raw.center is None:
        return dict(model.compute_loss(targets, head, anchors))
    return dict(model.compute_loss(targets, {**head, "bbox_ctrness": raw.center}, anchors, raw.grid.per_level))


def targets_of(kind: str) -> list[Target]:
    counts = {"full": (7, 3, 12), "one empty": (7, 0, 12), "all empty": (0, 0, 0), "crowded": (40, 60, 1)}[kind]
    return [random_target(hw, n, seed=i) for i, (hw, n) in enumerate(zip(SIZES, counts, strict=True))]


def gradients(losses: dict[str, Tensor], module: torch.nn.Module) -> dict[str, Tensor]:
    module.zero_grad()
    sum(losses.values(), torch.zeros(())).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["full", "one empty", "all empty", "crowded"])
@pytest.mark.parametrize("family", DENSE)
def test_losses_and_gradients_equal_torchvision(family: str, kind: str) -> None:
    detector = from_torchvision(build(family))
    spread_heads(detector)
    targets = targets_of(kind)
    ours = detector.losses(images(*SIZES), targets)
    raw = detector.raw_outputs(images(*SIZES))
    theirs = torchvision_losses(detector.model, raw, targets)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)
    expected = gradients(theirs, detector)
    for name, gradient in gradients(detector.losses(images(*SIZES), targets), detector).items():
        # Sums over thousands of anchors in another order: relative to the largest entry.
        torch.testing.assert_close(gradient, expected[name], atol=1e-5 * (2 + float(expected[name].abs().max())), rtol=1e-4)


def spread_heads(detector: torch.nn.Module) -> None:
    """Heads as after some training: varied scores and boxes, so that no term of a loss is trivial."""
    generator = torch.Generator().manual_seed(3)
    for name, p in detector.named_parameters():
        if "head" in name and p.dim() == 4:
            p.data = torch.randn(p.shape, generator=generator) * 0.08
        elif name.endswith(("cls_logits.bias", "bbox_reg.bias")):
            p.data = torch.randn(p.shape, generator=generator) + 0.5


@pytest.mark.parametrize("loss", ["smooth_l1", "giou"])
def test_retinanet_box_losses_equal_torchvision(loss: str) -> None:
    model = build("retinanet")
    model.head.regression_head._loss_type = loss
    detector = from_torchvision(model)
    targets = targets_of("full")
    theirs = torchvision_losses(detector.model, detector.raw_outputs(images(*SIZES)), targets)
    torch.testing.assert_close(detector.losses(images(*SIZES), targets), theirs, atol=1e-5, rtol=1e-5)


def test_unknown_retinanet_box_loss_is_refused() -> None:
    model = build("retinanet")
    model.head.regression_head._loss_type = "diou"
    with pytest.raises(ValueError, match="box_loss must be one of l1, smooth_l1, giou, got 'diou'"):
        from_torchvision(model)


@pytest.mark.parametrize("family", DENSE)
def test_padded_and_list_form_agree(family: str) -> None:
    detector = from_torchvision(build(family))
    targets = targets_of("one empty")
    padded = PaddedTargets.from_list(targets, nmax=30)
    torch.testing.assert_close(detector.losses(images(*SIZES), padded), detector.losses(images(*SIZES), targets))


@pytest.mark.parametrize("family", DENSE)
def test_forward_and_losses_do_not_sync(family: str) -> None:
    detector = from_torchvision(build(family))
    batch = detector._batch(images(*SIZES))
    wider = detector._batch(images((160, 160), (96, 224)))
    padded = PaddedTargets.from_list(targets_of("one empty"))
    detector.losses(batch, padded)  # the first call on a device copies cell anchors there
    with no_sync():
        losses = detector.losses(batch, padded)
        sum(losses.values()).backward()
        detector.losses(wider, padded[[0, 1]])


def test_the_guard_sees_the_sync_of_the_list_form() -> None:
    detector = from_torchvision(build("fcos"))
    with pytest.raises(SyncError), no_sync():
        detector.losses(images(*SIZES), targets_of("full"))


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("form", ["list", "padded"])
def test_degenerate_boxes_change_nothing(family: str, form: str) -> None:
    detector = from_torchvision(build(family))
    clean = targets_of("full")
    bad = torch.tensor([[5, 5, 5, 20], [9, 9, 30, 8], [float("nan"), 0, 9, 9], [0, 0, float("inf"), 9.0]])
    dirty = [Target(boxes=torch.cat([bad, t["boxes"]]), labels=torch.cat([torch.zeros(4, dtype=torch.int64), t["labels"]])) for t in clean]
    given: Any = PaddedTargets.from_list(dirty) if form == "padded" else dirty
    torch.testing.assert_close(detector.losses(images(*SIZES), given), detector.losses(images(*SIZES), clean))


@pytest.mark.parametrize("family", DENSE)
def test_weights_scale_the_share_of_a_box(family: str) -> None:
    """All boxes at weight w scale the positive terms by w; background keeps its share."""
    detector = from_torchvision(build(family))
    targets = targets_of("full")

    def at(weight: float) -> dict[str, Tensor]:
        return detector.losses(images(*SIZES), [Target(**t, weights=torch.full((len(t["labels"]),), weight)) for t in targets])

    full, half, none = at(1.0), at(0.5), at(0.0)
    for name in full:
        torch.testing.assert_close(half[name], (full[name] + none[name]) / 2)
        assert full[name] > none[name]
    assert none["bbox_regression"] == 0
    assert none["classification"] > 0


@pytest.mark.parametrize("family", DENSE)
def test_weight_of_one_box_reaches_only_its_anchors(family: str) -> None:
    detector = from_torchvision(build(family))
    boxes = torch.tensor([[0, 0, 40, 40], [80, 60, 128, 96.0]])
    raw = detector.raw_outputs(images((96, 128)))
    raw.deltas.retain_grad()
    target = Target(boxes=boxes, labels=torch.tensor([0, 1]), weights=torch.tensor([0.0, 1.0]))
    padded = PaddedTargets.from_list([target])
    detector._losses(raw, padded, padded.valid)["bbox_regression"].backward()
    moved = raw.deltas.grad.abs().sum(-1)[0] > 0
    x, y = ((raw.grid.boxes[:, :2] + raw.grid.boxes[:, 2:]) / 2).unbind(1)
    assert moved.any()
    assert not moved[(x < 40) & (y < 40)].any()


@pytest.mark.parametrize("family", DENSE)
def test_labels_outside_of_the_classes(family: str) -> None:
    detector = from_torchvision(build(family))
    target = Target(boxes=torch.tensor([[0, 0, 40, 40.0]]), labels=torch.tensor([3]))
    with pytest.raises(ValueError, match=r"targets\[0\]\['labels'\] must lie in 0..2 .* got 3..3"):
        detector.losses(images((96, 128)), [target])
    padded = detector.losses(images((96, 128)), PaddedTargets.from_list([target]))
    torch.testing.assert_close(padded, detector.losses(images((96, 128)), [empty_target()]))


def test_a_box_that_touches_no_anchor_claims_none() -> None:
    detector = from_torchvision(build("retinanet"))
    outside = Target(boxes=torch.tensor([[900, 900, 950, 950.0]]), labels=torch.tensor([1]))
    torch.testing.assert_close(detector.losses(images((64, 64)), [outside]), detector.losses(images((64, 64)), [empty_target()]))


@pytest.mark.parametrize("family", DENSE)
def test_small_groups_of_images_match_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = from_torchvision(build(family))
    whole = detector.losses(images(*SIZES), targets_of("crowded"))
    monkeypatch.setattr("ssod_fast.detectors.retinanet_loss._MAX_PAIRS", 1)
    torch.testing.assert_close(detector.losses(images(*SIZES), targets_of("crowded")), whole)


def test_focal_rows_equal_torchvision() -> None:
    logits = torch.randn(2, 50, 7, dtype=torch.float64) * 4
    labels = torch.randint(-1, 7, (2, 50))
    target = torch.zeros_like(logits)
    target[labels >= 0] = torch.nn.functional.one_hot(labels[labels >= 0], 7).double()
    torch.testing.assert_close(focal_rows(logits, labels), sigmoid_focal_loss(logits, target).sum(-1))


def test_giou_equals_torchvision() -> None:
    a, b = torch.rand(2, 100, 4, dtype=torch.float64)
    a[:, 2:] += a[:, :2]
    b[:, 2:] += b[:, :2] + 0.2
    torch.testing.assert_close(giou_loss(a, b), generalized_box_iou_loss(a, b))


@pytest.mark.parametrize("family", DENSE)
def test_losses_are_float32_under_autocast(family: str) -> None:
    detector = from_torchvision(build(family))
    exact = detector.losses(images(*SIZES), targets_of("full"))
    with torch.autocast("cpu", torch.bfloat16):
        low = detector.losses(images(*SIZES), targets_of("full"))
    for name, value in low.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("family", DENSE)
def test_a_deep_copy_shares_nothing(family: str) -> None:
    student = from_torchvision(build(family))
    student.losses(images(*SIZES), targets_of("full"))
    teacher = copy.deepcopy(student)
    assert teacher._anchors.generator is teacher.model.anchor_generator
    assert teacher._anchors.generator is not student.model.anchor_generator
    torch.testing.assert_close(
        teacher.losses(images(*SIZES), targets_of("full")), student.losses(images(*SIZES), targets_of("full")), rtol=0, atol=0
    )
