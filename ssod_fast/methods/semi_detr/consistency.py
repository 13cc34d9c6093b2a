"""Cross-view query consistency of Semi-DETR (arXiv 2307.08095): queries made of pseudo boxes shall give student and teacher equal states.

The official code decodes five identical copies of each image's queries. Copies see equal batch statistics, give equal states and leave
every mean as it is, so here there is one group per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert

from ssod_fast.criterion.losses import _wide
from ssod_fast.nn.pyramid import pool_boxes
from ssod_fast.structures import PaddedTargets, upload

Reduction = Literal["mean_product", "weighted"]

STRIDES = (8, 16, 32, 64)
_DUMMY = (0.25, 0.75)  # where the box of an image without pseudo boxes begins and ends, in shares of either side
_CENTRE = 0.5  # all four coordinates of a padding query, whose logits so are 0


@dataclass(frozen=True)
class QueryRows:
    """Where the consistency queries of a batch lie: one row per pseudo box, or one dummy row where an image has none.

    The R rows of all images stand one after the other where they are pooled and projected, because the batch norms of the projector must
    see them and nothing else. The decoder takes them as [B, N, ...], N the longest image's.

    Attributes:
        image: int64 [R], the image of each row.
        slot: int64 [R], its place among the rows of the image.
        weight: float32 [R], 1, or 0 for a dummy.
        batch: B.
        size: N, at least 1.
    """

    image: Tensor
    slot: Tensor
    weight: Tensor
    batch: int
    size: int

    @property
    def place(self) -> Tensor:
        """int64 [R], place among the B * N of the decoder."""
        return self.image * self.size + self.slot

    @property
    def padding(self) -> Tensor:
        """Bool [B, N], True where there is no row. The official decoder lets queries see padding of their group."""
        return self.pad(torch.ones_like(self.weight)[:, None])[..., 0] == 0

    def pad(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[R, D] as [B, N, D], with gradient."""
        spread = values.new_full((self.batch * self.size, values.shape[-1]), fill)
        return spread.index_copy(0, self.place, values).view(self.batch, self.size, -1)

    def take(self, values: Tensor) -> Tensor:
        """[..., B, N, D] as [..., R, D], with gradient."""
        return values.flatten(-3, -2).index_select(-2, self.place)

    def boxes(self, targets: PaddedTargets, image_hw: Tensor) -> Tensor:
        """The box of each row, [R, 4] xyxy in pixels.

        Args:
            targets: pseudo boxes of one view, in pixels; those that count come first in each image.
            image_hw: [B, 2], height and width of the views.
        """
        extent = image_hw.flip(-1).repeat(1, 2).to(targets.boxes.dtype)  # [B, 4]
        low, high = _DUMMY
        dummy = torch.cat([low * extent[:, :2], high * extent[:, 2:]], 1)
        boxes = torch.cat([targets.boxes, dummy[:, None]], 1)  # a spare row, so that there is one to index in any case
        own = boxes.flatten(0, 1)[self.image * boxes.shape[1] + self.slot]
        return torch.where(self.weight[:, None] > 0, own, dummy[self.image])

    def references(self, boxes: Tensor, image_hw: Tensor) -> Tensor:
        """Where the decoder starts: [B, N, 4] cxcywh in shares of the image, the centre of the image in padding.

        Args:
            boxes: [R, 4] xyxy in pixels.
            image_hw: [B, 2], height and width of the view.
        """
        extent = image_hw.flip(-1).repeat(1, 2).to(boxes.dtype)[self.image]
        return self.pad((box_convert(boxes, "xyxy", "cxcywh") / extent).clamp(0, 1), _CENTRE)


def query_rows(counts: Sequence[int], device: torch.device | str = "cpu") -> QueryRows:
    """Lays out consistency queries.

    Args:
        counts: pseudo boxes per image, known to the host; this is what a step reads back from the device once.
        device: where the index tensors go; the upload does not wait.

    Raises:
        ValueError: no image, or a negative count.
    """
    if not counts or min(counts) < 0:
        raise ValueError(f"counts must hold a number >= 0 for each of at least one image, got {list(counts)}")
    rows = [(image, slot, int(count > 0)) for image, count in enumerate(counts) for slot in range(max(count, 1))]
    image, slot, real = upload(torch.tensor(rows, dtype=torch.int64).t().contiguous(), torch.device(device))
    return QueryRows(image, slot, real.float(), len(counts), max(*counts, 1))


class Projector(nn.Module):
    """Content of queries from pooled features: two convolutions, then two linear layers, with batch norms.

    The single row of a batch of one has no variance, which a batch norm refuses; it is then taken twice, which is what several copies of
    it would give: all normalised values are 0, and what comes out is made of the biases.

    Args:
        width: channels of features and content.
        size: height and width of the pooled features.
        hidden: units between the linear layers.
    """

    def __init__(self, width: int = 256, size: int = 7, hidden: int = 1024) -> None:
        super().__init__()
        self.convs = nn.Sequential(*_conv(width), *_conv(width))
        self.linears = nn.Sequential(
            nn.Linear(width * size * size, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width), nn.ReLU()
        )

    def forward(self, features: Tensor) -> Tensor:
        """[R, width, size, size] to [R, width]."""
        alone = self.training and features.shape[0] == 1
        rows = torch.cat([features, features]) if alone else features
        content: Tensor = self.linears(self.convs(rows).flatten(1))
        return content.mean(0, keepdim=True) if alone else content


def _conv(width: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()


@torch.no_grad()
def roi_features(maps: Sequence[Tensor], boxes: Tensor, image: Tensor, *, strides: Sequence[int] = STRIDES, size: int = 7) -> Tensor:
    """Features [R, D, size, size] under boxes, without gradient; see :func:`~ssod_fast.nn.pyramid.pool_boxes`."""
    return pool_boxes(maps, boxes, image, strides=strides, size=size)


def consistency_loss(student: Tensor, teacher: Tensor, weight: Tensor, *, reduction: Reduction = "mean_product") -> Tensor:
    """Squared distance of normalised decoder states, for each layer.

    "mean_product" is what the official code computes: its weights [R, 1, 1] meet errors [R, D] in a tensor [R, R, D], and the mean of that
    is mean(errors) · mean(weights), so that rows of weight 0 dilute the loss instead of leaving it. "weighted" is the mean over the rows
    that count. Both take memory for the states alone.

    Args:
        student: [..., R, D] states.
        teacher: [..., R, D] states, a constant.
        weight: [R].
        reduction: see above.

    Returns:
        [...], 0 where all weights are.

    Raises:
        ValueError: for shapes that do not fit, no row, and an unknown reduction.
    """
    if student.shape != teacher.shape or weight.shape != student.shape[-2:-1] or not weight.shape[0]:
        found = f"{list(student.shape)}, {list(teacher.shape)} and {list(weight.shape)}"
        raise ValueError(f"student and teacher must be [..., R, D] and weight [R] with R >= 1, got {found}")
    difference = F.normalize(_wide(student), dim=-1) - F.normalize(_wide(teacher.detach()), dim=-1)
    error = difference.square().mean(-1)  # [..., R]
    if reduction == "mean_product":
        return error.mean(-1) * weight.mean()
    if reduction == "weighted":
        return (error * weight).sum(-1) / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
    raise ValueError(f'reduction must be "mean_product" or "weighted", got {reduction!r}')


class CrossViewQueryConsistency(nn.Module):
    """What cross-view query consistency needs beside two networks: the projector, and the steps before and after the decoders.

    Example:
        rows = query_rows(counts, device)
        weak_boxes, strong_boxes = rows.boxes(weak, weak_hw), rows.boxes(strong, strong_hw)
        content = consistency.content(teacher_maps, weak_boxes, rows)  # pyramid of the teacher on the weak views
        student_states = ...  # decode content from rows.references(strong_boxes, strong_hw): hidden [L, B, N, D]
        teacher_states = ...  # the same content from rows.references(weak_boxes, weak_hw), without gradient
        loss = 10 * consistency.loss(student_states, teacher_states, rows).sum()

    Args:
        width: channels of the pyramid and the decoder.
        strides: pixels per cell of each level of the pyramid.
        reduction: see :func:`consistency_loss`.
        size: height and width of pooled features.
        hidden: units between the projector's linear layers.
    """

    def __init__(
        self,
        width: int = 256,
        *,
        strides: Sequence[int] = STRIDES,
        reduction: Reduction = "mean_product",
        size: int = 7,
        hidden: int = 1024,
    ) -> None:
        super().__init__()
        if reduction not in ("mean_product", "weighted"):
            raise ValueError(f'reduction must be "mean_product" or "weighted", got {reduction!r}')
        self.projector = Projector(width, size, hidden)
        self.strides, self.reduction, self.size = tuple(strides), reduction, size

    def content(self, maps: Sequence[Tensor], boxes: Tensor, rows: QueryRows) -> Tensor:
        """Content of the queries, [B, N, D]; 0 in padding. Features get no gradient, the projector does.

        Args:
            maps: projected features of one view before the encoder, [B, D, h, w] each.
            boxes: [R, 4] xyxy in pixels of that view.
            rows: of the queries.
        """
        return rows.pad(self.projector(roi_features(maps, boxes, rows.image, strides=self.strides, size=self.size)))

    forward = content

    def loss(self, student: Tensor, teacher: Tensor, rows: QueryRows) -> Tensor:
        """[L]: :func:`consistency_loss` of decoder states [L, B, N, D], as the heads read them."""
        return consistency_loss(rows.take(student), rows.take(teacher), rows.weight, reduction=self.reduction)
