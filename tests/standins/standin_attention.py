"""What the stand-ins share: the composition of grid_sample, an "extension" as picky as the compiled one, and the projections."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def compose(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
    """[B, S, M, C], [B, Q, M, L, P, 2], [B, Q, M, L, P] -> [B, Q, M * C]."""
    batch, _, heads, channels = value.shape
    sizes = [(int(h), int(w)) for h, w in shapes]
    out = value.new_zeros(batch, locations.shape[1], heads, channels)
    for level, (tokens, (h, w)) in enumerate(zip(value.split([h * w for h, w in sizes], 1), sizes, strict=True)):
        image = tokens.permute(0, 2, 3, 1).reshape(batch * heads, channels, h, w)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(image, grid, align_corners=False).unflatten(0, (batch, heads))
        out = out + torch.einsum("bmcqp,bqmp->bqmc", sampled, weights[:, :, :, level])
    return out.flatten(2)


def compiled_forward(value: Tensor, shapes: Tensor, start: Tensor, locations: Tensor, weights: Tensor, im2col_step: int) -> Tensor:
    """As the compiled kernel: one dtype, and a batch that the step divides."""
    if not value.dtype == locations.dtype == weights.dtype or value.shape[0] % min(value.shape[0], im2col_step):
        raise RuntimeError("the compiled kernel refuses this")
    return compose(value, shapes, locations, weights)


def compiled_backward(
    value: Tensor, shapes: Tensor, start: Tensor, locations: Tensor, weights: Tensor, grad: Tensor, im2col_step: int
) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (value, locations, weights)]
        out = compiled_forward(leaves[0], shapes, start, *leaves[1:], im2col_step)
    return list(torch.autograd.grad(out, leaves, grad))


class Projections(nn.Module):
    """The four projections that all modules have, and the arithmetic around reference points."""

    def __init__(self, embed_dim: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.sizes = heads, levels, points
        self.sampling_offsets = nn.Linear(embed_dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(embed_dim, heads * levels * points)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)

    def heads_of(self, tokens: Tensor, padding: Tensor | None) -> Tensor:
        value = self.value_proj(tokens)
        value = value if padding is None else value.masked_fill(padding[..., None], 0.0)
        return value.unflatten(2, (self.sizes[0], -1))

    def sample(self, query: Tensor, points: Tensor, shapes: Tensor) -> tuple[Tensor, Tensor]:
        """Locations [B, Q, M, L, P, 2] and softmaxed weights [B, Q, M, L, P]."""
        offsets = self.sampling_offsets(query).unflatten(2, (*self.sizes, 2))
        weights = self.attention_weights(query).unflatten(2, (self.sizes[0], -1)).softmax(-1).unflatten(3, self.sizes[1:])
        if points.shape[-1] == 2:
            return points[:, :, None, :, None] + offsets / shapes.flip(-1)[None, None, None, :, None], weights
        return points[:, :, None, :, None, :2] + offsets / self.sizes[2] * points[:, :, None, :, None, 2:] * 0.5, weights
