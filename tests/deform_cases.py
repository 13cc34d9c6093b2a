"""Inputs of multi-scale deformable attention that its tests share: random ones, goldens, and an independent composition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssod_fast.ops import ms_deform_attn

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = ((5, 7), (3, 4), (2, 2))


@dataclass
class Case:
    """Arguments of the plain op."""

    value: Tensor
    shapes: Any
    locations: Tensor
    weights: Tensor
    num_points: Sequence[int] | None = None

    def __call__(self, **options: Any) -> Tensor:
        return ms_deform_attn(self.value, self.shapes, self.locations, self.weights, num_points=self.num_points, **options)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.locations, self.weights

    def with_tensors(self, value: Tensor, locations: Tensor, weights: Tensor) -> Case:
        return replace(self, value=value, locations=locations, weights=weights)

    def double(self) -> Case:
        return self.with_tensors(*(t.detach().double() for t in self.tensors()))

    def leaves(self) -> Case:
        return self.with_tensors(*(t.detach().clone().requires_grad_() for t in self.tensors()))


def random_case(
    batch: int = 2,
    queries: int = 6,
    heads: int = 3,
    channels: int = 4,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    points: int | Sequence[int] = 2,
    *,
    dtype: torch.dtype = torch.float32,
    geometry: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
    margin: float = 0.3,
) -> Case:
    """Samples over the map and `margin` beyond its edges, never closer than 1e-3 px to where the gradient jumps."""
    counts = [points] * len(shapes) if isinstance(points, int) else list(points)
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, channels, generator=generator)
    size = torch.tensor([(w, h) for (h, w), n in zip(shapes, counts, strict=True) for _ in range(n)]).view(-1, 2)  # [K, 2]
    locations = torch.rand(batch, queries, heads, len(size), 2, generator=generator, dtype=torch.float64) * (1 + 2 * margin) - margin
    pixels = locations * size - 0.5
    pixels = pixels.floor() + (pixels - pixels.floor()).clamp(0.05, 0.95)
    locations = (pixels + 0.5) / size
    weights = torch.randn(batch, queries, heads, len(size), generator=generator)
    geometry = dtype if geometry is None else geometry
    tensors = value.to(device, dtype), locations.to(device, geometry), weights.to(device, geometry)
    return Case(tensors[0], list(shapes), *tensors[1:], None if isinstance(points, int) else counts)


def composed(case: Case) -> Tensor:
    """The same attention by grid_sample, one level at a time."""
    value, locations, weights = case.tensors()
    batch, _, heads, channels = value.shape
    counts = case.num_points or [locations.shape[3] // len(case.shapes)] * len(case.shapes)
    out = value.new_zeros(batch, locations.shape[1], heads, channels)
    maps = value.split([h * w for h, w in case.shapes], 1)
    grids = (2 * locations - 1).split(list(counts), 3)
    for (h, w), level, grid, share in zip(case.shapes, maps, grids, weights.split(list(counts), 3), strict=True):
        image = level.permute(0, 2, 3, 1).reshape(batch * heads, channels, h, w)
        sampled = F.grid_sample(image, grid.transpose(1, 2).flatten(0, 1), align_corners=False)  # [B * M, C, Q, P]
        out = out + torch.einsum("bmcqp,bqmp->bqmc", sampled.unflatten(0, (batch, heads)), share)
    return out.flatten(2)


def tolerance(case: Case, dtype: torch.dtype) -> Tensor:
    """Allowed error of a result: 2 units in the last place of the sum of magnitudes, and float32 positions [B, Q, M * C]."""
    magnitude = case.double()
    magnitude = magnitude.with_tensors(magnitude.value.abs(), magnitude.locations, magnitude.weights.abs())
    unit = torch.finfo(dtype).eps
    position = unit if dtype == torch.float64 else torch.finfo(torch.float32).eps
    largest = max(max(size) for size in case.shapes) if case.shapes else 0
    spread = magnitude.weights.sum(-1).repeat_interleave(case.value.shape[3], -1) * magnitude.value.max() * largest
    return 2 * unit * composed(magnitude) + 4 * position * spread


def gradients(out: Tensor, *inputs: Tensor, seed: int = 5) -> tuple[Tensor, ...]:
    """Gradients of a random weighted sum of `out`."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
    return torch.autograd.grad(out, inputs, grad)


def fused_inputs(case: Case, boxes: bool = False, shared: bool = False, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Reference points, offsets and logits for the maps of a case; random, so that no sample lies near a pixel centre line by design."""
    value, locations, weights = case.tensors()
    generator = torch.Generator().manual_seed(seed)
    levels = 1 if shared else len(case.shapes)
    points = torch.rand(*locations.shape[:2], levels, 4 if boxes else 2, generator=generator)
    offsets = torch.randn(locations.shape, generator=generator) * (1.5 if not boxes else 1)
    return points.to(value.device, locations.dtype), offsets.to(locations), weights


def unfused(case: Case, points: Tensor, offsets: Tensor, logits: Tensor, scale: float = 0.5) -> Case:
    """The plain case of fused inputs, in ordinary differentiable PyTorch."""
    counts = case.num_points or [offsets.shape[3] // len(case.shapes)] * len(case.shapes)
    level = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)], device=offsets.device)
    wh = torch.tensor([(w, h) for h, w in case.shapes], device=offsets.device, dtype=offsets.dtype)[level]  # [K, 2]
    per_level = torch.tensor(counts, device=offsets.device, dtype=offsets.dtype)[level].unsqueeze(-1)
    ref = (points.expand(-1, -1, len(case.shapes), -1)[:, :, level]).unsqueeze(2)  # [B, Q, 1, K, 2 or 4]
    shift = offsets / wh if points.shape[-1] == 2 else offsets * scale / per_level * ref[..., 2:]
    return case.with_tensors(case.value, ref[..., :2] + shift, logits.softmax(-1))


class Golden(NamedTuple):
    """One sample with weight 1 of a map that counts from 1: result (= gradient of the weight), and gradients; None where not compared."""

    shape: tuple[int, int]
    xy: tuple[float, float]
    out: float
    grad_xy: tuple[float, float | None]
    grad_value: dict[int, float]
    scale: float = 1


GOLDENS = {
    "centre": Golden((2, 3), (0.5, 0.5), 3.5, (3, 6), {1: 0.5, 4: 0.5}),
    "inside": Golden((2, 3), (0.25, 0.625), 3.5, (3, 6), {0: 0.1875, 1: 0.0625, 3: 0.5625, 4: 0.1875}),
    "first corner": Golden((2, 3), (0, 0), 0.25, (1.5, 1), {0: 0.25}),
    "last corner": Golden((2, 3), (1, 1), 1.5, (-9, -6), {5: 0.25}),
    "left of the map": Golden((2, 4), (-0.0625, 0.375), 0.5, (8, 2), {0: 0.1875, 4: 0.0625}),
    "one pixel": Golden((1, 1), (0.25, 0.5), 5.25, (7, None), {0: 0.75}, 7),
    "a pixel outside": Golden((2, 4), (-0.125, 0.5), 0, (0, 0), {}),
    "beyond the right edge": Golden((2, 4), (1.125, 0.5), 0, (0, 0), {}),
    "far away": Golden((2, 4), (3, -2), 0, (0, 0), {}),
}


def counting_value(shapes: Sequence[tuple[int, int]], heads: int = 1, channels: int = 1, **options: Any) -> Tensor:
    """1, 2, 3, ... over (token, head, channel)."""
    tokens = sum(h * w for h, w in shapes)
    return torch.arange(1, tokens * heads * channels + 1, **options).view(1, tokens, heads, channels)
