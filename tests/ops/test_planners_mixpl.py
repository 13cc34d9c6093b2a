"""MixPL's planner: geometry of the golden cases, order of the draws, state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ssod_fast.ops.compose import compose
from ssod_fast.ops.compose_plan import BoxRule, ComposePlan, PlaceF, PlaceI, Placement
from ssod_fast.ops.planners import MixPLPlanner
from ssod_fast.ops.planners.mosaic import touching_grid
from ssod_fast.structures import PaddedTargets, Target

STRONG = [(90, 120), (100, 75), (64, 64), (81, 133)]
CACHE = [(70, 100), (120, 90), (33, 57), (99, 99), (128, 64), (55, 140), (76, 80), (101, 31)]


def planner(**options: Any) -> MixPLPlanner:
    return MixPLPlanner(**{"mosaic_shape": ((40, 40), (80, 80)), **options})


def columns(plan: ComposePlan, b: int, k: int) -> dict[str, int]:
    return dict(zip((c.name.lower() for c in PlaceI), plan.place_i[b, k].tolist(), strict=True))


class OfficialOrder:
    """The draws of one official iteration, written down one by one from the published description."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.RandomState(seed)

    def erase(self, height: int, width: int) -> list[list[int]]:
        rects = []
        for _ in range(self.rng.randint(1, 20)):
            r = self.rng.random_sample() * (0.1 - 0.0) + 0.0
            ph, pw = int(height * r), int(width * r)
            x = int(self.rng.randint(0, width - pw))
            y = int(self.rng.randint(0, height - ph))
            rects.append([x, y, x + pw, y + ph])
        return rects

    def iteration(self, strong: Sequence[tuple[int, int]], cache: Sequence[tuple[int, int]], full: bool) -> dict[str, Any]:
        drawn: dict[str, Any] = {"erase_strong": [self.erase(h, w) for h, w in strong]}
        drawn["partners"] = self.rng.choice(range(4), 4, replace=False).tolist()
        drawn["tiles"] = (self.rng.choice(range(4), 4, replace=False) + 4).tolist()
        if not full:
            return drawn
        target = (-(-max(h for h, _ in strong) // 32) * 32, -(-max(w for _, w in strong) // 32) * 32)
        sizes = [self.tile(cache[i], target) for i in drawn["partners"]]
        drawn["erase_partner"] = [self.erase(h, w) for h, w in sizes]
        drawn["offsets"] = []
        for (dh, dw), (sh, sw) in zip(strong, sizes, strict=True):
            ch, cw = max(dh, sh), max(dw, sw)
            drawn["offsets"].append([int(self.rng.randint(room + 1)) for room in (cw - dw, ch - dh, cw - sw, ch - sh)])
        drawn["mosaic"] = (int(self.rng.randint(40, 80)), int(self.rng.randint(40, 80)))
        drawn["tile_sizes"] = [self.tile(cache[i], drawn["mosaic"]) for i in drawn["tiles"]]
        drawn["erase_tile"] = [self.erase(h, w) for h, w in drawn["tile_sizes"]]
        return drawn

    @staticmethod
    def tile(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
        s = min(target[0] / size[0], target[1] / size[1])
        return int(size[0] * s), int(size[1] * s)


def erase_of(plan: ComposePlan, b: int, k: int) -> list[list[int]]:
    rects: list[list[int]] = plan.erase[b, k, : plan.place_i[b, k, PlaceI.N_ERASE]].tolist()
    return rects


def test_legacy_generator_replays_the_official_order() -> None:
    ours, official = planner(rng="numpy_legacy", seed=7), OfficialOrder(7)
    for cache in (CACHE[:0], CACHE[:4], CACHE, CACHE[::-1]):
        full = len(cache) == 8
        mixup, mosaic = ours.plan(STRONG, cache)
        drawn = official.iteration(STRONG, cache, full)
        assert [erase_of(mixup, b, 0) for b in range(4)] == drawn["erase_strong"]
        assert (mosaic is not None) == full
        if mosaic is None:
            continue
        assert [columns(mixup, b, 1)["src"] - 4 for b in range(4)] == drawn["partners"]
        assert [erase_of(mixup, b, 1) for b in range(4)] == drawn["erase_partner"]
        for b, offsets in enumerate(drawn["offsets"]):
            image, partner = columns(mixup, b, 0), columns(mixup, b, 1)
            assert [image["off_x"], image["off_y"], partner["off_x"], partner["off_y"]] == offsets
        assert [columns(mosaic, 0, k)["src"] - 4 for k in range(4)] == drawn["tiles"]
        assert [(columns(mosaic, 0, k)["out_h"], columns(mosaic, 0, k)["out_w"]) for k in range(4)] == drawn["tile_sizes"]
        assert [erase_of(mosaic, 0, k) for k in range(4)] == drawn["erase_tile"]


def test_the_order_test_has_power() -> None:
    a, b = OfficialOrder(3), OfficialOrder(3)
    b.rng.randint(2)
    assert a.iteration(STRONG, CACHE, True) != b.iteration(STRONG, CACHE, True)


@pytest.mark.parametrize("rng", ["philox", "numpy_legacy"])
def test_state_replays_and_is_plain(rng: Any) -> None:
    first = planner(rng=rng, seed=3)
    first.plan(STRONG, CACHE)
    state = json.loads(json.dumps(first.state_dict()))  # plain values only
    second = planner(rng=rng, seed=99)
    second.load_state_dict(state)
    for _ in range(3):
        for a, b in zip(first.plan(STRONG, CACHE), second.plan(STRONG, CACHE), strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a.pack(), b.pack())


def test_state_of_the_other_generator_is_refused() -> None:
    with pytest.raises(ValueError, match="rng='philox'"):
        planner().load_state_dict(planner(rng="numpy_legacy").state_dict())


def test_ranks_and_seeds_differ() -> None:
    plans = [planner(seed=s, rank=r).plan(STRONG, CACHE)[0].pack() for s, r in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(plans[0], plans[3])
    assert len({tuple(p.tolist()) for p in plans}) == 3


def test_draws_have_the_documented_ranges() -> None:
    draws = planner(seed=1)
    counts, sides, heights = set(), [], set()
    for _ in range(60):
        mixup, mosaic = draws.plan(STRONG, CACHE)
        assert mosaic is not None
        counts.update(mixup.place_i[..., PlaceI.N_ERASE].ravel().tolist())
        for b, (h, w) in enumerate(STRONG):
            rects = np.asarray(erase_of(mixup, b, 0))
            assert (rects[:, :2] >= 0).all()
            assert (rects[:, 2] <= w).all()
            assert (rects[:, 3] <= h).all()
            sides += ((rects[:, 3] - rects[:, 1]) / h).tolist()
        heights.update(mosaic.canvas[:, 0].tolist())
    assert counts == set(range(1, 20))
    assert 0 <= min(sides) < 0.01
    assert 0.08 < max(sides) < 0.1
    assert all(height % 32 == 0 for height in heights)


def test_tile_of_the_golden_case() -> None:
    # (600, 800) into (400, 500): s = 0.625, size (375, 500), mirrored.
    fixed = planner(mosaic_shape=((400, 500), (400, 500)), erase_patches=None)
    _, mosaic = fixed.plan([(64, 64)] * 4, [(600, 800)] * 8)
    assert mosaic is not None
    tile = columns(mosaic, 0, 3)
    assert (tile["out_h"], tile["out_w"], tile["flip"]) == (375, 500, 1)
    assert mosaic.place_f[0, 3, [PlaceF.BOX_SX, PlaceF.BOX_SY]].tolist() == [0.625, 0.625]
    boxes = PaddedTargets.from_list([Target(boxes=torch.tensor([[100.0, 50, 300, 200]]), labels=torch.tensor([0]))] * 12)
    images = [torch.zeros(3, 64, 64, dtype=torch.uint8)] * 4 + [torch.zeros(3, 600, 800, dtype=torch.uint8)] * 8
    _, moved = compose(images, boxes, mosaic, rule=BoxRule.mixpl(), interp="nearest")
    corner = torch.tensor([tile["off_x"], tile["off_y"]] * 2)
    assert (moved.boxes[0, 3] - corner).tolist() == [312.5, 31.25, 437.5, 125]


@pytest.mark.parametrize(("side", "target", "rows"), [(400, 402, 401), (555, 401, 400), (20, 52, 52)])
def test_sizes_are_floored_from_one_double_scale(side: int, target: int, rows: int) -> None:
    fixed = planner(mosaic_shape=((target, target), (target, target)), erase_patches=None)
    _, mosaic = fixed.plan([(8, 8)] * 4, [(side, side)] * 8)
    assert mosaic is not None
    assert columns(mosaic, 0, 0)["out_h"] == rows


def test_mosaic_of_the_golden_case() -> None:
    sizes = [(300, 500), (400, 450), (350, 380), (400, 500)]
    canvas, placed = touching_grid([Placement(i, size) for i, size in enumerate(sizes)], grid=2, cell_multiple=16)
    plan = ComposePlan.from_placements([canvas], [placed])
    images = [torch.full((3, *size), i + 1.0) for i, size in enumerate(sizes)]
    box = Target(boxes=torch.tensor([[10.0, 20, 110, 220]]), labels=torch.tensor([0]))
    mixed, moved = compose(images, PaddedTargets.from_list([box] * 4), plan, rule=BoxRule.mixpl(), interp="nearest", fill=0.0)
    assert list(mixed.shape) == [1, 3, 800, 1024]
    expected = [[22, 120, 122, 320], [522, 20, 622, 220], [142, 420, 242, 620], [522, 420, 622, 620]]
    assert moved.boxes[0, :4].tolist() == expected
    for tile, (rows, cols) in enumerate(
        [((100, 399), (12, 511)), ((0, 399), (512, 961)), ((400, 749), (132, 511)), ((400, 799), (512, 1011))]
    ):
        inside = (mixed[0, 0] == tile + 1).nonzero()
        assert inside.amin(0).tolist() == [rows[0], cols[0]]
        assert inside.amax(0).tolist() == [rows[1], cols[1]]
    assert mixed.sum().item() == 5_127_000


def test_mixup_takes_the_oldest_and_the_mosaic_the_newest() -> None:
    draws = planner(cache_size=11)
    mixup, mosaic = draws.plan(STRONG, [(50, 50)] * 11)
    assert mosaic is not None
    assert sorted(mixup.place_i[:, 1, PlaceI.SRC].tolist()) == [4, 5, 6, 7]
    assert sorted(mosaic.place_i[0, :, PlaceI.SRC].tolist()) == [11, 12, 13, 14]


def test_switches() -> None:
    mixup, mosaic = planner(mixup=False, mosaics=0).plan(STRONG, CACHE)
    assert mosaic is None
    assert mixup.places == 1
    assert mixup.place_f[:, 0, PlaceF.WEIGHT].tolist() == [1.0] * 4
    _, mosaic = planner(mosaics=3).plan(STRONG, CACHE)
    assert mosaic is not None
    assert mosaic.batch == 3
    flips = [planner(cache_flip="random", seed=s).plan(STRONG, CACHE)[0].place_i[:, 1, PlaceI.FLIP] for s in range(8)]
    assert set(np.concatenate(flips).tolist()) == {0, 1}
    sized, _ = planner(resize="size").plan(STRONG, [(555, 555)] * 8)
    assert columns(sized, 0, 1)["out_h"] == 128  # the target exactly, where floor(h * s) can be one short
    assert planner(erase_patches=None).plan(STRONG, CACHE)[0].erase.shape[2] == 0
    erase = planner(erase_patches=(3, 4), erase_ratio=(0.5, 0.5)).plan(STRONG, CACHE)[0].erase[:, 0]  # [4, 3, 4] of the strong images
    sides = (erase[..., 2:] - erase[..., :2]).tolist()
    assert sides == [[[w // 2, h // 2]] * 3 for h, w in STRONG]


def test_another_batch_size_and_narrow_images() -> None:
    mixup, mosaic = planner().plan([(1, 900), (7, 1)], [(1, 1), (2, 700), *CACHE[2:]])
    assert mosaic is not None
    assert mixup.batch == 2
    assert mixup.place_i[..., PlaceI.OUT_H].min() >= 1


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"erase_patches must satisfy 1 <= low < high, got \(0, 5\)"):
        planner(erase_patches=(0, 5))
    with pytest.raises(ValueError, match="erase_ratio must stay below 1"):
        planner(erase_ratio=(0, 1))
    with pytest.raises(ValueError, match="erase_ratio must be two increasing numbers"):
        planner(erase_ratio=(0.2, 0.1))
    with pytest.raises(ValueError, match=r"cache_size must be at least 6 \+ 4"):
        planner(cache_size=8).plan([(9, 9)] * 6, CACHE)
    with pytest.raises(ValueError, match="cache_size must be at least 4"):
        planner(cache_size=3)
    with pytest.raises(ValueError, match=r"sizes\[0\] must be two positive integers"):
        planner().plan([(0, 4)], CACHE)
    with pytest.raises(ValueError, match='rng must be "philox" or "numpy_legacy"'):
        planner(rng="mt")
    with pytest.raises(ValueError, match="cache_flip must be one of 'always', 'random'"):
        planner(cache_flip="never")
