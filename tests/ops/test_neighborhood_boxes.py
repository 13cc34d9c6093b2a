from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from bag_cases import COCO_RATIOS, literal_bag, noisy_boxes
from box_cases import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import no_sync
from tolerances import assert_close
from torch import Tensor

from ssod_fast.ops import NeighborhoodBoxes, encode_boxes, neighborhood_boxes, paired_box_iou

COCO: dict[str, Any] = {"ratios": COCO_RATIOS, "shakes": (0.2,)}
ALL: dict[str, Any] = {"rois": True, "iof": True, "iou": True, "targets_std": (0.1, 0.1, 0.2, 0.2), "clip": True}
BOX = (100.0, 60.0, 180.0, 160.0)
BAG = {  # of BOX, by position
    0: (100, 60, 180, 160),
    1: (84, 60, 164, 160),
    2: (116, 60, 196, 160),
    3: (100, 40, 180, 140),
    4: (100, 80, 180, 180),
    5: (100, 50, 180, 170),
    6: (84, 50, 164, 170),
    9: (100, 74, 180, 194),
    24: (100, 89, 180, 159),
    25: (92, 60, 188, 160),
    26: (72.8, 60, 168.8, 160),
    62: (108.8, 45, 212.8, 175),
    120: (112, 75, 168, 145),
    121: (100.8, 75, 156.8, 145),
    124: (112, 89, 168, 159),
}
SMALL_BAG = {1: (92, 60, 172, 160), 2: (108, 60, 188, 160), 3: (100, 50, 180, 150), 4: (100, 70, 180, 170), 5: (100, 55, 180, 165)} | {
    9: (100, 66, 180, 176),
    10: (100, 65, 180, 155),
    44: (104, 74, 176, 164),
}


def bag_of(box: tuple[float, ...], hw: tuple[float, float], device: str = "cpu", **options: Any) -> NeighborhoodBoxes:
    """The bag of one box in one image."""
    index = torch.zeros(1, dtype=torch.int64, device=device)
    return neighborhood_boxes(torch.tensor([box], device=device), index, torch.tensor([hw], device=device), **options)


def assert_rows(bag: Tensor, expected: dict[int, tuple[float, ...]]) -> None:
    torch.testing.assert_close(bag[0, list(expected)].cpu(), torch.tensor([*expected.values()]).to(bag.dtype), atol=5e-4, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_golden_bag_of_coco(device: str) -> None:
    bag = bag_of(BOX, (400, 500), device, **COCO, **ALL)
    assert bag.boxes.shape == (1, 125, 4)
    assert bag.valid.all()
    assert_rows(bag.boxes, BAG)
    torch.testing.assert_close(bag.boxes.sum(1)[0].cpu(), torch.tensor([12500.0, 7500, 22500, 20000]), atol=0.01, rtol=0)
    assert bag.iou is not None
    iou = {0: 1, 1: 2 / 3, 5: 0.8333333, 6: 0.5714286, 62: 0.4944376, 124: 0.49}
    torch.testing.assert_close(bag.iou[0, list(iou)].cpu(), torch.tensor([*iou.values()], dtype=torch.float32), atol=1e-5, rtol=0)
    assert bag.iou.mean().item() == pytest.approx(0.5875, abs=5e-5)
    assert bag.iou.min().item() == pytest.approx(0.4841, abs=5e-5)
    assert bag.targets is not None
    torch.testing.assert_close(bag.targets.abs().mean(1)[0].cpu(), torch.tensor([0.8, 0.8, 1.024504, 1.024504]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_golden_bags(device: str) -> None:
    bag = bag_of(BOX, (400, 500), device, ratios=[1, 1.1, 0.9], shakes=[0.1])
    assert bag.valid.sum() == bag.boxes.shape[1] == 45
    assert_rows(bag.boxes, SMALL_BAG)
    torch.testing.assert_close(bag.boxes.sum(1)[0].cpu(), torch.tensor([4500.0, 2700, 8100, 7200]), atol=0.01, rtol=0)
    bag = bag_of(BOX, (400, 500), device, ratios=[1, 0.5], shakes=[])
    assert_rows(bag.boxes, dict(enumerate([(100, 60, 180, 160), (100, 85, 180, 135), (120, 60, 160, 160), (120, 85, 160, 135)])))
    bag = bag_of(BOX, (400, 500), device, ratios=[1], shakes=[0.1, 0.2])
    near = [BOX, (92, 60, 172, 160), (108, 60, 188, 160), (100, 50, 180, 150), (100, 70, 180, 170)]
    far = [(84, 60, 164, 160), (116, 60, 196, 160), (100, 40, 180, 140), (100, 80, 180, 180)]
    assert_rows(bag.boxes, dict(enumerate(near + far)))


@pytest.mark.parametrize("device", DEVICES)
def test_golden_boxes_beyond_the_image_and_without_area(device: str) -> None:
    bag = bag_of((-10, -20, 110, 70), (50, 100), device, ratios=[1], shakes=[0.2], iof=True)
    assert bag.iof is not None
    torch.testing.assert_close(bag.iof[0].cpu(), torch.tensor([0.462963, 0.398148, 0.398148, 0.462963, 0.462963]), atol=1e-6, rtol=0)
    assert not bag.valid.any()
    bag = bag_of((50, 50, 50, 90), (100, 100), device, ratios=[1], shakes=[0.2], **ALL)
    assert_rows(bag.boxes, dict(enumerate([(50, 50, 50, 90)] * 3 + [(50, 42, 50, 82), (50, 58, 50, 98)])))
    assert not bag.valid.any()
    assert all(output.isfinite().all() for output in bag if output is not None)
    assert bag.iof is not None
    assert (bag.iof == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shakes", [(0.2,), (), (0.1, 0.25)])
def test_literal_sampler(device: str, shakes: tuple[float, ...]) -> None:
    """Boxes within 5e-4 px, and equal flags away from the threshold."""
    sizes = [(800, 1333), (600, 1000), (480, 640)]
    boxes = torch.cat([noisy_boxes(40, hw, seed=i) for i, hw in enumerate(sizes)])
    image = torch.arange(3).repeat_interleave(40)
    options: dict[str, Any] = {"ratios": COCO_RATIOS, "shakes": shakes, "iof": True}
    bag = neighborhood_boxes(boxes.to(device), image.to(device), torch.tensor(sizes, device=device), **options)
    assert bag.iof is not None
    for g in range(120):
        expected, share = literal_bag(boxes[g], sizes[g // 40], COCO_RATIOS, shakes)
        torch.testing.assert_close(bag.boxes[g].cpu().double(), expected, atol=5e-4, rtol=0)
        clear = (share - 0.7).abs() > 3e-4
        assert torch.equal(bag.valid[g].cpu()[clear], (share > 0.7)[clear])
        torch.testing.assert_close(bag.iof[g].cpu().double(), share, atol=3e-4, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_reference(device: str, dtype: torch.dtype) -> None:
    """All outputs of odd boxes, owners out of range and offsets, against the reference on the same device."""
    boxes = noisy_boxes(38, dtype=dtype)
    boxes[3, 2], boxes[4, 0], boxes[5, 2], boxes[6, 2] = torch.nan, torch.inf, boxes[5, 0] - 4, boxes[6, 0]
    boxes[7] = boxes[7].flip(0)
    hw = torch.tensor([[800, 1333], [500, 400], [0, 0]], dtype=dtype)
    boxes, owner = boxes.to(device), (torch.arange(38, device=device) % 5) - 1
    for image, offsets in ((owner, None), (None, torch.tensor([2, 7, 7, 30], device=device))):
        arguments = (image, offsets, hw.to(device), [1.0, 0.7, 1.3], [0.2, 0.05], 0.7, True, True, True, [0.1, 0.1, 0.2, 0.2], True)
        op = torch.ops.ssod_fast.neighborhood_boxes.default
        expected = plain(boxes, *arguments)
        for actual, wanted in zip(op(boxes, *arguments), expected, strict=True):
            assert_close(actual, wanted, equal_nan=True)


ODD_SIZES = ((torch.nan, 500.0), (400.0, torch.nan), (torch.nan, torch.nan), (torch.inf, 500.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_whose_size_is_not_finite(device: str, dtype: torch.dtype) -> None:
    """Nothing is inside of an image of NaN size, whichever side it is; one that ends nowhere holds what does not begin before it."""
    boxes, hw = noisy_boxes(40, (400, 500), dtype=dtype).to(device), torch.tensor(ODD_SIZES, dtype=dtype, device=device)
    owner = torch.arange(40, device=device) // 10
    result = neighborhood_boxes(boxes, owner, hw, **COCO, iof=True, clip=True)
    assert result.iof is not None
    assert not result.valid[:30].any()
    assert result.iof[:30].isnan().all()
    assert result.valid[30:].any()
    arguments = (boxes, owner, None, hw, [*COCO_RATIOS], [0.2], 0.7, True, True, True, [0.1, 0.1, 0.2, 0.2], True)
    for actual, expected in zip(torch.ops.ssod_fast.neighborhood_boxes(*arguments), plain(*arguments), strict=True):
        assert_close(actual, expected, equal_nan=True)


def test_sizes_in_a_list() -> None:
    with pytest.raises(TypeError, match=r"image_hw must be a tensor \[B, 2\].*torch\.tensor\(\[\[h, w\]\]\), got list"):
        neighborhood_boxes(noisy_boxes(1), torch.tensor([0]), [[800, 1333]], **COCO)  # type: ignore[arg-type]


def test_many_bad_values_are_not_all_shown() -> None:
    with pytest.raises(ValueError, match=r"got \[0, 1, 2, 3, 4, 5, 6, 7, \.\.\. \(5000 values\)\]$"):
        neighborhood_boxes(noisy_boxes(1), None, torch.ones(4999, 2), **COCO, offsets=torch.arange(5000))


def plain(*arguments: Any) -> Any:
    """The reference, whatever kernels are loaded."""
    return importlib.import_module("ssod_fast.ops.neighborhood_boxes")._reference(*arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_outputs_belong_together(device: str) -> None:
    boxes, hw = noisy_boxes(30).to(device), torch.tensor([[800.0, 1333.0]], device=device)
    image = torch.zeros(30, dtype=torch.int32, device=device)
    bag = neighborhood_boxes(boxes, image, hw, **COCO, **ALL)
    assert bag.rois is not None
    assert bag.iof is not None
    assert bag.iou is not None
    assert bag.targets is not None
    assert bag.clipped is not None
    assert torch.equal(bag.rois[:, 1:], bag.boxes.flatten(0, 1))
    assert (bag.rois[:, 0] == 0).all()
    assert torch.equal(bag.valid, bag.iof > 0.7)
    assert torch.equal(bag.iou, paired_box_iou(bag.boxes, boxes[:, None], eps_mode="max", eps=1e-6))
    torch.testing.assert_close(bag.targets, encode_boxes(bag.boxes, boxes[:, None]), atol=1e-3, rtol=1e-3)
    limit = hw.flip(1).repeat(1, 2)
    assert torch.equal(bag.clipped, torch.minimum(bag.boxes.clamp(min=0), limit))
    for name in ("rois", "iof", "iou", "clip", "targets_std"):
        alone = neighborhood_boxes(boxes, image, hw, **COCO, **{name: ALL[name]})
        field = {"clip": "clipped", "targets_std": "targets"}.get(name, name)
        assert torch.equal(getattr(alone, field), getattr(bag, field))
        assert sum(output is not None for output in alone) == 3
    assert neighborhood_boxes(boxes, image, hw, **COCO)[2:] == (None,) * 5


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.floats(0.3, 3), min_size=1, max_size=4),
    st.lists(st.floats(0.01, 0.5), max_size=3),
)
def test_laws(seed: int, ratios: list[float], shakes: list[float]) -> None:
    """Sums, translation, order of images, monotony of the flags."""
    mean = sum(ratios) / len(ratios)
    ratios = [r / mean for r in ratios]  # average 1
    boxes, hw = noisy_boxes(9, seed=seed, dtype=torch.float64), torch.tensor([[800, 1333]] * 3, dtype=torch.float64)
    image = torch.arange(3).repeat_interleave(3)
    options: dict[str, Any] = {"ratios": ratios, "shakes": shakes}
    bag = neighborhood_boxes(boxes, image, hw, **options, iof=True)
    size = len(ratios) ** 2 * (1 + 4 * len(shakes))
    torch.testing.assert_close(bag.boxes.sum(1), size * boxes, atol=1e-6, rtol=1e-9)
    moved = neighborhood_boxes(boxes + 64, image, hw, **options)
    torch.testing.assert_close(moved.boxes, bag.boxes + 64, atol=1e-9, rtol=0)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(neighborhood_boxes(boxes[order], image[order], hw, **options).boxes, bag.boxes[order])
    parts = [neighborhood_boxes(boxes[image == b], image[image == b] - b, hw[b : b + 1], **options, iof=True) for b in range(3)]
    for field in ("boxes", "valid", "iof"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(bag, field))
    flags = [neighborhood_boxes(boxes, image, hw, **options, iof_threshold=t).valid for t in (0, 0.3, 0.7, 0.95)]
    assert all((low | ~high).all() for low, high in itertools.pairwise(flags))


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_equal_index(device: str) -> None:
    boxes, hw = noisy_boxes(10).to(device), torch.tensor([[800, 1333], [50, 60], [400, 500]], device=device)
    image = torch.tensor([0] * 4 + [2] * 6, device=device)
    for dtype in (torch.int32, torch.int64):
        offsets = torch.tensor([0, 4, 4, 10], dtype=dtype, device=device)
        by_offsets = neighborhood_boxes(boxes, None, hw, offsets=offsets, **COCO, **ALL)
        for a, b in zip(by_offsets, neighborhood_boxes(boxes, image, hw, **COCO, **ALL), strict=True):
            assert a is not None
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_owners_out_of_range_on_a_device() -> None:
    boxes, hw = noisy_boxes(4).cuda(), torch.tensor([[800.0, 1333.0]] * 2).cuda()
    bag = neighborhood_boxes(boxes, torch.tensor([0, 9, -3, 1]).cuda(), hw, **COCO, rois=True)
    assert not bag.valid[1:3].any()
    assert torch.equal(bag.boxes, neighborhood_boxes(boxes, torch.zeros(4, dtype=torch.int64).cuda(), hw, **COCO).boxes)
    assert bag.rois is not None
    assert bag.rois[:, 0].view(4, -1)[:, 0].tolist() == [0, 1, 0, 1]
    bad = torch.tensor([2**40, -5, 1]).cuda()
    assert neighborhood_boxes(boxes, None, hw, offsets=bad, **COCO).boxes.shape == (4, 125, 4)


def test_dtypes_and_layouts() -> None:
    boxes, image, hw = noisy_boxes(6), torch.zeros(6, dtype=torch.int64), torch.tensor([[800, 1333]])
    expected = neighborhood_boxes(boxes, image, hw, **COCO)
    wide = torch.cat((torch.ones(6, 2), boxes, torch.ones(6, 2)), 1)
    for view in (wide[:, 2:6], boxes.repeat_interleave(2, 0)[::2], boxes.T.contiguous().T):
        assert torch.equal(neighborhood_boxes(view, image, hw, **COCO).boxes, expected.boxes)
    one = neighborhood_boxes(boxes[:1].expand(6, 4), image, hw.T.contiguous().T, **COCO)
    assert torch.equal(one.boxes, expected.boxes[:1].expand_as(one.boxes))
    half = neighborhood_boxes(boxes.half(), image, hw, **COCO)
    assert half.boxes.dtype == torch.float32
    assert torch.equal(half.boxes, neighborhood_boxes(boxes.half().float(), image, hw, **COCO).boxes)
    assert neighborhood_boxes(boxes.int(), image, hw.float(), **COCO).boxes.dtype == torch.float32
    assert neighborhood_boxes(boxes.double(), image, hw, **COCO).boxes.dtype == torch.float64


def test_empty() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    bag = neighborhood_boxes(torch.zeros(0, 4), none, torch.tensor([[50, 50]]), **COCO, **ALL)
    assert [tuple(t.shape) for t in bag if t is not None] == [(0, 125, 4), (0, 125), (0, 5), (0, 125), (0, 125), (0, 125, 4), (0, 125, 4)]
    assert neighborhood_boxes(torch.zeros(0, 4), none, torch.zeros(0, 2), **COCO).boxes.shape == (0, 125, 4)


def test_results_are_fully_written(fill_uninitialised: None) -> None:
    bag = neighborhood_boxes(noisy_boxes(5), torch.zeros(5, dtype=torch.int64), torch.tensor([[800, 1333]]), **COCO, **ALL)
    assert all(output.isfinite().all() for output in bag if output is not None)


def test_large_bags() -> None:
    """More proposals than a tile of the kernel holds."""
    boxes, ratios = noisy_boxes(2, dtype=torch.float64), [0.5 + 0.05 * i for i in range(20)]
    bag = neighborhood_boxes(boxes, torch.zeros(2, dtype=torch.int64), torch.tensor([[800, 1333]]), ratios=ratios, shakes=[0.1])
    expected, _ = literal_bag(boxes[1], (800, 1333), ratios, [0.1])
    torch.testing.assert_close(bag.boxes[1], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": torch.zeros(3, 5)}, ValueError, r"boxes must have shape \[G, 4\], got \[3, 5\]"),
        ({"boxes": torch.zeros(3, 4, dtype=torch.bool)}, TypeError, r"boxes must have a real number dtype, got torch\.bool"),
        ({"boxes": [[0, 0, 1, 1]]}, TypeError, "boxes must be a tensor, got list"),
        ({"boxes": torch.zeros(3, 4).requires_grad_()}, ValueError, "neighborhood_boxes carries no gradient"),
        ({"image_index": torch.tensor([0, 1, 2])}, ValueError, r"image_index must lie in 0\.\.1 for 2 images, got 2"),
        ({"image_index": torch.tensor([0, -1, 1])}, ValueError, r"image_index must lie in 0\.\.1 for 2 images, got -1"),
        ({"image_index": torch.zeros(3)}, TypeError, r"image_index must be int32 or int64, got torch\.float32"),
        ({"image_index": torch.zeros(2, dtype=torch.int64)}, ValueError, r"image_index must have shape \[3\], got \[2\]"),
        ({"image_index": None}, ValueError, "image_index or offsets must be given, got neither"),
        ({"offsets": torch.tensor([0, 1, 3])}, ValueError, "image_index or offsets must be given, got both"),
        ({"image_index": None, "offsets": torch.tensor([0, 2, 1])}, ValueError, r"offsets must rise from 0 to the number of rows \(3\)"),
        ({"image_index": None, "offsets": torch.tensor([0, 3])}, ValueError, r"offsets must have shape \[3\], got \[2\]"),
        ({"image_hw": torch.zeros(2, 3)}, ValueError, r"image_hw must have shape \[B, 2\], got \[2, 3\]"),
        ({"image_hw": torch.zeros(2, 2, device="meta")}, ValueError, "image_hw and boxes must be on one device, got meta and cpu"),
        ({"ratios": []}, ValueError, "ratios must not be empty"),
        ({"ratios": [1, 0]}, ValueError, r"ratios must be finite and > 0, got \[1, 0\]"),
        ({"ratios": 1.5}, TypeError, "ratios must be a sequence of numbers, got 1.5"),
        ({"ratios": ["a"]}, TypeError, "ratios must be a sequence of numbers"),
        ({"ratios": [1.0] * 65}, ValueError, "ratios must have at most 64 values, got 65"),
        ({"shakes": [float("nan")]}, ValueError, "shakes must be finite, got"),
        ({"iof_threshold": 1.0}, ValueError, r"iof_threshold must lie in \[0, 1\), got 1.0"),
        ({"iof_threshold": "high"}, TypeError, "iof_threshold must be a number, got 'high'"),
        ({"targets_std": [0.1, 0.1]}, ValueError, "targets_std must be four finite numbers > 0, got"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    index = torch.tensor([0, 0, 1])
    arguments = {"boxes": noisy_boxes(3), "image_index": index, "image_hw": torch.full((2, 2), 500), **COCO} | change
    with pytest.raises(error, match=message):
        neighborhood_boxes(**arguments)


def test_opcheck() -> None:
    op, hw = torch.ops.ssod_fast.neighborhood_boxes.default, torch.tensor([[800.0, 1333.0]] * 2)
    rest = ([1.0, 0.8], [0.2], 0.7)
    torch.library.opcheck(op, (noisy_boxes(3), torch.tensor([0, 0, 1]), None, hw, *rest, False, False, False, [], False))
    torch.library.opcheck(op, (noisy_boxes(3), None, torch.tensor([0, 1, 3]), hw, *rest, True, True, True, [0.1] * 4, True))


@pytest.mark.parametrize("device", DEVICES)
def test_compile(device: str) -> None:
    def rois(boxes: Tensor, image: Tensor, hw: Tensor) -> tuple[Tensor, Tensor]:
        bag = neighborhood_boxes(boxes * 1.0, image, hw, **COCO, rois=True)
        assert bag.rois is not None
        return bag.rois * 2, ~bag.valid

    compiled = torch.compile(rois, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    hw = torch.tensor([[800.0, 1333.0]], device=device)
    for n in (3, 7):
        boxes, image = noisy_boxes(n).to(device), torch.zeros(n, dtype=torch.int64, device=device)
        for a, b in zip(compiled(boxes, image, hw), rois(boxes, image, hw), strict=True):
            assert torch.equal(a, b)


def test_no_sync() -> None:
    boxes, hw, offsets = noisy_boxes(6), torch.tensor([[800.0, 1333.0]] * 2), torch.tensor([0, 2, 6])
    with no_sync():
        neighborhood_boxes(boxes, None, hw, offsets=offsets, **COCO, **ALL)


@pytest.mark.gpu
def test_graph_capture() -> None:
    boxes, hw = noisy_boxes(6).cuda(), torch.tensor([[800.0, 1333.0]]).cuda()
    image = torch.zeros(6, dtype=torch.int64).cuda()
    expected = neighborhood_boxes(boxes, image, hw, **COCO, **ALL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = neighborhood_boxes(boxes, image, hw, **COCO, **ALL)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True) if a is not None and b is not None)
