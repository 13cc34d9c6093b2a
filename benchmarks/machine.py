"""What a measurement ran on: device, versions, commit, measured memory bandwidth, and the peak memory of a call."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
BANDWIDTH_BYTES = {"cpu": 2**28, "cuda": 2**30}  # well beyond the last-level cache


@dataclass(frozen=True)
class Machine:
    """The device under test. `bandwidth` is in bytes per second, measured in this run."""

    kind: str
    device: str
    driver: str
    threads: int
    bandwidth: float
    commit: str
    date: str

    @property
    def slug(self) -> str:
        """File name of this machine kind's results."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")

    def columns(self, op: str) -> dict[str, Any]:
        """The columns of a row that describe the machine and the software."""
        return {
            "device": self.device,
            "threads": self.threads,
            "bandwidth_gib_s": self.bandwidth / 2**30,
            "driver": self.driver,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
            "triton": version("triton"),
            "ours_runs_on": backend(op, self.kind),
            "commit": self.commit,
            "date": self.date,
        }


def version(package: str) -> str:
    """Installed version of a package, empty if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def backend(op: str, kind: str) -> str:
    """What serves our op on this kind of device: `C++`, `CUDA`, `Triton` or `reference`; empty for names that are no op."""
    from ssod_fast.ops._registry import op_statuses

    return next((getattr(status, kind) for status in op_statuses() if status.name == op), "")


def describe(kind: str, threads: int) -> Machine:
    """Facts about the machine, with its bandwidth measured now.

    Raises:
        RuntimeError: `kind` is "cuda" and there is no CUDA device.
    """
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: no CUDA device is available")
    torch.set_num_threads(threads)
    name = torch.cuda.get_device_name() if kind == "cuda" else cpu_name()
    return Machine(
        kind=kind,
        device=name,
        driver=gpu_driver() if kind == "cuda" else f"{platform.system()} {platform.release()}",
        threads=threads,
        bandwidth=measured_bandwidth(torch.device(kind)),
        commit=commit(),
        date=datetime.now(timezone.utc).date().isoformat(),
    )


def cpu_name() -> str:
    """Processor model, number of cores and the widest vector extension that the kernels can dispatch to."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    number = re.search(r"^model\s*:\s*(\d+)", text, re.MULTILINE)
    cores = text.count("processor\t:") or 1
    vector = next((name for name in ("avx512f", "avx2") if name in text), "")
    name = model.group(1) if model else platform.processor() or platform.machine()
    return " ".join(filter(None, [name, f"model {number.group(1)}" if number else "", f"{cores} cores", vector]))


def gpu_driver() -> str:
    """Version of the NVIDIA driver and of the CUDA runtime that torch uses."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown driver"
    return f"{driver}, CUDA {torch.version.cuda}"


def commit() -> str:
    """Short hash of the checked-out commit; `-dirty` if a tracked source file differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!benchmarks/RESULTS.md")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def measured_bandwidth(device: torch.device) -> float:
    """Bytes per second of the faster of a fill and a copy on warm pages: the limit that shares are reported against."""
    count = BANDWIDTH_BYTES[device.type] // 4
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)
    fill = min(_seconds(lambda: target.fill_(1.0), device) for _ in range(7))
    copy = min(_seconds(lambda: target.copy_(source), device) for _ in range(7))
    return max(4 * count / fill, 8 * count / copy)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that one call adds at its peak, its result included.

    On CUDA by the allocator's own counter. On Linux by the peak resident size of the process, which also sees scratch memory that
    no torch allocator knows of; resolution about 1 MiB. None where neither exists.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give freed heap back, or the call could reuse pages that are already resident
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak (VmHWM)
    except (AttributeError, OSError):
        return None
    before = _resident("VmRSS")
    result = call()
    peak = _resident("VmHWM")
    del result
    return max(0, peak - before)


def _resident(key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else 0
