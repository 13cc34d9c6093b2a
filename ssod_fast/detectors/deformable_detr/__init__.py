"""Deformable DETR and DINO on the package's own ops."""

from .backbone import DETRBackbone
from .config import DETRConfig, deformable_detr, dino
from .network import DeformableDETR
from .stages import Decoded, DETRStages, LayerInput, Memory, Proposals, Pyramid, Queries

__all__ = [
    "DETRBackbone",
    "DETRConfig",
    "DETRStages",
    "Decoded",
    "DeformableDETR",
    "LayerInput",
    "Memory",
    "Proposals",
    "Pyramid",
    "Queries",
    "deformable_detr",
    "dino",
]
