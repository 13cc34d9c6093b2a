"""Watches the pseudo labels of a run from outside: nothing here is visible to a method or a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssod_fast.methods.step import PseudoLabelStats
from ssod_fast.structures import PaddedTargets

from .metrics import Means
from .quality import HiddenTruth, PseudoQuality

ENOUGH_IMAGES = 64  # images before a measured precision says something


class PseudoMonitor:
    """Counts pseudo labels and compares them with hidden truth, where there is some.

    Between two calls of :meth:`read` only device tensors are kept, so a step costs no host sync.

    Args:
        classes: class names by label.
        score_thr: threshold of the method; None for a method without pseudo labels.
        hidden: truth of the unlabelled images.
        device: where the statistics live.
    """

    def __init__(self, classes: Sequence[str], score_thr: float | None, hidden: HiddenTruth | None, device: torch.device) -> None:
        self.classes, self.hidden = list(classes), hidden
        self.score_thr = score_thr
        self.quality = None if hidden is None or score_thr is None else PseudoQuality(classes, score_thr)
        self.means = Means(device)
        self._device = device
        self._waiting: list[PseudoLabelStats] = []
        self._best: Tensor | None = None
        self._per_class = torch.zeros(len(self.classes), device=device)
        self._images = 0  # that the class counts stand for

    def add(self, stats: PseudoLabelStats | None) -> None:
        """Takes the statistics of one step."""
        if stats is None:
            return
        kept = (stats.pseudo.scores > stats.score_thr) & stats.pseudo.valid
        values = {
            "raw_per_image": stats.raw_count.float().mean(),
            "kept_per_image": stats.kept_count.float().mean(),
            "mean_score": stats.mean_score,
            "non_finite": stats.non_finite.float(),
        }
        self.means.add({**values, **stats.extra})
        best = stats.max_score.amax()
        self._best = best if self._best is None else torch.maximum(self._best, best)
        self._per_class.scatter_add_(0, stats.pseudo.labels.clamp(min=0).flatten(), kept.float().flatten())
        self._images += len(stats.image_ids)
        if self.quality is not None:
            self._waiting.append(stats)

    def read(self) -> dict[str, Any] | None:
        """Means since the last read, None if there were no pseudo labels to speak of. Waits for the device."""
        self._compare()
        means, _ = self.means.read()
        if not means:
            return None
        best = 0.0 if self._best is None else float(self._best)
        self._best = None
        return {**means, "max_score": best}

    def _compare(self) -> None:
        """Brings the boxes of all waiting steps to the host at once and matches them."""
        if self.quality is None or self.hidden is None or not self._waiting:
            return
        ids = [image_id for stats in self._waiting for image_id in stats.image_ids]
        fields = ("boxes", "labels", "scores", "weights", "count")
        joined = {name: torch.cat([getattr(stats.pseudo, name) for stats in self._waiting]).cpu() for name in fields}
        for image_id, prediction in zip(ids, PaddedTargets(**joined).to_list(), strict=True):
            if image_id in self.hidden:
                self.quality.add(prediction, self.hidden[image_id])
        self._waiting.clear()

    def read_quality(self, at_evaluation: bool) -> dict[str, Any] | None:
        """Precision, recall and so on since the last time, once enough images came by; at an evaluation whatever there is."""
        if self.quality is None or self.quality.images < (1 if at_evaluation else ENOUGH_IMAGES):
            return None
        result = self.quality.result()
        self.quality.reset()
        return result

    def read_classes(self) -> dict[str, int] | None:
        """Kept pseudo boxes per class since the last result; None while too few images came by to speak of a class without boxes."""
        if self._images < ENOUGH_IMAGES:
            return None
        counts = dict(zip(self.classes, map(int, self._per_class.tolist()), strict=True))
        self._per_class.zero_()
        self._images = 0
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Sums of the window in progress; boxes that wait for a comparison are compared first."""
        self._compare()
        best = None if self._best is None else self._best.cpu()
        return {"means": self.means.state_dict(), "best": best, "per_class": self._per_class.cpu(), "images": self._images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.means.load_state_dict(state["means"])
        self._best = None if state["best"] is None else state["best"].to(self._device)
        self._per_class.copy_(state["per_class"])
        self._images = state["images"]
