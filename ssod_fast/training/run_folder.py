"""The folder of a run: whether a command starts, continues or has finished it."""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from .checkpoint import differing_keys, has_last, load_last
from .config import FREE_KEYS, TrainConfig, tree_of, write_config
from .files import require_writable, write_json
from .tree import ConfigError

PACKAGES = ("ssod_fast", "torch", "torchvision", "triton", "numpy", "accelerate", "faster-coco-eval", "pycocotools", "tyro", "safetensors")
MARK = "metrics.jsonl"  # a folder with this file is a run's
# What a run leaves behind; --overwrite removes exactly this, nothing else that a user may have put there.
OUTPUTS = (
    "config.yaml",
    "env.json",
    "split.json",
    "results.csv",
    "metrics.jsonl",
    "predictions.json",
    "report.html",
    "weights",
    "plots",
    "pseudo_preview",
)


@dataclass(frozen=True)
class RunStart:
    """How a run begins.

    Attributes:
        kind: "new", "resume" or "finished".
        state: the checkpoint, unless new.
        notes: sentences to print.
    """

    kind: Literal["new", "resume", "finished"]
    state: dict[str, Any] | None
    notes: list[str]


def last_path(folder: Path) -> Path:
    """The resume checkpoint of a run."""
    return folder / "weights" / "last.pt"


def open_run(config: TrainConfig[Any]) -> RunStart:
    """Looks at the run folder and decides.

    Raises:
        ConfigError: it holds a run of other settings (the keys are listed), one that may not be continued, or files of somebody else.
        PermissionError: the folder cannot be written.
    """
    require_writable(config.folder)
    last = last_path(config.folder)
    foreign = [name for name in OUTPUTS if (config.folder / name).exists()]
    if foreign and not (config.folder / MARK).exists():
        raise ConfigError(f"{config.folder} holds {', '.join(foreign)}, which no run has written: choose another --name")
    if not has_last(last):
        return RunStart("new", None, [])
    if config.overwrite:
        return RunStart("new", None, [f"overwriting the run in {config.folder}"])
    if config.resume == "no":
        raise ConfigError(f"{config.folder} holds a run and --no-resume was given: use --overwrite to start anew, or another --name")
    state, note = load_last(last)
    changes = differing_keys(state["config"], tree_of(config), FREE_KEYS)
    if changes and config.resume != "yes":
        raise ConfigError(
            f"{config.folder} holds a run with other settings:\n  "
            + "\n  ".join(changes)
            + "\nuse --resume to continue it with the new ones, --overwrite to start anew, or another --name"
        )
    notes = [n for n in (note, *(f"changed on resume: {c}" for c in changes)) if n]
    kind: Literal["resume", "finished"] = "finished" if state["it"] >= config.iters else "resume"
    return RunStart(kind, state, notes)


def prepare(config: TrainConfig[Any], start: RunStart, split: dict[str, Any] | None = None) -> None:
    """Clears what an earlier run left if this one is new, and writes config, environment and the manifest of the drawn split."""
    folder = config.folder
    if start.kind == "new":
        for name in OUTPUTS:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    (folder / MARK).touch()
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    write_config(config, folder / "config.yaml")
    write_json(folder / "env.json", environment())
    if split is not None:
        write_json(folder / "split.json", split)


def environment() -> dict[str, Any]:
    """Versions, hardware and command of this process."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((row.partition(":")[2].strip() for row in rows if row.startswith("model name")), platform.processor())
