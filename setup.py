"""Build of ssod_fast: two stable-ABI extension modules, `_C` (CPU) and `_C_cuda`.

SSOD_FAST_BUILD   auto (default) builds CUDA when a toolkit that fits torch is found; cuda insists on it; cpu never builds it; none builds
                  no extension.
TORCH_CUDA_ARCH_LIST, where set, replaces our own list of GPU architectures.
"""

import os
import re
import shutil
from pathlib import Path

from packaging.version import Version
from setuptools import setup

ROOT = Path(__file__).resolve().parent
MIN_TORCH = "2.10"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10: one wheel for this torch and every newer one
ARCHS = ("8.0", "9.0+PTX")
# No FMA contraction: IoU of valid boxes stays bit-equal to eager torchvision. The other flags change no result: nobody reads floating-point
# traps or errno, and compilers do not vectorise selects as long as somebody might, nor once jump threading has made branches of them.
FP_FLAGS = ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fno-thread-jumps"]
CXX_FLAGS = ["-O3", "-std=c++20", "-g0", "-fvisibility=hidden", *FP_FLAGS, "-Wall", STABLE_ABI]
NVCC_FLAGS = ["-O3", "-std=c++20", "--fmad=false", "-Xcompiler=-fvisibility=hidden", "-Xcompiler=-g0", "-DUSE_CUDA", STABLE_ABI]


def find_cuda_home() -> Path | None:
    """The toolkit folder that holds include/cuda_runtime.h, also where nvcc is a wrapper script outside of it."""
    candidates = [Path(os.environ[k]) for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(Path(nvcc).resolve().parent.parent)
    candidates.append(Path("/usr/local/cuda"))
    candidates += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    for home in candidates:
        if (home / "include" / "cuda_runtime.h").is_file() and (home / "bin" / "nvcc").is_file():
            return home
    return None


def misfit(home: Path) -> str | None:
    """Why torch cannot be extended with this toolkit, or None if it can."""
    import torch

    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    header = home / "include" / "cuda_runtime_api.h"
    found = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text()) if header.is_file() else None
    major = int(found[1]) // 1000 if found else None
    if major != int(torch.version.cuda.split(".")[0]):
        return f"it is CUDA {major or 'of unknown version'}, torch is built with CUDA {torch.version.cuda}"
    return None


def sources(folder: str, pattern: str) -> list[str]:
    """Paths of one backend's files, relative to the root, in a stable order."""
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).glob(pattern))


def build_kind() -> str:
    """The value of SSOD_FAST_BUILD, checked."""
    kind = os.environ.get("SSOD_FAST_BUILD", "auto")
    if kind not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(f"SSOD_FAST_BUILD must be auto, cuda, cpu or none, got {kind!r}")
    return kind


def extensions() -> tuple[list, dict]:
    """Extension modules and command classes for this machine."""
    kind = build_kind()
    if kind == "none":
        return [], {}
    home = None if kind == "cpu" else find_cuda_home()
    if kind == "cuda" and home is None:
        raise SystemExit(
            "SSOD_FAST_BUILD=cuda, but no CUDA toolkit was found: set CUDA_HOME to the folder that holds include/cuda_runtime.h"
        )
    if kind == "auto" and home is not None and (reason := misfit(home)):
        print(f"ssod_fast: no CUDA kernels, the toolkit in {home} does not fit: {reason}")
        home = None
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)  # before torch.utils.cpp_extension makes its own guess

    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    if Version(torch.__version__).release < Version(MIN_TORCH).release:
        raise SystemExit(f"ssod_fast needs torch >= {MIN_TORCH} to build, found {torch.__version__}")
    mods = [
        CppExtension(
            "ssod_fast._C",
            ["csrc/library.cpp", *sources("csrc/cpu", "*.cpp")],
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": CXX_FLAGS},
            py_limited_api=True,
        )
    ]
    if home is not None:
        # An empty list counts as none: torch would look for a GPU then, and fail without one.
        archs = os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(ARCHS)
        shown = "_".join(archs.replace(";", " ").split())  # a macro cannot hold the semicolons
        mods.append(
            CUDAExtension(
                "ssod_fast._C_cuda",
                ["csrc/cuda/library.cpp", *sources("csrc/cuda", "*.cu")],
                include_dirs=[str(ROOT / "csrc")],
                extra_compile_args={"cxx": [*CXX_FLAGS, "-DUSE_CUDA", f"-DSSOD_FAST_ARCHS={shown}"], "nvcc": NVCC_FLAGS},
                py_limited_api=True,
            )
        )
    return mods, {"build_ext": BuildExtension}


ext_modules, cmdclass = extensions()
setup(
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    package_dir={"ssod_fast.kernels": "kernels"},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
