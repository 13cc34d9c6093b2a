"""What the kernels share that build boxes for images: who owns a row, lists of factors, and what lies inside an image."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import at_least, true_div


def image_of_rows(index: Tensor | None, offsets: Tensor | None, rows: int) -> Tensor:
    """The image of each row, int64 [rows], from the index itself or from offsets; out of range where a row has none."""
    if offsets is None:
        assert index is not None
        return index
    return torch.searchsorted(offsets, torch.arange(rows, device=offsets.device), right=True) - 1


@triton.jit
def image_size(p_image, p_hw, i_row, batch, mask):
    """Image of each row, clamped into range, and its height and width: 0 x 0 for a row of no image."""
    image = tl.load(p_image + i_row, mask=mask, other=-1)
    owned = (image >= 0) & (image < batch)
    height = tl.load(p_hw + image * 2, mask=owned, other=0.0)
    width = tl.load(p_hw + image * 2 + 1, mask=owned, other=0.0)
    return tl.maximum(tl.minimum(image, batch - 1), 0), height, width


@triton.jit
def factor(i, FACTORS: tl.constexpr, COUNT: tl.constexpr, zero):
    """FACTORS[i] of a tuple of COUNT numbers, in the dtype of `zero`."""
    value = zero
    for j in tl.static_range(COUNT):
        value = tl.where(i == j, zero + FACTORS[j], value)
    return value


@triton.jit
def lower_or_nan(a, b):
    """The lower of two numbers, NaN where either is."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def clip(x, limit):
    """x within 0..limit; NaN where either is."""
    return lower_or_nan(tl.where(x < 0, 0.0, x), limit)


@triton.jit
def inside_share(x1, y1, x2, y2, width, height, AREA_FLOOR: tl.constexpr):
    """Share of boxes that lies in the image, their area raised to AREA_FLOOR; NaN for boxes and images that are NaN."""
    w = at_least(lower_or_nan(x2, width) - at_least(x1, 0.0), 0.0)
    h = at_least(lower_or_nan(y2, height) - at_least(y1, 0.0), 0.0)
    return true_div(w * h, at_least((x2 - x1) * (y2 - y1), AREA_FLOOR))


@triton.jit
def store_box(p, a, b, c, d, mask):
    """Stores the four numbers of boxes."""
    tl.store(p, a, mask=mask)
    tl.store(p + 1, b, mask=mask)
    tl.store(p + 2, c, mask=mask)
    tl.store(p + 3, d, mask=mask)
