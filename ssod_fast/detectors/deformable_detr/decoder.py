"""The decoder: queries attend to each other and to the memory, and every layer says what they have found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssod_fast.nn import MultiScaleDeformableAttention

from .config import DETRConfig
from .encoder import FeedForward
from .heads import MLP, LayerHeads
from .positions import box_embedding, clamp_logits
from .stages import Decoded, LayerInput, Memory, Queries

_YXWH = (1, 0, 2, 3)


class SelfAttention(nn.Module):
    """Multi-head attention among queries; positions count for whom a query listens to, not for what it hears."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            # The three in one matrix, as nn.MultiheadAttention has them, would get these weights from an initialisation of gain 1.
            nn.init.xavier_uniform_(projection.weight, gain=2**-0.5)
            nn.init.zeros_(projection.bias)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, position: Tensor, allowed: Tensor | None = None, context: LayerInput | None = None) -> Tensor:
        """Attends.

        Args:
            x: [B, Q, D].
            position: [B, Q, D], added for queries and keys.
            allowed: bool [1 or B, 1, Q, Q + N], who may listen to whom; None: all to all.
            context: N further rows that are listened to but do not listen.

        Returns:
            [B, Q, D].
        """
        query = x + position
        key, value = query, x
        if context is not None:
            key = torch.cat((query, context.state + context.position), 1)
            value = torch.cat((x, context.state), 1)
        q, k, v = self._split(self.q_proj(query)), self._split(self.k_proj(key)), self._split(self.v_proj(value))
        heard = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=self.dropout if self.training else 0.0)
        return cast(Tensor, self.out_proj(heard.transpose(1, 2).flatten(2)))

    def _split(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, M, N, D / M]."""
        return cast(Tensor, x.unflatten(2, (self.heads, -1)).transpose(1, 2))


class DecoderLayer(nn.Module):
    """Self-attention, deformable attention to the memory, feed-forward; each added to its input and normalised."""

    def __init__(self, config: DETRConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config.width, config.heads, config.dropout)
        self.self_norm = nn.LayerNorm(config.width)
        self.cross_attention = MultiScaleDeformableAttention(config.width, config.heads, config.levels, config.points)
        self.cross_norm = nn.LayerNorm(config.width)
        self.ffn = FeedForward(config.width, config.ffn, config.dropout)
        self.ffn_norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        given: LayerInput,
        reference: Tensor,
        shapes: Sequence[tuple[int, int]],
        allowed: Tensor | None = None,
        context: LayerInput | None = None,
    ) -> Tensor:
        """Decodes.

        Args:
            given: state and position of the queries, and the projected memory.
            reference: float32 [B, Q, L or 1, 2 or 4], points or boxes on each level, in units of the padded level.
            shapes: (h, w) of each level.
            allowed: see :class:`SelfAttention`, as is `context`.
            context: other queries.

        Returns:
            [B, Q, D].
        """
        x, position = given.state, given.position
        x = self.self_norm(x + self.dropout(self.self_attention(x, position, allowed, context)))
        seen = self.cross_attention.attend(x + position, reference, cast(Tensor, given.value), shapes)
        x = self.cross_norm(x + self.dropout(seen))
        return cast(Tensor, self.ffn_norm(x + self.dropout(self.ffn(x))))

    def value(self, memory: Memory, context: LayerInput | None) -> Tensor:
        """The projected memory [B, S, M, D / M], from an earlier call if that had it."""
        if context is not None and context.value is not None:
            return context.value
        return self.cross_attention.project(memory.tokens, memory.padding)


class Decoder(nn.Module):
    """All decoder layers and the heads that read them. `torch.compile` takes it as one graph."""

    def __init__(self, config: DETRConfig) -> None:
        super().__init__()
        self.config = config
        width, layers = config.width, config.decoder_layers
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(layers))
        # Width and height start from a logit of -2, about .12 of the image, where queries start from points.
        size_logit = -2.0 if config.selection == "none" and not config.box_positions else 0.0
        self.heads = LayerHeads(width, config.num_classes, layers, config.own_heads, size_logit)
        if config.box_positions:
            self.norm = nn.LayerNorm(width)
            self.box_position = MLP(2 * width, width, width)
            for layer in self.box_position.layers:
                nn.init.xavier_uniform_(cast(nn.Linear, layer).weight)

    def forward(
        self,
        memory: Memory,
        queries: Queries,
        blocked: Tensor | None = None,
        context: tuple[LayerInput, ...] = (),
        keep_inputs: bool = False,
    ) -> Decoded:
        """All layers; see `decode` of :class:`DETRStages`."""
        allowed = _allowed(blocked, context)
        x, reference = queries.content, queries.reference
        base = reference  # the same boxes, with gradient where a prediction trains the layer before too
        hidden, logits, boxes, inputs = [], [], [], []
        for i, module in enumerate(self.layers):
            layer, before = cast(DecoderLayer, module), context[i] if context else None
            given = LayerInput(x, self._position(queries, reference), layer.value(memory, before))
            x = layer(given, _on_levels(reference.sigmoid(), memory), memory.shapes, allowed, before)
            read = self.norm(x) if self.config.box_positions else x
            change = self.heads.change(i, read)
            hidden.append(read)
            logits.append(self.heads.logits(i, read))
            boxes.append(_moved(base, change).sigmoid())
            if keep_inputs:
                inputs.append(given)
            if self.config.box_refine:
                refined = _moved(reference, change)
                reference = refined.detach()
                base = refined if self.config.look_forward_twice else reference
        return Decoded(torch.stack(hidden), torch.stack(logits), torch.stack(boxes), tuple(inputs))

    def _position(self, queries: Queries, reference: Tensor) -> Tensor:
        """[B, Q, D], embedding of where the queries are."""
        if not self.config.box_positions:
            assert queries.position is not None
            return queries.position
        embedded = box_embedding(reference.sigmoid(), self.config.width, _YXWH)
        return cast(Tensor, self.box_position(embedded.to(queries.content.dtype)))


def _moved(reference: Tensor, change: Tensor) -> Tensor:
    """Logits of boxes [B, Q, 4] from those of a box or of a centre; the head alone decides about the size around a centre."""
    reference = clamp_logits(reference)
    if reference.shape[-1] == 2:
        reference = F.pad(reference, (0, 2))
    return reference + change


def _on_levels(reference: Tensor, memory: Memory) -> Tensor:
    """Points or boxes [B, Q, 2 or 4] in units of the image -> [B, Q, L or 1, 2 or 4] in units of the padded levels."""
    reference = reference[:, :, None]
    if memory.padding is None:
        return reference
    ratios = memory.valid_ratios
    return reference * (ratios if reference.shape[-1] == 2 else torch.cat((ratios, ratios), -1))[:, None]


def _allowed(blocked: Tensor | None, context: Sequence[LayerInput]) -> Tensor | None:
    """Mask as attention wants it: bool [1 or B, 1, Q, Q + N], True where a query may listen; the context is open to all."""
    if blocked is None:
        return None
    allowed = ~blocked if blocked.dim() == 3 else ~blocked[None]
    if context:
        allowed = F.pad(allowed, (0, context[0].state.shape[1]), value=True)
    return allowed[:, None]
