"""Minimum-cost matching of targets with queries, for all layers, groups and images in one call."""

from __future__ import annotations

import itertools
import math
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ._image_rows import brief, check_integers, check_offsets, readable
from ._matches import INVALID_ENTRIES, INVALID_PAIR, UNMATCHED_TARGET, Matches
from ._registry import launcher, register
from ._shortest_paths import Indices, Reals, shortest_path_assignment

_WIDE = frozenset((torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
_NARROW = frozenset((torch.float32, torch.float16, torch.bfloat16))
_AWKWARD = frozenset((torch.bool, torch.uint16, torch.uint32, torch.uint64))
_LAYOUTS = ("target_major", "query_major")
_ORDERS = ("tile", "interleave")
_INVALID = ("keep", "drop", "raise")
_TIES = ("scipy", "any")
_MOST_REPEATS = 4096  # each takes memory for all targets, matched or not; one-to-many matching wants five or six


def linear_assignment(
    cost: Tensor,
    *,
    offsets: Tensor | None = None,
    counts: Tensor | None = None,
    layout: Literal["target_major", "query_major"] = "target_major",
    groups: int = 1,
    repeats: int = 1,
    repeat_order: Literal["tile", "interleave"] = "tile",
    invalid: Literal["keep", "drop", "raise"] = "keep",
    ties: Literal["scipy", "any"] = "scipy",
    row_min: Tensor | None = None,
) -> Matches:
    """Matches every target with a query of its image so that the sum of costs is minimal, one to one.

    The problems are solved by shortest augmenting paths in float64, in the order and with the choices among equal costs of
    `scipy.optimize.linear_sum_assignment`: the indices are those that scipy finds on the [Q, T] matrix of each problem. Nothing waits for
    the device except `invalid="raise"`. The assignment has no gradient.

    Entries that are NaN or infinite are invalid. A pair sits on one only where no complete matching avoids it; the number of such pairs is
    as small as possible.

    Args:
        cost: float32 or float64; half precision is solved in float32, integers in float64. Q is contiguous at best. One of

            - ragged, with `offsets`: [L, G, Q] or [G, Q], rows of image b from `offsets[b]` to `offsets[b + 1]`;
            - padded, with or without `counts`: [L, B, T, Q], [B, T, Q] or [T, Q]. Padding rows may hold anything.
        offsets: int32 or int64 [B + 1].
        counts: int32 or int64 [B], number of real targets of each image; None if all of them are real.
        layout: "query_major" for a `cost` whose last two dimensions are exchanged; it is copied.
        groups: the queries are split into this many equal ranges, each matched with all targets (Group DETR).
        repeats: every target takes this many queries of each group (H-DETR's one-to-many branch), at most 4096.
        repeat_order: order of the rows when targets repeat, which decides among equal costs: "tile" repeats the list of targets,
            "interleave" every target in place.
        invalid: what becomes of pairs on invalid entries: "keep" returns them with cost +inf, "drop" leaves their targets unmatched,
            "raise" raises, for which it waits for the device.
        ties: "any" permits another optimum among several of equal cost, which is found faster where targets are many.
        row_min: int64 of the shape of `cost` without queries, the row minima that :func:`matching_cost` returns with `row_min=True`. Saves
            a pass over float32 costs without groups. They must be those of this very cost, unchanged since: nothing compares them with it,
            and with those of another one the result is some matching, not the best one.

    Returns:
        Queries and costs of all targets, with the status of each problem.

    Raises:
        ValueError: for wrong shapes and devices, unknown options, queries that `groups` does not divide, and invalid pairs under "raise".
        TypeError: for wrong dtypes, `groups` and `repeats` that are no int.
    """
    _check_options(layout, repeat_order, invalid, ties)
    _check_cost(cost, offsets)
    cost = cost.detach()
    if layout == "query_major":
        turned = cost.transpose(-1, -2)
        cost = turned if turned.is_contiguous() else _transpose(_as_solvable(cost))
    rows = _as_rows(cost, offsets, counts)
    queries = cost.shape[-1]
    _check_groups(groups, repeats, queries)
    flat = _as_solvable(rows.cost)
    keys = None if row_min is None else _check_keys(row_min, cost, flat)
    query, matched, status = _op(
        flat, rows.offsets, rows.counts, keys, rows.batch, groups, repeats, repeat_order == "interleave", invalid == "drop", ties == "any"
    )
    if invalid == "raise" and bool((status & INVALID_PAIR).any()):
        raise ValueError("cost has NaN or infinite entries that no complete matching avoids")
    return Matches(query, matched, status, rows.image(), queries, rows.batch, groups, repeats, rows.offsets, rows.counts)


def linear_sum_assignment(matrix: Tensor | npt.ArrayLike, maximize: bool = False) -> tuple[Tensor, Tensor]:
    """`scipy.optimize.linear_sum_assignment` for one matrix or a batch of equal shape: same pairs, also among equal costs.

    The result is on the host, so this waits for the device of the matrix; :func:`linear_assignment` does not.

    Args:
        matrix: [R, C] or [B, R, C], a tensor or what NumPy makes an array of; real numbers or bools. +inf forbids a pair.
        maximize: whether the sum shall be as large as possible; -inf then forbids a pair.

    Returns:
        Row and column indices of the min(R, C) pairs, int64 [min(R, C)] or [B, min(R, C)], rows ascending.

    Raises:
        ValueError: for another number of dimensions, NaN, infinities of the wrong sign, and where no matching avoids what is forbidden.
        TypeError: for what holds no real numbers.
    """
    cost = _as_matrix(matrix)
    if cost.dim() not in (2, 3):
        raise ValueError(f"matrix must have shape [R, C] or [B, R, C], got {list(cost.shape)}")
    _check_real("matrix", cost)
    cost = _as_solvable(-_as_solvable(cost) if maximize else cost)
    if bool((cost.isnan() | (cost == -math.inf)).any()):
        raise ValueError("matrix contains invalid numeric entries")
    rows, columns = cost.shape[-2:]
    matches = linear_assignment(cost, layout="target_major" if rows < columns else "query_major")
    if bool((matches.status & INVALID_PAIR).any()):
        raise ValueError("cost matrix is infeasible")
    size = min(rows, columns)
    found = matches.query.cpu().view(-1, size) if size else matches.query.new_zeros(math.prod(cost.shape[:-2]), 0, device="cpu")
    ascending = torch.arange(size).expand(found.shape)
    shape = (*cost.shape[:-2], size)
    if rows < columns:
        return ascending.reshape(shape), found.reshape(shape)
    row, column = found.sort(-1)
    return row.reshape(shape), column.reshape(shape)


def _as_matrix(matrix: Tensor | npt.ArrayLike) -> Tensor:
    """A tensor of whatever scipy would take; what torch computes little with becomes float64."""
    if isinstance(matrix, Tensor):
        return (matrix.double() if matrix.dtype in _AWKWARD else matrix).detach()
    array = np.asarray(matrix)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"matrix must hold real numbers, got {type(matrix).__name__} of dtype {array.dtype}")
    dtype = np.float32 if array.dtype.kind == "f" and array.dtype.itemsize <= 4 else np.float64
    array = np.require(array, dtype, "W")  # torch warns of arrays that are not writable
    return torch.from_numpy(array.copy() if any(stride < 0 for stride in array.strides) else array)


class _Rows(NamedTuple):
    """Costs as rows [L, G, Q] and who owns them."""

    cost: Tensor
    batch: int
    offsets: Tensor | None
    counts: Tensor | None

    def image(self) -> Tensor:
        """The image of each row, int64 [G]."""
        total, last = self.cost.shape[1], max(self.batch - 1, 0)
        if self.offsets is not None and readable(self.offsets):  # several times faster than on tensors
            return torch.from_numpy(np.repeat(np.arange(self.batch), np.diff(self.offsets.numpy())))
        row = torch.arange(total, device=self.cost.device)
        if self.offsets is None:
            return row // max(total // max(self.batch, 1), 1)
        return torch.searchsorted(self.offsets[1:], row, right=True).clamp_(max=last)


def _as_rows(cost: Tensor, offsets: Tensor | None, counts: Tensor | None) -> _Rows:
    if offsets is None:
        layers, batch, width, queries = (1,) * (4 - cost.dim()) + tuple(cost.shape)
        counts = None if counts is None else _check_counts(counts, batch, width, cost.device)
        return _Rows(cost.reshape(layers, batch * width, queries), batch, None, counts)
    if counts is not None:
        raise ValueError("offsets and counts must not be given together: rows are ragged or padded")
    rows = cost if cost.dim() == 3 else cost.unsqueeze(0)
    batch = _batch_of(offsets)
    return _Rows(rows, batch, check_offsets("offsets", offsets, batch, rows.shape[1], cost.device), None)


def _batch_of(offsets: Tensor) -> int:
    """B, from offsets [B + 1] whose contents are checked later."""
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets must be a tensor, got {type(offsets).__name__}")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must have shape [B + 1], got {list(offsets.shape)}")
    return offsets.shape[0] - 1


def _check_counts(counts: Tensor, batch: int, width: int, device: torch.device) -> Tensor:
    check_integers("counts", counts, (batch,), device)
    if readable(counts) and batch:
        values: list[int] = counts.numpy().tolist()
        if not (min(values) >= 0 and max(values) <= width):
            raise ValueError(f"counts must lie in 0..{width}, the number of target rows of an image, got {brief(values)}")
    return counts.to(torch.int64).contiguous()


def _check_options(layout: str, repeat_order: str, invalid: str, ties: str) -> None:
    for name, value, choices in (
        ("layout", layout, _LAYOUTS),
        ("repeat_order", repeat_order, _ORDERS),
        ("invalid", invalid, _INVALID),
        ("ties", ties, _TIES),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_real(name: str, cost: Tensor) -> None:
    if not isinstance(cost, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(cost).__name__}")
    if cost.dtype not in _WIDE and cost.dtype not in _NARROW:
        raise TypeError(f"{name} must have a real number dtype, got {cost.dtype}")
    if cost.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {cost.layout}")


def _check_cost(cost: Tensor, offsets: Tensor | None) -> None:
    _check_real("cost", cost)
    if offsets is not None and cost.dim() not in (2, 3):
        raise ValueError(f"cost must have shape [L, G, Q] or [G, Q] with offsets, got {list(cost.shape)}")
    if cost.dim() not in (2, 3, 4):
        raise ValueError(f"cost must have shape [L, B, T, Q], [B, T, Q] or [T, Q], got {list(cost.shape)}")


def _check_groups(groups: int, repeats: int, queries: int) -> None:
    check_copies(groups, repeats)
    if queries % groups:
        raise ValueError(f"groups must be >= 1 and divide the number of queries ({queries}), got {groups}")


def check_copies(groups: int, repeats: int) -> None:
    """Refuses numbers of groups and repeats that fit no number of queries."""
    for name, value in (("groups", groups), ("repeats", repeats)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if repeats > _MOST_REPEATS:
        raise ValueError(f"repeats must be at most {_MOST_REPEATS}, got {repeats}")


def _check_keys(row_min: Tensor, cost: Tensor, flat: Tensor) -> Tensor:
    """Row keys [L, G]."""
    if not isinstance(row_min, Tensor) or row_min.dtype is not torch.int64:
        raise TypeError(f"row_min must be an int64 tensor, got {getattr(row_min, 'dtype', type(row_min).__name__)}")
    if row_min.shape != cost.shape[:-1]:
        raise ValueError(f"row_min must have shape {list(cost.shape[:-1])}, as the cost without queries, got {list(row_min.shape)}")
    if row_min.device != cost.device:
        raise ValueError(f"row_min must be on {cost.device} as the cost is, got {row_min.device}")
    return row_min.reshape(flat.shape[:2]).contiguous()


def _as_solvable(cost: Tensor) -> Tensor:
    """float32 or float64 with queries side by side."""
    if cost.dtype is not torch.float32 and cost.dtype is not torch.float64:
        cost = cost.to(torch.float32 if cost.dtype in _NARROW else torch.float64)
    return cost.contiguous()


def _reference(
    cost: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    keys: Tensor | None,
    batch: int,
    groups: int,
    repeats: int,
    interleave: bool,
    drop_invalid: bool,
    any_ties: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Problem by problem on the host. Row keys only save time, and scipy's choice among equal costs is one of any."""
    layers, total, queries = cost.shape
    matrix = cost.cpu().numpy()
    width = queries // groups
    query = np.full((layers, groups * repeats, total), -1)
    matched = np.full(query.shape, np.inf, dtype=matrix.dtype)
    status = np.zeros((layers, groups, batch), dtype=np.uint8)
    for image, (begin, end) in enumerate(_bounds(offsets, counts, batch, total)):
        for layer, group in np.ndindex(layers, groups):
            first = group * width
            block = matrix[layer, begin:end, first : first + width]
            found, bits = _solve(block, repeats, interleave, drop_invalid)
            entries = slice(group * repeats, (group + 1) * repeats)
            query[layer, entries, begin:end] = np.where(found < 0, -1, found + first)
            matched[layer, entries, begin:end] = _costs_of(block, found)
            status[layer, group, image] = bits
    return tuple(torch.from_numpy(result).to(cost.device) for result in (query, matched, status))  # type: ignore[return-value]


def _bounds(offsets: Tensor | None, counts: Tensor | None, batch: int, total: int) -> list[tuple[int, int]]:
    """First row of each image and the row behind its last one, in range whatever was passed."""
    if offsets is not None:
        edges = offsets.clamp(0, total).tolist()
        return [(a, max(a, b)) for a, b in itertools.pairwise(edges)]
    width = total // max(batch, 1)
    sizes = [width] * batch if counts is None else counts.clamp(0, width).tolist()
    return [(b * width, b * width + size) for b, size in enumerate(sizes)]


def _solve(block: Reals, repeats: int, interleave: bool, drop_invalid: bool) -> tuple[Indices, int]:
    """Query of each copy of each target, [repeats, T] with -1 for none, and the status of one problem [T, Q]."""
    targets, queries = block.shape
    entry = np.arange(targets * repeats)
    copy, target = (entry % repeats, entry // repeats) if interleave else (entry // max(targets, 1), entry % max(targets, 1))
    matrix, valid = _fill_invalid(block.astype(np.float64), min(queries, targets * repeats))
    query = np.full(targets * repeats, -1)
    if entry.size < queries:
        query = shortest_path_assignment(matrix[target])
    else:
        entry_of = shortest_path_assignment(matrix[target].T)
        query[entry_of[entry_of >= 0]] = np.flatnonzero(entry_of >= 0)
    on_invalid = (query >= 0) & ~valid[target, query] if queries else query >= 0
    bits = INVALID_ENTRIES * (not valid.all()) + INVALID_PAIR * bool(on_invalid.any())
    if drop_invalid:
        query[on_invalid] = -1
    found = np.full((repeats, targets), -1)
    found[copy, target] = query
    return found, bits + UNMATCHED_TARGET * bool((found < 0).any())


def _fill_invalid(matrix: Reals, pairs: int) -> tuple[Reals, npt.NDArray[np.bool_]]:
    """The matrix with a price for its invalid entries so high that as few as possible are taken, and which entries are valid."""
    valid = np.isfinite(matrix)
    if valid.all():
        return matrix, valid
    high, low = (matrix[valid].max(), matrix[valid].min()) if valid.any() else (0.0, 0.0)
    margin = max(1.0, 2.0**-40 * max(abs(high), abs(low)))  # 1 would vanish beside 1e30
    return np.where(valid, matrix, high + pairs * (high - low) + margin), valid


def _costs_of(block: Reals, found: Indices) -> Reals:
    """Cost of each pair, +inf where there is none or it is invalid."""
    if block.shape[1] == 0:
        return np.full(found.shape, np.inf)
    cost = block[np.arange(block.shape[0]), found]
    return np.where((found >= 0) & np.isfinite(cost), cost, np.inf)


def _fake(
    cost: Tensor, offsets: Tensor | None, counts: Tensor | None, keys: Tensor | None, batch: int, groups: int, repeats: int, *options: bool
) -> tuple[Tensor, Tensor, Tensor]:
    layers, total, _ = cost.shape
    shape = (layers, groups * repeats, total)
    return (
        cost.new_empty(shape, dtype=torch.int64),
        cost.new_empty(shape),
        cost.new_empty((layers, groups, batch), dtype=torch.uint8),
    )


def _reference_transpose(costs: Tensor) -> Tensor:
    return costs.transpose(-1, -2).clone(memory_format=torch.contiguous_format)


def _fake_transpose(costs: Tensor) -> Tensor:
    return costs.new_empty((*costs.shape[:-2], costs.shape[-1], costs.shape[-2]))


register(
    "linear_assignment(Tensor cost, Tensor? offsets, Tensor? counts, Tensor? keys, int batch, int groups, int repeats, bool interleave, "
    "bool drop_invalid, bool any_ties) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    triton=launcher("linear_assignment", "linear_assignment"),
)
register(  # torch copies such views on a CPU several times slower, on a GPU as fast as memory allows
    "transpose_costs(Tensor costs) -> Tensor", reference=_reference_transpose, fake=_fake_transpose, composed=True
)
_op = torch.ops.ssod_fast.linear_assignment.default
_transpose = torch.ops.ssod_fast.transpose_costs.default
