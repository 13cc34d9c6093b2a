"""MixPL with SSD-Det: noisy labelled images and unlabelled ones in one run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import nn

from ssod_fast.methods.mixpl.method import MixPL
from ssod_fast.methods.ssd_det.config import RefinerConfig, SSDDetConfig
from ssod_fast.methods.ssd_det.method import SSDDet
from ssod_fast.methods.step import LossBook, Preview

from .config import MixPLSSDDetConfig

if TYPE_CHECKING:
    from ssod_fast.data.batches import LabeledBatch
    from ssod_fast.methods.semi_supervised import SemiSupervisedDetector


class MixPLSSDDet(MixPL):
    """MixPL (arXiv 2312.07006) whose student learns refined boxes (SSD-Det, arXiv 2307.12101) on the labelled images.

    Pseudo boxes of unlabelled images are the teacher's own and are not refined. Both methods were published alone.

    Args:
        config: options.
        rank: of this process in a distributed run.
    """

    config: MixPLSSDDetConfig

    def __init__(self, config: MixPLSSDDetConfig | None = None, *, rank: int = 0) -> None:
        config = MixPLSSDDetConfig() if config is None else config
        super().__init__(config, rank=rank)
        options = {field.name: getattr(config.refiner, field.name) for field in dataclasses.fields(RefinerConfig)}
        self.refinement = SSDDet(SSDDetConfig(**options, seed=config.seed), rank=rank)

    def check(self, student: nn.Module) -> None:
        """Needs what SSD-Det needs: torchvision's Faster R-CNN with a feature pyramid.

        Raises:
            TypeError: another detector.
            ValueError: a method that serves a model of other channels or classes.
        """
        self.refinement.check(student)
        self.trainable = self.refinement.trainable

    def supervised(
        self, book: LossBook, model: SemiSupervisedDetector, labeled: LabeledBatch, *, last: bool, want_preview: bool = False
    ) -> tuple[Preview, ...]:
        """The labelled loss on refined boxes."""
        weight = self.config.sup_weight
        return self.refinement.supervised(book, model, labeled, weight=weight, last=last, want_preview=want_preview)

    def state_dict(self) -> dict[str, Any]:
        """Those of both methods."""
        return {**super().state_dict(), "refinement": self.refinement.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        super().load_state_dict(state)
        self.refinement.load_state_dict(state["refinement"])
