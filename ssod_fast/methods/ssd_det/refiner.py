"""The refiner of SSD-Det (arXiv 2307.12101): from noisy boxes and a feature pyramid to better boxes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssod_fast.criterion.losses import _wide
from ssod_fast.nn.pyramid import pool_boxes
from ssod_fast.ops import decode_boxes, encode_boxes, paired_box_iou, random_negative_boxes

from .bags import Bags, NoisyBoxes, neighbours
from .config import RefinerConfig
from .losses import focal_mil_loss, instance_scores, mil_loss, negative_loss, overlap_loss, own_class, regression_loss
from .merge import clip_to_image, merge_boxes, relative_overlaps, usable_boxes

SIZE = 7  # height and width of pooled features
_PRIOR = 0.01  # what classes score before training


@dataclass(frozen=True)
class Levels:
    """A feature pyramid.

    Attributes:
        maps: [B, D, h, w] each, finest first.
        strides: pixels of the network's input per cell of each map.
    """

    maps: Sequence[Tensor]
    strides: Sequence[int]


@dataclass(frozen=True)
class Stage:
    """What one stage makes of its bags.

    Attributes:
        bags: the proposals that were scored.
        scores: [G, C], bag scores, with graph.
        boxes: [G, 4], the bags merged to one box each, a constant.
        confidence: [G], bag score of the own class, a constant.
        hidden: [G, P, hidden], the features that scores and deltas come from, with graph.
        overlaps: [G, P], predicted overlaps, with graph; None without them.
    """

    bags: Bags
    scores: Tensor
    boxes: Tensor
    confidence: Tensor
    hidden: Tensor
    overlaps: Tensor | None = None


@dataclass(frozen=True)
class Refined:
    """Better boxes.

    Attributes:
        boxes: [G, 4] xyxy in pixels, constants, in the order of the noisy ones.
        scores: [G] in [0, 1], how sure stage II is.
        losses: weighted scalars to be summed; empty where none were asked for.
        diagnostics: scalars for the log.
    """

    boxes: Tensor
    scores: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)


class Refiner(nn.Module):
    """Classifies, regresses and merges the proposals around noisy boxes, in two stages.

    Bags around the noisy boxes are regressed towards them (SPSD-I), scored as a whole and merged (stage I); then they are regressed towards
    the merged boxes (SPSD-II), scored again beside random negatives, and merged by score and predicted overlap (stage II, SISD). Nothing
    waits for the device.

    Layers have the names of the released code, without those that never get a gradient there.

    Args:
        config: options.
        channels: of the feature pyramid.
        num_classes: without background.
    """

    def __init__(self, config: RefinerConfig, channels: int, num_classes: int) -> None:
        super().__init__()
        self.config, self.channels, self.num_classes = config, channels, num_classes
        hidden, inputs = config.hidden, channels * SIZE * SIZE
        resampled = config.stage2_bag == "resample"
        self.shared_fcs = _two_layers(inputs, hidden)
        self.fc_distill_reg_ori = nn.Linear(hidden, 4)
        self.fc_cls = nn.ModuleList([nn.Linear(hidden, num_classes + 1), nn.Linear(hidden, num_classes)])
        self.fc_ins = nn.ModuleList([nn.Linear(hidden, num_classes + 1), nn.Linear(hidden, num_classes)])
        self.fc_reg = None if resampled else nn.ModuleList([nn.Linear(hidden, 4)])
        self.fc_distill_reg_re = nn.Linear(hidden, 4) if resampled else None
        self.objness_2fcs = _two_layers(inputs, hidden) if config.sisd else None
        self.fc_iou = nn.Linear(hidden, 1) if config.sisd else None
        self._initialise()

    def forward(self, levels: Levels, noisy: NoisyBoxes, uniforms: Tensor, left_out: NoisyBoxes | None = None) -> Refined:
        """Refined boxes and all losses.

        Args:
            levels: features of the batch; gradients flow into them.
            noisy: boxes of the batch.
            uniforms: [B, N, 4] in [0, 1), of which the negatives are made.
            left_out: other boxes of the images, which negatives must not overlap either.
        """
        with torch.autocast(noisy.boxes.device.type, enabled=False):
            around = neighbours(noisy.boxes, noisy, self.config)
        bags, deltas = self._distill(levels, around, noisy)
        first = self._stage_one(levels, bags, noisy)
        moved, losses2 = self._second_bags(levels, first, noisy)
        second = self._stage_two(levels, moved, first, noisy)
        with torch.autocast(noisy.boxes.device.type, enabled=False):
            losses = {**self._losses_one(around, deltas, first, noisy), **losses2, **self._losses_two(first, second, noisy)}
        losses["loss_negative"] = self._negatives(levels, second, first.confidence, noisy, uniforms, left_out)
        stages = {"bag0": around, "bag1": bags, "bag2": moved}
        return Refined(second.boxes, second.confidence, losses, _measure(noisy, stages, first.boxes, second.boxes))

    @torch.no_grad()
    def refine(self, levels: Levels, noisy: NoisyBoxes) -> Refined:
        """Refined boxes alone."""
        with torch.autocast(noisy.boxes.device.type, enabled=False):
            around = neighbours(noisy.boxes, noisy, self.config)
        first = self._stage_one(levels, self._distill(levels, around, noisy)[0], noisy)
        second = self._stage_two(levels, self._second_bags(levels, first, noisy)[0], first, noisy)
        return Refined(second.boxes, second.confidence)

    # Stages

    def _distill(self, levels: Levels, around: Bags, noisy: NoisyBoxes) -> tuple[Bags, Tensor]:
        """SPSD-I: regresses the first bags; returns the moved ones and the deltas."""
        hidden, _ = self._embed(levels, around.boxes, noisy)
        deltas = _wide(self.fc_distill_reg_ori(hidden))
        return _moved(around, deltas), deltas

    def _stage_one(self, levels: Levels, bags: Bags, noisy: NoisyBoxes) -> Stage:
        hidden, _ = self._embed(levels, bags.boxes, noisy)
        classes, instances = (_wide(head[0](hidden)) for head in (self.fc_cls, self.fc_ins))
        scores = classes.softmax(-1) * instance_scores(instances, bags.valid)
        own = own_class(scores.detach(), noisy.labels)  # [G, P]
        merged = merge_boxes(bags.boxes, own, noisy.boxes, self.config.topk)
        # A bag without any valid proposal stays as it came, also beyond the border.
        boxes = torch.where(bags.occupied[:, None], clip_to_image(merged, noisy.own_hw), noisy.boxes)
        return Stage(bags, scores.sum(1), boxes, own.sum(1), hidden)

    def _second_bags(self, levels: Levels, first: Stage, noisy: NoisyBoxes) -> tuple[Bags, dict[str, Tensor]]:
        """SPSD-II: bags nearer to the boxes of stage I, and the loss of the regression that makes them."""
        weight = self.config.spsd2_weight
        if self.fc_reg is not None:
            deltas = _wide(self.fc_reg[0](first.hidden))
            sure = first.confidence if self.config.spsd2_weighted else None
            with torch.autocast(deltas.device.type, enabled=False):
                loss = regression_loss(deltas, encode_boxes(first.bags.boxes, first.boxes[:, None]), sure)
            bags = Bags(first.bags.boxes, torch.ones_like(first.bags.valid))
        else:
            assert self.fc_distill_reg_re is not None
            bags = neighbours(first.boxes, noisy, self.config)
            assert bags.targets is not None
            deltas = _wide(self.fc_distill_reg_re(self._embed(levels, bags.boxes, noisy)[0]))
            loss = regression_loss(deltas, bags.targets)
        return _moved(bags, deltas), {"loss_spsd2": weight * loss}

    def _stage_two(self, levels: Levels, bags: Bags, first: Stage, noisy: NoisyBoxes) -> Stage:
        config = self.config
        hidden, apart = self._embed(levels, bags.boxes, noisy, overlaps=config.sisd)
        classes, instances = (_wide(head[1](hidden)) for head in (self.fc_cls, self.fc_ins))
        p, share = classes.sigmoid(), instance_scores(instances, bags.valid)
        overlaps = None if apart is None else self._overlaps(apart)
        scores = p * share
        own = own_class(scores.detach(), noisy.labels)
        weights = own
        if overlaps is not None:
            chosen = own if config.sisd_score == "cls_ins" else own_class(p.detach(), noisy.labels) * bags.valid
            weights = chosen * relative_overlaps(overlaps.detach(), bags.valid)
        merged = merge_boxes(bags.boxes, weights, first.boxes, config.topk)
        boxes = usable_boxes(merged, noisy.own_hw, first.boxes, noisy.boxes)
        return Stage(bags, scores.sum(1), boxes, own.sum(1), hidden, overlaps)

    def _overlaps(self, apart: Tensor) -> Tensor:
        """Predicted overlaps [G, P]: of each proposal's features beside the mean of its bag."""
        assert self.fc_iou is not None
        return _wide(self.fc_iou(apart + apart.mean(1, keepdim=True))).squeeze(-1)

    # Losses

    def _losses_one(self, around: Bags, deltas: Tensor, first: Stage, noisy: NoisyBoxes) -> dict[str, Tensor]:
        config = self.config
        assert around.targets is not None
        mil = mil_loss(first.scores, noisy.labels, first.bags.occupied, mask_empty=config.mask_empty_bags)
        return {
            "loss_spsd1": config.spsd1_weight * regression_loss(deltas, around.targets),
            "loss_mil1": config.mil1_weight * mil,
        }

    def _losses_two(self, first: Stage, second: Stage, noisy: NoisyBoxes) -> dict[str, Tensor]:
        config = self.config
        mil = focal_mil_loss(second.scores, noisy.labels, second.bags.occupied, first.confidence)
        losses = {"loss_mil2": config.mil2_weight * mil}
        if second.overlaps is not None:
            found = paired_box_iou(second.bags.boxes, first.boxes[:, None])
            losses["loss_sisd"] = config.sisd_weight * overlap_loss(second.overlaps, found)
        return losses

    def _negatives(
        self, levels: Levels, second: Stage, weight: Tensor, noisy: NoisyBoxes, uniforms: Tensor, left_out: NoisyBoxes | None
    ) -> Tensor:
        """The loss of random boxes; 0 without a bag to weight it by, or without negatives."""
        if not len(noisy) or not uniforms.shape[1]:
            return second.scores.sum() * 0
        thr = self.config.negative_iou
        found = random_negative_boxes(uniforms, noisy.image_hw, second.bags.boxes, noisy.offsets, threshold=thr)
        keep = found.keep
        if left_out is not None:
            keep = keep & random_negative_boxes(uniforms, noisy.image_hw, left_out.boxes, left_out.offsets, threshold=thr).keep
        image = torch.arange(uniforms.shape[0], device=uniforms.device).repeat_interleave(uniforms.shape[1])
        hidden, _ = self._pooled(levels, found.boxes.flatten(0, 1), image, noisy.image_hw, overlaps=False)
        logits = _wide(self.fc_cls[1](hidden))
        return self.config.negative_weight * negative_loss(logits, keep.flatten(), weight)

    # Features

    def _embed(self, levels: Levels, boxes: Tensor, noisy: NoisyBoxes, overlaps: bool = False) -> tuple[Tensor, Tensor | None]:
        """Features of bags [G, P, 4] as [G, P, hidden]: shared ones and, for `overlaps`, those of the layers apart."""
        count, size = boxes.shape[:2]
        image = noisy.image.repeat_interleave(size)
        hidden, apart = self._pooled(levels, boxes.flatten(0, 1), image, noisy.image_hw, overlaps=overlaps)
        return hidden.unflatten(0, (count, size)), None if apart is None else apart.unflatten(0, (count, size))

    def _pooled(self, levels: Levels, boxes: Tensor, image: Tensor, image_hw: Tensor, *, overlaps: bool) -> tuple[Tensor, Tensor | None]:
        """Features of boxes [R, 4]: [R, hidden]. In parts where there are many, of which backward keeps the results alone."""
        boxes, size = _bounded(boxes, image_hw.index_select(0, image)), self.config.rois_per_pass
        if boxes.shape[0] <= size:
            return self._look(levels, boxes, image, overlaps)
        parts = []
        for part in zip(boxes.split(size), image.split(size), strict=True):
            if torch.is_grad_enabled():
                parts.append(checkpoint(self._look, levels, *part, overlaps, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._look(levels, *part, overlaps))
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]) if overlaps else None

    def _look(self, levels: Levels, boxes: Tensor, image: Tensor, overlaps: bool) -> tuple[Tensor, Tensor | None]:
        pooled = pool_boxes(levels.maps, boxes, image, strides=levels.strides, size=SIZE).flatten(1)
        if torch.is_autocast_enabled(pooled.device.type):  # else every layer that reads it would convert and keep its own copy
            pooled = pooled.to(torch.get_autocast_dtype(pooled.device.type))
        return _run(self.shared_fcs, pooled), _run(self.objness_2fcs, pooled) if overlaps else None

    # Weights

    def _initialise(self) -> None:
        """Normal weights of deviation 0.01 at official widths, and elsewhere such that features keep their scale; classes start rare."""
        wide = {id(part[0]): 256 * SIZE * SIZE for part in (self.shared_fcs, self.objness_2fcs) if part is not None}
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01 * math.sqrt(wide.get(id(layer), 1024) / layer.in_features))
                nn.init.zeros_(layer.bias)
        for head in self.fc_cls:
            assert isinstance(head, nn.Linear)
            nn.init.constant_(head.bias, math.log(_PRIOR / (1 - _PRIOR)))


def _two_layers(inputs: int, hidden: int) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)])


def _run(layers: nn.ModuleList | None, values: Tensor) -> Tensor:
    assert layers is not None
    for layer in layers:
        values = layer(values).relu()
    return values


def _moved(bags: Bags, deltas: Tensor) -> Bags:
    """The bags after regression, constants; validity is that of before."""
    return Bags(decode_boxes(bags.boxes, deltas.detach()), bags.valid)


def _bounded(boxes: Tensor, image_hw: Tensor) -> Tensor:
    """Boxes for pooling: finite, and at most an image's size beyond its borders, so that no runaway regression takes forever to pool."""
    size = image_hw.flip(1).repeat(1, 2).to(boxes.dtype)
    return torch.minimum(torch.maximum(boxes.nan_to_num(0), -size), 2 * size)


@torch.no_grad()
def _measure(noisy: NoisyBoxes, stages: Mapping[str, Bags], first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """How well boxes overlap the true ones, where these are known: mean and best of each bag, and single boxes."""
    if noisy.clean is None or not len(noisy):
        return {}
    numbers: dict[str, Tensor] = {}
    for name, bags in stages.items():
        overlaps = paired_box_iou(bags.boxes, noisy.clean[:, None])
        numbers |= {f"{name}_iou": overlaps.mean(), f"{name}_max_iou": overlaps.amax(1).mean()}
    for name, boxes in {"noisy": noisy.boxes, "stage1": first, "refined": second}.items():
        numbers[f"{name}_iou"] = paired_box_iou(boxes, noisy.clean).mean()
    return numbers
