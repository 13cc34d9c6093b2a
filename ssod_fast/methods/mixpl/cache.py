"""A ring of the newest unlabelled images and their pseudo boxes, on the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssod_fast.ops.compose import cache_view, cache_write
from ssod_fast.structures import PaddedTargets

Size = tuple[int, int]
_FIELDS = ("boxes", "labels", "scores", "weights", "count")


class RingCache:
    """First in, first out; an image is written once and never moved.

    The ring has `size + batch` slots. A step writes its images into the free slots, reads them and the older entries from the same
    buffer, and then lets its own images become entries by moving the head. Images are stored as they come, uint8 or float, before any
    erasing; sizes stay on the host, so that reading never waits for the device.

    Args:
        size: entries that are kept.
        batch: most images of one step.
        max_boxes: rows of pseudo boxes per image.
    """

    def __init__(self, size: int, batch: int, max_boxes: int) -> None:
        for name, value in (("size", size), ("batch", batch), ("max_boxes", max_boxes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._size, self._batch, self._max_boxes = size, batch, max_boxes
        self._ring: Tensor | None = None  # [size + batch, capacity], packed [3, h, w] images
        self._targets: PaddedTargets | None = None  # [size + batch, max_boxes]
        self._sizes: list[Size] = [(0, 0)] * self.slots
        self._confident = [0] * self.slots
        self._head = 0  # slot of the oldest entry
        self._fill = 0  # entries
        self._pending = 0  # images written, not yet committed

    def __len__(self) -> int:
        return self._fill

    @property
    def slots(self) -> int:
        """Slots of the ring: the entries and one batch."""
        return self._size + self._batch

    @property
    def full(self) -> bool:
        """Whether as many entries are there as are kept."""
        return self._fill == self._size

    @property
    def sizes(self) -> list[Size]:
        """(height, width) of the entries, oldest first."""
        return [self._sizes[slot] for slot in self._entry_slots()]

    @property
    def confident(self) -> int:
        """The largest number of confident boxes of any image that :meth:`read` gives."""
        return max((self._confident[slot] for slot in self._pending_slots() + self._entry_slots()), default=0)

    def write(self, images: Sequence[Tensor], targets: PaddedTargets, confident: Sequence[int]) -> None:
        """Writes a step's images, which :meth:`commit` turns into entries.

        Args:
            images: [3, h, w] each, one dtype and device.
            targets: pseudo boxes in pixels of these images, all of them.
            confident: per image, how many boxes at most will pass the score threshold; the host needs a bound to keep tensors short.
        """
        self._check_batch(images, targets, confident)
        self._pending = len(images)
        self._store(self._pending_slots(), images, targets, confident)

    def read(self) -> tuple[list[Tensor], PaddedTargets]:
        """The step's images, then the entries, oldest first: views of the ring, and their boxes in the same order."""
        if self._ring is None or self._targets is None:
            raise RuntimeError("the cache must be written before it is read")
        slots = self._pending_slots() + self._entry_slots()
        return [cache_view(self._ring, slot, self._sizes[slot]) for slot in slots], self._targets[slots]

    def commit(self) -> None:
        """The step's images become the newest entries; the oldest leave."""
        fill = self._fill + self._pending
        dropped = max(0, fill - self._size)
        self._head, self._fill, self._pending = (self._head + dropped) % self.slots, fill - dropped, 0

    def state_dict(self) -> dict[str, Any]:
        """Entries, oldest first, with the place of the head. Images of a step that is not committed are not part of it."""
        state: dict[str, Any] = {"head": self._head, "images": [], "targets": None, "confident": []}
        if self._fill and self._ring is not None and self._targets is not None:
            slots = self._entry_slots()
            state["images"] = [cache_view(self._ring, slot, self._sizes[slot]).clone() for slot in slots]
            state["confident"] = [self._confident[slot] for slot in slots]
            targets = self._targets[slots]
            state["targets"] = {name: getattr(targets, name) for name in _FIELDS}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict` into a cache of the same sizes; the tensors may be on another device."""
        images = state["images"]
        if len(images) > self._size:
            raise ValueError(f"the saved cache holds {len(images)} images, this one {self._size}: cache_size must be the same")
        self._ring = self._targets = None
        self._head, self._fill, self._pending = int(state["head"]) % self.slots, len(images), 0
        if not images:
            return
        targets = PaddedTargets(**state["targets"])
        if targets.nmax != self._max_boxes:
            raise ValueError(
                f"the saved cache holds {targets.nmax} boxes per image, this one {self._max_boxes}: max_boxes must be the same"
            )
        self._store(self._entry_slots(), images, targets, state["confident"])

    def _store(self, slots: list[int], images: Sequence[Tensor], targets: PaddedTargets, confident: Sequence[int]) -> None:
        ring, rows = self._prepare(images, targets.device)
        for slot, image, bound in zip(slots, images, confident, strict=True):
            self._sizes[slot] = (int(image.shape[1]), int(image.shape[2]))
            self._confident[slot] = bound
        cache_write(ring, images, slots)
        _write_rows(rows, slots, targets)

    def _entry_slots(self) -> list[int]:
        return [(self._head + i) % self.slots for i in range(self._fill)]

    def _pending_slots(self) -> list[int]:
        return [(self._head + self._fill + i) % self.slots for i in range(self._pending)]

    def _prepare(self, images: Sequence[Tensor], device: torch.device) -> tuple[Tensor, PaddedTargets]:
        """The store, made or grown so that it can hold the images: on their device, of their dtype, with slots long enough."""
        first, needed = images[0], max(image.numel() for image in images)
        ring, rows = self._ring, self._targets
        if ring is None or rows is None:
            ring = torch.zeros(self.slots, needed, dtype=first.dtype, device=first.device)
            rows = PaddedTargets.empty(self.slots, self._max_boxes, device)
        if ring.dtype != first.dtype:
            raise ValueError(f"images must be {ring.dtype} like those in the cache, got {first.dtype}")
        if ring.device != first.device:  # a state that was loaded on another device
            ring, rows = ring.to(first.device), rows.to(device)
        if ring.shape[1] < needed:
            ring = torch.nn.functional.pad(ring, (0, needed - ring.shape[1]))
        self._ring, self._targets = ring, rows
        return ring, rows

    def _check_batch(self, images: Sequence[Tensor], targets: PaddedTargets, confident: Sequence[int]) -> None:
        if not 0 < len(images) <= self._batch:
            raise ValueError(f"images must be 1 to {self._batch} per step, got {len(images)}")
        if len(targets) != len(images) or targets.nmax != self._max_boxes:
            expected, got = f"[{len(images)}, {self._max_boxes}]", f"[{len(targets)}, {targets.nmax}]"
            raise ValueError(f"targets must have {expected} rows for {len(images)} images, got {got}")
        if len(confident) != len(images):
            raise ValueError(f"confident must have one number per image, got {len(confident)} for {len(images)} images")
        for i, image in enumerate(images):
            if image.dim() != 3 or image.shape[0] != 3:
                raise ValueError(f"images[{i}] must be [3, h, w], got {list(image.shape)}")


def _write_rows(ring: PaddedTargets, slots: Sequence[int], targets: PaddedTargets) -> None:
    """Copies image i of `targets` into row slots[i]; a slice at a time, which needs no index on the device."""
    for name in _FIELDS:
        into, values = getattr(ring, name), getattr(targets, name)
        for start, stop, row in _runs(slots):
            into[row : row + stop - start] = values[start:stop]


def _runs(slots: Sequence[int]) -> list[tuple[int, int, int]]:
    """Consecutive stretches of slots: (first, behind the last, slot of the first)."""
    breaks = [0, *[i for i in range(1, len(slots)) if slots[i] != slots[i - 1] + 1], len(slots)]
    return [(start, stop, slots[start]) for start, stop in itertools.pairwise(breaks)]
