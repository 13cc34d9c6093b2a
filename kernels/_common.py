"""What every launcher needs: ceiling division, the device to launch on, and IEEE division."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """Smallest integer >= a / b."""
    return -(-a // b)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the device of `tensor` current: Triton launches on the current one. Nothing to do for CPU tensors (the interpreter)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def true_div(num, den):
    """num / den, rounded to nearest: Triton's own `/` is an approximation in float32, and exact in float64."""
    if num.dtype == tl.float64:
        result = num / den
    else:
        result = tl.div_rn(num, den)
    return result


@triton.jit
def at_least(x, FLOOR: tl.constexpr):
    """max(x, FLOOR), FLOOR a constant in the dtype of x; NaN stays."""
    return tl.where(x < FLOOR, FLOOR, x)


@triton.jit
def log1p(x):
    """ln(1 + x) for x > -1 with all digits: the rounding of 1 + x is divided out."""
    shifted = 1.0 + x
    tiny = shifted == 1.0
    return tl.where(tiny, x, tl.log(shifted) * true_div(x, tl.where(tiny, 1.0, shifted - 1.0)))
