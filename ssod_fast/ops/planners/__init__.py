"""Planners: they draw the geometry of a mix on the host, so that nothing random happens on the device.

All read sizes that the host knows, never a tensor. Those that draw are seeded and have a `state_dict`.
"""

from .mix import CutMixPlanner, MixUpPlanner, mixup_plans
from .mixpl import MixPLPlanner
from .mosaic import MosaicPlanner
from .single import HalfResPlanner, LetterboxPlanner

__all__ = ["CutMixPlanner", "HalfResPlanner", "LetterboxPlanner", "MixPLPlanner", "MixUpPlanner", "MosaicPlanner", "mixup_plans"]
