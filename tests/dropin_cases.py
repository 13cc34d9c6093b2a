"""Inputs and comparisons that the tests of the drop-ins share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = ((5, 7), (3, 4), (2, 2))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class OurOps(TorchDispatchMode):
    """Collects the names of our ops that run, and of backwards whether their sums are to have a fixed order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.deterministic: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ssod_fast":
            self.names.append(func.name().removeprefix("ssod_fast::"))
            if self.names[-1].endswith("_backward"):
                self.deterministic.append(args[-1])
        return func(*args, **(kwargs or {}))


def level_tensors(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Sizes [L, 2] and first tokens [L]."""
    sizes = torch.tensor(SHAPES)
    return sizes.to(device), torch.cat((torch.zeros(1, dtype=torch.int64), sizes.prod(1).cumsum(0)[:-1])).to(device)


def samples(batch: int = 2, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Value, 6-D locations (some outside) and softmaxed weights of 6 queries, 4 heads of 8 channels and 2 points, all of them leaves."""
    shapes, queries, heads, channels, points = SHAPES, 6, 4, 8, 2
    tokens = sum(h * w for h, w in shapes)
    value = torch.randn(batch, tokens, heads, channels)
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2) * 1.4 - 0.2
    weights = torch.randn(batch, queries, heads, len(shapes), points).flatten(3).softmax(-1).unflatten(3, (len(shapes), points))
    value, locations, weights = (t.to(device).requires_grad_() for t in (value, locations, weights))
    return value, locations, weights


def perturb(model: nn.Module) -> None:
    """Random parameters: initial offsets are whole pixels, where gradients of positions jump."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def gradients(function: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradients of a random weighted sum of it; None where nothing depends on a leaf."""
    out = function()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)


def assert_same(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Equal to 1e-5 of each entry or of the largest, whose terms may cancel in others; None only where the other has None."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            largest = theirs.abs().max().item() if theirs.numel() else 0.0
            torch.testing.assert_close(ours, theirs, atol=1e-5 * max(1.0, largest), rtol=1e-5)
