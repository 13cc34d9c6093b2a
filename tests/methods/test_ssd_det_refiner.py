"""The refiner of SSD-Det against a literal one, its switches, and input that breaks careless code."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import ssd_det_literal as literal
import torch
from no_sync import no_sync
from ssd_det_cases import CLASSES, SIZES, gradients, make_levels, make_noisy, make_refiner, make_targets, make_uniforms
from torch import Tensor

from ssod_fast.methods.ssd_det import Levels, NoisyBoxes, Refined, Refiner
from ssod_fast.nn import pyramid
from ssod_fast.structures import Target

CPU = torch.device("cpu")
SWITCHES: list[dict[str, Any]] = [
    {},
    {"stage2_bag": "resample"},
    {"sisd": False},
    {"stage2_bag": "resample", "sisd": False},
    {"sisd_score": "cls_ins"},
    {"spsd2_weighted": False},
    {"ratios": (1.0, 1.1, 0.9), "shakes": (0.1, 0.15), "topk": 3, "sisd_weight": 0.25},
]
KEYS = ["loss_mil1", "loss_mil2", "loss_negative", "loss_sisd", "loss_spsd1", "loss_spsd2"]


def total(found: Refined) -> Tensor:
    return torch.stack(list(found.losses.values())).sum()


def pack(*boxes: list[float], dtype: torch.dtype = torch.float64) -> NoisyBoxes:
    """Boxes of the first image; the second has none."""
    rows = torch.tensor(boxes, dtype=dtype).reshape(-1, 4)
    none = Target(boxes=rows[:0], labels=torch.zeros(0, dtype=torch.int64))
    return NoisyBoxes.pack([Target(boxes=rows, labels=torch.arange(len(rows)) % CLASSES), none], SIZES, CPU)


@pytest.mark.parametrize("options", SWITCHES, ids=str)
def test_literal(options: dict[str, Any]) -> None:
    refiner, levels, targets, uniforms = make_refiner(**options), make_levels(), make_targets([3, 2]), make_uniforms()
    found = refiner(levels, NoisyBoxes.pack(targets, SIZES, CPU), uniforms)
    boxes, losses = literal.refine(refiner, list(levels.maps), targets, uniforms)
    torch.testing.assert_close(found.boxes, boxes)
    assert sorted(found.losses) == sorted(losses)
    for name, loss in losses.items():
        torch.testing.assert_close(found.losses[name], loss, msg=lambda text, name=name: f"{name}: {text}")
    assert all(loss > 1e-4 for loss in losses.values())
    parts = [*levels.maps, *refiner.parameters()]
    ours = torch.autograd.grad(total(found), parts, materialize_grads=True)
    theirs = torch.autograd.grad(torch.stack(list(losses.values())).sum(), parts, materialize_grads=True)
    torch.testing.assert_close(ours, theirs)


def test_refining_alone_gives_the_same_boxes() -> None:
    refiner, levels, noisy = make_refiner(), make_levels(), make_noisy([3, 2])
    kept: list[bool] = []
    assert refiner.fc_iou is not None
    refiner.fc_iou.register_forward_hook(lambda _, args, out: kept.append(out.requires_grad))
    trained, alone = refiner(levels, noisy, make_uniforms()), refiner.refine(levels, noisy)
    assert kept == [True, False]
    torch.testing.assert_close(alone.boxes, trained.boxes)
    torch.testing.assert_close(alone.scores, trained.scores)
    assert alone.losses == {}
    assert not alone.boxes.requires_grad
    assert not trained.boxes.requires_grad
    assert ((trained.scores > 0) & (trained.scores < 1)).all()


@pytest.mark.parametrize("resampled", [False, True])
def test_every_layer_learns(resampled: bool) -> None:
    refiner, levels = make_refiner(stage2_bag="resample" if resampled else "regress"), make_levels()
    total(refiner(levels, make_noisy([3, 2]), make_uniforms())).backward()
    names = {name.partition(".")[0] for name, _ in refiner.named_parameters()}
    ours = "fc_distill_reg_re" if resampled else "fc_reg"
    assert names == {"shared_fcs", "objness_2fcs", "fc_cls", "fc_ins", "fc_distill_reg_ori", "fc_iou", ours}
    for name, grad in gradients(refiner).items():
        # Instance scores are free up to a constant per bag and class.
        assert (grad != 0).any() or ("fc_ins" in name and name.endswith("bias")), name
    assert all(m.grad is not None and (m.grad != 0).any() for m in levels.maps[:2])


def test_layers_that_a_switch_leaves_out() -> None:
    plain = make_refiner(sisd=False)
    assert plain.objness_2fcs is None
    assert plain.fc_iou is None
    assert "loss_sisd" not in plain(make_levels(), make_noisy([1, 1]), make_uniforms()).losses


def test_initial_weights() -> None:
    refiner = Refiner(dataclasses.replace(make_refiner().config, hidden=1024, ratios=(1.0,)), 64, 20)
    assert refiner.shared_fcs[1].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert refiner.shared_fcs[0].weight.std().item() == pytest.approx(0.02, rel=0.02)  # a quarter of 256 channels
    assert refiner.fc_cls[0].bias.tolist() == pytest.approx([-4.59512] * 21)
    assert refiner.fc_ins[1].bias.abs().sum() == 0


# Images of any number of boxes


@pytest.mark.parametrize("counts", [[0, 3], [3, 0], [1, 1]])
def test_images_without_boxes(counts: list[int]) -> None:
    refiner, levels, targets, uniforms = make_refiner(), make_levels(), make_targets(counts), make_uniforms()
    found = refiner(levels, NoisyBoxes.pack(targets, SIZES, CPU), uniforms)
    boxes, losses = literal.refine(refiner, list(levels.maps), targets, uniforms)
    torch.testing.assert_close(found.boxes, boxes)
    torch.testing.assert_close(dict(found.losses), losses, check_dtype=False)


@pytest.mark.parametrize("options", SWITCHES[:4], ids=str)
def test_batch_without_boxes(options: dict[str, Any]) -> None:
    refiner, levels = make_refiner(**options), make_levels()
    found = refiner(levels, make_noisy([0, 0], clean=True), make_uniforms())
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == (0,)
    assert found.diagnostics == {}
    assert all(loss == 0 for loss in found.losses.values())
    total(found).backward()
    grads = gradients(refiner)
    assert len(grads) == len(list(refiner.parameters()))  # ranks of a distributed run agree on what to average
    assert all((grad == 0).all() for grad in grads.values())


def test_images_are_independent() -> None:
    refiner, levels, targets = make_refiner(), make_levels(), make_targets([3, 2])
    both = refiner.refine(levels, NoisyBoxes.pack(targets, SIZES, CPU))
    for i, rows in enumerate((slice(0, 3), slice(3, 5))):
        own = Levels([m[i : i + 1] for m in levels.maps], levels.strides)
        alone = refiner.refine(own, NoisyBoxes.pack(targets[i : i + 1], SIZES[i : i + 1], CPU))
        torch.testing.assert_close(alone.boxes, both.boxes[rows])
        torch.testing.assert_close(alone.scores, both.scores[rows])


@pytest.mark.parametrize("resampled", [False, True])
def test_parts_give_what_the_whole_gives(resampled: bool) -> None:
    options = {"stage2_bag": "resample" if resampled else "regress"}
    levels, noisy, uniforms = make_levels(), make_noisy([3, 2]), make_uniforms(40)
    results = []
    for size in (8192, 33):
        refiner = make_refiner(rois_per_pass=size, **options)
        found = refiner(levels, noisy, uniforms)
        total(found).backward()
        results.append((found, gradients(refiner), [m.grad for m in levels.maps]))
        for m in levels.maps:
            m.grad = None
    (whole, grads, grads_maps), (parts, grads_parts, grads_maps_parts) = results
    torch.testing.assert_close(parts.boxes, whole.boxes)
    torch.testing.assert_close(dict(parts.losses), dict(whole.losses))
    torch.testing.assert_close(grads_parts, grads)
    torch.testing.assert_close(grads_maps_parts, grads_maps)


def kept_for_backward(size: int) -> int:
    """Elements of the largest tensor that backward keeps."""
    largest = 0

    def pack_hook(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel() if tensor.requires_grad or tensor.grad_fn is not None else 0)
        return tensor

    refiner = make_refiner(rois_per_pass=size)
    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        refiner(make_levels(), make_noisy([6, 6]), make_uniforms())
    return largest


def test_parts_keep_no_pooled_features() -> None:
    rois = 12 * 20
    assert kept_for_backward(8192) == rois * 4 * 49
    assert kept_for_backward(50) < rois * 4 * 49 // 2


# Boxes that break careless code


def test_bags_without_a_valid_proposal() -> None:
    """Far outside of the image, zero area, and larger than the image, beside a good one."""
    refiner, levels, uniforms = make_refiner(), make_levels(), make_uniforms()
    good = [20.0, 20, 60, 70]
    bad = [[500.0, 500, 540, 530], [50, 50, 50, 90], [30, 30, 30, 30]]
    noisy = pack(good, *bad)
    found = refiner(levels, noisy, uniforms)
    assert found.boxes.isfinite().all()
    assert torch.equal(found.boxes[1:], noisy.boxes[1:])  # nothing better is known
    total(found).backward()
    assert all(grad.isfinite().all() for grad in gradients(refiner).values())
    first = refiner._stage_one(levels, refiner._distill(levels, neighbours_of(refiner, noisy), noisy)[0], noisy)
    assert torch.equal(first.boxes[1:], noisy.boxes[1:])
    assert (first.confidence[1:] == 0).all()
    assert first.confidence[0] > 0
    alone = refiner(levels, pack(good), uniforms)
    torch.testing.assert_close(found.losses["loss_mil1"], alone.losses["loss_mil1"])  # others are left out, from the mean too
    torch.testing.assert_close(found.losses["loss_mil2"], alone.losses["loss_mil2"] / 4)  # their weight is 0


def neighbours_of(refiner: Refiner, noisy: NoisyBoxes) -> Any:
    from ssod_fast.methods.ssd_det.bags import neighbours

    return neighbours(noisy.boxes, noisy, refiner.config)


def test_a_box_larger_than_the_image() -> None:
    noisy = pack([-60.0, -60, 400, 330])
    found = make_refiner()(make_levels(), noisy, make_uniforms())
    assert all(loss.isfinite() for loss in found.losses.values())
    assert found.losses["loss_mil1"] == 0
    h, w = SIZES[0]
    inside = found.boxes[0]
    assert (inside >= 0).all()
    assert inside[2] <= w
    assert inside[3] <= h


def test_official_constant_of_empty_bags() -> None:
    noisy = pack([20.0, 20, 60, 70], [500, 500, 540, 530])
    masked, official = (make_refiner(mask_empty_bags=m)(make_levels(), noisy, make_uniforms()).losses["loss_mil1"] for m in (True, False))
    torch.testing.assert_close(official, masked + 25)


def test_a_constant_overlap() -> None:
    """All proposals of the bag count where predicted overlaps say nothing."""
    refiner = make_refiner()
    assert refiner.fc_iou is not None
    torch.nn.init.zeros_(refiner.fc_iou.weight)
    found = refiner(make_levels(), make_noisy([2, 1]), make_uniforms())
    assert found.boxes.isfinite().all()
    by_class = make_refiner(sisd_score="cls")
    by_class.load_state_dict(refiner.state_dict())
    torch.testing.assert_close(by_class.refine(make_levels(), make_noisy([2, 1])).boxes, found.boxes)


def test_runaway_regression_stays_bounded() -> None:
    """Deltas at their limit make boxes thousands of pixels wide, which must not be pooled point by point."""
    refiner, noisy = make_refiner(), make_noisy([2, 1])
    torch.nn.init.constant_(refiner.fc_distill_reg_ori.bias, 1e4)
    assert refiner.fc_reg is not None
    torch.nn.init.constant_(refiner.fc_reg[0].bias, 1e4)
    found = refiner(make_levels(), noisy, make_uniforms())
    assert found.boxes.isfinite().all()
    with torch.no_grad():
        refiner.fc_distill_reg_ori.bias.fill_(float("nan"))
    assert torch.equal(refiner.refine(make_levels(), noisy).boxes, noisy.boxes)  # a broken network invents no boxes


def test_negatives_keep_away_from_boxes_left_out() -> None:
    refiner, levels, noisy, uniforms = make_refiner(), make_levels(), make_noisy([1, 0]), make_uniforms(200)
    others = make_noisy([3, 2], seed=9)
    alone, beside = (refiner(levels, noisy, uniforms, left).losses["loss_negative"] for left in (None, others))
    assert 0 < beside < alone
    nothing = pack([-500.0, -500, -400, -400])
    torch.testing.assert_close(refiner(levels, noisy, uniforms, nothing).losses["loss_negative"], alone)


def test_without_negatives() -> None:
    found = make_refiner()(make_levels(), make_noisy([1, 1]), make_uniforms(0))
    assert found.losses["loss_negative"] == 0
    assert found.losses["loss_negative"].requires_grad


# Numerics and waiting


def test_bfloat16_islands() -> None:
    """Boxes, codec and normalised scores stay float32 under autocast; results are near those of float32."""
    refiner, levels = make_refiner(dtype=torch.float32), make_levels(torch.float32)
    noisy, uniforms = make_noisy([3, 2], dtype=torch.float32), make_uniforms(dtype=torch.float32)
    wide = refiner(levels, noisy, uniforms)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = refiner(levels, noisy, uniforms)
    assert half.boxes.dtype == half.scores.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in half.losses.values())
    torch.testing.assert_close(dict(half.losses), dict(wide.losses), rtol=0.1, atol=0.02)
    assert (half.boxes - wide.boxes).abs().max() < 4
    total(half).backward()
    assert all(grad.isfinite().all() for grad in gradients(refiner).values())


@pytest.mark.parametrize("options", SWITCHES[:4], ids=str)
def test_no_wait(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyramid, "_pool_chosen", pyramid._pool_all)  # as on a device
    refiner, levels, uniforms = make_refiner(rois_per_pass=50, **options), make_levels(), make_uniforms()
    targets = make_targets([3, 2], clean=True)
    with no_sync():
        noisy = NoisyBoxes.pack(targets, SIZES, CPU)
        found = refiner(levels, noisy, uniforms)
        total(found).backward()
        refiner.refine(levels, noisy)
    assert sorted(found.diagnostics)


def test_diagnostics() -> None:
    refiner, levels, noisy = make_refiner(), make_levels(), make_noisy([3, 2], clean=True)
    found = refiner(levels, noisy, make_uniforms())
    stages = [f"bag{i}{best}_iou" for i in range(3) for best in ("", "_max")]
    assert sorted(found.diagnostics) == sorted([*stages, "noisy_iou", "stage1_iou", "refined_iou"])
    assert all(0 < value < 1 and not value.requires_grad for value in found.diagnostics.values())
    assert found.diagnostics["bag0_max_iou"] > found.diagnostics["bag0_iou"]
    assert found.diagnostics["bag0_max_iou"] >= found.diagnostics["noisy_iou"]  # the noisy box is in its bag
    blind = refiner(levels, dataclasses.replace(noisy, clean=None), make_uniforms())
    assert blind.diagnostics == {}
    torch.testing.assert_close(dict(blind.losses), dict(found.losses))  # no loss reads them


def test_packing() -> None:
    targets = make_targets([3, 2])
    noisy = NoisyBoxes.pack(targets, SIZES, CPU)
    assert len(noisy) == 5
    assert noisy.image.tolist() == [0, 0, 0, 1, 1]
    assert noisy.offsets.tolist() == [0, 3, 5]
    assert noisy.own_hw.tolist() == [[180, 230]] * 3 + [[256, 200]] * 2
    with pytest.raises(ValueError, match="targets must have one entry per image, expected 2, got 1"):
        NoisyBoxes.pack(targets[:1], SIZES, CPU)


def test_dividing() -> None:
    noisy = make_noisy([5, 2])
    assert noisy.divide(5, torch.Generator()) is None
    parts = noisy.divide(3, torch.Generator().manual_seed(0))
    assert parts is not None
    rows, counts, others, other_counts = parts
    assert (counts, other_counts) == ((3, 2), (2, 0))
    assert sorted([*rows.tolist(), *others.tolist()]) == list(range(7))
    assert rows.tolist() == sorted(rows.tolist())
    assert rows.tolist()[3:] == [5, 6]
    taken = noisy.take(rows, counts)
    assert torch.equal(taken.boxes, noisy.boxes[rows])
    assert taken.offsets.tolist() == [0, 3, 5]
    draws = {tuple(noisy.divide(3, torch.Generator().manual_seed(seed))[0].tolist()) for seed in range(8)}  # type: ignore[index]
    assert len(draws) > 3
