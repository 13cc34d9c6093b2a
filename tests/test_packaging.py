"""The wheel is abi3, carries kernels/ once as ssod_fast.kernels, and imports cleanly from anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PROBE = "import sys, ssod_fast, ssod_fast.kernels as k; print(ssod_fast.__file__); print(k.__file__); assert 'kernels' not in sys.modules"


def run(args: list[str], cwd: Path, **env: str) -> str:
    done = subprocess.run(args, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(out)], cwd=ROOT)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)], cwd=target)
    return target


def test_wheel_is_abi3(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name


def test_wheel_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "ssod_fast/_C.abi3.so" in names
    assert "ssod_fast/py.typed" in names
    assert names.count("ssod_fast/kernels/__init__.py") == 1
    kernels = {Path(p).name for p in (ROOT / "kernels").glob("*.py")}
    assert {Path(n).name for n in names if n.startswith("ssod_fast/kernels/")} == kernels
    top = {n.split("/")[0] for n in names}
    assert top == {"ssod_fast", next(t for t in top if t.endswith(".dist-info"))}


def setup_output(code: str, **env: str) -> str:
    """What `code` prints after setup.py has handed its arguments over as `arguments`; stderr where it exits."""
    probe = f"import os, runpy, setuptools\narguments = {{}}\nsetuptools.setup = arguments.update\nrunpy.run_path('setup.py')\n{code}"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else done.stderr


def test_kinds_of_build() -> None:
    names = "print([e.name for e in arguments['ext_modules']])"
    assert setup_output(names, SSOD_FAST_BUILD="none") == "[]\n"
    assert setup_output(names, SSOD_FAST_BUILD="cpu") == "['ssod_fast._C']\n"
    assert "SSOD_FAST_BUILD must be auto, cuda, cpu or none, got 'gpu'" in setup_output(names, SSOD_FAST_BUILD="gpu")


@pytest.mark.parametrize(("given", "used"), [("", "8.0;9.0+PTX"), ("9.0", "9.0")])
def test_architectures(given: str, used: str, tmp_path: Path) -> None:
    for path in ("include/cuda_runtime.h", "bin/nvcc"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).touch()
    code = "print([e.name for e in arguments['ext_modules']], os.environ['TORCH_CUDA_ARCH_LIST'])"
    output = setup_output(code, SSOD_FAST_BUILD="cuda", CUDA_HOME=str(tmp_path), TORCH_CUDA_ARCH_LIST=given)
    assert output == f"['ssod_fast._C', 'ssod_fast._C_cuda'] {used}\n"


@pytest.mark.parametrize(
    ("header", "reason"), [("#define CUDART_VERSION 9020\n", "it is CUDA 9, torch"), ("", "it is CUDA of unknown version")]
)
def test_a_toolkit_that_does_not_fit_torch_is_left_alone(header: str, reason: str, tmp_path: Path) -> None:
    for path, text in (("include/cuda_runtime.h", ""), ("bin/nvcc", ""), ("include/cuda_runtime_api.h", header)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    output = setup_output("print([e.name for e in arguments['ext_modules']])", SSOD_FAST_BUILD="auto", CUDA_HOME=str(tmp_path))
    if torch.version.cuda is None:
        reason = "this torch is built without CUDA"
    assert f"ssod_fast: no CUDA kernels, the toolkit in {tmp_path} does not fit: {reason}" in output
    assert output.endswith("['ssod_fast._C']\n")


def test_source_distribution_can_build(tmp_path: Path) -> None:
    run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)], cwd=ROOT, SSOD_FAST_BUILD="none")
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    for source in [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "kernels").glob("*.py")]:
        assert str(source.relative_to(ROOT)) in names


@pytest.mark.parametrize("place", ["/", "site"])
def test_installed_wheel_imports(site: Path, place: str) -> None:
    cwd = Path("/") if place == "/" else site
    out = run([sys.executable, "-c", PROBE], cwd=cwd, PYTHONPATH=str(site))
    assert all(line.startswith(str(site)) for line in out.splitlines())


def test_installed_wheel_registers_its_kernels(site: Path) -> None:
    out = run([sys.executable, "-m", "ssod_fast.ops"], cwd=Path("/"), PYTHONPATH=str(site))
    assert "box_iou" in out
    assert "C++" in out


@pytest.mark.parametrize("cwd", [Path("/"), ROOT], ids=["root folder", "source tree"])
def test_editable_install_imports(cwd: Path) -> None:
    out = run([sys.executable, "-c", PROBE], cwd=cwd)
    assert all("ssod_fast" in line for line in out.splitlines())


def test_import_is_pure(tmp_path: Path) -> None:
    """Importing writes nothing, opens no socket, starts no process and loads none of the [train] extra."""
    code = (
        "import sys\n"
        "import torch, numpy, torch._dynamo\n"
        "seen = []\n"
        "def hook(event, args):\n"
        "    writes = event == 'open' and isinstance(args[1], str) and set(args[1]) & set('wax+')\n"
        "    if writes or event.startswith(('socket.', 'subprocess.')):\n"
        "        seen.append((event, args))\n"
        "sys.dont_write_bytecode = True\n"
        "sys.addaudithook(hook)\n"
        "import ssod_fast, ssod_fast.ops, ssod_fast.kernels\n"
        "assert not seen, seen\n"
        "extras = {'accelerate', 'tyro', 'yaml', 'rich', 'matplotlib', 'faster_coco_eval', 'pycocotools', 'transformers'}\n"
        "assert not extras & set(sys.modules), extras & set(sys.modules)\n"
    )
    run([sys.executable, "-c", code], cwd=tmp_path)
    assert not list(tmp_path.iterdir())
