from __future__ import annotations

from typing import Any

import pytest
import torch
from criterion_cases import QUERIES, golden
from no_sync import no_sync
from torch import Tensor

from ssod_fast.criterion import HungarianMatcher
from ssod_fast.ops import match, pack_targets


def sample(sizes: tuple[int, ...] = (3, 0, 6), queries: int = 12, layers: int = 0) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    lead = (layers, len(sizes)) if layers else (len(sizes),)
    rng = torch.Generator().manual_seed(0)
    outputs = {
        "pred_logits": torch.randn(*lead, queries, 4, generator=rng),
        "pred_boxes": torch.rand(*lead, queries, 4, generator=rng) * 0.4 + 0.2,
    }
    targets = [{"labels": torch.randint(0, 4, (n,), generator=rng), "boxes": torch.rand(n, 4, generator=rng) * 0.4 + 0.2} for n in sizes]
    return outputs, targets


def test_golden() -> None:
    logits, boxes, targets = golden()
    ((i, j),) = HungarianMatcher()({"logits": logits, "pred_boxes": boxes}, targets)
    assert (i.tolist(), j.tolist()) == (sorted(QUERIES), [1, 0])


def test_contract_of_forward() -> None:
    outputs, targets = sample()
    pairs = HungarianMatcher()(outputs, targets)
    assert [len(i) for i, _ in pairs] == [3, 0, 6]
    for (i, j), target in zip(pairs, targets, strict=True):
        assert i.dtype == j.dtype == torch.int64
        assert (i.diff() > 0).all()
        assert sorted(j.tolist()) == list(range(len(target["labels"])))
    renamed = {"logits": outputs["pred_logits"], "pred_boxes": outputs["pred_boxes"]}
    other = HungarianMatcher()(renamed, [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets])
    assert all(torch.equal(a, b) for x, y in zip(pairs, other, strict=True) for a, b in zip(x, y, strict=True))


def test_fewer_queries_than_targets() -> None:
    outputs, targets = sample((7, 2), queries=4)
    for i, j in HungarianMatcher()(outputs, targets)[:1]:
        assert i.tolist() == [0, 1, 2, 3]
        assert len(set(j.tolist())) == 4


def test_options_reach_the_op() -> None:
    outputs, targets = sample()
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    options: dict[str, Any] = {
        "class_mode": "softmax",
        "alpha": 0.4,
        "gamma": 1.5,
        "eps": 1e-6,
        "groups": 2,
        "repeats": 2,
        "invalid": "drop",
    }
    ours = HungarianMatcher(1, 3, 4, **options).match(outputs, targets)
    expected = match(logits, boxes, targets, w_class=1, w_box=3, w_giou=4, **options)
    assert torch.equal(ours.query, expected.query)
    assert torch.equal(ours.cost, expected.cost)
    assert (ours.groups, ours.repeats) == (2, 2)
    assert not torch.equal(ours.query, match(logits, boxes, targets, groups=2, repeats=2).query)


def test_all_layers_at_once() -> None:
    outputs, targets = sample(layers=3)
    matcher = HungarianMatcher()
    matches = matcher.match(outputs, targets)
    assert matches.query.shape == (3, 1, 9)
    for layer in range(3):
        single = matcher.match({name: value[layer] for name, value in outputs.items()}, targets)
        assert torch.equal(matches.query[layer], single.query[0])
    with pytest.raises(ValueError, match=r"outputs must be of one layer, got 3: use match\(\) for all layers at once"):
        matcher(outputs, targets)


def test_neither_gradient_nor_autocast_matters() -> None:
    outputs, targets = sample()
    expected = HungarianMatcher().match(outputs, targets)
    leaves = {name: value.requires_grad_() for name, value in outputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        matches = HungarianMatcher().match(leaves, targets)
    assert torch.equal(matches.cost, expected.cost)
    assert not matches.cost.requires_grad
    assert list(HungarianMatcher().parameters()) == []


def test_compile() -> None:
    outputs, targets = sample(layers=2)
    matcher, packed = HungarianMatcher(), pack_targets(targets)

    def function(logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        matches = matcher.match({"logits": logits, "pred_boxes": boxes}, packed)
        return matches.query, matches.cost

    inputs = (outputs["pred_logits"].requires_grad_(), outputs["pred_boxes"])
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs), function(*inputs))


def test_classic_contract_without_a_sync() -> None:
    outputs, targets = sample()
    with no_sync():
        pairs = HungarianMatcher()(outputs, targets)
    assert sum(len(i) for i, _ in pairs) == 9
    same = HungarianMatcher(index_device="cpu")(outputs, targets)
    assert all(torch.equal(a, b) for x, y in zip(pairs, same, strict=True) for a, b in zip(x, y, strict=True))


def test_invalid_predictions() -> None:
    outputs, targets = sample((3,), queries=4)
    outputs["pred_logits"][0, :2] = torch.nan
    assert [len(i) for i, _ in HungarianMatcher()(outputs, targets)] == [3]
    assert [len(i) for i, _ in HungarianMatcher(invalid="drop")(outputs, targets)] == [2]
    with pytest.raises(ValueError, match="logits or boxes give NaN or infinite costs that no complete matching avoids"):
        HungarianMatcher(invalid="raise")(outputs, targets)


def test_boxes_alone() -> None:
    outputs, targets = sample()
    matches = HungarianMatcher(class_mode="none").match({"pred_boxes": outputs["pred_boxes"]}, targets)
    assert torch.equal(matches.query, match(None, outputs["pred_boxes"], targets, class_mode="none").query)
    assert torch.equal(matches.query, HungarianMatcher(class_mode="none").match(outputs, targets).query)


def test_boxes_in_pixels() -> None:
    outputs, targets = sample()
    sizes = torch.tensor([[480.0, 640], [333, 500], [800, 600]])
    scale = sizes.flip(-1).repeat(1, 2)  # (w, h, w, h)
    pixels = {**outputs, "pred_boxes": outputs["pred_boxes"] * scale[:, None]}
    in_pixels = [{**t, "boxes": t["boxes"] * factor} for t, factor in zip(targets, scale, strict=True)]
    matcher = HungarianMatcher(giou_eps_mode="max")
    found = matcher.match(pixels, in_pixels, image_hw=sizes)
    torch.testing.assert_close(found.cost, HungarianMatcher().match(outputs, targets).cost, atol=1e-4, rtol=1e-4)
    pairs = matcher(pixels, in_pixels, image_hw=sizes)
    assert all(torch.equal(a, b) for x, y in zip(pairs, found.pairs(), strict=True) for a, b in zip(x, y, strict=True))
    corners = match(outputs["pred_logits"], pixels["pred_boxes"], in_pixels, image_hw=sizes, box_format="xyxy")
    assert torch.equal(corners.cost, HungarianMatcher(box_format="xyxy").match(pixels, in_pixels, sizes).cost)


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"class_mode": "bce"}, ValueError, "class_mode must be one of"),
    ({"gamma": -1.0}, ValueError, r"gamma must be a finite number >= 0, got -1\.0"),
    ({"alpha": "1"}, ValueError, "alpha must be a finite number, got '1'"),
    ({"eps": 0.0}, ValueError, "eps must lie in"),
    ({"cost_bbox": float("nan")}, ValueError, "cost_bbox must be a finite number, got nan"),
    ({"cost_class": "2"}, ValueError, "cost_class must be a finite number, got '2'"),
    ({"box_format": "yx"}, ValueError, "box_format must be one of"),
    ({"giou_eps_mode": "tiny"}, ValueError, "eps_mode must be one of"),
    ({"groups": 2.0}, TypeError, r"groups must be an int, got 2\.0"),
    ({"groups": 0}, ValueError, "groups must be >= 1, got 0"),
    ({"repeats": 1.5}, TypeError, r"repeats must be an int, got 1\.5"),
    ({"repeats": 2**40}, ValueError, "repeats must be at most 4096, got 1099511627776"),
    ({"invalid": "ignore"}, ValueError, "invalid must be one of 'keep', 'drop', 'raise', got 'ignore'"),
    ({"class_mode": ["focal"]}, ValueError, "class_mode must be one of"),
    ({"invalid": None}, ValueError, "invalid must be one of"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=str)
def test_options_are_checked_at_once(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HungarianMatcher(**options)


@pytest.mark.gpu
def test_targets_of_the_host_and_predictions_of_the_device() -> None:
    outputs, targets = sample()
    expected = HungarianMatcher()(outputs, targets)
    outputs = {name: value.cuda() for name, value in outputs.items()}
    with no_sync():
        pairs = HungarianMatcher()(outputs, targets)
    for (i, j), (k, m) in zip(pairs, expected, strict=True):
        assert i.is_cuda
        assert i.tolist() == k.tolist()
        assert j.tolist() == m.tolist()
    assert all(not i.is_cuda for i, _ in HungarianMatcher(index_device="cpu")(outputs, targets))


def test_bad_input() -> None:
    outputs, targets = sample()
    with pytest.raises(ValueError, match="cost_class, cost_bbox and cost_giou must not all be 0"):
        HungarianMatcher(0, 0, 0)
    with pytest.raises(ValueError, match="index_device must be 'same' or 'cpu', got 'cuda'"):
        HungarianMatcher(index_device="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"outputs must have 'logits' or 'pred_logits', and 'pred_boxes', got the keys \['pred_boxes'\]"):
        HungarianMatcher()({"pred_boxes": outputs["pred_boxes"]}, targets)
    with pytest.raises(ValueError, match=r"groups must be >= 1 and divide the number of queries \(12\), got 5"):
        HungarianMatcher(groups=5)(outputs, targets)
    with pytest.raises(ValueError, match="targets must be of as many images as boxes, 3, got 2"):
        HungarianMatcher()(outputs, targets[:2])
    with pytest.raises(TypeError, match="outputs must be a mapping with 'logits' or 'pred_logits', and 'pred_boxes', got tuple"):
        HungarianMatcher()(tuple(outputs.values()), targets)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"outputs must have 'pred_boxes', got the keys \['boxes'\]"):
        HungarianMatcher(class_mode="none")({"boxes": outputs["pred_boxes"]}, targets)
    shown = "cost_class=2, cost_bbox=5, cost_giou=2, class_mode='focal', box_format='xyxy', groups=3, repeats=2, invalid='drop'"
    assert shown in repr(HungarianMatcher(box_format="xyxy", groups=3, repeats=2, invalid="drop"))
    assert pack_targets(targets).sizes == (3, 0, 6)
