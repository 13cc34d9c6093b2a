"""The Triton kernels of the box codec against the reference, see test_box_iou.py."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor
from triton_samples import DEVICE, assert_as_implemented, nasty_boxes, real_boxes

from ssod_fast.kernels import box_deltas as kernels

reference = importlib.import_module("ssod_fast.ops.box_deltas")
STD = (0.1, 0.1, 0.2, 0.3)
CLAMP = 1.0  # reached by some of the deltas below


def deltas(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4).to(DEVICE, dtype)


def compare(proposals: Tensor, targets: Tensor, offsets: Tensor, grad: Tensor) -> None:
    """Both ops and both backward ops on inputs of one shape."""
    encoding, decoding = (proposals, targets, *STD), (proposals, offsets, *STD, CLAMP)
    assert_as_implemented(kernels.encode_boxes(*encoding), reference._reference_encode, reference._encode, encoding)
    assert_as_implemented(kernels.decode_boxes(*decoding), reference._reference_decode, reference._decode, decoding)
    backward = (grad, *encoding, True, True)
    actual = kernels.encode_boxes_backward(*backward)
    assert_as_implemented(actual, reference._reference_encode_backward, reference._encode_backward, backward, ulps=32)
    backward = (grad, *decoding, True, True)
    actual = kernels.decode_boxes_backward(*backward)
    assert_as_implemented(actual, reference._reference_decode_backward, reference._decode_backward, backward, ulps=32)


def test_golden() -> None:
    box = torch.tensor([100.0, 60, 180, 160], device=DEVICE)
    proposals = torch.tensor([[84.0, 60, 164, 160], [100, 50, 180, 170], [112, 89, 168, 159]], device=DEVICE)
    std = (0.1, 0.1, 0.2, 0.2)
    encoded = kernels.encode_boxes(proposals, box.expand(3, 4), *std)
    expected = torch.tensor([[2, 0, 0, 0], [0, 0, 0, -0.91161], [0, -2, 1.78337, 1.78337]], device=DEVICE)
    torch.testing.assert_close(encoded, expected, atol=1e-5, rtol=0)
    decoded = kernels.decode_boxes(proposals, encoded, *std, abs(math.log(16 / 1000)))
    torch.testing.assert_close(decoded, box.expand(3, 4), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_to_the_reference(dtype: torch.dtype) -> None:
    compare(real_boxes(301, dtype=dtype), real_boxes(301, seed=1, dtype=dtype), deltas(301, dtype=dtype), deltas(301, seed=3, dtype=dtype))


def test_degenerate_and_infinite_boxes() -> None:
    offsets = deltas(60)
    offsets[3, 2], offsets[5, 3], offsets[7, 0], offsets[9, 2] = math.nan, math.inf, math.nan, -math.inf
    proposals, targets = nasty_boxes(60), nasty_boxes(60, seed=1)
    encoding, decoding = (proposals, targets, *STD), (proposals, offsets, *STD, CLAMP)
    assert_as_implemented(kernels.encode_boxes(*encoding), reference._reference_encode, reference._encode, encoding)
    assert_as_implemented(kernels.decode_boxes(*decoding), reference._reference_decode, reference._decode, decoding)
    finite = nasty_boxes(60, finite=True), nasty_boxes(60, seed=1, finite=True)
    assert bool(kernels.encode_boxes(*finite, *STD).isfinite().all())
    compare(*finite, deltas(60), deltas(60, seed=3))


def test_bags_against_their_boxes() -> None:
    bags, boxes = torch.broadcast_tensors(real_boxes(5, 7), real_boxes(5, 1, seed=1))
    compare(bags, boxes, deltas(5, 7), torch.ones(4, device=DEVICE).expand(5, 7, 4))
    compare(boxes, bags, deltas(5, 7), deltas(7, 5).transpose(0, 1))


def test_only_the_gradient_that_is_needed() -> None:
    boxes, others, grad = real_boxes(6), real_boxes(6, seed=1), deltas(6)
    both = kernels.encode_boxes_backward(grad, boxes, others, *STD, True, True)
    for needs in ((True, False), (False, True), (False, False)):
        some = kernels.encode_boxes_backward(grad, boxes, others, *STD, *needs)
        for need, got, want in zip(needs, some, both, strict=True):
            assert torch.equal(got, want if need else want.new_empty(0))
        decoded = kernels.decode_boxes_backward(grad, boxes, others, *STD, CLAMP, *needs)
        assert [tuple(t.shape) for t in decoded] == [(6, 4) if need else (0,) for need in needs]


def test_empty() -> None:
    boxes = torch.zeros(3, 0, 4, device=DEVICE)
    assert kernels.encode_boxes(boxes, boxes, *STD).shape == (3, 0, 4)
    assert kernels.decode_boxes(boxes, boxes, *STD, CLAMP).shape == (3, 0, 4)
    for grad in kernels.decode_boxes_backward(boxes, boxes, boxes, *STD, CLAMP, True, True):
        assert grad.shape == (3, 0, 4)


@pytest.mark.gpu
def test_many_boxes() -> None:
    compare(real_boxes(100_000), real_boxes(100_000, seed=1), deltas(100_000), deltas(100_000, seed=3))
