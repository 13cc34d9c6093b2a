"""Planners of letterbox, half resolution, mixup, cutmix and mosaic."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from ssod_fast.ops.compose import compose, compose_images
from ssod_fast.ops.compose_plan import BoxRule, ComposePlan, PlaceF, PlaceI
from ssod_fast.ops.planners import CutMixPlanner, HalfResPlanner, LetterboxPlanner, MixPLPlanner, MixUpPlanner, MosaicPlanner, mixup_plans
from ssod_fast.structures import PaddedTargets, Target

SIZES = [(40, 60), (75, 33), (64, 64), (21, 90), (50, 51)]


def column(plan: ComposePlan, name: str) -> Any:
    return plan.place_i[..., PlaceI[name]].tolist()


def out_hw(plan: ComposePlan) -> list[tuple[int, int]]:
    return list(zip(np.ravel(column(plan, "OUT_H")).tolist(), np.ravel(column(plan, "OUT_W")).tolist(), strict=True))


class TestLetterbox:
    def test_fits_and_anchors(self) -> None:
        plan = LetterboxPlanner((100, 200), anchor="center").plan([(50, 50), (400, 400), (30, 100)])
        assert out_hw(plan) == [(100, 100), (100, 100), (60, 200)]
        assert column(plan, "OFF_X") == [[50], [50], [0]]
        assert column(plan, "OFF_Y") == [[0], [0], [20]]
        assert plan.canvas.tolist() == [[100, 200]] * 3

    def test_does_not_enlarge_if_told(self) -> None:
        plan = LetterboxPlanner((100, 100), scale_up=False).plan([(30, 40), (200, 100)])
        assert out_hw(plan) == [(30, 40), (100, 50)]

    def test_rounding(self) -> None:
        # s = 59/116: floor(116 * s) is 58 in double precision.
        assert out_hw(LetterboxPlanner((59, 59)).plan([(116, 116)])) == [(58, 58)]
        rounded = LetterboxPlanner((59, 59), rounding="round").plan([(116, 116)])
        assert out_hw(rounded) == [(59, 59)]
        assert rounded.place_f[0, 0, PlaceF.INV_X] == np.float32(116 / 59)
        assert out_hw(LetterboxPlanner((10, 10), rounding="round").plan([(1, 1000)])) == [(1, 10)]

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="anchor must be one of 'top_left', 'center', got 'left'"):
            LetterboxPlanner((4, 4), anchor="left")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"size\[0\] must be two positive integers"):
            LetterboxPlanner((4, 0))


class TestHalfRes:
    @pytest.mark.parametrize("height", [32, 33, 64, 101, 799, 1333])
    def test_ceil_matches_the_next_level_of_a_pyramid(self, height: int) -> None:
        plan = HalfResPlanner().plan([(height, 64)])
        half = out_hw(plan)[0][0]
        for level in range(1, 6):
            assert -(-half // 2 ** (level - 1)) == -(-height // 2**level)

    def test_floor(self) -> None:
        assert out_hw(HalfResPlanner("floor").plan([(5, 1)])) == [(2, 1)]

    def test_boxes_and_pixels_halve(self) -> None:
        image = torch.arange(4.0).repeat_interleave(2).expand(3, 6, 8)
        target = Target(boxes=torch.tensor([[2.0, 0, 6, 4]]), labels=torch.tensor([0]))
        mixed, boxes = compose([image], PaddedTargets.from_list([target]), HalfResPlanner().plan([(6, 8)]), interp="bilinear")
        assert mixed[0, 0, 0, :4].tolist() == [0, 1, 2, 3]
        assert boxes.boxes[0, 0].tolist() == [1, 0, 3, 2]


class TestMixUp:
    @pytest.mark.parametrize("offset", ["random", "top_left", "center"])
    @pytest.mark.parametrize("fit", [True, False])
    def test_pairs_lie_inside_and_weigh_one(self, offset: Any, fit: bool) -> None:
        planner = MixUpPlanner(offset=offset, fit_partner=fit, weight=("beta", 32, 32), seed=2)
        for _ in range(20):
            plan = planner.plan(SIZES)
            plan.check_weights()
            assert sorted(plan.place_i[:, 1, PlaceI.SRC].tolist()) == list(range(5))
            np.testing.assert_allclose(plan.place_f[..., PlaceF.WEIGHT].sum(1), 1, rtol=1e-6)
            shown = plan.place_i[..., PlaceI.X1] - plan.place_i[..., PlaceI.X0]
            assert (shown == plan.place_i[..., PlaceI.OUT_W]).all()  # nothing is cropped

    def test_roll_and_cache(self) -> None:
        assert MixUpPlanner(partner="roll").plan(SIZES).place_i[:, 1, PlaceI.SRC].tolist() == [4, 0, 1, 2, 3]
        cached = MixUpPlanner().plan(SIZES, [(10, 20)] * 7).place_i[:, 1, PlaceI.SRC]
        assert sorted(cached.tolist()) == [5, 6, 7, 8, 9]
        assert MixUpPlanner().plan(SIZES, [(10, 20)] * 3).place_i[:, 1, PlaceI.SRC].max() < 5

    def test_uniform_weights_and_flip(self) -> None:
        planner = MixUpPlanner(weight=("uniform", 0.45, 0.55), flip_p=1.0)
        plans = [planner.plan(SIZES) for _ in range(20)]
        shares = np.concatenate([p.place_f[:, 0, PlaceF.WEIGHT] for p in plans])
        assert 0.45 <= shares.min() < 0.47
        assert 0.53 < shares.max() <= 0.55
        assert all((p.place_i[:, 1, PlaceI.FLIP] == 1).all() for p in plans)

    def test_a_partner_without_boxes_can_be_left_out(self) -> None:
        plan = MixUpPlanner(partner="roll").plan(SIZES[:3], empty=[True, False, False])
        assert plan.place_i[:, :, PlaceI.SRC].tolist() == [[0, 2], [1, -1], [2, 1]]
        assert plan.place_f[1, 0, PlaceF.WEIGHT] == 1

    def test_sum_of_a_mixup(self) -> None:
        images = [torch.rand(3, *size) for size in SIZES]
        plan = MixUpPlanner(flip_p=0.0, fit_partner=False).plan(SIZES)
        mixed = compose_images(images, plan, interp="nearest")
        for b in range(5):
            partner = int(plan.place_i[b, 1, PlaceI.SRC])
            torch.testing.assert_close(mixed[b].sum(), 0.5 * (images[b].sum() + images[partner].sum()))

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match=r"weight must be two increasing numbers in \[0, 1\]"):
            MixUpPlanner(weight=1.5)
        with pytest.raises(ValueError, match=r"weight\[0\] must be one of 'uniform', 'beta'"):
            MixUpPlanner(weight=("normal", 0, 1))
        with pytest.raises(ValueError, match="must be positive for a Beta distribution"):
            MixUpPlanner(weight=("beta", 0, 1))
        with pytest.raises(ValueError, match="seed and rank must not be negative"):
            MixUpPlanner(seed=-1)


class TestCutMix:
    def test_the_pasted_rectangle_shows_the_partner_in_place(self) -> None:
        images = [torch.full((3, *size), float(i + 1)) for i, size in enumerate(SIZES)]
        plan = CutMixPlanner(seed=4).plan(SIZES)
        mixed = compose_images(images, plan, blend="over", interp="nearest")
        for b, (h, w) in enumerate(SIZES):
            partner = int(plan.place_i[b, 1, PlaceI.SRC])
            x0, y0, x1, y1 = plan.place_i[b, 1, PlaceI.X0 : PlaceI.Y1 + 1].tolist()
            expected = torch.full((h, w), b + 1.0)
            expected[y0:y1, x0:x1] = partner + 1
            assert torch.equal(mixed[b, 0, :h, :w], expected)

    def test_covered_boxes_go(self) -> None:
        target = Target(boxes=torch.tensor([[0.0, 0, 40, 40]]), labels=torch.tensor([0]))
        plan = CutMixPlanner(seed=0).plan([(40, 40)] * 2)
        _, boxes = compose(
            [torch.zeros(3, 40, 40)] * 2, PaddedTargets.from_list([target] * 2), plan, blend="over", rule=BoxRule(min_visibility=1.0)
        )
        assert boxes.count.max() < 2

    def test_bad_alpha(self) -> None:
        with pytest.raises(ValueError, match="alpha must be positive"):
            CutMixPlanner(alpha=0)


class TestMosaic:
    @pytest.mark.parametrize("tiles", [4, 9])
    def test_touching_tiles_are_whole_and_disjoint(self, tiles: Any) -> None:
        planner = MosaicPlanner(tiles=tiles, target=((20, 20), (60, 60)), seed=1)
        for _ in range(10):
            plan = planner.plan(SIZES, canvases=3)
            plan.check_weights()  # disjoint: no point weighs more than one tile
            shown = plan.place_i[..., PlaceI.X1] - plan.place_i[..., PlaceI.X0]
            assert (shown == plan.place_i[..., PlaceI.OUT_W]).all()
            assert (plan.canvas % 16 == 0).all()

    @pytest.mark.parametrize("tiles", [4, 9])
    def test_window_is_square_and_covered_where_tiles_are_square(self, tiles: Any) -> None:
        planner = MosaicPlanner(layout="yolo_window", tiles=tiles, size=64, seed=3)
        for _ in range(10):
            plan = planner.plan([(50, 50)] * 9)
            plan.check_weights()
            assert plan.canvas.tolist() == [[64, 64]]
            mixed = compose_images([torch.ones(3, 50, 50)] * 9, plan, fill=0.0, interp="nearest")
            assert (mixed == 1).all()

    def test_window_moves_over_all_of_its_range(self) -> None:
        planner = MosaicPlanner(layout="yolo_window", size=100, seed=0)
        corner = [int(planner.plan([(100, 100)] * 4).place_i[0, 3, PlaceI.OFF_X]) for _ in range(200)]
        assert 0 <= min(corner) < 8
        assert 92 < max(corner) <= 100

    def test_sources(self) -> None:
        plan = MosaicPlanner(seed=5).plan(SIZES, canvases=2)
        assert all(len(set(row)) == 4 for row in column(plan, "SRC"))
        assert len(column(MosaicPlanner(tiles=9).plan(SIZES[:2]), "SRC")[0]) == 9
        assert column(MosaicPlanner().plan(SIZES, groups=[[3, 1, 0, 2]]), "SRC") == [[3, 1, 0, 2]]

    @pytest.mark.parametrize("layout", ["centre_touch", "yolo_window"])
    @pytest.mark.parametrize("tiles", [4, 9])
    def test_a_bright_patch_stays_under_its_box(self, layout: Any, tiles: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        images, targets = [], []
        for h, w in SIZES:
            x, y = int(torch.randint(0, w - 12, (), generator=generator)), int(torch.randint(0, h - 9, (), generator=generator))
            image = torch.zeros(3, h, w)
            image[:, y : y + 8, x : x + 11] = 1
            images.append(image)
            targets.append(Target(boxes=torch.tensor([[x, y, x + 11, y + 8]]).float(), labels=torch.tensor([0])))
        planner = MosaicPlanner(layout=layout, tiles=tiles, size=120, target=((80, 90), (120, 160)), seed=9)
        seen = 0
        for _ in range(10):
            plan = planner.plan(SIZES, canvases=2)
            mixed, boxes = compose(
                images, PaddedTargets.from_list(targets), plan, interp="nearest", fill=0.0, rule=BoxRule(min_visibility=0.3)
            )
            for b, target in enumerate(boxes.to_list()):
                for x1, y1, x2, y2 in target["boxes"].tolist():
                    inner = mixed[b, 0, math.ceil(y1) + 1 : math.floor(y2) - 1, math.ceil(x1) + 1 : math.floor(x2) - 1]
                    assert (inner == 1).all()
                    seen += inner.numel() > 0
        assert seen > 20

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="tiles must be one of 4, 9, got 5"):
            MosaicPlanner(tiles=5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="every group must name 4 sources"):
            MosaicPlanner().plan(SIZES, groups=[[1, 2]])
        with pytest.raises(ValueError, match=r"every group must name 4 sources in 0\.\.\d+, got \[0, 1, 2, -1\]"):
            MosaicPlanner().plan(SIZES, groups=[[0, 1, 2, -1]])
        with pytest.raises(ValueError, match="sizes must name at least one source"):
            MosaicPlanner().plan([])


@pytest.mark.parametrize("seed", range(40))
def test_no_planner_reaches_beyond_its_sources(seed: int) -> None:
    """So no sample of theirs is undefined, and what they plan for sources of the given sizes is never refused."""
    draw = random.Random(seed)
    sizes = [(draw.choice((1, 2, draw.randint(1, 900))), draw.choice((1, 3, draw.randint(1, 1400)))) for _ in range(9)]
    fit, side = (draw.randint(1, 700), draw.randint(1, 700)), draw.randint(1, 640)
    plans = [LetterboxPlanner(fit, rounding=rounding).plan(sizes) for rounding in ("floor", "round")]  # type: ignore[arg-type]
    plans += [HalfResPlanner(rounding).plan(sizes) for rounding in ("ceil", "floor")]  # type: ignore[arg-type]
    plans += [MixUpPlanner(seed=seed).plan(sizes), CutMixPlanner(seed=seed).plan(sizes)]
    plans += [MosaicPlanner(tiles=4, target=((20, 30), (400, 500)), seed=seed).plan(sizes, canvases=2)]
    plans += [MosaicPlanner(layout="yolo_window", tiles=9, size=side, seed=seed).plan(sizes)]
    for resize in ("scale_factor", "size"):
        mixpl = MixPLPlanner(mosaic_shape=((1, 1), (800, 800)), resize=resize, seed=seed)  # type: ignore[arg-type]
        mixup, mosaic = mixpl.plan(sizes[:1], sizes[1:])
        assert mosaic is not None
        plans += [mixup, mosaic]
    for plan in plans:
        assert plan.reads
        plan.check_sizes(sizes)


def test_mixup_of_two_mosaics_has_eight_placements() -> None:
    mosaics = MosaicPlanner(target=((30, 30), (50, 50)), seed=2).plan(SIZES, canvases=2)
    others = MosaicPlanner(target=((30, 30), (50, 50)), seed=3).plan(SIZES, canvases=2)
    both = mixup_plans(mosaics, others, 0.3)
    both.check_weights()
    assert both.places == 8
    images = [torch.rand(3, *size) for size in SIZES]
    out = tuple(int(side) for side in both.canvas.max(0))
    first, second, mixed = (compose_images(images, p, interp="nearest", fill=0.0, out_hw=(out[0], out[1])) for p in (mosaics, others, both))
    torch.testing.assert_close(mixed, 0.3 * first + 0.7 * second)
    with pytest.raises(ValueError, match="equally many canvases, got 2 and 1"):
        mixup_plans(mosaics, MosaicPlanner().plan(SIZES), 0.5)
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\]"):
        mixup_plans(mosaics, others, 2)


@pytest.mark.parametrize("rng", ["philox", "numpy_legacy"])
@pytest.mark.parametrize("make", [MixUpPlanner, CutMixPlanner, MosaicPlanner])
def test_same_state_same_plan(make: Any, rng: Any) -> None:
    first, second = make(seed=1, rng=rng), make(seed=8, rng=rng)
    first.plan(SIZES)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.plan(SIZES).pack(), second.plan(SIZES).pack())
    assert not torch.equal(first.plan(SIZES).pack(), make(seed=2, rng=rng).plan(SIZES).pack())
