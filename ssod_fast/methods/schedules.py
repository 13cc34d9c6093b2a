"""Ramps of loss weights."""

from __future__ import annotations


def ramp(step: int, *, start: int, length: int) -> float:
    """0 up to iteration `start`, then linear, 1 from `start + length` on (PseCo ramps from 5,000 over 2,000).

    With `length=0` it is a step: 0 before `start`, 1 from `start` on.
    """
    if length < 0:
        raise ValueError(f"length must not be negative, got {length}")
    if length == 0:
        return 1.0 if step >= start else 0.0
    return min(max((step - start) / length, 0.0), 1.0)
