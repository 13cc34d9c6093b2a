"""The two losses of a Semi-DETR step, as programs that the student runs in its forward."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssod_fast.detectors.deformable_detr.criterion import DETRCriterion, normalised_targets, objectness_targets
from ssod_fast.detectors.deformable_detr.denoising import Denoising, make_denoising
from ssod_fast.detectors.deformable_detr.stages import Decoded
from ssod_fast.detectors.protocol import ImageBatch
from ssod_fast.structures import PaddedTargets

from .config import SemiDETRConfig
from .consistency import CrossViewQueryConsistency, QueryRows, query_rows
from .draws import Draws, Purpose
from .hybrid import HybridMatching, MatchingStage
from .mining import CostMiner, Mined
from .passes import Look, QueryGroups, decode_groups, look
from .pseudo import certain, normalised

if TYPE_CHECKING:
    from ssod_fast.detectors.deformable_detr.detector import DETRDetector

    from .teacher import Watched


@dataclass(frozen=True)
class DetectionLosses:
    """Losses of matching and denoising queries in one stage.

    Attributes:
        matching: of the matching queries and the encoder's proposals.
        stage: which matching.
        config: options of the denoising.
        draws: its random numbers.
    """

    matching: HybridMatching
    stage: MatchingStage
    config: SemiDETRConfig
    draws: Draws

    def matched(self, seen: Look, targets: PaddedTargets) -> dict[str, Tensor]:
        """Losses of all decoder layers and of the encoder; `targets` are normalised."""
        terms = self.matching.losses(seen.found.logits, seen.found.boxes, targets, self.stage)
        if seen.proposals is not None:
            # The encoder's head learns whether there is an object, in its first column, and not which.
            wanted = objectness_targets(targets)
            terms |= self.matching.losses(seen.proposals.logits, seen.proposals.boxes, wanted, self.stage, prefix="enc_")
        return terms

    def denoises(self, detector: DETRDetector) -> bool:
        """Whether there are denoising queries: the method has to want them, and the detector to know them."""
        return self.config.denoising > 0 and detector.config.denoising > 0

    def denoise(self, detector: DETRDetector, targets: PaddedTargets, purpose: Purpose) -> Denoising | None:
        """Noisy copies of normalised targets; None where there are no such queries."""
        config = self.config
        if not self.denoises(detector):
            return None
        return make_denoising(
            targets,
            detector.num_classes,
            number=config.denoising,
            label_noise=config.label_noise,
            box_noise=config.box_noise,
            generator=self.draws.generator(purpose, targets.device),
        )

    def denoised(self, found: Decoded, denoising: Denoising) -> dict[str, Tensor]:
        """Losses of denoising queries."""
        config = self.config
        criterion = DETRCriterion(cls_weight=config.cls_weight, l1_weight=config.l1_weight, giou_weight=config.giou_weight)
        return criterion.denoising_losses(found.logits, found.boxes, denoising)


def denoising_queries(detector: DETRDetector, denoising: Denoising) -> QueryGroups:
    """Denoising queries for the decoder."""
    return QueryGroups(detector.network.label_queries(denoising.labels, denoising.boxes), [denoising.size] * denoising.groups)


@dataclass(frozen=True)
class SupervisedBranch:
    """Labelled images: matching queries, encoder proposals and denoising queries learn the ground truth.

    Attributes:
        losses: of the stage.
        targets: boxes in pixels.
    """

    losses: DetectionLosses
    targets: PaddedTargets

    def __call__(self, detector: DETRDetector, images: ImageBatch) -> dict[str, Tensor]:
        """The student's losses."""
        seen = look(detector.network, images, keep_inputs=self.losses.denoises(detector))
        targets = normalised_targets(self.targets, seen.memory.image_hw, detector.num_classes)
        terms = self.losses.matched(seen, targets)
        denoising = self.losses.denoise(detector, targets, "labeled")
        if denoising is not None:
            (found,) = decode_groups(detector.network, seen, [denoising_queries(detector, denoising)])
            terms |= self.losses.denoised(found, denoising)
        elif detector.config.denoising:
            # DDP waits for a gradient of every parameter, that of an embedding too which nobody uses.
            terms["loss_cls"] = terms["loss_cls"] + 0 * detector.network.label_embedding.weight.sum()
        return terms


@dataclass(frozen=True)
class AbsentBranch:
    """Stands in for labelled images where a process has none: 0, with a gradient of 0 for every parameter.

    It runs the branch of other processes on an image without boxes. Those divide by means over all processes, and so wait for this one.

    Attributes:
        losses: of the stage.
    """

    losses: DetectionLosses

    def __call__(self, detector: DETRDetector, images: ImageBatch) -> dict[str, Tensor]:
        """The loss of 0."""
        branch = SupervisedBranch(self.losses, PaddedTargets.empty(len(images), device=images.tensor.device))
        return {"loss_none": torch.stack(list(branch(detector, images).values())).sum() * 0}


@dataclass
class UnsupervisedBranch:
    """Strong views: matching queries learn pseudo boxes, and queries made of mined boxes shall be understood as the teacher does.

    Attributes:
        losses: of the stage.
        teacher: the teacher's detector.
        watched: what it made of the weak views.
        miner: chooses the boxes of the consistency; None for no consistency in this stage.
        consistency: with the projector.
        denoising: whether pseudo boxes get denoising queries in this stage.
        mined: what was mined, after the call.
        targets: targets of the detection loss in pixels of the strong views, after the call.
    """

    losses: DetectionLosses
    teacher: DETRDetector
    watched: Watched
    miner: CostMiner | None
    consistency: CrossViewQueryConsistency
    denoising: bool
    mined: Mined | None = field(default=None, init=False)
    targets: PaddedTargets | None = field(default=None, init=False)

    def __call__(self, detector: DETRDetector, images: ImageBatch) -> dict[str, Tensor]:
        """The student's losses."""
        config, strong = self.losses.config, self.watched.strong
        denoises = self.denoising and self.losses.denoises(detector)
        seen = look(detector.network, images, keep_inputs=self.miner is not None or denoises)
        wanted = normalised(strong, seen.memory.image_hw)
        sure = certain(strong, config.cls_pseudo_thr, drop_degenerate=config.drop_degenerate)  # S_cls
        paired = self._mine(seen, wanted)  # S_con
        longest, counts = self._read(seen, sure, paired)
        self.targets = _first(strong.select(sure), longest)
        targets = _first(wanted.select(sure), longest)
        terms = self.losses.matched(seen, targets)
        denoising = self.losses.denoise(detector, targets, "pseudo") if denoises else None
        pairs = None if paired is None else self._pair(detector, seen, paired, counts)
        parts = [] if pairs is None else [pairs.student]
        parts += [] if denoising is None else [denoising_queries(detector, denoising)]
        found = decode_groups(detector.network, seen, parts)
        if pairs is not None:
            terms["loss_consistency"] = self._compare(found[0], pairs)
        if denoising is not None:
            terms |= self.losses.denoised(found[-1], denoising)
        return terms

    def _mine(self, seen: Look, wanted: PaddedTargets) -> Tensor | None:
        """Bool [B, N]: boxes of the consistency; None where there is none."""
        if self.miner is None:
            return None
        self.mined = self.miner(seen.found.logits[-1].detach(), seen.found.boxes[-1].detach(), wanted)
        return self.mined.keep | certain(self.watched.strong, self.losses.config.cls_pseudo_thr, drop_degenerate=False)

    def _read(self, seen: Look, sure: Tensor, paired: Tensor | None) -> tuple[int, list[int]]:
        """The one wait for the device in a step: how many rows the targets need, and how many queries each image gets."""
        named = {f"{name} of the student's decoder": getattr(seen.found, name) for name in ("logits", "boxes")}
        if seen.proposals is not None:
            named |= {f"{name} of the student's encoder": getattr(seen.proposals, name) for name in ("logits", "boxes")}
        finite = torch.stack([value.detach().isfinite().all() for value in named.values()])
        chosen = sure.new_zeros(sure.shape) if paired is None else paired
        numbers: list[int] = torch.cat([finite.long(), sure.sum(1), chosen.sum(1)]).tolist()
        broken = [name for name, good in zip(named, numbers, strict=False) if not good]
        if broken:
            raise FloatingPointError(f"{' and '.join(broken)} on unlabelled images must be finite, got NaN or infinity")
        sures, pairs = numbers[len(named) :][: len(sure)], numbers[len(named) + len(sure) :]
        return max(sures), pairs

    def _pair(self, detector: DETRDetector, seen: Look, paired: Tensor, counts: list[int]) -> QueryPair:
        """The same queries for both networks: content from features of pseudo boxes, each at the box's place in its own view."""
        watched, config = self.watched, self.losses.config
        rows = query_rows(counts, paired.device)
        weak_hw, strong_hw = watched.seen.memory.image_hw, seen.memory.image_hw
        weak = rows.boxes(watched.weak.select(paired), weak_hw)
        strong = rows.boxes(watched.strong.select(paired), strong_hw)
        content = self.consistency.content(watched.seen.pyramid.maps, weak, rows)
        hidden = rows.padding if config.mask_group_padding else None
        with torch.no_grad():
            same = config.content == "teacher"
            other = content.detach() if same else self.consistency.content(seen.pyramid.maps, strong, rows)
            queries = self.teacher.network.box_queries(other, rows.references(weak, weak_hw))
            (heard,) = decode_groups(self.teacher.network, watched.seen, [QueryGroups(queries, [rows.size], hidden)])
        queries = detector.network.box_queries(content, rows.references(strong, strong_hw))
        return QueryPair(QueryGroups(queries, [rows.size], hidden), heard, rows)

    def _compare(self, found: Decoded, pair: QueryPair) -> Tensor:
        """The consistency, summed over the decoder layers."""
        return self.losses.config.consistency_weight * self.consistency.loss(found.hidden, pair.teacher.hidden, pair.rows).sum()


@dataclass(frozen=True)
class QueryPair:
    """Queries of the consistency: to be decoded by the student, decoded by the teacher."""

    student: QueryGroups
    teacher: Decoded
    rows: QueryRows


def _first(targets: PaddedTargets, rows: int) -> PaddedTargets:
    """The first rows, at least one, of targets of which no image has more."""
    stop = max(rows, 1)
    fields = {name: getattr(targets, name)[:, :stop] for name in ("boxes", "labels", "scores", "weights")}
    return dataclasses.replace(targets, **fields, placement=None, index=None)
