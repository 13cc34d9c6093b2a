"""Deformable attention to time with: shapes of published models, realistic and adversarial positions, and the compositions of peers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from boxes import optional

ROTATION = 3  # prepared inputs per case
UNIFORM = "uniform"
NEAR, TYPICAL, FAR = "init + N(0, 0.5 px)", "init + N(0, 2 px)", "init + N(0, 8 px)"
_SIGMA = {NEAR: 0.5, TYPICAL: 2.0, FAR: 8.0}
GRID_SAMPLE, TRANSFORMERS = "grid_sample", "grid_sample in transformers"

Sizes = tuple[tuple[int, int], ...]
Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Workload:
    """One attention layer of a published model."""

    name: str
    batch: int
    queries: int  # 0: one per token, as in an encoder
    shapes: Sizes  # (height, width) of each level
    boxes: bool = False  # references are boxes, one for all levels
    heads: int = 8
    channels: int = 32
    points: int = 4

    @property
    def tokens(self) -> int:
        return sum(h * w for h, w in self.shapes)

    @property
    def rows(self) -> int:
        """Queries."""
        return self.queries or self.tokens

    @property
    def samples(self) -> int:
        return self.batch * self.rows * self.heads * len(self.shapes) * self.points

    def __str__(self) -> str:
        return f"{self.name} B={self.batch}"


RT_DETR_SHAPES: Sizes = ((80, 80), (40, 40), (20, 20))  # 640 x 640
DEFORMABLE_SHAPES: Sizes = ((100, 167), (50, 84), (25, 42), (13, 21))  # 800 x 1333
SMALL_SHAPES: Sizes = ((10, 16), (5, 8), (3, 4))


class Plain(NamedTuple):
    """Arguments of plain attention."""

    value: Tensor  # [B, S, M, C]
    locations: Tensor  # [B, Q, M, L, P, 2]
    weights: Tensor  # [B, Q, M, L, P]


class Fused(NamedTuple):
    """Arguments of attention from what projections return."""

    value: Tensor  # [B, S, M, C]
    reference: Tensor  # [B, Q, L, 2] or [B, Q, 1, 4]
    offsets: Tensor  # [B, Q, M, L, P, 2]
    logits: Tensor  # [B, Q, M, L, P]


def plain_inputs(work: Workload, kind: str, dtype: torch.dtype, device: torch.device, geometry: torch.dtype | None = None) -> list[Plain]:
    """Several sets of arguments; locations and weights in float32 unless `geometry` says otherwise, as under autocast."""
    geometry, sets = geometry or torch.float32, []
    for seed in range(ROTATION):
        rng = torch.Generator().manual_seed(seed)
        reference, offsets = _positions(work, kind, rng)
        weights = _logits(work, rng).flatten(3).softmax(-1).view(offsets.shape[:-1])
        locations = reference[:, :, None, None, None] + offsets / _sides(work)
        sets.append(Plain(_value(work, rng).to(device, dtype), locations.to(device, geometry), weights.to(device, geometry)))
    return sets


def fused_inputs(work: Workload, kind: str, dtype: torch.dtype, device: torch.device) -> list[Fused]:
    """The same positions as references, float32, with offsets and logits in `dtype`, as projections return them."""
    sets = []
    for seed in range(ROTATION):
        rng = torch.Generator().manual_seed(seed)
        reference, offsets = _positions(work, kind, rng)
        logits, value = _logits(work, rng), _value(work, rng)
        reference = reference.unsqueeze(2).repeat(1, 1, 1 if work.boxes else len(work.shapes), 1)
        if work.boxes:  # the offset that spans a box is 2P: see composed_fused
            size = torch.rand(work.batch, work.rows, 1, 2, generator=rng) * 0.3 + 0.02
            offsets = offsets / _sides(work) * 2 * work.points / size[:, :, None, None]
            reference = torch.cat([reference, size], -1)
        sets.append(Fused(value.to(device, dtype), reference.to(device), offsets.to(device, dtype), logits.to(device, dtype)))
    return sets


def _positions(work: Workload, kind: str, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Reference points [B, Q, 2] and offsets in pixels of each level [B, Q, M, L, P, 2]."""
    shape = work.batch, work.rows, work.heads, len(work.shapes), work.points, 2
    reference = torch.rand(work.batch, work.rows, 2, generator=rng) if work.queries else _cell_centres(work)
    if kind == UNIFORM:
        return reference, (torch.rand(shape, generator=rng) - reference[:, :, None, None, None]) * _sides(work)
    return reference, initial_offsets(work) + torch.randn(shape, generator=rng) * _SIGMA[kind]


def initial_offsets(work: Workload) -> Tensor:
    """Where untrained queries look, in pixels [M, 1, P, 2]: head m in direction 2πm / M, point p at p + 1 in the maximum norm."""
    angles = torch.arange(work.heads) * (2 * math.pi / work.heads)
    direction = torch.stack((angles.cos(), angles.sin()), -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    return direction.view(-1, 1, 1, 2) * torch.arange(1, work.points + 1).view(1, 1, -1, 1)


def _cell_centres(work: Workload) -> Tensor:
    """Centre of every token's cell [B, S, 2]."""
    levels = []
    for h, w in work.shapes:
        y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
        levels.append(torch.stack((x, y), -1).flatten(0, 1))
    return torch.cat(levels).expand(work.batch, -1, -1)


def _sides(work: Workload) -> Tensor:
    """(width, height) of each level [L, 1, 2]."""
    return torch.tensor([(w, h) for h, w in work.shapes], dtype=torch.float32).unsqueeze(1)


def _value(work: Workload, rng: torch.Generator) -> Tensor:
    return torch.randn(work.batch, work.tokens, work.heads, work.channels, generator=rng)


def _logits(work: Workload, rng: torch.Generator) -> Tensor:
    return torch.randn(work.batch, work.rows, work.heads, len(work.shapes), work.points, generator=rng)


def composed(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Attention by one grid_sample per level, each sampled value stored: what frameworks fall back to."""
    batch, _, heads, channels = value.shape
    levels = []
    grids = (2 * locations - 1).unbind(3)
    for (h, w), tokens, grid in zip(shapes, value.split([h * w for h, w in shapes], 1), grids, strict=True):
        image = tokens.permute(0, 2, 3, 1).reshape(batch * heads, channels, h, w)
        levels.append(F.grid_sample(image, grid.transpose(1, 2).flatten(0, 1), align_corners=False))  # [B * M, C, Q, P]
    share = weights.transpose(1, 2).flatten(0, 1).flatten(2).unsqueeze(1)  # [B * M, 1, Q, L * P]
    out = (torch.stack(levels, -2).flatten(-2) * share).sum(-1)  # [B * M, C, Q]
    return out.view(batch, heads * channels, -1).transpose(1, 2).contiguous()


def locations_of(shapes: Sequence[tuple[int, int]], reference: Tensor, offsets: Tensor) -> Tensor:
    """Positions [B, Q, M, L, P, 2] around references: offsets in pixels, or in shares of half a box over the number of points."""
    centre = reference[:, :, None, :, None, :2]
    if reference.shape[-1] == 4:
        return centre + offsets / offsets.shape[4] * reference[:, :, None, :, None, 2:] * 0.5
    return centre + offsets / _sides_on(tuple(shapes), reference.device, reference.dtype)


@cache
def _sides_on(shapes: Sizes, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(width, height) of each level [L, 1, 2] on a device; uploaded once, as models keep it there."""
    return torch.tensor([(w, h) for h, w in shapes], device=device, dtype=dtype).unsqueeze(1)


def unfused(attention: Attention, one_dtype: bool = False) -> Attention:
    """Softmax and positions in torch, then plain attention; `one_dtype` for attentions that want positions in the dtype of value."""

    def run(value: Tensor, shapes: Sequence[tuple[int, int]], reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        weights = logits.flatten(3).softmax(-1).view(logits.shape)
        locations = locations_of(shapes, reference, offsets)
        return attention(value, shapes, locations.to(value.dtype) if one_dtype else locations, weights)

    return run


def grid_sample_peer() -> tuple[str, Attention]:
    """The composition in transformers' own words, or ours where transformers is not installed."""
    module = optional("transformers.models.deformable_detr.modeling_deformable_detr")
    if module is None:
        return GRID_SAMPLE, composed
    theirs = module.MultiScaleDeformableAttention()
    return TRANSFORMERS, lambda value, shapes, locations, weights: theirs(value, None, shapes, None, locations, weights, 64)


def kernel_peers(shapes: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype) -> dict[str, Attention]:
    """GPU kernels of others that are installed and take this dtype, for all of their arguments."""
    if device.type != "cuda" or dtype is torch.bfloat16:
        return {}
    sizes = torch.tensor(shapes, device=device)
    start = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
    peers: dict[str, Attention] = {}
    if (triton := optional("msda_triton.frontend")) is not None:  # its public function hides errors behind a composition
        function = triton.triton_multiscale_deformable_attention
        peers["msda-triton"] = lambda value, _, locations, weights: function(value, sizes, locations, weights, "zeros", False).flatten(2)
    if (mmcv := optional("mmcv.ops.multi_scale_deform_attn")) is not None:
        apply = mmcv.MultiScaleDeformableAttnFunction.apply
        peers["mmcv"] = lambda value, _, locations, weights: apply(value, sizes, start, locations, weights, 64)
    if dtype is torch.float32 and (extension := optional("MultiScaleDeformableAttention")) is not None:
        peers["Deformable-DETR kernel"] = lambda value, _, *samples: _Extension.apply(extension, value, sizes, start, *samples)  # type: ignore[no-untyped-call]
    return peers


class _Extension(torch.autograd.Function):
    """The compiled module of Deformable DETR."""

    @staticmethod
    def forward(ctx: Any, extension: Any, *inputs: Tensor) -> Tensor:
        ctx.extension = extension
        ctx.save_for_backward(*inputs)
        result: Tensor = extension.ms_deform_attn_forward(*inputs, 64)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        value, locations, weights = ctx.extension.ms_deform_attn_backward(*ctx.saved_tensors, grad.contiguous(), 64)
        return None, value, None, None, locations, weights
