"""Deformable DETR and DINO as detectors: losses, predictions, building by name, learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectors.models import empty_target, images, random_target
from no_sync import no_sync
from tiny_detector import rectangles
from torch import Tensor, nn

from ssod_fast.detectors import build_detector, preprocess, require
from ssod_fast.detectors.deformable_detr import DETRConfig, DETRStages
from ssod_fast.detectors.deformable_detr.criterion import normalised_targets
from ssod_fast.detectors.deformable_detr.detector import DETRDetector
from ssod_fast.detectors.deformable_detr.stages import Decoded, Memory, Queries
from ssod_fast.ops import paired_box_iou
from ssod_fast.structures import PaddedTargets, Target
from ssod_fast.training.checkpoint import DetectorInfo, load_detector, save_detector

HW, OTHER_HW = (64, 96), (80, 64)
MATCHED = {"loss_cls", "loss_l1", "loss_giou"}
SMALL: dict[str, Any] = {"width": 32, "queries": 12}


def build(name: str = "dino_tiny", **options: Any) -> Any:
    torch.manual_seed(0)
    return build_detector(f"own:{name}", 3, **{**SMALL, **options})


def two_images() -> tuple[list[Tensor], list[Target]]:
    return images(HW, OTHER_HW), [random_target(HW, 3), random_target(OTHER_HW, 1, seed=1)]


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize(
    ("name", "options", "prefixes"),
    [
        ("dino_tiny", {}, ("", "enc_", "dn_")),
        ("dino_tiny", {"denoising": 0}, ("", "enc_")),
        ("deformable_detr_tiny", {}, ("", "enc_")),
        ("deformable_detr_tiny", {"denoising": 4}, ("", "enc_", "dn_")),
        ("deformable_detr_tiny", {"selection": "none", "box_refine": False, "own_heads": False}, ("",)),
    ],
)
def test_every_variant_trains_and_predicts(name: str, options: dict[str, Any], prefixes: tuple[str, ...]) -> None:
    detector = build(name, **options)
    require(detector, "supports_weights", "supports_padded", "features", for_method="this test")
    losses = detector(*two_images())
    assert set(losses) == {p + key for p in prefixes for key in MATCHED}
    total(losses).backward()
    assert all(p.grad is not None for p in detector.parameters())
    detector.eval()
    assert {key for key in detector(*two_images()) if key.startswith("dn_")} == set()
    assert [len(t["boxes"]) for t in detector.predict(two_images()[0])] == [36, 36]


def test_denoising_queries_change_nothing_for_the_others() -> None:
    detector = build(decoder_layers=3)
    first, second = detector(*two_images()), detector(*two_images())
    detector.config = detector.config.__class__(**{**vars(detector.config), "denoising": 0})
    alone = detector(*two_images())
    for key, value in alone.items():
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6)
    assert first["dn_loss_l1"] != second["dn_loss_l1"]  # other noise


def test_lists_and_padded_targets_give_the_same_losses() -> None:
    detector = build(denoising=0)
    batch, targets = preprocess(two_images()[0], detector.pixel_stats), two_images()[1]
    listed, padded = detector.losses(batch, targets), detector.losses(batch, PaddedTargets.from_list(targets, nmax=7))
    for key, value in listed.items():
        torch.testing.assert_close(padded[key], value)


def test_padding_gets_no_denoising_queries_beyond_their_number() -> None:
    detector = build(denoising=4)
    targets = PaddedTargets.from_list(two_images()[1], nmax=50)
    found = detector.denoise(normalised_targets(targets, torch.tensor([[64.0, 96.0], [80.0, 64.0]]), 3))
    assert (found.size, found.groups) == (8, 1)
    assert found.targets.count.tolist() == [3, 1]
    wide = detector.denoise(normalised_targets(targets, torch.tensor([[64.0, 96.0], [80.0, 64.0]]), 3), max_gt=6)
    assert wide.size == 12


def test_nothing_waits_for_the_device() -> None:
    detector = build()
    batch, targets = preprocess(two_images()[0], detector.pixel_stats), PaddedTargets.from_list(two_images()[1])
    total(detector.losses(batch, targets)).backward()
    with no_sync():
        total(detector.losses(batch, targets)).backward()


def test_images_without_objects() -> None:
    for targets in ([empty_target(), empty_target()], [random_target(HW, 2), empty_target()], PaddedTargets.empty(2)):
        detector = build()
        losses = detector(two_images()[0], targets)
        total(losses).backward()
        assert all(p.grad.isfinite().all() for p in detector.parameters())
        if isinstance(targets, PaddedTargets):
            assert {key for key, value in losses.items() if value == 0} == {
                "loss_l1", "loss_giou", "enc_loss_l1", "enc_loss_giou", "dn_loss_cls", "dn_loss_l1", "dn_loss_giou",
            }  # fmt: skip


def test_weights_are_shares_of_box_losses() -> None:
    detector = build(denoising=0)
    pictures, targets = two_images()
    full = detector(pictures, targets)
    half = detector(pictures, [Target(**t, weights=torch.full_like(t["labels"], 0.5, dtype=torch.float32)) for t in targets])
    torch.testing.assert_close(half["loss_l1"], full["loss_l1"] / 2)
    torch.testing.assert_close(half["enc_loss_giou"], full["enc_loss_giou"] / 2)
    assert half["loss_cls"] != full["loss_cls"]


def test_autocast_gives_the_losses_in_float32() -> None:
    detector = build(denoising=0)
    expected = detector(*two_images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = detector(*two_images())
    for value in found.values():
        assert value.dtype == torch.float32
        assert value.isfinite()
    torch.testing.assert_close(found["loss_l1"], expected["loss_l1"], rtol=0.05, atol=0.05)


def test_a_program_takes_the_place_of_targets() -> None:
    detector = build()

    def program(given: Any, batch: Any) -> dict[str, Tensor]:
        assert given is detector
        return {"loss_sum": given.run(given.encode(batch)).decoded.logits.sum()}

    pictures = two_images()[0]
    expected = program(detector, preprocess(pictures, detector.pixel_stats))
    torch.testing.assert_close(detector(pictures, program), expected)
    require(detector, for_method="this test")


class Fixed(nn.Module):
    """Says the same about every image; follows the stages without a network behind them."""

    def __init__(self, logits: Tensor, boxes: Tensor) -> None:
        super().__init__()
        self.config = DETRConfig(logits.shape[-1])
        self.logits, self.boxes = logits, boxes

    def extract(self, images: Any) -> Any:
        return images

    def encode(self, pyramid: Any) -> Memory:
        hw = torch.tensor(pyramid.sizes, dtype=torch.float32)
        return Memory(torch.zeros(len(pyramid), 1, 1), None, [(1, 1)], torch.ones(len(pyramid), 1, 2), hw)

    def select(self, memory: Memory) -> tuple[Queries, None]:
        return Queries(memory.tokens, memory.tokens), None

    def decode(self, memory: Memory, queries: Queries, **_: Any) -> Decoded:
        layers = torch.stack([torch.zeros_like(self.logits), self.logits]), torch.stack([torch.zeros_like(self.boxes), self.boxes])
        logits, boxes = (x[:, None].expand(-1, len(memory.image_hw), -1, -1) for x in layers)
        return Decoded(logits, logits, boxes)

    box_queries = label_queries = select


LOGITS = torch.tensor([[2.0, -1.0], [1.0, 1.5], [-3.0, -9.0]])
BOXES = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.52, 0.5, 0.4, 0.2], [0.9, 0.1, 0.4, 0.4]])


def fixed(logits: Tensor = LOGITS, boxes: Tensor = BOXES, **options: Any) -> DETRDetector:
    return DETRDetector(Fixed(logits, boxes), **options)


def test_predictions_are_the_best_pairs_of_query_and_class() -> None:
    assert isinstance(Fixed(LOGITS, BOXES), DETRStages)
    first, second = fixed().predict(images((100, 200), (50, 40)), score_thr=0.1)
    assert first["labels"].tolist() == second["labels"].tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(first["scores"], torch.tensor([2.0, 1.5, 1.0, -1.0]).sigmoid())
    torch.testing.assert_close(first["boxes"][:2], torch.tensor([[60.0, 40, 140, 60], [64, 40, 144, 60]]))
    torch.testing.assert_close(second["boxes"][3], torch.tensor([12.0, 20, 28, 30]))
    every = fixed().predict(images((100, 200)))[0]
    torch.testing.assert_close(every["boxes"][4], torch.tensor([140.0, 0, 200, 30]))  # cut off
    assert len(fixed().predict(images((100, 200)), topk=2)[0]["boxes"]) == 2


def test_a_score_equal_to_the_threshold_is_not_enough() -> None:
    score = float(fixed().predict(images(HW))[0]["scores"][1])
    assert len(fixed().predict(images(HW), score_thr=score)[0]["scores"]) == 1


def test_what_is_not_finite_is_not_predicted() -> None:
    logits, boxes = LOGITS.clone(), BOXES.clone()
    logits[0, 0], boxes[1, 2] = torch.nan, torch.inf
    said = fixed(logits, boxes).predict(images(HW))[0]
    torch.testing.assert_close(said["scores"], torch.tensor([-1.0, -3.0, -9.0]).sigmoid())


def test_suppression_is_by_class_and_stays_in_the_options() -> None:
    detector = fixed(nms_thr=0.6)
    said = detector.predict(images((100, 200)))[0]
    assert said["labels"].tolist() == [0, 1, 0]  # of the two overlapping boxes of each class the better one; -9 is below 0.01
    torch.testing.assert_close(said["scores"], torch.tensor([2.0, 1.5, -3.0]).sigmoid())
    assert detector.build_options == {"nms_thr": 0.6}
    detector.set_nms(None)
    assert len(detector.predict(images((100, 200)))[0]["boxes"]) == 6
    assert build(nms_thr=0.5).nms_thr == 0.5
    for bad in (0, 1.5):
        with pytest.raises(ValueError, match=rf"nms_thr must lie in \(0, 1\] or be None, got {bad}"):
            detector.set_nms(bad)
    with pytest.raises(TypeError, match=r"nms_thr must be a number or None, got '0\.6'"):
        detector.set_nms("0.6")


def test_prediction_restores_modes_and_keeps_no_graph() -> None:
    detector = build()
    detector.network.backbone.eval()
    before = [m.training for m in detector.modules()]
    said = detector.predict(two_images()[0])
    assert [m.training for m in detector.modules()] == before
    assert not said[0]["boxes"].requires_grad
    for target, (h, w) in zip(said, (HW, OTHER_HW), strict=True):
        assert (target["boxes"] >= 0).all()
        assert (target["boxes"] <= torch.tensor([w, h, w, h])).all()


@pytest.mark.parametrize(("options", "message"), [({"topk": 0}, "topk must be at least 1, got 0"), ({"score_thr": 2}, "got 2")])
def test_bad_arguments_of_predict(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fixed().predict(images(HW), **options)


def test_feature_maps_are_those_of_the_encoder() -> None:
    assert [tuple(m.shape[1:]) for m in build().features(images((64, 96)))] == [(32, 8, 12), (32, 4, 6), (32, 2, 3)]


def test_a_network_without_stages_is_refused() -> None:
    with pytest.raises(TypeError, match=r"network must follow DETRStages .* got Linear"):
        DETRDetector(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dino_resnet5", {}, r"unknown detector own:dino_resnet5: 'resnet5' is no convolutional network.*did you mean resnet5"),
        ("dinoo_tiny", {}, r"unknown detector own:dinoo_tiny: expected .*did you mean dino_tiny"),
        ("dino_tiny", {"querys": 5}, r"own:dino_tiny has no option 'querys' \(did you mean queries\?\); known: alpha, "),
        ("dino_tiny", {"queries": 0}, "queries must be at least 1, got 0"),
        ("dino_tiny", {"cls_weight": -1}, "cls_weight must be a finite number >= 0, got -1"),
        ("dino_tiny", {"tiny_norm": "layer"}, r'tiny_norm must be "group" or "batch", got .layer.'),
        ("dino_tiny", {"box_noise": float("inf")}, "box_noise must be finite and not negative, got inf"),
        ("dino_tiny", {"label_noise": 1.5}, r"label_noise must lie in \[0, 1\], got 1.5"),
        ("dino_tiny", {"trainable_layers": 6}, r"trainable_layers must lie in 0..5, got 6"),
    ],
)
def test_unknown_names_and_options_are_answered_with_the_nearest(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_detector(f"own:{name}", 3, **options)


def test_a_saved_detector_is_rebuilt(tmp_path: Path) -> None:
    detector = build(cls_weight=1.0, points=2).eval()
    detector.set_nms(0.6)
    info = DetectorInfo("own:dino_tiny", detector.build_options, ["a", "b", "c"], [1, 2, 3], {}, "student", "supervised", 5, {})
    save_detector(tmp_path / "detector.safetensors", detector, info)
    loaded: Any = load_detector(tmp_path / "detector.safetensors")[0]
    assert (loaded.config, loaded.criterion, loaded.nms_thr) == (detector.config, detector.criterion, 0.6)
    pictures = two_images()[0]
    for ours, theirs in zip(detector.predict(pictures), loaded.predict(pictures), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("boxes", "labels", "scores"))


def test_backbone_weights_decide_about_norms_stages_and_padding(backbone_weights: Path) -> None:
    detector = build("dino_mobilenet_v2", backbone_weights=backbone_weights, encoder_layers=1, decoder_layers=1)
    chosen = {key: detector.build_options[key] for key in ("frozen_bn", "trainable_layers", "same_padding")}
    assert chosen == {"frozen_bn": True, "trainable_layers": 3, "same_padding": True}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in detector.modules())
    assert not next(detector.network.backbone.parameters()).requires_grad
    losses = detector(*two_images())
    total(losses).backward()
    again = build_detector("own:dino_mobilenet_v2", 3, **detector.build_options)
    again.load_state_dict(detector.state_dict())


def mean_overlap(detector: Any, count: int = 24) -> float:
    """Mean over true boxes of the IoU with the best scored prediction of the same class around its centre."""
    generator = torch.Generator().manual_seed(999)
    overlaps = []
    for _ in range(count):
        image, truth = rectangles(generator)
        said = detector.predict([image], 0.3)[0]
        for box, label in zip(truth["boxes"], truth["labels"], strict=True):
            centre = (box[:2] + box[2:]) / 2
            hits = (said["labels"] == label) & (said["boxes"][:, :2] < centre).all(1) & (said["boxes"][:, 2:] > centre).all(1)
            overlaps.append(float(paired_box_iou(said["boxes"][hits][:1], box[None])) if hits.any() else 0.0)
    return sum(overlaps) / len(overlaps)


def test_a_small_dino_learns() -> None:
    torch.manual_seed(0)
    detector = build_detector("own:dino_tiny", 2)
    assert mean_overlap(detector) < 0.1
    optimizer = torch.optim.AdamW(detector.parameters(), 2e-3)
    generator, seen = torch.Generator().manual_seed(1), []
    for _ in range(60):
        scenes = [rectangles(generator) for _ in range(4)]
        loss = total(detector([image for image, _ in scenes], [target for _, target in scenes]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 0.5)
        optimizer.step()
        seen.append(loss.item())
    assert sum(seen[-5:]) < 0.6 * sum(seen[:5])
    assert mean_overlap(detector) > 0.4
