"""The training step of Semi-DETR: losses, state, options, and inputs that are odd or wrong."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from semi_detr_models import gradients, make_detector, make_model, make_views
from tiny_detector import TinyDetector
from torch import Tensor

from ssod_fast.data.batches import LabeledBatch, UnlabeledBatch
from ssod_fast.methods import METHODS, SemiDETR, SemiDETRConfig, SemiSupervisedDetector
from ssod_fast.methods.semi_detr import branches
from ssod_fast.methods.semi_detr.draws import Draws

STAGE1, STAGE2 = 3, 12  # iterations on both sides of switch_at = 10
LOSSES = {"loss_cls", "loss_l1", "loss_giou"}
ENCODER, DENOISING = ({f"{prefix}_{name}" for name in LOSSES} for prefix in ("enc", "dn"))


def keys(prefix: str, *groups: set[str]) -> set[str]:
    return {f"{prefix}/{name}" for group in groups for name in group}


def float_model(family: str = "dino", **options: Any) -> SemiSupervisedDetector:
    return make_model(family, dtype=torch.float32, **options)


class TestLosses:
    @pytest.mark.parametrize(
        ("family", "step", "expected"),
        [
            ("dino", STAGE1, keys("sup", LOSSES, ENCODER, DENOISING) | keys("unsup", LOSSES, ENCODER, {"loss_consistency"})),
            ("dino", STAGE2, keys("sup", LOSSES, ENCODER, DENOISING) | keys("unsup", LOSSES, ENCODER, DENOISING)),
            ("deformable_detr", STAGE1, keys("sup", LOSSES, ENCODER) | keys("unsup", LOSSES, ENCODER, {"loss_consistency"})),
            ("deformable_detr", STAGE2, keys("sup", LOSSES, ENCODER) | keys("unsup", LOSSES, ENCODER)),
        ],
    )
    def test_keys_and_finite_values(self, family: str, step: int, expected: set[str]) -> None:
        model = float_model(family)
        out = model.training_step(*make_views(step), step)
        assert set(out.losses) == expected
        assert all(torch.isfinite(term) and not term.requires_grad for term in out.losses.values())
        torch.testing.assert_close(out.loss.detach(), torch.stack(list(out.losses.values())).sum())
        out.loss.backward()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())

    @pytest.mark.parametrize("options", [{}, {"denoising": 0}], ids=str)
    def test_all_parameters_of_the_student_learn_from_labelled_images(self, options: dict[str, Any]) -> None:
        """DDP reduces gradients after the last branch, which therefore has to touch them all."""
        model = float_model(**options)
        model.method.supervised(_book := _Book(), model, model.method.losses(0, 0), make_views(0)[0], None)  # type: ignore[attr-defined]
        _book.loss.backward()
        assert [name for name, p in model.student.named_parameters() if p.requires_grad and p.grad is None] == []
        assert _book.last == [True]

    def test_the_unlabelled_branch_runs_first(self) -> None:
        model, order = float_model(), []
        driver = _Driver(order)
        out = model.training_step(*make_views(STAGE1), STAGE1, driver)
        assert order == [False, True]
        assert not out.loss.requires_grad
        assert next(iter(out.losses)).startswith("unsup")

    def test_weights(self) -> None:
        views = make_views(STAGE1)
        a = float_model(denoising=0).training_step(*views, STAGE1).losses
        b = float_model(denoising=0, sup_weight=3.0, unsup_weight=2.0, consistency_weight=5.0).training_step(*views, STAGE1).losses
        torch.testing.assert_close(b["sup/loss_cls"], 3 * a["sup/loss_cls"])
        torch.testing.assert_close(b["unsup/loss_l1"], a["unsup/loss_l1"] / 2)
        torch.testing.assert_close(b["unsup/loss_consistency"], a["unsup/loss_consistency"] / 4)
        assert a["unsup/loss_consistency"] > 0
        assert not any("dn_" in name for name in a)

    def test_only_the_average_changes_the_teacher(self) -> None:
        model = float_model()
        before = {name: p.clone() for name, p in model.teacher.named_parameters()}
        for step in (STAGE1, STAGE2):
            model.training_step(*make_views(step), step).loss.backward()
        assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.teacher.named_parameters())
        assert not model.teacher.training

    def test_statistics_and_preview(self) -> None:
        model = float_model()
        labeled, unlabeled = make_views(STAGE1)
        out = model.training_step(labeled, unlabeled, STAGE1, want_preview=True)
        stats = out.stats
        assert stats is not None
        always = {"reliable_per_image", "truncated_images"}
        assert stats.score_thr == 0.95
        assert stats.image_ids == unlabeled.image_ids
        assert (stats.raw_count >= stats.pseudo.count).all()
        assert (stats.pseudo.count >= stats.kept_count).all()
        assert stats.kept_count.min() > 0
        assert set(stats.extra) == always | {"mined_per_image", "cost_thr", "mixture_converged"}
        right = stats.pseudo.boxes[..., 2].amax()
        assert 80 < right <= 160  # in pixels of the original, which is twice as large as the weak view
        (preview,) = out.previews
        assert preview.kind == "unsup"
        assert torch.equal(preview.targets.count, stats.kept_count)
        assert preview.images.sizes == [(64, 80), (56, 64)]
        later = model.training_step(labeled, unlabeled, STAGE2)
        assert later.stats is not None
        assert set(later.stats.extra) == always
        assert later.previews == ()

    def test_bfloat16(self) -> None:
        model = float_model()
        for step in (STAGE1, STAGE2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model.training_step(*make_views(step), step)
            assert all(torch.isfinite(term) and term.dtype == torch.float32 for term in out.losses.values())
            out.loss.backward()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())


class _Book:
    """A loss book that keeps the graph."""

    def __init__(self) -> None:
        self.last: list[bool] = []

    def run(self, prefix: str, forward: Any, *, weight: float, last: bool) -> None:
        self.loss = torch.stack(list(forward().values())).sum()
        self.last.append(last)


class _Driver:
    def __init__(self, order: list[bool]) -> None:
        self.order = order

    def branch(self, last: bool) -> Any:
        self.order.append(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


class TestDenoising:
    def test_noise_is_that_of_the_method(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And not that of the detector, which trains itself otherwise."""
        model = float_model(denoising=4, label_noise=0.3, box_noise=0.2)
        assert (model.student.config.denoising, model.student.config.box_noise) == (6, 1.0)
        given, make = [], branches.make_denoising
        monkeypatch.setattr(branches, "make_denoising", lambda *args, **kwargs: given.append(kwargs) or make(*args, **kwargs))
        model.training_step(*make_views(STAGE2), STAGE2)
        assert len(given) == 2
        for options in given:
            assert (options["number"], options["label_noise"], options["box_noise"]) == (4, 0.3, 0.2)

    def test_defaults_are_the_released_ones(self) -> None:
        config = SemiDETRConfig()
        assert (config.denoising, config.label_noise, config.box_noise) == (100, 0.5, 0.4)
        assert (config.cls_weight, config.l1_weight, config.giou_weight, config.unsup_weight) == (2.0, 10.0, 2.0, 4.0)
        assert (config.teacher_score_thr, config.teacher_nms_thr, config.teacher_topk, config.cls_pseudo_thr) == (0.01, 0.6, 300, 0.4)
        assert (config.o2m_topk, config.o2m_alpha, config.o2m_beta) == (13, 1.0, 6.0)
        assert (config.consistency_weight, config.consistency_reduction, config.consistency_stages) == (10.0, "mean_product", (1,))
        assert (config.content, config.mask_group_padding, config.pseudo_denoising_stages) == ("teacher", False, (2,))


class TestDraws:
    def test_depend_on_everything_they_are_for(self) -> None:
        def draw(*key: int, purpose: Any = "labeled") -> float:
            return float(torch.rand((), generator=Draws(*key).generator(purpose, torch.device("cpu"))))

        assert draw(0, 0, 5) == draw(0, 0, 5, 0)
        others = [draw(0, 0, 5), draw(1, 0, 5), draw(0, 1, 5), draw(0, 0, 6), draw(0, 0, 5, 1), draw(0, 0, 5, purpose="pseudo")]
        assert len(set(others)) == len(others)

    def test_the_default_generator_is_left_alone(self) -> None:
        model = float_model()
        before = torch.random.get_rng_state()
        model.training_step(*make_views(STAGE2), STAGE2)
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_accumulated_steps_draw_anew_and_iterations_start_over(self) -> None:
        model, views = float_model(), make_views(STAGE2)
        losses = [float(model.training_step(*views, step).losses["sup/dn_loss_l1"]) for step in (12, 12, 13, 12)]
        assert losses[0] != losses[1]
        assert losses[0] != losses[2]
        assert losses[0] == losses[3]

    def test_the_projectors_weights_follow_from_the_seed(self) -> None:
        first, second, third = (float_model(seed=seed).trainable.state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))
        assert not torch.equal(first["projector.linears.0.weight"], third["projector.linears.0.weight"])


class TestEdgeCases:
    @pytest.mark.parametrize("family", ["dino", "deformable_detr"])
    @pytest.mark.parametrize("step", [STAGE1, STAGE2])
    def test_no_pseudo_box_anywhere(self, family: str, step: int) -> None:
        model = float_model(family, teacher_score_thr=1.0)
        out = model.training_step(*make_views(step), step)
        assert out.stats is not None
        assert out.stats.raw_count.tolist() == [0, 0]
        assert out.stats.max_score.tolist() == [0, 0]
        assert out.losses.get("unsup/loss_consistency", torch.zeros(())) == 0
        assert out.losses["unsup/loss_l1"] == 0
        assert out.losses["unsup/loss_cls"] > 0  # every query is background
        out.loss.backward()
        found = gradients(model)
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert found["network.decoder.heads.classes.0.weight"].abs().sum() > 0

    def test_no_labelled_box(self) -> None:
        model = float_model()
        labeled, unlabeled = make_views(STAGE1)
        nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in labeled.targets]
        for step in (STAGE1, STAGE2):
            out = model.training_step(LabeledBatch(labeled.images, nothing), unlabeled, step)  # type: ignore[arg-type]
            assert out.losses["sup/loss_l1"] == 0
            assert out.losses["sup/dn_loss_cls"] == 0
            assert torch.isfinite(out.loss)

    def test_boxes_pushed_out_of_the_strong_view(self) -> None:
        model = float_model()
        labeled, views = make_views(STAGE1)
        far = views.strong_matrix.clone()
        far[:, 0, 2] += 500  # everything is clipped to the right border
        moved = dataclasses.replace(views, strong_matrix=far)
        for drop in (True, False):
            model = float_model(drop_degenerate=drop)
            for step in (STAGE1, STAGE2):
                out = model.training_step(labeled, moved, step)
                assert out.stats is not None
                assert (out.stats.kept_count.sum() == 0) == drop
                assert torch.isfinite(out.loss)
                out.loss.backward()
            assert all(gradient.isfinite().all() for gradient in gradients(model).values())

    def test_non_finite_detections_are_dropped_and_counted(self) -> None:
        model = float_model()
        with torch.no_grad():
            model.teacher.network.queries.content.weight[0] = float("nan")
            # A query that is not finite would spread through self-attention: let nobody listen.
            for layer in model.teacher.network.decoder.layers:
                layer.self_attention.out_proj.weight.zero_()
                layer.self_attention.v_proj.weight.zero_()
        out = model.training_step(*make_views(STAGE2), STAGE2)
        assert out.stats is not None
        assert out.stats.non_finite > 0
        assert out.stats.pseudo.boxes.isfinite().all()
        assert torch.isfinite(out.loss)

    @pytest.mark.parametrize("step", [STAGE1, STAGE2])
    @pytest.mark.parametrize(
        ("head", "named"),
        [
            ("decoder.heads.classes.1", "^logits of the student's decoder"),
            ("queries.classes", "^logits of the student's encoder"),
            ("queries.boxes.layers.2", "boxes of the student's decoder and boxes of the student's encoder"),
        ],
    )
    def test_a_student_that_is_not_finite_is_named(self, head: str, named: str, step: int) -> None:
        model = float_model()
        with torch.no_grad():
            model.student.network.get_submodule(head).bias[0] = float("nan")
        with pytest.raises(FloatingPointError, match=f"{named} on unlabelled images must be finite, got NaN or infinity"):
            model.training_step(*make_views(step), step)

    @pytest.mark.parametrize("unlabeled", [None, "empty"])
    def test_without_unlabelled_images(self, unlabeled: Any) -> None:
        model = float_model()
        labeled, views = make_views(STAGE1)
        empty = UnlabeledBatch([], [], torch.zeros(0, 3, 3), torch.zeros(0, 3, 3), [], []) if unlabeled else None
        out = model.training_step(labeled, empty, STAGE1)
        assert set(out.losses) == keys("sup", LOSSES, ENCODER, DENOISING)
        assert out.stats is None
        expected = model.training_step(labeled, views, STAGE1).losses
        assert all(torch.equal(term, expected[name]) for name, term in out.losses.items() if "dn_" not in name)

    def test_without_labelled_images(self) -> None:
        model = float_model()
        _, unlabeled = make_views(STAGE1)
        out = model.training_step(LabeledBatch([], []), unlabeled, STAGE1)
        assert out.losses["sup/loss_none"] == 0
        assert out.losses["unsup/loss_cls"] > 0
        out.loss.backward()
        assert all(p.grad is not None for p in model.student.parameters() if p.requires_grad)

    def test_sizes_of_batches_may_vary(self) -> None:
        model = float_model(unlabeled_batch=2)
        for step, number in ((STAGE1, 1), (STAGE2, 3)):
            out = model.training_step(*make_views(step, number), step)
            assert out.stats is not None
            assert len(out.stats.raw_count) == number
            assert torch.isfinite(out.loss)

    def test_fewer_queries_than_candidates(self) -> None:
        model = float_model(net_queries=4)
        for step in (STAGE1, STAGE2):
            assert torch.isfinite(model.training_step(*make_views(step), step).loss)

    @pytest.mark.parametrize("levels", [1, 2, 3])
    def test_fewer_levels(self, levels: int) -> None:
        model = float_model(net_levels=levels, net_queries=4)
        assert model.trainable.strides == ((32,), (16, 32), (8, 16, 32))[levels - 1]
        assert torch.isfinite(model.training_step(*make_views(STAGE1), STAGE1).loss)

    def test_burn_in_leaves_unlabelled_images_out(self) -> None:
        model = float_model(burn_in=5)
        assert not any(name.startswith("unsup") for name in model.training_step(*make_views(4), 4).losses)
        assert any(name.startswith("unsup") for name in model.training_step(*make_views(5), 5).losses)


class TestRefusals:
    @pytest.mark.parametrize("label", [-1, 3])
    def test_labels_that_are_no_class(self, label: int) -> None:
        labeled, unlabeled = make_views(STAGE1)
        labeled.targets[1]["labels"] = torch.tensor([0, label])
        with pytest.raises(ValueError, match=rf"targets\[1\]\['labels'\] must lie in 0\.\.2 .*got {min(0, label)}\.\.{max(0, label)}"):
            float_model().training_step(labeled, unlabeled, STAGE1)

    def test_both_batches_empty(self) -> None:
        with pytest.raises(ValueError, match="must not both be empty"):
            float_model().training_step(LabeledBatch([], []), None, STAGE1)

    def test_nobody_says_when_stage_two_begins(self) -> None:
        with pytest.raises(ValueError, match="switch_at must be the first iteration of stage 2, officially half of the run, got None"):
            SemiDETR()

    def test_detectors_of_other_kinds(self) -> None:
        with pytest.raises(TypeError, match=r"semi_detr needs a DETRDetector \(own:dino_\.\.\..*got TinyDetector"):
            SemiSupervisedDetector(TinyDetector(), SemiDETR(SemiDETRConfig(switch_at=1)))

    def test_queries_that_start_nowhere(self) -> None:
        with pytest.raises(ValueError, match='selection must be "two_stage" or "mixed", got "none"'):
            make_model("deformable_detr", net_selection="none")

    def test_a_second_model_of_another_width(self) -> None:
        method = SemiDETR(SemiDETRConfig(switch_at=1))
        SemiSupervisedDetector(make_detector(), method)
        with pytest.raises(
            ValueError, match=r"a method serves one model: its \(width, levels\) are \(32, 4\), got a detector of \(64, 4\)"
        ):
            SemiSupervisedDetector(make_detector(width=64), method)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"content": "both"}, ValueError, "content must be one of teacher, cross, got 'both'"),
            ({"mining_scope": "node"}, ValueError, "mining_scope must be one of global, rank"),
            ({"consistency_stages": (0,)}, ValueError, r"consistency_stages must be \(\), \(1,\), \(2,\) or \(1, 2\), got \(0,\)"),
            ({"pseudo_denoising_stages": [1]}, ValueError, "pseudo_denoising_stages must be"),
            ({"teacher_nms_thr": 1.5}, ValueError, "teacher_nms_thr must be at most 1, got 1.5"),
            ({"switch_at": -1}, ValueError, "switch_at must be finite and at least 0, got -1"),
            ({"switch_at": 2.5}, TypeError, "switch_at must be an integer or None, got 2.5"),
            ({"o2m_topk": 0}, ValueError, "o2m_topk must be finite and at least 1, got 0"),
            ({"o2m_beta": 0}, ValueError, "o2m_beta must be positive, got 0"),
            ({"unsup_weight": float("nan")}, ValueError, "unsup_weight must be finite"),
            ({"l1_weight": "10"}, TypeError, "l1_weight must be a number, got '10'"),
            ({"drop_degenerate": 1}, TypeError, "drop_degenerate must be True or False, got 1"),
        ],
    )
    def test_options(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            SemiDETRConfig(**options)


def test_the_method_is_listed_and_registers_its_projector() -> None:
    assert METHODS["semi_detr"] == (SemiDETRConfig, SemiDETR)
    model = float_model()
    assert model.trainable is model.method.trainable
    assert model.method.state_dict() == {}
    assert any(name.startswith("trainable.projector") for name in model.state_dict())
    assert not any("projector" in name for part in (model.student, model.teacher) for name in part.state_dict())
