"""The ops of ssod_fast: one file per op, each with its public function, checks, schema, reference and fake."""

from ._matches import Matches
from .batched_nms import Kept, batched_nms
from .box_deltas import decode_boxes, encode_boxes
from .box_iou import box_iou, complete_box_iou, distance_box_iou, generalized_box_iou, ragged_box_iou
from .box_iou_below import box_iou_below
from .box_iou_max import BoxMax, box_iou_max
from .compose import cache_view, cache_write, compose_boxes, compose_images, valid_mask
from .compose_plan import FLIP_X, FLIP_Y, BoxRule, ComposePlan, Placement, PlanTables
from .gmm_threshold import GMMThreshold, gmm_threshold
from .linear_assignment import linear_assignment, linear_sum_assignment
from .match import match
from .matching_cost import matching_cost
from .ms_deform_attn import ms_deform_attn
from .ms_deform_attn_fused import ms_deform_attn_fused
from .neighborhood_boxes import NeighborhoodBoxes, neighborhood_boxes
from .one_to_many_assign import OneToMany, one_to_many_assign
from .packed_targets import PackedTargets, pack_targets
from .paired_box_iou import paired_box_iou, paired_iou_loss
from .point_boxes import PointBoxes, point_boxes
from .project import project_boxes
from .random_negative_boxes import NegativeBoxes, random_negative_boxes

__all__ = [
    "FLIP_X",
    "FLIP_Y",
    "BoxMax",
    "BoxRule",
    "ComposePlan",
    "GMMThreshold",
    "Kept",
    "Matches",
    "NegativeBoxes",
    "NeighborhoodBoxes",
    "OneToMany",
    "PackedTargets",
    "Placement",
    "PlanTables",
    "PointBoxes",
    "batched_nms",
    "box_iou",
    "box_iou_below",
    "box_iou_max",
    "cache_view",
    "cache_write",
    "complete_box_iou",
    "compose_boxes",
    "compose_images",
    "decode_boxes",
    "distance_box_iou",
    "encode_boxes",
    "generalized_box_iou",
    "gmm_threshold",
    "linear_assignment",
    "linear_sum_assignment",
    "match",
    "matching_cost",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "neighborhood_boxes",
    "one_to_many_assign",
    "pack_targets",
    "paired_box_iou",
    "paired_iou_loss",
    "point_boxes",
    "project_boxes",
    "ragged_box_iou",
    "random_negative_boxes",
    "valid_mask",
]
