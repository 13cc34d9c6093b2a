"""Dataclasses to and from plain trees (what YAML holds), with errors that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it."""


def to_tree(value: Any) -> Any:
    """Dataclasses become mappings, tuples lists, paths strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_tree(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_tree(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def from_tree(kind: type[T], tree: Any, key: str = "", types_of: Mapping[str, Any] | None = None) -> T:
    """Builds a dataclass; fields that the tree leaves out keep their defaults.

    Args:
        kind: a dataclass.
        tree: mapping of its fields.
        key: dotted name for messages.
        types_of: types of fields that the class leaves open.

    Raises:
        ConfigError: unknown key (the nearest name is offered), missing key, a value of another type, or one that the class refuses.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{key or 'the config'} must be a mapping, got {tree!r}")
    hints = {**get_type_hints(kind), **(types_of or {})}
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in tree:
        if name not in fields:
            raise ConfigError(f"unknown key {_join(key, name)!r}{nearest(str(name), list(fields))}")
    values = {name: convert(hints[name], value, _join(key, name)) for name, value in tree.items()}
    required = (f for f in fields.values() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)
    missing = [_join(key, f.name) for f in required if f.name not in values]
    if missing:
        raise ConfigError(f"missing key {', '.join(missing)}")
    try:
        return kind(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{key}: {error}" if key else str(error)) from error


def convert(hint: Any, value: Any, key: str) -> Any:
    """A plain value as the type `hint`.

    Raises:
        ConfigError: it is of another type; the message has the key, what is expected and what was got.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_tree(hint, value, key)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, key)
    if origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
            if len(kinds) == len(value):
                return tuple(convert(k, v, f"{key}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is Any or (isinstance(hint, type) and type(value) is hint):  # bool is no int here
        return value
    raise ConfigError(f"{key} must be {_name(hint)}, got {value!r}")


def _convert_union(kinds: Sequence[Any], value: Any, key: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    named = [kind for kind in kinds if kind is not type(None)]
    for kind in named:
        try:
            return convert(kind, value, key)
        except ConfigError as error:
            if len(named) == 1:
                raise error
    raise ConfigError(f"{key} must be {' or '.join(map(_name, kinds))}, got {value!r}")


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known ones, or all of them."""
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f", did you mean {' or '.join(map(repr, close))}?" if close else f"; known: {', '.join(known)}"
