"""RoIAlign whose gradient is quick on a CPU.

torchvision's backward there computes the weights of every sample anew for every channel, which takes several times as long as forward. The
samples of a box form a grid and bilinear weights are products of a weight in y and one in x, so that RoIAlign is two small matrix products
per box, and so is its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import roi_align

_CELLS = 1 << 22  # elements of an intermediate result


def align(features: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    """Features under boxes: torchvision's `roi_align`, half-pixel aligned, with as many samples per bin as cells lie in it.

    Args:
        features: float32 or float64 [B, D, h, w]; takes the gradient.
        rois: [R, 5], image and xyxy box in pixels; takes none.
        size: height and width of the result.
        scale: cells of the map per pixel.

    Returns:
        [R, D, size, size].
    """
    if features.is_cpu and features.requires_grad and torch.is_grad_enabled():
        pooled: Tensor = _Align.apply(features, rois, size, scale)  # type: ignore[no-untyped-call]
        return pooled
    return _forward(features, rois, size, scale)


def _forward(features: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    pooled: Tensor = roi_align(features, rois, size, scale, sampling_ratio=0, aligned=True)
    return pooled


class _Align(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.shape, ctx.size, ctx.scale = features.shape, size, scale
        return _forward(features, rois, size, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (rois,) = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):  # backward() may be called under autocast
            return _gradient(grad, rois, ctx.shape, ctx.size, ctx.scale), None, None, None


def _gradient(grad: Tensor, rois: Tensor, shape: torch.Size, size: int, scale: float) -> Tensor:
    """Gradient [B, D, h, w] of the map."""
    batch, channels, height, width = shape
    total = grad.new_zeros(batch * height * width, channels)
    first_y, weight_y = _weights(rois[:, 2] * scale - 0.5, rois[:, 4] * scale - 0.5, size, height)
    first_x, weight_x = _weights(rois[:, 1] * scale - 0.5, rois[:, 3] * scale - 0.5, size, width)
    extent = torch.stack([_extent(weight_y), _extent(weight_x)], 1)  # [R, 2]
    grad = grad.permute(0, 2, 3, 1)  # [R, size, size, D]
    order = extent.amax(1).argsort()  # boxes of similar size share a window
    start = 0
    sides = extent.amax(1)[order].numpy().tolist()
    while start < len(order):
        stop = _end_of_group(sides, start, channels)
        own = order[start:stop]
        high, wide = (_largest(column, least=1) for column in extent[own].unbind(1))
        window = _windows(grad[own], weight_y[own, :, :high], weight_x[own, :, :wide])  # [n, high, wide, D]
        y = (first_y[own, None] + torch.arange(high)).clamp(max=height - 1)
        x = (first_x[own, None] + torch.arange(wide)).clamp(max=width - 1)
        cells = (rois[own, 0].long()[:, None, None] * height + y[:, :, None]) * width + x[:, None, :]  # [n, high, wide]
        total.index_add_(0, cells.flatten(), window.reshape(-1, channels))
        start = stop
    return total.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _windows(grad: Tensor, weight_y: Tensor, weight_x: Tensor) -> Tensor:
    """Gradients of the cells under each box, [n, high, wide, D], of those of its bins [n, size, size, D]."""
    count, size, _, channels = grad.shape
    high, wide = weight_y.shape[2], weight_x.shape[2]
    rows = torch.bmm(weight_y.transpose(1, 2), grad.reshape(count, size, size * channels))  # [n, high, size * D]
    columns = weight_x.transpose(1, 2)[:, None].expand(-1, high, -1, -1).reshape(count * high, wide, size)
    return torch.bmm(columns, rows.view(count * high, size, channels)).view(count, high, wide, channels)


def _end_of_group(sides: list[int], start: int, channels: int) -> int:
    """Where the boxes end, by rising side, that are not much larger than the first one and fit into memory together."""
    stop = start + 1
    while stop < len(sides):
        side = max(sides[stop], 1)
        if side > 1.25 * max(sides[start], 1) + 2 or (stop + 1 - start) * side * side * channels > _CELLS:
            break
        stop += 1
    return stop


def _extent(weights: Tensor) -> Tensor:
    """int64 [R]: how many cells have a weight, from the first one on."""
    places = torch.arange(1, weights.shape[2] + 1)
    return ((weights != 0).any(1) * places).amax(1)


def _largest(values: Tensor, least: int = 0) -> int:
    """The largest of integers on the CPU, where nobody has to wait for it."""
    return max(int(values.numpy().max(initial=0)), least)


def _weights(low: Tensor, high: Tensor, size: int, length: int) -> tuple[Tensor, Tensor]:
    """What the cells of one axis contribute to the bins of each box.

    Args:
        low: [R], where boxes begin, in cells.
        high: [R], where they end.
        size: number of bins.
        length: cells of the axis.

    Returns:
        First cell int64 [R], and weights [R, size, K] of the first cell and those behind it.
    """
    step = (high - low) / size
    samples = step.ceil().clamp(min=0).long()  # [R]
    most = _largest(samples, least=1)
    index = torch.arange(most, dtype=low.dtype)
    inside_bin = (index + 0.5) / samples.clamp(min=1)[:, None]  # [R, S]
    place = low[:, None, None] + (torch.arange(size)[:, None] + inside_bin[:, None]) * step[:, None, None]  # [R, size, S]
    counts = (index < samples[:, None])[:, None] & (place >= -1) & (place <= length)
    place = place.clamp(0, length - 1)
    cell = place.floor().clamp(max=max(length - 2, 0)).long()
    mean = counts / samples.clamp(min=1).to(low.dtype)[:, None, None]
    share = (place - cell) * mean  # of the cell behind
    first = torch.where(counts, cell, length).flatten(1).amin(1).clamp(max=length - 1)
    offset = torch.where(counts, cell - first[:, None, None], 0)
    window = _largest(offset) + 2
    weights = low.new_zeros(len(low), size, window)
    weights.scatter_add_(2, offset, mean - share).scatter_add_(2, offset + 1, share)
    return first, weights
