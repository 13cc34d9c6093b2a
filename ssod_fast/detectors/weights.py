"""Loads weights from files: whole detectors, and backbones trained for classification."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

_SHOWN = 8  # keys listed per kind in a message
# What a classification network has behind its features.
_CLASSIFIER = ("classifier.", "fc.", "head.", "avgpool.")


@dataclass(frozen=True)
class WeightsFile:
    """Tensors of a file by name, and what the file says about itself (safetensors only)."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def same_padding(self) -> bool:
        """Whether the file says that the network was trained with TensorFlow's "SAME" padding."""
        return "same padding" in self.metadata.get("arch", "").lower()


def read_weights(path: str | Path) -> WeightsFile:
    """Reads a .safetensors file, or a .pt / .pth file that holds a dict of tensors (nothing else is unpickled).

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: safetensors is needed and not installed.
        ValueError: another ending, a damaged file, or no dict of tensors in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"weights file must end in .safetensors, .pt or .pth, got {path.name}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch lets through whatever its unpickler meets: KeyError, EOFError, RuntimeError and more
        raise ValueError(f"weights file {path} cannot be read: {_first_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} must hold a dict of tensors (a state_dict), got {type(content).__name__}")
    return WeightsFile(path, content, {})


def _read_safetensors(path: Path) -> WeightsFile:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"{path.name} needs the package safetensors: pip install 'ssod_fast[train]'") from error
    try:
        with safe_open(path, framework="pt") as file:
            return WeightsFile(path, {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"weights file {path} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_backbone(network: nn.Module, file: WeightsFile) -> None:
    """Fills a torchvision classification network up to its classifier; half precision is widened.

    Args:
        network: for example `torchvision.models.mobilenet_v2()`.
        file: torchvision's names; tensors of the classifier may be there or not.

    Raises:
        ValueError: keys are missing, unknown or of another shape; the message lists them.
    """
    own = {name: value for name, value in network.state_dict().items() if not name.startswith(_CLASSIFIER)}
    given = {name: value for name, value in file.tensors.items() if not name.startswith(_CLASSIFIER)}
    _check_match(own, given, f"{file.path.name} does not fit {type(network).__name__}")
    network.load_state_dict({name: value.to(own[name].dtype) for name, value in given.items()}, strict=False)


def load_detector(detector: nn.Module, file: WeightsFile) -> None:
    """Fills a whole detector, strictly; half precision is widened.

    Args:
        detector: an adapter with a model of torchvision or transformers in `model`.
        file: names of the adapter's `state_dict()` or of the wrapped model's, old torchvision names included.

    Raises:
        ValueError: keys are missing, unknown or of another shape; the message lists them.
    """
    inner, own = getattr(detector, "model", None), detector.state_dict()
    # Models of transformers have a `model` inside themselves, so a prefix alone does not tell the two apart.
    target = inner if isinstance(inner, nn.Module) and not any(name in own for name in file.tensors) else detector
    try:
        target.load_state_dict(file.tensors)
    except RuntimeError as error:
        raise ValueError(f"{file.path.name} does not fit the detector: {error}") from error


def _check_match(own: dict[str, Tensor], given: dict[str, Tensor], headline: str) -> None:
    # Frozen and plain batch norm differ in this counter alone, and nothing depends on it.
    counters = {name for name in own.keys() ^ given.keys() if name.endswith("num_batches_tracked")}
    missing = sorted(own.keys() - given.keys() - counters)
    unknown = sorted(given.keys() - own.keys() - counters)
    other = [name for name in own.keys() & given.keys() if own[name].shape != given[name].shape]
    shapes = [f"{name} {list(given[name].shape)} instead of {list(own[name].shape)}" for name in sorted(other)]
    parts = [_listing(kind, keys) for kind, keys in (("missing", missing), ("unknown", unknown), ("other shape", shapes)) if keys]
    if parts:
        raise ValueError(f"{headline}: " + "; ".join(parts))


def _listing(kind: str, keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{len(keys)} {kind} ({', '.join(keys[:_SHOWN])}{more})"
