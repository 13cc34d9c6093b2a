"""Boxes, rules and comparisons for the tests of the Triton kernels of the IoU family."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ssod_fast.ops._boxes import CIOU, EPS_MODES, FORMATS, MODES, Rule, make_rule

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on the CPU the interpreter runs the kernels
EVERY_MODE = [make_rule(mode, "xyxy", eps_mode, None) for mode, eps_mode in itertools.product(MODES, EPS_MODES)]
EVERY_FORMAT = [make_rule("giou", fmt, "zero", None) for fmt in FORMATS]


def rule_name(rule: Rule) -> str:
    """A readable test id."""
    names = (list(table)[value] for table, value in zip((MODES, FORMATS, EPS_MODES), rule, strict=False))
    return "-".join(names)


def nasty_boxes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, finite: bool = False) -> Tensor:
    """Integer boxes [*shape, 4] full of ties, with points, lines and inverted ones, and unless `finite` some NaN and Inf."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.randint(0, 10, (*shape, 4), generator=generator).to(dtype)
    boxes[..., 2:] += boxes[..., :2] * (torch.rand(*shape, 1, generator=generator) < 0.8)  # the others stay inverted or degenerate
    if not finite:
        bad = torch.rand(*boxes.shape, generator=generator) < 0.02
        boxes = boxes.masked_fill(bad, math.nan).masked_fill(bad.roll(3), math.inf)
    return boxes.to(DEVICE)


def real_boxes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Valid boxes [*shape, 4] in pixels, off all ties."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 80
    return torch.cat((corner, corner + torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 40 + 1), -1).to(DEVICE, dtype)


def assert_same(actual: Tensor, expected: Tensor, rule: Rule | None = None) -> None:
    """Bit-equal, NaN where NaN. To rounding for CIoU, whose arctangent depends on how torch splits a tensor into vectors, and on a GPU,
    where torch's own kernels contract products into sums.
    """
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    exact = DEVICE.type == "cpu" and (rule is None or rule.mode != CIOU)
    tolerance = 0.0 if exact or not actual.dtype.is_floating_point else 8 * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


def assert_as_implemented(actual: Tensor | tuple[Tensor, ...], reference: Any, op: Any, arguments: tuple[Any, ...], ulps: int = 16) -> None:
    """The outputs of a launcher are those of the reference and, on the CPU, those of the op, that is of its C++ kernel."""
    for implementation in (reference, op) if DEVICE.type == "cpu" else (reference,):
        expected = implementation(*arguments)
        for got, want in zip(*((t,) if isinstance(t, Tensor) else t for t in (actual, expected)), strict=True):
            assert_close(got, want, ulps)


def assert_gradient(actual: Tensor, expected: Tensor) -> None:
    """Sums of the same terms in another order: equal to rounding, relative to the largest entry; NaN where NaN."""
    assert_close(actual, expected, ulps=32)


def assert_close(actual: Tensor, expected: Tensor, ulps: int = 16) -> None:
    """Equal to rounding, relative to the largest entry: what a formula gives whose logarithms or order of terms differ. NaN where NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if not actual.dtype.is_floating_point:
        assert torch.equal(actual, expected)
        return
    finite = expected[expected.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, atol=ulps * eps * max(scale, 1.0), rtol=2 * ulps * eps, equal_nan=True)
