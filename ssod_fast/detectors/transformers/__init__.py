"""Detectors of transformers behind the detector protocol. transformers itself is imported when one is made."""

from .adapter import TransformersDetector
from .take_over import from_transformers

__all__ = ["TransformersDetector", "from_transformers"]
