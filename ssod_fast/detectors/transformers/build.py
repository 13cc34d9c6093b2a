"""Detectors of transformers by name: a family's architecture, or a checkpoint in a local folder. Nothing is downloaded."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..options import check_options
from ..protocol import PixelStats, near
from ..weights import WeightsFile
from .families import FAMILIES, UNIT
from .take_over import from_transformers, require_transformers, start_rare

HF = "hf:"
_CONFIG, _WEIGHTS, _PROCESSOR = "config.json", "*.safetensors", "preprocessor_config.json"
_ADAPTER_OPTIONS = frozenset({"patch", "pixel_mean", "pixel_std"})
_DEEP_STAGE = re.compile(r"\bstages\.[123]\.")
# What num_classes decides, and what says nothing about a network.
_NOT_OPTIONS = frozenset({"id2label", "label2id", "problem_type", "architectures", "transformers_version", "return_dict", "dtype"})


def build_hf(name: str, num_classes: int, file: WeightsFile | None, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A detector of transformers.

    Args:
        name: one of `FAMILIES`, which is built from its config with random weights; or a folder with config.json and safetensors files, as
            `model.save_pretrained(folder)` writes it.
        num_classes: without background. Layers that depend on it start untrained where a checkpoint has another number.
        file: of a classification network; None, because backbones of transformers have other names.
        options: fields of the family's config (`num_queries=100`), networks inside as mappings with their `model_type`; `patch`, and
            `pixel_mean` and `pixel_std` in units of 0..255, as for :func:`~ssod_fast.detectors.from_transformers`; for a folder also
            `config`, a whole config, with which the folder is not read at all and weights are random. `auxiliary_loss` is True by default.

    Returns:
        The detector, and options from which the same is built without the folder.

    Raises:
        ImportError: transformers is missing or too old.
        ValueError: unknown name or option, with the nearest ones; weights of a backbone; or a folder that holds something else, or less.
    """
    if file is not None:
        raise ValueError(f"{HF}{name} takes no backbone_weights: give weights of the whole detector, or a folder with a checkpoint")
    require_transformers()
    if name in FAMILIES:
        return _from_family(name, num_classes, options)
    if "config" not in options and not Path(name).is_dir():
        raise ValueError(
            f"unknown detector {HF + name!r}{near(name, list(FAMILIES))}: expected {HF}NAME with one of {', '.join(FAMILIES)}, or "
            f"{HF}FOLDER with a folder that holds {_CONFIG} and {_WEIGHTS}; nothing is downloaded"
        )
    return _from_folder(Path(name), num_classes, options)


def _from_family(name: str, num_classes: int, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    values = {"auxiliary_loss": True, **FAMILIES[name].defaults, **options}
    config = _config(name, {"model_type": name}, num_classes, values)
    return _adapted(_untrained(config), num_classes, values, None), values


def _from_folder(folder: Path, num_classes: int, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    values = {"auxiliary_loss": True, **options}
    if "config" in options:
        base = dict(values.pop("config"))
        _check_kind(base, f"option config of {HF}{folder}")
        model = _untrained(_config(f"{HF}{folder}", base, num_classes, values))
        stats = None
    else:
        base = _read_json(folder / _CONFIG)
        _check_kind(base, str(folder / _CONFIG))
        model = _trained(folder, _config(f"{HF}{folder}", base, None, values))
        stats = _folder_stats(folder, FAMILIES[base["model_type"]].pixel_stats)
    detector: Any = _adapted(model, num_classes, values, stats)
    adapter = {
        "pixel_mean": list(detector.pixel_stats.mean),
        "pixel_std": list(detector.pixel_stats.std),
        "patch": values.get("patch", True),
    }
    return detector, {"config": json.loads(detector.model.config.to_json_string()), **adapter}


def _adapted(model: nn.Module, num_classes: int, values: Mapping[str, Any], stats: PixelStats | None) -> nn.Module:
    given = _given_stats(values)
    detector = from_transformers(model, num_classes, patch=values.get("patch", True), pixel_stats=stats if given is None else given)
    return detector.train()  # models of transformers come out of files in eval mode


def _given_stats(values: Mapping[str, Any]) -> PixelStats | None:
    mean, std = values.get("pixel_mean"), values.get("pixel_std")
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError(f"pixel_mean and pixel_std must be given together, got {mean!r} and {std!r}")
    return PixelStats(tuple(mean), tuple(std))


def _config(name: str, base: Mapping[str, Any], num_classes: int | None, values: Mapping[str, Any]) -> Any:
    """A config of transformers from a mapping and options in it.

    Args:
        name: for messages.
        base: with the `model_type`.
        num_classes: None for those of `base`.
        values: options.
    """
    from transformers import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[base["model_type"]]
    fields = {field.name for field in dataclasses.fields(kind)} - _NOT_OPTIONS
    check_options(values, fields | _ADAPTER_OPTIONS, name)
    merged = {**base, **{key: value for key, value in values.items() if key in fields}}
    _check_local(merged, name)
    try:
        config = kind.from_dict(merged)
    except Exception as error:  # the checks of transformers raise errors of their own
        raise ValueError(f"{name} cannot be configured so: {_one_line(error)}") from error
    if num_classes is not None:
        config.num_labels = num_classes
    return config


def _check_kind(base: Mapping[str, Any], where: str) -> None:
    kind = base.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{where} must have a model_type of {', '.join(FAMILIES)}, got {kind!r}")


def _check_local(config: Mapping[str, Any], name: str) -> None:
    """Refuses configs for which transformers would ask its hub what the backbone is."""
    backbone = config.get("backbone")
    timm = config["model_type"] == "deformable_detr" and config.get("use_timm_backbone", True)
    if isinstance(backbone, str) and config.get("backbone_config") is None and not timm:
        raise ValueError(f"{name} must have a backbone_config, got the name {backbone!r} of a backbone, which would have to be downloaded")


def _model_class(config: Any) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[config.model_type].model)


def _untrained(config: Any) -> nn.Module:
    try:
        model: nn.Module = _model_class(config)(config)
    except ImportError as error:
        raise ValueError(f"{config.model_type} cannot be built: {_one_line(error)}; choose another backbone_config") from error
    start_rare(model)
    _backbone(model).requires_grad_(True)  # random weights are worth nothing; transformers freezes some
    return model


def _trained(folder: Path, config: Any) -> nn.Module:
    """The model of a folder in float32, with all its weights.

    Raises:
        ValueError: files are missing or do not fit.
    """
    if not any(folder.glob(_WEIGHTS)):
        raise ValueError(f"{folder} must hold {_WEIGHTS}, got {_listing(folder)}")
    try:
        model, report = _model_class(config).from_pretrained(
            folder, config=config, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # safetensors, transformers and torch raise errors of their own
        raise ValueError(f"{folder} cannot be loaded: {_one_line(error)}") from error
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise ValueError(f"{folder} lacks {len(lacking)} tensors of {type(model).__name__}: {', '.join(lacking[:8])}")
    _train_deep_stages(model)
    return model  # type: ignore[no-any-return]


def _backbone(model: Any) -> nn.Module:
    return model.model.backbone  # type: ignore[no-any-return]


def _train_deep_stages(model: Any) -> None:
    """Trains the three deepest stages of a ResNet of transformers in its Deformable DETR, as published.

    transformers means to freeze the rest, but looks for the three under names that its ResNets do not have, and `from_pretrained` then
    makes it all trainable.
    """
    if model.config.model_type == "deformable_detr" and getattr(model.config.backbone_config, "model_type", None) == "resnet":
        for name, weight in _backbone(model).named_parameters():
            weight.requires_grad_(_DEEP_STAGE.search(name) is not None)


def _folder_stats(folder: Path, default: PixelStats) -> PixelStats:
    """What the image processor of a checkpoint normalises with, in units of 0..255."""
    path = folder / _PROCESSOR
    if not path.is_file():
        return default
    processor = _read_json(path)
    scale = 1 / processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not processor.get("do_normalize", default != UNIT):
        return PixelStats((0.0, 0.0, 0.0), (scale, scale, scale))
    if mean is None or std is None:
        return default
    return PixelStats(_scaled(mean, scale), _scaled(std, scale))


def _scaled(values: Sequence[float], scale: float) -> tuple[float, float, float]:
    red, green, blue = (float(value) * scale for value in values)
    return red, green, blue


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} must hold {path.name}, got {_listing(path.parent)}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no json: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a json object, got {type(content).__name__}")
    return content


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
