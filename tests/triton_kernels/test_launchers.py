"""Every launcher that an op is registered with exists, with as many arguments as the op has."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from ssod_fast.ops import _registry

SOURCES = Path(_registry.__file__).parent.glob("*.py")
REGISTERED = [
    found
    for path in sorted(SOURCES)
    for found in re.findall(r'^    f?"([\w.]+)\(.*?triton=launcher\("(\w+)", "(\w+)"\)', path.read_text(), flags=re.M | re.S)
]


def test_all_launchers_are_looked_at() -> None:
    assert len(REGISTERED) == 27


@pytest.mark.parametrize(("op", "module", "name"), REGISTERED)
def test_a_launcher_takes_what_its_op_takes(op: str, module: str, name: str) -> None:
    function = getattr(importlib.import_module(f"ssod_fast.kernels.{module}"), name)
    packet, _, overload = op.partition(".")
    schema = getattr(getattr(torch.ops.ssod_fast, packet), overload or "default")._schema
    inspect.signature(function).bind(*schema.arguments)
