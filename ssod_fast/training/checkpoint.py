"""Checkpoints: `last.pt` resumes a run exactly, `best_*.safetensors` hold one detector and everything needed to rebuild it."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .files import atomic, previous

FORMAT = 1
FILE_KIND = "ssod_fast.detector"


def rng_state() -> dict[str, Any]:
    """States of the random generators of Python, NumPy and torch in this process, as plain types."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    numpy_state = {"name": name, "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)), "rest": [position, has_gauss, cached]}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restores :func:`rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy"]
    np.random.set_state((numpy_state["name"], numpy_state["keys"].numpy().astype(np.uint32), *numpy_state["rest"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def gather_ranks(value: Any) -> list[Any]:
    """The value of every rank, on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def save_last(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a resume checkpoint; the one before stays as `last.previous.pt`. A kill at any moment leaves a loadable file."""
    with atomic(path, keep_previous=True) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)


def load_last(path: Path) -> tuple[dict[str, Any], str | None]:
    """Reads the newest checkpoint that can be read.

    Returns:
        The state and, if the newest file is damaged, a sentence that says so.

    Raises:
        ValueError: neither the file nor the one before it can be read, or it is of another format.
    """
    note = None
    for candidate in (path, previous(path)):
        if not candidate.exists():
            continue
        try:
            state: dict[str, Any] = torch.load(candidate, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = (str(error).splitlines() or ["it ends too early"])[0]  # an EOFError has no text
            note = f"{candidate} is damaged ({reason[:100]})"
            continue
        if state.get("format") != FORMAT:
            raise ValueError(f"{candidate} has checkpoint format {state.get('format')}, this version reads {FORMAT}")
        return state, note and f"{note}: continuing from {candidate.name}"
    raise ValueError(f"no readable checkpoint at {path}" + (f": {note}" if note else ""))


def has_last(path: Path) -> bool:
    """Whether there is a checkpoint to resume from."""
    return path.exists() or previous(path).exists()


@dataclass(frozen=True)
class DetectorInfo:
    """What a detector file says about itself.

    Attributes:
        model: name for `build_detector`.
        model_options: keyword arguments for it.
        classes: class names by label.
        category_ids: category id of each label in the data set that it was trained on.
        views: options of the test view.
        which: "teacher" or "student".
        method: name of the training method.
        it: iterations trained.
        metrics: AP numbers of the evaluation that chose it; empty if it was not chosen by one.
    """

    model: str
    model_options: dict[str, Any]
    classes: list[str]
    category_ids: list[int]
    views: dict[str, Any]
    which: str
    method: str
    it: int
    metrics: dict[str, float]


def save_detector(path: Path, detector: nn.Module, info: DetectorInfo) -> None:
    """Writes weights and description into one safetensors file."""
    from safetensors.torch import save_file

    tensors = {
        name: value.detach().cpu().contiguous().clone() for name, value in detector.state_dict().items() if isinstance(value, Tensor)
    }
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"kind": FILE_KIND, "info": json.dumps(vars(info))})


def read_detector_info(path: Path) -> DetectorInfo:
    """The description in a detector file.

    Raises:
        ValueError: the file was not written by :func:`save_detector`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        hint = "; a detector is in weights/best_*.safetensors of a run folder, last.pt is for resuming alone"
        raise ValueError(f"{path} is not a readable safetensors file: {error}{hint}") from error
    if metadata.get("kind") != FILE_KIND:
        raise ValueError(f"{path} does not describe its detector: expected a best_*.safetensors of a run folder")
    return DetectorInfo(**json.loads(metadata["info"]))


def load_detector(path: Path) -> tuple[nn.Module, DetectorInfo]:
    """Rebuilds the detector of a file written by :func:`save_detector`; nothing is downloaded."""
    from safetensors.torch import load_file

    from ssod_fast.detectors import build_detector

    info = read_detector_info(path)
    detector: nn.Module = build_detector(info.model, len(info.classes), weights=None, backbone_weights=None, **info.model_options)
    detector.load_state_dict(load_file(path))
    return detector.eval(), info


def find_detector(path: Path, which: str | None = None) -> Path:
    """The detector file that a path given by a user means: the file itself, or the best one of a run folder.

    Args:
        path: file or run folder.
        which: "teacher" or "student"; None for the teacher if there is one.

    Raises:
        FileNotFoundError: nothing there; the message lists what was looked for.
    """
    if path.is_file():
        return path
    wanted = [f"best_{w}.safetensors" for w in ([which] if which else ["teacher", "student"])]
    for name in wanted:
        for folder in (path / "weights", path):
            if (folder / name).is_file():
                return folder / name
    raise FileNotFoundError(
        f"no detector at {path}: expected a .safetensors file, or a run folder with weights/{' or weights/'.join(wanted)}"
    )


def load_matching(detector: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Copies the tensors whose name and shape fit.

    Returns:
        Names of the detector's tensors that kept their values, so that a caller can list them.
    """
    own = detector.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    detector.load_state_dict(fitting, strict=False)
    return [name for name in own if name not in fitting]


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Sequence[str] = (), prefix: str = "") -> list[str]:
    """Dotted names of the settings that differ between two nested mappings, with both values."""
    rows: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        name, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        if name in ignore:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            rows += differing_keys(a, b, ignore, f"{name}.")
        elif a != b:
            rows.append(f"{name}: {a!r} -> {b!r}")
    return rows
