"""Detectors: the protocol that methods rely on, and adapters that make models of torchvision and transformers follow it."""

from .build import build_detector
from .from_torchvision import from_torchvision
from .protocol import IMAGENET, Detector, ImageBatch, LossProgram, PixelStats, capabilities, preprocess, require
from .transformers import from_transformers

__all__ = [
    "IMAGENET",
    "Detector",
    "ImageBatch",
    "LossProgram",
    "PixelStats",
    "build_detector",
    "capabilities",
    "from_torchvision",
    "from_transformers",
    "preprocess",
    "require",
]
