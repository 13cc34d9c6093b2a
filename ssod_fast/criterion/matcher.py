"""The matcher that DETR's descendants build into their criterion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ..ops._matches import Matches
from ..ops.box_iou import EpsMode, Format
from ..ops.linear_assignment import _check_options, check_copies
from ..ops.match import Invalid, match
from ..ops.matching_cost import ClassMode, _parse_options, check_number
from ..ops.packed_targets import AnyTargets

Outputs = Mapping[str, Any]


class HungarianMatcher(nn.Module):
    """One-to-one matching of queries with targets by class, L1 and GIoU cost, as a module without parameters.

    Args:
        cost_class: weight of the class cost.
        cost_bbox: weight of the L1 distance, of coordinates in `box_format`.
        cost_giou: weight of the generalised IoU.
        class_mode: see :func:`~ssod_fast.ops.matching_cost`; "softmax" for DETR, "focal" for Deformable DETR and what follows it.
        alpha: see :func:`~ssod_fast.ops.matching_cost`.
        gamma: see :func:`~ssod_fast.ops.matching_cost`.
        eps: see :func:`~ssod_fast.ops.matching_cost`.
        box_format: format of predicted and target boxes.
        giou_eps_mode: see :func:`~ssod_fast.ops.matching_cost`.
        groups: number of query groups, each matched with all targets.
        repeats: number of queries that each target takes within a group, at most 4096.
        invalid: what becomes of pairs on NaN or infinite costs, see :func:`~ssod_fast.ops.linear_assignment`.
        index_device: device of the indices that :meth:`forward` returns: "same" as the predictions, or "cpu".

    Raises:
        ValueError: if all three weights are 0, for weights that are not finite, and for options that :func:`~ssod_fast.ops.match` refuses.
        TypeError: for groups or repeats that are no int.
    """

    def __init__(
        self,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        *,
        class_mode: ClassMode = "focal",
        alpha: float = 0.25,
        gamma: float = 2.0,
        eps: float = 1e-8,
        box_format: Format = "cxcywh",
        giou_eps_mode: EpsMode = "zero",
        groups: int = 1,
        repeats: int = 1,
        invalid: Invalid = "keep",
        index_device: Literal["same", "cpu"] = "same",
    ) -> None:
        super().__init__()
        for name, value in (("cost_class", cost_class), ("cost_bbox", cost_bbox), ("cost_giou", cost_giou)):
            check_number(name, value)
        _parse_options(class_mode, alpha, gamma, eps, cost_class, cost_bbox, cost_giou, box_format, giou_eps_mode)
        check_copies(groups, repeats)
        _check_options("target_major", "tile", invalid, "scipy")
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("cost_class, cost_bbox and cost_giou must not all be 0")
        if index_device not in ("same", "cpu"):
            raise ValueError(f"index_device must be 'same' or 'cpu', got {index_device!r}")
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.class_mode: ClassMode = class_mode
        self.alpha, self.gamma, self.eps = alpha, gamma, eps
        self.box_format: Format = box_format
        self.giou_eps_mode: EpsMode = giou_eps_mode
        self.groups, self.repeats = groups, repeats
        self.invalid: Invalid = invalid
        self.index_device = index_device

    def forward(
        self, outputs: Outputs, targets: Sequence[Mapping[str, Any]], image_hw: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """The classic contract: one layer, lists in, lists out.

        Args:
            outputs: `logits` or `pred_logits` [B, Q, C] and `pred_boxes` [B, Q, 4] in `box_format`; for class_mode "none" only these.
            targets: one mapping per image with `labels` or `class_labels` [T] and `boxes` [T, 4] in `box_format`.
            image_hw: [B, 2] height and width of the images for boxes in pixels, None for normalised ones.

        Returns:
            Per image indices of queries, ascending, and of their targets, int64, min(Q, T) of each (all groups and repeats together).
            Nothing waits for the device while they stay there, but for `invalid="drop"`.

        Raises:
            ValueError: for missing keys, more than one layer, and as :func:`~ssod_fast.ops.match`.
            TypeError: for outputs that are no mapping, and as :func:`~ssod_fast.ops.match`.
        """
        matches = self.match(outputs, targets, image_hw)
        if matches.layers != 1:
            raise ValueError(f"outputs must be of one layer, got {matches.layers}: use match() for all layers at once")
        return matches.pairs(0, matches.query.device if self.index_device == "same" else "cpu")

    def match(self, outputs: Outputs, targets: AnyTargets, image_hw: Tensor | None = None) -> Matches:
        """All layers at once, without waiting for the device. No gradient flows, and autocast changes nothing.

        Args:
            outputs: `logits` or `pred_logits` [L, B, Q, C] or [B, Q, C], and `pred_boxes` [L, B, Q, 4] or [B, Q, 4] in `box_format`. For
                class_mode "none" the boxes will do.
            targets: anything :func:`~ssod_fast.ops.pack_targets` takes, boxes in `box_format`. Their weights change nothing here.
            image_hw: [B, 2] height and width of the images for boxes in pixels, None for normalised ones.

        Returns:
            The queries of all targets, for the losses of :mod:`ssod_fast.criterion`.

        Raises:
            ValueError: for missing keys, and as :func:`~ssod_fast.ops.match`.
            TypeError: for outputs that are no mapping, and as :func:`~ssod_fast.ops.match`.
        """
        logits, boxes = _predictions(outputs, self.class_mode != "none")
        return match(
            logits,
            boxes,
            targets,
            class_mode=self.class_mode,
            alpha=self.alpha,
            gamma=self.gamma,
            eps=self.eps,
            w_class=self.cost_class,
            w_box=self.cost_bbox,
            w_giou=self.cost_giou,
            box_format=self.box_format,
            image_hw=image_hw,
            giou_eps_mode=self.giou_eps_mode,
            groups=self.groups,
            repeats=self.repeats,
            invalid=self.invalid,
        )

    def extra_repr(self) -> str:
        """The weights and what is matched with what, shown by `print`."""
        return (
            f"cost_class={self.cost_class:g}, cost_bbox={self.cost_bbox:g}, cost_giou={self.cost_giou:g}, class_mode={self.class_mode!r}, "
            f"box_format={self.box_format!r}, groups={self.groups}, repeats={self.repeats}, invalid={self.invalid!r}"
        )


def _predictions(outputs: Outputs, with_class: bool) -> tuple[Tensor | None, Tensor]:
    if not isinstance(outputs, Mapping):
        raise TypeError(f"outputs must be a mapping with 'logits' or 'pred_logits', and 'pred_boxes', got {type(outputs).__name__}")
    logits, boxes = outputs.get("logits"), outputs.get("pred_boxes")
    if logits is None:
        logits = outputs.get("pred_logits")
    if boxes is None or (logits is None and with_class):
        wanted = "'logits' or 'pred_logits', and 'pred_boxes'" if with_class else "'pred_boxes'"
        raise ValueError(f"outputs must have {wanted}, got the keys {sorted(outputs)}")
    return logits if with_class else None, boxes
