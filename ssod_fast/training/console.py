"""What a run says on the terminal: banner, live line, messages."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

from .evaluation import show

GIB = 2**30


class Console:
    """Prints a line per log entry, or keeps one line up to date on a terminal.

    Args:
        active: False on ranks that do not speak.
        quiet: only warnings and errors.
        stream: where to; standard error by default, so that `--json` has standard output for itself.
    """

    def __init__(self, active: bool = True, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.active, self.quiet = active, quiet
        self.stream = sys.stderr if stream is None else stream
        self._live: Any = None

    def __enter__(self) -> Console:
        if self.active and not self.quiet and self.stream.isatty():
            from rich.console import Console as RichConsole
            from rich.live import Live

            self._live = Live(console=RichConsole(file=self.stream), refresh_per_second=4)
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)
            self._live = None

    def say(self, text: str) -> None:
        """Prints a message."""
        if self.active and not self.quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """Prints a warning, also when quiet."""
        if self.active:
            self._print(f"warning: {text}")

    def progress(self, text: str) -> None:
        """Replaces the live line, or prints a line where there is none."""
        if self._live is not None:
            self._live.update(text)
        else:
            self.say(text)

    def _print(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)


def live_line(
    it: int,
    iters: int,
    losses: Mapping[str, float],
    pseudo: Mapping[str, Any] | None,
    thr: float | None,
    scores: Mapping[str, float],
    rate: float,
    data_share: float,
    memory: int,
    diagnostics: Mapping[str, float] | None = None,
) -> str:
    """`it 1200/90000 | sup 1.12 mixup 0.84 | pseudo 5.3/img (kept 4.1) thr 0.6 | AP teacher 31.2 | 2.1 it/s data 3% | ETA 11:42`.

    Args:
        it: iterations done.
        iters: iterations in all.
        losses: by term, such as "sup/cls".
        pseudo: counts of the monitor.
        thr: score threshold of the method.
        scores: last AP by model, in [0, 1].
        rate: iterations per second.
        data_share: share of the time that waits for data.
        memory: bytes on the GPU at most; 0 on the CPU.
        diagnostics: of inaccurate boxes and refined ones, their overlap with the right ones.
    """
    parts = [f"it {it}/{iters}", " ".join(f"{name} {value:.3g}" for name, value in by_branch(losses).items())]
    if pseudo is not None:
        parts.append(f"pseudo {pseudo['raw_per_image']:.1f}/img (kept {pseudo['kept_per_image']:.1f})" + (f" thr {thr:g}" if thr else ""))
    if diagnostics and {"noisy_iou", "refined_iou"} <= set(diagnostics):
        parts.append(f"boxes IoU {diagnostics['noisy_iou']:.2f} -> {diagnostics['refined_iou']:.2f}")
    if scores:
        parts.append("AP " + " ".join(f"{name} {show(value)}" for name, value in scores.items()))
    parts.append(f"{rate:.2f} it/s data {100 * data_share:.0f}%")
    if memory:
        parts.append(f"mem {memory / GIB:.1f}G")
    return " | ".join([*parts, f"ETA {clock((iters - it) / rate if rate > 0 else 0)}"])


def by_branch(losses: Mapping[str, float]) -> dict[str, float]:
    """Sums of the terms of each branch."""
    sums: dict[str, float] = {}
    for name, value in losses.items():
        branch = name.partition("/")[0]
        sums[branch] = sums.get(branch, 0.0) + value
    return sums


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def eval_line(it: int, models: Mapping[str, Mapping[str, Any]], best: Mapping[str, float]) -> str:
    """One line per evaluation."""
    parts = []
    for name, stats in models.items():
        sizes = "/".join(show(stats[f"AP_{s}"]) for s in ("small", "medium", "large"))
        parts.append(f"{name} AP {show(stats['AP'])} AP50 {show(stats['AP50'])} S/M/L {sizes} (best {show(best[name])})")
    return f"evaluation at {it}: " + " | ".join(parts)


def table(rows: Sequence[tuple[str, Any]]) -> str:
    """Aligned `name  value` lines; rows without a value are left out."""
    shown = [(name, value) for name, value in rows if value not in (None, "")]
    width = max((len(name) for name, _ in shown), default=0) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in shown)
