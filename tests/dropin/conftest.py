"""Fixtures of the drop-in tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
STANDINS = (
    "mmcv",
    "detrex",
    "groundingdino",
    "MultiScaleDeformableAttention",
    "standin_deformable_detr",
    "standin_ms_deform_attn",
    "standin_rtdetr",
)


@pytest.fixture
def standins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes packages importable that have the published surface of code that cannot be installed here; they are fresh in every test."""
    with_real = [name for name in STANDINS if name in sys.modules]
    assert not with_real, f"{with_real} would be mixed up with stand-ins"
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "standins"))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in STANDINS]:
        del sys.modules[name]


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of peers that are tested where somebody has put them."""
    folder = ROOT / ".peers"
    if not folder.is_dir():
        pytest.skip("there is no folder .peers with other packages")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("ultralytics")))  # its import writes settings and looks for a network
    monkeypatch.setenv("YOLO_OFFLINE", "True")
    return folder


@pytest.fixture
def bare_package(monkeypatch: pytest.MonkeyPatch) -> object:
    """Makes a package importable without running its __init__, which may want dependencies that are not here."""

    def enter(name: str, folder: Path) -> None:
        module = ModuleType(name)
        module.__path__ = [str(folder)]
        monkeypatch.setitem(sys.modules, name, module)

    return enter
