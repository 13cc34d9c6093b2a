"""Replaces the matchers of transformers' losses: costs and assignments of all images in one op, on the device of the predictions.

The losses build their matcher anew in every call and look its class up in their module, so that is where the classes are replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...criterion import HungarianMatcher
from ...ops.matching_cost import ClassMode
from ...ops.packed_targets import pack_targets
from .._patch import Patched, Place, Plan, check_parameters, check_switch, original, require, restore_places
from .grounded import match_grounded, phrase_tokens
from .labels import Targets, boxes_and_labels
from .models import check_version

Pairs = list[tuple[Tensor, Tensor]]


class _Matcher:
    """What comes before the class of transformers in a replacement: a matching of our own."""

    class_mode: ClassMode = "softmax"
    class_cost: float
    bbox_cost: float
    giou_cost: float
    cpu_indices = False

    @torch.no_grad()
    def forward(self, outputs: Mapping[str, Any], targets: Targets) -> Pairs:
        """The queries of all targets.

        Args:
            outputs: `logits` [B, Q, C] and `pred_boxes` [B, Q, 4].
            targets: one mapping per image with `class_labels` and `boxes`.

        Returns:
            Per image indices of queries, ascending, and of targets.
        """
        return self._match(outputs, targets)

    def _match(self, outputs: Mapping[str, Any], targets: Targets, groups: int = 1, **options: Any) -> Pairs:
        matcher = HungarianMatcher(
            self.class_cost,
            self.bbox_cost,
            self.giou_cost,
            class_mode=self.class_mode,
            groups=groups,
            index_device="cpu" if self._on_cpu() else "same",
            **options,
        )
        pairs: Pairs = matcher(outputs, boxes_and_labels(targets))
        return pairs

    def _on_cpu(self) -> bool:
        return self.cpu_indices


class _FocalMatcher(_Matcher):
    class_mode: ClassMode = "focal"


class _RTDetrMatcher(_Matcher):
    use_focal_loss: bool
    alpha: float
    gamma: float

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self._pairs_are_read = bool(getattr(config, "use_dense_one_to_one", False))  # one by one, by the host

    def _match(self, outputs: Mapping[str, Any], targets: Targets, groups: int = 1, **options: Any) -> Pairs:
        self.class_mode = "focal" if self.use_focal_loss else "softmax"
        return super()._match(outputs, targets, groups, alpha=self.alpha, gamma=self.gamma)

    def _on_cpu(self) -> bool:
        return self.cpu_indices or self._pairs_are_read


class _LwDetrMatcher(_FocalMatcher):
    def forward(self, outputs: Mapping[str, Any], targets: Targets, group_detr: int) -> Pairs:  # type: ignore[override]
        return self._match(whole_groups(outputs, group_detr), targets, group_detr)


class _GroundingDinoMatcher(_Matcher):
    def _match(self, outputs: Mapping[str, Any], targets: Targets, groups: int = 1, **options: Any) -> Pairs:
        logits, boxes = outputs["logits"].unsqueeze(0), outputs["pred_boxes"].unsqueeze(0)
        packed = pack_targets(boxes_and_labels(targets), logits.device)
        tokens = phrase_tokens(outputs["label_maps"], targets, logits.device)
        matches = match_grounded(logits, boxes, packed, tokens, (self.class_cost, self.bbox_cost, self.giou_cost))
        return matches.pairs(0, "cpu" if self.cpu_indices else matches.query.device)


def whole_groups(outputs: Mapping[str, Any], groups: int) -> dict[str, Tensor]:
    """The queries that lie in groups of equal size, without the rest at the end.

    Args:
        outputs: `logits` and `pred_boxes` [..., Q, D].
        groups: number of groups.

    Returns:
        Both, cut to a multiple of `groups`.
    """
    used = outputs["logits"].shape[-2] // groups * groups
    return {name: outputs[name][..., :used, :] for name in ("logits", "pred_boxes")}


class _Surface(NamedTuple):
    """A name of a matcher class in a module of losses."""

    module: str
    name: str
    ours: type
    constructor: tuple[str, ...]
    forward: tuple[str, ...]


_COSTS = ("class_cost", "bbox_cost", "giou_cost")
_FORWARD = ("self", "outputs", "targets")
_SURFACES = (
    _Surface("loss_for_object_detection", "HungarianMatcher", _Matcher, _COSTS, _FORWARD),
    _Surface("loss_deformable_detr", "HungarianMatcher", _Matcher, _COSTS, _FORWARD),
    _Surface("loss_deformable_detr", "DeformableDetrHungarianMatcher", _FocalMatcher, _COSTS, _FORWARD),
    _Surface("loss_rt_detr", "RTDetrHungarianMatcher", _RTDetrMatcher, ("config",), _FORWARD),
    _Surface("loss_d_fine", "RTDetrHungarianMatcher", _RTDetrMatcher, ("config",), _FORWARD),
    _Surface("loss_lw_detr", "LwDetrHungarianMatcher", _LwDetrMatcher, _COSTS, (*_FORWARD, "group_detr")),
    _Surface("loss_grounding_dino", "GroundingDinoHungarianMatcher", _GroundingDinoMatcher, _COSTS, _FORWARD),
)


def patch_matchers(*, cpu_indices: bool = False) -> Patched:
    """Puts our matching into the losses of transformers.

    DETR, Conditional DETR, DAB-DETR, Deformable DETR, RT-DETR and RT-DETRv2, D-FINE, DEIMv2, LW-DETR, RF-DETR and Grounding DINO use it
    from the next call on. Costs are computed in float32 whatever the predictions are, NaN or degenerate boxes raise nothing, and indices
    stay on the device of the predictions, except for DEIMv2, which reads them one by one.

    Args:
        cpu_indices: return indices on the CPU, as transformers does.

    Returns:
        What is replaced now.

    Raises:
        ImportError: if transformers is missing, or a version that is not known; nothing is changed then.
        ValueError: if they are replaced with another `cpu_indices`; nothing is changed then.
        TypeError: if `cpu_indices` is no bool.
    """
    check_switch("cpu_indices", cpu_indices)
    check_version()
    plan = Plan("unpatch_matchers", cpu_indices=cpu_indices)
    for module, surface in _modules():
        theirs = original(module, surface.name)
        label = f"{module.__name__}.{surface.name}"
        check_parameters(theirs, label, surface.constructor)
        check_parameters(theirs.forward, f"{label}.forward", surface.forward)
        members = {"cpu_indices": cpu_indices, "__module__": theirs.__module__}
        plan.add(module, surface.name, type(surface.name, (surface.ours, theirs), members), label)
    return plan.apply("transformers has no matchers")


def unpatch_matchers() -> int:
    """Takes :func:`patch_matchers` back.

    Returns:
        How many names were restored, 0 if none was replaced.

    Raises:
        ImportError: if transformers is missing, or a version that is not known.
        RuntimeError: if a matcher has been replaced again by somebody else; nothing is put back then.
    """
    check_version()
    return restore_places([Place(module, surface.name, f"{module.__name__}.{surface.name}") for module, surface in _modules()])


def _modules() -> Iterator[tuple[ModuleType, _Surface]]:
    for surface in _SURFACES:
        yield require(f"transformers.loss.{surface.module}", "transformers>=5.17,<6"), surface
