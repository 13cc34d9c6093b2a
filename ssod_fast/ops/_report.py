"""The table behind `ssod-fast ops`: what each op runs on here, how it was built, versions, GPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ._registry import EXTENSIONS, op_statuses


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    rows = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        rows.append({"name": p.name, "arch": f"sm_{p.major}{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)})
    return rows


def _extension(name: str) -> str:
    spec = importlib.util.find_spec(f"ssod_fast.{name}")
    return "not built" if spec is None else str(spec.origin)


def collect() -> dict[str, Any]:
    """Everything the table prints, as plain JSON types."""
    return {
        "versions": {
            "ssod_fast": _version("ssod_fast"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{p: _version(p) for p in ("torchvision", "triton", "numpy")},
        },
        "extensions": [
            {"name": e.name, "loaded": e.loaded, "build": e.build, "file": _extension(e.name), "error": e.error} for e in EXTENSIONS
        ],
        "gpus": _gpus(),
        "ops": [{"name": s.name, "cpu": s.cpu, "cuda": s.cuda} for s in op_statuses()],
    }


_FOOTER = """
C++, CUDA, Triton: kernels. composed: nothing but calls of other ops of this table, whose kernels do the work.
reference: plain PyTorch, right on any device but slower."""


def format_table(info: dict[str, Any]) -> str:
    """The same as text."""
    lines = ["  ".join(f"{k} {v}" for k, v in info["versions"].items() if v)]
    for e in info["extensions"]:
        state = f"loaded ({e['build']})" if e["loaded"] else f"not loaded ({(e['error'] or '').splitlines()[0]})"
        lines.append(f"ssod_fast.{e['name']}: {state}  {e['file']}")
    lines += [f"GPU: {g['name']} {g['arch']} {g['memory_gib']} GiB" for g in info["gpus"]] or ["GPU: none"]
    width = max([len(o["name"]) for o in info["ops"]], default=2) + 2
    lines.append(f"\n{'op':<{width}}{'CPU':<12}{'GPU':<12}")
    lines += [f"{o['name']:<{width}}{o['cpu']:<12}{o['cuda']:<12}" for o in info["ops"]]
    lines.append(_FOOTER)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the table, or JSON with --json. Exits with 2 for other options, as argparse does."""
    parser = argparse.ArgumentParser("python -m ssod_fast.ops", description="What each op runs on here: paste it into bug reports.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args(argv).json
    info = collect()
    print(json.dumps(info, indent=2) if as_json else format_table(info))
    return 0
