"""How good the pseudo labels are, measured against annotations that no loss can reach.

:class:`HiddenTruth` is held by the trainer only: the method never receives it, and batches have no field for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ssod_fast.ops.box_iou import box_iou
from ssod_fast.structures import Target

CURVE = tuple(round(0.05 * i, 2) for i in range(1, 20))
# COCO's bounds on the area of an object, in pixels of the original image.
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, float("inf"))}


class HiddenTruth:
    """Annotations of unlabelled images by image id, on the host.

    Args:
        image_ids: ids in the unlabelled set.
        targets: boxes [N, 4] xyxy in pixels of the original image and labels [N] 0-based, parallel to the ids.
    """

    def __init__(self, image_ids: Iterable[int], targets: Iterable[Target]) -> None:
        self._targets = {
            int(i): (t["boxes"].detach().float().cpu(), t["labels"].detach().cpu()) for i, t in zip(image_ids, targets, strict=True)
        }

    def __contains__(self, image_id: int) -> bool:
        return image_id in self._targets

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, image_id: int) -> tuple[Tensor, Tensor]:
        return self._targets[image_id]

    def boxes_per_image(self) -> float:
        """Mean number of objects."""
        return sum(len(labels) for _, labels in self._targets.values()) / max(len(self._targets), 1)


class PseudoQuality:
    """Precision, recall and localisation of pseudo boxes, over all images added since the last :meth:`reset`.

    A pseudo box is right if it overlaps a truth box of its class by IoU >= .5 that no box with a higher score has taken.

    Args:
        classes: class names by label.
        score_thr: boxes above it count as kept.
    """

    def __init__(self, classes: Sequence[str], score_thr: float) -> None:
        self.classes = list(classes)
        self.score_thr = score_thr
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self.images = 0
        names = ("score", "label", "iou", "truth_label", "truth_area", "truth_score")
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def add(self, prediction: Target, truth: tuple[Tensor, Tensor]) -> None:
        """Adds one image.

        Args:
            prediction: boxes [N, 4] xyxy, labels [N], scores [N], all on the host, in the frame of the truth.
            truth: boxes [M, 4] and labels [M].
        """
        order = torch.argsort(prediction["scores"], descending=True, stable=True)
        boxes, labels = prediction["boxes"][order].float(), prediction["labels"][order]
        scores = prediction["scores"][order].double().numpy()
        iou, owner = match_greedily(boxes, labels, *truth)
        truth_score = np.full(len(truth[1]), -1.0)  # -1: found by no box at any threshold
        truth_score[owner[owner >= 0]] = scores[owner >= 0]
        sides = truth[0][:, 2:] - truth[0][:, :2]
        row = {"score": scores, "label": labels.numpy(), "iou": iou, "truth_label": truth[1].numpy(), "truth_score": truth_score}
        for name, values in {**row, "truth_area": sides.prod(1).double().numpy()}.items():
            self._columns[name].append(values)
        self.images += 1

    def gather(self) -> None:
        """Collects the images of all ranks; each has added its own."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, (self.images, {name: self._column(name) for name in self._columns}))
        self.images = sum(images for images, _ in shares)
        self._columns = {name: [columns[name] for _, columns in shares] for name in self._columns}

    def result(self) -> dict[str, Any]:
        """All numbers as JSON values; None where nothing is there to divide by."""
        score, label, iou = map(self._column, ("score", "label", "iou"))
        truth_label, truth_area, truth_score = map(self._column, ("truth_label", "truth_area", "truth_score"))
        kept, hit, found = score > self.score_thr, iou > 0, truth_score > self.score_thr
        images = max(self.images, 1)
        return {
            "thr": self.score_thr,
            "images": self.images,
            "precision": _ratio(hit & kept, kept),
            "recall": _recall(found, np.ones_like(found)),
            "mean_iou": float(iou[hit & kept].mean()) if (hit & kept).any() else None,
            "kept_per_image": float(kept.sum() / images),
            "raw_per_image": len(score) / images,
            "truth_per_image": len(truth_label) / images,
            "per_class": {name: self._class_row(kept & (label == c), hit, truth_label == c, found) for c, name in enumerate(self.classes)},
            **{f"recall_{n}": _recall(found, (truth_area >= lo) & (truth_area < hi)) for n, (lo, hi) in SIZES.items()},
            "curve": {
                "thr": list(CURVE),
                "precision": [_ratio(hit & (score > t), score > t) for t in CURVE],
                "recall": [_recall(truth_score > t, np.ones_like(found)) for t in CURVE],
            },
        }

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([np.zeros(0), *self._columns[name]])

    @staticmethod
    def _class_row(pseudo: np.ndarray, hit: np.ndarray, truth: np.ndarray, found: np.ndarray) -> dict[str, Any]:
        counts = {"pseudo": int(pseudo.sum()), "truth": int(truth.sum())}
        return {"precision": _ratio(hit & pseudo, pseudo), "recall": _recall(found, truth), **counts}


def match_greedily(
    boxes: Tensor, labels: Tensor, truth_boxes: Tensor, truth_labels: Tensor, iou_thr: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Gives each box, best score first, the free truth box of its class that it overlaps most.

    Args:
        boxes: [N, 4] xyxy, in order of falling score.
        labels: [N].
        truth_boxes: [M, 4] xyxy.
        truth_labels: [M].
        iou_thr: least overlap.

    Returns:
        IoU with the taken truth box (0 if none) and its index (-1 if none), [N] each.
    """
    taken_iou, owner = np.zeros(len(boxes)), np.full(len(boxes), -1)
    if len(boxes) == 0 or len(truth_boxes) == 0:
        return taken_iou, owner
    iou = box_iou(boxes, truth_boxes).double().numpy()  # [N, M]
    free = np.where(labels.numpy()[:, None] == truth_labels.numpy()[None], iou, 0.0)
    for i in range(len(boxes)):
        j = int(free[i].argmax())
        if free[i, j] >= iou_thr:
            taken_iou[i], owner[i] = free[i, j], j
            free[:, j] = 0.0
    return taken_iou, owner


def _ratio(part: np.ndarray, whole: np.ndarray) -> float | None:
    total = int(whole.sum())
    return None if total == 0 else float(part.sum() / total)


def _recall(found: np.ndarray, truth: np.ndarray) -> float | None:
    """Share of the truth boxes marked in `truth` that were found."""
    return _ratio(found & truth, truth)
