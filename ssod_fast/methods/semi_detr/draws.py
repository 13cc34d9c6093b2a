"""Random numbers that depend on nothing but what they are for."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch

Purpose = Literal["labeled", "pseudo"]


class Draws:
    """Generators for one step, keyed by seed, rank, iteration and purpose.

    Nothing that a step leaves out shifts what another part of it draws, and a resumed run draws as an uninterrupted one without any state.

    Args:
        seed: of the run.
        rank: of the process.
        step: iteration.
        micro: which of the accumulated steps of the iteration.
    """

    def __init__(self, seed: int, rank: int, step: int, micro: int = 0) -> None:
        self.key = tuple(int(number) for number in (seed, rank, step, micro))  # numbers of NumPy are written otherwise

    def generator(self, purpose: Purpose, device: torch.device) -> torch.Generator:
        """A fresh generator on `device`, always the same for the same purpose."""
        digest = hashlib.blake2b(repr((*self.key, purpose)).encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
