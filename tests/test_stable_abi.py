"""The shipped modules use the stable ABI only, so one wheel serves every torch >= 2.10 and Python >= 3.10."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import ssod_fast

PACKAGE = Path(ssod_fast.__file__).parent
LIMITED_API = {"PyModule_Create2", "PyModule_AddStringConstant"}


def undefined_symbols(library: Path) -> list[str]:
    nm = shutil.which("nm")
    assert nm, "nm (binutils) is needed; it comes with the C++ compiler"
    text = subprocess.run([nm, "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True).stdout
    return [line.split()[-1].partition("@")[0] for line in text.splitlines() if line.strip()]


def built_modules() -> list[Path]:
    modules = sorted(PACKAGE.glob("_C*.so"))
    assert any(m.name.startswith("_C.") for m in modules), f"the CPU module is not built in {PACKAGE}"
    return modules


@pytest.mark.parametrize("module", built_modules(), ids=lambda p: p.name)
def test_only_stable_symbols(module: Path) -> None:
    symbols = undefined_symbols(module)
    assert any(s.startswith(("aoti_torch_", "torch_")) for s in symbols), "the scan sees no torch symbol at all: it has lost its power"
    unstable = [s for s in symbols if s.startswith(("_ZN3c10", "_ZNK3c10", "_ZN2at", "_ZNK2at", "_ZN5torch", "_ZNK5torch"))]
    assert not unstable
    python = {s for s in symbols if s.startswith(("Py", "_Py"))}
    assert python <= LIMITED_API


@pytest.mark.parametrize("module", built_modules(), ids=lambda p: p.name)
def test_abi3_name(module: Path) -> None:
    assert module.name.endswith(".abi3.so")


def test_extensions_are_loaded() -> None:
    from ssod_fast.ops._registry import EXTENSIONS

    cpu = EXTENSIONS[0]
    assert cpu.loaded, cpu.error


def test_no_op_falls_back_to_the_reference_on_cpu() -> None:
    from ssod_fast.ops._registry import op_statuses

    slow = [s.name for s in op_statuses() if s.cpu == "reference"]
    assert not slow, f"no C++ kernel for {slow}"


def test_every_op_has_a_gpu_kernel() -> None:
    from ssod_fast.ops._registry import op_statuses

    slow = [s.name for s in op_statuses() if s.cuda == "reference"]
    assert not slow, f"no CUDA or Triton kernel for {slow}"
