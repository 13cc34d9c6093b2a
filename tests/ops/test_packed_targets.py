from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssod_fast.ops import PackedTargets, pack_targets
from ssod_fast.ops.packed_targets import _stage, _upload_together
from ssod_fast.structures import PaddedTargets


def target(count: int, first: int = 0, **more: Tensor) -> dict[str, Tensor]:
    return {"labels": torch.arange(first, first + count), "boxes": torch.rand(count, 4), **more}


def test_list() -> None:
    targets = [target(2), target(0), {"class_labels": torch.tensor([7]), "boxes": torch.rand(1, 4)}]
    packed = pack_targets(targets)
    assert packed.labels.tolist() == [0, 1, 7]
    assert torch.equal(packed.boxes, torch.cat([t["boxes"] for t in targets]))
    assert packed.offsets.tolist() == [0, 2, 2, 3]
    assert packed.image.tolist() == [0, 0, 2]
    assert (packed.batch, packed.rows, packed.sizes, packed.padded) == (3, 3, (2, 0, 1), False)
    assert packed.counts is None
    assert packed.weights is None
    assert pack_targets(packed) is packed
    assert pack_targets(packed, "cpu") is packed


def test_weights_are_1_where_an_image_has_none() -> None:
    packed = pack_targets([target(2), target(1, weights=torch.tensor([0.25], dtype=torch.float64)), target(0)])
    assert packed.weights.tolist() == [1, 1, 0.25]
    assert packed.weights.dtype == torch.float32


@pytest.mark.parametrize("targets", [[], [target(0)], [target(0), target(0)]], ids=len)
def test_no_targets(targets: list[dict[str, Tensor]]) -> None:
    packed = pack_targets(targets)
    assert packed.batch == len(targets)
    assert packed.offsets.tolist() == [0] * (len(targets) + 1)
    assert packed.boxes.shape == (0, 4)
    assert packed.labels.dtype == packed.image.dtype == packed.offsets.dtype == torch.int64


def test_padded_targets_are_viewed() -> None:
    padded = PaddedTargets.from_list([target(2), target(1, first=5)], nmax=3)
    packed = pack_targets(padded)
    assert packed.boxes.data_ptr() == padded.boxes.data_ptr()
    assert packed.padded
    assert packed.counts.tolist() == [2, 1]
    assert packed.image.tolist() == [0, 0, 0, 1, 1, 1]
    assert packed.labels.tolist() == [0, 1, -1, 5, -1, -1]
    assert packed.weights.tolist() == [1, 1, 0, 1, 0, 0]
    assert packed.sizes is None


def test_keeps_the_dtype_of_boxes() -> None:
    for dtype in (torch.float16, torch.float64):
        targets = [{"labels": torch.arange(2), "boxes": torch.rand(2, 4).to(dtype)}]
        assert pack_targets(targets).boxes.dtype == dtype


def test_parts_lie_in_one_aligned_block() -> None:
    parts = [[torch.rand(1, 4).half(), torch.rand(2, 4).half()], [torch.arange(3)], [torch.rand(3), torch.rand(0)], [torch.zeros(0, 4)]]
    block, segments = _stage(parts, pinned=False)
    assert block.dtype == torch.uint8
    for part, segment in zip(parts, segments, strict=True):
        assert segment.first % 16 == 0
        assert torch.equal(segment.of(block), torch.cat(part))
    mixed = _stage([[torch.rand(1, 4), torch.rand(1, 4).double()]], pinned=False)
    assert mixed[1][0].dtype == torch.float64


def test_upload_of_a_list_that_is_on_the_device_already() -> None:
    moved = _upload_together([[torch.zeros(2, device="meta")], [torch.zeros(3, 4), torch.zeros(1, 4)]], torch.device("meta"))
    assert [tuple(tensor.shape) for tensor in moved] == [(2,), (4, 4)]


@pytest.mark.parametrize("images", [1, 2])
def test_list_is_moved_to_the_host(images: int) -> None:
    with FakeTensorMode():
        one = {"labels": torch.zeros(2, dtype=torch.int64, device="cuda"), "boxes": torch.zeros(2, 4, device="cuda")}
        packed = pack_targets([one] * images, "cpu")
    assert {t.device.type for t in (packed.labels, packed.boxes, packed.offsets, packed.image)} == {"cpu"}


def test_list_is_moved_to_another_device() -> None:
    packed = pack_targets([target(2), target(1, weights=torch.ones(1))], device="meta")
    assert {t.device.type for t in (packed.labels, packed.boxes, packed.offsets, packed.image, packed.weights)} == {"meta"}
    assert packed.boxes.shape == (3, 4)
    assert packed.sizes == (2, 1)
    assert packed.label_range == (0, 1)
    assert pack_targets([target(0)], device="meta").label_range is None


@pytest.mark.gpu
def test_one_pinned_upload() -> None:
    targets = [target(5), target(3, weights=torch.rand(3)), target(0)]
    expected = pack_targets(targets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = pack_targets(targets, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    blocks = {t.untyped_storage().data_ptr() for t in (packed.labels, packed.boxes, packed.offsets, packed.image, packed.weights)}
    assert len(blocks) == 1
    for name in ("labels", "boxes", "offsets", "image", "weights"):
        assert torch.equal(getattr(packed, name).cpu(), getattr(expected, name))


@pytest.mark.gpu
def test_lists_on_the_device_upload_their_lengths_alone() -> None:
    targets = [{k: v.cuda() for k, v in target(n).items()} for n in (5, 0, 3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = pack_targets(targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert packed.offsets.tolist() == [0, 5, 5, 8]


BAD = [
    (
        [{"boxes": torch.rand(1, 4)}],
        ValueError,
        r"targets\[0\] must have 'boxes' and 'labels' \(or 'class_labels'\), got the keys \['boxes'\]",
    ),
    ([target(1), torch.rand(3)], TypeError, r"targets\[1\] must be a mapping with 'boxes' and 'labels', got Tensor"),
    (
        [{"boxes": torch.rand(4), "labels": torch.zeros(1).long()}],
        ValueError,
        r"targets\[0\]\['boxes'\] must be floating point \[T, 4\], got",
    ),
    ([{"boxes": torch.ones(1, 4).long(), "labels": torch.zeros(1).long()}], ValueError, r"\['boxes'\] must be floating point"),
    ([{"boxes": torch.rand(1, 4), "labels": torch.zeros(1)}], TypeError, r"targets\[0\]\['labels'\] must be int64, got torch\.float32"),
    ([{"boxes": torch.rand(1, 4), "labels": torch.zeros(2).long()}], ValueError, r"\['labels'\] must be \[1\] as the boxes are, got \[2\]"),
    ([target(2, weights=torch.ones(2, 1))], ValueError, r"\['weights'\] must be \[2\] as the boxes are, got \[2, 1\]"),
    ([{"boxes": [[0, 0, 1, 1]], "labels": torch.zeros(1).long()}], TypeError, r"targets\[0\]\['boxes'\] must be a tensor, got list"),
    ([target(2, weights=[1.0, 1.0])], TypeError, r"targets\[0\]\['weights'\] must be a tensor, got list"),
    (
        [target(1), {"boxes": torch.rand(1, 4, device="meta"), "labels": torch.zeros(1).long()}],
        ValueError,
        r"targets must be on one device, got cpu and targets\[1\]\['boxes'\] on meta",
    ),
    (
        [target(1), target(1, class_labels=torch.tensor([3]))],
        ValueError,
        r"targets\[1\] must have 'labels' or 'class_labels', got both and they are not the same tensor",
    ),
    (target(1), TypeError, "targets must be a list of mappings, PaddedTargets or PackedTargets, got dict"),
    (torch.rand(3, 4), TypeError, "targets must be a list of mappings, PaddedTargets or PackedTargets, got Tensor"),
]


@pytest.mark.parametrize(("targets", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(targets: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack_targets(targets)  # type: ignore[arg-type]


def test_labels_by_two_names() -> None:
    one = target(2, first=3)
    assert pack_targets([{**one, "class_labels": one["labels"]}]).labels.tolist() == [3, 4]
    assert pack_targets([{**one, "class_labels": None}]).labels.tolist() == [3, 4]


BAD_FIELDS = [
    ({"labels": [0, 1, 2]}, TypeError, "labels of targets must be a tensor, got list"),
    ({"image": None}, TypeError, "image of targets must be a tensor, got NoneType"),
    ({"weights": 1.0}, TypeError, "weights of targets must be a tensor, got float"),
    ({"labels": torch.zeros(3)}, TypeError, r"labels of targets must be int64, got torch\.float32"),
    ({"boxes": torch.zeros(3, 4).int()}, TypeError, r"boxes of targets must be floating point, got torch\.int32"),
    ({"boxes": torch.zeros(3, 5)}, ValueError, r"targets must have labels \[G\] and boxes \[G, 4\], got \[3\] and \[3, 5\]"),
    (
        {"labels": torch.zeros(3, 1, dtype=torch.int64)},
        ValueError,
        r"targets must have labels \[G\] and boxes \[G, 4\], got \[3, 1\] and \[3, 4\]",
    ),
    ({"image": torch.zeros(2, dtype=torch.int64)}, ValueError, r"image of targets must be \[3\] as the labels are, got \[2\]"),
    ({"weights": torch.ones(3, 1)}, ValueError, r"weights of targets must be \[3\] as the labels are, got \[3, 1\]"),
    ({"offsets": torch.tensor([0, 3])}, ValueError, r"offsets of targets must be \[3\], got \[2\]"),
    ({"offsets": [0, 2, 3]}, TypeError, "offsets of targets must be an int32 or int64 tensor, got list"),
    ({"offsets": None, "counts": torch.ones(2)}, TypeError, r"counts of targets must be an int32 or int64 tensor, got torch\.float32"),
    ({"counts": torch.tensor([2, 1])}, ValueError, "targets must have offsets or counts, got both"),
    (
        {"offsets": None, "counts": torch.tensor([2, 1])},
        ValueError,
        "targets without offsets must have as many rows for each of the 2 images",
    ),
    ({"offsets": None}, ValueError, "targets without offsets must have as many rows for each of the 2 images, got 3 rows"),
    ({"batch": -1}, ValueError, "batch of targets must be an int >= 0, got -1"),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD_FIELDS, ids=range(len(BAD_FIELDS)))
def test_bad_fields(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    packed = pack_targets([target(2), target(1)])
    with pytest.raises(error, match=message):
        dataclasses.replace(packed, **fields)


def test_rows_that_are_packed_are_not_moved() -> None:
    for targets in (pack_targets([target(1)]), PaddedTargets.from_list([target(1)])):
        with pytest.raises(ValueError, match=r"targets must be on meta, got cpu: move them with \.to\(\) first"):
            pack_targets(targets, "meta")
    assert isinstance(pack_targets([target(1)], torch.device("cpu")), PackedTargets)
