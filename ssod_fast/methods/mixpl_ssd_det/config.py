"""Options of MixPL with SSD-Det."""

from __future__ import annotations

from dataclasses import dataclass, field

from ssod_fast.methods.mixpl.config import MixPLConfig
from ssod_fast.methods.ssd_det.config import RefinerConfig


@dataclass(frozen=True)
class MixPLSSDDetConfig(MixPLConfig):
    """MixPL for labelled images with inaccurate boxes: SSD-Det refines them, and its losses take the place of the labelled loss."""

    # Of the labelled branch.
    refiner: RefinerConfig = field(default_factory=RefinerConfig)
