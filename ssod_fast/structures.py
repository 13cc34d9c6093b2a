"""Targets of detection images: one dict per image, and the padded batch that stays on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PAD_LABEL = -1


class Target(TypedDict, total=False):
    """Boxes of one image. Only `boxes` and `labels` are required; an image without objects has [0, 4] and [0].

    Attributes:
        boxes: float32 [N, 4], xyxy, absolute pixels of the image they travel with.
        labels: int64 [N], 0-based and contiguous.
        scores: float32 [N], confidence of a predicted box.
        weights: float32 [N], factor of the box in a loss.
        clean_boxes: float32 [N, 4], the right boxes where `boxes` are known to be inaccurate; for diagnostics, never for a loss.
        image_id: identity of the image in its data set.
        orig_size: (height, width) of the image before any view was made of it.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    weights: Tensor
    clean_boxes: Tensor
    image_id: int
    orig_size: tuple[int, int]


@dataclass(frozen=True)
class PaddedTargets:
    """Boxes of B images in tensors of N rows each; the first `count[b]` rows of image b are real, the others hold padding.

    Nothing here waits for the device except :meth:`to_list`, so that filtering, mixing and losses run without a host sync.

    Attributes:
        boxes: float32 [B, N, 4], xyxy, pixels; 0 in padding rows.
        labels: int64 [B, N]; -1 in padding rows.
        scores: float32 [B, N]; 1 for boxes that came without a score, 0 in padding rows.
        weights: float32 [B, N]; 1 by default, 0 in padding rows.
        count: int32 [B], number of real rows.
        placement: int32 [B, N], which placement of a plan the box came through, if it came through one.
        index: int32 [B, N], which box of its source image it was.
        overflow: int32 [B], boxes that did not fit into N rows.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    weights: Tensor
    count: Tensor
    placement: Tensor | None = None
    index: Tensor | None = None
    overflow: Tensor | None = None

    def __post_init__(self) -> None:
        if self.boxes.dim() != 3 or self.boxes.shape[-1] != 4:
            raise ValueError(f"boxes must be [B, N, 4], got {tuple(self.boxes.shape)}")
        batch, rows = self.boxes.shape[:2]
        for name in ("labels", "scores", "weights", "placement", "index"):
            _check_shape(name, getattr(self, name), (batch, rows))
        for name in ("count", "overflow"):
            _check_shape(name, getattr(self, name), (batch,))

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def __getitem__(self, rows: Sequence[int] | slice) -> PaddedTargets:
        """The images `rows`, chosen by host integers, in that order."""
        if isinstance(rows, slice):
            return self._map(lambda field: field[rows])
        # A bool is an int to Python; a list of them is meant as a mask and must not be read as rows 0 and 1.
        if isinstance(rows, int) or not all(type(row) is int for row in rows):
            raise TypeError(f"rows must be a slice or a sequence of int, got {rows!r}")
        if not all(-len(self) <= row < len(self) for row in rows):
            raise IndexError(f"rows must lie in [0, {len(self)}), got {list(rows)}")
        index = torch.tensor([row % len(self) for row in rows], dtype=torch.int64)
        return self._map(lambda field: field.index_select(0, upload(index, self.device)))

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.boxes.device

    @property
    def nmax(self) -> int:
        """Rows per image, real or not."""
        return self.boxes.shape[1]

    @property
    def valid(self) -> Tensor:
        """Bool [B, N]: True in real rows."""
        return torch.arange(self.nmax, device=self.device) < self.count[:, None]

    @classmethod
    def from_list(cls, targets: Sequence[Target], nmax: int | None = None, device: torch.device | str | None = None) -> PaddedTargets:
        """Pads a list of targets. Their lengths are known on the host, so this does not sync.

        Args:
            targets: one dict per image.
            nmax: rows per image, by default the longest target; boxes beyond it are counted in `overflow`.
            device: where the result goes, by default where the boxes are (the CPU for an empty list).
        """
        if nmax is not None and nmax < 0:
            raise ValueError(f"nmax must not be negative, got {nmax}")
        lengths = [_check_target(i, target) for i, target in enumerate(targets)]
        source = targets[0]["boxes"].device if targets else torch.device("cpu")
        _check_devices(targets, source)
        rows = max((0, *lengths)) if nmax is None else nmax
        kept = [min(n, rows) for n in lengths]
        padded = cls(
            boxes=_pad([t["boxes"][:rows].float() for t in targets], rows, 0.0, source, (4,)),
            labels=_pad([t["labels"][:rows] for t in targets], rows, PAD_LABEL, source),
            scores=_pad([_or_ones(t.get("scores"), t["boxes"])[:rows] for t in targets], rows, 0.0, source),
            weights=_pad([_or_ones(t.get("weights"), t["boxes"])[:rows] for t in targets], rows, 0.0, source),
            count=upload(torch.tensor(kept, dtype=torch.int32), source),
            overflow=upload(torch.tensor([n - k for n, k in zip(lengths, kept, strict=True)], dtype=torch.int32), source),
        )
        return padded if device is None else padded.to(device)

    @classmethod
    def empty(cls, batch: int, nmax: int = 0, device: torch.device | str = "cpu") -> PaddedTargets:
        """`batch` images without boxes."""
        return cls(
            boxes=torch.zeros(batch, nmax, 4, device=device),
            labels=torch.full((batch, nmax), PAD_LABEL, dtype=torch.int64, device=device),
            scores=torch.zeros(batch, nmax, device=device),
            weights=torch.zeros(batch, nmax, device=device),
            count=torch.zeros(batch, dtype=torch.int32, device=device),
        )

    def to_list(self) -> list[Target]:
        """One dict per image with views of the real rows. Waits for the device once, to read `count`."""
        counts = self.count.tolist()
        return [
            Target(boxes=self.boxes[b, :n], labels=self.labels[b, :n], scores=self.scores[b, :n], weights=self.weights[b, :n])
            for b, n in enumerate(counts)
        ]

    def select(self, keep: Tensor) -> PaddedTargets:
        """Keeps the real rows where `keep` (bool [B, N]) is True and moves them to the front in their order; N stays."""
        _check_shape("keep", keep, tuple(self.labels.shape))
        if keep.dtype != torch.bool:
            raise TypeError(f"keep must be bool, got {keep.dtype}")
        keep = keep & self.valid
        order = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)  # [B, N], kept rows first
        moved = self._map_rows(lambda field: field.gather(1, order.reshape(*order.shape, *[1] * (field.dim() - 2)).expand_as(field)))
        return dataclasses.replace(moved, count=keep.sum(1, dtype=torch.int32))._blank_padding()

    def to(self, device: torch.device | str) -> PaddedTargets:
        """The same targets on `device`; copies from the host are pinned and do not block."""
        return self._map(lambda field: upload(field, torch.device(device)))

    def pin_memory(self) -> PaddedTargets:
        """The same targets in page-locked memory (what `DataLoader(pin_memory=True)` calls)."""
        return self._map(lambda field: field.pin_memory())

    @staticmethod
    def cat(first: PaddedTargets, second: PaddedTargets) -> PaddedTargets:
        """The images of `first`, then those of `second`, with as many rows as the longer one; optional fields stay if both have them."""
        rows = max(first.nmax, second.nmax)
        first, second = first._grow(rows), second._grow(rows)

        def join(name: str) -> Any:
            a, b = getattr(first, name), getattr(second, name)
            return None if a is None or b is None else torch.cat([a, b])

        return PaddedTargets(**{field.name: join(field.name) for field in dataclasses.fields(PaddedTargets)})

    def _map(self, function: Callable[[Tensor], Tensor]) -> PaddedTargets:
        fields: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        mapped: dict[str, Any] = {name: None if value is None else function(value) for name, value in fields.items()}
        return PaddedTargets(**mapped)

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> PaddedTargets:
        return self._map(lambda field: field if field.dim() < 2 else function(field))

    def _blank_padding(self) -> PaddedTargets:
        valid = self.valid

        def blank(field: Tensor) -> Tensor:
            mask = valid.reshape(*valid.shape, *[1] * (field.dim() - 2))
            return torch.where(mask, field, 0)

        blanked = self._map_rows(blank)
        return dataclasses.replace(blanked, labels=torch.where(valid, self.labels, PAD_LABEL))

    def _grow(self, rows: int) -> PaddedTargets:
        if rows == self.nmax:
            return self
        return self._map_rows(lambda field: _pad_rows(field, rows))._blank_padding()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor without blocking the host; host memory is pinned first (once) so that the copy really overlaps."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # The caching host allocator keeps the pinned block until the copy is done.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _pad_rows(field: Tensor, rows: int) -> Tensor:
    shape = (field.shape[0], rows - field.shape[1], *field.shape[2:])
    return torch.cat([field, field.new_zeros(shape)], dim=1)


def _pad(values: list[Tensor], rows: int, fill: float, device: torch.device, tail: tuple[int, ...] = ()) -> Tensor:
    dtype = torch.int64 if fill == PAD_LABEL else torch.float32
    # The first, full row makes the result `rows` long even where every target is shorter.
    full = torch.empty((rows, *tail), dtype=dtype, device=device)
    return pad_sequence([full, *[v.to(dtype) for v in values]], batch_first=True, padding_value=fill)[1:]


def _or_ones(values: Tensor | None, boxes: Tensor) -> Tensor:
    return boxes.new_ones(boxes.shape[0], dtype=torch.float32) if values is None else values


def _check_shape(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    if value is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(value.shape)}")


def _check_devices(targets: Sequence[Target], device: torch.device) -> None:
    for i, target in enumerate(targets):
        for name in ("boxes", "labels", "scores", "weights"):
            value = target.get(name)
            if isinstance(value, Tensor) and value.device != device:
                raise ValueError(f"targets must be on one device, got {device} and targets[{i}][{name!r}] on {value.device}")


def _check_target(i: int, target: Target) -> int:
    """Shapes and dtypes of one target; its number of boxes."""
    for name in ("boxes", "labels"):
        if name not in target:
            raise ValueError(f"targets[{i}] must have {name!r}, got the keys {sorted(target)}")
    boxes, labels = target["boxes"], target["labels"]
    if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(f"targets[{i}]['boxes'] must be floating point [N, 4], got {boxes.dtype} {list(boxes.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"targets[{i}]['labels'] must be int64, got {labels.dtype}")
    n = boxes.shape[0]
    _check_shape(f"targets[{i}]['labels']", labels, (n,))
    _check_shape(f"targets[{i}]['scores']", target.get("scores"), (n,))
    _check_shape(f"targets[{i}]['weights']", target.get("weights"), (n,))
    return n
