"""The ops of ssod_fast: one file per op, each with its public function, checks, schema, reference and fake."""

from .box_iou import box_iou, complete_box_iou, distance_box_iou, generalized_box_iou, ragged_box_iou
from .box_iou_below import box_iou_below
from .box_iou_max import BoxMax, box_iou_max
from .paired_box_iou import paired_box_iou, paired_iou_loss
from .project import project_boxes

__all__ = [
    "BoxMax",
    "box_iou",
    "box_iou_below",
    "box_iou_max",
    "complete_box_iou",
    "distance_box_iou",
    "generalized_box_iou",
    "paired_box_iou",
    "paired_iou_loss",
    "project_boxes",
    "ragged_box_iou",
]
