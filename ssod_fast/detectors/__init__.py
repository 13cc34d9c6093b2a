"""Detectors: the protocol that methods rely on, and adapters that make torchvision models follow it."""

from .protocol import IMAGENET, Detector, ImageBatch, PixelStats, capabilities, preprocess, require

__all__ = ["IMAGENET", "Detector", "ImageBatch", "PixelStats", "capabilities", "preprocess", "require"]
