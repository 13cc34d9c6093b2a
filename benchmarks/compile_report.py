"""What the CUDA compiler makes of each kernel: registers, spills, shared memory.

    python benchmarks/compile_report.py [--archs 80,90] [--out benchmarks/results/ptxas.csv] [FILE.cu ...]

Needs the CUDA toolkit and no GPU. The flags are those of setup.py. Spilled registers are the first thing to look at when a kernel is
slower than its bytes allow, so the report marks and counts them.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import runpy
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\w+)'")
STACK = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
USED = re.compile(r"Used (?P<registers>\d+) registers(?:.*?(?P<smem>\d+) bytes smem)?")


@dataclass(frozen=True)
class Usage:
    """Resources of one kernel on one architecture; memory in bytes, shared memory without what the launch adds."""

    file: str
    kernel: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared_memory: int
    nvcc: str


def build_settings() -> dict[str, Any]:
    """The names that setup.py defines, without building anything."""
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, SSOD_FAST_BUILD="none"):
        return runpy.run_path(str(ROOT / "setup.py"))


def parse(log: str) -> Iterator[dict[str, str]]:
    """The records of `ptxas -v`: entry function, stack and spills, registers and shared memory."""
    record: dict[str, str] = {}
    for line in log.splitlines():
        if found := ENTRY.search(line):
            record = found.groupdict()
        elif found := STACK.search(line):
            record |= found.groupdict()
        elif record and (found := USED.search(line)):
            yield record | {key: value or "0" for key, value in found.groupdict().items()}
            record = {}


def readable(names: list[str]) -> list[str]:
    """Demangled names without the parameter list: template arguments tell the variants apart."""
    if not names:
        return []
    filtered = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return [_without_parameters(name.replace("(anonymous namespace)::", "").removeprefix("void ")) for name in filtered]


def _without_parameters(name: str) -> str:
    """Cuts at the first parenthesis outside of the template arguments, which may hold casts such as `(Mode)2`."""
    depth = 0
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:i]
    return name


def compile_file(path: Path, arch: str, settings: dict[str, Any]) -> list[Usage]:
    """Compiles one file for one architecture with the flags of the build.

    Raises:
        SystemExit: nvcc fails; its messages are printed.
    """
    from torch.utils.cpp_extension import include_paths

    home = settings["find_cuda_home"]()
    if home is None:
        raise SystemExit("no CUDA toolkit was found: set CUDA_HOME to the folder that holds include/cuda_runtime.h")
    nvcc = str(home / "bin" / "nvcc")
    includes = [f"-I{folder}" for folder in (ROOT / "csrc", home / "include", *include_paths())]
    with tempfile.TemporaryDirectory() as folder:
        target = ["-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", "-o", str(Path(folder) / "kernel.cubin"), str(path)]
        done = subprocess.run([nvcc, *settings["NVCC_FLAGS"], *includes, *target], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{path}: nvcc failed\n{done.stderr}")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V([\d.]+)", version)
    records = sorted(parse(done.stderr), key=lambda record: record["name"])
    names = readable([record["name"] for record in records])
    return [usage(path, name, record, release.group(1) if release else "") for name, record in zip(names, records, strict=True)]


def usage(path: Path, name: str, record: dict[str, str], nvcc: str) -> Usage:
    """One parsed record as a row."""
    return Usage(
        file=path.name,
        kernel=name,
        arch=record["arch"],
        registers=int(record["registers"]),
        stack=int(record["stack"]),
        spill_stores=int(record["stores"]),
        spill_loads=int(record["loads"]),
        shared_memory=int(record["smem"]),
        nvcc=nvcc,
    )


def write(path: Path, rows: list[Usage]) -> None:
    """One csv line per kernel and architecture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Usage)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
    parser.add_argument("--archs", default="80,90")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ptxas.csv")
    args = parser.parse_args()
    settings = build_settings()
    rows = [row for path in args.files for arch in args.archs.split(",") for row in compile_file(path, arch, settings)]
    write(args.out, rows)
    spilled = [row for row in rows if row.spill_stores or row.spill_loads]
    for row in rows:
        mark = "  SPILLS" if row in spilled else ""
        print(f"{row.arch} {row.registers:4d} registers {row.shared_memory:6d} B shared  {row.kernel}{mark}")
    print(f"{len(rows)} kernels, {len(spilled)} with spills, written to {args.out}")


if __name__ == "__main__":
    main()
