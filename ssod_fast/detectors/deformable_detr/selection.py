"""Where queries come from: learned, or from the best proposals of the encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import DETRConfig
from .heads import BoxHead, class_head
from .positions import box_embedding, token_centres
from .stages import Memory, Proposals, Queries

# A token of level l proposes a box of this size times 2**l, as in Deformable DETR.
_SIZE = 0.05
# Tokens propose nothing if a coordinate of their box is nearer to 0 or 1 than this.
_MARGIN = 0.01


class LearnedQueries(nn.Module):
    """Queries that are the same for every image.

    They start from learned points with learned positions (Deformable DETR), or from learned boxes (DAB-DETR, arXiv 2201.12329) if positions
    follow the boxes.
    """

    def __init__(self, config: DETRConfig) -> None:
        super().__init__()
        width, queries = config.width, config.queries
        self.content = nn.Embedding(queries, width)
        self.box_positions = config.box_positions
        if config.box_positions:
            self.boxes = nn.Embedding(queries, 4)
        else:
            self.positions = nn.Embedding(queries, width)
            self.centre = nn.Linear(width, 2)
            nn.init.xavier_uniform_(self.centre.weight)
            nn.init.zeros_(self.centre.bias)

    def forward(self, memory: Memory) -> tuple[Queries, None]:
        """The queries, once per image."""
        shape = memory.tokens.shape[0], -1, -1
        content = self.content.weight.expand(shape)
        if self.box_positions:
            return Queries(content, self.boxes.weight.expand(shape)), None
        positions = self.positions.weight
        with torch.autocast(positions.device.type, enabled=False):
            reference = self.centre(positions)
        return Queries(content, reference.expand(shape), positions.expand(shape)), None

    def position(self, boxes: Tensor, dtype: torch.dtype) -> None:
        """None: positions follow the boxes. Without that there is no position for a given box."""
        if not self.box_positions:
            raise ValueError('queries at given boxes need selection "two_stage" or "mixed", or box_positions=True, got selection "none"')


class ProposalQueries(nn.Module):
    """Queries at the boxes that the encoder finds best.

    "two_stage" derives content and position from these boxes; "mixed" learns the content and leaves positions to the decoder.
    """

    def __init__(self, config: DETRConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.output = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.output.weight)
        self.output_norm = nn.LayerNorm(width)
        self.classes = class_head(width, config.num_classes)
        self.boxes = BoxHead(width)
        if config.selection == "two_stage":
            self.from_box = nn.Linear(2 * width, 2 * width)
            nn.init.xavier_uniform_(self.from_box.weight)
            self.from_box_norm = nn.LayerNorm(2 * width)
        else:
            self.content = nn.Embedding(config.queries, width)

    def forward(self, memory: Memory) -> tuple[Queries, Proposals]:
        """As many queries as wanted or as there are tokens, whichever is less."""
        two_stage = self.config.selection == "two_stage"
        anchors = token_anchors(memory)
        states = self._states(memory.tokens, anchors)
        logits = self.classes(states)  # [B, S, C]
        scores = logits.detach()[..., 0] if two_stage else logits.detach().amax(-1)
        best = scores.topk(min(self.config.queries, scores.shape[1]), 1).indices  # [B, Q]
        if two_stage and self.training:
            # The published loss matches all tokens.
            coordinates = self.boxes(states) + anchors
            proposals = Proposals(logits, coordinates.sigmoid())
            coordinates = _rows(coordinates, best)
        else:
            coordinates = self.boxes(_rows(states, best)) + _rows(anchors, best)
            proposals = Proposals(_rows(logits, best), coordinates.sigmoid())
        return self._queries(coordinates.detach(), states.dtype), proposals

    def position(self, boxes: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Position embedding of boxes [B, N, 4], of the given dtype; None where the decoder derives it."""
        return None if self.config.box_positions else self._from_box(boxes, dtype)[0]

    def _states(self, tokens: Tensor, anchors: Tensor) -> Tensor:
        """What the heads read, [B, S, D]; the same for all tokens that propose nothing."""
        out: Tensor = self.output_norm(self.output(tokens.masked_fill(anchors[..., :1].isinf(), 0)))
        return out

    def _queries(self, coordinates: Tensor, dtype: torch.dtype) -> Queries:
        """Queries at logits [B, Q, 4]."""
        if self.config.selection == "mixed":
            number = coordinates.shape[1]
            return Queries(self.content.weight[:number].expand(coordinates.shape[0], -1, -1), coordinates)
        position, content = self._from_box(coordinates.sigmoid(), dtype)
        return Queries(content, coordinates, None if self.config.box_positions else position)

    def _from_box(self, boxes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Position and content of queries at boxes [B, Q, 4]."""
        embedded = box_embedding(boxes, self.config.width).to(dtype)
        position, content = self.from_box_norm(self.from_box(embedded)).chunk(2, -1)
        return position, content


def token_anchors(memory: Memory) -> Tensor:
    """Logits of the box that each token starts from, float32 [B or 1, S, 4]; infinite for tokens outside of the image or at its border."""
    centres = token_centres(memory.shapes, None if memory.padding is None else memory.valid_ratios, memory.tokens)
    sizes = torch.cat([centres.new_full((1, h * w, 2), _SIZE * 2.0**level) for level, (h, w) in enumerate(memory.shapes)], 1)
    boxes = torch.cat((centres, sizes.expand_as(centres)), -1)
    inside = ((boxes > _MARGIN) & (boxes < 1 - _MARGIN)).all(-1, keepdim=True)
    return torch.logit(boxes, eps=_MARGIN / 2).masked_fill(~inside, torch.inf)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, K] of each image of x [B or 1, S, C]."""
    return x.expand(index.shape[0], -1, -1).gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
