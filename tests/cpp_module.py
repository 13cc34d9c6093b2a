"""Builds a module of tests/cpp, which exposes C++ headers of the package to pytest."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

from conftest import ROOT


def build(name: str, folder: Path) -> ModuleType:
    """Compiles tests/cpp/<name>.cpp into `folder`, without contraction into FMA as the package is, and imports it."""
    import pybind11  # here, so that GPU tests beside the caller are collected without it

    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    source = ROOT / "tests" / "cpp" / f"{name}.cpp"
    includes = [ROOT / "csrc", source.parent, pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [os.environ.get("CXX", "c++"), "-O1", "-std=c++20", "-ffp-contract=off", "-fPIC", "-shared", "-pthread"]
    command += ["-fvisibility=hidden", *(f"-I{path}" for path in includes)]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
