"""Deformable attention in ordinary PyTorch operators, for exported models and for samples whose locations are wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import _ms_deform_attn as sampling
from ...ops._ms_deform_checks import Shapes


def sampling_locations(points: Tensor, offsets: Tensor, shapes: Shapes, num_points: Sequence[int] | None, scale: float) -> Tensor:
    """Where :func:`~ssod_fast.ops.ms_deform_attn_fused` samples.

    Args:
        points: [B, Q, L or 1, 2 or 4], normalised.
        offsets: [B, Q, M, K, 2], in pixels of the level, or shares of the reference box.
        shapes: (height, width) of each level.
        num_points: samples of each level, by default K / L.
        scale: of offsets from boxes.

    Returns:
        [B, Q, M, K, 2], normalised (x, y).
    """
    counts = _counts(offsets.shape[3], len(shapes), num_points)
    points = _per_sample(points.expand(-1, -1, len(counts), -1), counts).unsqueeze(2)  # [B, Q, 1, K, 2 or 4]
    if points.shape[-1] == 2:
        sizes = torch.as_tensor(shapes, device=offsets.device).flip(-1)  # [L, 2] (width, height)
        step = sizes.to(points.dtype).reciprocal()
    else:
        step = torch.tensor([[scale / n] for n in counts], device=offsets.device, dtype=points.dtype)
    step = _per_sample(step, counts, 0)
    return points[..., :2] + offsets * (step if points.shape[-1] == 2 else step * points[..., 2:])


def decomposed_attention(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, num_points: Sequence[int] | None) -> Tensor:
    """:func:`~ssod_fast.ops.ms_deform_attn` by `grid_sample`, one level after the other.

    Args:
        value: [B, S, M, C].
        shapes: (height, width) of each level.
        locations: [B, Q, M, K, 2] or [B, Q, M, L, P, 2], normalised (x, y).
        weights: [B, Q, M, K] or [B, Q, M, L, P].
        num_points: samples of each level, by default K / L.

    Returns:
        [B, Q, M * C].
    """
    sizes = [(int(h), int(w)) for h, w in shapes]
    locations, weights = (t.flatten(3, 4) if t.dim() == dims else t for t, dims in ((locations, 6), (weights, 5)))
    counts = _counts(weights.shape[3], len(sizes), num_points)
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in sizes], -1)  # [B * M, C, H * W] each
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1).to(value.dtype).split(counts, 2)  # [B * M, Q, P, 2] each
    sampled = [
        F.grid_sample(tokens.unflatten(-1, size), grid, align_corners=False) for tokens, size, grid in zip(maps, sizes, grids, strict=True)
    ]
    shares = weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)  # [B * M, 1, Q, K]
    out = (torch.cat(sampled, -1) * shares).sum(-1).to(value.dtype)  # [B * M, C, Q]
    result: Tensor = out.unflatten(0, (value.shape[0], -1)).permute(0, 3, 1, 2).flatten(2)
    return result


def decomposed_discrete(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, num_points: Sequence[int] | None) -> Tensor:
    """As :func:`decomposed_attention`, for method "discrete": one token per sample.

    Args:
        value: [B, S, M, C].
        shapes: (height, width) of each level.
        locations: [B, Q, M, K, 2], normalised (x, y).
        weights: [B, Q, M, K].
        num_points: samples of each level, by default K / L.

    Returns:
        [B, Q, M * C].
    """
    dtype = sampling.compute_dtype(value)
    on_device = shapes if isinstance(shapes, Tensor) else None
    on_host = None if isinstance(shapes, Tensor) else [int(size) for pair in shapes for size in pair]
    levels = sampling.make_levels(value.device, weights.shape[3], on_device, None, on_host, num_points)
    out = sampling.sample_discrete(value.to(dtype), locations.to(dtype), weights.to(dtype), levels)
    return out.flatten(2).to(value.dtype)


def _counts(samples: int, levels: int, num_points: Sequence[int] | None) -> list[int]:
    return list(num_points) if num_points is not None else [samples // levels] * levels


def _per_sample(values: Tensor, counts: Sequence[int], dim: int = 2) -> Tensor:
    """A value of each level for each sample of the level, along `dim`."""
    if len(set(counts)) == 1:  # needs no table
        return values.repeat_interleave(counts[0], dim)
    pairs = zip(values.split(1, dim), counts, strict=True)
    return torch.cat([part.repeat_interleave(n, dim) for part, n in pairs], dim)
