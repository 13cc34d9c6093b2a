"""The released step of SSD-Det's refiner, one operation after the other, for comparison with that of this package."""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, roi_align

from ssod_fast.methods.ssd_det import Levels, Refiner
from ssod_fast.methods.ssd_det.losses import focal_form
from ssod_fast.nn.pyramid import pool_boxes
from ssod_fast.structures import Target

STD = (0.1, 0.1, 0.2, 0.2)
SIDES = (0, 32, 96, math.inf)  # of small, medium and large boxes, for which overlaps are logged


@dataclass(frozen=True)
class Detours:
    """What the released step does beside what its results need."""

    unused: bool = True  # layers of the predicted overlaps in stage I and on negatives, features of the two nearest boxes
    logging: bool = True  # overlaps by size of the box and every loss, read in every step
    levels: bool = True  # pooling writes into a buffer behind `nonzero` for each level
    merging: bool = True  # one image after the other


@dataclass(frozen=True)
class Scene:
    """Input of a step: maps take gradients."""

    levels: Levels
    targets: list[Target]
    sizes: list[tuple[int, int]]
    uniforms: Tensor


class Clock:
    """Time of named parts; every moment counts for the innermost part.

    Args:
        device: processor time on the CPU, which other processes do not lengthen; on a GPU wall time between waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._last = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what happens inside."""
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def _mark(self) -> None:
        now = self.now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._last
        self._last = now


class NoClock(Clock):
    """Measures nothing, so that a step on a GPU can be timed as a whole without waits inside."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class Batch:
    """Boxes of a step: [G, 4], labels [G] and image [G], how many each image has, and which proposals count, [G, P]."""

    scene: Scene
    counts: list[int]
    given: Tensor
    labels: Tensor
    image: Tensor
    valid: Tensor

    def own(self, values: Tensor) -> Tensor:
        """[G, P] of [G, P, C]: those of the label."""
        return values.gather(2, self.labels[:, None, None].expand(-1, values.shape[1], 1))[..., 0]


class Eager:
    """The released sequence of operations on the weights of a :class:`Refiner`."""

    def __init__(self, refiner: Refiner, detours: Detours, clock: Clock) -> None:
        self.net, self.config, self.detours, self.clock = refiner, refiner.config, detours, clock

    def step(self, scene: Scene) -> tuple[Tensor, dict[str, Tensor]]:
        """Refined boxes [G, 4] and the weighted losses."""
        counts = [len(t["boxes"]) for t in scene.targets]
        given, labels = (torch.cat([t[key] for t in scene.targets]) for key in ("boxes", "labels"))
        image = torch.cat([torch.full((n,), i, device=given.device) for i, n in enumerate(counts)])
        with self.clock.part("bags"):
            drawn = [self.bag(t["boxes"], hw) for t, hw in zip(scene.targets, scene.sizes, strict=True)]
            bags, valid = (torch.cat(part) for part in zip(*drawn, strict=True))
        batch = Batch(scene, counts, given, labels, image, valid)
        deltas = self.net.fc_distill_reg_ori(self.layers(self.net.shared_fcs, self.pool(scene.levels, bags, image)))
        self.log(bags, given)
        losses = {"loss_spsd1": self.config.spsd1_weight * (deltas - encode(bags, given)).abs().sum() / valid.numel()}
        bags, first, sure = self.stage_one(batch, decode(bags, deltas.detach()), losses)
        refined = self.stage_two(batch, bags, first, sure, losses)
        self.negatives(batch, bags, sure, losses)
        if self.detours.logging:
            with self.clock.part("numbers for the log"):
                [loss.item() for loss in losses.values()]
        return refined, losses

    def stage_one(self, batch: Batch, bags: Tensor, losses: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The next bags [G, P, 4], the merged boxes [G, 4] and how sure they are [G]."""
        net, c = self.net, self.config
        pooled = self.pool(batch.scene.levels, bags, batch.image)
        hidden = self.layers(net.shared_fcs, pooled)
        if self.detours.unused:  # nothing is predicted from them here
            self.nearest(self.apart(pooled, "unused layers and features"), batch)
        scores = net.fc_cls[0](hidden).softmax(-1) * share(net.fc_ins[0](hidden), batch.valid)
        with self.clock.part("merging"):
            own = batch.own(scores.detach())
            first = clip(self.merge(bags, own, batch.counts), batch.scene.sizes, batch.counts)
        sure = own.sum(1)
        self.log(bags, batch.given)
        onehot = F.one_hot(batch.labels, scores.shape[-1]).to(scores.dtype)
        mil = F.binary_cross_entropy(scores.sum(1).clamp(0, 1), onehot, reduction="none").sum()
        losses["loss_mil1"] = c.mil1_weight * mil / len(batch.labels)
        assert net.fc_reg is not None
        deltas = net.fc_reg[0](hidden)
        errors = (deltas - encode(bags, first)).abs() * sure[:, None, None]
        losses["loss_spsd2"] = c.spsd2_weight * errors.sum() / batch.valid.numel()
        return decode(bags, deltas.detach()), first, sure

    def stage_two(self, batch: Batch, bags: Tensor, first: Tensor, sure: Tensor, losses: dict[str, Tensor]) -> Tensor:
        """Refined boxes [G, 4]."""
        net, c = self.net, self.config
        pooled = self.pool(batch.scene.levels, bags, batch.image)
        hidden = self.layers(net.shared_fcs, pooled)
        p = net.fc_cls[1](hidden).sigmoid()
        scores = p * share(net.fc_ins[1](hidden), torch.ones_like(batch.valid))
        onehot = F.one_hot(batch.labels, p.shape[-1]).to(p.dtype)
        losses["loss_mil2"] = c.mil2_weight * (sure[:, None] * focal_form(scores.sum(1), onehot)).sum() / len(batch.labels)
        hidden = self.nearest(self.apart(pooled, "layers"), batch)
        assert net.fc_iou is not None
        predicted = net.fc_iou(hidden + hidden.mean(1, keepdim=True))[..., 0]
        found = torch.stack([box_iou(bag, box[None])[:, 0] for bag, box in zip(bags, first, strict=True)])
        losses["loss_sisd"] = c.sisd_weight * F.smooth_l1_loss(predicted, (found - 0.5) / 0.5)
        self.log(bags, batch.given)
        with self.clock.part("merging"):
            t = 0.5 * predicted.detach() + 0.5
            low, high = t.amin(1, keepdim=True), t.amax(1, keepdim=True)
            merged = self.merge(bags, batch.own(p.detach()) * (t - low) / (high - low), batch.counts)
            return clip(merged, batch.scene.sizes, batch.counts)

    def negatives(self, batch: Batch, bags: Tensor, sure: Tensor, losses: dict[str, Tensor]) -> None:
        """Random boxes as background."""
        with self.clock.part("negatives"):
            boxes, keep, owner = self.random_boxes(batch, bags)
        pooled = self.pool(batch.scene.levels, boxes[:, None], owner)
        if self.detours.unused:
            self.apart(pooled, "unused layers and features")
        p = self.net.fc_cls[1](self.layers(self.net.shared_fcs, pooled))[:, 0].sigmoid()
        total = (focal_form(p, torch.zeros_like(p)).sum(1) * keep).sum()
        losses["loss_negative"] = self.config.negative_weight * sure.mean() * total / len(batch.labels)

    def bag(self, boxes: Tensor, hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Proposals [n, P, 4] of one image and which of them count, by loops over ratios and shakes."""
        centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        found = []
        for wide in self.config.ratios:
            for high in self.config.ratios:
                scaled = side * side.new_tensor([wide, high])
                found.append(torch.cat([centre - scaled / 2, centre + scaled / 2], 1))
                for shake in self.config.shakes:
                    for direction in ((-shake, 0.0), (shake, 0.0), (0.0, -shake), (0.0, shake)):
                        moved = centre + side.new_tensor(direction) * scaled
                        found.append(torch.cat([moved - scaled / 2, moved + scaled / 2], 1))
        bags = torch.stack(found, 1)
        limit = boxes.new_tensor([hw[1], hw[0]])
        inside = (torch.minimum(bags[..., 2:], limit) - bags[..., :2].clamp(min=0)).clamp(min=0).prod(-1)
        return bags, inside / (bags[..., 2:] - bags[..., :2]).prod(-1).clamp(min=1e-6) > self.config.iof_thr

    def pool(self, levels: Levels, bags: Tensor, image: Tensor) -> Tensor:
        """Features [G, P, D * 49], level by level."""
        with self.clock.part("pooling"):
            flat = bags.flatten(0, 1)
            rois = torch.cat([image.repeat_interleave(bags.shape[1])[:, None].to(flat.dtype), flat], 1)
            if not self.detours.levels:
                pooled = pool_boxes(levels.maps, flat, rois[:, 0].long(), strides=levels.strides, size=7)
                return pooled.flatten(1).unflatten(0, bags.shape[:2])
            side = (flat[:, 2:] - flat[:, :2]).clamp(min=0).prod(1).sqrt()
            level = torch.log2(side / 56 + 1e-6).floor().clamp(0, len(levels.maps) - 1)
            pooled = flat.new_zeros(len(flat), levels.maps[0].shape[1], 7, 7)
            for i, (features, stride) in enumerate(zip(levels.maps, levels.strides, strict=True)):
                rows = (level == i).nonzero()[:, 0]
                if rows.numel():
                    pooled[rows] = roi_align(features, rois[rows], 7, 1 / stride, sampling_ratio=0, aligned=True)
            return pooled.flatten(1).unflatten(0, bags.shape[:2])

    def layers(self, modules: torch.nn.ModuleList, values: Tensor) -> Tensor:
        with self.clock.part("layers"):
            return layers(modules, values)

    def apart(self, pooled: Tensor, part: str) -> Tensor:
        """Features of which overlaps are predicted."""
        with self.clock.part(part):
            assert self.net.objness_2fcs is not None
            return layers(self.net.objness_2fcs, pooled)

    def nearest(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Features [G, P, 3, hidden] of a box and its two nearest, of which the first [G, P, hidden] is used."""
        if not self.detours.unused:
            return hidden
        with self.clock.part("unused layers and features"):
            centre = (batch.given[:, :2] + batch.given[:, 2:]) / 2
            distance = torch.cdist(centre, centre) + (batch.image[:, None] != batch.image) * 1e6
            order = distance.argsort(1)[:, : min(3, len(centre))]
            return torch.stack([hidden[order[:, i]] for i in range(order.shape[1])], 2)[:, :, 0]

    def merge(self, bags: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
        """[G, 4]: the best proposals of each bag, averaged."""
        if not self.detours.merging:
            return merge(bags, weights, self.config.topk)
        merged = []
        for own, score in zip(bags.split(list(counts)), weights.split(list(counts)), strict=True):
            best, index = score.topk(self.config.topk, dim=1)
            rows = torch.arange(len(own))[:, None].to(own.device)
            part = best / best.sum(1, keepdim=True) + 1e-8
            merged.append((own[rows, index] * part[..., None]).sum(1))
        return torch.cat(merged)

    def random_boxes(self, batch: Batch, bags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Random boxes [B * N, 4], which of them are far from all bags of their image, and the image of each."""
        scene = batch.scene
        boxes, keep, owner = [], [], []
        for i, (u, own, (h, w)) in enumerate(zip(scene.uniforms, bags.split(batch.counts), scene.sizes, strict=True)):
            x1, y1 = -0.2 * w + 1.2 * w * u[:, 0], -0.2 * h + 1.2 * h * u[:, 1]
            box = torch.stack([x1, y1, x1 + (1.2 * w - x1) * u[:, 2], y1 + (1.2 * h - y1) * u[:, 3]], 1)
            boxes.append(box)
            keep.append(box_iou(box, own.flatten(0, 1)).amax(1) < self.config.negative_iou)
            owner.append(torch.full((len(box),), i, device=box.device))
        return torch.cat(boxes), torch.cat(keep), torch.cat(owner)

    def log(self, bags: Tensor, boxes: Tensor) -> None:
        """Mean and best overlap of bags with boxes, by size of the box, read at once."""
        if not self.detours.logging:
            return
        with self.clock.part("numbers for the log"), torch.no_grad():
            overlaps = torch.stack([box_iou(bag, box[None])[:, 0] for bag, box in zip(bags, boxes, strict=True)])
            side = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
            for low, high in itertools.pairwise(SIDES):
                own = overlaps[(side >= low) & (side < high)]
                if len(own):
                    own.mean().item(), own.amax(1).mean().item()


def layers(modules: torch.nn.ModuleList, values: Tensor) -> Tensor:
    for module in modules:
        values = F.relu(module(values))
    return values


def share(logits: Tensor, valid: Tensor) -> Tensor:
    return F.normalize(logits.softmax(1) * valid[..., None], p=1, dim=1)


def encode(bags: Tensor, boxes: Tensor) -> Tensor:
    """Deltas from proposals [G, P, 4] to boxes [G, 4]."""
    boxes = boxes[:, None]
    side, wanted = bags[..., 2:] - bags[..., :2], boxes[..., 2:] - boxes[..., :2]
    shift = (boxes[..., :2] + boxes[..., 2:] - bags[..., :2] - bags[..., 2:]) / 2 / side
    return torch.cat([shift, (wanted / side).log()], -1) / bags.new_tensor(STD)


def decode(bags: Tensor, deltas: Tensor) -> Tensor:
    deltas, limit = deltas * bags.new_tensor(STD), abs(math.log(16 / 1000))
    side = bags[..., 2:] - bags[..., :2]
    centre = (bags[..., :2] + bags[..., 2:]) / 2 + deltas[..., :2] * side
    half = side * deltas[..., 2:].clamp(-limit, limit).exp() / 2
    return torch.cat([centre - half, centre + half], -1)


def merge(bags: Tensor, weights: Tensor, topk: int) -> Tensor:
    best, index = weights.topk(topk, dim=1)
    part = best / best.sum(1, keepdim=True) + 1e-8
    return (bags.gather(1, index[..., None].expand(-1, -1, 4)) * part[..., None]).sum(1)


def clip(boxes: Tensor, sizes: Sequence[tuple[int, int]], counts: Sequence[int]) -> Tensor:
    """Boxes [G, 4] cut off at the border of their image."""
    parts = zip(boxes.split(list(counts)), sizes, strict=True)
    return torch.cat([torch.minimum(own.clamp(min=0), own.new_tensor([w, h, w, h])) for own, (h, w) in parts])
