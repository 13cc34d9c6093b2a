"""RoIAlign with the separable gradient, against torchvision's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align

from ssod_fast.nn import roi_align as module
from ssod_fast.nn.roi_align import align


def torchvision(features: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    pooled: Tensor = roi_align(features, rois, size, scale, sampling_ratio=0, aligned=True)
    return pooled


def make(seed: int, count: int, shape: tuple[int, int, int, int], scale: float, share: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A map, and boxes of up to `share` of its size, some of which reach beyond its borders."""
    draw = torch.Generator().manual_seed(seed)
    batch, _, height, width = shape
    hw = torch.tensor([width, height], dtype=dtype) / scale
    centre = (torch.rand(count, 2, generator=draw, dtype=dtype) * 1.4 - 0.2) * hw
    half = torch.rand(count, 2, generator=draw, dtype=dtype) * share * hw / 2
    image = torch.randint(0, batch, (count, 1), generator=draw).to(dtype)
    return torch.randn(shape, generator=draw, dtype=dtype), torch.cat([image, centre - half, centre + half], 1)


def compare(features: Tensor, rois: Tensor, size: int, scale: float, tolerance: float) -> None:
    leaves = [features.clone().requires_grad_() for _ in range(2)]
    expected, got = (pool(leaf, rois, size, scale) for pool, leaf in zip((torchvision, align), leaves, strict=True))
    assert torch.equal(expected, got)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=expected.dtype)
    for pooled in (expected, got):
        (pooled * weights).sum().backward()
    assert leaves[0].grad is not None
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=tolerance, atol=tolerance * float(leaves[0].grad.abs().amax() + 1))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(0, 30),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    scale=st.sampled_from([1 / 4, 1 / 8, 1 / 32, 1.0]),
    share=st.sampled_from([0.05, 0.4, 1.0, 3.0]),
    size=st.sampled_from([1, 2, 7]),
)
def test_gradient_is_that_of_torchvision(seed: int, count: int, height: int, width: int, scale: float, share: float, size: int) -> None:
    compare(*make(seed, count, (2, 3, height, width), scale, share, torch.float64), size, scale, 1e-10)


def test_odd_boxes() -> None:
    rows = [
        [4, 4, 4, 20],
        [9, 4, 3, 20],
        [-1e3, -1e3, -900, -900],
        [0, 0, 80, 80],
        [-40, -40, 200, 200],
        [80, 80, 90, 90],
        [3.99, 4, 4.01, 4.02],
    ]
    rois = torch.cat([torch.zeros(len(rows), 1), torch.tensor(rows)], 1).double()
    features = torch.randn(1, 2, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    compare(features, rois, 7, 1 / 4, 1e-10)
    for row in rois:
        compare(features, row[None], 7, 1 / 4, 1e-10)


def test_groups_that_do_not_fit_into_memory_together(monkeypatch: pytest.MonkeyPatch) -> None:
    features, rois = make(1, 40, (2, 4, 30, 40), 1 / 8, 0.5, torch.float64)
    monkeypatch.setattr(module, "_CELLS", 500)
    compare(features, rois, 7, 1 / 8, 1e-10)


def test_float32_and_maps_with_channels_last() -> None:
    features, rois = make(2, 50, (2, 8, 30, 40), 1 / 8, 0.5, torch.float32)
    compare(features, rois, 7, 1 / 8, 1e-5)
    compare(features.contiguous(memory_format=torch.channels_last), rois, 7, 1 / 8, 1e-5)


def test_gradcheck() -> None:
    features, rois = make(3, 6, (2, 2, 6, 7), 1 / 4, 0.8, torch.float64)
    assert torch.autograd.gradcheck(lambda f: align(f, rois, 3, 1 / 4), (features.requires_grad_(),))


def test_without_gradients_it_is_torchvision_alone() -> None:
    features, rois = make(4, 5, (1, 2, 8, 8), 1 / 4, 0.5, torch.float32)
    assert align(features, rois, 7, 1 / 4).grad_fn is None
    with torch.no_grad():
        assert not align(features.requires_grad_(), rois, 7, 1 / 4).requires_grad


def test_backward_under_autocast() -> None:
    features, rois = make(5, 6, (1, 2, 8, 8), 1 / 4, 0.5, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(features, rois, 7, 1 / 4, 1e-5)
