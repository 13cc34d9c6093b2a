"""Settings of the Triton tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssod_fast.ops._boxes import ZERO


def is_quick_on_a_gpu(item: pytest.Item) -> bool:
    """Every rule and dtype has kernels of its own to compile: on a GPU the default eps mode in float32 stands for all of them."""
    params: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    exhaustive = "rule" in params and (params["rule"].eps_mode != ZERO or "float64" in item.name)
    return not exhaustive and item.path.name != "test_gpu_compile.py"


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter computes with numpy, which warns where a GPU divides by zero in silence. Where a GPU is, these are tests of it."""
    for item in items:
        if "triton_kernels" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"))
            if torch.cuda.is_available() and is_quick_on_a_gpu(item):
                item.add_marker(pytest.mark.gpu)
