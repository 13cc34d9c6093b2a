"""MixPL (arXiv 2312.07006): pseudo-mixup and pseudo-mosaic for a mean teacher around any detector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssod_fast.detectors.protocol import Detector, ImageBatch, require
from ssod_fast.methods.inputs import detector_batch, input_dtype
from ssod_fast.methods.schedules import ramp
from ssod_fast.methods.step import BackwardDriver, LossBook, Preview, PseudoLabelStats, StepOutput
from ssod_fast.methods.supervised.method import run_supervised
from ssod_fast.ops.compose import compose
from ssod_fast.ops.compose_plan import BoxRule, ComposePlan
from ssod_fast.ops.planners import MixPLPlanner
from ssod_fast.structures import PaddedTargets, Target, upload

from .cache import RingCache
from .config import MixPLConfig
from .pseudo import PseudoBoxes, TeacherBoxes, above_threshold, first_rows, open_gate, project_predictions

if TYPE_CHECKING:
    from ssod_fast.data.batches import LabeledBatch, UnlabeledBatch
    from ssod_fast.methods.semi_supervised import SemiSupervisedDetector

STRIDE = 32  # of the mixed batches, and of the target that mixup partners are fitted to, whatever the detector's own is


@dataclass(frozen=True)
class MixedBatch:
    """A batch as the student will see it.

    Attributes:
        name: "mixup", "mosaic", or "unsup" where mixup is switched off; the prefix of its losses.
        images: normalised and padded.
        targets: pseudo boxes above the threshold.
        gate: float32 scalar, 1 if the loss counts.
        weight: factor of the loss beside the gate.
    """

    name: str
    images: ImageBatch
    targets: PaddedTargets
    gate: Tensor
    weight: float


class MixPL:
    """The recipe, with its planner and its cache.

    A step adds three losses: labelled images; strong views of unlabelled images, mixed half and half with cached ones; a mosaic of cached
    ones. Their targets are the teacher's boxes on the weak views, those in the cache as they were predicted when the image came by.

    Args:
        config: options.
        rank: of this process in a distributed run; each rank draws its own mixes.
    """

    def __init__(self, config: MixPLConfig | None = None, *, rank: int = 0) -> None:
        self.config = config = MixPLConfig() if config is None else config
        self.ema = config.ema
        self.burn_in = config.burn_in
        self.trainable: nn.Module | None = None
        self.planner = _make_planner(config, rank)
        self.cache = RingCache(config.cache_length, config.unlabeled_batch, config.teacher_topk)

    def check(self, student: nn.Module) -> None:
        """Any detector will do; one with `supports_padded` spares the host a wait per unsupervised loss."""
        require(student, for_method="mixpl")

    def step(
        self,
        model: SemiSupervisedDetector,
        labeled: LabeledBatch,
        unlabeled: UnlabeledBatch | None,
        step: int,
        driver: BackwardDriver | None = None,
        want_preview: bool = False,
    ) -> StepOutput:
        """One iteration: the labelled loss, then the teacher, then the two unsupervised losses."""
        burning_in = step < self.config.burn_in
        if unlabeled is None and not burning_in:
            raise ValueError("unlabeled must be a batch of weak and strong views for mixpl, got None: without such images use supervised")
        book = LossBook(driver)
        shown = self.supervised(book, model, labeled, last=burning_in, want_preview=want_preview)
        if burning_in or unlabeled is None:
            return book.output(previews=shown)
        said = self.predict(model, unlabeled)
        stats, previews = self.unsupervised_losses(book, model, said, unlabeled, step, want_preview)
        return book.output(stats, shown + previews)

    def supervised(
        self, book: LossBook, model: SemiSupervisedDetector, labeled: LabeledBatch, *, last: bool, want_preview: bool = False
    ) -> tuple[Preview, ...]:
        """The labelled loss; returns what it trains on where that is not the batch as it came."""
        run_supervised(book, model, labeled, weight=self.config.sup_weight, last=last)
        return ()

    @torch.no_grad()
    def predict(self, model: SemiSupervisedDetector, unlabeled: UnlabeledBatch) -> TeacherBoxes:
        """The teacher's boxes on the weak views, in their own pixels and not filtered beyond the detector's test settings."""
        images = detector_batch(model.teacher, unlabeled.weak)
        predictions: list[Target] = model.teacher.predict(images, self.config.teacher_score_thr, self.config.teacher_topk)
        return TeacherBoxes.count(predictions, self.config.cls_pseudo_thr)

    def unsupervised_losses(
        self,
        book: LossBook,
        model: SemiSupervisedDetector,
        said: TeacherBoxes,
        unlabeled: UnlabeledBatch,
        step: int,
        want_preview: bool = False,
    ) -> tuple[PseudoLabelStats, tuple[Preview, ...]]:
        """Everything that follows the teacher. Does not wait for the device if the detector takes padded targets.

        The exceptions are asked for: `gate="per_image"` and `skip_closed_gate`.
        """
        with torch.no_grad():
            pseudo = project_predictions(said.predictions, unlabeled, rows=self.config.teacher_topk, min_wh=self.config.min_pseudo_bbox_wh)
            batches = self.mix(model.student, unlabeled.strong, pseudo.strong, said.confident, step)
            stats = self._stats(pseudo, batches, unlabeled.image_ids)
            previews = tuple(Preview(b.name, b.images, b.targets) for b in batches) if want_preview else ()
            batches = self._without_shut(batches)
            targets = [_student_targets(model.student, batch.targets) for batch in batches]
        for i, batch in enumerate(batches):
            forward = partial(model.run_student, batch.images, targets[i])
            book.run(batch.name, forward, weight=batch.gate * batch.weight, last=i + 1 == len(batches))
        return stats, previews

    @torch.no_grad()
    def mix(
        self, student: Detector, strong: Sequence[Tensor], boxes: PaddedTargets, confident: Sequence[int], step: int
    ) -> list[MixedBatch]:
        """The mixed batches of a step; its images and boxes then enter the cache as they came, not erased and not filtered.

        Args:
            student: normalises as it wants to see images.
            strong: [3, h, w] each.
            boxes: all pseudo boxes in pixels of `strong`.
            confident: per image, how many of them pass the score threshold at most.
            step: iteration.
        """
        cache_sizes = self.cache.sizes
        self.cache.write(strong, boxes, confident)
        images, targets = self.cache.read()
        # Filtering first leaves what filtering after the mix would: erasing does not look at scores.
        targets = first_rows(above_threshold(targets, self.config.cls_pseudo_thr), max(1, self.cache.confident))
        mixup, mosaic = self.planner.plan([(int(image.shape[1]), int(image.shape[2])) for image in strong], cache_sizes)
        weight = self.config.unsup_weight * ramp(step, start=self.config.burn_in, length=self.config.ramp)
        batches = [self._compose("mixup" if self.config.mixup else "unsup", student, images, targets, mixup, weight)]
        if mosaic is not None:
            batches.append(self._compose("mosaic", student, images, targets, mosaic, weight * self.config.mosaic_weight))
        self.cache.commit()
        return batches

    def state_dict(self) -> dict[str, Any]:
        """The planner's generator and the cache."""
        return {"planner": self.planner.state_dict(), "cache": self.cache.state_dict(), "cls_pseudo_thr": self.config.cls_pseudo_thr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        cache = state["cache"]
        if state["cls_pseudo_thr"] != self.config.cls_pseudo_thr:  # more boxes may pass now than were counted
            cache = {**cache, "confident": [self.config.teacher_topk] * len(cache["images"])}
        self.planner.load_state_dict(state["planner"])
        self.cache.load_state_dict(cache)

    def _compose(
        self, name: str, student: Detector, images: list[Tensor], targets: PaddedTargets, plan: ComposePlan, weight: float
    ) -> MixedBatch:
        stats = student.pixel_stats
        mixed, boxes = compose(
            images,
            targets,
            plan,
            rule=BoxRule(self.config.erase_thr, self.config.erase_overlap, min_visibility=0.0, min_wh=None),
            out_hw=plan.padded_hw(math.lcm(STRIDE, student.stride)),
            mean=stats.mean,
            std=stats.std,
            interp="nearest" if self.config.interp == "nearest" else "bilinear_aa",
            out_dtype=input_dtype(images[0].device),
        )
        sizes = [(int(h), int(w)) for h, w in plan.canvas]
        gate = open_gate(boxes.count, self.config.gate, self.config.least_num)
        return MixedBatch(name, ImageBatch(mixed, sizes), boxes, gate, weight)

    def _without_shut(self, batches: list[MixedBatch]) -> list[MixedBatch]:
        """Official behaviour by default: all batches as they are. The two switches read counts on the host."""
        if self.config.gate == "per_image":
            batches = [_keep_images(batch, self.config.least_num) for batch in batches]
        if self.config.skip_closed_gate:
            _refuse_distributed()
            batches = [batch for batch in batches if batch.gate.item() > 0]
        return batches

    def _stats(self, pseudo: PseudoBoxes, batches: list[MixedBatch], image_ids: list[int]) -> PseudoLabelStats:
        raw = pseudo.original
        return PseudoLabelStats(
            raw_count=raw.count,
            kept_count=above_threshold(pseudo.strong, self.config.cls_pseudo_thr).count,
            max_score=raw.scores.amax(1),
            mean_score=raw.scores.sum() / raw.count.sum().clamp(min=1),
            non_finite=pseudo.non_finite,
            pseudo=raw,
            score_thr=self.config.cls_pseudo_thr,
            image_ids=image_ids,
            extra={name: batch.gate for name, batch in zip(("gate", "mosaic_gate"), batches, strict=False)},
        )


def _make_planner(config: MixPLConfig, rank: int) -> MixPLPlanner:
    return MixPLPlanner(
        cache_size=config.cache_length,
        mosaic_shape=config.mosaic_shape,
        erase_patches=config.erase_patches,
        erase_ratio=config.erase_ratio,
        mixup=config.mixup,
        mosaics=config.mosaics_per_step,
        cache_flip=config.cache_flip,
        resize=config.resize,
        stride=STRIDE,
        seed=config.seed,
        rank=rank,
        rng=config.rng,
    )


def _student_targets(student: nn.Module, targets: PaddedTargets) -> PaddedTargets | list[Target]:
    """Padded where the detector takes them so, else a list, for which the host waits: before the student starts, not between its losses."""
    return targets if getattr(student, "supports_padded", False) else targets.to_list()


def _keep_images(batch: MixedBatch, least_num: int) -> MixedBatch:
    """Drops the images with too few boxes; all stay if none has enough, because the gate is shut then. Waits for the device once."""
    counts: list[int] = batch.targets.count.tolist()
    rows = [i for i, count in enumerate(counts) if count >= least_num]
    if len(rows) in (0, len(counts)):
        return batch
    index = upload(torch.tensor(rows), batch.images.tensor.device)
    images = ImageBatch(batch.images.tensor.index_select(0, index), [batch.images.sizes[i] for i in rows])
    return MixedBatch(batch.name, images, batch.targets[rows], batch.gate, batch.weight)


def _refuse_distributed() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError("skip_closed_gate must be off in a distributed run: ranks would disagree on which losses to reduce")
