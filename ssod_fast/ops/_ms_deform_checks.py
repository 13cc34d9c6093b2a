"""Input checks of multi-scale deformable attention, and the layout in which its ops take their tensors.

A decoder spends less time in the kernel than ten calls into torch take, so the checks unpack shapes once into plain tuples and compare
those, and the layout touches no tensor that has it already.

A kernel may rely on this:

* value [B, S, M, C]: heads and channels of a token are contiguous; the strides of images and tokens are free.
* samples [B, Q, M, K] and [B, Q, M, K, 2]: dense inside a row (b, q); rows lie at one stride, which is that of q, or of b where Q is 1.
* samples have one dtype: float64 where value is float64, else float32, float16 or bfloat16. Reference points are float32 or float64.
* level tables are contiguous int64, everything is on one device, and all shapes fit together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Shapes = Tensor | Sequence[Sequence[int]]
FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))


# The pyramid as the ops take it: sizes and first tokens in tensors, sizes on the host [H0, W0, H1, ...], and the number of levels.
LevelInput = tuple[Tensor | None, Tensor | None, list[int] | None, int]  # a tuple with names would take as long as two of the checks


def check_value(value: Any) -> None:
    """Refuses what is no [B, S, M, C] of a dtype the ops know."""
    _check_float("value", value)
    if value.dim() != 4:
        raise ValueError(f"value must be [B, S, M, C], got {list(value.shape)}")


def check_levels(value: Tensor, spatial_shapes: Any, level_start_index: Any) -> LevelInput:
    """Checks sizes that are on the host, in a tensor or not, against the tokens of value; the values of device tensors are never read."""
    shapes = hw = pairs = None
    if isinstance(spatial_shapes, Tensor):
        shapes = _table("spatial_shapes", spatial_shapes, value)
        size = shapes.shape
        if len(size) != 2 or size[1] != 2:
            raise ValueError(f"spatial_shapes must be [L, 2], got {list(size)}")
        number = size[0]
        if _is_readable(shapes):
            pairs = _table_sizes(shapes, value)
    else:
        hw = _host_sizes(spatial_shapes, value)
        number = len(hw) // 2
    if level_start_index is None:
        return shapes, None, hw, number
    start = _table("level_start_index", level_start_index, value)
    if start.shape != (number,):
        raise ValueError(f"level_start_index must be [{number}], one number per level, got {list(start.shape)}")
    if hw is not None and _is_readable(start):
        pairs = [hw[i : i + 2] for i in range(0, len(hw), 2)]
    if pairs is not None and type(start) is Tensor:  # on the same device as sizes that could be read
        _check_starts(start.numpy().tolist(), pairs, value.shape[1])
    return shapes, start, hw, number


def check_samples(
    value: Tensor, positions: Any, weights: Any, levels: int, num_points: Sequence[int] | None, names: tuple[str, str]
) -> None:
    """Checks positions (or offsets) and weights (or logits) in either form against value and the levels."""
    positions_name, weights_name = names
    given = _flat_shape(positions_name, positions, 5, levels)
    shape = batch, _, heads, samples = _flat_shape(weights_name, weights, 4, levels)
    images, _, wanted, _ = value.shape
    if batch != images or heads != wanted:
        expected = f"[{images}, Q, {wanted}, K]"
        raise ValueError(f"{weights_name} must be {expected} to fit value {list(value.shape)}, got {list(weights.shape)}")
    if given != (*shape, 2):
        raise ValueError(f"{positions_name} must be {[*shape, 2]} to fit {weights_name}, got {list(positions.shape)}")
    _check_points(samples, levels, num_points, weights_name)
    if num_points is not None and (positions.dim() == 6 or weights.dim() == 5):
        _check_equal_points(samples // max(levels, 1), levels, num_points)
    device = value.device
    if positions.device != device or weights.device != device:
        _check_device(positions_name, positions, value)
        _check_device(weights_name, weights, value)


def check_reference(points: Any, value: Tensor, weights: Tensor, levels: int) -> None:
    """Checks reference points [B, Q, L or 1, 2 or 4]."""
    _check_float("reference_points", points)
    shape, (batch, queries, *_) = points.shape, weights.shape
    fits = len(shape) == 4 and shape[0] == batch and shape[1] == queries and shape[2] in (1, levels) and shape[3] in (2, 4)
    if not fits:
        raise ValueError(f"reference_points must be [{batch}, {queries}, {levels} or 1, 2 or 4], got {list(shape)}")
    _check_device("reference_points", points, value)


def check_deterministic(switch: Any) -> None:
    """Refuses what is neither a switch nor None."""
    if switch is not None and not isinstance(switch, bool):
        raise TypeError(f"deterministic must be a bool or None, got {switch!r}")


def check_offset_scale(scale: Any) -> float:
    """`scale` as a float; a tensor is refused, since reading it would wait for its device."""
    if type(scale) is not float and not isinstance(scale, Real | torch.SymFloat):
        raise TypeError(f"offset_scale must be a number, got {type(scale).__name__}")
    number = float(scale)
    if not -math.inf < number < math.inf:
        raise ValueError(f"offset_scale must be finite, got {scale}")
    return number


def refuse_tangents(name: str, *tensors: Tensor) -> None:
    """Refuses input of forward-mode differentiation, whose tangents the op called `name` would drop without a word."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(f"{name}: forward-mode differentiation is not implemented")


def check_grad_output(grad: Any, value: Tensor, queries: int) -> None:
    """Checks a gradient of the result [B, Q, M * C]."""
    _check_float("grad_output", grad)
    batch, _, heads, channels = value.shape
    if grad.shape != (batch, queries, heads * channels):
        raise ValueError(f"grad_output must be {[batch, queries, heads * channels]}, got {list(grad.shape)}")
    _check_device("grad_output", grad, value)


def dense_tokens(value: Tensor) -> Tensor:
    """`value`, copied unless heads and channels of a token are side by side."""
    if value.is_contiguous() or (value.stride(3) == 1 and value.stride(2) == value.shape[3]):
        return value
    return value.contiguous()


def flat_samples(value: Tensor, positions: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [B, Q, M, K, 2] and weights [B, Q, M, K] in one dtype and dense rows; copies only what is not so yet."""
    wide = value.dtype is torch.float64
    if wide or positions.dtype is not weights.dtype or weights.dtype is torch.float64:
        dtype = torch.float64 if wide else torch.float32  # loses nothing that the op computes with
        positions, weights = positions.to(dtype), weights.to(dtype)
    if positions.dim() == 6:
        positions = positions.flatten(3, 4)
    if weights.dim() == 5:
        weights = weights.flatten(3, 4)
    return _dense_rows(positions), _dense_rows(weights)


def wide_reference(points: Tensor, value: Tensor) -> Tensor:
    """Reference points, contiguous, in the dtype that positions are computed in."""
    dtype = torch.float64 if value.dtype is torch.float64 else torch.float32
    return (points if points.dtype is dtype else points.to(dtype)).contiguous()


def shaped_like(grad: Tensor, tensor: Tensor) -> Tensor:
    """Gradient of a tensor that the layout brought into another form."""
    if grad.dim() != tensor.dim():
        grad = grad.view(tensor.shape)
    return grad if grad.dtype is tensor.dtype else grad.to(tensor.dtype)


def _check_float(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")


def _check_device(name: str, tensor: Tensor, value: Tensor) -> None:
    if tensor.device != value.device:
        raise ValueError(f"{name} must be on the device of value, {value.device}, got {tensor.device}")


def _table(name: str, table: Any, value: Tensor) -> Tensor:
    """An integer tensor of the device of value as contiguous int64."""
    if not isinstance(table, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(table).__name__}")
    if table.device != value.device:
        _check_device(name, table, value)
    if table.dtype is torch.int64:
        return table.contiguous()
    if table.dtype is not torch.int32:
        raise TypeError(f"{name} must be int64 or int32, got {table.dtype}")
    return table.to(torch.int64).contiguous()


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
    for size in hw:
        if (type(size) is not int and not isinstance(size, Integral | torch.SymInt)) or size < 0:
            raise ValueError(f"spatial_shapes must hold integers >= 0, got {spatial_shapes!r}")
    _check_tokens(tokens, value, spatial_shapes)
    return hw


def _table_sizes(shapes: Tensor, value: Tensor) -> list[list[int]]:
    """Pairs of a readable table [L, 2], which cover the tokens of value."""
    pairs: list[list[int]] = shapes.numpy().tolist()  # reads host memory or raises an error: waits for no device, as .tolist() would
    tokens = 0
    for height, width in pairs:
        if height < 0 or width < 0:
            raise ValueError(f"spatial_shapes must hold integers >= 0, got {pairs}")
        tokens += height * width
    _check_tokens(tokens, value, pairs)
    return pairs


def _check_tokens(tokens: int, value: Tensor, spatial_shapes: Any) -> None:
    if tokens != value.shape[1]:
        raise ValueError(f"spatial_shapes must cover the {value.shape[1]} tokens of value, got {spatial_shapes!r}, which have {tokens}")


def _is_readable(table: Tensor) -> bool:
    """Whether a table lies in host memory, so that reading it waits for no device, and no trace or transform runs."""
    return (
        table.is_cpu
        and type(table) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
    )


def _check_starts(starts: Sequence[int], pairs: Sequence[Sequence[int]], tokens: int) -> None:
    """Checks first tokens of levels of the sizes (height, width)."""
    for i, start in enumerate(starts):
        height, width = pairs[i]
        if start < 0 or start + height * width > tokens:
            level = f"a level of {height} x {width}, got first tokens {list(starts)}"
            raise ValueError(f"level_start_index must leave room in the {tokens} tokens of value for {level}")


def _flat_shape(name: str, tensor: Any, dims: int, levels: int) -> tuple[int, ...]:
    """Shape of [B, Q, M, L, P, ...] as [B, Q, M, K, ...], which has `dims` dimensions."""
    _check_float(name, tensor)
    shape: tuple[int, ...] = tensor.shape
    if len(shape) == dims:
        return shape
    if len(shape) != dims + 1:
        pair = ", 2" if dims == 5 else ""
        raise ValueError(f"{name} must be [B, Q, M, K{pair}] or [B, Q, M, L, P{pair}], got {list(shape)}")
    batch, queries, heads, given, points, *rest = shape
    if given != levels:
        raise ValueError(f"{name} must have {levels} levels in dimension 3, got {list(shape)}")
    return batch, queries, heads, given * points, *rest


def _check_points(samples: int, levels: int, num_points: Sequence[int] | None, name: str) -> None:
    if num_points is None:
        if (samples % levels if levels else samples) != 0:
            raise ValueError(f"num_points must be given where {levels} levels do not share the {samples} samples of {name} equally")
    elif not are_integers(num_points):
        raise TypeError(f"num_points must be a sequence of integers, got {num_points!r}")
    elif len(num_points) != levels or sum(num_points) != samples or min(num_points, default=0) < 0:
        raise ValueError(f"num_points must be {levels} numbers >= 0 that sum to the {samples} samples of {name}, got {list(num_points)}")


def _check_equal_points(points: int, levels: int, num_points: Sequence[int]) -> None:
    """Checks numbers given next to a dimension P of samples, which says the same of every level."""
    if any(number != points for number in num_points):
        raise ValueError(f"num_points must be {[points] * levels} for samples [B, Q, M, L, P, ...] of P {points}, got {list(num_points)}")


def are_integers(numbers: Any) -> bool:
    """Whether these are several Python or numpy integers, on the host."""
    try:
        return all(type(number) is int or isinstance(number, Integral | torch.SymInt) for number in numbers)
    except TypeError:  # nothing to iterate over
        return False


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
