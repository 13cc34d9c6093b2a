"""Deformable DETR and DINO, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssod_fast.structures import upload

from ..protocol import ImageBatch
from .config import DETRConfig
from .decoder import Decoder
from .encoder import Encoder
from .positions import Extents, inverse_sigmoid
from .selection import LearnedQueries, ProposalQueries
from .stages import Decoded, LayerInput, Memory, Proposals, Pyramid, Queries


class DeformableDETR(nn.Module):
    """A detection transformer that follows :class:`DETRStages`: images -> pyramid -> memory -> queries -> boxes.

    Args:
        config: sizes and options.
        backbone: module that maps images [B, 3, H, W] to a list of feature maps, finest first, each of half the size of the one before;
            its attribute `channels` lists their channels. The published networks use the strides 8, 16 and 32.

    Attributes:
        config: as given.
        backbone: as given.
        projections: maps to width; those behind the backbone's maps add coarser levels.
        encoder: tokens to memory; may be compiled, `network.encoder.compile()`.
        decoder: memory and queries to boxes; may be compiled as well.
        queries: where queries come from.

    Raises:
        TypeError: the backbone does not tell its channels.
    """

    def __init__(self, config: DETRConfig, backbone: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.projections = _projections(config, _channels(backbone))
        self.level_embedding = nn.Parameter(torch.randn(config.levels, config.width))
        self.encoder = Encoder(config)
        self.queries: LearnedQueries | ProposalQueries = LearnedQueries(config) if config.selection == "none" else ProposalQueries(config)
        self.decoder = Decoder(config)
        if config.denoising:
            self.label_embedding = nn.Embedding(config.num_classes, config.width)

    def forward(self, images: ImageBatch) -> tuple[Decoded, Proposals | None]:
        """Everything that is said about the images, by the decoder and, where it selects queries, by the encoder."""
        memory = self.encode(self.extract(images))
        queries, proposals = self.select(memory)
        return self.decode(memory, queries), proposals

    def extract(self, images: ImageBatch) -> Pyramid:
        """Backbone and projections."""
        maps = self._maps(self.backbone(images.tensor))
        device, dtype = images.tensor.device, torch.promote_types(images.tensor.dtype, torch.float32)
        height, width = images.tensor.shape[-2:]
        extents = Extents.of(images.sizes, (height, width), [(m.shape[-2], m.shape[-1]) for m in maps])
        return Pyramid(
            maps,
            None if extents.full else extents.padding(device),
            extents.map_positions(self.config.width, self.config.temperature, device, dtype),
            extents.valid_ratios(device, dtype),
            upload(torch.tensor(images.sizes, dtype=dtype), device),
        )

    def encode(self, pyramid: Pyramid) -> Memory:
        """The encoder."""
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in pyramid.maps], 1)
        positions = torch.cat([p + e for p, e in zip(pyramid.positions, self.level_embedding, strict=True)], 1)
        padding = None if pyramid.padding is None else torch.cat([p.flatten(1) for p in pyramid.padding], 1)
        encoded = self.encoder(tokens, positions, pyramid.shapes, None if padding is None else pyramid.valid_ratios, padding)
        return Memory(encoded, padding, pyramid.shapes, pyramid.valid_ratios, pyramid.image_hw)

    def select(self, memory: Memory) -> tuple[Queries, Proposals | None]:
        """Queries that are matched with objects; with the encoder's proposals where there are such."""
        return cast(tuple[Queries, Proposals | None], self.queries(memory))

    def box_queries(self, content: Tensor, boxes: Tensor) -> Queries:
        """Queries with the given content [B, N, D] that start at the given boxes [B, N, 4].

        Raises:
            ValueError: the network knows no position for a given box, or shapes do not fit.
        """
        if content.shape != (*boxes.shape[:2], self.config.width) or boxes.shape[-1] != 4:
            expected = f"[B, N, {self.config.width}] and [B, N, 4]"
            raise ValueError(f"content and boxes must be {expected}, got {list(content.shape)} and {list(boxes.shape)}")
        # As wide as the content at least, so that a network in double precision starts from what it would compute with others beside it.
        boxes = boxes.to(torch.promote_types(boxes.dtype, content.dtype))
        return Queries(content, inverse_sigmoid(boxes), self.queries.position(boxes, content.dtype))

    def label_queries(self, labels: Tensor, boxes: Tensor) -> Queries:
        """Denoising queries: content learned per class of `labels` [B, N], zeros for label -1, starting at `boxes` [B, N, 4].

        Raises:
            ValueError: the network was built without denoising, or as `box_queries`.
        """
        if not self.config.denoising:
            raise ValueError("label_queries needs a network with config.denoising of at least 1, got 0")
        content = self.label_embedding(labels.clamp(min=0)).masked_fill((labels < 0)[..., None], 0)
        return self.box_queries(content, boxes)

    def decode(
        self,
        memory: Memory,
        queries: Queries,
        *,
        blocked: Tensor | None = None,
        context: tuple[LayerInput, ...] = (),
        keep_inputs: bool = False,
    ) -> Decoded:
        """All decoder layers and heads; see :class:`DETRStages`.

        Raises:
            ValueError: a mask or a context that does not fit, or queries without the positions that the network does not derive.
            TypeError: a mask that is not bool.
        """
        _check_blocked(blocked, queries.content)
        if queries.position is None and not self.config.box_positions:
            raise ValueError("queries must have positions for a network without box_positions, got None")
        if context and len(context) != self.config.decoder_layers:
            raise ValueError(f"context must hold one entry for each of the {self.config.decoder_layers} layers, got {len(context)}")
        return cast(Decoded, self.decoder(memory, queries, blocked, context, keep_inputs))

    def _maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        """[B, D, h, w] of all levels."""
        first = max(len(features) - len(self.projections), 0)
        maps = [projection(x) for projection, x in zip(self.projections, features[first:], strict=False)]
        for i in range(len(maps), len(self.projections)):
            maps.append(self.projections[i](maps[-1] if i > len(features) else features[-1]))
        return maps


def _channels(backbone: Any) -> list[int]:
    channels = getattr(backbone, "channels", None)
    if not channels or not all(isinstance(c, int) for c in channels):
        raise TypeError(f"backbone must list the channels of its maps in an attribute channels, {type(backbone).__name__} has {channels!r}")
    return list(channels)


def _projections(config: DETRConfig, channels: list[int]) -> nn.ModuleList:
    """1 x 1 convolutions of the deepest maps, then strided ones for further levels: of the last map, and of one another."""
    width, groups = config.width, config.norm_groups or math.gcd(config.width, max(config.width // 8, 1))
    convolutions = [nn.Conv2d(c, width, 1) for c in channels[-config.levels :]]
    for i in range(config.levels - len(convolutions)):
        convolutions.append(nn.Conv2d(width if i else channels[-1], width, 3, 2, 1))
    for convolution in convolutions:
        nn.init.xavier_uniform_(convolution.weight)
        nn.init.zeros_(cast(Tensor, convolution.bias))
    return nn.ModuleList(nn.Sequential(convolution, nn.GroupNorm(groups, width)) for convolution in convolutions)


def _check_blocked(blocked: Any, content: Tensor) -> None:
    if blocked is None:
        return
    if not isinstance(blocked, Tensor) or blocked.dtype is not torch.bool:
        raise TypeError(f"blocked must be a bool tensor, got {getattr(blocked, 'dtype', type(blocked).__name__)}")
    batch, number = content.shape[:2]
    if list(blocked.shape) not in ([number, number], [batch, number, number]):
        raise ValueError(f"blocked must be [{number}, {number}] or [{batch}, {number}, {number}], got {list(blocked.shape)}")
