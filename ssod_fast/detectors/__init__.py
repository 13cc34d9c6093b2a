"""Detectors: the protocol that methods rely on, and adapters that make torchvision models follow it."""

from .build import build_detector
from .from_torchvision import from_torchvision
from .protocol import IMAGENET, Detector, ImageBatch, PixelStats, capabilities, preprocess, require

__all__ = [
    "IMAGENET",
    "Detector",
    "ImageBatch",
    "PixelStats",
    "build_detector",
    "capabilities",
    "from_torchvision",
    "preprocess",
    "require",
]
