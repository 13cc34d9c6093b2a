"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: kernels then run on CPU tensors, and nothing else uses it here


def _data_root() -> Path:
    return Path(os.environ.get("SSOD_FAST_DATA", ROOT.parent / "shared")).resolve()


def _require(path: Path) -> Path:
    if path.exists():
        return path
    message = f"{path} is missing: set SSOD_FAST_DATA to the folder that holds data/ and weights/"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def bccd() -> Path:
    """Folder of the BCCD set: images/ and annotations/instances_{train,val,test}.json."""
    return _require(_data_root() / "data" / "bccd")


@pytest.fixture(scope="session")
def backbone_weights() -> Path:
    """ImageNet MobileNetV2 backbone as a safetensors file."""
    return _require(_data_root() / "weights" / "mobilenet_v2_imagenet_backbone_fp16.safetensors")


@pytest.fixture
def fill_uninitialised() -> Iterator[None]:
    """Deterministic mode: fresh memory holds NaN, so an output that is not fully written shows."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(previous)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests run wherever a GPU is, and only there."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
