"""Semi-DETR (arXiv 2307.08095): semi-supervised training of detection transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ssod_fast.detectors.deformable_detr.config import DETRConfig
from ssod_fast.detectors.deformable_detr.detector import DETRDetector
from ssod_fast.detectors.protocol import require
from ssod_fast.methods.inputs import detector_batch
from ssod_fast.methods.step import BackwardDriver, LossBook, Preview, PseudoLabelStats, StepOutput
from ssod_fast.structures import PaddedTargets, Target

from .branches import AbsentBranch, DetectionLosses, SupervisedBranch, UnsupervisedBranch
from .config import SemiDETRConfig
from .consistency import CrossViewQueryConsistency
from .draws import Draws
from .hybrid import HybridMatching
from .mining import CostMiner
from .teacher import statistics, watch

if TYPE_CHECKING:
    from ssod_fast.data.batches import LabeledBatch, UnlabeledBatch
    from ssod_fast.methods.semi_supervised import SemiSupervisedDetector


FINEST_STRIDE = 8  # of the pyramids of the family; networks of fewer than three levels leave the finest out


class SemiDETR:
    """The recipe, with the projector that makes queries of features.

    A step adds two losses. Strong views of unlabelled images learn the teacher's boxes on the weak views; in stage 1, queries made of mined
    boxes besides learn to be decoded as the teacher decodes them. Labelled images learn the ground truth. Matching gives every object
    several queries in stage 1 and one in stage 2, whose models therefore need no suppression.

    Backbones and encoders run once per image, matching queries are decoded once, and nothing is computed whose weight is 0. That changes
    nothing but the time as long as two passes over an image agree: dropout has to be 0, and batch norm is best frozen (where it is trained,
    the student's sees each image once, and not twice as in the released code).

    Args:
        config: options; `switch_at` has to be set.
        rank: of this process in a distributed run; each rank draws its own noise.

    Attributes:
        trainable: holds the projector, which belongs to neither network; there after :meth:`check`.

    Raises:
        ValueError: nobody has said when stage 2 begins.
    """

    def __init__(self, config: SemiDETRConfig | None = None, *, rank: int = 0) -> None:
        self.config = config = SemiDETRConfig() if config is None else config
        if config.switch_at is None:
            raise ValueError("switch_at must be the first iteration of stage 2, officially half of the run, got None")
        self.ema = config.ema
        self.burn_in = config.burn_in
        self.rank = rank
        self.trainable: CrossViewQueryConsistency | None = None
        self.matching = HybridMatching(
            cls_weight=config.cls_weight,
            l1_weight=config.l1_weight,
            giou_weight=config.giou_weight,
            topk=config.o2m_topk,
            alpha=config.o2m_alpha,
            beta=config.o2m_beta,
        )
        self._last, self._micro = -1, 0

    def check(self, student: nn.Module) -> None:
        """Needs a :class:`~ssod_fast.detectors.deformable_detr.detector.DETRDetector` that selects queries and drops nothing.

        Raises:
            TypeError: another detector.
            ValueError: no selection of queries, dropout, or a method that serves a model of another width.
        """
        require(student, for_method="semi_detr")
        if not isinstance(student, DETRDetector):
            raise TypeError(
                f"semi_detr needs a DETRDetector (own:dino_... or own:deformable_detr_...), got {type(student).__name__}: "
                "it runs backbone, encoder and decoder one by one"
            )
        if student.config.selection == "none":
            raise ValueError('semi_detr needs queries that start from boxes: selection must be "two_stage" or "mixed", got "none"')
        if student.config.dropout > 0:
            raise ValueError(
                f"dropout must be 0 for semi_detr, got {student.config.dropout}: queries are decoded in two passes, which would drop others"
            )
        self._build_projector(student.config)

    def stage(self, step: int) -> int:
        """1 (one-to-many matching) or 2 (one-to-one)."""
        assert self.config.switch_at is not None
        return 1 if step < self.config.switch_at else 2

    def step(
        self,
        model: SemiSupervisedDetector,
        labeled: LabeledBatch,
        unlabeled: UnlabeledBatch | None,
        step: int,
        driver: BackwardDriver | None = None,
        want_preview: bool = False,
    ) -> StepOutput:
        """One iteration: the teacher, the unlabelled loss, then the labelled one, after whose backward DDP reduces all gradients.

        Either batch may be empty, the unlabelled one None; without unlabelled images a distributed run is refused. Its processes must have
        equally many images, labelled and unlabelled ones together: that bounds the costs that they exchange.

        Raises:
            ValueError: both are empty, or a label is no class (on a GPU, this is looked at in the first step only).
            FloatingPointError: a student whose output on unlabelled images is not finite.
        """
        self._check_batches(model, labeled, unlabeled)
        self._count_micro_steps(step)
        self._suppress(model, step)
        losses = self.losses(step)
        book = LossBook(driver)
        stats: PseudoLabelStats | None = None
        previews: tuple[Preview, ...] = ()
        if unlabeled is not None and len(unlabeled) and step >= self.burn_in:
            stats, previews = self.unsupervised(book, model, losses, unlabeled, len(labeled) + len(unlabeled), want_preview)
        self.supervised(book, model, losses, labeled, unlabeled)
        return book.output(stats, previews)

    def losses(self, step: int, micro: int | None = None) -> DetectionLosses:
        """Detection losses of an iteration, with its random numbers.

        Args:
            step: iteration.
            micro: which of its accumulated steps; by default the current one.
        """
        draws = Draws(self.config.seed, self.rank, step, self._micro if micro is None else micro)
        return DetectionLosses(self.matching, "o2m" if self.stage(step) == 1 else "o2o", self.config, draws)

    def unsupervised(
        self,
        book: LossBook,
        model: SemiSupervisedDetector,
        losses: DetectionLosses,
        views: UnlabeledBatch,
        images: int,
        want_preview: bool = False,
    ) -> tuple[PseudoLabelStats, tuple[Preview, ...]]:
        """The teacher on the weak views, then the student's losses on the strong ones.

        Args:
            book: runs the branch.
            model: student and teacher.
            losses: of the stage.
            views: unlabelled images.
            images: labelled and unlabelled ones of this process, as many as on every other.
            want_preview: whether to return the strong views with their pseudo boxes.
        """
        stage, config = 1 if losses.stage == "o2m" else 2, self.config
        assert self.trainable is not None
        consistent = stage in config.consistency_stages
        watched = watch(model.teacher, views, config, keep_inputs=consistent)
        miner = CostMiner(scope=config.mining_scope, capacity=images * config.teacher_topk) if consistent else None
        denoising = stage in config.pseudo_denoising_stages
        branch = UnsupervisedBranch(losses, model.teacher, watched, miner, self.trainable, denoising)
        strong = detector_batch(model.student, views.strong)
        book.run("unsup", lambda: model.run_student(strong, branch), weight=config.unsup_weight, last=False)
        assert branch.targets is not None
        previews = (Preview("unsup", strong, branch.targets),) if want_preview else ()
        return statistics(watched, branch.targets, branch.mined, views, config), previews

    def supervised(
        self,
        book: LossBook,
        model: SemiSupervisedDetector,
        losses: DetectionLosses,
        labeled: LabeledBatch,
        unlabeled: UnlabeledBatch | None,
    ) -> None:
        """The student's losses on labelled images; 0 with a gradient of 0 for every parameter where there are none."""
        if len(labeled):
            images = detector_batch(model.student, labeled.images)
            branch: Any = SupervisedBranch(losses, PaddedTargets.from_list(labeled.targets))
        else:
            assert unlabeled is not None
            images, branch = detector_batch(model.student, unlabeled.strong[:1]), AbsentBranch(losses)
        book.run("sup", lambda: model.run_student(images, branch), weight=self.config.sup_weight, last=True)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: random numbers follow from seed, rank and iteration, and the projector is saved with the model."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def _build_projector(self, config: DETRConfig) -> None:
        """Once, because an optimizer may hold its parameters; its weights depend on the seed alone."""
        served = (config.width, config.levels)
        if self.trainable is None:
            first = max(3 - config.levels, 0)
            strides = [FINEST_STRIDE << (first + level) for level in range(config.levels)]
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.config.seed)  # and not those of GPUs, as torch.manual_seed does
                self.trainable = CrossViewQueryConsistency(config.width, strides=strides, reduction=self.config.consistency_reduction)
            self._served = served
        elif self._served != served:
            raise ValueError(f"a method serves one model: its (width, levels) are {self._served}, got a detector of {served}")

    def _count_micro_steps(self, step: int) -> None:
        """Accumulated steps of one iteration draw different numbers."""
        self._micro = self._micro + 1 if step == self._last else 0
        self._last = step

    def _suppress(self, model: SemiSupervisedDetector, step: int) -> None:
        """Models of stage 1 predict with suppression: one-to-many matching leaves duplicates."""
        threshold = self.config.eval_nms_thr if self.stage(step) == 1 else None
        for detector in (model.student, model.teacher):
            if detector.nms_thr != threshold:
                detector.set_nms(threshold)

    def _check_batches(self, model: SemiSupervisedDetector, labeled: LabeledBatch, unlabeled: UnlabeledBatch | None) -> None:
        missing = unlabeled is None or not len(unlabeled)
        if missing and not len(labeled):
            raise ValueError("labeled and unlabeled must not both be empty")
        if missing and _distributed():
            raise ValueError("unlabeled must not be empty on any rank of a distributed run: the others would wait for its costs and counts")
        if self._last < 0 or all(target["labels"].device.type == "cpu" for target in labeled.targets):
            _check_labels(labeled.targets, model.student.num_classes)


def _check_labels(targets: Sequence[Target], num_classes: int) -> None:
    for i, target in enumerate(targets):
        found = target["labels"]
        # NumPy, so that nobody takes a question about host data for a wait for the device.
        labels = (found if found.device.type == "cpu" else found.cpu()).numpy()
        if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
            raise ValueError(
                f"targets[{i}]['labels'] must lie in 0..{num_classes - 1} (0-based, background has no label), "
                f"got {labels.min()}..{labels.max()}"
            )


def _distributed() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
