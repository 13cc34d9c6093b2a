"""Input checks of multi-scale deformable attention, and the layout in which its ops take their tensors.

After the checks a kernel may rely on this:

* value [B, S, M, C]: heads and channels of a token are contiguous; the strides of images and tokens are free.
* samples [B, Q, M, K] and [B, Q, M, K, 2]: dense inside a row (b, q); rows lie at one stride, which is that of q, or of b where Q is 1.
* samples have one dtype: float64 where value is float64, else float32, float16 or bfloat16. Reference points are float32 or float64.
* level tables are contiguous int64, everything is on one device, and all shapes fit together.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

Shapes = Tensor | Sequence[Sequence[int]]
_FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))


class LevelInput(NamedTuple):
    """The pyramid as the ops take it: sizes on the device or on the host, [H0, W0, H1, ...], first tokens, and the number of levels."""

    shapes: Tensor | None
    start: Tensor | None
    hw: list[int] | None
    number: int


def check_value(value: Any) -> Tensor:
    """Refuses what is no [B, S, M, C] of a dtype the ops know; copies where the numbers of a token are not side by side."""
    _check_float("value", value)
    if value.dim() != 4:
        raise ValueError(f"value must be [B, S, M, C], got {list(value.shape)}")
    tensor: Tensor = value
    if tensor.is_contiguous() or (tensor.stride(3) == 1 and tensor.stride(2) == tensor.shape[3]):
        return tensor
    return tensor.contiguous()


def check_levels(value: Tensor, spatial_shapes: Any, level_start_index: Any) -> LevelInput:
    """Checks sizes that are on the host against the tokens of value; the values of device tensors are never read."""
    if level_start_index is not None:
        _check_table("level_start_index", level_start_index, value)
    if isinstance(spatial_shapes, Tensor):
        _check_table("spatial_shapes", spatial_shapes, value)
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
            raise ValueError(f"spatial_shapes must be [L, 2], got {list(spatial_shapes.shape)}")
        shapes, hw, count = spatial_shapes.to(torch.int64).contiguous(), None, spatial_shapes.shape[0]
    else:
        shapes, hw = None, _host_sizes(spatial_shapes, value)
        count = len(hw) // 2
    if level_start_index is None:
        return LevelInput(shapes, None, hw, count)
    if level_start_index.dim() != 1 or level_start_index.shape[0] != count:
        raise ValueError(f"level_start_index must be [{count}], one number per level, got {list(level_start_index.shape)}")
    return LevelInput(shapes, level_start_index.to(torch.int64).contiguous(), hw, count)


def check_samples(
    value: Tensor, positions: Any, weights: Any, levels: int, num_points: Sequence[int] | None, names: tuple[str, str]
) -> tuple[Tensor, Tensor]:
    """Checks positions (or offsets) and weights (or logits); returns them as [B, Q, M, K, 2] and [B, Q, M, K] in one dtype."""
    positions_name, weights_name = names
    positions = _flat(positions_name, positions, 5, levels)
    weights = _flat(weights_name, weights, 4, levels)
    batch, _, heads, samples = weights.shape
    if batch != value.shape[0] or heads != value.shape[2]:
        expected = f"[{value.shape[0]}, Q, {value.shape[2]}, K]"
        raise ValueError(f"{weights_name} must be {expected} to fit value {list(value.shape)}, got {list(weights.shape)}")
    if positions.shape != (*weights.shape, 2):
        raise ValueError(f"{positions_name} must be {[*weights.shape, 2]} to fit {weights_name}, got {list(positions.shape)}")
    _check_points(samples, levels, num_points, weights_name)
    _check_device(positions_name, positions, value)
    _check_device(weights_name, weights, value)
    positions, weights = _one_dtype(value, positions, weights)
    return _dense_rows(positions), _dense_rows(weights)


def check_reference(points: Any, value: Tensor, offsets: Tensor, levels: int) -> Tensor:
    """Checks reference points [B, Q, L or 1, 2 or 4]; returns them contiguous in the dtype that positions are computed in."""
    _check_float("reference_points", points)
    batch, queries = offsets.shape[:2]
    fits = points.dim() == 4 and points.shape[:2] == (batch, queries) and points.shape[2] in (1, levels) and points.shape[3] in (2, 4)
    if not fits:
        raise ValueError(f"reference_points must be [{batch}, {queries}, {levels} or 1, 2 or 4], got {list(points.shape)}")
    _check_device("reference_points", points, value)
    dtype = torch.float64 if value.dtype is torch.float64 else torch.float32
    tensor: Tensor = points.to(dtype).contiguous()
    return tensor


def check_grad_output(grad: Any, value: Tensor, queries: int) -> Tensor:
    """Checks a gradient of the result [B, Q, M * C]; returns it contiguous in the dtype of value."""
    _check_float("grad_output", grad)
    batch, _, heads, channels = value.shape
    if grad.shape != (batch, queries, heads * channels):
        raise ValueError(f"grad_output must be {[batch, queries, heads * channels]}, got {list(grad.shape)}")
    _check_device("grad_output", grad, value)
    tensor: Tensor = grad.to(value.dtype).contiguous()
    return tensor


def _check_float(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")


def _check_device(name: str, tensor: Tensor, value: Tensor) -> None:
    if tensor.device != value.device:
        raise ValueError(f"{name} must be on the device of value, {value.device}, got {tensor.device}")


def _check_table(name: str, table: Any, value: Tensor) -> None:
    if not isinstance(table, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(table).__name__}")
    if table.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {table.dtype}")
    _check_device(name, table, value)


def _host_sizes(spatial_shapes: Any, value: Tensor) -> list[int]:
    """[H0, W0, H1, ...] of pairs of Python integers that cover the tokens of value."""
    hw: list[int] = []
    tokens = 0
    try:
        for height, width in spatial_shapes:
            hw += (height, width)
            tokens += height * width
    except (TypeError, ValueError):
        raise ValueError(f"spatial_shapes must be pairs (height, width) or a tensor [L, 2], got {spatial_shapes!r}") from None
    if not all(isinstance(size, int | Integral | torch.SymInt) and size >= 0 for size in hw):
        raise ValueError(f"spatial_shapes must hold integers >= 0, got {spatial_shapes!r}")
    if tokens != value.shape[1]:
        raise ValueError(f"spatial_shapes must cover the {value.shape[1]} tokens of value, got {spatial_shapes!r}, which have {tokens}")
    return hw


def _flat(name: str, tensor: Any, dims: int, levels: int) -> Tensor:
    """[B, Q, M, L, P, ...] as [B, Q, M, K, ...], which has `dims` dimensions."""
    _check_float(name, tensor)
    given = tensor.dim()
    if given != dims and given != dims + 1:
        pair = ", 2" if dims == 5 else ""
        raise ValueError(f"{name} must be [B, Q, M, K{pair}] or [B, Q, M, L, P{pair}], got {list(tensor.shape)}")
    flat: Tensor = tensor
    if given == dims + 1:
        if tensor.shape[3] != levels:
            raise ValueError(f"{name} must have {levels} levels in dimension 3, got {list(tensor.shape)}")
        flat = tensor.flatten(3, 4)
    return flat


def _check_points(samples: int, levels: int, num_points: Sequence[int] | None, name: str) -> None:
    if num_points is None:
        if (samples % levels if levels else samples) != 0:
            raise ValueError(f"num_points must be given where {levels} levels do not share the {samples} samples of {name} equally")
    elif len(num_points) != levels or sum(num_points) != samples or min(num_points, default=0) < 0:
        raise ValueError(f"num_points must be {levels} numbers >= 0 that sum to the {samples} samples of {name}, got {list(num_points)}")


def _one_dtype(value: Tensor, positions: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 for a float64 value; else as they are if they agree, or in float32, which loses nothing that is computed with."""
    if value.dtype is torch.float64:
        return positions.to(torch.float64), weights.to(torch.float64)
    if positions.dtype is weights.dtype and weights.dtype is not torch.float64:
        return positions, weights
    return positions.to(torch.float32), weights.to(torch.float32)


def _dense_rows(tensor: Tensor) -> Tensor:
    """`tensor`, copied unless it is dense from the heads on and its rows (b, q) have one stride."""
    if tensor.is_contiguous():
        return tensor
    expected, shape, stride = 1, tensor.shape, tensor.stride()
    for d in range(tensor.dim() - 1, 1, -1):
        if shape[d] != 1 and stride[d] != expected:
            return tensor.contiguous()
        expected *= shape[d]
    one_stride = shape[0] == 1 or shape[1] == 1 or stride[0] == stride[1] * shape[1]
    return tensor if one_stride else tensor.contiguous()
