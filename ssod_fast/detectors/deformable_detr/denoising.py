"""Contrastive denoising (DINO, Zhang et al., arXiv 2203.03605, section 3.3): queries made of spoilt targets, which the decoder repairs.

Each group holds a slightly moved copy of every object, whose query has to find the object again, and one that is moved further, whose query
has to say that there is nothing. Which query belongs to which object is known, so nothing is matched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert

from ssod_fast.ops._matches import Matches
from ssod_fast.ops.packed_targets import PackedTargets, pack_targets
from ssod_fast.structures import PAD_LABEL, PaddedTargets

from .groups import blocked_mask

_FILLER = 0.5  # all four coordinates of the box of a padding row; its logits are 0


@dataclass(frozen=True)
class Denoising:
    """Queries of B images in groups of the same size: positive ones, one per target row, then as many negative ones.

    Images with fewer targets than rows have padding rows, which learn the background as negative ones do. An image without targets has one
    made-up object, so that its queries are as those of other images, and no share in the losses.

    Attributes:
        labels: int64 [B, R], some of them wrong; -1 in padding rows.
        boxes: float32 [B, R, 4] cxcywh, normalised, within 0..1.
        groups: how many.
        targets: what the positive queries have to find, R / (2 * groups) rows per image.
    """

    labels: Tensor
    boxes: Tensor
    groups: int
    targets: PaddedTargets

    @property
    def size(self) -> int:
        """Queries per group."""
        return 2 * self.targets.nmax

    @property
    def real(self) -> Tensor:
        """Bool [B]: the images that take part in the losses."""
        return self.targets.count > 0

    def matches(self, layers: int) -> tuple[PackedTargets, Matches]:
        """The targets, and which queries have to find them in each layer: the same positive ones in all."""
        packed, valid = pack_targets(self.targets), self.targets.valid
        batch, rows = valid.shape
        place = torch.arange(rows, device=valid.device) + self.size * torch.arange(self.groups, device=valid.device)[:, None]
        query = torch.where(valid.flatten(), place.repeat(1, batch), -1)  # [groups, B * rows]
        query = query.expand(layers, *query.shape)
        cost = torch.where(query >= 0, 0.0, torch.inf)
        status = valid.new_zeros(layers, self.groups, batch, dtype=torch.uint8)
        queries = self.groups * self.size
        return packed, Matches(query, cost, status, packed.image, queries, batch, groups=self.groups, counts=packed.counts)


def count_groups(number: int, max_gt: int) -> int:
    """Groups that make about `2 * number` queries for images with up to `max_gt` objects; one at least."""
    return max(number // max(max_gt, 1), 1)


@torch.no_grad()
def make_denoising(
    targets: PaddedTargets,
    num_classes: int,
    *,
    number: int,
    label_noise: float = 0.5,
    box_noise: float = 1.0,
    max_gt: int | None = None,
    generator: torch.Generator | None = None,
) -> Denoising:
    """Queries from targets with noise. Nothing waits for the device.

    Every corner coordinate moves by a random share of `box_noise` times half the side of the box, in [0, 1) for positive queries and [1, 2)
    for negative ones, to either side. A label is drawn anew with half the probability of `label_noise`.

    Args:
        targets: boxes cxcywh, normalised by the size of the image.
        num_classes: without background.
        number: positive queries that all groups of an image shall have together, about.
        label_noise: in [0, 1].
        box_noise: DINO 1, Semi-DETR 0.4.
        max_gt: most targets of an image, as far as the host knows, by default the rows of `targets`. Of images with more, the first ones
            are taken.
        generator: of the device of the targets; None for its default generator. What is drawn depends on shapes alone.

    Raises:
        ValueError: a number out of range.
    """
    if number < 1 or num_classes < 1:
        raise ValueError(f"number and num_classes must be at least 1, got {number} and {num_classes}")
    if not 0 <= label_noise <= 1 or box_noise < 0:
        raise ValueError(f"label_noise must lie in [0, 1] and box_noise must not be negative, got {label_noise} and {box_noise}")
    rows = max(1, targets.nmax if max_gt is None else max_gt)
    targets = _with_rows(targets, rows)
    groups = count_groups(number, rows)
    labels, boxes, used = _with_made_up(targets, num_classes, generator)
    shape = (len(targets), groups, 2, rows)
    noisy_labels = _spoil_labels(labels[:, None, None].expand(shape), num_classes, label_noise, generator)
    noisy_boxes = _spoil_boxes(boxes[:, None, None].expand(*shape, 4), box_noise, generator)
    used = used[:, None, None].expand(shape)
    return Denoising(
        torch.where(used, noisy_labels, PAD_LABEL).flatten(1),
        torch.where(used[..., None], noisy_boxes, _FILLER).flatten(1, 3),
        groups,
        targets,
    )


def denoising_blocked(denoising: Denoising, matching: int) -> Tensor:
    """Mask of self-attention for [denoising queries, matching queries], see :func:`blocked_mask`.

    Args:
        denoising: R queries.
        matching: number of matching queries that follow, M.

    Returns:
        bool [R + M, R + M].
    """
    return blocked_mask([denoising.size] * denoising.groups, matching, denoising.labels.device)


def _with_rows(targets: PaddedTargets, rows: int) -> PaddedTargets:
    """Exactly `rows` rows per image."""
    lack = rows - targets.nmax
    return PaddedTargets(
        boxes=F.pad(targets.boxes, (0, 0, 0, lack)),
        labels=F.pad(targets.labels, (0, lack), value=PAD_LABEL),
        scores=F.pad(targets.scores, (0, lack)),
        weights=F.pad(targets.weights, (0, lack)),
        count=targets.count.clamp(max=rows),
    )


def _with_made_up(targets: PaddedTargets, num_classes: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Labels [B, N], boxes [B, N, 4] and which rows are used [B, N], with one object of a random label in images without any."""
    device, batch = targets.device, len(targets)
    label = torch.randint(num_classes, (batch, 1), generator=generator, device=device)
    first = torch.arange(targets.nmax, device=device) == 0
    made_up = first & (targets.count == 0)[:, None]  # [B, N]
    labels = torch.where(made_up, label, targets.labels)
    boxes = torch.where(made_up[..., None], _FILLER, targets.boxes)
    return labels, boxes, targets.valid | made_up


def _spoil_labels(labels: Tensor, num_classes: int, noise: float, generator: torch.Generator | None) -> Tensor:
    change = torch.rand(labels.shape, generator=generator, device=labels.device) < noise * 0.5
    other = torch.randint(num_classes, labels.shape, generator=generator, device=labels.device)
    return torch.where(change, other, labels)


def _spoil_boxes(boxes: Tensor, noise: float, generator: torch.Generator | None) -> Tensor:
    """Boxes [B, groups, 2, N, 4] cxcywh; index 1 of dimension 2 are the negative ones."""
    share = torch.rand(boxes.shape, generator=generator, device=boxes.device)
    share[:, :, 1] += 1
    upwards = torch.randint(2, boxes.shape, generator=generator, device=boxes.device) == 1
    half = boxes[..., 2:].repeat(1, 1, 1, 1, 2) / 2
    corners = box_convert(boxes, "cxcywh", "xyxy")
    moved = (corners + torch.where(upwards, share, -share) * (half * noise)).clamp(0, 1)
    # Corners that passed each other leave a side of 0.
    found: Tensor = box_convert(moved, "xyxy", "cxcywh").clamp(min=0)
    return found
