"""Makes the fake run writer importable by the tests of this folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def write_run() -> Callable[..., Path]:
    """`fake_run.write_run`."""
    spec = importlib.util.spec_from_file_location("fake_run", Path(__file__).with_name("fake_run.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_run
