"""The training step of MixPL: losses, gates, gradients, state."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_detector import TinyDetector, make_batches
from torch import Tensor, nn

from ssod_fast.data.batches import UnlabeledBatch
from ssod_fast.methods import MixPL, MixPLConfig, Preview, SemiSupervisedDetector, StepOutput
from ssod_fast.methods.mixpl.pseudo import above_threshold, open_gate, project_predictions
from ssod_fast.structures import PaddedTargets, Target

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


class TestLosses:
    def test_keys_and_finite_values_while_the_cache_fills(self) -> None:
        outputs = run(make_model(), range(4))
        expected = {"sup/loss_cls", "sup/loss_box", "mixup/loss_cls", "mixup/loss_box"}
        mosaic = {"mosaic/loss_cls", "mosaic/loss_box"}
        assert [set(out.losses) for out in outputs] == [expected, expected, expected | mosaic, expected | mosaic]
        for out in outputs:
            assert all(torch.isfinite(term) and not term.requires_grad for term in out.losses.values())
            torch.testing.assert_close(out.loss.detach(), torch.stack(list(out.losses.values())).sum())

    def test_prefix_without_mixup_and_no_mosaic(self) -> None:
        out = run(make_model(mixup=False, mosaics_per_step=0), range(3))[-1]
        assert {key.split("/")[0] for key in out.losses} == {"sup", "unsup"}

    def test_weights(self) -> None:
        plain, double = make_model(erase_patches=None), make_model(erase_patches=None, sup_weight=3.0, unsup_weight=4.0, mosaic_weight=0.25)
        a, b = run(plain, range(3), lr=0.0)[-1].losses, run(double, range(3), lr=0.0)[-1].losses
        for prefix, factor in (("sup", 3.0), ("mixup", 2.0), ("mosaic", 1.0)):
            torch.testing.assert_close(b[f"{prefix}/loss_cls"], factor * a[f"{prefix}/loss_cls"])
        assert a["mixup/loss_cls"] > 0

    def test_teacher_gets_no_gradient_and_only_ema_changes_it(self) -> None:
        model = make_model()
        before = {key: value.clone() for key, value in model.teacher.state_dict().items()}
        for step in range(3):
            model.training_step(*make_batches(step), step).loss.backward()
        assert all(p.grad is None for p in model.teacher.parameters())
        assert all(torch.equal(value, before[key]) for key, value in model.teacher.state_dict().items())
        assert not model.teacher.training
        assert any(p.grad is not None for p in model.student.parameters())

    def test_no_pseudo_label_at_all(self) -> None:
        model = make_model(says([0, 0, 0, 0]))
        for out in run(model, range(4)):
            assert torch.isfinite(out.loss)
            assert out.stats is not None
            assert out.stats.raw_count.tolist() == [0] * 4
            assert out.stats.max_score.tolist() == [0] * 4
            assert out.stats.mean_score == 0
            assert out.stats.extra["gate"] == 0
            assert all(value == 0 for key, value in out.losses.items() if not key.startswith("sup"))

    def test_losses_in_float32_under_autocast(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = make_model().training_step(*make_batches(0), 0)
        assert out.loss.dtype == torch.float32
        assert all(term.dtype == torch.float32 for term in out.losses.values())

    def test_a_student_without_losses_is_named(self) -> None:
        model = make_model()
        model.run_student = lambda images, targets: {}
        with pytest.raises(ValueError, match="returned no losses for the branch 'sup'"):
            model.training_step(*make_batches(0), 0)

    def test_float_images(self) -> None:
        model = make_model()
        for step in range(3):
            out = model.training_step(*make_batches(step, dtype=torch.float32), step)
        bytes_model = make_model()
        for step in range(3):
            expected = bytes_model.training_step(*make_batches(step), step)
        assert torch.equal(out.loss, expected.loss)


class TestGate:
    @pytest.mark.parametrize(
        ("counts", "rule", "gate"),
        [
            ([3, 0, 5, 2], "batch_min", 0),
            ([1, 1, 5, 2], "batch_min", 1),
            ([0, 0, 1, 0], "sum", 1),
            ([0, 0, 0, 0], "sum", 0),
            ([0, 2], "per_image", 1),
        ],
    )
    def test_rules(self, counts: list[int], rule: str, gate: float) -> None:
        assert open_gate(torch.tensor(counts, dtype=torch.int32), rule, 1).item() == gate

    def test_least_num(self) -> None:
        assert open_gate(torch.tensor([3, 2]), "batch_min", 3) == 0
        assert open_gate(torch.tensor([3, 3]), "batch_min", 3) == 1

    def test_a_score_equal_to_the_threshold_is_dropped(self) -> None:
        target = Target(
            boxes=torch.tensor([BOX] * 3), labels=torch.zeros(3, dtype=torch.int64), scores=torch.tensor([0.7, 0.7000001, 0.69])
        )
        assert above_threshold(PaddedTargets.from_list([target]), 0.7).count.tolist() == [1]

    @pytest.mark.parametrize(("counts", "expected"), [([3, 0, 5, 2], 0.0), ([1, 1, 5, 2], 2.0)])
    def test_one_image_without_boxes_shuts_the_batch(self, counts: list[int], expected: float) -> None:
        model = make_model(says(counts), erase_patches=None)
        seen: list[Tensor] = []
        model.run_student = lambda images, targets: {"loss": seen.append(images) or model.student.classify.bias.sum() * 0 + 1}  # type: ignore[func-returns-value]
        out = model.training_step(*make_batches(0), 0)
        assert out.losses["mixup/loss"].item() == expected
        assert len(seen) == 2  # the shut branch ran all the same

    def test_mosaic_counts_once(self) -> None:
        model = make_model(says([1, 1, 1, 1]), erase_patches=None)
        model.run_student = lambda images, targets: {"loss": model.student.classify.bias.sum() * 0 + 1}
        outputs = run(model, range(3))
        assert outputs[2].losses["mosaic/loss"].item() == 1.0
        assert outputs[2].losses["mixup/loss"].item() == 2.0

    def test_per_image_drops_the_images_below(self) -> None:
        model = make_model(says([3, 0, 5, 2]), erase_patches=None, gate="per_image")
        sizes: list[int] = []

        def student(images: Any, targets: Any) -> dict[str, Tensor]:
            sizes.append(len(images))
            return model.student.losses(images, targets)

        model.run_student = student
        out = model.training_step(*make_batches(0), 0)
        assert sizes == [2, 3]
        assert out.losses["mixup/loss_cls"] > 0

    def test_per_image_without_any_box_keeps_a_shut_batch(self) -> None:
        out = make_model(says([0, 0, 0, 0]), gate="per_image").training_step(*make_batches(0), 0)
        assert out.losses["mixup/loss_cls"] == 0

    def test_skip_closed_gate(self) -> None:
        out = make_model(says([0, 1, 1, 1]), skip_closed_gate=True).training_step(*make_batches(0), 0)
        assert {key.split("/")[0] for key in out.losses} == {"sup"}
        out = make_model(says([1, 1, 1, 1]), skip_closed_gate=True, erase_patches=None).training_step(*make_batches(0), 0)
        assert {key.split("/")[0] for key in out.losses} == {"sup", "mixup"}

    def test_thresholds_are_compared_in_float32(self) -> None:
        # 0.7 in bfloat16 is 0.69921875, which is below a threshold of 0.7 and would equal it after rounding the threshold too.
        target = Target(
            boxes=torch.tensor([BOX]), labels=torch.zeros(1, dtype=torch.int64), scores=torch.tensor([0.7], dtype=torch.bfloat16)
        )
        padded = PaddedTargets.from_list([target])
        assert padded.scores.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert above_threshold(padded, 0.7).count == 0
            assert above_threshold(padded, 0.699).count == 1


class Driver:
    """Runs backward in every branch and notes the order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @contextlib.contextmanager
    def branch(self, last: bool) -> Iterator[None]:
        self.events.append(f"last={last}")
        yield

    def backward(self, loss: Tensor) -> None:
        self.events.append("backward")
        loss.backward()


class TestBackward:
    def test_gradients_of_branches_equal_those_of_the_joint_loss(self) -> None:
        joint, branched = make_model(), make_model()
        driver = Driver()
        for step in range(3):
            joint.student.zero_grad()
            branched.student.zero_grad()
            joint.training_step(*make_batches(step), step).loss.backward()
            driver.events.clear()
            out = branched.training_step(*make_batches(step), step, driver)
            assert not out.loss.requires_grad
        assert driver.events == ["last=False", "backward", "last=False", "backward", "last=True", "backward"]
        for a, b in zip(joint.student.parameters(), branched.student.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)

    def test_last_branch_while_the_cache_fills(self) -> None:
        driver = Driver()
        make_model().training_step(*make_batches(0), 0, driver)
        assert driver.events == ["last=False", "backward", "last=True", "backward"]

    def test_run_student_is_not_registered_twice(self) -> None:
        model = make_model()
        keys = set(model.state_dict())
        model.run_student = model.student  # as a DDP wrapper would be put there
        assert set(model.state_dict()) == keys
        model.training_step(*make_batches(0), 0).loss.backward()


class TestBurnIn:
    def test_supervised_only_then_mixpl(self) -> None:
        model = make_model(burn_in=2)
        outputs = run(model, range(3))
        assert [sorted({k.split("/")[0] for k in out.losses}) for out in outputs] == [["sup"], ["sup"], ["mixup", "sup"]]
        assert outputs[0].stats is None

    def test_driver_is_told_that_the_supervised_loss_is_the_last(self) -> None:
        driver = Driver()
        make_model(burn_in=1).training_step(make_batches(0)[0], None, 0, driver)  # unlabelled images are not needed yet
        assert driver.events == ["last=True", "backward"]

    def test_teacher_becomes_the_student_at_the_end(self) -> None:
        model = make_model(burn_in=2)
        run(model, range(2), lr=0.1)
        for a, b in zip(model.student.parameters(), model.teacher.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_ramp(self) -> None:
        model = make_model(says([1, 1, 1, 1]), burn_in=1, ramp=4, erase_patches=None, mosaics_per_step=0)
        model.run_student = lambda images, targets: {"loss": model.student.classify.bias.sum() * 0 + 1}
        values = [model.training_step(*make_batches(s), s).losses.get("mixup/loss") for s in range(7)]
        assert [v if v is None else v.item() for v in values] == [None, 0, 0.5, 1, 1.5, 2, 2]


class TestPseudoBoxes:
    def test_frames(self) -> None:
        """The weak view is half the original, the strong one its mirror image."""
        _, batch = make_batches(0, unlabeled=1)
        half = torch.tensor([[[0.5, 0, 0], [0, 0.5, 0], [0, 0, 1]]], dtype=torch.float64)
        batch = UnlabeledBatch(batch.weak, batch.strong, half, batch.strong_matrix, batch.original_hw, batch.image_ids)
        boxes = Target(boxes=torch.tensor([[5.0, 4, 15, 20]]), labels=torch.tensor([1]), scores=torch.tensor([0.4]))
        pseudo = project_predictions([boxes], batch, rows=4, min_wh=1e-2)
        assert pseudo.original.boxes[0, 0].tolist() == [10, 8, 30, 40]
        assert pseudo.strong.boxes[0, 0].tolist() == [50, 8, 70, 40]
        assert pseudo.strong.nmax == 4

    def test_non_finite_predictions_are_dropped_and_counted(self) -> None:
        nan, inf = float("nan"), float("inf")
        rows = [(BOX, 0.9), ([nan, 0, 5, 5], 0.9), (BOX, nan), ([0, 0, inf, 5], 0.8), ([12.0, 12, 40, 30], 0.3)]
        out = make_model(Says(lambda call, image: rows)).training_step(*make_batches(0), 0)
        assert out.stats is not None
        assert out.stats.non_finite == 12
        assert out.stats.raw_count.tolist() == [2] * 4
        assert torch.isfinite(out.loss)

    def test_stats(self) -> None:
        rows = [(BOX, 0.9), ([0.0, 0, 20, 20], 0.3), ([0.0, 0, 9, 9], 0.05)]
        model = make_model(Says(lambda call, image: rows[: image + 1] if image < 3 else []), cls_pseudo_thr=0.2)
        stats = model.training_step(*make_batches(3), 0).stats
        assert stats is not None
        assert stats.raw_count.tolist() == [1, 2, 3, 0]
        assert stats.kept_count.tolist() == [1, 2, 2, 0]
        assert stats.max_score.tolist() == pytest.approx([0.9, 0.9, 0.9, 0])
        assert stats.mean_score.item() == pytest.approx((0.9 * 3 + 0.3 * 2 + 0.05) / 6)
        assert stats.extra == {"gate": 0}
        assert stats.image_ids == [300, 301, 302, 303]
        assert stats.score_thr == 0.2
        assert stats.pseudo.boxes[2, :3].tolist() == [box for box, _ in rows]  # the original image is the weak view here

    def test_cached_boxes_are_those_of_their_own_step_unfiltered(self) -> None:
        # Every call says another number of boxes with scores below the threshold: none may be lost on the way into the cache.
        model = make_model(Says(lambda call, image: [(BOX, 0.01 * (call + 1))] * (call + 1)), cls_pseudo_thr=0.5, erase_patches=None)
        for step in range(4):
            model.training_step(*make_batches(step), step)
        targets = model.method.cache.read()[1]  # type: ignore[attr-defined]
        assert targets.count.tolist() == [3] * 4 + [4] * 4
        assert targets.scores[0, 0].item() == pytest.approx(0.03)

    def test_singular_homography_names_the_image(self) -> None:
        labeled, batch = make_batches(0)
        batch.weak_matrix[2] = 0
        with pytest.raises(ValueError, match="homography of image 2 must be invertible"):
            make_model().training_step(labeled, batch, 0)


class TestPreview:
    def test_only_when_asked(self) -> None:
        model = make_model()
        for step in range(2):
            assert model.training_step(*make_batches(step), step).previews == ()
        previews = model.training_step(*make_batches(2), 2, want_preview=True).previews
        assert [p.kind for p in previews] == ["mixup", "mosaic"]
        assert [len(p.images) for p in previews] == [4, 1]
        assert [len(p.targets) for p in previews] == [4, 1]


class TestSwitches:
    """Each option changes what the student sees."""

    @staticmethod
    def last_previews(student: nn.Module, **options: Any) -> tuple[Preview, ...]:
        """Inputs of the third step, the first that mixes."""
        model = make_model(student, **{"mosaic_shape": ((52, 52), (53, 53)), "erase_patches": None, **options})
        for step in range(3):
            out = model.training_step(*make_batches(step), step, want_preview=True)
        return out.previews

    def test_interp(self) -> None:
        # Tiles of the mosaic are shrunk; the mixup's partners keep their size, in which both samplers agree.
        nearest, bilinear = (self.last_previews(says([1, 1, 1, 1]), interp=interp) for interp in ("nearest", "bilinear"))
        assert [p.kind for p in nearest] == ["mixup", "mosaic"]
        assert not torch.allclose(nearest[1].images.tensor, bilinear[1].images.tensor, atol=0.01)
        for a, b in zip(nearest, bilinear, strict=True):
            assert a.images.sizes == b.images.sizes
            assert torch.equal(a.targets.boxes, b.targets.boxes)

    @pytest.mark.parametrize(("overlap", "left"), [("sum", 0), ("union", 8)])
    def test_erase_overlap(self, overlap: str, left: int) -> None:
        # 15 patches of 90 % of the sides cover the box many times over; of a union no more than all of it is erased.
        options = {"erase_overlap": overlap, "erase_thr": 1.5, "erase_patches": (15, 16), "erase_ratio": (0.9, 0.9)}
        assert self.last_previews(says([1, 1, 1, 1]), **options)[0].targets.count.sum() == left

    @pytest.mark.parametrize(("smallest", "left"), [(1e-2, 4), (1.0, 0)])
    def test_small_pseudo_boxes(self, smallest: float, left: int) -> None:
        thin = Says(lambda call, image: [([10.0, 10.0, 10.5, 40.0], 0.9)])
        model = make_model(thin, min_pseudo_bbox_wh=smallest, erase_patches=None)
        (preview,) = model.training_step(*make_batches(0), 0, want_preview=True).previews
        assert preview.targets.count.sum() == left

    @pytest.mark.parametrize(("resize", "height"), [("scale_factor", 30 * 0.65), ("size", 30 * 42 / 64)])
    def test_resize(self, resize: str, height: float) -> None:
        # 64 x 80 into 52 x 52: 41 x 52 of one scale, or 42 x 52 of two.
        boxes = self.last_previews(says([1, 1, 1, 1]), resize=resize)[1].targets.boxes[0]
        assert (boxes[:, 3] - boxes[:, 1]).tolist() == pytest.approx([height] * 4)

    @pytest.mark.parametrize(("flip", "lefts"), [("always", {10}), ("random", {10, 30})])
    def test_cache_flip(self, flip: str, lefts: set[int]) -> None:
        # The strong view is a mirror image of 80 pixels, in which the box starts at 30; mirrored again it starts at 10.
        seen: set[float] = set()
        for seed in range(3):
            partners = self.last_previews(says([1, 1, 1, 1]), cache_flip=flip, seed=seed)[0].targets.boxes[:, 1]
            seen |= set(partners[:, 0].tolist())
        assert seen == lefts

    @pytest.mark.parametrize(("least", "gate"), [(1, 1), (2, 0)])
    def test_least_num(self, least: int, gate: int) -> None:
        stats = make_model(says([1, 1, 1, 1]), least_num=least, erase_patches=None).training_step(*make_batches(0), 0).stats
        assert stats is not None
        assert stats.extra["gate"] == gate

    def test_the_teacher_is_asked_with_its_settings(self) -> None:
        model = make_model(teacher_score_thr=0.2, teacher_topk=7)
        asked, predict = [], model.teacher.predict
        model.teacher.predict = lambda images, *settings: asked.append(settings) or predict(images, *settings)
        model.training_step(*make_batches(0), 0)
        assert asked == [(0.2, 7)]

    def test_boxes_that_a_resize_made_thin_stay(self) -> None:
        thin = Says(lambda call, image: [([10.0, 10.0, 10.5, 40.0], 0.9)])
        mosaic = self.last_previews(thin)[1].targets
        assert mosaic.count.tolist() == [4]
        assert (mosaic.boxes[0, :, 2] - mosaic.boxes[0, :, 0] < 0.5).all()


class TestState:
    @pytest.mark.parametrize("split", [1, 2, 4])
    @pytest.mark.parametrize("rng", ["philox", "numpy_legacy"])
    def test_saving_and_loading_changes_nothing(self, split: int, rng: str) -> None:
        whole, first, second = make_model(rng=rng), make_model(rng=rng), make_model(TinyDetector(seed=5), rng=rng, seed=9)
        expected = [out.loss for out in run(whole, range(6), lr=0.01)]
        run(first, range(split), lr=0.01)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        rest = [out.loss for out in run(second, range(split, 6), lr=0.01)]
        assert [a.item() for a in rest] == [a.item() for a in expected[split:]]
        for key, value in whole.state_dict().items():
            if isinstance(value, Tensor):
                assert torch.equal(value, second.state_dict()[key]), key

    def test_a_lower_threshold_after_loading_loses_no_box(self) -> None:
        # The images after loading have fewer boxes than those in the cache, which counted as without any before.
        strict = make_model(says([3, 3, 3, 3], score=0.5), cls_pseudo_thr=0.9, erase_patches=None)
        loose = make_model(says([1, 1, 1, 1], score=0.5), cls_pseudo_thr=0.2, erase_patches=None)
        run(strict, range(3))
        loose.load_state_dict(strict.state_dict())
        previews = loose.training_step(*make_batches(3), 3, want_preview=True).previews
        assert [p.targets.count.tolist() for p in previews] == [[4] * 4, [12]]
        assert all(p.targets.nmax >= p.targets.count.max() for p in previews)

    def test_same_seed_same_run_other_rank_other_mixes(self) -> None:
        losses = []
        for rank in (0, 0, 1):
            model = SemiSupervisedDetector(TinyDetector(), MixPL(MixPLConfig(**SMALL), rank=rank))
            losses.append([out.loss.item() for out in run(model, range(3))])
        assert losses[0] == losses[1]
        assert losses[0] != losses[2]

    def test_fewer_images_in_a_step(self) -> None:
        model = make_model()
        for step, n in enumerate([4, 2, 3, 4, 1, 4]):
            out = model.training_step(*make_batches(step, unlabeled=n), step)
            assert torch.isfinite(out.loss)
        assert "mosaic/loss_cls" in out.losses


class TestConstruction:
    def test_defaults(self) -> None:
        model = SemiSupervisedDetector(TinyDetector(), num_classes=2)
        assert isinstance(model.method, MixPL)
        assert model.ema is not None
        assert (model.ema.config.schedule, model.ema.config.interval) == ("mmdet", 3)

    def test_something_that_is_no_detector(self) -> None:
        with pytest.raises(TypeError, match=r"mixpl needs a detector .* got Linear without losses, predict"):
            SemiSupervisedDetector(nn.Linear(2, 2), MixPL())

    def test_unlabeled_images_are_needed(self) -> None:
        with pytest.raises(ValueError, match="unlabeled must be a batch of weak and strong views"):
            make_model().training_step(make_batches(0)[0], None, 0)

    def test_more_images_than_the_config_says(self) -> None:
        with pytest.raises(ValueError, match="images must be 1 to 4 per step, got 5"):
            make_model().training_step(*make_batches(0, unlabeled=5), 0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"cache_size": 7}, r"cache_size must be at least unlabeled_batch \+ 4 = 8, got 7"),
            ({"unlabeled_batch": 0}, "unlabeled_batch must be at least 1"),
            ({"gate": "mean"}, "gate must be one of batch_min, sum, per_image, got 'mean'"),
            ({"interp": "cubic"}, "interp must be one of nearest, bilinear"),
            ({"cls_pseudo_thr": 1.2}, "cls_pseudo_thr is compared with scores"),
            ({"cls_pseudo_thr": float("nan")}, "cls_pseudo_thr must be at least 0"),
            ({"least_num": 0}, "least_num must be at least 1"),
            ({"erase_patches": (5, 5)}, "erase_patches must satisfy 1 <= low < high"),
            ({"erase_ratio": (0.0, 1.0)}, "erase_ratio must stay below 1"),
            ({"erase_thr": float("nan")}, "erase_thr must be positive, got nan"),
            ({"unsup_weight": -1}, "unsup_weight must be at least 0"),
            ({"burn_in": -1}, "burn_in must be at least 0"),
            ({"mosaic_shape": (60, 60, 120, 120)}, r"mosaic_shape must be two sizes .*, got \(60, 60, 120, 120\)"),
            ({"mosaic_shape": (60, 120)}, r"mosaic_shape\[0\] must be two positive integers \(height, width\), got 60"),
            ({"erase_ratio": 0.1}, "erase_ratio must be two increasing numbers .*, got 0.1"),
            ({"erase_patches": 20}, "erase_patches must satisfy 1 <= low < high, got 20"),
        ],
    )
    def test_bad_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            MixPLConfig(**options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"cls_pseudo_thr": "a"}, "cls_pseudo_thr must be a number, got 'a'"),
            ({"erase_thr": None}, "erase_thr must be a number, got None"),
            ({"burn_in": 0.5}, "burn_in must be an integer, got 0.5"),
            ({"cache_size": "8"}, "cache_size must be an integer, got '8'"),
        ],
    )
    def test_options_of_a_wrong_type(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(TypeError, match=message):
            MixPLConfig(**options)

    def test_cache_length(self) -> None:
        assert MixPLConfig(unlabeled_batch=6).cache_length == 10
        assert MixPLConfig().cache_length == 8
