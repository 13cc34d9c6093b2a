"""Loads the compiled modules once, registers every op, and knows what each op runs on.

An op is registered by its own file with :func:`register`: schema, reference (the fallback on every device), fake, and
the Triton launcher that serves CUDA tensors where no CUDA kernel is loaded. C++ and CUDA kernels register themselves
with the dispatcher when their module is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NAMESPACE = "ssod_fast"
_LIB = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class ExtensionStatus:
    """Whether a compiled module is loaded, how it was built, or why it is not there."""

    name: str
    loaded: bool
    build: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class OpStatus:
    """What one op runs on: `C++`, `CUDA`, `Triton`, `composed` (of other ops and their kernels) or `reference`."""

    name: str
    cpu: str
    cuda: str


def _load(module: str) -> ExtensionStatus:
    try:
        loaded = importlib.import_module(f"ssod_fast.{module}")
    except (ImportError, OSError) as error:  # not built, or linked against another CUDA runtime
        return ExtensionStatus(module, loaded=False, error=str(error))
    return ExtensionStatus(module, loaded=True, build=loaded.build)


EXTENSIONS: tuple[ExtensionStatus, ...] = (_load("_C"), _load("_C_cuda"))
_TRITON_OPS: set[str] = set()
_COMPOSED_OPS: set[str] = set()
_OPS: list[str] = []


def has_triton() -> bool:
    """Whether the `triton` package can be imported."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


def _has_kernel(name: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key))


def launcher(module: str, name: str) -> Callable[..., Any]:
    """A Triton launcher that is imported by its first call, because its module imports Triton.

    Args:
        module: of `ssod_fast.kernels`.
        name: of the launcher in it.

    Returns:
        What :func:`register` takes as `triton`.
    """
    return lambda *args: getattr(importlib.import_module(f"ssod_fast.kernels.{module}"), name)(*args)


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None,
    triton: Callable[..., Any] | None = None,
    composed: bool = False,
    tags: tuple[torch.Tag, ...] = (torch.Tag.pt2_compliant_tag,),
) -> None:
    """Defines `ssod_fast::<schema>` and fills the dispatch keys that no compiled module has filled.

    Args:
        schema: for example `"box_iou(Tensor boxes1, Tensor boxes2) -> Tensor"`; the name may carry an overload (`box_iou.out`).
        reference: plain PyTorch, registered as CompositeExplicitAutograd: right on any device.
        fake: shapes and dtypes only, for torch.compile; None for an out= overload, which returns its argument.
        triton: :func:`launcher` for CUDA tensors, used only where no CUDA kernel is loaded.
        composed: the reference does nothing but call other ops, so that on a GPU it is as fast as their kernels.
        tags: dispatcher tags.
    """
    name = schema.partition("(")[0].strip()
    _LIB.define(schema, tags=tags)
    _OPS.append(name)
    _LIB.impl(name, reference, "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIB)
    if triton is not None and not _has_kernel(name, "CUDA") and has_triton():
        _LIB.impl(name, triton, "CUDA")
        _TRITON_OPS.add(name)
    if composed:
        _COMPOSED_OPS.add(name)


def op_statuses() -> list[OpStatus]:
    """One row per op, in order of registration; backward ops and out= overloads included."""
    rows = []
    for name in _OPS:
        cpu = "C++" if _has_kernel(name, "CPU") else "reference"
        if name in _TRITON_OPS:
            cuda = "Triton"
        elif _has_kernel(name, "CUDA"):
            cuda = "CUDA"
        else:
            cuda = "composed" if name in _COMPOSED_OPS else "reference"
        rows.append(OpStatus(name, cpu, cuda))
    return rows
