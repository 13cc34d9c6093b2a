"""What the stages of a detection transformer hand to each other, and what a method that runs them one by one may rely on.

Boxes are cxcywh, normalised by the true size of the image (not by the padded one). "Logits" of a box are the inverse sigmoid of its
coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..protocol import ImageBatch


@dataclass(frozen=True)
class Pyramid:
    """Feature maps of a batch, projected to the width of the transformer, and where the images lie in them.

    Attributes:
        maps: [B, D, h, w] each, finest first.
        padding: bool [B, h, w] each, True outside of the image; None if all images fill the batch, which needs no masks.
        positions: [B, h * w, D] each, sine embedding of the position in the image, without an embedding of the level; [1, h * w, D] where
            all images have the same.
        valid_ratios: float32 [B, L, 2], share (x, y) of each level that is image.
        image_hw: float32 [B, 2], true height and width of the images in pixels, on the device.
    """

    maps: list[Tensor]
    padding: list[Tensor] | None
    positions: list[Tensor]
    valid_ratios: Tensor
    image_hw: Tensor

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(h, w) of each level."""
        return [(m.shape[-2], m.shape[-1]) for m in self.maps]


@dataclass(frozen=True)
class Memory:
    """Output of the encoder.

    Attributes:
        tokens: [B, S, D], the levels one after the other.
        padding: bool [B, S], True outside of the image; None if all images fill the batch, and all valid ratios are 1.
        shapes: (h, w) of each level.
        valid_ratios: float32 [B, L, 2], share (x, y) of each level that is image.
        image_hw: float32 [B, 2], true height and width of the images in pixels.
    """

    tokens: Tensor
    padding: Tensor | None
    shapes: list[tuple[int, int]]
    valid_ratios: Tensor
    image_hw: Tensor


@dataclass(frozen=True)
class Queries:
    """What enters the decoder.

    Attributes:
        content: [B, Q, D].
        reference: float32 [B, Q, 4] logits of boxes, or [B, Q, 2] of centres, infinite for proposals from the border of the image; without
            gradient unless the network learns them.
        position: [B, Q, D], embedding that is added in every layer; None where the decoder derives it from the current box.
    """

    content: Tensor
    reference: Tensor
    position: Tensor | None = None


@dataclass(frozen=True)
class Proposals:
    """What the encoder's own head says, of those tokens that a loss looks at.

    Attributes:
        logits: [B, N, C].
        boxes: float32 [B, N, 4].
    """

    logits: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class LayerInput:
    """What one decoder layer was given, as later queries on the same memory need it.

    Attributes:
        state: [B, Q, D], output of the layer before, not normalised.
        position: [B, Q, D], what was added for keys and queries.
        value: [B, S, M, D / M], the memory as the layer reads it: its projection costs more than many queries do. None: to be projected.
    """

    state: Tensor
    position: Tensor
    value: Tensor | None = None


@dataclass(frozen=True)
class Decoded:
    """Output of the decoder, of all its layers.

    Attributes:
        hidden: [L, B, Q, D], what the heads read (normalised where the decoder ends in a norm).
        logits: [L, B, Q, C].
        boxes: float32 [L, B, Q, 4].
        inputs: what entered each layer, if it was asked for.
    """

    hidden: Tensor
    logits: Tensor
    boxes: Tensor
    inputs: tuple[LayerInput, ...] = ()


@runtime_checkable
class DETRStages(Protocol):
    """A detection transformer whose stages can be run one by one."""

    def extract(self, images: ImageBatch) -> Pyramid:
        """Backbone and projections."""
        ...

    def encode(self, pyramid: Pyramid) -> Memory:
        """The encoder."""
        ...

    def select(self, memory: Memory) -> tuple[Queries, Proposals | None]:
        """Queries that are matched with objects; with the encoder's proposals where there are such."""
        ...

    def box_queries(self, content: Tensor, boxes: Tensor) -> Queries:
        """Queries with the given content [B, N, D] that start at the given boxes [B, N, 4]."""
        ...

    def label_queries(self, labels: Tensor, boxes: Tensor) -> Queries:
        """Denoising queries: content learned per class of `labels` [B, N], zeros for label -1, starting at `boxes` [B, N, 4]."""
        ...

    def decode(
        self,
        memory: Memory,
        queries: Queries,
        *,
        blocked: Tensor | None = None,
        context: tuple[LayerInput, ...] = (),
        keep_inputs: bool = False,
    ) -> Decoded:
        """All decoder layers and heads.

        Args:
            memory: what queries look at.
            queries: Q of them.
            blocked: bool [Q, Q] or [B, Q, Q], True where a query (row) must not attend to another (column).
            context: per layer, other queries that all of these attend to as well, as `Decoded.inputs` of an earlier call with the same
                memory holds them. They are not decoded again. Gradients flow into them.
            keep_inputs: fill `Decoded.inputs`.
        """
        ...
