"""Options of MixPL with SSD-Det."""

from __future__ import annotations

from dataclasses import dataclass, field

from ssod_fast.methods.mixpl.config import MixPLConfig
from ssod_fast.methods.ssd_det.config import SSDDetConfig


@dataclass(frozen=True)
class MixPLSSDDetConfig(MixPLConfig):
    """MixPL for labelled images with inaccurate boxes: SSD-Det refines them, and its losses take the place of the labelled loss."""

    # Of the labelled branch. Its seed follows from the seed of the mixing, and it has no averaged model of its own.
    refiner: SSDDetConfig = field(default_factory=SSDDetConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refiner.ema is not None:
            raise ValueError("refiner.ema must be None: the teacher follows by the settings of ema")
        if self.refiner.seed not in (0, self.seed):
            raise ValueError(f"refiner.seed follows from seed ({self.seed}) and cannot be {self.refiner.seed}: leave it out")
