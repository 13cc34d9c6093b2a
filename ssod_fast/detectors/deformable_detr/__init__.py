"""Deformable DETR and DINO on the package's own ops."""

from .config import DETRConfig, deformable_detr, dino
from .stages import Decoded, DETRStages, LayerInput, Memory, Proposals, Pyramid, Queries

__all__ = [
    "DETRConfig",
    "DETRStages",
    "Decoded",
    "LayerInput",
    "Memory",
    "Proposals",
    "Pyramid",
    "Queries",
    "deformable_detr",
    "dino",
]
