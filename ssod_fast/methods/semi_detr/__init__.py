"""Semi-DETR (arXiv 2307.08095): its parts, which work on their own, and the method made of them."""

from .config import SemiDETRConfig
from .consistency import CrossViewQueryConsistency, Projector, QueryRows, consistency_loss, query_rows, roi_features
from .hybrid import HybridMatching, MatchingLosses, one_to_many_losses, one_to_one_losses
from .method import SemiDETR
from .mining import CostMiner, Mined, mean_std_filter, mean_std_threshold
from .pseudo import Detections, certain, normalised, project_rows, reliable, teacher_detections

__all__ = [
    "CostMiner",
    "CrossViewQueryConsistency",
    "Detections",
    "HybridMatching",
    "MatchingLosses",
    "Mined",
    "Projector",
    "QueryRows",
    "SemiDETR",
    "SemiDETRConfig",
    "certain",
    "consistency_loss",
    "mean_std_filter",
    "mean_std_threshold",
    "normalised",
    "one_to_many_losses",
    "one_to_one_losses",
    "project_rows",
    "query_rows",
    "reliable",
    "roi_features",
    "teacher_detections",
]
