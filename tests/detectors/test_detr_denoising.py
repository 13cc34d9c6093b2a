"""Denoising queries and masks against a slow construction, image by image and object by object."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from no_sync import no_sync
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from ssod_fast.detectors.deformable_detr.criterion import DETRCriterion
from ssod_fast.detectors.deformable_detr.denoising import Denoising, count_groups, denoising_blocked, make_denoising
from ssod_fast.detectors.deformable_detr.groups import blocked_mask
from ssod_fast.ops import PackedTargets
from ssod_fast.structures import PaddedTargets, Target

CLASSES = 5


def some_targets(sizes: tuple[int, ...] = (2, 0, 3), seed: int = 0) -> PaddedTargets:
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for n in sizes:
        side = torch.rand(n, 2, generator=rng) * 0.3 + 0.05
        labels = torch.randint(CLASSES, (n,), generator=rng)
        rows.append(Target(boxes=torch.cat([torch.rand(n, 2, generator=rng) * 0.6 + 0.2, side], -1), labels=labels))
    return PaddedTargets.from_list(rows)


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def literal_mask(groups: list[int], matching: int) -> Tensor:
    owner = [i for i, size in enumerate(groups) for _ in range(size)] + [-1] * matching
    return torch.tensor([[a != b and b != -1 for b in owner] for a in owner])


@pytest.mark.parametrize(
    ("groups", "matching", "blocked"),
    [([2] * 5 + [6] * 2, 4, 480), ([2, 6, 6], 4, 176), ([6, 6], 0, 72), ([], 3, 0), ([3, 0, 2], 1, None)],
)
def test_a_query_sees_its_group_and_the_matching_queries(groups: list[int], matching: int, blocked: int | None) -> None:
    mask = blocked_mask(groups, matching)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, literal_mask(groups, matching))
    assert blocked is None or int(mask.sum()) == blocked
    with pytest.raises(ValueError, match=r"groups and matching must not be negative, got \[-1\] and 2"):
        blocked_mask([-1], 2)


def test_groups_by_the_most_objects_of_an_image() -> None:
    """Twice 100 denoising queries."""
    found = {most: (count_groups(100, most), 2 * most * count_groups(100, most)) for most in (1, 3, 7, 20, 100, 150)}
    assert found == {1: (100, 200), 3: (33, 198), 7: (14, 196), 20: (5, 200), 100: (1, 200), 150: (1, 300)}


def literal_queries(
    targets: PaddedTargets, number: int, label_noise: float, box_noise: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The same draws, applied one object at a time."""
    batch, most = len(targets), targets.nmax
    groups = max(number // most, 1)
    made_up = torch.randint(CLASSES, (batch, 1), generator=rng)
    shape = (batch, groups, 2, most)
    change, other = torch.rand(shape, generator=rng), torch.randint(CLASSES, shape, generator=rng)
    share, upwards = torch.rand((*shape, 4), generator=rng), torch.randint(2, (*shape, 4), generator=rng)
    labels, boxes = torch.full((batch, groups * 2 * most), -1), torch.full((batch, groups * 2 * most, 4), 0.5)
    for image, target in enumerate(targets.to_list()):
        known = list(zip(target["labels"].tolist(), target["boxes"], strict=True)) or [(int(made_up[image]), torch.full((4,), 0.5))]
        for group in range(groups):
            for negative in (0, 1):
                for row, (label, box) in enumerate(known):
                    at = (image, group, negative, row)
                    place = group * 2 * most + negative * most + row
                    labels[image, place] = other[at] if change[at] < label_noise / 2 else label
                    boxes[image, place] = _moved(box, share[at] + negative, upwards[at] * 2 - 1, box_noise)
    return labels, boxes


def _moved(box: Tensor, share: Tensor, sign: Tensor, noise: float) -> Tensor:
    x, y, w, h = box.tolist()
    corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
    new = [c + float(s * d) * half * noise for c, s, d, half in zip(corners, share, sign, [w / 2, h / 2] * 2, strict=True)]
    x1, y1, x2, y2 = (min(max(c, 0.0), 1.0) for c in new)
    return torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2, max(x2 - x1, 0.0), max(y2 - y1, 0.0)])


@pytest.mark.parametrize("box_noise", [0.4, 1.0])
@pytest.mark.parametrize("sizes", [(2, 0, 3), (1,), (0, 0), (7, 4)])
def test_queries_are_those_of_the_slow_construction(sizes: tuple[int, ...], box_noise: float) -> None:
    targets = some_targets(sizes) if max(sizes) else PaddedTargets.empty(len(sizes), 1)
    found = make_denoising(targets, CLASSES, number=6, label_noise=0.9, box_noise=box_noise, generator=generator())
    labels, boxes = literal_queries(targets, 6, 0.9, box_noise, generator())
    assert torch.equal(found.labels, labels)
    torch.testing.assert_close(found.boxes, boxes)
    assert found.labels.shape[1] == found.groups * found.size
    assert torch.equal(denoising_blocked(found, 4), literal_mask([found.size] * found.groups, 4))


def test_noise_keeps_positives_near_and_moves_negatives_away() -> None:
    """Shares of the half side: below the noise for positives, from it up to twice of it for negatives, as far as no border is near."""
    targets = PaddedTargets.from_list([Target(boxes=torch.tensor([[0.5, 0.5, 0.2, 0.1]]), labels=torch.tensor([3]))])
    found = make_denoising(targets, CLASSES, number=2000, box_noise=0.4, generator=generator())
    corners = box_convert(found.boxes.view(2000, 2, 4), "cxcywh", "xyxy")
    moves = (corners - torch.tensor([0.4, 0.45, 0.6, 0.55])).abs() / torch.tensor([0.1, 0.05, 0.1, 0.05])
    assert moves[:, 0].max() < 0.4 + 1e-4
    assert moves[:, 1].min() > 0.4 - 1e-4
    assert moves[:, 1].max() < 0.8 + 1e-4
    wrong = (found.labels != 3).float().mean()
    assert abs(float(wrong) - 0.25 * 4 / 5) < 0.03  # a new label may be the old one


def test_generator_alone_decides() -> None:
    def draw(rng: torch.Generator) -> Denoising:
        return make_denoising(some_targets(), CLASSES, number=6, generator=rng)

    state = torch.get_rng_state()
    first, second, other = draw(generator()), draw(generator()), draw(generator(8))
    assert torch.equal(first.boxes, second.boxes)
    assert not torch.equal(first.boxes, other.boxes)
    assert torch.equal(torch.get_rng_state(), state)
    few, many = generator(), generator()
    make_denoising(some_targets((1, 1, 3)), CLASSES, number=6, generator=few)
    make_denoising(some_targets((3, 3, 0)), CLASSES, number=6, generator=many)
    assert torch.equal(few.get_state(), many.get_state())


@pytest.mark.parametrize("most", [1, 2, 5])
def test_the_host_may_say_how_many_rows_there_are(most: int) -> None:
    targets = some_targets((2, 0, 3))
    found = make_denoising(targets, CLASSES, number=4, max_gt=most, generator=generator())
    assert found.size == 2 * most
    assert found.targets.nmax == most
    assert found.targets.count.tolist() == [min(2, most), 0, min(3, most)]
    assert found.real.tolist() == [True, False, True]


def literal_losses(logits: Tensor, boxes: Tensor, found: Denoising, c: DETRCriterion) -> dict[str, Tensor]:
    """Focal loss with dense targets of all rows of images with objects, box losses of the positive rows."""
    rows, groups = found.targets.nmax, found.groups
    positives = max(int(found.targets.count.sum()) * groups, 1)
    total = {"dn_loss_cls": logits.new_zeros(()), "dn_loss_l1": logits.new_zeros(()), "dn_loss_giou": logits.new_zeros(())}
    for image, target in enumerate(found.targets.to_list()):
        n = len(target["labels"])
        if not n:
            continue
        one_hot = torch.zeros_like(logits[:, image])
        for group in range(groups):
            for row in range(n):
                query = group * 2 * rows + row
                one_hot[:, query, target["labels"][row]] = 1
                ours, theirs = boxes[:, image, query], target["boxes"][row].to(boxes)
                total["dn_loss_l1"] = total["dn_loss_l1"] + c.l1_weight * (ours - theirs).abs().sum() / positives
                total["dn_loss_giou"] = total["dn_loss_giou"] + c.giou_weight * (1 - _giou(ours, theirs)).sum() / positives
        p = logits[:, image].sigmoid()
        focal = torch.where(one_hot == 1, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
        total["dn_loss_cls"] = total["dn_loss_cls"] + c.cls_weight * focal.sum() / positives
    return total


def _giou(ours: Tensor, theirs: Tensor) -> Tensor:
    return generalized_box_iou(box_convert(ours, "cxcywh", "xyxy"), box_convert(theirs[None], "cxcywh", "xyxy"))[:, 0]


def predictions(found: Denoising, layers: int = 2) -> tuple[Tensor, Tensor]:
    rng, shape = generator(3), (layers, *found.labels.shape)
    side = torch.rand(*shape, 2, generator=rng, dtype=torch.float64) * 0.3 + 0.05
    boxes = torch.cat([torch.rand(*shape, 2, generator=rng, dtype=torch.float64), side], -1)
    return torch.randn(*shape, CLASSES, generator=rng, dtype=torch.float64).requires_grad_(), boxes.requires_grad_()


@pytest.mark.parametrize("sizes", [(2, 0, 3), (0, 0), (4,)])
def test_losses_and_gradients_are_those_of_the_loops(sizes: tuple[int, ...]) -> None:
    """Padding rows of images with objects are background, images without objects have no share."""
    targets = some_targets(sizes) if max(sizes) else PaddedTargets.empty(len(sizes), 1)
    found = make_denoising(targets, CLASSES, number=6, generator=generator())
    leaves = predictions(found)
    ours, theirs = DETRCriterion().denoising_losses(*leaves, found), literal_losses(*leaves, found, DETRCriterion())
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-9)
    grads = torch.autograd.grad(sum(ours.values()), leaves)
    if max(sizes):
        for mine, other in zip(grads, torch.autograd.grad(sum(theirs.values()), leaves), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-9)
    for image in range(len(sizes)):
        assert bool(grads[0][:, image].any()) == (sizes[image] > 0)


def test_weights_of_targets_are_shares_of_their_losses() -> None:
    targets = some_targets((2,))
    soft = dataclasses.replace(targets, weights=targets.weights * 0.25)
    found, softened = (make_denoising(t, CLASSES, number=6, generator=generator()) for t in (targets, soft))
    leaves = predictions(found)
    full, part = (DETRCriterion().denoising_losses(*leaves, d) for d in (found, softened))
    torch.testing.assert_close(part["dn_loss_l1"], 0.25 * full["dn_loss_l1"])
    assert part["dn_loss_cls"] != full["dn_loss_cls"]


def test_nothing_waits_for_the_device() -> None:
    targets = some_targets()
    leaves = predictions(make_denoising(targets, CLASSES, number=6))
    with no_sync():
        found = make_denoising(targets, CLASSES, number=6, max_gt=3, generator=generator())
        packed, matches = found.matches(2)
        denoising_blocked(found, 4)
        sum(DETRCriterion().denoising_losses(*leaves, found).values()).backward()
    assert isinstance(packed, PackedTargets)
    assert matches.groups == found.groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"number": 0}, "number and num_classes must be at least 1, got 0 and 5"),
        ({"number": 5, "label_noise": 1.5}, r"label_noise must lie in \[0, 1\] and box_noise must not be negative, got 1.5 and 1.0"),
        ({"number": 5, "box_noise": -1}, "box_noise must not be negative, got 0.5 and -1"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_denoising(some_targets(), CLASSES, **options)
