"""Reference of multi-scale deformable attention: what the kernels must compute, in plain PyTorch.

Every sample is a point (px, py) in pixels of its level, pixel centres at integers. Nothing here loops over levels, images or queries, and
nothing reads the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..structures import upload

BILINEAR, DISCRETE = 0, 1
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (dy, dx)


class Levels(NamedTuple):
    """The level of each of the K samples of a head, int64 [K] each: its index, height, width, first token and sample count."""

    level: Tensor
    height: Tensor
    width: Tensor
    start: Tensor
    points: Tensor


class Corner(NamedTuple):
    """One of the four pixels around each sample, all [B, Q, M, K]: its token, whether it counts, and its two linear weights."""

    row: Tensor
    inside: Tensor
    wy: Tensor
    wx: Tensor


def make_levels(
    device: torch.device,
    samples: int,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    shapes_hw: Sequence[int] | None,
    num_points: Sequence[int] | None,
) -> Levels:
    """Level tables per sample from host sizes where there are any, else from the device."""
    if shapes_hw is not None:
        shapes = upload(torch.tensor(list(shapes_hw), dtype=torch.int64).view(-1, 2), device)
    else:
        assert spatial_shapes is not None, "the public functions pass one or the other"
        shapes = spatial_shapes.to(torch.int64)
    if level_start_index is None:
        sizes = shapes.prod(1)
        level_start_index = sizes.cumsum(0) - sizes
    level, points = _samples_of_levels(shapes.shape[0], samples, num_points, device)
    return Levels(level, shapes[level, 0], shapes[level, 1], level_start_index.to(torch.int64)[level], points)


def _samples_of_levels(levels: int, samples: int, num_points: Sequence[int] | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per sample, int64 [K]: its level, and how many samples that level has."""
    counts = [samples // max(levels, 1)] * levels if num_points is None else num_points
    rows = [(level, count) for level, count in enumerate(counts) for _ in range(count)]
    index, points = upload(torch.tensor(rows, dtype=torch.int64).view(-1, 2), device).unbind(1)
    return index, points


def corners(px: Tensor, py: Tensor, levels: Levels, tokens: int) -> list[Corner]:
    """The four corners of bilinear sampling; a sample that is not live, NaN included, has none inside."""
    height, width = levels.height.to(px.dtype), levels.width.to(px.dtype)
    live = (px > -1) & (py > -1) & (px < width) & (py < height)
    px, py = torch.where(live, px, 0), torch.where(live, py, 0)
    x0, y0 = px.floor(), py.floor()
    fx, fy = px - x0, py - y0
    found = []
    for dy, dx in CORNERS:
        x, y = x0.to(torch.int64) + dx, y0.to(torch.int64) + dy
        row = levels.start + y * levels.width + x
        inside = live & (x >= 0) & (y >= 0) & (x < levels.width) & (y < levels.height) & (row >= 0) & (row < tokens)
        found.append(Corner(torch.where(inside, row, 0), inside, fy if dy else 1 - fy, fx if dx else 1 - fx))
    return found


def gather(value: Tensor, row: Tensor) -> Tensor:
    """value [B, S, M, C] at the tokens row [B, Q, M, K] -> [B, Q, M, K, C]."""
    batch, _, heads, _ = value.shape
    image = torch.arange(batch, device=value.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=value.device).view(1, 1, -1, 1)
    return value[image, row, head]


def sample_bilinear(value: Tensor, px: Tensor, py: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    """sum_k weights · bilinear sample; value and weights in the compute dtype; [B, Q, M, C]."""
    total = value.new_zeros((*px.shape[:3], value.shape[-1]))
    if value.shape[1] == 0:
        return total
    for corner in corners(px, py, levels, value.shape[1]):
        share = (corner.wy * corner.wx * weights).unsqueeze(-1)
        total = total + torch.where(corner.inside.unsqueeze(-1), share * gather(value, corner.row), 0).sum(3)
    return total


class SampleGradients(NamedTuple):
    """Gradients of the sampled sum: of value [B, S, M, C], and per sample [B, Q, M, K] of px, py and of the weight."""

    value: Tensor
    px: Tensor
    py: Tensor
    weight: Tensor


def scatter(total: Tensor, row: Tensor, update: Tensor) -> Tensor:
    """total [B, S, M, C] plus `update` [B, Q, M, K, C] at the tokens `row`; in a fixed order where torch is asked to be deterministic."""
    batch, _, heads, _ = total.shape
    image = torch.arange(batch, device=total.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=total.device).view(1, 1, -1, 1)
    return total.index_put((image, row, head), update, accumulate=True)


def bilinear_gradients(grad: Tensor, value: Tensor, px: Tensor, py: Tensor, weights: Tensor, levels: Levels) -> SampleGradients:
    """Gradients for grad [B, Q, M, C]: four dot products of grad with the corners give every scalar one (Zhu et al. 2020, appendix)."""
    grad_value = torch.zeros_like(value)
    zero = torch.zeros_like(px)
    grad_px, grad_py, grad_weight = zero, zero, zero
    if value.shape[1] == 0:
        return SampleGradients(grad_value, grad_px, grad_py, grad_weight)
    grad = grad.unsqueeze(3)  # [B, Q, M, 1, C]
    for (dy, dx), corner in zip(CORNERS, corners(px, py, levels, value.shape[1]), strict=True):
        inside = corner.inside
        dot = torch.where(inside, (grad * gather(value, corner.row)).sum(-1), 0)
        grad_weight = grad_weight + corner.wy * corner.wx * dot
        grad_px = grad_px + torch.where(inside, (1 if dx else -1) * corner.wy * dot * weights, 0)
        grad_py = grad_py + torch.where(inside, (1 if dy else -1) * corner.wx * dot * weights, 0)
        share = (corner.wy * corner.wx * weights).unsqueeze(-1)
        grad_value = scatter(grad_value, corner.row, torch.where(inside.unsqueeze(-1), share * grad, 0))
    return SampleGradients(grad_value, grad_px, grad_py, grad_weight)


def nearest(locations: Tensor, levels: Levels, tokens: int) -> tuple[Tensor, Tensor]:
    """Token of method "discrete" and whether it counts: the pixel x · W + 0.5 truncated, clamped to the map; NaN counts nothing."""
    known = ~locations.isnan().any(-1)
    x, y = torch.where(known.unsqueeze(-1), locations, 0).unbind(-1)
    row = levels.start + _clamped_pixel(y, levels.height) * levels.width + _clamped_pixel(x, levels.width)
    inside = known & (levels.width > 0) & (levels.height > 0) & (row >= 0) & (row < tokens)
    return torch.where(inside, row, 0), inside


def _clamped_pixel(position: Tensor, size: Tensor) -> Tensor:
    pixel = (position * size.to(position.dtype) + 0.5).clamp(min=0)
    return torch.minimum(pixel, (size - 1).clamp(min=0).to(position.dtype)).to(torch.int64)


def sample_discrete(value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    """sum_k weights · nearest pixel; [B, Q, M, C]."""
    if value.shape[1] == 0:
        return value.new_zeros((*weights.shape[:3], value.shape[-1]))
    row, inside = nearest(locations, levels, value.shape[1])
    return torch.where(inside.unsqueeze(-1), weights.unsqueeze(-1) * gather(value, row), 0).sum(3)


def discrete_gradients(grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> SampleGradients:
    """Gradients of value and weights; those of positions are 0."""
    zero = torch.zeros_like(weights)
    if value.shape[1] == 0:
        return SampleGradients(torch.zeros_like(value), zero, zero, zero)
    row, inside = nearest(locations, levels, value.shape[1])
    grad = grad.unsqueeze(3)
    grad_weight = torch.where(inside, (grad * gather(value, row)).sum(-1), 0)
    update = torch.where(inside.unsqueeze(-1), weights.unsqueeze(-1) * grad, 0)
    return SampleGradients(scatter(torch.zeros_like(value), row, update), zero, zero, grad_weight)


def chain(grad: Tensor, factor: Tensor) -> Tensor:
    """grad · factor, and 0 where grad is 0: a sample that is not live has no gradient even where its factor is NaN or infinite."""
    return torch.where(grad == 0, 0, grad * factor)


def compute_dtype(value: Tensor) -> torch.dtype:
    """Positions, weights and sums: float64 for a float64 value, else float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def pixel_positions(locations: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """px, py [B, Q, M, K] of normalised locations [B, Q, M, K, 2]."""
    x, y = locations.unbind(-1)
    return x * levels.width - 0.5, y * levels.height - 0.5


class FusedPositions(NamedTuple):
    """px, py [B, Q, M, K] of references and offsets, and the factors (broadcast to that) that take gradients back to both."""

    px: Tensor
    py: Tensor
    scale_x: Tensor  # d px / d offset
    scale_y: Tensor
    box_x: Tensor | None  # d px / d reference width, for references of four numbers
    box_y: Tensor | None


def fused_positions(reference: Tensor, offsets: Tensor, levels: Levels, offset_scale: float) -> FusedPositions:
    """Positions of samples around references, in pixels: the width of the level cancels for references of two numbers.

    Args:
        reference: [B, Q, L or 1, 2 or 4], compute dtype.
        offsets: [B, Q, M, K, 2], compute dtype.
        levels: tables per sample.
        offset_scale: share of the reference box that an offset of 1 spans, over all points of a level.
    """
    shared = reference.shape[2] == 1
    ref = (reference if shared else reference[:, :, levels.level]).unsqueeze(2)  # [B, Q, 1, K or 1, 2 or 4]
    off_x, off_y = offsets.unbind(-1)
    width, height = levels.width.to(ref.dtype), levels.height.to(ref.dtype)
    center_x, center_y = ref[..., 0] * width, ref[..., 1] * height
    if reference.shape[-1] == 2:
        one = torch.ones_like(width)
        return FusedPositions(center_x + off_x - 0.5, center_y + off_y - 0.5, one, one, None, None)
    share = offset_scale / levels.points.to(ref.dtype)
    scale_x, scale_y = share * ref[..., 2] * width, share * ref[..., 3] * height
    px, py = center_x + off_x * scale_x - 0.5, center_y + off_y * scale_y - 0.5
    return FusedPositions(px, py, scale_x, scale_y, share * off_x * width, share * off_y * height)


def fused_position_gradients(grads: SampleGradients, positions: FusedPositions, levels: Levels, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of offsets [B, Q, M, K, 2] and of references: sums over the heads and the samples that share a reference."""
    px, py = grads.px, grads.py
    grad_offsets = torch.stack((chain(px, positions.scale_x), chain(py, positions.scale_y)), -1)
    parts = [chain(px, levels.width), chain(py, levels.height)]
    if positions.box_x is not None and positions.box_y is not None:
        parts += [chain(px, positions.box_x), chain(py, positions.box_y)]
    per_sample = torch.stack(parts, -1).sum(2)  # [B, Q, K, 2 or 4]
    target = torch.zeros_like(levels.level) if reference.shape[2] == 1 else levels.level
    grad_reference = per_sample.new_zeros(reference.shape).index_add(2, target, per_sample)
    return grad_offsets, grad_reference.to(reference.dtype)
