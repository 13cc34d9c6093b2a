"""What :func:`matching_cost` refuses, and in which words."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from cost_cases import random_case

from ssod_fast.ops import matching_cost
from ssod_fast.ops.packed_targets import pack_targets


def test_bad_options() -> None:
    logits, boxes, targets = random_case()

    def call(**options: Any) -> None:
        matching_cost(logits, boxes, targets, **options)

    for options, message in (
        ({"class_mode": "ce"}, "class_mode must be one of 'focal', 'focal_logits', 'softmax', 'prob', 'none', got 'ce'"),
        ({"box_format": "yxyx"}, "box_format must be one of 'xyxy', 'xywh', 'cxcywh', got 'yxyx'"),
        ({"class_mode": ["focal"]}, r"class_mode must be one of 'focal', .*, got \['focal'\]"),
        ({"box_format": {}}, r"box_format must be one of 'xyxy', 'xywh', 'cxcywh', got \{\}"),
        ({"w_box": [5.0]}, r"w_box must be a finite number, got \[5\.0\]"),
        ({"giou_eps_mode": "tiny"}, "^giou_eps_mode must be one of"),
        ({"gamma": -1}, "gamma must be a finite number >= 0, got -1"),
        ({"eps": 0.0}, r"eps must lie in 1e-37 \.\. 0\.01, got 0\.0"),
        ({"alpha": math.nan}, "alpha must be a finite number, got nan"),
        ({"w_box": "5"}, "w_box must be a finite number, got '5'"),
        ({"w_class": 0, "w_box": 0, "w_giou": 0}, "w_class, w_box and w_giou must not all be 0"),
        ({"class_mode": "none", "w_box": 0, "w_giou": 0}, "w_class, w_box and w_giou must not all be 0"),
        ({"image_hw": torch.ones(3, 2)}, r"image_hw must be \[4, 2\], got \[3, 2\]"),
        ({"extra_cost": torch.ones(2, 15, 36)}, r"extra_cost must have the shape of the result, \[2, 15, 37\], got \[2, 15, 36\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**options)
    with pytest.raises(TypeError, match="image_hw must be a tensor, got tuple"):
        call(image_hw=(1, 2))
    with pytest.raises(TypeError, match="extra_cost must be a tensor, got float"):
        call(extra_cost=1.0)


def test_bad_predictions() -> None:
    logits, boxes, targets = random_case()
    for args, message in (
        ((logits[0, 0], boxes, targets), r"logits must be \[L, B, Q, ...\] or \[B, Q, ...\], got \[37, 6\]"),
        ((logits, boxes[..., :3], targets), r"boxes must be \[L, B, Q, 4\] or \[B, Q, 4\], got \[2, 4, 37, 3\]"),
        (
            (logits[:, :, 1:], boxes, targets),
            r"logits and boxes must have equal leading dimensions, got \[2, 4, 36, 6\] and \[2, 4, 37, 4\]",
        ),
        ((logits, boxes, targets[1:]), "targets must be of as many images as boxes, 4, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            matching_cost(*args)
    with pytest.raises(TypeError, match="logits must be a tensor, got NoneType"):
        matching_cost(None, boxes, targets)
    with pytest.raises(TypeError, match=r"logits must be floating point, got torch\.int64"):
        matching_cost(logits.long(), boxes, targets)
    with pytest.raises(TypeError, match=r"boxes must be floating point, got torch\.int64"):
        matching_cost(logits, boxes.long(), targets)


def test_bad_targets() -> None:
    logits, boxes, targets = random_case((2, 2))
    packed = pack_targets(targets)

    def call(**fields: Any) -> None:
        matching_cost(logits, boxes, dataclasses.replace(packed, **fields))

    for fields, message in (
        ({"labels": torch.tensor([0, 6, 1, 1])}, r"labels of targets must lie in 0 \.\. 5, got 0 \.\. 6"),
        ({"labels": torch.tensor([0, -1, 1, 1])}, r"labels of targets must lie in 0 \.\. 5, got -1 \.\. 1"),
        ({"offsets": torch.tensor([0, 2, 3])}, r"offsets of targets must rise from 0 to the number of boxes \(4\), got \[0, 2, 3\]"),
        ({"offsets": torch.tensor([0, 4])}, r"offsets of targets must be \[3\], got \[2\]"),
        ({"offsets": None, "counts": torch.tensor([3, 0])}, r"counts of targets must lie in 0 \.\. 2, got \[3, 0\]"),
        ({"offsets": None, "counts": torch.tensor([3])}, r"counts of targets must be \[2\], got \[1\]"),
        ({"counts": torch.tensor([2, 2])}, "targets must have offsets or counts, got both"),
        ({"boxes": packed.boxes[:3]}, r"targets must have labels \[G\] and boxes \[G, 4\], got \[4\] and \[3, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**fields)
    with pytest.raises(ValueError, match="targets without offsets must have as many rows for each of the 2 images, got 3 rows"):
        call(offsets=None, labels=packed.labels[:3], boxes=packed.boxes[:3], image=packed.image[:3])
    with pytest.raises(TypeError, match=r"labels of targets must be int64, got torch\.int32"):
        call(labels=packed.labels.int())
    with pytest.raises(TypeError, match=r"boxes of targets must be floating point, got torch\.int64"):
        call(boxes=packed.boxes.long())
