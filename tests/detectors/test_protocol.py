"""Image batches, preprocessing and the check of capabilities."""

from __future__ import annotations

import pytest
import torch
from detectors.models import build, images
from torch import nn

from ssod_fast.detectors import IMAGENET, ImageBatch, PixelStats, capabilities, from_torchvision, preprocess, require
from ssod_fast.detectors.protocol import NotADetectorError


def test_preprocess_normalises_and_pads() -> None:
    stats = PixelStats((10.0, 20.0, 30.0), (2.0, 4.0, 5.0))
    first = torch.full((3, 2, 3), 30, dtype=torch.uint8)
    batch = preprocess([first, torch.zeros(3, 4, 5, dtype=torch.uint8)], stats, stride=8)
    assert batch.sizes == [(2, 3), (4, 5)]
    assert batch.tensor.shape == (2, 3, 8, 8)
    assert batch.tensor.dtype == torch.float32
    assert batch.tensor[0, :, 0, 0].tolist() == [10.0, 2.5, 0.0]
    assert batch.tensor[0, :, 2:].abs().sum() == 0
    assert batch.tensor[0, :, :, 3:].abs().sum() == 0
    assert batch.tensor[1, 0, 3, 4] == -5


def test_preprocess_takes_floats_in_the_same_unit() -> None:
    byte = images((33, 47))
    torch.testing.assert_close(preprocess([byte[0].float()], IMAGENET).tensor, preprocess(byte, IMAGENET).tensor)
    assert preprocess(byte, IMAGENET).tensor.shape == (1, 3, 64, 64)
    assert preprocess(byte, IMAGENET, out_dtype=torch.bfloat16).tensor.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "non-empty list"),
        (torch.zeros(2, 3, 8, 8), r"non-empty list of \[3, h, w\] tensors, got a tensor of shape \[2, 3, 8, 8\]"),
        ([torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)], r"images\[1\] must be \[3, h, w\] with h, w > 0, got \[1, 8, 8\]"),
        ([torch.zeros(3, 0, 8)], r"images\[0\] must be \[3, h, w\] with h, w > 0, got \[3, 0, 8\]"),
        ([torch.zeros(3, 8, 8, dtype=torch.int64)], r"images\[0\] must be uint8 or floating point \(values 0..255\), got torch.int64"),
        (
            [torch.zeros(3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)],
            r"images\[1\] is torch.uint8 on cpu, but images\[0\] is torch.float32",
        ),
    ],
)
def test_bad_images(bad: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocess(bad, IMAGENET)


def test_bad_stride() -> None:
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        preprocess(images((8, 8)), IMAGENET, stride=0)


def test_image_batch_is_checked() -> None:
    with pytest.raises(ValueError, match=r"floating point \[B, 3, H, W\], got torch.uint8 \[1, 3, 8, 8\]"):
        ImageBatch(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [(8, 8)])
    with pytest.raises(ValueError, match="expected 1 sizes, got 2"):
        ImageBatch(torch.zeros(1, 3, 8, 8), [(8, 8), (8, 8)])
    with pytest.raises(ValueError, match=r"size \(9, 8\) of image 0 does not lie in the padded batch \(8, 8\)"):
        ImageBatch(torch.zeros(1, 3, 8, 8), [(9, 8)])
    assert len(ImageBatch(torch.zeros(2, 3, 8, 8), [(8, 8), (1, 2)])) == 2


def test_pixel_stats_are_checked() -> None:
    with pytest.raises(ValueError, match="std must be positive"):
        PixelStats((0, 0, 0), (1, 0, 1))
    with pytest.raises(ValueError, match="must have 3 entries, got 1 and 3"):
        PixelStats((0,), (1, 1, 1))  # type: ignore[arg-type]


def test_require_names_what_to_write() -> None:
    rcnn = from_torchvision(build("fasterrcnn"))
    require(rcnn, for_method="MixPL")
    require(rcnn, "features", for_method="MixPL")
    with pytest.raises(ValueError, match=r"LSM needs 'supports_weights', which FasterRCNNDetector does not have: multiply each box"):
        require(rcnn, "supports_weights", for_method="LSM")
    with pytest.raises(ValueError, match=r"unknown capability 'feature', expected one of .*\(did you mean features\?\)"):
        require(rcnn, "feature", for_method="LSM")
    require(from_torchvision(build("fcos")), "supports_weights", "supports_padded", "decode", for_method="LSM")


def test_require_refuses_what_is_no_detector() -> None:
    with pytest.raises(TypeError, match=r"MixPL needs a detector .* got Linear without losses, predict.*wrap models with"):
        require(nn.Linear(2, 2), for_method="MixPL")
    detector = from_torchvision(build("fcos"))
    detector.forward = nn.Module.forward.__get__(detector)  # what a class without its own forward inherits
    with pytest.raises(NotADetectorError, match=r"got FCOSDetector without forward"):
        require(detector, for_method="MixPL")
    assert capabilities(nn.Linear(2, 2)) == frozenset()
