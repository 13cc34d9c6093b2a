"""The switch for sums in a fixed order, as it arrives at the backward ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deform_cases import fused_inputs, random_case
from torch.utils._python_dispatch import TorchDispatchMode

from ssod_fast.ops import ms_deform_attn_fused
from ssod_fast.ops.ms_deform_attn import ms_deform_attn_gradients


class Switches(TorchDispatchMode):
    """Collects the last argument of every backward of deformable attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ssod_fast" and "backward" in func.__name__:
            self.seen.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[False, True])
def switch(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Torch's own switch."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(previous)


@pytest.mark.parametrize("given", [None, False, True])
def test_given_switch_wins_over_that_of_torch(given: bool | None, switch: bool) -> None:
    case = random_case().leaves()
    points, offsets, logits = fused_inputs(case)
    with Switches() as switches:
        case(deterministic=given).sum().backward()
        ms_deform_attn_gradients(torch.ones(2, 6, 12), *(case.value, case.shapes, case.locations, case.weights), deterministic=given)
        ms_deform_attn_fused(case.value, case.shapes, points, offsets, logits, deterministic=given).sum().backward()
    assert switches.seen == [switch if given is None else given] * 3


def test_default_follows_torch_at_the_time_of_the_backward() -> None:
    out = random_case().leaves()().sum()
    torch.use_deterministic_algorithms(True)
    try:
        with Switches() as switches:
            out.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert switches.seen == [True]
