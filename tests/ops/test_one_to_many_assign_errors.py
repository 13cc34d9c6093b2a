"""What one-to-many assignment refuses, and in which words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from one_to_many_cases import BOXES, CENTRAL, PROBABILITIES, TARGETS

from ssod_fast.ops import one_to_many_assign, pack_targets
from ssod_fast.structures import PaddedTargets


def test_malformed_packed_targets() -> None:
    """Targets that somebody has edited: nothing is read beyond what they hold."""
    padded, ragged = pack_targets(PaddedTargets.from_list(TARGETS, nmax=3)), pack_targets(TARGETS)
    for sound, change, message in (
        (ragged, {"boxes": torch.rand(1, 4)}, r"targets must have labels \[G\] and boxes \[G, 4\], got \[2\] and \[1, 4\]"),
        (padded, {"counts": torch.tensor([-1])}, r"counts .*must lie in 0 ?\.\. ?3.*, got \[-1\]"),
        (padded, {"counts": torch.tensor([4])}, r"counts .*must lie in 0 ?\.\. ?3.*, got \[4\]"),
        (ragged, {"labels": ragged.labels + 2}, r"labels of targets must lie in 0 \.\. 1, got 2 \.\. 3"),
        (ragged, {"labels": ragged.labels - 1}, r"labels of targets must lie in 0 \.\. 1, got -1 \.\. 0"),
    ):
        with pytest.raises(ValueError, match=message):
            one_to_many_assign(PROBABILITIES, BOXES, replace(sound, **change))


BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "rule must be one of 'tal', 'tal_any', 'simota', 'soft_label', 'atss', got 'hungarian'", {"rule": "hungarian"}),
    (ValueError, "topk must be at least 1, got 0", {"topk": 0}),
    (TypeError, "topk must be an int, got 2.5", {"topk": 2.5}),
    (ValueError, "final_topk must be at least 1, got -1", {"final_topk": -1}),
    (ValueError, "alpha must be a finite number >= 0, got -1", {"alpha": -1}),
    (ValueError, "beta must be a finite number > 0, got 0", {"beta": 0}),
    (ValueError, "alpha has no meaning for rule 'simota', got 1.0", {"rule": "simota", "alpha": 1.0, "priors": CENTRAL}),
    (ValueError, "eps must be a finite number >= 0, got nan", {"eps": float("nan")}),
    (ValueError, "min_side has no meaning for rule 'tal', got 8", {"min_side": 8}),
    (ValueError, r"levels has no meaning for rule 'tal', got \[5\]", {"levels": [5]}),
    (ValueError, r"levels must be at most 16 sizes that add up to the 5 queries, got \[2, 2\]", {"rule": "atss", "levels": [2, 2]}),
    (ValueError, "conflict must be one of 'iou', 'metric', 'any_iou', 'any_metric', got 'score'", {"conflict": "score"}),
    (ValueError, "box_format must be one of 'xyxy', 'xywh', 'cxcywh', got 'yxyx'", {"box_format": "yxyx"}),
    (ValueError, "from_logits must be True or None for rule 'soft_label'", {"rule": "soft_label", "priors": CENTRAL, "from_logits": False}),
    (ValueError, r"levels must be .*, got \[1, 1, 1, 1, 1, 1, 1, 1, \.\.\. \(5000 values\)\]$", {"rule": "atss", "levels": [1] * 5000}),
    (TypeError, "levels must be a sequence of ints, got 5", {"rule": "atss", "levels": 5}),
    (TypeError, r"levels must be a sequence of ints, got \[2\.0, 3\.0\]", {"rule": "atss", "levels": [2.0, 3.0]}),
    (TypeError, "alpha must be a number, got '1'", {"alpha": "1"}),
    (TypeError, "eps must be a number, got True", {"eps": True}),
    (TypeError, "from_logits must be a bool, got 1", {"from_logits": 1}),
    (TypeError, "dynamic_k must be a bool, got 'yes'", {"dynamic_k": "yes"}),
    (TypeError, "keep_one must be a bool, got None", {"keep_one": None}),
    (TypeError, r"image_hw must be a tensor .*torch\.tensor\(\[\[h, w\]\]\), got list", {"image_hw": [[400, 500]]}),
    (ValueError, "dynamic_k has no meaning for rule 'atss', got True", {"rule": "atss", "dynamic_k": True}),
    (ValueError, r"priors must be given for rule 'tal_any', \[Q, 2\], got None", {"rule": "tal_any"}),
    (ValueError, r"priors must have shape \[5, 4\] for rule 'simota', got \[5, 2\]", {"rule": "simota", "priors": CENTRAL[:, :2]}),
    (ValueError, r"priors must have shape \[5, 2\] or \[5, 4\] for rule 'tal', got \[4, 2\]", {"priors": CENTRAL[:4, :2]}),
    (TypeError, "priors must be a floating point tensor, got torch.int64", {"priors": CENTRAL.long()}),
    (ValueError, r"image_hw must have shape \[1, 2\], got \[2, 2\]", {"image_hw": torch.ones(2, 2)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "options"), BAD)
def test_bad_options(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        one_to_many_assign(PROBABILITIES, BOXES, TARGETS, **options)


def test_bad_tensors() -> None:
    with pytest.raises(TypeError, match="scores must be a tensor, got NoneType"):
        one_to_many_assign(None, BOXES, TARGETS)
    with pytest.raises(TypeError, match=r"scores must have a floating dtype, got torch\.int64"):
        one_to_many_assign(PROBABILITIES.long(), BOXES, TARGETS)
    with pytest.raises(ValueError, match=r"boxes must have 3 or 4 dimensions, \[B, Q, \.\] or \[L, B, Q, \.\], got shape \[5, 4\]"):
        one_to_many_assign(PROBABILITIES, BOXES[0], TARGETS)
    with pytest.raises(ValueError, match=r"boxes must have shape \[L, B, Q, 4\] or \[B, Q, 4\], got \[1, 5, 3\]"):
        one_to_many_assign(PROBABILITIES, BOXES[..., :3], TARGETS)
    with pytest.raises(ValueError, match=r"scores and boxes must agree but for the last dimension, got \[1, 4, 2\] and \[1, 5, 4\]"):
        one_to_many_assign(PROBABILITIES[:, :4], BOXES, TARGETS)
    with pytest.raises(ValueError, match="targets must be of as many images as boxes, 1, got 2"):
        one_to_many_assign(PROBABILITIES, BOXES, TARGETS * 2)
    with pytest.raises(ValueError, match="scores and boxes must be on one device, got meta and cpu"):
        one_to_many_assign(PROBABILITIES.to("meta"), BOXES, TARGETS)
    packed = pack_targets(TARGETS)
    with pytest.raises(TypeError, match=r"labels of targets must be int64, got torch\.int32"):
        one_to_many_assign(PROBABILITIES, BOXES, replace(packed, labels=packed.labels.int()))
    with pytest.raises(ValueError, match=r"targets must have labels \[G\] and boxes \[G, 4\], got \[2\] and \[1, 4\]"):
        one_to_many_assign(PROBABILITIES, BOXES, replace(packed, boxes=packed.boxes[:1]))
    with pytest.raises(ValueError, match=r"offsets of targets must be \[2\], got \[1\]"):
        one_to_many_assign(PROBABILITIES, BOXES, replace(packed, offsets=packed.offsets[:1]))
    with pytest.raises(ValueError, match=r"offsets of targets must rise from 0 to the number of boxes \(2\), got \[0, 7\]"):
        one_to_many_assign(PROBABILITIES, BOXES, replace(packed, offsets=torch.tensor([0, 7])))
    narrow = replace(packed, offsets=packed.offsets.int())
    assert torch.equal(one_to_many_assign(PROBABILITIES, BOXES, narrow).target, one_to_many_assign(PROBABILITIES, BOXES, packed).target)
