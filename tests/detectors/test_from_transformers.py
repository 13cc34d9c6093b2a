"""Adapters of transformers' detectors, on small models with random weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectors.hf_models import MASKED, NAMES, NOTHING, PAIR, TARGETS, UNMASKED, batch_of, boxes_of, make, seeded, total
from no_sync import SyncError, no_sync
from tiny_detector import make_batches
from tiny_transformers import BUILD, build
from torch import Tensor, nn

from ssod_fast.detectors import IMAGENET, ImageBatch, PixelStats, build_detector, capabilities, from_transformers, require
from ssod_fast.detectors.transformers.families import UNIT
from ssod_fast.dropin import transformers as dropin
from ssod_fast.methods import MixPL, MixPLConfig, SemiSupervisedDetector, SupervisedMethod
from ssod_fast.structures import PaddedTargets, Target

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", NAMES)
class TestLosses:
    def test_follows_the_protocol(self, name: str) -> None:
        detector = make(name)
        require(detector, "supports_weights", "features", for_method="any")
        padded = {"supports_padded"} if name == "rf_detr" else set()
        assert capabilities(detector) == {"supports_weights", "features", *padded}
        assert detector.num_classes == 3

    @pytest.mark.parametrize("targets", [TARGETS, [TARGETS[0], NOTHING], [NOTHING, NOTHING]], ids=["boxes", "one empty", "all empty"])
    def test_finite_with_all_gradients(self, name: str, targets: list[Target]) -> None:
        """DistributedDataParallel waits for a gradient of each parameter, also where no image has a box."""
        detector = make(name)
        losses = detector(PAIR, targets)
        assert all(value.dim() == 0 and value.isfinite() for value in losses.values())
        total(losses).backward()
        for key, parameter in detector.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, key
                assert parameter.grad.isfinite().all(), key

    def test_all_gradients_without_losses_of_inner_layers(self, name: str) -> None:
        detector = make(name)
        detector.model.config.auxiliary_loss = False
        total(detector(PAIR, TARGETS)).backward()
        assert [key for key, parameter in detector.named_parameters() if parameter.requires_grad and parameter.grad is None] == []

    @pytest.mark.parametrize("training", [True, False])
    def test_sum_is_the_models_loss(self, name: str, training: bool) -> None:
        detector = make(name).train(training)
        losses = seeded(detector, PAIR, TARGETS)
        frame = [(64, 96)] * 2 if name in UNMASKED else PAIR.sizes
        labels = []
        for (h, w), target in zip(frame, TARGETS, strict=True):
            x0, y0, x1, y1 = target["boxes"].unbind(1)
            boxes = torch.stack([(x0 + x1) / 2 / w, (y0 + y1) / 2 / h, (x1 - x0) / w, (y1 - y0) / h], 1)
            labels.append({"class_labels": target["labels"], "boxes": boxes})
        torch.manual_seed(0)
        square = name == "rf_detr"  # whose windows need it
        pixels = nn.functional.pad(PAIR.tensor, (0, 0, 0, 32)) if square else PAIR.tensor
        mask = torch.zeros(2, *pixels.shape[-2:], dtype=torch.long)
        for row, (h, w) in zip(mask, PAIR.sizes, strict=True):
            row[:h, :w] = 1
        given = {"pixel_mask": mask} if name in MASKED else {}
        wanted = detector.model(pixel_values=pixels, labels=labels, **given).loss
        torch.testing.assert_close(total(losses), wanted, rtol=1e-5, atol=1e-5)
        assert not any("cardinality" in key for key in losses)
        assert any(key.startswith("dn_") for key in losses) == (training and name in UNMASKED)

    def test_weights_scale_the_boxes(self, name: str) -> None:
        detector = make(name)
        shares = {
            share: seeded(detector, PAIR, [Target(**t, weights=torch.full((len(t["boxes"]),), share)) for t in TARGETS])  # type: ignore[misc]
            for share in (1.0, 0.5, 0.0)
        }
        plain = seeded(detector, PAIR, TARGETS)
        for key in plain:
            torch.testing.assert_close(shares[1.0][key], plain[key])
            if key.endswith(("loss_bbox", "loss_giou", "loss_fgl")):
                assert plain[key] > 0
                torch.testing.assert_close(shares[0.5][key], plain[key] / 2)
                assert shares[0.0][key] == 0
            elif key.endswith(("loss_ce", "loss_vfl")):
                assert shares[0.0][key] != plain[key]

    def test_targets_in_both_forms_without_useless_boxes(self, name: str) -> None:
        detector = make(name)
        useless = boxes_of([5, 6, 40, 50], [9, 9, 9, 30], [20, 30, 10, 40], [30, 10, 90, 60], [1, 1, torch.nan, 9])
        wanted = seeded(detector, PAIR, TARGETS)
        for targets in ([useless, TARGETS[1]], PaddedTargets.from_list([useless, TARGETS[1]], nmax=9)):
            found = seeded(detector, PAIR, targets)
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                torch.testing.assert_close(found[key], value)

    def test_no_sync_where_padded_targets_are_supported(self, name: str) -> None:
        detector = make(name)
        targets = PaddedTargets.from_list(TARGETS, nmax=4)
        if not detector.supports_padded:
            with pytest.raises(SyncError), no_sync():
                detector.losses(PAIR, targets)
            return
        detector.losses(PAIR, targets)
        with no_sync():
            total(detector.losses(PAIR, targets)).backward()

    def test_bfloat16(self, name: str) -> None:
        detector = make(name)
        with torch.autocast("cpu", torch.bfloat16):
            losses = detector.losses(PAIR, TARGETS)
            found = detector.predict(PAIR, topk=5)
        assert total(losses).isfinite()
        assert found[0]["boxes"].dtype == found[0]["scores"].dtype == torch.float32


def fixed_output(detector: Any, boxes: Tensor, logits: Tensor) -> dict[str, Any]:
    """Makes the model say the same for each image; what it was given enters the returned dict."""
    given: dict[str, Any] = {}

    def forward(**arguments: Any) -> Any:
        given.update(arguments, training=detector.model.training)
        rows = len(arguments["pixel_values"])
        return SimpleNamespace(pred_boxes=boxes.expand(rows, -1, -1), logits=logits.expand(rows, -1, -1))

    detector.model.forward = forward
    return given


def test_two_stages_of_deformable_detr_have_all_gradients() -> None:
    model = build("deformable_detr", with_box_refine=True, two_stage=True, two_stage_num_proposals=12)
    detector = from_transformers(model).train()
    total(detector(PAIR, TARGETS)).backward()
    assert [key for key, parameter in detector.named_parameters() if parameter.requires_grad and parameter.grad is None] == []


@pytest.mark.parametrize("name", NAMES)
class TestPredict:
    def test_pixels_of_the_given_image(self, name: str) -> None:
        """Shares of the image where the model knows of padding, of the batch where it does not; cut off at the image's borders."""
        detector = make(name)
        batch = batch_of((64, 64), (96, 80), canvas=(96, 96))
        boxes = torch.tensor([[0.25, 0.5, 0.1, 0.2], [0.5, 0.25, 0.2, 0.1], [0.85, 0.5, 0.1, 0.1]])
        logits = torch.tensor([[2.0, -9, -9], [-9, 1, 0], [-9, -9, -1]])
        given = fixed_output(detector, boxes, logits)
        first, second = detector.predict(batch, score_thr=0.1)
        if name in MASKED:
            assert given["pixel_mask"].sum((1, 2)).tolist() == [64 * 64, 96 * 80]
            wanted = [[12.8, 25.6, 19.2, 38.4], [25.6, 12.8, 38.4, 19.2], [25.6, 12.8, 38.4, 19.2], [51.2, 28.8, 57.6, 35.2]]
        else:
            assert given["pixel_mask"] is None
            # The third box begins in the padding of the first image.
            wanted = [[19.2, 38.4, 28.8, 57.6], [38.4, 19.2, 57.6, 28.8], [38.4, 19.2, 57.6, 28.8]]
        torch.testing.assert_close(first["boxes"], torch.tensor(wanted))
        assert first["labels"].tolist() == [0, 1, 2, 2][: len(wanted)]
        torch.testing.assert_close(first["scores"], torch.tensor([2.0, 1, 0, -1]).sigmoid()[: len(wanted)])
        width = 80.0 if name in UNMASKED else 0.9 * 80
        torch.testing.assert_close(second["boxes"][3, 2], torch.tensor(width))

    def test_eval_mode_inside_and_restored(self, name: str) -> None:
        detector = make(name)
        detector.model.model.backbone.eval()
        given = fixed_output(detector, torch.full((1, 4), 0.5), torch.zeros(1, 3))
        detector.predict(PAIR)
        assert given["training"] is False
        assert detector.model.training
        assert not detector.model.model.backbone.training

    def test_images_score_threshold_and_topk(self, name: str) -> None:
        detector = make(name)
        images = [torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8), torch.randint(0, 256, (3, 90, 100), dtype=torch.uint8)]
        for found, (h, w) in zip(detector.predict(images, topk=7), [(96, 128), (90, 100)], strict=True):
            assert len(found["boxes"]) <= 7
            assert (found["boxes"] >= 0).all()
            assert (found["boxes"] <= torch.tensor([w, h, w, h])).all()
            assert (found["scores"].diff() <= 0).all()
        assert all(len(found["boxes"]) == 0 for found in detector.predict(images, score_thr=1.0))
        assert not any(found["boxes"].requires_grad for found in detector.predict(images))

    def test_features_cover_the_batch(self, name: str) -> None:
        detector = make(name)
        maps = detector.features(batch_of((64, 96), canvas=(64, 96)))
        assert [tuple(m.shape[-2:]) for m in maps] == ([(8, 12)] if name == "rf_detr" else [(8, 12), (4, 6), (2, 3)])


class TestPadding:
    def test_mask_makes_padding_not_matter(self) -> None:
        """Boxes of an image are those that it has alone, but for convolutions that look over its border."""
        detector = make("deformable_detr").eval()
        alone = batch_of((128, 128), canvas=(128, 128))
        padded = ImageBatch(torch.zeros(2, 3, 256, 192), [(128, 128), (256, 192)])
        padded.tensor[0, :, :128, :128] = alone.tensor[0]
        (wanted,), (found, _) = detector.predict(alone), detector.predict(padded)
        order = [boxes["boxes"][boxes["boxes"].sum(1).argsort()] for boxes in (wanted, found)]
        assert (order[0] - order[1]).abs().max() < 1

    @pytest.mark.parametrize("name", ["rt_detr", "rt_detr_v2"])
    def test_places_of_a_padded_batch_are_pixels(self, name: str) -> None:
        """An untrained model says the places of its feature maps, whose centres are known in pixels of the batch."""
        detector = from_transformers(BUILD[name](num_queries=150))
        batch = batch_of((96, 64), (96, 96), canvas=(96, 96))
        boxes = detector.predict(batch, topk=450)[0]["boxes"]
        inner = boxes[(boxes > 0).all(1) & (boxes[:, 2] < 64) & (boxes[:, 3] < 96)]
        assert len(inner) > 20
        centres = (inner[:, :2] + inner[:, 2:]) / 2
        off = torch.stack([((centres / stride - 0.5) % 1 - 0.5).abs().sub(0.5).abs().amax(1) for stride in (8, 16, 32)]).amin(0)
        assert off.max() < 1e-3

    @pytest.mark.parametrize("name", UNMASKED)
    def test_others_of_a_batch_do_not_matter(self, name: str) -> None:
        detector = make(name).eval()
        batch = batch_of((96, 64), (96, 96), canvas=(96, 96))
        wanted = detector.predict(ImageBatch(batch.tensor[:1], batch.sizes[:1]))[0]
        found = detector.predict(batch)[0]
        torch.testing.assert_close(found["boxes"], wanted["boxes"], atol=1e-3, rtol=0)

    @pytest.mark.parametrize("name", UNMASKED)
    def test_sizes_of_evaluation_are_free(self, name: str) -> None:
        """A checkpoint with anchors and positions of one size predicts on images of another."""
        detector = from_transformers(build(name, anchor_image_size=[64, 64], eval_size=64))
        assert detector.model.config.anchor_image_size is None
        fresh = from_transformers(build(name))
        for size in ((64, 96), (96, 64)):
            batch = batch_of(size, canvas=size)
            torch.testing.assert_close(detector.predict(batch)[0]["boxes"], fresh.predict(batch)[0]["boxes"])

    def test_windows_of_rf_detr_are_square(self) -> None:
        detector = make("rf_detr")
        assert detector.stride == 16
        seen = []
        detector.model.model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
        detector.losses(PAIR, TARGETS)
        assert seen[0][0].shape[-2:] == seen[0][1].shape[-2:] == (96, 96)
        assert detector.model.config.backbone_config.num_windows == 2


@pytest.mark.parametrize("name", NAMES)
class TestMethods:
    def test_supervised_step(self, name: str) -> None:
        model = SemiSupervisedDetector(make(name), SupervisedMethod())
        out = model.training_step(make_batches(0)[0], None, 0)
        out.loss.backward()
        assert out.loss.isfinite()

    def test_mixpl_steps(self, name: str) -> None:
        config = MixPLConfig(mosaic_shape=((70, 70), (90, 90)), cls_pseudo_thr=0.01, teacher_topk=10)
        model = SemiSupervisedDetector(make(name), MixPL(config))
        assert model.teacher is not None
        before = copy.deepcopy(model.teacher.state_dict())
        for step in range(2):
            out = model.training_step(*make_batches(step), step)
            out.loss.backward()
            assert out.loss.isfinite()
        assert all(torch.equal(before[key], value) for key, value in model.teacher.state_dict().items())
        assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
        with torch.no_grad():
            for parameter in model.student.parameters():
                parameter.sub_(1e-3 if parameter.grad is None else 1e-3 * parameter.grad)
        model.update_teacher(2)
        assert any(not torch.equal(before[key], value) for key, value in model.teacher.state_dict().items())


class TestTakingOver:
    @pytest.mark.parametrize("name", NAMES)
    def test_state_dict_and_output_stay(self, name: str) -> None:
        model: Any = build(name).eval()
        keys, batch = list(model.state_dict()), batch_of((96, 96), canvas=(96, 96))
        with torch.no_grad():
            before = model(pixel_values=batch.tensor).pred_boxes
        detector: Any = from_transformers(model)
        assert detector.model is model
        assert list(model.state_dict()) == keys
        assert not detector.training
        with torch.no_grad():
            torch.testing.assert_close(model(pixel_values=batch.tensor).pred_boxes, before, atol=1e-4, rtol=0)
        assert dropin.unpatch(model) > 0
        assert dropin.unset_loss(model) == 1

    def test_without_patch(self) -> None:
        detector = make("rt_detr", patch=False)
        assert dropin.unpatch(detector.model) == 0

    @pytest.mark.parametrize("name", NAMES)
    def test_copies_have_the_loss(self, name: str) -> None:
        detector = make(name)
        wanted, found = seeded(detector, PAIR, TARGETS), seeded(copy.deepcopy(detector), PAIR, TARGETS)
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value)

    @pytest.mark.parametrize("name", NAMES)
    def test_other_number_of_classes(self, name: str) -> None:
        model = build(name).eval()
        frozen = next(key for key, parameter in model.named_parameters() if "backbone" in key and parameter.dim() == 4)
        model.get_parameter(frozen).requires_grad_(False)
        detector: Any = from_transformers(model, 5)
        own, old = detector.model.state_dict(), model.state_dict()
        other = {key for key in own if own[key].shape != old[key].shape}
        assert other
        assert all("class_embed" in key or "score_head" in key for key in other)
        assert all(torch.equal(own[key], old[key]) for key in own.keys() - other)
        assert not detector.model.get_parameter(frozen).requires_grad
        assert not detector.training
        assert detector.num_classes == detector.model.config.num_labels == 5
        assert 0 < total(seeded(detector.train(), PAIR, [boxes_of([5, 6, 40, 50], label=4), NOTHING])) < 1e3
        fresh = detector.predict(PAIR)[0]
        assert (fresh["labels"] < 5).all()
        biases = [own[key] for key in other if key.endswith("bias")]
        assert biases
        assert all((bias < -1).all() for bias in biases)  # rare objects, also where transformers starts at one half

    def test_pixels(self) -> None:
        stats = PixelStats((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
        assert [make(name).pixel_stats for name in NAMES] == [IMAGENET, UNIT, UNIT, UNIT, IMAGENET]
        assert make("rt_detr", pixel_stats=stats).pixel_stats == stats

    def test_processors_of_transformers_agree(self) -> None:
        import transformers

        for prefix, stats in {"DeformableDetr": IMAGENET, "RTDetr": UNIT, "RfDetr": IMAGENET}.items():
            processor = getattr(transformers, f"{prefix}ImageProcessor")()
            image = torch.full((3, 64, 64), 200, dtype=torch.uint8)
            pixels = processor(image, return_tensors="pt")["pixel_values"][0, :, 10, 10]
            torch.testing.assert_close(pixels, (200 - torch.tensor(stats.mean)) / torch.tensor(stats.std), atol=1e-3, rtol=0)


class TestBadInput:
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (nn.Linear(1, 1), "model must be one of transformers' DeformableDetrForObjectDetection, .* got Linear"),
            ("grounding_dino", "got GroundingDinoForObjectDetection"),
        ],
    )
    def test_model(self, model: Any, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            from_transformers(BUILD[model]() if isinstance(model, str) else model)

    def test_num_classes(self) -> None:
        with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
            from_transformers(build("rt_detr"), 0)

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing() -> None:
            raise ImportError("transformers cannot be imported")

        monkeypatch.setattr("ssod_fast.dropin.transformers.models.check_version", missing)
        for call in (lambda: from_transformers(nn.Linear(1, 1)), lambda: build_detector("hf:rt_detr", 3)):
            with pytest.raises(ImportError, match=r"pip install 'ssod_fast\[hf\]'"):
                call()

    def test_arguments(self) -> None:
        detector = make("rt_detr")
        with pytest.raises(ValueError, match="expected 2, got 1"):
            detector.losses(PAIR, TARGETS[:1])
        with pytest.raises(ValueError, match=r"labels'\] must lie in 0\.\.2"):
            detector.losses(PAIR, [boxes_of([1, 1, 9, 9], label=3), NOTHING])
        with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
            detector.predict(PAIR, topk=0)
        with pytest.raises(ValueError, match=r"score_thr must lie in 0\.\.1, got 2"):
            detector.predict(PAIR, score_thr=2)

    @pytest.mark.parametrize("name", [*UNMASKED, "rf_detr"])
    def test_small_images(self, name: str) -> None:
        detector = from_transformers(build(name, num_queries=40) if name in UNMASKED else build(name))
        small = batch_of((16, 16), (16, 16), canvas=(32, 32) if name in UNMASKED else (16, 16))
        with pytest.raises(ValueError, match=r"images must be larger: \d+ x \d+ pixels have fewer places"):
            detector.predict(small)
