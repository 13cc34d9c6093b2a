"""Matching and losses of DETR-like detectors, for all decoder layers and images at once and without a host sync."""

from .gather import class_targets, gather_matched, normalizer
from .losses import (
    BoxLosses,
    matched_box_losses,
    matched_ce_loss,
    matched_focal_loss,
    matched_ia_bce_loss,
    matched_mal_loss,
    matched_vfl_loss,
)
from .matcher import HungarianMatcher

__all__ = [
    "BoxLosses",
    "HungarianMatcher",
    "class_targets",
    "gather_matched",
    "matched_box_losses",
    "matched_ce_loss",
    "matched_focal_loss",
    "matched_ia_bce_loss",
    "matched_mal_loss",
    "matched_vfl_loss",
    "normalizer",
]
