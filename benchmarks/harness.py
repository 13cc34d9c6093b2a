"""Times ops against their peers: a correctness gate first, then interleaved rounds, then medians with spread."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from machine import Machine, peak_bytes

OURS = "ours"
MIB = 2**20
Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One workload of one op: what to time, against whom, and what must hold.

    Attributes:
        op: file stem of the op.
        name: shape in words, for example `"16x900x100"`.
        mode: variant of the op, for example `"giou"` or `"giou forward+backward"`.
        dtype: of the inputs, without the `torch.` prefix.
        inputs: `"uniform"` or the kind of adversarial input.
        bytes: compulsory traffic: every input read once, every output written once.
        providers: `"ours"` first, then the peers; each callable takes the next of several prepared inputs by itself (see :func:`rotate`).
        check: correctness gate; raises if our result is wrong. Nothing is timed before it has passed.
        targets: peer -> required ratio of peer time to our time.
        note: one sentence for the report.
        ceiling_us: our own time must not exceed this.
        peak_limit: memory in bytes that one call of ours may add at its peak; the peers are measured too.
        target_timing: which GPU timing the targets and `ceiling_us` are about.
        wall_ceiling_us: our eager wall time on a GPU, host overhead included, must not exceed this.
        overhead_us: peer -> by how much our eager wall time may exceed that peer's.
        eager_only: providers that a CUDA graph cannot capture: they synchronise with the host or upload from it. With ours among them
            there is no graph timing.
    """

    op: str
    name: str
    mode: str
    dtype: str
    inputs: str
    bytes: int
    providers: Mapping[str, Call]
    check: Callable[[], None]
    targets: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    ceiling_us: float | None = None
    peak_limit: int | None = None
    target_timing: str = "graph"
    wall_ceiling_us: float | None = None
    overhead_us: Mapping[str, float] = field(default_factory=dict)
    eager_only: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.op} {self.mode} {self.name} {self.dtype} {self.inputs}"


@dataclass(frozen=True)
class Row:
    """One line of the raw results: one provider of one case under one kind of timing. Times in microseconds, memory in MiB."""

    op: str
    provider: str
    mode: str
    dtype: str
    shape: str
    inputs: str
    timing: str
    median_us: float
    p20_us: float
    p80_us: float
    rounds: int
    bytes: int
    limit_share: float
    peak_mib: float | None
    peak_limit_mib: float | None
    ratio: float | None
    target_ratio: float | None
    ceiling_us: float | None
    verdict: str
    note: str
    device: str
    threads: int
    bandwidth_gib_s: float
    driver: str
    python: str
    torch: str
    torchvision: str
    triton: str
    ours_runs_on: str
    commit: str
    date: str


@dataclass(frozen=True)
class Effort:
    """How long to measure: one sample lasts about `sample_s`, all rounds of a case about `case_s`."""

    sample_s: float
    case_s: float
    min_rounds: int
    max_rounds: int


FULL = Effort(sample_s=0.004, case_s=6.0, min_rounds=7, max_rounds=60)
QUICK = Effort(sample_s=0.001, case_s=0.2, min_rounds=3, max_rounds=5)


def rotate(function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> Call:
    """A call of `function` on the next of several prepared argument tuples, so that caches do not flatter."""
    turn = itertools.cycle(inputs)
    return lambda: function(*next(turn))


def with_threads(call: Call, threads: int) -> Call:
    """The same call under another number of intra-op threads; the previous number is restored."""

    def threaded() -> Any:
        previous = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return call()
        finally:
            torch.set_num_threads(previous)

    return threaded


@contextmanager
def quiet_heap() -> Iterator[None]:
    """No garbage collection while the clock runs."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def wall_sampler(call: Call, device: torch.device) -> Callable[[int], float]:
    """Seconds per call on the host clock, over n calls and one synchronisation at the end."""

    def sample(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / repeats

    return sample


def event_sampler(call: Call) -> Callable[[int], float]:
    """Seconds per call between two CUDA events around n eager calls: what the stream saw, gaps between launches included."""

    def sample(repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / repeats

    return sample


GRAPH_CALLS = 16


def graph_sampler(call: Call) -> Callable[[int], float]:
    """Seconds per call by replay of a CUDA graph of 16 calls: device time without the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # autograd and the allocator must have seen the side stream before the capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(GRAPH_CALLS):
            call()
    replays = event_sampler(graph.replay)
    return lambda repeats: replays(max(1, repeats // GRAPH_CALLS)) / GRAPH_CALLS


def sampler_for(timing: str, call: Call, device: torch.device) -> Callable[[int], float]:
    """The sampler of one kind of timing: `wall`, `event` or `graph`."""
    if timing == "wall":
        return wall_sampler(call, device)
    return event_sampler(call) if timing == "event" else graph_sampler(call)


def calibrate(sample: Callable[[int], float], effort: Effort) -> tuple[int, float]:
    """Calls per sample so that one sample lasts about `effort.sample_s`, and the seconds that it then takes. Warms up on the way."""
    repeats = 1
    while True:
        seconds = sample(repeats) * repeats
        if seconds >= effort.sample_s / 2 or repeats >= 2**16:
            break
        repeats *= 2
    repeats = max(1, round(repeats * effort.sample_s / max(seconds, 1e-9)))
    return repeats, max(seconds, effort.sample_s)


def interleave(samplers: Mapping[str, Callable[[int], float]], effort: Effort) -> dict[str, list[float]]:
    """Samples of every provider in turn, round after round, so that noise of the machine hits all of them alike. Seconds per call.

    One untimed call precedes each sample: the provider before has just emptied the caches and the heap.
    """
    plans = {name: calibrate(sample, effort) for name, sample in samplers.items()}
    round_s = sum(seconds * (1 + 1 / repeats) for repeats, seconds in plans.values())
    rounds = min(effort.max_rounds, max(effort.min_rounds, int(effort.case_s / round_s)))
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    with quiet_heap():
        for _ in range(rounds):
            for name, sample in samplers.items():
                sample(1)
                samples[name].append(sample(plans[name][0]))
    return samples


def build_samplers(case: Case, timing: str, device: torch.device) -> dict[str, Callable[[int], float]]:
    """Samplers of all providers that this timing can serve."""
    served = {name: call for name, call in case.providers.items() if timing != "graph" or name not in case.eager_only}
    return {name: sampler_for(timing, call, device) for name, call in served.items()}


@dataclass(frozen=True)
class Limits:
    """What a provider is held to under one timing: for ours a time and a peak of memory, for a peer the ratio to us."""

    ratio: float | None = None
    time_us: float | None = None
    peak: int | None = None

    def verdict(self, ratio: float | None, median_us: float, peak: int | None) -> str:
        """`met` or `missed`; empty where nothing is required or the peak cannot be measured."""
        checks = []
        if self.ratio is not None and ratio is not None:
            checks.append(ratio >= self.ratio)
        if self.time_us is not None:
            checks.append(median_us <= self.time_us)
        if self.peak is not None and peak is not None:
            checks.append(peak <= self.peak)
        if not checks:
            return ""
        return "met" if all(checks) else "missed"


def limits_of(case: Case, name: str, timing: str, kind: str, medians_us: Mapping[str, float]) -> Limits:
    """What the case requires of a provider under one timing on one kind of device, given the medians of all providers."""
    targeted = timing == ("wall" if kind == "cpu" else case.target_timing)
    if name != OURS:
        return Limits(ratio=case.targets.get(name)) if targeted else Limits()
    ceilings = [case.ceiling_us] if targeted else [case.wall_ceiling_us] if timing == "wall" else []
    if timing == "wall":
        ceilings += [medians_us[peer] + allowed for peer, allowed in case.overhead_us.items()]
    time_us = min((ceiling for ceiling in ceilings if ceiling is not None), default=None)
    return Limits(time_us=time_us, peak=case.peak_limit if targeted else None)


def measure_peaks(case: Case, device: torch.device) -> dict[str, int | None]:
    """Peak of memory that one call of each provider adds, where the case limits it."""
    if case.peak_limit is None:
        return {}
    return {name: peak_bytes(call, device) for name, call in case.providers.items()}


def rows_of(case: Case, timing: str, samples: Mapping[str, list[float]], peaks: Mapping[str, int | None], machine: Machine) -> list[Row]:
    """Turns the samples of one timing into rows, with ratios against our own median."""
    medians_us = {name: statistics.median(seconds) * 1e6 for name, seconds in samples.items()}
    rows = []
    for name, seconds in samples.items():
        median_us = medians_us[name]
        p20, _, _, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
        ratio = None if name == OURS else median_us / medians_us[OURS]
        peak, limits = peaks.get(name), limits_of(case, name, timing, machine.kind, medians_us)
        rows.append(
            Row(
                op=case.op,
                provider=name,
                mode=case.mode,
                dtype=case.dtype,
                shape=case.name,
                inputs=case.inputs,
                timing=timing,
                median_us=median_us,
                p20_us=p20 * 1e6,
                p80_us=p80 * 1e6,
                rounds=len(seconds),
                bytes=case.bytes,
                limit_share=case.bytes / machine.bandwidth / (median_us * 1e-6),
                peak_mib=None if peak is None else peak / MIB,
                peak_limit_mib=None if limits.peak is None else limits.peak / MIB,
                ratio=ratio,
                target_ratio=limits.ratio,
                ceiling_us=limits.time_us,
                verdict=limits.verdict(ratio, median_us, peak),
                note=case.note,
                **machine.columns(case.op),
            )
        )
    return rows


def timings_of(case: Case, kind: str) -> tuple[str, ...]:
    """The kinds of timing that a case has on one kind of device."""
    if kind == "cpu":
        return ("wall",)
    return ("wall", "event") if OURS in case.eager_only else ("wall", "event", "graph")


def run_case(case: Case, machine: Machine, effort: Effort) -> list[Row]:
    """Gate, peak memory, then every kind of timing that the device has."""
    if next(iter(case.providers)) != OURS:
        raise ValueError(f"{case}: the first provider must be {OURS!r}, got {next(iter(case.providers))!r}")
    for peer in sorted(set(case.targets) - set(case.providers)):
        print(f"  no {peer} here: its target of {case.targets[peer]:g}x is not checked")
    case.check()
    device = torch.device(machine.kind)
    for call in case.providers.values():  # compiles, allocates, fills caches
        call()
    peaks = measure_peaks(case, device)
    rows: list[Row] = []
    for timing in timings_of(case, machine.kind):
        samples = interleave(build_samplers(case, timing, device), effort)
        rows += rows_of(case, timing, samples, peaks, machine)
    return rows
