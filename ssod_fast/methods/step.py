"""What one training step takes and gives: the backward driver, the outputs, the statistics of the pseudo labels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ssod_fast.detectors.protocol import ImageBatch
from ssod_fast.structures import PaddedTargets


class BackwardDriver(Protocol):
    """Runs backward after each additive loss of a step, so that only one graph is alive at a time.

    The trainer implements it: `branch` keeps DDP from reducing gradients except in the last branch, `backward` scales for
    accumulation and mixed precision.
    """

    def branch(self, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one loss; `last` tells that no other follows in this step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss`, a scalar with its graph."""
        ...


class JointBackward:
    """The driver used when none is given: keeps the graphs and sums the losses, for one backward by the caller."""

    def __init__(self) -> None:
        self.loss: Tensor | None = None

    def branch(self, last: bool) -> AbstractContextManager[None]:
        """Nothing to hold back: there is one backward."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds `loss` to the joint loss."""
        self.loss = loss if self.loss is None else self.loss + loss


@dataclass(frozen=True)
class PseudoLabelStats:
    """What the teacher said in one step, as device tensors that no loss reads; whoever logs decides when to wait for them.

    Attributes:
        raw_count: int32 [B], boxes per image before the score threshold.
        kept_count: int32 [B], boxes above the threshold, before mixing.
        max_score: float32 [B], highest score per image, 0 without a box.
        mean_score: float32 scalar, mean over all raw boxes, 0 without a box.
        non_finite: int64 scalar, teacher boxes dropped because a coordinate or score was not finite.
        pseudo: boxes with scores before the threshold, in pixels of the original images.
        score_thr: the threshold that `kept_count` refers to.
        image_ids: which images these are.
        extra: float32 scalars by name that only this method has, such as MixPL's "gate" and "mosaic_gate" (1 where the loss was open, 0
            where it was shut). A step may leave a name out.
    """

    raw_count: Tensor
    kept_count: Tensor
    max_score: Tensor
    mean_score: Tensor
    non_finite: Tensor
    pseudo: PaddedTargets
    score_thr: float
    image_ids: list[int]
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Preview:
    """One batch exactly as the student saw it."""

    kind: str
    images: ImageBatch
    targets: PaddedTargets


@dataclass(frozen=True)
class StepOutput:
    """Result of a training step.

    Attributes:
        loss: scalar; with its graph if no driver was given, detached otherwise.
        losses: detached weighted terms, keys such as "sup/loss_cls", "mixup/loss_cls", "mosaic/loss_cls".
        stats: of the pseudo labels; None where there were none (supervised, burn-in).
        previews: the student's mixed inputs, if they were asked for.
        diagnostics: float32 scalars by name for the log, which no loss reads, such as the overlap of boxes with known right ones; NaN where
            a batch had nothing to measure.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    stats: PseudoLabelStats | None = None
    previews: tuple[Preview, ...] = ()
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)


class LossBook:
    """Runs the additive losses of one step, one branch after the other, and keeps their terms for the log.

    Attributes:
        diagnostics: other numbers for the log, which branches may add to.
    """

    def __init__(self, driver: BackwardDriver | None) -> None:
        self.diagnostics: dict[str, Tensor] = {}
        self._joint = JointBackward() if driver is None else None
        self._driver: BackwardDriver = self._joint if driver is None else driver  # type: ignore[assignment]
        self._terms: dict[str, Tensor] = {}

    def run(self, prefix: str, forward: Callable[[], Mapping[str, Tensor]], *, weight: Tensor | float, last: bool) -> None:
        """Computes the losses of one branch, weights each of them and runs backward.

        Args:
            prefix: of the keys in the log, such as "sup".
            forward: the student's forward pass; every entry of its result is a scalar loss.
            weight: factor of all entries, a float or a device scalar.
            last: whether no other branch follows in this step.
        """
        with self._driver.branch(last):
            terms = {f"{prefix}/{name}": loss.float() * weight for name, loss in forward().items()}
            if not terms:
                raise ValueError(f"the student returned no losses for the branch {prefix!r}")
            self._driver.backward(_total(terms))
        self._terms.update({name: term.detach() for name, term in terms.items()})

    def output(self, stats: PseudoLabelStats | None = None, previews: tuple[Preview, ...] = ()) -> StepOutput:
        """The step's result."""
        joint = None if self._joint is None else self._joint.loss
        return StepOutput(_total(self._terms) if joint is None else joint, self._terms, stats, previews, self.diagnostics)


def _total(terms: dict[str, Tensor]) -> Tensor:
    values = list(terms.values())
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
