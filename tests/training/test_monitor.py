from __future__ import annotations

import torch
from no_sync import no_sync

from ssod_fast.methods.step import PseudoLabelStats
from ssod_fast.structures import PaddedTargets, Target
from ssod_fast.training.monitor import ENOUGH_IMAGES, PseudoMonitor
from ssod_fast.training.quality import HiddenTruth


def stats(image_ids: list[int], scores: list[float], thr: float = 0.5, mosaic: bool = False) -> PseudoLabelStats:
    """Each image gets one box of class i per score, at 20 i."""
    corner = torch.arange(len(scores))[:, None] * 20.0
    target = Target(boxes=(corner + torch.tensor([0.0, 0, 10, 10])), labels=torch.arange(len(scores)) % 2, scores=torch.tensor(scores))
    pseudo = PaddedTargets.from_list([target] * len(image_ids), nmax=4)
    kept = (pseudo.scores > thr).sum(1, dtype=torch.int32)
    gate = (kept.amin() > 0).float()
    extra = {"gate": gate, **({"mosaic_gate": gate} if mosaic else {})}
    best, mean = pseudo.scores.amax(1), torch.tensor(scores).mean()
    return PseudoLabelStats(pseudo.count, kept, best, mean, torch.tensor(0), pseudo, thr, image_ids, extra)


def truth(image_ids: list[int]) -> HiddenTruth:
    box = Target(boxes=torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), labels=torch.tensor([0, 1]))
    return HiddenTruth(image_ids, [box] * len(image_ids))


def test_means_and_extremes() -> None:
    monitor = PseudoMonitor(["a", "b"], 0.5, None, torch.device("cpu"))
    assert monitor.read() is None
    with no_sync():
        monitor.add(None)
        monitor.add(stats([1, 2], [0.9, 0.4]))
        monitor.add(stats([3, 4], [0.3], mosaic=True))
    row = monitor.read()
    assert row is not None
    assert (row["raw_per_image"], row["kept_per_image"], row["gate"], row["mosaic_gate"]) == (1.5, 0.5, 0.5, 0.0)
    assert row["max_score"] == torch.tensor(0.9).item()
    assert monitor.read() is None
    assert monitor.read_quality(at_evaluation=True) is None


def test_quality_waits_for_enough_images() -> None:
    monitor = PseudoMonitor(["a", "b"], 0.5, truth([1, 2]), torch.device("cpu"))
    monitor.add(stats([1, 2, 99], [0.9, 0.4]))  # 99 is no image whose truth is known
    monitor.read()
    assert monitor.read_quality(at_evaluation=False) is None
    row = monitor.read_quality(at_evaluation=True)
    assert row is not None
    assert (row["images"], row["precision"], row["recall"], row["mean_iou"]) == (2, 1.0, 0.5, 1.0)
    for _ in range(ENOUGH_IMAGES // 2):
        monitor.add(stats([1, 2], [0.9, 0.4]))
    monitor.read()
    row = monitor.read_quality(at_evaluation=False)
    assert row is not None
    assert row["images"] == ENOUGH_IMAGES


def test_classes_without_pseudo_labels() -> None:
    monitor = PseudoMonitor(["a", "b"], 0.5, None, torch.device("cpu"))
    monitor.add(stats([1], [0.9, 0.4]))
    assert monitor.read_classes() is None  # one image says nothing
    for i in range(ENOUGH_IMAGES):
        monitor.add(stats([i], [0.9, 0.4]))
    assert monitor.read_classes() == {"a": ENOUGH_IMAGES + 1, "b": 0}
    assert monitor.read_classes() is None


def test_state_survives_a_checkpoint() -> None:
    first, second = (PseudoMonitor(["a", "b"], 0.5, None, torch.device("cpu")) for _ in range(2))
    first.add(stats([1, 2], [0.9, 0.4]))
    second.load_state_dict(first.state_dict())
    for monitor in (first, second):
        monitor.add(stats([3, 4], [0.3]))
    assert first.read() == second.read()
