"""Resampling along one axis, as matrices: the specification that the kernels' index arithmetic follows."""

from __future__ import annotations

import torch
from torch import Tensor

NEAREST, BILINEAR, BILINEAR_AA = 0, 1, 2


def axis_weights(u: Tensor, inv: Tensor, size: Tensor, n_in: int, interp: int) -> Tensor:
    """Weights of the source pixels for every output pixel of an axis; each row sums to 1, but for the one case named below.

    All arithmetic is float32 in exactly this order: which pixel is read, and how much it counts, hangs on its rounding.

    Args:
        u: int [B, n], position inside the resized source.
        inv: float32 [B], source pixels per output pixel.
        size: int [B], length of the source; `u` of the resized source is scaled onto it.
        n_in: columns of the result, at least every size.
        interp: NEAREST, BILINEAR or BILINEAR_AA.

    Returns:
        float32 [B, n, n_in]. With BILINEAR_AA a row of a shrinking axis is all 0 where its triangle lies beyond the source.
    """
    inv, last = inv[:, None], (size - 1)[:, None]
    if interp == NEAREST:
        return _one_hot(torch.minimum((u * inv).floor(), last), n_in)
    linear = _linear(u, inv, last, n_in)
    if interp == BILINEAR:
        return linear
    return torch.where((inv > 1)[..., None], _triangle(u, inv.clamp(min=1), size[:, None, None], n_in), linear)


def _one_hot(index: Tensor, n_in: int) -> Tensor:
    return (torch.arange(n_in, device=index.device) == index[..., None]).float()


def _linear(u: Tensor, inv: Tensor, last: Tensor, n_in: int) -> Tensor:
    """Two neighbours; centres of pixels are at half integers (`align_corners=False`)."""
    f = ((u + 0.5) * inv - 0.5).clamp(min=0)
    i0 = f.floor()
    t = (f - i0)[..., None]
    return _one_hot(torch.minimum(i0, last), n_in) * (1 - t) + _one_hot(torch.minimum(i0 + 1, last), n_in) * t


def _triangle(u: Tensor, inv: Tensor, size: Tensor, n_in: int) -> Tensor:
    """A triangle as wide as one output pixel on either side, as in PIL and torch's antialias."""
    centre, radius = (inv * (u + 0.5))[..., None], inv[..., None]
    lo = (centre - radius + 0.5).clamp(min=0).trunc()
    hi = torch.minimum((centre + radius + 0.5).trunc(), size)
    j = torch.arange(n_in, device=u.device)
    weight = (1 - ((j - centre + 0.5) / radius).abs()).clamp(min=0)
    weight = torch.where((j >= lo) & (j < hi), weight, 0)
    total = weight.sum(-1, keepdim=True)
    return weight / total.where(total > 0, 1)
