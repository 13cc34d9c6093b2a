"""Pooling from a feature pyramid."""

from __future__ import annotations

import pytest
import torch
from no_sync import SyncError, no_sync
from torch import Tensor
from torchvision.ops import roi_align

from ssod_fast.nn import pyramid
from ssod_fast.nn.pyramid import box_levels, pool_boxes

STRIDES = (4, 8, 16, 32)


def maps(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 256 // s, 256 // s, generator=generator, dtype=dtype).requires_grad_() for s in STRIDES]


BOXES = torch.tensor(
    [[10.0, 20, 50, 70], [3, 3, 240, 250], [-20, 30, 70, 160], [100, 90, 100, 90], [60, 20, 190, 150]], dtype=torch.float64
)
IMAGE = torch.tensor([0, 1, 0, 1, 1])


def test_levels() -> None:
    sides = torch.tensor([1.0, 55.9, 56.1, 111.9, 112.1, 223.9, 224.1, 448.1, 5000.0])
    assert box_levels(torch.cat([torch.zeros(9, 2), sides[:, None].expand(-1, 2)], 1)).tolist() == [0, 0, 0, 0, 1, 1, 2, 3, 3]
    assert box_levels(torch.tensor([[5.0, 5, 5, 90], [9, 9, 3, 3]])).tolist() == [0, 0]
    assert box_levels(torch.tensor([[0.0, 0, 999, 999]]), levels=2).tolist() == [1]


@pytest.mark.parametrize("way", ["_pool_all", "_pool_chosen"])
def test_box_by_box(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyramid, "_pool_chosen", getattr(pyramid, way))
    features = maps()
    found = pool_boxes(features, BOXES, IMAGE, strides=STRIDES)
    level = box_levels(BOXES).tolist()
    assert sorted(set(level)) == [0, 1, 2]
    rows = [
        roi_align(features[k][i : i + 1], torch.cat([box.new_zeros(1), box])[None], 7, 1 / STRIDES[k], sampling_ratio=0, aligned=True)
        for k, i, box in zip(level, IMAGE.tolist(), BOXES, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(rows))
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad((found * weight).sum(), features[:3])
    theirs = torch.autograd.grad((torch.cat(rows) * weight).sum(), features[:3])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("way", ["_pool_all", "_pool_chosen"])
def test_no_box(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyramid, "_pool_chosen", getattr(pyramid, way))
    features = maps()
    found = pool_boxes(features, BOXES[:0], IMAGE[:0], strides=STRIDES)
    assert found.shape == (0, 3, 7, 7)
    assert found.requires_grad
    found.sum().backward()
    assert features[0].grad is not None
    assert features[0].grad.abs().sum() == 0


def test_half_precision_maps_are_pooled_in_float32() -> None:
    features = [m.detach().bfloat16() for m in maps()]
    found = pool_boxes(features, BOXES.float(), IMAGE, strides=STRIDES, size=3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, pool_boxes([m.float() for m in features], BOXES.float(), IMAGE, strides=STRIDES, size=3))


def test_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyramid, "_pool_chosen", pyramid._pool_all)  # as on a device
    features = maps()
    with no_sync():
        pool_boxes(features, BOXES, IMAGE, strides=STRIDES).sum().backward()
    with pytest.raises(SyncError), no_sync():
        BOXES.nonzero()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="maps must be as many as strides, 2, got 4"):
        pool_boxes(maps(), BOXES, IMAGE, strides=(4, 8))
