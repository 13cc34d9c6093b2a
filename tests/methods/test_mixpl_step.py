"""The training step of MixPL: losses, gates, gradients, pseudo boxes, previews."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mixpl_cases import BOX, Says, make_model, run, says
from tiny_detector import make_batches
from torch import Tensor

from ssod_fast.data.batches import UnlabeledBatch
from ssod_fast.methods.mixpl.pseudo import above_threshold, open_gate, project_predictions
from ssod_fast.structures import PaddedTargets, Target


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
