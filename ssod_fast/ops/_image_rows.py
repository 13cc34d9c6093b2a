"""Rows of a batch and the images that own them: checks and the plain form, shared by the ops that build boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._boxes import _REAL

MAX_FACTORS = 64  # kernels take lists of factors by value


# Which image owns each row: an index [G], or offsets [B + 1], both int64, and sizes [B, 2] (height, width) in the dtype of the rows.
ImageRows = tuple[Tensor | None, Tensor | None, Tensor]


def as_rows(name: str, rows: Tensor, width: int, lead: str) -> Tensor:
    """Checks a tensor [lead, width] and brings it to its compute dtype: float64 stays, anything else becomes float32."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(rows).__name__}")
    if rows.dtype not in _REAL:
        raise TypeError(f"{name} must have a real number dtype, got {rows.dtype}")
    if rows.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {rows.layout}")
    if rows.dim() != lead.count(",") + 2 or rows.shape[-1] != width:
        raise ValueError(f"{name} must have shape [{lead}, {width}], got {list(rows.shape)}")
    if rows.dtype is not torch.float32 and rows.dtype is not torch.float64:
        rows = rows.float()
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def as_sizes(image_hw: Tensor) -> Tensor:
    """Checks sizes [B, 2] (height, width) of images, see :func:`as_rows`. A list would have to be uploaded by every call."""
    if not isinstance(image_hw, Tensor):
        raise TypeError(
            f"image_hw must be a tensor [B, 2] on the device of the rows, such as torch.tensor([[h, w]]), got {type(image_hw).__name__}"
        )
    return as_rows("image_hw", image_hw, 2, "B")


def brief(values: Sequence[object]) -> str:
    """A list for a message, which shows the first of many values."""
    shown = [*values[:8]]
    return f"{shown}" if len(values) <= len(shown) else f"[{str(shown)[1:-1]}, ... ({len(values)} values)]"


def check_image_rows(name: str, rows: Tensor, image_index: Tensor | None, offsets: Tensor | None, image_hw: Tensor) -> ImageRows:
    """Checks who owns `rows` [G, ...]. Values on the host are read, those on a device never: kernels treat wrong ones as no image.

    Raises:
        ValueError: for wrong shapes and devices, both or none of index and offsets, and on the host for values out of range.
        TypeError: for wrong dtypes.
    """
    hw, device = as_sizes(image_hw), rows.device
    if hw.device != device:
        raise ValueError(f"image_hw and {name} must be on one device, got {hw.device} and {device}")
    if hw.dtype is not rows.dtype or not hw.is_contiguous():
        hw = hw.to(rows.dtype).contiguous()
    if (image_index is None) == (offsets is None):
        raise ValueError(f"image_index or offsets must be given, got {'both' if offsets is not None else 'neither'}")
    if offsets is not None:
        return None, check_offsets("offsets", offsets, hw.shape[0], rows.shape[0], device), hw
    assert image_index is not None
    check_integers("image_index", image_index, (rows.shape[0],), device)
    if readable(image_index):
        _check_host_index(image_index, hw.shape[0])
    return as_int64(image_index), None, hw


def check_offsets(name: str, offsets: Tensor, batch: int, rows: int, device: torch.device) -> Tensor:
    """Offsets [batch + 1] into `rows` rows as contiguous int64, checked as far as that costs no synchronisation."""
    check_integers(name, offsets, (batch + 1,), device)
    if readable(offsets):
        values = offsets.numpy()
        if values[0] != 0 or values[-1] != rows or (values[1:] < values[:-1]).any():
            raise ValueError(f"{name} must rise from 0 to the number of rows ({rows}), got {brief(values.tolist())}")
    return as_int64(offsets)


def as_int64(values: Tensor) -> Tensor:
    """Contiguous int64; asked first, because a conversion that does nothing still takes a microsecond."""
    return values if values.dtype is torch.int64 and values.is_contiguous() else values.to(torch.int64).contiguous()


def check_integers(name: str, values: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuses what is no int32 or int64 tensor of this shape on this device."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    if values.dtype is not torch.int64 and values.dtype is not torch.int32:
        raise TypeError(f"{name} must be int32 or int64, got {values.dtype}")
    if values.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(values.shape)}")
    if values.device != device:
        raise ValueError(f"{name} must be on {device} as the rows are, got {values.device}")


def readable(values: Tensor) -> bool:
    """Whether values can be read without waiting for a device: real tensors on the host, outside of a compiled graph."""
    return type(values) is Tensor and values.is_cpu and not torch.compiler.is_compiling()


def _check_host_index(image_index: Tensor, batch: int) -> None:
    values: list[int] = image_index.numpy().tolist()
    if values and not (min(values) >= 0 and max(values) < batch):
        wrong = next(v for v in values if not 0 <= v < batch)
        raise ValueError(f"image_index must lie in 0..{batch - 1} for {batch} images, got {wrong}")


def check_factors(name: str, values: Sequence[float], *, positive: bool) -> list[float]:
    """A list of finite factors, > 0 and not empty if `positive`.

    Raises:
        ValueError: for other values, or more than the kernels take.
        TypeError: for what is no sequence of numbers.
    """
    try:
        factors = [*values]
        low, fits = 0.0 if positive else -math.inf, True
        for v in factors:  # twice as fast as all() over a generator
            fits = fits and low < v < math.inf
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{name} must be a sequence of numbers, got {values!r}") from error
    if not fits:
        raise ValueError(f"{name} must be finite{' and > 0' if positive else ''}, got {brief(factors)}")
    if positive and not factors:
        raise ValueError(f"{name} must not be empty")
    if len(factors) > MAX_FACTORS:
        raise ValueError(f"{name} must have at most {MAX_FACTORS} values, got {len(factors)}")
    return factors


def check_threshold(name: str, value: float) -> None:
    """Refuses what is no number in [0, 1)."""
    try:
        fits = 0 <= value < 1
    except TypeError as error:
        raise TypeError(f"{name} must be a number, got {value!r}") from error
    if not fits:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")


def images_of_rows(index: Tensor | None, offsets: Tensor | None, hw: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """For each row the image, clamped into range, and its size: int64 [G] and [G, 2]. Rows of no image have the size 0 x 0."""
    batch = hw.shape[0]
    if index is None:
        assert offsets is not None
        row = torch.arange(rows, device=hw.device)
        index = torch.searchsorted(offsets, row, right=True) - 1
        owned = (index >= 0) & (index < batch)
    else:
        owned = (index >= 0) & (index < batch)
    sizes = torch.cat([hw, hw.new_zeros(1, 2)])[torch.where(owned, index, batch)]
    return index.clamp(0, max(batch - 1, 0)), sizes
