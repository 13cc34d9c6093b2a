"""A dispatch mode that fails on every operation that would make the host wait for a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ALWAYS_SYNC = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::nonzero_static",
    "aten::masked_select",
    "aten::masked_select_backward",
    "aten::is_nonzero",
    "aten::equal",
    "aten::unique_dim",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::allclose",
    "aten::repeat_interleave.Tensor",
    "torchvision::nms",
}
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}


class SyncError(AssertionError):
    """An operation inside the guarded region would synchronise on a GPU."""


class NoSyncMode(TorchDispatchMode):
    """Proves on the CPU that a region has no host sync: scalar reads, data-dependent shapes, boolean-mask indexing, copies to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func._schema.name
        full = name + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
        if name in _ALWAYS_SYNC or full in _ALWAYS_SYNC:
            raise SyncError(f"{full} synchronises with the host")
        if name in _INDEXED:
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    raise SyncError(f"{full} with a boolean mask synchronises with the host")
        result = func(*args, **(kwargs or {}))
        if name in ("aten::_to_copy", "aten::copy_") and _copies_to_host(args, result):
            raise SyncError(f"{full} copies from the device to the host")
        return result


class NoHostReadMode(TorchFunctionMode):
    """Fails on reads that reach no dispatcher when the tensor is on the CPU already."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.cpu):
            raise SyncError(f"Tensor.{func.__name__} synchronises with the host")
        return func(*args, **(kwargs or {}))


def _copies_to_host(args: tuple[Any, ...], result: Any) -> bool:
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    return result.device.type == "cpu" and any(t.device.type != "cpu" for t in tensors)


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Guards a region: the dispatch mode on the CPU, CUDA's own sync debug mode too where a GPU is there."""
    if torch.cuda.is_available():
        previous = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with NoSyncMode(), NoHostReadMode():
                yield
        finally:
            torch.cuda.set_sync_debug_mode(previous)
    else:
        with NoSyncMode(), NoHostReadMode():
            yield
