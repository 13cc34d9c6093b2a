"""The attention module of Deformable DETR (Zhu et al., arXiv 2010.04159) and its descendants, around the fused op."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import ms_deform_attn_fused
from ..ops._ms_deform_checks import Shapes


class MultiScaleDeformableAttention(nn.Module):
    """Every query attends to a few points around its reference on every level of a feature pyramid.

    Parameters have the names and shapes of MSDeformAttn in Deformable DETR, of mmcv's MultiScaleDeformableAttention and of the modules in
    transformers, so that their checkpoints load. Sampling locations and attention weights are never stored.

    Args:
        embed_dim: channels of queries and tokens.
        num_heads: heads, which divide `embed_dim`.
        num_levels: levels of the pyramid.
        num_points: samples per head and level; a sequence gives every level its own number (D-FINE, arXiv 2410.13842).
        offset_scale: share of a reference box that an offset of 1 spans, over all points of a level; no matter for reference points.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for sizes below 1, heads that do not divide `embed_dim`, and `num_points` that are not one per level.
        TypeError: for sizes that are no integers.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int | Sequence[int] = 4,
        *,
        offset_scale: float = 0.5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("num_levels", num_levels)):
            if not isinstance(size, Integral):
                raise TypeError(f"{name} must be an integer, got {size!r}")
        self.embed_dim, self.num_heads, self.num_levels = embed_dim, num_heads, num_levels
        self.num_points = list(num_points) if isinstance(num_points, Iterable) else [num_points] * num_levels
        self.offset_scale = offset_scale
        self._check_sizes()
        samples = num_heads * sum(self.num_points)
        # Two projections, not one of both: optimisers find sampling_offsets by its name, to train it at a lower rate.
        self.sampling_offsets = nn.Linear(embed_dim, samples * 2, device=device, dtype=dtype)
        self.attention_weights = nn.Linear(embed_dim, samples, device=device, dtype=dtype)
        self.value_proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.output_proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initialisation of Deformable DETR: head m looks in direction 2πm / M, point p at p + 1 pixels (in the maximum norm)."""
        angles = torch.arange(self.num_heads, dtype=torch.float64) * (2 * math.pi / self.num_heads)
        direction = torch.stack((angles.cos(), angles.sin()), -1)  # [M, 2]
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.tensor([p + 1 for count in self.num_points for p in range(count)], dtype=torch.float64)  # [K]
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_((direction[:, None] * distance[:, None]).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        spatial_shapes: Shapes,
        level_start_index: Tensor | None = None,
        padding_mask: Tensor | None = None,
        *,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends; under autocast, keep reference points in float32.

        Args:
            query: [B, Q, embed_dim], position embedding added.
            reference_points: [B, Q, L or 1, 2] (x, y) or [B, Q, L or 1, 4] (cx, cy, w, h); 0 and 1 are the edges of the image.
            input_flatten: [B, S, embed_dim], the tokens of all levels.
            spatial_shapes: (height, width) of each level as Python ints, or int64 [L, 2] on the device.
            level_start_index: int64 [L], first token of each level; by default levels follow each other.
            padding_mask: bool [B, S], True for tokens that are padding, which count as 0.
            return_weights: also return the attention weights, without gradient.

        Returns:
            [B, Q, embed_dim]; with `return_weights` also float32 [B, Q, M, K], K samples level by level (float64 for float64 parameters).

        Raises:
            ValueError: for shapes, sizes or devices that do not fit together.
            TypeError: for a padding mask that is not bool, and for integer tensors elsewhere.
        """
        self._check_tokens("query", query)
        self._check_tokens("input_flatten", input_flatten)
        value = self.value_proj(input_flatten)
        if padding_mask is not None:
            value = value.masked_fill(_check_mask(padding_mask, input_flatten).unsqueeze(-1), 0)
        offsets = self.sampling_offsets(query).unflatten(2, (self.num_heads, -1, 2))  # [B, Q, M, K, 2]
        logits = self.attention_weights(query).unflatten(2, (self.num_heads, -1))  # [B, Q, M, K]
        out, lse = ms_deform_attn_fused(
            value.unflatten(2, (self.num_heads, -1)),
            spatial_shapes,
            reference_points,
            offsets,
            logits,
            level_start_index=level_start_index,
            num_points=self.num_points,
            offset_scale=self.offset_scale,
            return_lse=True,
        )
        out = self.output_proj(out)
        return (out, (logits.detach() - lse.unsqueeze(-1)).exp()) if return_weights else out

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, num_points={self.num_points}, offset_scale={self.offset_scale}"

    def _check_sizes(self) -> None:
        if not all(isinstance(count, Integral) for count in self.num_points):
            raise TypeError(f"num_points must be an integer or a sequence of integers, got {self.num_points}")
        for name in ("embed_dim", "num_heads", "num_levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {self.num_heads} and {self.embed_dim}")
        if len(self.num_points) != self.num_levels or min(self.num_points) < 0 or sum(self.num_points) < 1:
            raise ValueError(f"num_points must be a positive number or {self.num_levels} numbers, one per level, got {self.num_points}")

    def _check_tokens(self, name: str, tokens: Tensor) -> None:
        if tokens.dim() != 3 or tokens.shape[2] != self.embed_dim:
            raise ValueError(f"{name} must be [B, tokens, {self.embed_dim}], got {list(tokens.shape)}")


def _check_mask(mask: Tensor, tokens: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        raise TypeError(f"padding_mask must be bool, got {mask.dtype}")
    if mask.shape != tokens.shape[:2]:
        raise ValueError(f"padding_mask must be {list(tokens.shape[:2])}, got {list(mask.shape)}")
    return mask
