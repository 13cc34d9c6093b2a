"""A fake teacher triggers every warning."""

from __future__ import annotations

from typing import Any

import pytest

from ssod_fast.training.health import Health


@pytest.fixture
def health() -> Health:
    return Health(["cat", "toaster"], score_thr=0.7, boxes_per_labeled=7.0, workers=2)


def log(kept: float = 1.0, gate: float = 1.0, best: float = 0.31, **extra: Any) -> dict[str, Any]:
    return {"losses": {"sup/cls": 1.0}, "pseudo": {"kept_per_image": kept, "max_score": best, "gate": gate}, **extra}


def test_missing_classes_and_small_batch(health: Health) -> None:
    messages = health.start({"cat": 3}, labeled_batch=1, reference_batch=8, lr=0.00125)
    assert messages[0] == "1 of 2 classes have no labelled box ('toaster')"
    drawn = health.start({"cat": 3}, labeled_batch=8, reference_batch=8, lr=0.01, drawn=True)
    assert drawn == ["1 of 2 classes have no labelled box ('toaster'): draw another fold or use --cover-classes"]
    assert messages[1] == "labelled images per step 1, reference 8: published numbers will not be reached; lr in use 0.00125"
    assert health.start({"cat": 3, "toaster": 1}, labeled_batch=6, reference_batch=8, lr=0.01) == []


def test_no_pseudo_labels_for_200_iterations(health: Health) -> None:
    assert [m for it in range(0, 200, 50) for m in health.after_log(it, log(kept=0.0))] == []
    expected = "no pseudo label for 200 iterations: best teacher score 0.31 is below thr 0.7; burn in longer (--burn-in) or lower --thr"
    assert health.after_log(200, log(kept=0.0)) == [expected]
    assert health.after_log(250, log(kept=0.0)) == []  # once
    health.after_log(300, log(kept=2.0))
    assert [m for it in range(350, 650, 50) for m in health.after_log(it, log(kept=0.0))] != []  # it came back


def test_no_pseudo_labels_of_a_method_with_other_filters() -> None:
    health = Health(["cat"], score_thr=0.4, boxes_per_labeled=7.0, burn_in=False)
    silent = {"kept_per_image": 0.0, "max_score": 0.3}
    messages = [m for it in (0, 200) for m in health.after_log(it, log(pseudo=silent))]
    assert messages == ["no pseudo label for 200 iterations: best teacher score 0.30 is below thr 0.4; lower --thr"]
    health.after_log(250, log(kept=1.0))
    messages = [m for it in (300, 500) for m in health.after_log(it, log(pseudo={**silent, "max_score": 0.9}))]
    assert messages == ["no pseudo label for 200 iterations: best teacher score 0.90 is above thr 0.4, another filter takes all"]


def test_gate_shut(health: Health) -> None:
    messages = [m for it in range(0, 300, 50) for m in health.after_log(it, log(kept=1.5, gate=0.0))]
    assert len(messages) == 1
    assert messages[0].startswith("the unsupervised loss was gated off for 200 iterations: 1.50 pseudo boxes per image are kept")


def test_too_many_pseudo_labels(health: Health) -> None:
    assert health.after_log(0, log(kept=84.0)) == ["84 pseudo boxes per image, labelled images have 7.0: threshold too low?"]
    assert health.after_log(0, log(kept=20.0)) == []


def test_unsupervised_loss_explodes(health: Health) -> None:
    line = log()
    line["losses"] = {"sup/cls": 1.0, "mixup/cls": 3.0, "mixup/box": 997.0}
    assert health.after_log(0, line) == ["unsup loss 1000x sup loss, most of it in mixup/box"]


def test_waiting_for_data(health: Health) -> None:
    assert health.after_log(2, log(time_split={"data": 0.9, "step": 0.1})) == []  # loader processes are starting
    message = health.after_log(20, log(time_split={"data": 0.4, "step": 0.6}))
    assert message == ["40 % of the time waits for data: more --workers (now 2) or smaller images"]
    assert health.after_log(40, log(time_split={"data": 0.2, "step": 0.8})) == []


def test_teacher_worse_than_student(health: Health) -> None:
    results = [health.after_eval({"AP": 0.1}, {"AP": 0.2}, None) for _ in range(3)]
    assert results == [[], [], ["teacher is worse than student: EMA too slow or teacher not initialised"]]
    assert health.after_eval({"AP": 0.3}, {"AP": 0.2}, None) == []
    assert health.after_eval({"AP": -1.0}, {"AP": -1.0}, None) == []


def test_dead_teacher_is_named_at_once(health: Health) -> None:
    assert health.after_eval({"AP": 0.0}, {"AP": 0.2}, None) == ["teacher is worse than student: EMA too slow or teacher not initialised"]


def test_class_without_pseudo_labels(health: Health) -> None:
    counts = {"cat": 5, "toaster": 0}
    assert health.after_eval(None, {"AP": 0.1}, counts) == ["class 'toaster' got 0 pseudo labels since the last evaluation"]
    assert health.after_eval(None, {"AP": 0.1}, counts) == []


def test_classes_without_pseudo_labels_share_a_line() -> None:
    health = Health(list("abcdefgh"), 0.7, 7.0)
    counts = {"a": 5, **dict.fromkeys("bcdefgh", 0)}
    message = "7 of 8 classes ('b', 'c', 'd', 'e', 'f', ...) got 0 pseudo labels since the last evaluation"
    assert health.after_eval(None, {"AP": 0.1}, counts) == [message]
    assert health.after_eval(None, {"AP": 0.1}, counts) == []
    again = health.after_eval(None, {"AP": 0.1}, {**counts, "a": 0, "h": 1})
    assert again == ["class 'a' got 0 pseudo labels since the last evaluation"]


def test_supervised_log_has_no_pseudo_labels(health: Health) -> None:
    assert health.after_log(0, {"losses": {"sup/cls": 1.0}, "pseudo": None}) == []


def test_state_survives_a_checkpoint(health: Health) -> None:
    for it in (0, 100):
        health.after_log(it, log(kept=0.0))
    other = Health(["cat", "toaster"], 0.7, 7.0)
    other.load_state_dict(health.state_dict())
    assert other.after_log(200, log(kept=0.0)) == health.after_log(200, log(kept=0.0)) != []
