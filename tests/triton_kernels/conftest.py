"""Settings of the Triton tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter computes with numpy, which warns where a GPU divides by zero in silence."""
    for item in items:
        if "triton_kernels" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"))
