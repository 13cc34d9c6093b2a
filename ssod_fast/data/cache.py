"""A bounded cache of decoded images that all worker processes of a loader share."""

from __future__ import annotations

import mmap
import multiprocessing
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MB = 1 << 20


class ImageCache:
    """Decoded pictures (uint8 [3, h, w]) by key, in one anonymous memory map that forked workers see too.

    Nothing is ever evicted: once the arena is full, later pictures are simply decoded each time. Small sets fit, and a random walk over a
    large set would gain nothing from evictions. A worker that is spawned instead of forked gets an empty cache of its own.

    Args:
        keys: How many pictures there are; keys are 0 .. keys - 1.
        limit_mb: Size of the arena in MiB; 0 switches the cache off. Memory is taken as pictures arrive, not at construction.
    """

    def __init__(self, keys: int, limit_mb: int) -> None:
        if limit_mb < 0:
            raise ValueError(f"limit_mb must be >= 0, got {limit_mb}")
        self.keys, self.limit_mb = keys, limit_mb
        self._capacity = limit_mb * _MB if keys else 0
        if self._capacity:
            self._allocate()

    def _allocate(self) -> None:
        table_bytes = self.keys * 24 + 8
        self._map = mmap.mmap(-1, table_bytes + self._capacity)
        # Per key: offset + 1 into the pixels (0: absent), h, w. The last entry is the number of bytes taken.
        self._table = np.frombuffer(self._map, np.int64, self.keys * 3, 0).reshape(self.keys, 3)
        self._used = np.frombuffer(self._map, np.int64, 1, self.keys * 24)
        self._pixels = torch.frombuffer(self._map, dtype=torch.uint8, count=self._capacity, offset=table_bytes)
        self._lock = multiprocessing.Lock()

    def get(self, key: int) -> Tensor | None:
        """A view of the cached picture (do not write to it), or None."""
        if not self._capacity or not self._table[key, 0]:
            return None
        start, h, w = self._table[key].tolist()
        return self._pixels[start - 1 : start - 1 + 3 * h * w].view(h, w, 3).permute(2, 0, 1)

    def put(self, key: int, image: Tensor) -> None:
        """Stores a picture if there is room."""
        if not self._capacity or self._table[key, 0]:
            return
        start = self._claim(image.numel())
        if start is None:
            return
        self._pixels[start : start + image.numel()].copy_(image.permute(1, 2, 0).reshape(-1))
        self._table[key, 1:] = image.shape[1:]
        self._table[key, 0] = start + 1  # last: from here on other processes may read the pixels

    def _claim(self, size: int) -> int | None:
        # A worker killed inside the lock must not stop the others: after the timeout they go on without caching.
        if not self._lock.acquire(timeout=0.1):
            return None
        try:
            start = int(self._used[0])
            if start + size > self._capacity:
                return None
            self._used[0] = start + size
            return start
        finally:
            self._lock.release()

    @property
    def used_mb(self) -> float:
        """MiB of pictures held."""
        return float(self._used[0]) / _MB if self._capacity else 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {"keys": self.keys, "limit_mb": self.limit_mb}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ImageCache.__init__(self, state["keys"], state["limit_mb"])
