"""Puts the ops of this package into other people's detectors, at run time, by explicit call, and reversibly."""

from . import detrex, groundingdino, mmcv, rfdetr, rtdetr, torchvision, transformers, ultralytics
from ._patch import NothingPatched, Patched, UnknownSurface
from .shims import install_as

__all__ = [
    "NothingPatched",
    "Patched",
    "UnknownSurface",
    "detrex",
    "groundingdino",
    "install_as",
    "mmcv",
    "rfdetr",
    "rtdetr",
    "torchvision",
    "transformers",
    "ultralytics",
]
