"""Stops a run between two iterations."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

AGREE_EVERY = 10  # iterations; agreeing waits for the device


class StopSignal:
    """True once SIGINT or SIGTERM came and all ranks know of it; the second signal leaves at once with 130.

    It must be active before loader processes start: they inherit its handler and survive a Ctrl-C, which reaches the whole group.
    """

    def __init__(self) -> None:
        self.stop = False
        self._asked = False
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.stop

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a loader process: its parent decides
            return
        if self._asked:
            os._exit(130)
        self._asked = True

    def agree(self, device: torch.device, it: int) -> None:
        """Takes note of a signal after iteration `it`; with several ranks in every tenth iteration only, in which all of them stop."""
        if not (dist.is_available() and dist.is_initialized()):
            self.stop = self._asked
            return
        if it % AGREE_EVERY:
            return
        flag = torch.tensor(float(self._asked), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.stop = bool(flag.item())
