"""Replaces attributes of other people's modules, classes and objects, and puts them back.

What was there is remembered beside what replaces it, on the owner itself. A copied or unpickled model therefore keeps its patches and can
still be unpatched, and nothing here holds on to a model.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

from torch import nn

_RECORD = "_ssod_fast_replaced"
_REPLICATE = "_replicate_for_data_parallel"  # by which torch.nn.DataParallel copies a module


class NothingPatched(RuntimeError):
    """There was no place to patch."""


class UnknownSurface(ImportError):
    """Code to be patched does not look as expected; nothing was changed."""


class Absent:
    """Stands for an attribute that its owner did not have itself."""


class Replaced(NamedTuple):
    """What is remembered of a replacement."""

    old: Any
    new: Any
    options: Mapping[str, Any]  # that it was made with


@dataclass(frozen=True)
class Place:
    """An attribute that can be replaced."""

    owner: Any
    name: str
    label: str  # for people


@dataclass(frozen=True)
class Patched:
    """What a call patched; a context manager that puts it back.

    Attributes:
        places: labels of all that is patched now, also of what an earlier call had patched already.
    """

    places: tuple[str, ...]
    _new: tuple[Place, ...] = field(repr=False)
    _undo: tuple[Callable[[], object], ...] = field(default=(), repr=False)  # what is to be called in the end, harmless a second time

    @property
    def count(self) -> int:
        """Number of places that are patched now."""
        return len(self.places)

    def undo(self) -> None:
        """Puts back what this very call replaced; a second time nothing.

        Raises:
            RuntimeError: if an attribute has been replaced again since; nothing is put back then.
        """
        restore_places(self._new)
        for call in self._undo:
            call()

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


class Plan:
    """Collects replacements and makes them at once, so that a check that fails halfway leaves everything as it was.

    Args:
        undo: how people call what takes the replacements back, for messages.
        options: of the call, by which replacements differ.
    """

    def __init__(self, undo: str = "unpatch", **options: Any) -> None:
        self._undo = undo
        self._options = options
        self._steps: list[tuple[Place, Any]] = []

    def add(self, owner: Any, name: str, new: Any, label: str | None = None) -> None:
        """Plans that `name` of `owner`, a module, class or object, becomes `new`.

        Args:
            owner: what holds the attribute.
            name: of the attribute.
            new: what it becomes.
            label: for people, by default the names of both.
        """
        self._steps.append((Place(owner, name, label or f"{label_of(owner)}.{name}"), new))

    def apply(self, nothing: str) -> Patched:
        """Makes the replacements, except where an earlier call has made one already.

        Args:
            nothing: message of the error where there is no place to patch.

        Returns:
            What is patched now.

        Raises:
            NothingPatched: if no replacement is planned.
            ValueError: if an earlier call has made one with other options; nothing is replaced then.
        """
        if not self._steps:
            raise NothingPatched(nothing)
        for place, _ in self._steps:
            self._check_options(place)
        new = [place for place, value in self._steps if replace(place.owner, place.name, value, self._options)]
        return Patched(tuple(place.label for place, _ in self._steps), tuple(new))

    def _check_options(self, place: Place) -> None:
        """Refuses options that an earlier replacement, which stays, does not have."""
        if not is_replaced(place.owner, place.name):
            return
        earlier = vars(place.owner)[_RECORD][place.name].options
        for name, value in self._options.items():
            if earlier.get(name, value) != value:
                found = f"{place.label} is patched with {name}={earlier[name]!r}"
                raise ValueError(f"{found}, which a second call with {name}={value!r} does not change: call {self._undo} first")

    def revert(self) -> int:
        """Puts back the original wherever a planned replacement was made, by whatever call.

        Returns:
            How many places.

        Raises:
            RuntimeError: if an attribute has been replaced again since; nothing is put back then.
        """
        return restore_places([place for place, _ in self._steps])


def replace(owner: Any, name: str, new: Any, options: Mapping[str, Any] | None = None) -> bool:
    """Sets an attribute and remembers what it was.

    What is a `functools.partial` bound to its module, as a forward, is bound to the replicas that `torch.nn.DataParallel` makes of it.

    Args:
        owner: a module, class or object.
        name: of the attribute.
        new: its value.
        options: to remember with it.

    Returns:
        False if it is replaced already: then nothing changes.
    """
    record = vars(owner).get(_RECORD, {})
    if name in record:
        return False
    setattr(owner, _RECORD, {**record, name: Replaced(_own(owner, name), new, options or {})})
    setattr(owner, name, new)
    if isinstance(owner, nn.Module) and _is_bound(new, owner):
        vars(owner)[_REPLICATE] = partial(_replica, owner)
    return True


def _is_bound(function: Any, module: nn.Module) -> bool:
    return isinstance(function, partial) and bool(function.args) and function.args[0] is module


def _replica(module: nn.Module) -> nn.Module:
    """A replica, which shares all attributes of a module, but for functions that are bound to it: the replica has its own."""
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)
    attributes = vars(replica)
    del attributes[_REPLICATE]
    for name in attributes[_RECORD]:
        function = attributes.get(name)
        if function is not None and _is_bound(function, module):
            attributes[name] = partial(function.func, replica, *function.args[1:], **function.keywords)
    return replica


def restore(owner: Any, name: str) -> bool:
    """Puts back what :func:`replace` replaced.

    Args:
        owner: a module, class or object.
        name: of the attribute.

    Returns:
        False if it was not replaced: then nothing changes.

    Raises:
        RuntimeError: if the attribute has been replaced once more by somebody else, whose change would be lost.
    """
    record = vars(owner).get(_RECORD, {})
    if name not in record:
        return False
    _check_unchanged(Place(owner, name, f"{label_of(owner)}.{name}"))
    old = record[name].old
    if old is Absent:
        delattr(owner, name)
    else:
        setattr(owner, name, old)
    rest = {key: value for key, value in record.items() if key != name}
    if rest:
        setattr(owner, _RECORD, rest)
        return True
    delattr(owner, _RECORD)
    if isinstance(owner, nn.Module):
        vars(owner).pop(_REPLICATE, None)
    return True


def restore_places(places: Sequence[Place]) -> int:
    """Puts back what :func:`replace` replaced, everywhere or nowhere.

    Args:
        places: where; those that were not replaced stay as they are.

    Returns:
        How many places were restored.

    Raises:
        RuntimeError: if one has been replaced once more by somebody else; nothing is put back then.
    """
    for place in places:
        if is_replaced(place.owner, place.name):
            _check_unchanged(place)
    return sum(restore(place.owner, place.name) for place in reversed(places))


def places_in(model: nn.Module, *names: str) -> list[Place]:
    """Attributes of a model's modules that are replaced now.

    Args:
        model: a module, searched with all inside of it.
        names: of the attributes.

    Returns:
        The places, labelled by the path of their module.
    """
    found = [(path, module, name) for path, module in model.named_modules() for name in names if is_replaced(module, name)]
    return [Place(module, name, f"{path or label_of(module)}.{name}") for path, module, name in found]


def _check_unchanged(place: Place) -> None:
    """Refuses to put back where somebody else's change would be lost."""
    if _own(place.owner, place.name) is not vars(place.owner)[_RECORD][place.name].new:
        raise RuntimeError(f"{place.label} has been replaced again since ssod_fast patched it: undo that first")


def is_replaced(owner: Any, name: str) -> bool:
    """Whether :func:`replace` has replaced this attribute."""
    return name in vars(owner).get(_RECORD, {})


def original(owner: Any, name: str) -> Any:
    """The attribute as it was on `owner` before :func:`replace`, :class:`Absent` if it was inherited; as it is where it is not replaced."""
    record = vars(owner).get(_RECORD, {})
    return record[name].old if name in record else getattr(owner, name)


def _own(owner: Any, name: str) -> Any:
    """The attribute without inheritance and descriptors."""
    if isinstance(owner, nn.Module) and name in owner._modules:
        return owner._modules[name]
    return vars(owner).get(name, Absent)


def label_of(owner: Any) -> str:
    """Name of a module, class or the class of an object."""
    if isinstance(owner, ModuleType):
        return owner.__name__
    return owner.__qualname__ if isinstance(owner, type) else type(owner).__qualname__


def require(module: str, package: str, hint: str = "") -> ModuleType:
    """Imports a module of another package.

    Args:
        module: its dotted name.
        package: what to install for it.
        hint: end of the message.

    Returns:
        The module.

    Raises:
        ImportError: naming the package.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported: install {package}{hint} ({error})") from error


def optional(module: str) -> ModuleType | None:
    """A module, or None where this version of its package has none of that name; errors inside of it are raised.

    Args:
        module: its dotted name.

    Returns:
        The module or None.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            return None
        raise


def check_parameters(function: Callable[..., Any], label: str, *accepted: Sequence[str]) -> None:
    """Refuses a function whose parameters are not those that its replacement was written for.

    Args:
        function: what is to be replaced.
        label: its name, for the message.
        accepted: lists of parameter names, `*` and `**` before the names of variadic ones.

    Raises:
        UnknownSurface: naming expected and found parameters.
    """
    found = parameters(function)
    if found not in [list(names) for names in accepted]:
        wanted = " or ".join(f"({', '.join(names)})" for names in accepted)
        raise UnknownSurface(f"{label} takes ({', '.join(found)}), expected {wanted}: this version is not known, nothing was patched")


def parameters(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters, as :func:`check_parameters` compares them.

    Args:
        function: a function, method or class.

    Returns:
        The names, `*` and `**` before those of variadic ones.
    """
    marks: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [marks.get(p.kind, "") + p.name for p in inspect.signature(function).parameters.values()]


def check_switch(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuses what is no switch.

    Args:
        name: of the argument.
        value: of it.
        optional: whether None is one of its values.

    Raises:
        TypeError: naming the argument.
    """
    if not (isinstance(value, bool) or (optional and value is None)):
        raise TypeError(f"{name} must be True or False{' or None' if optional else ''}, got {value!r}")
