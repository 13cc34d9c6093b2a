"""The supervised baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ssod_fast.detectors.protocol import require
from ssod_fast.methods.inputs import detector_batch, labeled_targets
from ssod_fast.methods.step import BackwardDriver, LossBook, StepOutput

from .config import SupervisedConfig

if TYPE_CHECKING:
    from ssod_fast.data.batches import LabeledBatch, UnlabeledBatch
    from ssod_fast.methods.semi_supervised import SemiSupervisedDetector


class SupervisedMethod:
    """`L = sup_weight * student.losses(labelled)`. Unlabelled images, if a loader gives any, are not looked at."""

    def __init__(self, config: SupervisedConfig | None = None, *, rank: int = 0) -> None:
        self.config = SupervisedConfig() if config is None else config
        self.ema = self.config.ema
        self.burn_in = 0
        self.trainable = None

    def check(self, student: nn.Module) -> None:
        """Any detector will do."""
        require(student, for_method="supervised")

    def step(
        self,
        model: SemiSupervisedDetector,
        labeled: LabeledBatch,
        unlabeled: UnlabeledBatch | None,
        step: int,
        driver: BackwardDriver | None = None,
        want_preview: bool = False,
    ) -> StepOutput:
        """The labelled loss."""
        book = LossBook(driver)
        run_supervised(book, model, labeled, weight=self.config.sup_weight, last=True)
        return book.output()

    def state_dict(self) -> dict[str, Any]:
        """The baseline has no state of its own."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def run_supervised(book: LossBook, model: SemiSupervisedDetector, labeled: LabeledBatch, *, weight: float, last: bool) -> None:
    """The branch "sup" of any method: the student's losses on labelled images."""
    images = detector_batch(model.student, labeled.images)
    targets = labeled_targets(model.student, labeled.targets)
    book.run("sup", lambda: model.run_student(images, targets), weight=weight, last=last)
