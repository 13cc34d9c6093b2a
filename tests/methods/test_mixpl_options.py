"""Switches, state and construction of MixPL."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from mixpl_cases import SMALL, Says, make_model, run, says
from tiny_detector import TinyDetector, make_batches
from torch import Tensor, nn

from ssod_fast.methods import MixPL, MixPLConfig, Preview, SemiSupervisedDetector


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
