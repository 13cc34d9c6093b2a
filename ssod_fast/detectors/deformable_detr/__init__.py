"""Deformable DETR and DINO on the package's own ops."""

from .backbone import DETRBackbone
from .config import DETRConfig, deformable_detr, dino
from .criterion import DETRCriterion, normalised_targets
from .denoising import Denoising, denoising_blocked, make_denoising
from .detector import DETRDetector
from .groups import blocked_mask
from .network import DeformableDETR
from .stages import Decoded, DETRStages, LayerInput, Memory, Proposals, Pyramid, Queries

__all__ = [
    "DETRBackbone",
    "DETRConfig",
    "DETRCriterion",
    "DETRDetector",
    "DETRStages",
    "Decoded",
    "DeformableDETR",
    "Denoising",
    "LayerInput",
    "Memory",
    "Proposals",
    "Pyramid",
    "Queries",
    "blocked_mask",
    "deformable_detr",
    "denoising_blocked",
    "dino",
    "make_denoising",
    "normalised_targets",
]
