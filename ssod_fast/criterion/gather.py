"""What the losses of matched pairs are made of: rows of matched queries, dense class targets, and the number of targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..ops._image_rows import readable
from ..ops._matches import Matches, count_pairs
from ..ops.packed_targets import AnyTargets, PackedTargets, pack_targets


def gather_matched(predictions: Tensor, matches: Matches) -> Tensor:
    """The prediction that each target takes, for all layers at once; 0 for an unmatched target.

    The gradient is written once per row, without atomics, because no query is taken twice.

    Args:
        predictions: [L, B, Q, D] or, for one layer, [B, Q, D].
        matches: of L layers.

    Returns:
        [L, E, G, D] in the dtype of `predictions`.

    Raises:
        ValueError: for predictions of another shape than the matches have, or on another device.
        TypeError: for predictions or matches of another type.
    """
    predictions = layers_of("predictions", predictions, matches)
    width = predictions.shape[-1]
    rows: Tensor = _Take.apply(predictions.flatten(1, 2), query_index(matches).flatten(1))  # type: ignore[no-untyped-call]
    return rows.view(*matches.query.shape, width)


def class_targets(matches: Matches, labels: Tensor, background: int) -> Tensor:
    """Class of each query for losses that need a dense target. Weights of targets take no part: a target of weight 0 gives its label too.

    Args:
        matches: of L layers and G target rows.
        labels: int64 [G].
        background: class of unmatched queries; one that no label has.

    Returns:
        int64 [L, B, Q].

    Raises:
        ValueError: for labels that do not fit the matches, or on another device.
        TypeError: for labels that are no integers, and matches or background of another type.
    """
    check_matches(matches)
    _check_labels(labels, matches)
    if not isinstance(background, int):
        raise TypeError(f"background must be an int, got {background!r}")
    layers, queries = matches.layers, matches.batch * matches.queries
    index = query_index(matches).flatten(1)  # [L, E * G]
    values = labels.to(torch.int64).expand(*matches.query.shape).flatten(1)
    dense = torch.full((layers, queries + 1), background, dtype=torch.int64, device=labels.device)
    classes: Tensor = dense.scatter(1, index, values)[:, :queries].unflatten(1, (matches.batch, matches.queries))
    return classes


def normalizer(matches: Matches, *, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """What losses over matched pairs are divided by: the mean number of targets per rank, times the queries each takes, at least 1.

    Weights take no part: a target of weight 0 counts as any other. For the sum of weights instead, pass a `norm` of your own to the losses;
    for targets that shall not count, drop them before they are matched
    (:meth:`PaddedTargets.select <ssod_fast.structures.PaddedTargets.select>` does so without waiting for the device).

    Args:
        matches: the number of targets is that of the real rows, matched or not.
        process_group: ranks to average over, by default all; nothing is communicated outside of distributed training.

    Returns:
        float32 scalar on the device of the matches. Nothing waits for it.

    Raises:
        TypeError: for matches of another type.
    """
    check_matches(matches)
    copies = matches.groups * matches.repeats
    return mean_over_ranks(_real_rows(matches).to(torch.float32) * copies, process_group=process_group).clamp(min=1)


def mean_over_ranks(values: Tensor, *, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """The mean of each value over all ranks, which all must call this; the values themselves outside of distributed training.

    Args:
        values: floating point, of the same shape on all ranks.
        process_group: ranks to average over, by default all.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values
    total = values.clone()
    dist.all_reduce(total, group=process_group)
    return total / dist.get_world_size(process_group)


def _real_rows(matches: Matches) -> Tensor:
    if matches.counts is not None:
        return matches.counts.sum()
    if matches.offsets is not None:
        return matches.offsets[-1]
    return torch.full((), matches.image.shape[0], device=matches.query.device)


def query_index(matches: Matches) -> Tensor:
    """Index of the matched query among all B * Q of its layer, int64 [L, E, G]; B * Q for an unmatched target."""
    index = matches.image * matches.queries + matches.query
    return torch.where(matches.matched, index, matches.batch * matches.queries)


def entry_index(matches: Matches, classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where the logit of each target's class lies among the B * Q * C of its layer.

    Args:
        matches: of L layers.
        classes: int64 [G], a column per target; columns outside of 0 .. C - 1 count as unmatched.
        count: C.

    Returns:
        int64 [L, E, G], B * Q * C where there is none; and bool [L, E, G], where there is one.
    """
    found = matches.matched & (classes >= 0) & (classes < count)
    index = query_index(matches) * count + classes
    return torch.where(found, index, matches.batch * matches.queries * count), found


def gather_logits(logits: Tensor, matches: Matches, classes: Tensor) -> tuple[Tensor, Tensor]:
    """One logit of each matched query.

    Args:
        logits: [L, B, Q, C].
        matches: of L layers.
        classes: int64 [G], see :func:`entry_index`.

    Returns:
        [L, E, G] logits, 0 where there is none, and bool [L, E, G], where there is one.
    """
    index, found = entry_index(matches, classes, logits.shape[-1])
    values: Tensor = _Take.apply(logits.flatten(1).unsqueeze(-1), index.flatten(1))  # type: ignore[no-untyped-call]
    return values.view(matches.query.shape), found


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows [L, M, D] of [L, N, D] by index [L, M], where the index N means a row of zeros."""
    count = values.shape[1]
    if not count:
        return values.new_zeros(*index.shape, values.shape[2])
    rows = values.gather(1, index.clamp(max=count - 1).unsqueeze(-1).expand(-1, -1, values.shape[2]))
    return torch.where((index < count).unsqueeze(-1), rows, 0)


class _Take(torch.autograd.Function):
    """:func:`take` for an index in which nothing but N occurs twice."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = values.shape[1]
        return take(values, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        spare = grad.new_zeros(grad.shape[0], ctx.count + 1, grad.shape[2])  # the last row takes what belongs to no query
        return spare.scatter(1, index.unsqueeze(-1).expand_as(grad), grad)[:, : ctx.count], None


def packed_for(targets: AnyTargets, matches: Matches) -> PackedTargets:
    """The rows of `targets`, which must be those that were matched."""
    check_matches(matches)
    packed = pack_targets(targets, matches.query.device)
    if packed.rows != matches.query.shape[-1] or packed.batch != matches.batch:
        raise ValueError(
            f"targets must be those of the matches, {matches.query.shape[-1]} rows in {matches.batch} images, "
            f"got {packed.rows} rows in {packed.batch} images"
        )
    _check_images(packed, matches)
    return packed


def _check_images(packed: PackedTargets, matches: Matches) -> None:
    """Refuses other numbers of targets per image than were matched where the host knows both."""
    if packed.sizes is not None and matches.pair_counts is not None:
        expected = count_pairs(packed.sizes, matches.queries, matches.groups, matches.repeats)
        if expected != matches.pair_counts:
            raise ValueError(
                f"targets must be those of the matches, with pairs {list(matches.pair_counts)} in the images, "
                f"got targets {list(packed.sizes)}, which take {list(expected)}"
            )
    for name, ours, theirs in (("image", packed.image, matches.image), ("counts", packed.counts, matches.counts)):
        if ours is None or theirs is None or ours is theirs or not (readable(ours) and readable(theirs)):
            continue
        if not np.array_equal(ours.numpy(), theirs.numpy()):
            raise ValueError(f"targets must be those of the matches, {name} {theirs.tolist()}, got {name} {ours.tolist()}")


def check_matches(matches: Matches) -> None:
    """Refuses what is no result of a matching."""
    if not isinstance(matches, Matches):
        raise TypeError(f"matches must be the Matches that match() or linear_assignment() return, got {type(matches).__name__}")


def layers_of(name: str, predictions: Tensor, matches: Matches, width: int | str = "D") -> Tensor:
    """Predictions as [L, B, Q, D], checked against the matches; `width` is D if it must be a certain number, else its name."""
    check_matches(matches)
    if not isinstance(predictions, Tensor) or not predictions.is_floating_point():
        found = predictions.dtype if isinstance(predictions, Tensor) else type(predictions).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {found}")
    stacked = predictions.unsqueeze(0) if predictions.dim() == 3 else predictions
    wanted = (matches.layers, matches.batch, matches.queries)
    fits = stacked.dim() == 4 and tuple(stacked.shape[:3]) == wanted
    if not fits or (isinstance(width, int) and stacked.shape[3] != width):
        shape = ", ".join(str(size) for size in (*wanted, width))
        raise ValueError(f"{name} must be [{shape}] as the matches are, got {list(predictions.shape)}")
    if stacked.device != matches.query.device:
        raise ValueError(f"{name} and matches must be on one device, got {stacked.device} and {matches.query.device}")
    return stacked


def _check_labels(labels: Tensor, matches: Matches) -> None:
    """Refuses what does not hold one integer per target row."""
    if not isinstance(labels, Tensor) or labels.dtype is torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be an integer tensor, got {labels.dtype if isinstance(labels, Tensor) else type(labels).__name__}")
    rows = matches.query.shape[-1]
    if tuple(labels.shape) != (rows,):
        raise ValueError(f"labels must be [{rows}] as the matches are, got {list(labels.shape)}")
    if labels.device != matches.query.device:
        raise ValueError(f"labels and matches must be on one device, got {labels.device} and {matches.query.device}")
