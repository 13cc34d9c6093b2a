"""`ssod-fast train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from ssod_fast.methods import METHODS
from ssod_fast.training.config import TrainConfig, config_from_tree, read_tree, refuse_overridden, split_method
from ssod_fast.training.tree import ConfigError

from .output import Output

# Short names of options that live in the method.
ALIASES = {"--thr": "--method.cls-pseudo-thr", "--burn-in": "--method.burn-in"}
DESCRIPTION = (
    f"Trains a detector on labelled and unlabelled images. --method {{{','.join(METHODS)}}} chooses the method and its options, the family "
    "of --model (own: and hf: are detection transformers) the optimizer; defaults shown here are those of the choices made. "
    "--config RUN.yaml starts from a written config, --thr and --burn-in are short for the options of the method, --resume and --no-resume "
    "for --resume yes and no."
)
SWITCHES = {"--resume": ("--resume", "yes"), "--no-resume": ("--resume", "no")}


def parse_train(arguments: Sequence[str]) -> TrainConfig[Any]:
    """The config of `ssod-fast train`: defaults < preset of the method < --config < command line.

    Which options exist depends on --method, so that and --config are read before tyro sees the rest.

    Raises:
        ConfigError: a config file that cannot be used, or a setting that another one decides.
        SystemExit: help was printed (0), or options are wrong (2).
    """
    rest, early = _take(list(arguments), ("--method", "--config"))
    tree: dict[str, Any] = read_tree(Path(early["--config"])) if "--config" in early else {}
    name, options = split_method(tree.get("method", "mixpl"))
    if early.get("--method", name) != name:
        name, options = early["--method"], {}  # options of another method mean nothing here
    model = _peek(rest, "--model")
    default = config_from_tree({"labeled": ".", **tree, "method": {"name": name, **options}, **({"model": model} if model else {})})
    if "labeled" not in tree:
        default = dataclasses.replace(default, labeled=tyro.MISSING)
    kind: Any = TrainConfig
    parsed: TrainConfig[Any] = tyro.cli(
        kind[type(default.method)],
        prog="ssod-fast train",
        description=DESCRIPTION,
        args=_expand(rest),
        default=default,
    )
    refuse_overridden(parsed, default.method)
    return parsed


def _take(arguments: list[str], names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Splits off `--name value` and `--name=value`."""
    rest: list[str] = []
    found: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in names:
            rest.append(word)
            continue
        taken = value if equals else next(words, None)
        if taken is None or (not equals and taken.startswith("--")):
            raise ConfigError(f"{name} needs a value")
        found[name] = taken
    return rest, found


def _peek(arguments: Sequence[str], name: str) -> str | None:
    """The value of an option that stays where it is."""
    for word, following in zip(arguments, [*arguments[1:], None], strict=False):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _expand(arguments: Sequence[str]) -> list[str]:
    """Replaces short names by the options that they stand for."""
    words: list[str] = []
    for i, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        following = arguments[i + 1] if i + 1 < len(arguments) else ""
        if word in SWITCHES and following not in ("auto", "yes", "no"):
            words += SWITCHES[word]
        else:
            words.append(ALIASES.get(name, name) + equals + value)
    return words


def run(arguments: list[str], output: Output) -> int:
    """Trains; 130 if it was interrupted."""
    config = parse_train(arguments)
    from ssod_fast.training.trainer import train  # after the options: help comes up at once

    result = train(config, quiet=output.quiet)
    output.result({**dataclasses.asdict(result), "folder": str(result.folder)}, "")
    return 130 if result.status == "interrupted" else 0
