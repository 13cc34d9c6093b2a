"""`SemiSupervisedDetector`: any detector, trained by any method, behind one `training_step`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from ssod_fast.detectors.protocol import ImageBatch, LossProgram
from ssod_fast.structures import PaddedTargets, Target

from .ema import EMAConfig
from .mean_teacher import MeanTeacher
from .mixpl import MixPL
from .step import BackwardDriver, StepOutput

if TYPE_CHECKING:
    from ssod_fast.data.batches import LabeledBatch, UnlabeledBatch

RunStudent = Callable[[ImageBatch, PaddedTargets | list[Target] | LossProgram], dict[str, Tensor]]


class Method(Protocol):
    """A training recipe with the state that belongs to it (random numbers, caches), but without the networks."""

    @property
    def ema(self) -> EMAConfig | None:
        """How the teacher follows the student; None for no teacher."""
        ...

    @property
    def burn_in(self) -> int:
        """Iterations after which the teacher is made a copy of the student again; 0 for never."""
        ...

    @property
    def trainable(self) -> nn.Module | None:
        """Networks of the method's own that are trained beside the student, as Semi-DETR's projector is; None for none.

        Always the same object. Its weights belong to the model's `state_dict()`, not to the method's. In a distributed run they get
        gradients on every rank in the same iterations: what averages them waits for all ranks.
        """
        ...

    def check(self, student: nn.Module) -> None:
        """Raises TypeError if the detector lacks what the method needs."""
        ...

    def step(
        self,
        model: SemiSupervisedDetector,
        labeled: LabeledBatch,
        unlabeled: UnlabeledBatch | None,
        step: int,
        driver: BackwardDriver | None,
        want_preview: bool,
    ) -> StepOutput:
        """One iteration up to the gradients."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        ...


class SemiSupervisedDetector(MeanTeacher):
    """A student, its teacher and the method that trains them.

    Example:
        model = SemiSupervisedDetector(build_detector("torchvision:fcos_resnet50_fpn", 3), MixPL(MixPLConfig()))
        for step, (labeled, unlabeled) in enumerate(loader):
            model.training_step(labeled, unlabeled, step).loss.backward()
            optimizer.step(); optimizer.zero_grad()
            model.update_teacher(step)
        model.teacher.predict(images)

    Args:
        student: a detector.
        method: MixPL with its defaults if not given. One method object serves one model.
        num_classes: if given, checked against the detector's.

    Attributes:
        trainable: what the method trains beside the student, None for nothing; in no average, because only the student has a teacher.
        run_student: computes the student's losses; a trainer puts its DDP wrapper here.
    """

    student: Any  # a Detector and an nn.Module, which one static type cannot say
    teacher: Any
    run_student: RunStudent

    def __init__(self, student: nn.Module, method: Method | None = None, num_classes: int | None = None) -> None:
        method = MixPL() if method is None else method
        method.check(student)
        super().__init__(student, method.ema, method.burn_in)
        if num_classes is not None and num_classes != self.student.num_classes:
            raise ValueError(f"num_classes must be the detector's {self.student.num_classes}, got {num_classes}")
        self.method = method
        self.trainable = method.trainable
        self.run_student = self.student

    @property
    def trained(self) -> list[nn.Module]:
        """Everything that an optimizer has to move: the student, and what the method trains beside it."""
        return [self.student] if self.trainable is None else [self.student, self.trainable]

    def __setattr__(self, name: str, value: Any) -> None:
        # A DDP wrapper assigned as an attribute of a module would be registered and saved as a second student.
        if name == "run_student":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def training_step(
        self,
        labeled: LabeledBatch,
        unlabeled: UnlabeledBatch | None,
        step: int,
        driver: BackwardDriver | None = None,
        want_preview: bool = False,
    ) -> StepOutput:
        """Losses of one iteration, and their gradients if a driver is given.

        Args:
            labeled: images and targets, on the student's device.
            unlabeled: weak and strong views, on the student's device; None for a supervised method.
            step: iteration, 0-based.
            driver: runs backward after each loss; without it the joint loss comes back with its graph.
            want_preview: keep the student's mixed inputs in the output.

        Returns:
            Loss, terms for the log, statistics of the pseudo labels.

        Raises:
            TypeError: `labeled` is None.
        """
        if labeled is None:
            raise TypeError("labeled must be a LabeledBatch, got None: every step has labelled images")
        if not self.student.training:
            self.train()
        return self.method.step(self, labeled, unlabeled, step, driver, want_preview)

    def get_extra_state(self) -> dict[str, Any]:
        """The method's state beside the teacher's."""
        return {**super().get_extra_state(), "method": self.method.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores :meth:`get_extra_state`."""
        super().set_extra_state(state)
        self.method.load_state_dict(state["method"])
