"""The attention module of Deformable DETR (Zhu et al., arXiv 2010.04159) and its descendants, around the fused op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops import ms_deform_attn_fused
from ..ops._ms_deform_checks import FLOATS, Shapes, are_integers, check_offset_scale


class MultiScaleDeformableAttention(nn.Module):
    """Every query attends to a few points around its reference on every level of a feature pyramid.

    Parameters have the names and shapes of MSDeformAttn in Deformable DETR, of mmcv's MultiScaleDeformableAttention and of the modules in
    transformers, so that their checkpoints load. Sampling locations and attention weights are never stored.

    Args:
        embed_dim: channels of queries and tokens.
        num_heads: heads, which divide `embed_dim`.
        num_levels: levels of the pyramid.
        num_points: samples per head and level; a sequence gives every level its own number, 0 included (D-FINE, arXiv 2410.13842).
        offset_scale: of reference boxes: position = cx + offset / P * w * offset_scale, where a level has P points.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for sizes below 1, heads that do not divide `embed_dim`, `num_points` that are not one per level, and an `offset_scale`
            that is not finite.
        TypeError: for sizes that are no integers and an `offset_scale` that is no number.
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
        self.embed_dim, self.num_heads, self.num_levels = embed_dim, num_heads, num_levels
        self._check_sizes()
        self.num_points = _numbers_of_points(num_points, num_levels)
        self.offset_scale = check_offset_scale(offset_scale)
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
        """Attends; under autocast, keep reference points in float32. Can be differentiated once: a second derivative raises a RuntimeError.

        Args:
            query: [B, Q, embed_dim], position embedding added; dtype of the parameters, or any float dtype under autocast.
            reference_points: [B, Q, L or 1, 2] (x, y) or [B, Q, L or 1, 4] (cx, cy, w, h); 0 and 1 are the edges of the image.
            input_flatten: [B, S, embed_dim], the tokens of all levels, dtype as of `query`.
            spatial_shapes: (height, width) of each level as Python ints, or int64 or int32 [L, 2] on the device.
            level_start_index: int64 or int32 [L], first token of each level; by default levels follow each other.
            padding_mask: bool [B, S], True for tokens that are padding, which count as 0.
            return_weights: also return the attention weights, without gradient.

        Returns:
            [B, Q, embed_dim]; with `return_weights` also float32 [B, Q, M, K], K samples level by level (float64 for float64 parameters).

        Raises:
            ValueError: for shapes, sizes or devices that do not fit together.
            TypeError: for what is no tensor, a padding mask that is not bool, integer tensors elsewhere, and dtypes that do not fit.
        """
        self._check_tokens("query", query, self.sampling_offsets)
        self._check_tokens("input_flatten", input_flatten, self.value_proj)
        _check_batch(query, input_flatten, reference_points)
        self._check_levels(spatial_shapes)
        value = self._project(input_flatten, padding_mask)
        return self._attend(query, reference_points, value, spatial_shapes, level_start_index, return_weights)

    def project(self, input_flatten: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """What queries will read of the tokens, for calls of :meth:`attend` that share it; arguments and errors are those of `forward`.

        Returns:
            [B, S, M, embed_dim / M].
        """
        self._check_tokens("input_flatten", input_flatten, self.value_proj)
        return self._project(input_flatten, padding_mask)

    def attend(
        self, query: Tensor, reference_points: Tensor, value: Tensor, spatial_shapes: Shapes, level_start_index: Tensor | None = None
    ) -> Tensor:
        """`forward` on projected tokens.

        Args:
            query: see `forward`, as are the other arguments and the errors.
            reference_points: see `forward`.
            value: [B, S, M, embed_dim / M], what `project` returned.
            spatial_shapes: see `forward`.
            level_start_index: see `forward`.

        Returns:
            [B, Q, embed_dim].
        """
        self._check_tokens("query", query, self.sampling_offsets)
        _check_batch(query, value, reference_points)
        self._check_levels(spatial_shapes)
        return cast(Tensor, self._attend(query, reference_points, value, spatial_shapes, level_start_index, False))

    def _project(self, tokens: Tensor, padding_mask: Tensor | None) -> Tensor:
        value = self.value_proj(tokens)
        if padding_mask is not None:
            value = value.masked_fill(_check_mask(padding_mask, tokens).unsqueeze(-1), 0)
        return cast(Tensor, value.unflatten(2, (self.num_heads, -1)))

    def _attend(
        self, query: Tensor, points: Tensor, value: Tensor, shapes: Shapes, start: Tensor | None, return_weights: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        offsets = self.sampling_offsets(query).unflatten(2, (self.num_heads, -1, 2))  # [B, Q, M, K, 2]
        logits = self.attention_weights(query).unflatten(2, (self.num_heads, -1))  # [B, Q, M, K]
        out, lse = ms_deform_attn_fused(
            value,
            shapes,
            points,
            offsets,
            logits,
            level_start_index=start,
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
        for name in ("embed_dim", "num_heads", "num_levels"):
            size = getattr(self, name)
            if not isinstance(size, Integral):
                raise TypeError(f"{name} must be an integer, got {size!r}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {self.num_heads} and {self.embed_dim}")

    def _check_tokens(self, name: str, tokens: Any, projection: nn.Module) -> None:
        """Checks what `projection` will read; only a plain one is known to need the dtype of its weight."""
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tokens).__name__}")
        if tokens.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tokens.dtype}")
        if tokens.dim() != 3 or tokens.shape[2] != self.embed_dim:
            raise ValueError(f"{name} must be [B, tokens, {self.embed_dim}], got {list(tokens.shape)}")
        wanted = projection.weight.dtype if type(projection) is nn.Linear else tokens.dtype
        if tokens.dtype is not wanted and wanted in FLOATS and not torch.is_autocast_enabled(tokens.device.type):
            raise TypeError(f"{name} must be {wanted} as the parameters are, outside of autocast, got {tokens.dtype}")

    def _check_levels(self, spatial_shapes: Any) -> None:
        """Checks the number of levels; the op checks everything else."""
        try:
            number = len(spatial_shapes)
        except TypeError:  # no levels at all, which the op reports
            return
        if number != self.num_levels:
            raise ValueError(f"spatial_shapes must have {self.num_levels} levels, got {number}")


def _numbers_of_points(num_points: Any, levels: int) -> list[int]:
    """Samples of each level."""
    if isinstance(num_points, Integral):
        numbers = [int(num_points)] * levels
    elif are_integers(num_points):
        numbers = list(num_points)
    else:
        raise TypeError(f"num_points must be an integer or a sequence of integers, got {num_points!r}")
    if len(numbers) != levels or min(numbers) < 0 or sum(numbers) < 1:
        raise ValueError(f"num_points must be one number or {levels}, one per level, >= 0 and not all 0, got {numbers}")
    return numbers


def _check_batch(query: Tensor, tokens: Tensor, points: Any) -> None:
    """Checks the number of images, which differs where some have the batch first and others the sequence."""
    if not isinstance(points, Tensor):
        raise TypeError(f"reference_points must be a tensor, got {type(points).__name__}")
    shapes = query.shape, tokens.shape, points.shape
    if shapes[0][0] != shapes[1][0] or shapes[0][:1] != shapes[2][:1]:
        got = ", ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"query, input_flatten and reference_points must have the images in dimension 0, as many in each, got {got}")


def _check_mask(mask: Any, tokens: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"padding_mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype is not torch.bool:
        raise TypeError(f"padding_mask must be bool, got {mask.dtype}")
    if mask.shape != tokens.shape[:2]:
        raise ValueError(f"padding_mask must be {list(tokens.shape[:2])}, got {list(mask.shape)}")
    return mask
