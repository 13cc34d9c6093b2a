"""The encoder of Deformable DETR: every token of the pyramid attends to a few points on every level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ssod_fast.nn import MultiScaleDeformableAttention

from .config import DETRConfig
from .positions import token_centres


class FeedForward(nn.Module):
    """Two linear layers around a ReLU.

    Args:
        width: of tokens.
        hidden: units between the layers.
        dropout: behind the ReLU.
    """

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = dropout
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        # Of three dimensions a linear layer would return a view, and autograd copies what is changed in place through a view.
        hidden = F.relu(self.linear1(x.flatten(0, 1)), inplace=True)
        return cast(Tensor, self.linear2(F.dropout(hidden, self.dropout, self.training))).view_as(x)


class EncoderLayer(nn.Module):
    """Deformable attention, then a feed-forward block, each added to its input and normalised."""

    def __init__(self, config: DETRConfig) -> None:
        super().__init__()
        self.attention = MultiScaleDeformableAttention(config.width, config.heads, config.levels, config.points)
        self.attention_norm = nn.LayerNorm(config.width)
        self.ffn = FeedForward(config.width, config.ffn, config.dropout)
        self.ffn_norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, tokens: Tensor, positions: Tensor, reference: Tensor, shapes: Sequence[tuple[int, int]], padding: Tensor | None
    ) -> Tensor:
        """Arguments as of :class:`Encoder`, but `reference` [B, S, L or 1, 2]: where the attention of each token starts on each level."""
        attended = self.attention(tokens + positions, reference, tokens, shapes, padding_mask=padding)
        tokens = self.attention_norm(tokens + self.dropout(attended))
        return cast(Tensor, self.ffn_norm(tokens + self.dropout(self.ffn(tokens))))


class Encoder(nn.Module):
    """All encoder layers. `torch.compile` takes it as one graph."""

    def __init__(self, config: DETRConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        shapes: Sequence[tuple[int, int]],
        valid_ratios: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Encodes.

        Args:
            tokens: [B, S, D], the levels one after the other.
            positions: [B or 1, S, D], embedding of position and level.
            shapes: (h, w) of each level.
            valid_ratios: float32 [B, L, 2], share (x, y) of each level that is image; None if images fill the batch.
            padding: bool [B, S], True outside of the image; None if images fill the batch.

        Returns:
            [B, S, D].
        """
        reference = token_centres(shapes, valid_ratios, tokens)[:, :, None]  # [B or 1, S, 1, 2]
        if valid_ratios is None:
            reference = reference.expand(tokens.shape[0], -1, -1, -1)
        else:
            reference = reference * valid_ratios[:, None]
        for layer in self.layers:
            tokens = layer(tokens, positions, reference, shapes, padding)
        return tokens
