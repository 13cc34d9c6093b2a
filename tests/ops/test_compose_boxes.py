"""compose_boxes against cases checked by hand, the reference, and the pixels themselves."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from compose_cases import IMPLEMENTATIONS, boxes_module, boxes_of, random_plan, use
from torch import Tensor

from ssod_fast.ops.compose import compose, compose_boxes, compose_images
from ssod_fast.ops.compose_plan import FLIP_X, BoxRule, ComposePlan, Placement
from ssod_fast.structures import PaddedTargets, Target

ANY_BOX = BoxRule(min_visibility=0, min_wh=None)


@pytest.fixture(params=IMPLEMENTATIONS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return use(request.param, monkeypatch)


def kept(result: PaddedTargets) -> list[list[float]]:
    return [box for target in result.to_list() for box in target["boxes"].tolist()]


CROPPED = {"flip": FLIP_X, "offset": (-20, 10), "rect": (0, 10, 80, 60), "erase": [(60, 5, 90, 30), (60, 5, 80, 30)]}
SEEN, CLIPPED, DEGENERATE = [65, 10, 80, 60], [0, 10, 5, 30], [50, 30, 50, 50]


def cropped(**changes: Any) -> ComposePlan:
    return ComposePlan.from_placements([(60, 80)], [[Placement.scaled(0, (100, 200), 0.5, **{**CROPPED, **changes})]])


FIVE = ([20, 10, 80, 60], [150, 0, 200, 40], [0, 0, 30, 100], [190, 80, 200, 100], [60, 40, 60, 80])


@pytest.mark.parametrize(
    ("rule", "boxes"),
    [
        (BoxRule(min_visibility=0.3), [SEEN]),
        (BoxRule(min_visibility=0.1), [CLIPPED, SEEN]),
        (BoxRule(min_visibility=0, min_wh=None), [CLIPPED, SEEN, [0, 50, 0, 60], DEGENERATE]),
        (BoxRule(erase_thr=1.1, erase_overlap="union", min_visibility=0.3), [[40, 15, 70, 40], SEEN]),
        (BoxRule(erase_thr=1.1, min_visibility=0.3), [SEEN]),
    ],
)
def test_boxes_of_a_cropped_source(rule: BoxRule, boxes: list[list[float]], device: torch.device) -> None:
    assert kept(compose_boxes(boxes_of(*FIVE, device=device), cropped(), rule=rule)) == boxes


def test_boxes_are_clipped_to_the_visible_rectangle(device: torch.device) -> None:
    plan = cropped(rect=(0, 10, 70, 60))
    assert kept(compose_boxes(boxes_of(*FIVE, device=device), plan, rule=BoxRule(min_visibility=0.3))) == [[65, 10, 70, 60]]
    assert kept(compose_boxes(boxes_of(*FIVE, device=device), plan, rule=BoxRule(min_visibility=0.34))) == []


def test_mosaic_boxes(device: torch.device) -> None:
    sizes = [(30, 50), (40, 45), (35, 38), (40, 50)]
    tiles = []
    for i, hw in enumerate(sizes):
        tile = Placement.scaled(i, hw, min(20 / hw[0], 25 / hw[1]), flip=FLIP_X)
        offset = (32 - tile.out_hw[1] if i % 2 == 0 else 32, 32 - tile.out_hw[0] if i < 2 else 32)
        tiles.append(Placement(**{**vars(tile), "offset": offset}))
    one = Target(boxes=torch.tensor([[6.0, 4, 26, 24]]), labels=torch.tensor([3]))
    result = compose_boxes(PaddedTargets.from_list([one] * 4, device=device), ComposePlan.from_placements([(64, 64)], [tiles]))
    expected = [[19, 19, 29, 29], [41, 14, 51, 24], [17.142857, 34.285714, 28.571429, 45.714286], [44, 34, 54, 44]]
    torch.testing.assert_close(result.boxes[0].cpu(), torch.tensor(expected), atol=1e-4, rtol=0)
    assert result.labels.tolist() == [[3, 3, 3, 3]]
    assert result.placement is not None
    assert result.placement.tolist() == [[0, 1, 2, 3]]


def test_resized_and_flipped_tile(device: torch.device) -> None:
    plain, flipped = (ComposePlan.from_placements([(400, 500)], [[Placement.scaled(0, (600, 800), 0.625, flip=f)]]) for f in (0, FLIP_X))
    boxes = boxes_of([100, 50, 300, 200], device=device)
    assert kept(compose_boxes(boxes, plain)) == [[62.5, 31.25, 187.5, 125]]
    assert kept(compose_boxes(boxes, flipped)) == [[312.5, 31.25, 437.5, 125]]


@pytest.mark.parametrize(
    ("patches", "overlap", "survives"),
    [
        ([(0, 0, 50, 100), (40, 0, 80, 100)], "sum", False),
        ([(0, 0, 40, 100), (0, 0, 40, 100)], "sum", False),
        ([(0, 0, 40, 100), (0, 0, 40, 100)], "union", True),
        ([(0, 0, 50, 100), (40, 0, 80, 100)], "union", False),
        ([(0, 0, 40, 100), (-30, -30, 20, 20)], "sum", True),
    ],
)
def test_erased_share(patches: Any, overlap: Any, survives: bool, device: torch.device) -> None:
    plan = ComposePlan.from_placements([(200, 300)], [[Placement(0, (200, 300), erase=patches)]])
    boxes = boxes_of([0, 0, 100, 100], [150, 0, 250, 100], device=device)
    assert len(kept(compose_boxes(boxes, plan, rule=BoxRule(erase_overlap=overlap)))) == 1 + survives


def test_over_hides_what_lies_below(device: torch.device) -> None:
    plan = ComposePlan.from_placements([(10, 20)], [[Placement(0, (10, 20)), Placement(1, (10, 10), offset=(9, 0))]])
    below, above = boxes_of([8, 0, 18, 10], device=device), boxes_of([0, 0, 5, 5], device=device)
    targets = PaddedTargets.cat(below, above)
    assert len(kept(compose_boxes(targets, plan, rule=BoxRule(min_visibility=0.2), blend="over"))) == 1
    assert len(kept(compose_boxes(targets, plan, rule=BoxRule(min_visibility=0.1), blend="over"))) == 2
    assert len(kept(compose_boxes(targets, plan, rule=BoxRule(min_visibility=0.2)))) == 2


@pytest.mark.parametrize("rule", [BoxRule(), BoxRule.mixpl()])
def test_broken_boxes_are_dropped(rule: BoxRule, device: torch.device) -> None:
    nan, inf = float("nan"), float("inf")
    boxes = boxes_of([1, 1, nan, 5], [1, 1, inf, 5], [1, 1, 5, 5], [-inf, 1, 5, 5], [2, 2, 6, 6], device=device)
    boxes.labels[0, 4] = -1
    result = compose_boxes(boxes, ComposePlan.from_placements([(8, 8)], [[Placement(0, (8, 8))]]), rule=rule)
    assert kept(result) == [[1, 1, 5, 5]]
    assert result.labels[0].tolist() == [2, -1, -1, -1, -1]
    assert not result.boxes[0, 1:].any()


def test_inverted_boxes_pass_only_without_a_minimum_size(device: torch.device) -> None:
    plan = ComposePlan.from_placements([(8, 8)], [[Placement(0, (8, 8))]])
    inverted = boxes_of([6, 1, 2, 5], device=device)
    assert kept(compose_boxes(inverted, plan)) == []
    assert kept(compose_boxes(inverted, plan, rule=BoxRule.mixpl())) == [[6, 1, 2, 5]]


@pytest.mark.parametrize(("propagate", "weights"), [(False, [0.5, 1, 1]), (True, [0.125, 0.25, 0.75])])
def test_weights(propagate: bool, weights: list[float], device: torch.device) -> None:
    targets = PaddedTargets.cat(boxes_of([0, 0, 4, 4], [1, 1, 5, 5], device=device), boxes_of([2, 2, 6, 6], device=device))
    targets.weights[0, 0] = 0.5
    plan = ComposePlan.from_placements([(8, 8)], [[Placement(0, (8, 8), weight=0.25), Placement(1, (8, 8), weight=0.75)]])
    assert compose_boxes(targets, plan, rule=BoxRule(propagate_weight=propagate)).weights[0, :3].tolist() == weights


@pytest.mark.parametrize("nmax", [0, 1, 2, 9])
def test_overflow_is_counted(nmax: int, device: torch.device) -> None:
    targets = boxes_of([0, 0, 4, 4], [1, 1, 5, 5], [2, 2, 6, 6], device=device)
    plan = ComposePlan.from_placements([(8, 8)] * 2, [[Placement(0, (8, 8))], []])
    result = compose_boxes(targets, plan, nmax=nmax)
    assert result.overflow is not None
    assert result.boxes.shape == (2, nmax, 4)
    assert result.count.tolist() == [min(3, nmax), 0]
    assert result.overflow.tolist() == [max(3 - nmax, 0), 0]
    assert kept(result) == [[0, 0, 4, 4], [1, 1, 5, 5], [2, 2, 6, 6]][:nmax]


@pytest.mark.parametrize("batch", [0, 2])
def test_no_boxes_at_all(batch: int, device: torch.device) -> None:
    plan = ComposePlan.from_placements([(8, 8)] * batch, [[Placement(0, (8, 8)), Placement(1, (8, 8), weight=0)]] * batch)
    for targets in (PaddedTargets.empty(2, 0, device), PaddedTargets.empty(2, 5, device)):
        result = compose_boxes(targets, plan)
        assert result.count.tolist() == [0] * batch
        assert not result.boxes.any()
        assert not result.weights.any()
        assert (result.labels == -1).all()


def test_partner_without_boxes_adds_none(device: torch.device) -> None:
    targets = PaddedTargets.cat(boxes_of([1, 1, 5, 5], device=device), PaddedTargets.empty(1, 3, device))
    plan = ComposePlan.from_placements([(8, 8)], [[Placement(1, (8, 8), weight=0.5), Placement(0, (8, 8), weight=0.5)]])
    assert kept(compose_boxes(targets, plan)) == [[1, 1, 5, 5]]


@pytest.mark.parametrize("seed", range(10))
def test_random_plans_equal_the_reference(seed: int, device: torch.device) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = [(rng.randint(5, 60), rng.randint(5, 60)) for _ in range(3)]
    targets = []
    for h, w in sizes:
        corners = torch.rand(rng.randint(0, 7), 2, 2, generator=generator).sort(1).values * torch.tensor([w, h])
        boxes = corners.flatten(1)
        targets.append(Target(boxes=boxes, labels=torch.arange(len(boxes)), scores=torch.rand(len(boxes), generator=generator)))
    padded = PaddedTargets.from_list(targets)
    for _ in range(5):
        plan = random_plan(rng, sizes)
        rule = BoxRule(
            erase_overlap=rng.choice(["sum", "union"]),
            min_visibility=rng.choice([0, 0.3]),
            min_wh=rng.choice([None, 2.0]),
            propagate_weight=True,
        )
        options: dict[str, Any] = {"rule": rule, "nmax": rng.choice([None, 3, 40]), "blend": rng.choice(["sum", "over"])}
        ours = compose_boxes(padded.to(device), plan, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(boxes_module, "_boxes", boxes_module.reference)
            expected = compose_boxes(padded, plan, **options)
        for name, value in vars(expected).items():
            torch.testing.assert_close(getattr(ours, name).cpu(), value, atol=1e-5, rtol=0)


def random_colour_mix(rng: random.Random, swap_offsets: bool = False) -> tuple[Tensor, PaddedTargets]:
    """A mix of dark images with one bright patch each, and the boxes that should follow the patches."""
    sizes, images, targets = [(rng.randint(20, 60), rng.randint(30, 90)) for _ in range(4)], [], []
    for h, w in sizes:
        x, y, pw, ph = rng.randint(0, w - 12), rng.randint(0, h - 12), rng.randint(8, 12), rng.randint(8, 12)
        image = torch.zeros(3, h, w)
        image[:, y : y + ph, x : x + pw] = 1
        images.append(image)
        targets.append(Target(boxes=torch.tensor([[x, y, x + pw, y + ph]], dtype=torch.float32), labels=torch.tensor([0])))
    places = []
    for i, hw in enumerate(sizes):
        scale = rng.uniform(0.8, 1.6)
        offset = (rng.randint(-10, 60) + 70 * (i % 2), rng.randint(-10, 20) + 50 * (i // 2))
        rect_hw = (50 * (i // 2), 70 * (i % 2))  # each tile keeps to its own quarter of a 100 x 160 canvas
        tile = Placement.scaled(i, hw, scale, flip=rng.randint(0, 3), offset=offset)
        x0, y0, x1, y1 = tile.visible((100, 160))
        rect = (max(x0, rect_hw[1]), max(y0, rect_hw[0]), min(x1, rect_hw[1] + 70), min(y1, rect_hw[0] + 50))
        places.append(Placement(**{**vars(tile), "rect": rect if rect[0] < rect[2] and rect[1] < rect[3] else (0, 0, 0, 0)}))
    plan = ComposePlan.from_placements([(100, 160)], [places])
    padded = PaddedTargets.from_list(targets)
    rule = BoxRule(min_visibility=0.1, min_wh=3)
    image, boxes = compose(images, padded, plan, interp="nearest", rule=rule)
    if swap_offsets:  # the mistake that this test is there to find
        wrong = [Placement(**{**vars(p), "offset": p.offset[::-1], "rect": None}) for p in places]
        boxes = compose_boxes(padded, ComposePlan.from_placements([(100, 160)], [wrong]), rule=rule)
    return image, boxes


def misses(image: Tensor, boxes: PaddedTargets) -> tuple[int, int]:
    """Boxes that do not lie on bright pixels, and boxes."""
    found = boxes.to_list()[0]["boxes"]
    inner = torch.cat([found[:, :2].ceil(), found[:, 2:].floor()], 1).int().tolist()
    means = [image[0, 0, y1:y2, x1:x2].mean().item() for x1, y1, x2, y2 in inner]
    return sum(not mean >= 0.9 for mean in means), len(means)


def test_boxes_stay_on_their_objects() -> None:
    counts = [misses(*random_colour_mix(random.Random(seed))) for seed in range(60)]
    assert sum(n for _, n in counts) > 100
    assert sum(missed for missed, _ in counts) == 0
    swapped = [misses(*random_colour_mix(random.Random(seed), swap_offsets=True)) for seed in range(60)]
    assert sum(missed for missed, _ in swapped) > sum(n for _, n in swapped) // 3


def test_list_and_padded_targets_agree(device: torch.device) -> None:
    few = Target(boxes=torch.tensor([[1.0, 1, 5, 5]]), labels=torch.tensor([4]))
    many = Target(boxes=torch.tensor([[0.0, 0, 3, 3], [2, 2, 8, 8]]), labels=torch.tensor([5, 6]))
    plan = ComposePlan.from_placements([(9, 9)], [[Placement(1, (9, 9), weight=0.5), Placement(0, (9, 9), weight=0.5)]])
    tight = compose_boxes(PaddedTargets.from_list([few, many], device=device), plan)
    loose = compose_boxes(PaddedTargets.from_list([few, many], nmax=20, device=device), plan)
    assert kept(tight) == kept(loose) == [[0, 0, 3, 3], [2, 2, 8, 8], [1, 1, 5, 5]]
    assert tight.to_list()[0]["labels"].tolist() == loose.to_list()[0]["labels"].tolist() == [5, 6, 4]


def test_compose_gives_images_and_boxes_of_one_plan(device: torch.device) -> None:
    plan = ComposePlan.from_placements([(8, 8)], [[Placement(0, (8, 8))]])
    source = torch.full((3, 8, 8), 3.0, device=device)
    images, boxes = compose([source], boxes_of([1, 1, 5, 5], device=device), plan, nmax=2, pad_value=1)
    assert torch.equal(images, compose_images([source], plan, pad_value=1))
    assert kept(boxes) == [[1, 1, 5, 5]]
    assert boxes.nmax == 2


def test_bad_arguments() -> None:
    plan = ComposePlan.from_placements([(8, 8)], [[Placement(1, (8, 8))]])
    with pytest.raises(ValueError, match="canvas 0, placement 0: src is 1, but there are 1 sources"):
        compose_boxes(boxes_of([1, 1, 5, 5]), plan)
    with pytest.raises(ValueError, match="nmax must not be negative, got -1"):
        compose_boxes(PaddedTargets.empty(2), plan, nmax=-1)
    with pytest.raises(ValueError, match="blend must be one of sum, over, got 'max'"):
        compose_boxes(PaddedTargets.empty(2), plan, blend="max")  # type: ignore[arg-type]
    leaf = PaddedTargets.empty(2, 1)
    leaf.boxes.requires_grad_()
    with pytest.raises(ValueError, match="boxes requires grad"):
        compose_boxes(leaf, plan)
