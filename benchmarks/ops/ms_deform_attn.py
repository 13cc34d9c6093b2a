"""Deformable attention, plain and fused, against grid_sample as transformers composes it, torch.compile of that, and kernels of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deformable import (
    DEFORMABLE_SHAPES,
    FAR,
    NEAR,
    RT_DETR_SHAPES,
    SMALL_SHAPES,
    TYPICAL,
    UNIFORM,
    Attention,
    Fused,
    Plain,
    Workload,
    composed,
    fused_inputs,
    grid_sample_peer,
    kernel_peers,
    locations_of,
    plain_inputs,
    unfused,
)
from harness import MIB, OURS, Call, Case, rotate
from ssod_fast.ops import ms_deform_attn, ms_deform_attn_fused
from ssod_fast.ops.ms_deform_attn import ms_deform_attn_gradients

COMPILED = "torch.compile of grid_sample"
SUMMATIONS = {"ours, atomics alone": 1, "ours, tiles": 2}
SEPARATE = "softmax and positions in torch, our plain op"
BARE = "bare dispatcher call"
IN_FUNCTION = "bare dispatcher call in an autograd.Function"
HOST_US = 10.0  # what checks and defaults may add to an eager call
GATE_ROWS = 300  # queries that the gate computes in float64

RT_DETR = Workload("RT-DETR decoder, 300 queries", 1, 300, RT_DETR_SHAPES, boxes=True)
RT_DETR_16 = Workload("RT-DETR decoder, 300 queries", 16, 300, RT_DETR_SHAPES, boxes=True)
DECODER = Workload("Deformable-DETR decoder, 300 queries", 1, 300, DEFORMABLE_SHAPES)
DECODER_900 = Workload("DINO decoder, 900 queries", 1, 900, DEFORMABLE_SHAPES)
ENCODER = Workload("Deformable-DETR encoder, 22223 queries", 1, 0, DEFORMABLE_SHAPES)
DECODER_2 = Workload("Deformable-DETR decoder, 300 queries", 2, 300, DEFORMABLE_SHAPES)
DECODER_900_2 = Workload("DINO decoder, 900 queries", 2, 900, DEFORMABLE_SHAPES)
ENCODER_2 = Workload("Deformable-DETR encoder, 22223 queries", 2, 0, DEFORMABLE_SHAPES)
SMALL_DECODER = Workload("small decoder, 20 queries", 2, 20, SMALL_SHAPES, boxes=True, heads=4, channels=8)
SMALL_ENCODER = Workload("small encoder, 212 queries", 2, 0, SMALL_SHAPES, heads=4, channels=8)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Layers of RT-DETR, Deformable DETR and DINO; on a GPU see :func:`gpu_cases`."""
    if device.type == "cuda":
        yield from gpu_cases(device, quick)
        return
    forward = {RT_DETR: 10.0, DECODER: 10.0, DECODER_900: None, ENCODER: 5.0}
    if quick:
        forward = {SMALL_DECODER: None, SMALL_ENCODER: None}
    for work, wanted in forward.items():
        for kind in (TYPICAL, UNIFORM):
            compiled = kind == TYPICAL and work in (RT_DETR, DECODER, SMALL_DECODER)
            yield plain_case(work, kind, "float32", device, wanted, compiled=compiled)
        yield plain_case(work, TYPICAL, "bfloat16", device, None)
        yield fused_case(work, TYPICAL, "float32", device, wanted)
        if work is not DECODER_900:
            yield plain_case(work, TYPICAL, "float32", device, wanted and 4.0, backward=True)
            yield fused_case(work, TYPICAL, "float32", device, wanted and 4.0, backward=True)
    yield from overhead_cases(device)


GPU_CEILINGS_US = {  # forward float32, forward bfloat16, backward float32, backward bfloat16; decoders: any positions
    (ENCODER_2, TYPICAL): (130, 100, 450, 400),
    (ENCODER_2, UNIFORM): (530, 265, 2400, 2400),
    (ENCODER_2, NEAR): (None, None, None, None),
    (ENCODER_2, FAR): (None, None, None, None),
    (DECODER_2, TYPICAL): (7, 6, 25, 25),
    (DECODER_2, UNIFORM): (7, 6, 25, 25),
    (DECODER_900_2, TYPICAL): (12, 9, 32, 32),
    (DECODER_900_2, UNIFORM): (12, 9, 32, 32),
    (RT_DETR, TYPICAL): (4, 4, 8, 8),
    (RT_DETR, UNIFORM): (4, 4, 8, 8),
    (RT_DETR_16, TYPICAL): (25, 18, 60, 60),
    (RT_DETR_16, UNIFORM): (25, 18, 60, 60),
}


def gpu_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Forward and backward alone under ceilings of device time, and both together; positions from local to random."""
    ceilings = {(work, TYPICAL): (None,) * 4 for work in (SMALL_DECODER, SMALL_ENCODER)} if quick else GPU_CEILINGS_US
    for (work, kind), (single, half, backward, half_backward) in ceilings.items():
        typical = kind == TYPICAL
        yield plain_case(work, kind, "float32", device, 1.0, compiled=typical and not quick, ceiling=single)
        yield plain_case(work, kind, "bfloat16", device, 1.0, ceiling=half)
        yield backward_case(work, kind, "float32", device, ceiling=backward)
        yield backward_case(work, kind, "bfloat16", device, ceiling=half_backward)
        if typical:
            yield plain_case(work, kind, "float16", device, 1.0)  # for peers that have no bfloat16
            yield plain_case(work, kind, "float32", device, 1.0, backward=True, compiled=not quick)
            for dtype in ("float32", "bfloat16"):
                yield fused_case(work, kind, dtype, device, 1.0)
                yield fused_case(work, kind, dtype, device, 1.0, backward=True)
    yield from overhead_cases(device)


def plain_case(
    work: Workload,
    kind: str,
    dtype: str,
    device: torch.device,
    wanted: float | None,
    *,
    backward: bool = False,
    compiled: bool = False,
    ceiling: float | None = None,
) -> Case:
    """The op on given positions and weights. `wanted` is the ratio to the peers: on a CPU to the composition, on a GPU to all."""
    of_value, whole = getattr(torch, dtype), dtype == "float32"
    inputs = plain_inputs(work, kind, of_value, device)
    theirs = inputs if whole else plain_inputs(work, kind, of_value, device, geometry=of_value)
    peers = plain_peers(work, device, of_value, compiled)
    named = [*peers] if device.type == "cuda" else [*peers][:1]
    run = with_gradients if backward else without_gradients
    return Case(
        op="ms_deform_attn",
        name=str(work),
        mode="forward+backward" if backward else "forward",
        dtype=dtype,
        inputs=kind,
        bytes=traffic(work, inputs[0], backward),
        providers={OURS: run(work, ms_deform_attn, inputs), **{name: run(work, peer, theirs) for name, peer in peers.items()}},
        check=lambda: check_plain(work, inputs[0], peers if whole else {}, autograd(work, ms_deform_attn) if backward else None),
        targets=dict.fromkeys(named, wanted) if wanted else {},
        ceiling_us=ceiling,
        note="" if whole else f"positions and weights float32, as under autocast; peers, which take one dtype, get all in {dtype}",
    )


def backward_case(work: Workload, kind: str, dtype: str, device: torch.device, ceiling: float | None) -> Case:
    """The backward alone, by explicit call; peers walk back a graph that is kept."""
    inputs = plain_inputs(work, kind, getattr(torch, dtype), device)
    peers = plain_peers(work, device, torch.float32) if dtype == "float32" else {}

    def ours(grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return ms_deform_attn_gradients(grad, value, work.shapes, locations, weights)

    summed = summations(work, device)

    def check() -> None:
        for gradient in (ours, *summed.values()):
            check_plain(work, inputs[0], {}, gradient)

    named = {name: walk(work, peer, inputs) for name, peer in peers.items()}
    return Case(
        op="ms_deform_attn",
        name=str(work),
        mode="backward",
        dtype=dtype,
        inputs=kind,
        bytes=traffic(work, inputs[0], True) - traffic(work, inputs[0], False),
        providers={name: rotate(f, with_grads(work, inputs)) for name, f in {OURS: ours, **summed}.items()} | named,
        check=check,
        targets=dict.fromkeys(peers, 1.0) if device.type == "cuda" else {},
        ceiling_us=ceiling,
        eager_only=tuple(peers),  # autograd runs a backward on the stream of its forward, which no capture sees
    )


def summations(work: Workload, device: torch.device) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """Both ways in which our CUDA kernels can sum the gradient of value where queries are tokens; ours takes what it thinks best."""
    if device.type != "cuda" or work.queries or not hasattr(torch.ops.ssod_fast, "_ms_deform_attn_backward_by"):
        return {}
    sizes = [side for size in work.shapes for side in size]

    def gradients(summation: int, grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        samples = locations.flatten(3, 4), weights.flatten(3)
        by = torch.ops.ssod_fast._ms_deform_attn_backward_by
        of_value, _, *rest = by(grad, value, None, None, None, *samples, sizes, None, 0, 0.0, None, summation)
        return of_value, *(x.view(of.shape) for x, of in zip(rest, (locations, weights), strict=True))

    return {name: partial(gradients, summation) for name, summation in SUMMATIONS.items()}


def fused_case(work: Workload, kind: str, dtype: str, device: torch.device, wanted: float | None, *, backward: bool = False) -> Case:
    """From references, offsets and logits. The forward of an encoder must not need memory beyond its results."""
    inputs = fused_inputs(work, kind, getattr(torch, dtype), device)
    name, peer = grid_sample_peer()
    name = f"softmax and positions in torch, {name}"
    functions = {OURS: ms_deform_attn_fused, SEPARATE: unfused(ms_deform_attn), name: unfused(peer, one_dtype=True)}
    run = with_gradients if backward else without_gradients
    results = work.batch * work.rows * work.heads * (work.channels * inputs[0].value.element_size() + 4)
    return Case(
        op="ms_deform_attn_fused",
        name=str(work),
        mode="forward+backward" if backward else "forward",
        dtype=dtype,
        inputs=kind,
        bytes=traffic(work, inputs[0], backward),
        providers={name: run(work, function, inputs) for name, function in functions.items()},
        check=lambda: check_fused(work, inputs[0], backward),
        targets={name: wanted} if wanted else {},
        peak_limit=None if backward or work.queries else results + 4 * MIB,
        note="references are boxes" if work.boxes else "",
    )


def overhead_cases(device: torch.device) -> Iterator[Case]:
    """Tiny calls: what our Python adds to the dispatcher's work, for sizes on the host or the device, and with autograd."""
    work = Workload("1 query", 1, 1, ((2, 2), (1, 2), (2, 1), (1, 1)), heads=1, channels=4)
    plain, fused = (make(work, UNIFORM, torch.float32, device)[0] for make in (plain_inputs, fused_inputs))
    start = torch.tensor([0, 4, 6, 8], device=device)
    tables: dict[str, tuple[Any, dict[str, Any]]] = {
        "sizes on the host": (list(work.shapes), {}),
        "sizes on the device": (torch.tensor(work.shapes, device=device), {"level_start_index": start}),
    }
    for label, (shapes, options) in tables.items():
        host = [side for size in work.shapes for side in size] if not options else None
        levels = (shapes, start) if options else (None, None)
        for op, function, inputs in (("ms_deform_attn", ms_deform_attn, plain), ("ms_deform_attn_fused", ms_deform_attn_fused, fused)):
            for tracked in (False, True):
                value, *samples = leaves(inputs, tracked)
                flat = [x.detach().flatten(3, 4) if x.dim() > 4 else x.detach() for x in samples]
                bare = getattr(torch.ops.ssod_fast, op).default
                last = (host, None, 0.5) if op.endswith("fused") else (host, None, 0)
                arguments = value.detach(), *levels, *flat, *last
                providers = {OURS: partial(function, value, shapes, *samples, **options), BARE: partial(bare, *arguments)}
                if tracked:
                    providers[IN_FUNCTION] = partial(Bare.apply, value, bare, *arguments)
                yield overhead_case(op, f"host overhead, {label}{', autograd' if tracked else ''}", providers)


class Bare(torch.autograd.Function):
    """The dispatcher call as a node of autograd that saves its tensors: the least that any op with a gradient in Python can reach."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, op: Callable[..., Any], *arguments: Any) -> Any:
        ctx.save_for_backward(*(x for x in arguments if isinstance(x, Tensor)))
        return op(*arguments)


def overhead_case(op: str, mode: str, providers: Mapping[str, Call]) -> Case:
    """Ours against the last of the providers, which returns the same."""
    least = [*providers][-1]

    def check() -> None:
        for bare in [*providers.values()][1:]:
            expected = bare()
            torch.testing.assert_close(providers[OURS](), expected[0] if isinstance(expected, tuple) else expected, rtol=0, atol=0)

    return Case(
        op=op,
        name="1 query",
        mode=mode,
        dtype="float32",
        inputs=UNIFORM,
        bytes=0,
        providers=providers,
        check=check,
        overhead_us={least: HOST_US},
        note=f"one eager call from Python, which may take {HOST_US:g} µs more than the {least}",
    )


def plain_peers(work: Workload, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> dict[str, Attention]:
    """grid_sample first, then torch.compile of it and the kernels of others where there are some."""
    name, function = grid_sample_peer()
    peers = {name: function}
    if compiled:
        torch._dynamo.reset()  # or the shapes of earlier cases count against the limit of recompilations
        peers[COMPILED] = torch.compile(composed, dynamic=False)
    return {**peers, **kernel_peers(work.shapes, device, dtype)}


def attend(work: Workload, attention: Attention) -> Attention:
    """An attention on the maps of a workload."""
    return lambda value, *samples: attention(value, work.shapes, *samples)


def without_gradients(work: Workload, attention: Attention, inputs: Sequence[Plain | Fused]) -> Call:
    return rotate(attend(work, attention), inputs)


def with_gradients(work: Workload, attention: Attention, inputs: Sequence[Plain | Fused]) -> Call:
    return rotate(autograd(work, attention), with_grads(work, [leaves(x) for x in inputs]))


def autograd(work: Workload, attention: Attention) -> Callable[..., tuple[Tensor, ...]]:
    """Forward and backward: gradients of all arguments but the reference points."""

    def run(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(work, attention)(*inputs), [x for x in inputs if x.requires_grad], grad)

    return run


def walk(work: Workload, attention: Attention, inputs: Sequence[Plain]) -> Call:
    """The backward alone on graphs that are made here and kept."""
    tracked = [leaves(x) for x in inputs]
    graphs = [(attend(work, attention)(*x), x, grad) for grad, *x in with_grads(work, tracked)]
    return rotate(lambda out, x, grad: torch.autograd.grad(out, x, grad, retain_graph=True), graphs)


def leaves(inputs: Plain | Fused, tracked: bool = True) -> list[Tensor]:
    """Copies that require gradients, except reference points, which decoders detach and encoders make from grids."""
    fixed = inputs.reference if isinstance(inputs, Fused) else None
    return [x if x is fixed else x.detach().clone().requires_grad_(tracked) for x in inputs]


def with_grads(work: Workload, inputs: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
    """A gradient of the result [B, Q, M * C] before each set of arguments."""
    rng = torch.Generator().manual_seed(9)
    shape = work.batch, work.rows, work.heads * work.channels
    return [(torch.randn(shape, generator=rng).to(x[0].device, x[0].dtype), *x) for x in inputs]


def traffic(work: Workload, inputs: Plain | Fused, backward: bool) -> int:
    """Bytes that must move: tokens at most once, and no more than are looked at; the rest once; in the backward also all gradients."""
    value, *samples = inputs
    size = value.element_size()
    read = min(value.numel(), work.samples * 4 * work.channels) * size + sum(x.numel() * x.element_size() for x in samples)
    out = work.batch * work.rows * work.heads * work.channels * size
    written = value.numel() * size + sum(x.numel() * x.element_size() for x in samples[-2:])
    return read + out + (read + out + written if backward else 0)


def gate_rows(work: Workload) -> Tensor:
    """Queries that are computed in float64 [at most 300]."""
    return torch.linspace(0, work.rows - 1, min(work.rows, GATE_ROWS)).long()


def check_plain(work: Workload, inputs: Plain, peers: Mapping[str, Attention], gradient: Callable[..., Any] | None) -> None:
    """Results, those of peers too, and gradients where wanted, against the composition in float64."""
    rows = gate_rows(work).to(inputs.value.device)
    wide = Plain(inputs.value.double(), *(x[:, rows].double() for x in inputs[1:]))
    expected = attend(work, composed)(*wide)
    close(attend(work, ms_deform_attn)(*inputs)[:, rows], expected, 2e-4)
    for peer in peers.values():
        close(attend(work, peer)(*inputs)[:, rows], expected, 1e-3)
    if gradient is None:
        return
    found, wanted = gate_gradients(work, inputs, wide, rows, gradient, composed)
    check_gradients(found, wanted, rows, away_from_pixels(work, wide.locations))


def check_fused(work: Workload, inputs: Fused, backward: bool) -> None:
    """The same for references, offsets and logits."""
    rows = gate_rows(work).to(inputs.value.device)
    wide = Fused(inputs.value.double(), *(x[:, rows].double() for x in inputs[1:]))
    close(attend(work, ms_deform_attn_fused)(*inputs)[:, rows], attend(work, unfused(composed))(*wide), 2e-4)
    if backward:
        gradient = autograd(work, ms_deform_attn_fused)
        found, wanted = gate_gradients(work, inputs, wide, rows, gradient, unfused(composed))
        check_gradients(found, wanted, rows, away_from_pixels(work, locations_of(work.shapes, wide.reference, wide.offsets)))


def gate_gradients(
    work: Workload, inputs: Plain | Fused, wide: Plain | Fused, rows: Tensor, gradient: Callable[..., Any], attention: Attention
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Gradients through ours and in float64 of a gradient that is 0 outside of `rows`."""
    ((grad, *tracked),) = with_grads(work, [leaves(inputs)])
    some = torch.zeros_like(grad)
    some[:, rows] = grad[:, rows]
    return gradient(some, *tracked), autograd(work, attention)(grad[:, rows].double(), *leaves(wide))


def check_gradients(found: Sequence[Tensor], wanted: Sequence[Tensor], rows: Tensor, smooth: Tensor) -> None:
    """Gradients of tokens and weights everywhere, of positions only where they do not jump."""
    close(found[0], wanted[0], 1e-3)
    close(found[1][:, rows] * smooth, wanted[1] * smooth, 2e-2)
    close(found[2][:, rows], wanted[2], 5e-3)


def away_from_pixels(work: Workload, locations: Tensor) -> Tensor:
    """Where neither coordinate is within 1e-3 px of a pixel's centre, at which the gradient jumps [B, Q, M, L, P, 1]."""
    pixels = locations * locations.new_tensor([(w, h) for h, w in work.shapes]).unsqueeze(1) - 0.5
    return ((pixels - pixels.round()).abs() > 1e-3).all(-1, keepdim=True)


def close(found: Tensor, expected: Tensor, atol: float) -> None:
    """Float32 arithmetic on positions of up to 167 px, rounded once to the dtype of the result."""
    torch.testing.assert_close(found.double(), expected, rtol=max(1e-3, torch.finfo(found.dtype).eps), atol=atol)
