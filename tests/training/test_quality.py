from __future__ import annotations

import pytest
import torch

from ssod_fast.structures import Target
from ssod_fast.training.quality import CURVE, HiddenTruth, PseudoQuality, match_greedily


def target(boxes: list[list[float]], labels: list[int], scores: list[float] | None = None) -> Target:
    out = Target(boxes=torch.tensor(boxes).reshape(-1, 4).float(), labels=torch.tensor(labels, dtype=torch.int64))
    if scores is not None:
        out["scores"] = torch.tensor(scores)
    return out


def truth(boxes: list[list[float]], labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    t = target(boxes, labels)
    return t["boxes"], t["labels"]


def test_two_images_by_hand() -> None:
    quality = PseudoQuality(["cat", "dog"], score_thr=0.5)
    # Image 1: one exact cat, one cat shifted by half (IoU 1/3, wrong), a dog below the threshold that is right.
    quality.add(
        target([[0, 0, 20, 20], [60, 0, 80, 20], [0, 100, 100, 200]], [0, 0, 1], [0.9, 0.8, 0.4]),
        truth([[0, 0, 20, 20], [50, 0, 70, 20], [0, 100, 100, 200]], [0, 0, 1]),
    )
    # Image 2: a box of the wrong class.
    quality.add(target([[0, 0, 50, 50]], [1], [0.7]), truth([[0, 0, 50, 50]], [0]))
    row = quality.result()
    assert row["images"] == 2
    assert row["precision"] == pytest.approx(1 / 3)
    assert row["recall"] == pytest.approx(1 / 4)
    assert row["mean_iou"] == 1.0
    assert (row["kept_per_image"], row["raw_per_image"], row["truth_per_image"]) == (1.5, 2.0, 2.0)
    assert row["per_class"]["cat"] == {"precision": 0.5, "recall": pytest.approx(1 / 3), "pseudo": 2, "truth": 3}
    assert row["per_class"]["dog"] == {"precision": 0.0, "recall": 0.0, "pseudo": 1, "truth": 1}
    assert (row["recall_small"], row["recall_medium"], row["recall_large"]) == (0.5, 0.0, 0.0)
    at = {t: i for i, t in enumerate(CURVE)}
    assert row["curve"]["precision"][at[0.3]] == 0.5
    assert row["curve"]["recall"][at[0.3]] == 0.5
    assert row["curve"]["precision"][at[0.85]] == 1.0
    assert row["curve"]["precision"][at[0.95]] is None
    quality.reset()
    assert quality.result()["images"] == 0


def test_a_truth_box_is_found_once() -> None:
    boxes, labels = truth([[0, 0, 10, 10], [0, 1, 10, 11], [0, 0, 10, 9]], [0, 0, 0])
    iou, owner = match_greedily(boxes, labels, *truth([[0, 0, 10, 10]], [0]))
    assert owner.tolist() == [0, -1, -1]
    assert iou.tolist() == [1.0, 0.0, 0.0]


def test_score_equal_to_the_threshold_is_dropped() -> None:
    quality = PseudoQuality(["cat"], score_thr=0.5)
    quality.add(target([[0, 0, 10, 10]], [0], [0.5]), truth([[0, 0, 10, 10]], [0]))
    assert quality.result()["kept_per_image"] == 0
    assert quality.result()["recall"] == 0.0


def test_nothing_predicted_and_nothing_to_find() -> None:
    quality = PseudoQuality(["cat"], score_thr=0.5)
    quality.add(target([], [], []), truth([], []))
    row = quality.result()
    assert row["precision"] is None
    assert row["recall"] is None
    assert row["mean_iou"] is None
    assert row["kept_per_image"] == 0.0


def test_order_of_boxes_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(40, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 5 + torch.rand(40, 2, generator=generator) * 30], 1)
    labels, scores = torch.randint(0, 3, (40,), generator=generator), torch.rand(40, generator=generator)
    expected = None
    for _ in range(3):
        order = torch.randperm(40, generator=generator)
        quality = PseudoQuality(["a", "b", "c"], 0.3)
        quality.add(Target(boxes=boxes[order], labels=labels[order], scores=scores[order]), (boxes[::2] + 1, labels[::2]))
        expected = expected or quality.result()
        assert quality.result() == expected


def test_hidden_truth_looks_up_by_image_id() -> None:
    hidden = HiddenTruth([7, 9], [target([[0, 0, 1, 1]], [0]), target([], [])])
    assert 7 in hidden
    assert 8 not in hidden
    assert len(hidden) == 2
    assert hidden.boxes_per_image() == 0.5
    assert hidden[9][0].shape == (0, 4)
