"""Which target rows an image owns: the same rule for every op that matches packed targets."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def row_bounds(offsets: Tensor | None, counts: Tensor | None, rows: int, unread: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets and counts as the kernels read them; `unread` stands in for a pointer that is not read.

    Offsets come out in range and non-decreasing, so that no two images share rows whatever was passed.
    """
    bounds = unread if offsets is None else offsets.clamp(0, rows).cummax(0).values
    return bounds, unread if counts is None else counts.contiguous()


@triton.jit
def row_range(p_bounds, p_counts, i_image, rows, batch, RAGGED: tl.constexpr, COUNTED: tl.constexpr):
    """First row of the image and how many it owns, int64."""
    if RAGGED:
        begin = tl.load(p_bounds + i_image)
        count = tl.load(p_bounds + i_image + 1) - begin
    else:
        width = (rows // batch).to(tl.int64)
        begin = i_image.to(tl.int64) * width
        count = width
        if COUNTED:
            count = tl.minimum(tl.maximum(tl.load(p_counts + i_image), 0), width)
    return begin, count


@triton.jit
def image_of_row(p_bounds, p_counts, i_row, rows, batch, RAGGED: tl.constexpr, COUNTED: tl.constexpr, BLOCK: tl.constexpr):
    """The image of a row, within range also for a row of no image, and whether it has one."""
    if RAGGED:
        begun, start = tl.zeros_like(i_row), tl.zeros_like(i_row)
        while start <= batch:
            i_bound = start + tl.arange(0, BLOCK)
            bound = tl.load(p_bounds + i_bound, mask=i_bound <= batch, other=rows)
            begun += tl.sum((bound <= i_row).to(i_row.dtype), 0)
            start += BLOCK
        owned = (begun >= 1) & (begun <= batch)
        image = tl.minimum(tl.maximum(begun - 1, 0), batch - 1)
    else:
        width = rows // batch
        image = i_row // width
        owned = image < batch
        if COUNTED:
            owned = owned & (i_row % width < tl.load(p_counts + image, mask=owned, other=0))
    return image, owned
