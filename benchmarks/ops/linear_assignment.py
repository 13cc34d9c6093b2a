"""Assignments on costs of a DETR-like detector, against scipy and the fastest solvers of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from boxes import optional
from harness import OURS, Call, Case, rotate, with_threads
from matching import detr_batch
from ssod_fast.ops import linear_assignment, matching_cost, pack_targets

SCIPY, LAPJVR, TARGET_MAJOR = "scipy", "lapjvr", "lapjvr, target-major"
TRITON = "torch-linear-assignment"
CLASSES = 80
Inputs = tuple[Tensor, Tensor, Tensor]  # costs [L, G, Q], offsets [B + 1], row keys [L, G]
Limits = Mapping[str, float]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Batches of the shapes that detectors have, then single square problems, which are the hardest."""
    if device.type == "cuda":
        yield from cuda_cases(device, quick)
        return
    if quick:
        yield batch_case("mixed", 1, 2, 60, 7, device, {})
        yield batch_case("mixed", 1, 4, 60, [3, 0, 9, 1], device, {})
        yield batch_case("random", 1, 1, 30, 30, device, {}, ties="any")
        return
    for kind in ("mixed", "clustered", "random", "equal"):
        limits = {SCIPY: 14.0, LAPJVR: 3.5} if kind == "mixed" else {}
        yield batch_case(kind, 1, 16, 900, 100, device, limits)
    yield batch_case("mixed", 7, 16, 300, 20, device, {SCIPY: 14, LAPJVR: 3.4})
    yield batch_case("mixed", 7, 16, 900, 100, device, {SCIPY: 15, LAPJVR: 3.6})
    yield batch_case("mixed", 1, 16, 900, 300, device, {SCIPY: 12, LAPJVR: 2.2})
    yield batch_case("mixed", 1, 112, 300, ragged_sizes(112), device, {SCIPY: 16, LAPJVR: 4})
    yield batch_case("mixed", 13, 16, 300, 100, device, {SCIPY: 10, LAPJVR: 3.3})
    for kind in ("random", "early", "late"):
        yield batch_case(kind, 1, 1, 300, 300, device, {SCIPY: 2.2})
        yield batch_case(kind, 1, 1, 300, 300, device, {LAPJVR: 1}, ties="any")
    yield threads_case(device)


def cuda_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """All seven layers at once, with the row keys that the matching cost leaves; scipy pays for its copies."""
    layers, batch, queries, targets = (2, 2, 60, 7) if quick else (7, 16, 900, 100)
    for kind, ceiling in (("early", 25.0), ("late", 6.0), ("clustered", None)):
        yield batch_case(kind, layers, batch, queries, targets, device, {SCIPY: 2000} if ceiling else {}, ceiling=ceiling)
    yield batch_case("early", layers, batch, queries, targets, device, {}, keys=False)
    layers, batch, queries, targets = (2, 2, 30, 10) if quick else (13, 16, 300, 100)
    yield batch_case("random", layers, batch, queries, targets, device, {TRITON: 12}, ceiling=40.0)
    yield batch_case("mixed", layers, batch, queries, targets, device, {})


def ragged_sizes(batch: int) -> list[int]:
    """Numbers of objects as in COCO: most images have few, some have many, 6.7 on average; always the same."""
    rng = np.random.default_rng(0)
    sizes: list[int] = np.minimum(rng.geometric(1 / 7.7, batch) - 1, 60).tolist()
    return sizes


def costs(kind: str, layers: int, batch: int, queries: int, targets: int | Sequence[int], device: torch.device, seed: int) -> Inputs:
    """Costs and row keys of a batch; `random` ones have no structure."""
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        sizes = [targets] * batch if isinstance(targets, int) else list(targets)
        cost = torch.rand(layers, sum(sizes), queries, generator=generator).to(device)
        return cost, torch.tensor([0, *np.cumsum(sizes)], device=device), cost.argmin(-1)
    logits, boxes, wanted = detr_batch(kind, layers, batch, queries, targets, CLASSES, device, seed)
    packed = pack_targets(wanted)
    cost, keys = matching_cost(logits, boxes, packed, row_min=True)  # type: ignore[call-overload]
    assert packed.offsets is not None
    return cost, packed.offsets, keys


def problems(cost: Tensor, offsets: Tensor) -> list[Tensor]:
    """[T, Q] of each layer and image."""
    edges = offsets.tolist()
    return [layer[a:b] for layer in cost for a, b in pairwise(edges)]


def batch_case(
    kind: str,
    layers: int,
    batch: int,
    queries: int,
    targets: int | Sequence[int],
    device: torch.device,
    limits: Limits,
    *,
    ties: str = "scipy",
    keys: bool = True,
    ceiling: float | None = None,
) -> Case:
    """One batch. The peers get [Q, T] matrices side by side in memory, as matchers make them; on a CPU nobody gets row keys."""
    gpu = device.type == "cuda"
    large = layers * batch * queries > 50000
    inputs = [costs(kind, layers, batch, queries, targets, device, seed) for seed in range(2 if large else 4)]
    use_keys = gpu and keys

    def ours(cost: Tensor, offsets: Tensor, row_min: Tensor) -> Any:
        return linear_assignment(cost, offsets=offsets, ties=ties, row_min=row_min if use_keys else None)  # type: ignore[arg-type]

    providers: dict[str, Call] = {OURS: rotate(ours, inputs)}
    providers |= cuda_peers(inputs) if gpu else cpu_peers(inputs, targets)
    entries = inputs[0][0].numel()
    found = 16 * inputs[0][2].numel()
    each = str(targets) if isinstance(targets, int) else f"{sum(targets) / batch:.1f} ragged"
    return Case(
        op="linear_assignment",
        name=f"{layers * batch}x{queries}x{each}",
        mode=f"ties={ties}" + (" with row keys" if use_keys else ""),
        dtype="float32",
        inputs=kind,
        bytes=(0 if use_keys else 4 * entries) + found,
        providers=providers,
        check=lambda: check(*inputs[0], exact=ties == "scipy"),
        targets=limits,
        ceiling_us=ceiling,
        eager_only=(SCIPY, TRITON),
        note="with row keys only the rows of conflicts are read" if use_keys else "",
    )


def cpu_peers(inputs: Sequence[Inputs], targets: int | Sequence[int]) -> dict[str, Call]:
    """scipy and lapjvr on one thread."""
    peers: dict[str, Call] = {}
    matrices = [([one.T.contiguous().numpy() for one in problems(c, o)],) for c, o, _ in inputs]
    scipy, lap = optional("scipy.optimize"), optional("lap")
    if scipy is not None:
        peers[SCIPY] = rotate(lambda many: [scipy.linear_sum_assignment(one) for one in many], matrices)
    if lap is None:
        return peers
    if not isinstance(targets, int):
        peers[LAPJVR] = rotate(lambda many: [lap.lapjvr(one, extend_cost=True) for one in many if one.size], matrices)
        return peers

    def batched(stack: Any) -> Any:
        return lap.lapjvr_batch(stack, extend_cost=True, n_threads=1)

    peers[LAPJVR] = rotate(batched, [(np.stack(many),) for (many,) in matrices])
    peers[TARGET_MAJOR] = rotate(batched, [(torch.stack(problems(c, o)).numpy(),) for c, o, _ in inputs])
    return peers


def cuda_peers(inputs: Sequence[Inputs]) -> dict[str, Call]:
    """scipy with its copy to the host and back, and the Triton solver."""
    peers: dict[str, Call] = {}
    stacks = [(torch.stack(problems(c, o)).transpose(1, 2).contiguous(),) for c, o, _ in inputs]
    scipy, theirs = optional("scipy.optimize"), optional("torch_linear_assignment")
    if scipy is not None:

        def on_host(stack: Tensor) -> list[tuple[Tensor, ...]]:
            return [tuple(torch.as_tensor(x).to(stack.device) for x in scipy.linear_sum_assignment(one)) for one in stack.cpu().numpy()]

        peers[SCIPY] = rotate(on_host, stacks)
    if theirs is not None:
        peers[TRITON] = rotate(theirs.batch_linear_assignment, stacks)
    return peers


def threads_case(device: torch.device) -> Case:
    """Two threads against one."""
    inputs = [costs("mixed", 7, 16, 900, 100, device, seed) for seed in range(2)]
    call = rotate(lambda c, o, _: linear_assignment(c, offsets=o), inputs)
    return Case(
        op="linear_assignment",
        name="112x900x100, 2 threads",
        mode="ties=scipy",
        dtype="float32",
        inputs="mixed",
        bytes=4 * inputs[0][0].numel() + 16 * inputs[0][2].numel(),
        providers={OURS: with_threads(call, 2), "ours, 1 thread": with_threads(call, 1)},
        check=lambda: check(*inputs[0], exact=True),
        targets={"ours, 1 thread": 1.7},
        note="scaling over threads, whatever --threads says",
    )


def check(cost: Tensor, offsets: Tensor, keys: Tensor, exact: bool) -> None:
    """scipy's indices, or its total cost."""
    scipy = optional("scipy.optimize")
    if scipy is None:
        raise RuntimeError("the gate of linear_assignment compares with scipy: install it")
    solve: Callable[..., Any] = scipy.linear_sum_assignment
    matches = [linear_assignment(cost, offsets=offsets, ties="scipy" if exact else "any", row_min=k) for k in (None, keys)]
    for match in matches:
        for one, queries in zip(problems(cost.cpu(), offsets), query_lists(match.query, offsets), strict=True):
            matrix = one.numpy().astype(np.float64)
            query, target = solve(matrix.T)
            if exact:
                np.testing.assert_array_equal(queries[target], query)
            mine = matrix[np.arange(len(queries)), queries][queries >= 0].sum()
            np.testing.assert_allclose(mine, matrix.T[query, target].sum(), rtol=1e-9, atol=1e-9)


def query_lists(query: Tensor, offsets: Tensor) -> list[Any]:
    """Queries [T] of each layer and image."""
    edges = offsets.tolist()
    return [layer[a:b] for layer in query[:, 0].cpu().numpy() for a, b in pairwise(edges)]
