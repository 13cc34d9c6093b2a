"""Targets of a batch as flat rows on the device: what the matching ops read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..structures import PaddedTargets
from ._image_rows import readable


@dataclass(frozen=True)
class PackedTargets:
    """G target rows of B images, either ragged (`offsets`) or padded (`counts`): image b owns the rows
    `offsets[b] .. offsets[b + 1]`, or the first `counts[b]` of the G / B rows from `b * G / B` on; all G / B without either.

    A weight says how much a target counts in the losses of :mod:`ssod_fast.criterion`, from 1 to 0, where its query learns the background.
    It neither keeps the target from taking a query nor lowers the number that losses are divided by. Boxes that shall do neither must not
    be among the rows: :meth:`PaddedTargets.select <ssod_fast.structures.PaddedTargets.select>` drops them without waiting for the device,
    and so do smaller `counts` where they come last.

    Attributes:
        labels: int64 [G]; anything in padding rows.
        boxes: [G, 4], any float dtype, in the frame and format of the boxes they are matched with; anything in padding rows.
        batch: number of images, B.
        image: int64 [G], the image of each row.
        offsets: int64 [B + 1], or None for padded rows.
        counts: int32 or int64 [B], or None for ragged rows.
        weights: float32 [G] in [0, 1], how much each target counts in a loss, or None for 1; anything in padding rows.
        sizes: number of targets per image where the host knows it.
        label_range: smallest and largest label of a list that was on the host and is now on a device.

    Raises:
        ValueError: for shapes that do not fit each other, both offsets and counts, and rows that do not divide evenly where they must.
        TypeError: for what is no tensor, labels that are not int64, boxes that are not floating point, and offsets that are no integers.
    """

    labels: Tensor
    boxes: Tensor
    batch: int
    image: Tensor
    offsets: Tensor | None = None
    counts: Tensor | None = None
    weights: Tensor | None = None
    sizes: tuple[int, ...] | None = None
    label_range: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_fields(self)
        rows = self.labels.shape[0]
        if self.labels.dim() != 1 or self.boxes.shape != (rows, 4):
            found = f"{list(self.labels.shape)} and {list(self.boxes.shape)}"
            raise ValueError(f"targets must have labels [G] and boxes [G, 4], got {found}")
        for name, value in (("image", self.image), ("weights", self.weights)):
            if value is not None and value.shape != (rows,):
                raise ValueError(f"{name} of targets must be [{rows}] as the labels are, got {list(value.shape)}")
        _check_bounds(self, rows)

    @property
    def rows(self) -> int:
        """Number of rows, padding included: G."""
        return self.labels.shape[0]

    @property
    def padded(self) -> bool:
        """Whether every image owns the same number of rows, some of which are padding."""
        return self.counts is not None


def _check_fields(targets: PackedTargets) -> None:
    """Refuses wrong types: one look for each call that packs targets."""
    labels, boxes, image, weights = targets.labels, targets.boxes, targets.image, targets.weights
    tensors = isinstance(labels, Tensor) and isinstance(boxes, Tensor) and isinstance(image, Tensor)
    if not (tensors and (weights is None or isinstance(weights, Tensor))):
        found = {"labels": labels, "boxes": boxes, "image": image, "weights": weights}
        name = next(name for name, value in found.items() if not isinstance(value, Tensor))
        raise TypeError(f"{name} of targets must be a tensor, got {type(found[name]).__name__}")
    if labels.dtype is not torch.int64:
        raise TypeError(f"labels of targets must be int64, got {labels.dtype}")
    if not boxes.is_floating_point():
        raise TypeError(f"boxes of targets must be floating point, got {boxes.dtype}")


def _check_bounds(targets: PackedTargets, rows: int) -> None:
    """Refuses offsets, counts and numbers of rows that do not fit the number of images."""
    batch, offsets, counts = targets.batch, targets.offsets, targets.counts
    if not isinstance(batch, int) or batch < 0:
        raise ValueError(f"batch of targets must be an int >= 0, got {batch!r}")
    if offsets is not None and counts is not None:
        raise ValueError("targets must have offsets or counts, got both")
    if offsets is not None:
        _check_index("offsets", offsets, batch + 1)
    elif counts is not None:
        _check_index("counts", counts, batch)
    if offsets is None and rows != batch * (rows // max(batch, 1)):
        raise ValueError(f"targets without offsets must have as many rows for each of the {batch} images, got {rows} rows")


def _check_index(name: str, index: Tensor, length: int) -> None:
    if not isinstance(index, Tensor) or (index.dtype is not torch.int64 and index.dtype is not torch.int32):
        found = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name} of targets must be an int32 or int64 tensor, got {found}")
    if index.shape != (length,):
        raise ValueError(f"{name} of targets must be [{length}], got {list(index.shape)}")


def host_label_range(targets: PackedTargets) -> tuple[int, int] | None:
    """Smallest and largest label of the real rows where the host can read them without waiting and there are any."""
    if targets.label_range is not None or not readable(targets.labels):
        return targets.label_range
    labels, counts = targets.labels.numpy(), targets.counts
    if counts is not None:
        if not readable(counts):
            return None
        labels = labels.reshape(targets.batch, -1 if targets.batch else 0)
        labels = labels[np.arange(labels.shape[1]) < counts.numpy()[:, None]]
    return (int(labels.min()), int(labels.max())) if labels.size else None


AnyTargets = PackedTargets | PaddedTargets | Sequence[Mapping[str, Any]]


def pack_targets(targets: AnyTargets, device: torch.device | str | None = None) -> PackedTargets:
    """Flat rows of targets given in any of the usual forms.

    A list of dicts on the host costs one pinned upload, a list on the device the upload of its lengths;
    :class:`~ssod_fast.structures.PaddedTargets` are only viewed; packed targets pass through. Nothing waits for the device, unless the rows
    shall leave it.

    A list has other lengths in each step, for which `torch.compile` would compile a function again and again: pack lists outside of it, or
    take padded targets, whose shapes stay.

    Args:
        targets: one mapping per image with `boxes` [T, 4], `labels` or `class_labels` int64 [T], and optionally `weights` [T] in [0, 1]
            (what they mean: :class:`PackedTargets`), all on one device; or :class:`~ssod_fast.structures.PaddedTargets`; or
            :class:`PackedTargets`.
        device: where the rows of a list shall be; by default where its boxes are. Targets in the other forms stay where they are.

    Returns:
        The rows, in the order of the images.

    Raises:
        ValueError: for missing keys, `labels` beside other `class_labels`, wrong shapes, several devices, and padded or packed targets on
            another device than `device`.
        TypeError: for targets, boxes, labels or weights of another type.
    """
    where = None if device is None else torch.device(device)
    if isinstance(targets, PackedTargets | PaddedTargets):
        _check_place(targets.boxes.device, where)
        return targets if isinstance(targets, PackedTargets) else _from_padded(targets)
    if isinstance(targets, str | Mapping | Tensor) or not isinstance(targets, Sequence):
        raise TypeError(f"targets must be a list of mappings, PaddedTargets or PackedTargets, got {type(targets).__name__}")
    return _from_list(targets, where)


def _check_place(found: torch.device, wanted: torch.device | None) -> None:
    if wanted is None or found == wanted or (found.type == wanted.type and wanted.index is None):
        return
    raise ValueError(f"targets must be on {wanted}, got {found}: move them with .to() first")


def _from_padded(targets: PaddedTargets) -> PackedTargets:
    batch, rows = targets.labels.shape
    image = torch.arange(batch, device=targets.labels.device).unsqueeze(1).expand(batch, rows).flatten()
    return PackedTargets(
        targets.labels.flatten(), targets.boxes.flatten(0, 1), batch, image, counts=targets.count, weights=targets.weights.flatten()
    )


def _from_list(targets: Sequence[Mapping[str, Any]], where: torch.device | None) -> PackedTargets:
    if not targets:
        none = torch.zeros(0, dtype=torch.int64, device=where)
        return PackedTargets(none, torch.zeros(0, 4, device=where), 0, none, offsets=none.new_zeros(1), sizes=())
    fields = [_check_target(i, target) for i, target in enumerate(targets)]
    _check_devices(fields)
    boxes, labels, weights = zip(*fields, strict=True)
    sizes = tuple([box.shape[0] for box in boxes])
    source = boxes[0].device
    where = source if where is None else where
    parts: list[list[Tensor]] = [list(boxes), list(labels)]
    if any(weight is not None for weight in weights):
        parts.append([_weights(*pair) for pair in zip(weights, boxes, strict=True)])
    index = [[_offsets(sizes)], [_images(sizes)]]
    if source == where:
        label_range = None
        rows = [torch.cat(part) for part in parts] + _upload_together(index, where)
    else:
        label_range = _label_range(parts[1])
        rows = _upload_together(parts + index, where)
    factors = rows[2] if len(parts) == 3 else None
    return PackedTargets(rows[1], rows[0], len(sizes), rows[-1], offsets=rows[-2], weights=factors, sizes=sizes, label_range=label_range)


def _label_range(labels: Sequence[Tensor]) -> tuple[int, int] | None:
    """Smallest and largest label where the host can read them without waiting."""
    if labels[0].device.type != "cpu" or torch.compiler.is_compiling():
        return None
    values = np.concatenate([label.numpy() for label in labels])
    return (int(values.min()), int(values.max())) if values.size else None


def _offsets(sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes)])


def _images(sizes: tuple[int, ...]) -> Tensor:
    """Image of each row; NumPy repeats on the host without the read of a tensor that torch would make."""
    if torch.compiler.is_compiling():  # which would trace NumPy's repeat as that very read
        return torch.cat([torch.full((size,), i, dtype=torch.int64) for i, size in enumerate(sizes)])
    return torch.from_numpy(np.repeat(np.arange(len(sizes), dtype=np.int64), sizes))


def _weights(weights: Tensor | None, boxes: Tensor) -> Tensor:
    return boxes.new_ones(boxes.shape[0], dtype=torch.float32) if weights is None else weights.float()


def _upload_together(parts: Sequence[Sequence[Tensor]], device: torch.device) -> list[Tensor]:
    """Joins each part along its rows and moves all of them to `device` in one copy out of one pinned block."""
    if device.type == "cpu":
        return [(part[0] if len(part) == 1 else torch.cat(list(part))).to(device) for part in parts]
    if any(tensor.device.type != "cpu" for part in parts for tensor in part):
        return [torch.cat(list(part)).to(device, non_blocking=True) for part in parts]
    block, segments = _stage(parts, pinned=device.type == "cuda")
    moved = block.to(device, non_blocking=True)  # the caching host allocator keeps the block until the copy is done
    return [segment.of(moved) for segment in segments]


@dataclass(frozen=True)
class _Segment:
    """A tensor inside a block of bytes."""

    first: int
    count: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, block: Tensor) -> Tensor:
        return block[self.first : self.first + self.count * self.dtype.itemsize].view(self.dtype).view(self.shape)


_ALIGNMENT = 16  # bytes: a float32 box is loaded at once


def _stage(parts: Sequence[Sequence[Tensor]], pinned: bool) -> tuple[Tensor, list[_Segment]]:
    """The joined parts in one block of host memory, and where each of them lies."""
    segments, end = [], 0
    for part in parts:
        dtype = torch.cat([tensor[:0] for tensor in part]).dtype  # as cat would promote
        shape = (sum(tensor.shape[0] for tensor in part), *part[0].shape[1:])
        segment = _Segment(end, sum(tensor.numel() for tensor in part), dtype, shape)
        segments.append(segment)
        end += -(-segment.count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    block = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
    for part, segment in zip(parts, segments, strict=True):
        with torch.no_grad():
            torch.cat(list(part), out=segment.of(block))
    return block, segments


_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
Fields = tuple[Tensor, Tensor, Tensor | None]


def _check_target(i: int, target: Mapping[str, Any]) -> Fields:
    """Boxes, labels and weights of one image, checked."""
    if type(target) is not dict and not isinstance(target, Mapping):  # the second question takes ten times as long
        raise TypeError(f"targets[{i}] must be a mapping with 'boxes' and 'labels', got {type(target).__name__}")
    boxes, weights = target.get("boxes"), target.get("weights")
    labels, other = target.get("labels"), target.get("class_labels")
    if labels is None:
        labels = other
    elif other is not None and other is not labels:
        raise ValueError(f"targets[{i}] must have 'labels' or 'class_labels', got both and they are not the same tensor")
    if boxes is None or labels is None:
        raise ValueError(f"targets[{i}] must have 'boxes' and 'labels' (or 'class_labels'), got the keys {sorted(target)}")
    if not _is_sound(boxes, labels, weights):
        raise _complaint(i, boxes, labels, weights)
    return boxes, labels, weights


def _is_sound(boxes: Any, labels: Any, weights: Any) -> bool:
    """Whether :func:`_complaint` has nothing to say: one look for each image of each step."""
    if not (isinstance(boxes, Tensor) and isinstance(labels, Tensor) and (weights is None or isinstance(weights, Tensor))):
        return False
    shape = boxes.shape
    return (
        len(shape) == 2
        and shape[1] == 4
        and boxes.dtype in _FLOATS
        and labels.dtype is torch.int64
        and labels.dim() == 1
        and labels.shape[0] == shape[0]
        and (weights is None or weights.shape == shape[:1])
    )


def _complaint(i: int, boxes: Any, labels: Any, weights: Any) -> Exception:
    """What is wrong with a target."""
    for name, value in (("boxes", boxes), ("labels", labels), ("weights", weights)):
        if not isinstance(value, Tensor) and not (value is None and name == "weights"):
            return TypeError(f"targets[{i}][{name!r}] must be a tensor, got {type(value).__name__}")
    if boxes.dim() != 2 or boxes.shape[1] != 4 or boxes.dtype not in _FLOATS:
        return ValueError(f"targets[{i}]['boxes'] must be floating point [T, 4], got {boxes.dtype} {list(boxes.shape)}")
    if labels.dtype is not torch.int64:
        return TypeError(f"targets[{i}]['labels'] must be int64, got {labels.dtype}")
    name, value = ("labels", labels) if labels.shape != boxes.shape[:1] else ("weights", weights)
    return ValueError(f"targets[{i}][{name!r}] must be [{boxes.shape[0]}] as the boxes are, got {list(value.shape)}")


def _check_devices(fields: Sequence[Fields]) -> None:
    device = fields[0][0].device
    if {tensor.device for target in fields for tensor in target if tensor is not None} == {device}:
        return
    for i, target in enumerate(fields):
        for name, tensor in zip(("boxes", "labels", "weights"), target, strict=True):
            if tensor is not None and tensor.device != device:
                raise ValueError(f"targets must be on one device, got {device} and targets[{i}][{name!r}] on {tensor.device}")
