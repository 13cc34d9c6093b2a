"""SSD-Det (arXiv 2307.12101): its refiner, which works on its own, and the method made of it."""

from .bags import NoisyBoxes
from .config import RefinerConfig, SSDDetConfig
from .method import SSDDet, refine
from .refiner import Levels, Refined, Refiner

__all__ = ["Levels", "NoisyBoxes", "Refined", "Refiner", "RefinerConfig", "SSDDet", "SSDDetConfig", "refine"]
