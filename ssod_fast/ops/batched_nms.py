"""Class-aware non-maximum suppression of all images of a batch at once, padded in, padded out, without a host sync."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._image_rows import brief
from ._registry import launcher, register

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Kept:
    """The boxes that survived, best first.

    Attributes:
        index: int64 [B, K], which of the N boxes; -1 in padding.
        count: int64 [B], how many of each image's K are real.
        total: N, the boxes of each image that there were, padding included.
    """

    index: Tensor
    count: Tensor
    total: int

    def gather(self, values: Tensor, fill: float = 0) -> Tensor:
        """What `values` [B, N, ...] holds for the kept boxes: [B, K, ...], `fill` in padding.

        Raises:
            ValueError: `values` does not begin with [B, N].
            TypeError: `values` is no tensor.
        """
        if not isinstance(values, Tensor):
            raise TypeError(f"values must be a tensor, got {type(values).__name__}")
        batch = self.index.shape[0]
        if values.dim() < 2 or values.shape[0] != batch or values.shape[1] != self.total:
            raise ValueError(f"values must have shape [{batch}, {self.total}, ...] as the boxes had, got {list(values.shape)}")
        shape = (*self.index.shape, *[1] * (values.dim() - 2))
        index = self.index.view(shape).expand(*self.index.shape, *values.shape[2:])
        if values.shape[1] == 0:
            return values.new_full(index.shape, fill)
        return values.gather(1, index.clamp(min=0)).masked_fill(index < 0, fill)


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    *,
    iou_threshold: float,
    counts: Tensor | None = None,
    score_threshold: float = -math.inf,
    max_keep: int | None = None,
) -> Kept:
    """Keeps a box unless a better one of its class and image that is kept overlaps it by more than `iou_threshold`.

    The result for one image is that of `torchvision.ops.nms` run on each class, merged by score: same arithmetic, best score first, ties in
    the order of the input. Boxes with a coordinate that is not finite take no part, nor do scores of NaN. Nothing waits for the device, and
    no gradient flows.

    Args:
        boxes: [B, N, 4] xyxy, any frame, floating; computed in float64 if boxes or scores are float64, else in float32.
        scores: [B, N], floating.
        labels: integer [B, N], boxes of different labels never suppress each other; None for a single class.
        iou_threshold: 0..1; a box with exactly this overlap stays.
        counts: int [B], how many boxes of each image are real; the rest may hold anything. None if all are.
        score_threshold: only boxes with a strictly higher score take part, compared as torch compares `scores > score_threshold`.
        max_keep: at most so many boxes per image, the best ones; None for all N.

    Returns:
        :class:`Kept` with K = min(max_keep, N); its `gather` collects boxes, scores and labels.

    Raises:
        ValueError: for shapes or devices that do not fit, counts on the host outside of 0..N, and options out of range.
        TypeError: for boxes or scores that are not floating, labels or counts that are not integers, and options of a wrong type.
    """
    _check_boxes(boxes, scores)
    for name, value in (("iou_threshold", iou_threshold), ("score_threshold", score_threshold)):
        if not _is_number(value):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must lie in 0..1, got {iou_threshold!r}")
    if score_threshold != score_threshold:
        raise ValueError(f"score_threshold must be a number, got {score_threshold!r}")
    if max_keep is None:
        max_keep = boxes.shape[1]
    elif not isinstance(max_keep, int) or isinstance(max_keep, bool):
        raise TypeError(f"max_keep must be an int or None, got {max_keep!r}")
    elif max_keep < 0:
        raise ValueError(f"max_keep must be >= 0, got {max_keep}")
    if counts is not None:
        counts = _check_counts(counts, boxes)
    dtype = torch.float64 if torch.float64 in (boxes.dtype, scores.dtype) else torch.float32
    rows = _dense(boxes, dtype), _dense(scores, dtype), _check_labels(labels, scores)
    index, count = _op(*rows, counts, iou_threshold, score_threshold, max_keep)
    return Kept(index, count, boxes.shape[1])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _dense(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.detach().to(dtype).contiguous()


def _check_boxes(boxes: Tensor, scores: Tensor) -> None:
    for name, value in (("boxes", boxes), ("scores", scores)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if boxes.dim() != 3 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must have shape [B, N, 4], got {list(boxes.shape)}")
    if scores.shape != boxes.shape[:2]:
        raise ValueError(f"scores must have shape {list(boxes.shape[:2])}, got {list(scores.shape)}")
    if scores.device != boxes.device:
        raise ValueError(f"scores and boxes must be on one device, got {scores.device} and {boxes.device}")


def _check_labels(labels: Tensor | None, scores: Tensor) -> Tensor:
    if labels is None:
        return torch.zeros_like(scores, dtype=torch.int64, memory_format=torch.contiguous_format)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor or None, got {type(labels).__name__}")
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.shape != scores.shape:
        raise ValueError(f"labels must have shape {list(scores.shape)}, got {list(labels.shape)}")
    if labels.device != scores.device:
        raise ValueError(f"labels and boxes must be on one device, got {labels.device} and {scores.device}")
    return labels.to(torch.int64).contiguous()


def _check_counts(counts: Tensor, boxes: Tensor) -> Tensor:
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts must be a tensor or None, got {type(counts).__name__}")
    if counts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"counts must be int32 or int64, got {counts.dtype}")
    if counts.shape != boxes.shape[:1]:
        raise ValueError(f"counts must have shape {list(boxes.shape[:1])}, got {list(counts.shape)}")
    if counts.device != boxes.device:
        raise ValueError(f"counts and boxes must be on one device, got {counts.device} and {boxes.device}")
    if type(counts) is Tensor and counts.device.type == "cpu" and not torch.compiler.is_compiling():  # reading it costs no sync
        found: list[int] = counts.numpy().tolist()
        if any(not 0 <= n <= boxes.shape[1] for n in found):
            raise ValueError(f"counts must lie in 0..{boxes.shape[1]}, got {brief(found)}")
    return counts.to(torch.int64).contiguous()


def _overlap(box: Tensor, boxes: Tensor) -> Tensor:
    """IoU of [B, 1, 4] with [B, N, 4] in torchvision's order of operations: [B, N], NaN where both areas are 0."""
    sides = (torch.minimum(box[..., 2:], boxes[..., 2:]) - torch.maximum(box[..., :2], boxes[..., :2])).clamp(min=0)
    inter = sides[..., 0] * sides[..., 1]
    area, areas = ((b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) for b in (box, boxes))
    return inter / (area + areas - inter)


def _reference(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    counts: Tensor | None,
    iou_threshold: float,
    score_threshold: float,
    max_keep: int,
) -> tuple[Tensor, Tensor]:
    batch, n = scores.shape
    alive = (scores > score_threshold) & boxes.isfinite().all(-1)  # [B, N]
    if counts is not None:
        alive &= torch.arange(n, device=scores.device) < counts[:, None]
    order = scores.where(alive, -math.inf).sort(dim=1, descending=True, stable=True).indices
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    labels, alive = labels.gather(1, order), alive.gather(1, order)
    index = order.new_full((batch, min(max_keep, n)), -1)
    for k in range(index.shape[1]):  # the best box alive is kept and ends itself and what it suppresses
        exists, best = alive.max(dim=1, keepdim=True)  # [B, 1]
        index[:, k : k + 1] = order.gather(1, best).where(exists, -1)
        overlap = _overlap(boxes.gather(1, best[..., None].expand(-1, -1, 4)), boxes)
        suppressed = (overlap.double() > iou_threshold) & (labels == labels.gather(1, best))
        alive = (alive & ~suppressed).scatter(1, best, False)
    return index, (index >= 0).sum(1)


def _fake(boxes: Tensor, scores: Tensor, labels: Tensor, counts: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    batch, n = scores.shape
    return labels.new_empty(batch, min(options[-1], n)), labels.new_empty(batch)


register(
    "batched_nms(Tensor boxes, Tensor scores, Tensor labels, Tensor? counts, float iou_threshold, float score_threshold, SymInt max_keep) "
    "-> (Tensor index, Tensor count)",
    reference=_reference,
    fake=_fake,
    triton=launcher("batched_nms", "batched_nms"),
)
_op = torch.ops.ssod_fast.batched_nms.default
