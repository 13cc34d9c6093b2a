"""What the losses refuse, and in which words."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from criterion_cases import matches_of, random_case
from torch import Tensor

from ssod_fast.criterion import (
    matched_box_losses,
    matched_ce_loss,
    matched_focal_loss,
    matched_ia_bce_loss,
    matched_mal_loss,
    matched_vfl_loss,
)
from ssod_fast.ops import PackedTargets, match, pack_targets
from ssod_fast.structures import PaddedTargets

WITH_BOXES: tuple[Any, ...] = (matched_vfl_loss, matched_mal_loss, matched_ia_bce_loss)
WITH_NORM: tuple[Any, ...] = (matched_focal_loss, *WITH_BOXES, matched_box_losses)


def call(loss: Any, logits: Any, boxes: Any, targets: Any, matches: Any, **options: Any) -> Any:
    """Any of the losses, with the predictions that it reads."""
    if loss in WITH_BOXES:
        return loss(logits, boxes, targets, matches, **options)
    return loss(boxes if loss is matched_box_losses else logits, targets, matches, **options)


def test_shapes() -> None:
    logits, boxes, targets, matches = random_case()
    with pytest.raises(ValueError, match=r"logits must be \[3, 3, 9, C\] as the matches are, got \[2, 3, 9, 4\]"):
        matched_focal_loss(logits[:2], targets, matches)
    with pytest.raises(ValueError, match=r"logits must be \[3, 3, 9, C \+ 1\] as the matches are, got \[2, 3, 9, 4\]"):
        matched_ce_loss(logits[:2], targets, matches)
    for loss in (*WITH_BOXES, matched_box_losses):
        with pytest.raises(ValueError, match=r"boxes must be \[3, 3, 9, 4\] as the matches are, got \[3, 3, 9, 3\]"):
            call(loss, logits, boxes[..., :3], targets, matches)
    with pytest.raises(ValueError, match=r"logits must have at least one column, the background, got \[3, 3, 9, 0\]"):
        matched_ce_loss(logits[..., :0], targets, matches)


@pytest.mark.parametrize("loss", [*WITH_NORM, matched_ce_loss])
def test_types(loss: Any) -> None:
    logits, boxes, targets, matches = random_case()
    name = "boxes" if loss is matched_box_losses else "logits"
    for wrong, found in ((None, "NoneType"), (logits.long(), r"torch\.int64"), ([1.0], "list")):
        with pytest.raises(TypeError, match=f"{name} must be a floating point tensor, got {found}"):
            call(loss, wrong, wrong, targets, matches)
    with pytest.raises(TypeError, match="targets must be a list of mappings, PaddedTargets or PackedTargets, got NoneType"):
        call(loss, logits, boxes, None, matches)
    with pytest.raises(TypeError, match=r"matches must be the Matches that match\(\) or linear_assignment\(\) return, got list"):
        call(loss, logits, boxes, targets, matches.pairs())


@pytest.mark.parametrize("loss", WITH_NORM)
def test_norm(loss: Any) -> None:
    logits, boxes, targets, matches = random_case()
    for norm in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"norm must be a finite number > 0, got {norm!r}"):
            call(loss, logits, boxes, targets, matches, norm=norm)
    with pytest.raises(ValueError, match=r"norm must be a scalar or \[3\], got \[8\]"):
        call(loss, logits, boxes, targets, matches, norm=torch.ones(8))
    with pytest.raises(TypeError, match="norm must be a number, a tensor or None, got str"):
        call(loss, logits, boxes, targets, matches, norm="mean")
    by_layer = call(loss, logits, boxes, targets, matches, norm=torch.full((3,), 2.0))
    torch.testing.assert_close(by_layer, call(loss, logits, boxes, targets, matches, norm=2))


def test_factors() -> None:
    logits, boxes, targets, matches = random_case()
    for loss in (matched_focal_loss, *WITH_BOXES):
        for options, message in (
            ({"gamma": -1}, "gamma must be >= 0, got -1"),
            ({"gamma": math.nan}, "gamma must be a finite number, got nan"),
            ({"alpha": -0.5}, r"alpha must (be >= 0|lie in \[0, 1\]), got -0\.5"),
            ({"alpha": "1"}, "alpha must be a finite number, got '1'"),
        ):
            with pytest.raises(ValueError, match=message):
                call(loss, logits, boxes, targets, matches, **options)
    for loss in (matched_focal_loss, matched_ia_bce_loss):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 2"):
            call(loss, logits, boxes, targets, matches, alpha=2)
    with pytest.raises(ValueError, match=r"eos_coef must be >= 0, got -0\.1"):
        matched_ce_loss(logits, targets, matches, eos_coef=-0.1)


def relabelled(targets: list[dict[str, Tensor]], label: int) -> list[dict[str, Tensor]]:
    return [{**target, "labels": target["labels"].clone().fill_(label)} for target in targets]


def test_labels() -> None:
    logits, boxes, targets, matches = random_case()  # four columns
    for loss in (matched_focal_loss, *WITH_BOXES):
        for label in (-1, 4):
            with pytest.raises(ValueError, match=rf"labels of targets must lie in 0 \.\. 3, got {label} \.\. {label}"):
                call(loss, logits, boxes, relabelled(targets, label), matches)
    with pytest.raises(ValueError, match=r"labels of targets must lie in 0 \.\. 2, before the column of the background, got 3 \.\. 3"):
        matched_ce_loss(logits, relabelled(targets, 3), matches)
    uploaded = dataclasses.replace(pack_targets(targets), labels=torch.zeros(8, dtype=torch.int64), label_range=(0, 9))
    with pytest.raises(ValueError, match=r"labels of targets must lie in 0 \.\. 3, got 0 \.\. 9"):
        matched_focal_loss(logits, uploaded, matches)


def test_targets_of_another_batch() -> None:
    logits, boxes, targets, matches = random_case()
    with pytest.raises(ValueError, match="targets must be those of the matches, 8 rows in 3 images, got 3 rows in 2 images"):
        matched_ce_loss(logits, targets[:2], matches)
    with pytest.raises(ValueError, match=r"targets must be those of the matches, image \[0, 0, 0, 2, .*\], got image \[0, 0, 0, 0, 0, 2"):
        matched_box_losses(boxes, targets[::-1], matches)
    uploaded = match(logits.to("meta"), boxes.to("meta"), targets)
    message = r"with pairs \[3, 0, 5\] in the images, got targets \[5, 0, 3\], which take \[5, 0, 3\]"
    with pytest.raises(ValueError, match=message):
        matched_box_losses(boxes.to("meta"), targets[::-1], uploaded)


def test_counts_of_another_batch() -> None:
    _, boxes, targets, _ = random_case(layers=1)
    padded = [PaddedTargets.from_list([{**t, "boxes": t["boxes"].float()} for t in order], nmax=6) for order in (targets, targets[::-1])]
    matches = matches_of(torch.full((1, 1, 18), -1), pack_targets(padded[0]), 9)
    with pytest.raises(ValueError, match=r"targets must be those of the matches, counts \[3, 0, 5\], got counts \[5, 0, 3\]"):
        matched_box_losses(boxes, padded[1], matches)
    assert isinstance(pack_targets(padded[0]), PackedTargets)
