"""Matching of predictions with targets: costs and optimal assignment in one op, for all decoder layers and images at once."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ._matches import INVALID_PAIR, Matches, count_pairs
from ._registry import register
from .box_iou import EpsMode, Format
from .linear_assignment import _check_groups, _check_options
from .matching_cost import ClassMode, cost_arguments
from .packed_targets import AnyTargets

RepeatOrder = Literal["tile", "interleave"]
Invalid = Literal["keep", "drop", "raise"]
Ties = Literal["scipy", "any"]


def match(
    logits: Tensor | None,
    boxes: Tensor,
    targets: AnyTargets,
    *,
    class_mode: ClassMode = "focal",
    alpha: float = 0.25,
    gamma: float = 2.0,
    eps: float = 1e-8,
    w_class: float = 2.0,
    w_box: float = 5.0,
    w_giou: float = 2.0,
    box_format: Format = "cxcywh",
    image_hw: Tensor | None = None,
    giou_eps_mode: EpsMode = "zero",
    extra_cost: Tensor | None = None,
    groups: int = 1,
    repeats: int = 1,
    repeat_order: RepeatOrder = "tile",
    invalid: Invalid = "keep",
    ties: Ties = "scipy",
) -> Matches:
    """The queries of least total cost for the targets of every image and layer: :func:`matching_cost`, then :func:`linear_assignment`.

    The result is what these two functions give, index by index. On the CPU the costs of one image and layer at a time are computed and
    solved, so that no cost matrix of the batch is ever in memory. No gradient flows.

    Weights of targets change nothing here: a target of weight 0 takes its query like any other, and only the losses leave that query to the
    background. To keep boxes out of the matching without waiting for the device, drop them before, with
    :meth:`PaddedTargets.select <ssod_fast.structures.PaddedTargets.select>`.

    Args:
        logits: [L, B, Q, C] or [B, Q, C], floating point; may be None for class_mode "none".
        boxes: [L, B, Q, 4] or [B, Q, 4], floating point, in `box_format`.
        targets: anything :func:`pack_targets` takes, boxes in the frame and format of `boxes`.
        class_mode: see :func:`matching_cost`, as the options up to `extra_cost`.
        alpha: see :func:`matching_cost`.
        gamma: see :func:`matching_cost`.
        eps: see :func:`matching_cost`.
        w_class: see :func:`matching_cost`.
        w_box: see :func:`matching_cost`.
        w_giou: see :func:`matching_cost`.
        box_format: see :func:`matching_cost`.
        image_hw: see :func:`matching_cost`.
        giou_eps_mode: see :func:`matching_cost`.
        extra_cost: see :func:`matching_cost`.
        groups: number of equal ranges of queries, each matched with all targets (Group DETR); a divisor of Q.
        repeats: number of queries that each target takes within a group (one-to-many matching of H-DETR), at most 4096.
        repeat_order: see :func:`linear_assignment`, as `invalid` and `ties`.
        invalid: see :func:`linear_assignment`; "raise" waits for the device.
        ties: see :func:`linear_assignment`.

    Returns:
        The queries of all targets, on the device of the predictions.

    Raises:
        ValueError: as :func:`matching_cost` and :func:`linear_assignment`.
        TypeError: as :func:`matching_cost`, and for groups or repeats that are no int.
    """
    arguments, packed = cost_arguments(
        logits,
        boxes,
        targets,
        class_mode=class_mode,
        alpha=alpha,
        gamma=gamma,
        eps=eps,
        w_class=w_class,
        w_box=w_box,
        w_giou=w_giou,
        box_format=box_format,
        image_hw=image_hw,
        giou_eps_mode=giou_eps_mode,
        extra_cost=extra_cost,
    )
    queries = boxes.shape[-2]
    _check_options("target_major", repeat_order, invalid, ties)
    _check_groups(groups, repeats, queries)
    query, cost, status = _op(*arguments, groups, repeats, repeat_order == "interleave", invalid == "drop", ties == "any")
    if invalid == "raise" and bool((status & INVALID_PAIR).any()):
        raise ValueError("logits or boxes give NaN or infinite costs that no complete matching avoids")
    return Matches(
        query,
        cost,
        status,
        packed.image,
        queries,
        packed.batch,
        groups,
        repeats,
        offsets=packed.offsets,
        counts=packed.counts,
        pair_counts=None if invalid == "drop" or packed.sizes is None else count_pairs(packed.sizes, queries, groups, repeats),
    )


def _reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *costs, groups, repeats, interleave, drop_invalid, any_ties = arguments
    offsets, counts, batch = costs[4], costs[5], costs[8]
    row_min = groups == 1  # the minima of a row are over all queries
    cost, keys = torch.ops.ssod_fast.matching_cost(*costs, row_min)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.ssod_fast.linear_assignment(
        cost, offsets, counts, keys if row_min else None, batch, groups, repeats, interleave, drop_invalid, any_ties
    )
    return found


def _fake(logits: Tensor, boxes: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, groups, repeats = rest[5], rest[-5], rest[-4]
    layers, rows = boxes.shape[0], labels.shape[0]
    dtype = torch.float64 if torch.float64 in (logits.dtype, boxes.dtype) else torch.float32
    shape = (layers, groups * repeats, rows)
    return labels.new_empty(shape), boxes.new_empty(shape, dtype=dtype), labels.new_empty((layers, groups, batch), dtype=torch.uint8)


register(
    "match(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor? offsets, Tensor? counts, Tensor? image_hw, "
    "Tensor? extra_cost, int batch, int class_mode, float alpha, float gamma, float eps, float w_class, float w_box, float w_giou, "
    "int fmt, int eps_mode, float giou_eps, int groups, int repeats, bool interleave, bool drop_invalid, bool any_ties) "
    "-> (Tensor query, Tensor matched_cost, Tensor status)",
    reference=_reference,
    fake=_fake,
    composed=True,
)
_op = torch.ops.ssod_fast.match.default
