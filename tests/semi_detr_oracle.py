"""A whole Semi-DETR step as the released code runs it, with every detour: what the fast step has to equal.

The teacher's backbone runs three times and both encoders twice, all queries are decoded together under a mask, pseudo boxes are copied into
five groups, denoising queries go through the teacher too, losses that do not count are computed and multiplied by 0, and matching is done
one image and layer at a time. :class:`Slow` switches each of these off alone, so that tests can tell them apart and a profile can say what
each of them costs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import semi_detr_literal as literal
import torch
from torch import Tensor
from torch.nn import functional as F

from ssod_fast.data.batches import LabeledBatch, UnlabeledBatch
from ssod_fast.detectors.deformable_detr.criterion import objectness_targets
from ssod_fast.detectors.deformable_detr.denoising import Denoising
from ssod_fast.detectors.deformable_detr.detector import join_queries
from ssod_fast.detectors.deformable_detr.groups import blocked_mask
from ssod_fast.detectors.deformable_detr.stages import Decoded, Memory, Queries
from ssod_fast.detectors.protocol import ImageBatch
from ssod_fast.methods import SemiSupervisedDetector
from ssod_fast.methods.inputs import detector_batch
from ssod_fast.methods.semi_detr import CostMiner, SemiDETRConfig, normalised, project_rows, reliable, teacher_detections
from ssod_fast.methods.semi_detr.branches import DetectionLosses, denoising_queries
from ssod_fast.methods.semi_detr.consistency import consistency_loss
from ssod_fast.methods.semi_detr.passes import Look, QueryGroups, decode_groups
from ssod_fast.structures import PaddedTargets, Target


@dataclass(frozen=True)
class Slow:
    """Which detours are taken."""

    backbone: bool = True  # the teacher's backbone once for each of its three uses (R1)
    encoder: bool = True  # both encoders, and the student's backbone, once more for each pass (R2)
    joint: bool = True  # all queries decoded together, after a decoding of the matching queries alone (R3)
    groups: int = 5  # copies of the consistency queries (R4)
    teacher_denoising: bool = True  # denoising queries in the teacher (R5)
    dead_work: bool = True  # losses of the other stage, multiplied by 0 (R6)
    solver: Literal["literal", "shipped"] = "literal"  # loops and SciPy, or the package's losses, mining and suppression (R7 to R11)

    @classmethod
    def none(cls) -> Slow:
        """The fast step."""
        return cls(False, False, False, 1, False, False, "shipped")


@dataclass(frozen=True)
class Pseudo:
    """Pseudo boxes of one image, the same ones in both views, in pixels."""

    weak: Tensor
    strong: Tensor
    labels: Tensor
    scores: Tensor


class LiteralStep:
    """Computes the losses of a step of `model`, whose method is a SemiDETR, and changes nothing.

    Attributes:
        seen: outputs of decoders and choices of boxes by name, for tests.
    """

    def __init__(self, model: SemiSupervisedDetector, slow: Slow | None = None) -> None:
        self.model, self.slow = model, Slow() if slow is None else slow
        self.student, self.teacher = model.student, model.teacher
        self.method: Any = model.method
        self.config: SemiDETRConfig = self.method.config
        self.seen: dict[str, Any] = {}

    def __call__(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch, step: int) -> dict[str, Tensor]:
        """Weighted losses by name, with their graphs."""
        self.losses: DetectionLosses = self.method.losses(step, micro=0)
        self.stage = self.method.stage(step)
        terms = {f"sup/{k}": self.config.sup_weight * v for k, v in self.supervised(labeled).items()}
        return terms | {f"unsup/{k}": self.config.unsup_weight * v for k, v in self.unsupervised(unlabeled).items()}

    def supervised(self, labeled: LabeledBatch) -> dict[str, Tensor]:
        """Labelled images."""
        images = detector_batch(self.student, labeled.images)
        memory = self.student.network.encode(self.student.network.extract(images))
        targets = [(t["boxes"], t["labels"]) for t in labeled.targets]
        denoising = self._denoising(targets, images.sizes, "labeled")
        parts = [] if denoising is None else [denoising_queries(self.student, denoising)]
        found, extra, proposals = self._decode(self.student.network, memory, parts)
        terms = self._detection(found, proposals, targets, images.sizes)
        return terms | ({} if denoising is None else self._denoised(extra[0], denoising, targets, images.sizes))

    def unsupervised(self, views: UnlabeledBatch) -> dict[str, Tensor]:
        """Unlabelled images."""
        config, slow = self.config, self.slow
        weak, strong = detector_batch(self.teacher, views.weak), detector_batch(self.student, views.strong)
        with torch.no_grad():
            pyramid = self.teacher.network.extract(weak)
            teacher_memory = self.teacher.network.encode(pyramid)
            said = self.teacher.network.decode(teacher_memory, self.teacher.network.select(teacher_memory)[0])
            boxes = self._pseudo(said, views, weak.sizes, strong.sizes)
        pairing = self.stage in config.consistency_stages or slow.dead_work
        denoises = self.stage in config.pseudo_denoising_stages or slow.dead_work
        sure = [(p.scores >= config.cls_pseudo_thr) & _usable(p.strong, config.drop_degenerate) for p in boxes]
        targets = [(p.strong[keep], p.labels[keep]) for p, keep in zip(boxes, sure, strict=True)]
        denoising = self._denoising(targets, strong.sizes, "pseudo")

        maps = self.student.network.extract(strong)
        memory = self.student.network.encode(maps)
        parts, pairs = [], []
        if pairing:
            mined = self._mine(self._mining_pass(strong, memory), boxes, strong.sizes)
            pairs = [keep | (p.scores >= config.cls_pseudo_thr) for p, keep in zip(boxes, mined, strict=True)]
            again = self.teacher.network.extract(weak) if slow.backbone else pyramid
            content = self._content(again.maps, [or_dummy(p.weak[k], hw) for p, k, hw in zip(boxes, pairs, weak.sizes, strict=True)])
            parts.append(self._box_queries(self.student, content, [p.strong[k] for p, k in zip(boxes, pairs, strict=True)], strong.sizes))
        if denoises and denoising is not None:
            parts.append(denoising_queries(self.student, denoising))
        found, extra, proposals = self._decode(self.student.network, memory, parts)
        self.seen |= {"targets": targets, "pairs": pairs, "student": found, "extra": extra}
        terms = self._detection(found, proposals, targets, strong.sizes)
        if denoises and denoising is not None:
            active = float(self.stage in config.pseudo_denoising_stages)
            terms |= {k: active * v for k, v in self._denoised(extra[-1], denoising, targets, strong.sizes).items()}
        if pairing:
            if config.content == "cross":
                with torch.no_grad():
                    own = [or_dummy(p.strong[k], hw) for p, k, hw in zip(boxes, pairs, strong.sizes, strict=True)]
                    content = self._content(maps.maps, own)
            own = [p.weak[keep] for p, keep in zip(boxes, pairs, strict=True)]
            heard = self._teacher_pass(weak, pyramid, teacher_memory, content.detach(), own, denoising)
            active = float(self.stage in config.consistency_stages)
            terms["loss_consistency"] = active * self._consistency(extra[0], heard, pairs)
        return terms

    # Passes

    def _decode(self, network: Any, memory: Memory, parts: list[QueryGroups]) -> tuple[Decoded, list[Decoded], Any]:
        """Matching queries and others: together under a mask, or one after the other."""
        queries, proposals = network.select(memory)
        if not self.slow.joint:
            found = network.decode(memory, queries, keep_inputs=bool(parts))
            return found, decode_groups(network, Look(None, memory, found, proposals), parts), proposals  # type: ignore[arg-type]
        joined: Queries = queries
        for part in reversed(parts):
            joined = join_queries(part.queries, joined)
        blocked = blocked_mask([size for part in parts for size in part.sizes], queries.content.shape[1])
        hidden = [torch.zeros(*p.queries.content.shape[:2], dtype=torch.bool) if p.hidden is None else p.hidden for p in parts]
        if any(p.hidden is not None for p in parts):
            blocked = blocked | F.pad(torch.cat(hidden, 1), (0, queries.content.shape[1]))[:, None]
        decoded = network.decode(memory, joined, blocked=blocked)
        counts = [sum(part.sizes) for part in parts] + [queries.content.shape[1]]
        fields = (field.split(counts, 2) for field in (decoded.hidden, decoded.logits, decoded.boxes))
        *extra, found = (Decoded(*field) for field in zip(*fields, strict=True))
        return found, extra, proposals

    @torch.no_grad()
    def _mining_pass(self, strong: ImageBatch, memory: Memory) -> Decoded:
        """The student's matching queries once more, without gradient."""
        network = self.student.network
        if self.slow.encoder:
            memory = network.encode(network.extract(strong))
        found: Decoded = network.decode(memory, network.select(memory)[0])
        return found

    @torch.no_grad()
    def _teacher_pass(
        self, weak: ImageBatch, pyramid: Any, memory: Memory, content: Tensor, boxes: list[Tensor], denoising: Denoising | None
    ) -> Decoded:
        network = self.teacher.network
        if self.slow.backbone:
            pyramid = network.extract(weak)
        if self.slow.encoder:
            memory = network.encode(pyramid)
        parts = [self._box_queries(self.teacher, content, boxes, weak.sizes)]
        if self.slow.teacher_denoising and denoising is not None:
            parts.append(denoising_queries(self.teacher, denoising))
        _, extra, _ = self._decode(network, memory, parts)
        self.seen["teacher"] = extra[0]
        return extra[0]

    # Pseudo boxes

    def _pseudo(self, said: Decoded, views: UnlabeledBatch, weak_hw: list[Any], strong_hw: list[Any]) -> list[Pseudo]:
        matrices = views.strong_matrix.double() @ torch.linalg.inv(views.weak_matrix.double())
        logits, boxes, config = said.logits[-1], said.boxes[-1], self.config
        if self.slow.solver == "shipped":
            options = {"score_thr": config.teacher_score_thr, "nms_thr": config.teacher_nms_thr, "topk": config.teacher_topk}
            weak = reliable(teacher_detections(logits, boxes, torch.tensor(weak_hw, dtype=boxes.dtype), **options).targets)
            moved = project_rows(weak, matrices, strong_hw).boxes
            return [Pseudo(t["boxes"], m[: len(t["boxes"])], t["labels"], t["scores"]) for t, m in zip(weak.to_list(), moved, strict=True)]
        found = []
        for b, hw in enumerate(weak_hw):
            where, labels, scores = literal.detect(logits[b], boxes[b], hw, config)
            keep = literal.confident(where, scores)
            found.append(Pseudo(where[keep], literal.project(where[keep], matrices[b], strong_hw[b]), labels[keep], scores[keep]))
        return found

    def _mine(self, found: Decoded, boxes: list[Pseudo], sizes: list[Any]) -> list[Tensor]:
        logits, where = found.logits[-1].detach(), found.boxes[-1].detach()
        if self.slow.solver == "shipped":
            targets = normalised(_padded([(p.strong, p.labels) for p in boxes]), torch.tensor(sizes, dtype=where.dtype))
            mined = CostMiner(scope=self.config.mining_scope)(logits, where, targets)
            self.seen["cost"] = mined.cost
            return [keep[: len(p.labels)] for keep, p in zip(mined.keep, boxes, strict=True)]
        costs = []
        for b, p in enumerate(boxes):
            _, columns, cost = literal.assignment(logits[b], where[b], (p.strong, p.labels), sizes[b])
            costs.append(where.new_full((len(p.labels),), torch.inf).index_put((columns,), cost))
        pooled = torch.cat(costs)
        threshold = literal.cost_threshold(pooled[pooled.isfinite()])
        return [cost <= threshold for cost in costs]

    # Queries

    def _denoising(self, targets: list[literal.Boxes], sizes: list[Any], purpose: Any) -> Denoising | None:
        return self.losses.denoise(self.student, _normalised(targets, sizes), purpose)

    def _content(self, maps: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """[B, groups * N, D]: projected features, each image's rows copied into its groups."""
        features = literal.roi_features([m.detach() for m in maps], boxes)
        rows = list(features.split([len(b) for b in boxes]))
        projected = self.method.trainable.projector(torch.cat([copy for own in rows for copy in [own] * self.slow.groups]))
        longest, pieces = max(len(b) for b in boxes), iter(projected.split([len(own) for own in rows for _ in range(self.slow.groups)]))
        return torch.stack([torch.cat([_grow(next(pieces), longest) for _ in range(self.slow.groups)]) for _ in rows])

    def _box_queries(self, detector: Any, content: Tensor, boxes: list[Tensor], sizes: list[Any]) -> QueryGroups:
        groups, longest = self.slow.groups, content.shape[1] // self.slow.groups
        places, hidden = [], []
        for own, hw in zip(boxes, sizes, strict=True):
            where = literal.shares(or_dummy(own, hw).to(content.dtype), hw).clamp(0, 1)
            places.append(F.pad(where, (0, 0, 0, longest - len(where)), value=0.5).repeat(groups, 1))
            hidden.append((torch.arange(longest) >= len(where)).repeat(groups))
        queries = detector.network.box_queries(content, torch.stack(places))
        return QueryGroups(queries, [longest] * groups, torch.stack(hidden) if self.config.mask_group_padding else None)

    # Losses

    def _detection(self, found: Decoded, proposals: Any, targets: list[literal.Boxes], sizes: list[Any]) -> dict[str, Tensor]:
        if self.slow.solver == "shipped":
            wanted = _normalised(targets, sizes)
            terms: dict[str, Tensor] = self.method.matching.losses(found.logits, found.boxes, wanted, self.losses.stage)
            outputs, objects = (proposals.logits, proposals.boxes), objectness_targets(wanted)
            return terms | self.method.matching.losses(*outputs, objects, self.losses.stage, prefix="enc_")
        terms = literal.hybrid(found.logits, found.boxes, targets, sizes, self.stage, self.config)
        things = [(boxes, torch.zeros_like(labels)) for boxes, labels in targets]
        of_encoder = literal.hybrid(proposals.logits[None], proposals.boxes[None], things, sizes, self.stage, self.config)
        return terms | {f"enc_{k}": v for k, v in of_encoder.items()}

    def _denoised(self, found: Decoded, denoising: Denoising, targets: list[literal.Boxes], sizes: list[Any]) -> dict[str, Tensor]:
        if self.slow.solver == "shipped":
            return self.losses.denoised(found, denoising)
        return literal.denoising_losses(found.logits, found.boxes, denoising, targets, sizes, self.config)

    def _consistency(self, student: Decoded, teacher: Decoded, pairs: list[Tensor]) -> Tensor:
        groups, longest = self.slow.groups, student.hidden.shape[2] // self.slow.groups
        rows, weights = [], []
        for (b, keep), group in itertools.product(enumerate(pairs), range(groups)):
            count = int(keep.sum())
            rows += [(b, group * longest + i) for i in range(max(count, 1))]
            weights += [float(count > 0)] * max(count, 1)
        image, place = torch.tensor(rows).unbind(1)
        weight = torch.tensor(weights, dtype=student.hidden.dtype)
        total = student.hidden.sum() * 0
        for s, t in zip(student.hidden, teacher.hidden, strict=True):
            if self.slow.solver == "shipped" or self.config.consistency_reduction == "weighted":
                own = consistency_loss(s[image, place], t[image, place], weight, reduction=self.config.consistency_reduction)
            else:
                own = literal.consistency(s[image, place], t[image, place], weight)
            total = total + self.config.consistency_weight * own
        return total


def _usable(boxes: Tensor, drop_degenerate: bool) -> Tensor:
    area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return area if drop_degenerate else torch.ones_like(area)


def or_dummy(boxes: Tensor, hw: tuple[int, int]) -> Tensor:
    """The boxes of an image of the given size, or its middle where there are none."""
    h, w = hw
    return boxes if len(boxes) else boxes.new_tensor([[w / 4, h / 4, 3 * w / 4, 3 * h / 4]])


def _grow(rows: Tensor, length: int) -> Tensor:
    return F.pad(rows, (0, 0, 0, length - len(rows)))


def _padded(targets: list[literal.Boxes]) -> PaddedTargets:
    """Padded without the cast to float32 of `from_list`."""
    rows = max(1, *(len(labels) for _, labels in targets))
    padded = PaddedTargets.from_list([Target(boxes=boxes, labels=labels) for boxes, labels in targets], nmax=rows)
    boxes = torch.stack([_grow(boxes, rows) for boxes, _ in targets])
    return PaddedTargets(boxes, padded.labels, padded.scores, padded.weights, padded.count)


def _normalised(targets: list[literal.Boxes], sizes: list[Any]) -> PaddedTargets:
    padded, hw = _padded(targets), torch.tensor(sizes, dtype=torch.float32).to(targets[0][0].dtype)
    return normalised(padded, hw)


__all__ = ["LiteralStep", "Pseudo", "Slow"]
