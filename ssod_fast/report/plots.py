"""Figure primitives: lines, bars and dots drawn by matplotlib as SVG in the colours of the page theme."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssod_fast.report import svg
from ssod_fast.report.runs import Series, has_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 380.0  # points; also the width in CSS pixels at which the text has its nominal size
HEIGHT = 232.0
ROW_HEIGHT = 19.0  # of one class in a class figure
SMOOTH_FROM = 40  # points; shorter curves are drawn as they are
POINTS_PER_INCH = 72.0

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the font of the page
    "svg.hashsalt": "ssod_fast",  # the same run gives the same bytes
    "font.family": "sans-serif",
    "font.size": 12.0,
    "axes.labelsize": 12.0,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "axes.edgecolor": svg.GRID,
    "axes.labelcolor": svg.MUTED,
    "xtick.color": svg.GRID,
    "ytick.color": svg.GRID,
    "xtick.labelcolor": svg.MUTED,
    "ytick.labelcolor": svg.MUTED,
    "text.color": svg.INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": True,
    "grid.color": svg.GRID,
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.solid_capstyle": "round",
    "axes.xmargin": 0.02,
}


@dataclass(frozen=True)
class Panel:
    """One finished figure.

    Attributes:
        key: file stem, unique on the page.
        title: heading above the figure.
        caption: what line styles or bars mean; may be empty.
        alt: the figure in words.
        svg: SVG file text in stand-in colours.
    """

    key: str
    title: str
    caption: str
    alt: str
    svg: str


@dataclass(frozen=True)
class Curve:
    """One line: `dash` is a matplotlib line style, `color` an index of the run palette, or -1 for a muted reference line."""

    name: str
    points: Series
    color: int
    dash: str = "-"
    smooth: bool = False


@dataclass(frozen=True)
class Bars:
    """One group of bars (or dots): a value for each category."""

    name: str
    values: Sequence[float]
    color: int  # index of the run palette, -1 = muted
    marker: str = "o"


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.backends.backend_svg
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError('the report needs matplotlib: pip install "ssod-fast[train]"') from error
    return matplotlib


def _color(index: int) -> str:
    return svg.MUTED if index < 0 else svg.series_color(index)


def _figure(height: float) -> tuple[Figure, Axes]:
    mpl = _matplotlib()
    fig = mpl.figure.Figure(figsize=(WIDTH / POINTS_PER_INCH, height / POINTS_PER_INCH), layout="constrained")
    mpl.backends.backend_svg.FigureCanvasSVG(fig)
    return fig, fig.add_subplot()


def _finish(fig: Figure) -> str:
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred running mean over an eighth of the curve, NaN left out: follows the trend without a delay."""
    half = max(1, len(values) // 16)
    windows = ([v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)] for i in range(len(values)))
    return [sum(w) / len(w) if w else math.nan for w in windows]


def _draw(ax: Axes, curve: Curve) -> None:
    x, y = curve.points
    color, is_short = _color(curve.color), len(x) <= 12
    if curve.smooth and len(x) >= SMOOTH_FROM:
        ax.plot(x, y, color=color, alpha=0.25, linewidth=0.9)
        y = smoothed(y)
    marker = "o" if is_short and curve.dash != ":" else None
    ax.plot(x, y, color=color, linestyle=curve.dash, linewidth=1.2 if curve.color < 0 else 1.9, marker=marker, markersize=3.4)


def _thousands(value: float, _position: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _words(curve: Curve) -> str:
    finite = [(x, y) for x, y in zip(*curve.points, strict=True) if math.isfinite(y)]
    (x0, y0), (x1, y1) = finite[0], finite[-1]
    return f"{curve.name}: {y0:.3g} at {x0:g}, {y1:.3g} at {x1:g}"


def lines(
    key: str,
    title: str,
    curves: Sequence[Curve],
    *,
    caption: str = "",
    xlabel: str = "iteration",
    span: tuple[float | None, float | None] = (None, None),
    log: bool = False,
    marks: Sequence[float] = (),
) -> Panel | None:
    """Line figure of all curves that have a finite value, None if no curve has one.

    Args:
        key: file stem.
        title: heading.
        curves: what to draw.
        caption: text under the figure.
        xlabel: label of the x axis.
        span: fixed lower and upper end of the y axis, None = fitted.
        log: logarithmic y axis; used only when all values are positive.
        marks: x positions of dotted vertical lines.
    """
    shown = [curve for curve in curves if has_values(curve.points)]
    if not shown:
        return None
    mpl = _matplotlib()
    with mpl.rc_context(_STYLE):
        fig, ax = _figure(HEIGHT)
        for mark in marks:
            ax.axvline(mark, color=svg.MUTED, linestyle=":", linewidth=1.2)
        for curve in shown:
            _draw(ax, curve)
        if log and all(v > 0 for c in shown for v in c.points[1] if math.isfinite(v)):
            ax.set_yscale("log")
        else:
            ax.set_ylim(*span)
        ax.set_xlabel(xlabel)
        ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6))
        ax.xaxis.set_major_formatter(_thousands)
        return Panel(key, title, caption, f"{title}. " + "; ".join(map(_words, shown)) + ".", _finish(fig))


def _spread(count: int) -> list[float]:
    """Centres of `count` bars that share one category."""
    return [(i - (count - 1) / 2) * 0.8 / count for i in range(count)]


def _bar_words(groups: Sequence[Bars], categories: Sequence[str], unit: str) -> str:
    parts = []
    for bars in groups:
        shown = [(c, v) for c, v in zip(categories, bars.values, strict=True) if math.isfinite(v)]
        parts.append(f"{bars.name}: " + ", ".join(f"{c} {v:.3g}{unit}" for c, v in shown[:12]))
    return "; ".join(parts)


def bars(
    key: str, title: str, categories: Sequence[str], groups: Sequence[Bars], *, caption: str = "", xlabel: str = "", log: bool = False
) -> Panel | None:
    """Horizontal grouped bars with their value written at the end, None without a finite value."""
    if not any(math.isfinite(v) for g in groups for v in g.values):
        return None
    mpl = _matplotlib()
    with mpl.rc_context(_STYLE):
        fig, ax = _figure(62.0 + len(categories) * max(22.0, 15.0 * len(groups)))
        for offset, group in zip(_spread(len(groups)), groups, strict=True):
            values = [v if math.isfinite(v) else 0.0 for v in group.values]
            at = [i + offset for i in range(len(categories))]
            drawn = ax.barh(at, values, height=0.8 / len(groups) * 0.86, color=_color(group.color))
            text = [f" {v:.3g}" if math.isfinite(v) else " n/a" for v in group.values]
            ax.bar_label(drawn, labels=text, fontsize=11, color=svg.MUTED)
        _category_axis(ax, categories)
        if log:
            ax.set_xscale("symlog", linthresh=10)
        ax.margins(x=0.14)
        if not any(math.isfinite(v) and v for g in groups for v in g.values):
            ax.set_xlim(0, 1)  # of zeros alone matplotlib would make an axis with both signs
        ax.set_xlabel(xlabel)
        return Panel(key, title, caption, f"{title}. {_bar_words(groups, categories, '')}.", _finish(fig))


def dots(
    key: str,
    title: str,
    categories: Sequence[str],
    groups: Sequence[Bars],
    *,
    caption: str = "",
    xlabel: str = "",
    span: tuple[float, float | None] | None = None,
) -> Panel | None:
    """One row for each category with a dot for each group, None without a finite value."""
    if not any(math.isfinite(v) for g in groups for v in g.values):
        return None
    mpl = _matplotlib()
    with mpl.rc_context(_STYLE):
        fig, ax = _figure(62.0 + len(categories) * ROW_HEIGHT)
        for group in groups:
            hollow = group.marker != "o"
            face = svg.SURFACE if hollow else _color(group.color)
            ax.scatter(
                group.values,
                range(len(categories)),
                s=38,
                marker=group.marker,
                color=face,
                edgecolors=_color(group.color),
                linewidths=1.6,
                zorder=3,
            )
        _category_axis(ax, categories)
        if span:
            ax.set_xlim(*span)
        ax.set_xlabel(xlabel)
        return Panel(key, title, caption, f"{title}. {_bar_words(groups, categories, '')}.", _finish(fig))


def stacked(key: str, title: str, rows: Sequence[str], parts: dict[str, Sequence[float]], *, caption: str = "") -> Panel | None:
    """One bar of 100 % for each row, cut into named parts; `parts[name][row]` is a share in [0, 1]."""
    if not rows or not parts:
        return None
    mpl = _matplotlib()
    with mpl.rc_context(_STYLE):
        fig, ax = _figure(78.0 + 26.0 * len(rows))
        left = [0.0] * len(rows)
        for i, (name, shares) in enumerate(parts.items()):
            values = [100.0 * share for share in shares]
            drawn = ax.barh(
                range(len(rows)),
                values,
                left=left,
                height=0.62,
                color=svg.series_color(i + 1),
                edgecolor=svg.SURFACE,
                linewidth=1.5,
                label=name,
            )
            ax.bar_label(drawn, labels=[f"{v:.0f}" if v >= 6 else "" for v in values], label_type="center", fontsize=11, color=svg.SURFACE)
            left = [a + b for a, b in zip(left, values, strict=True)]
        _category_axis(ax, rows)
        ax.set_xlim(0, 100)
        ax.set_xlabel("% of the time of a step")
        fig.legend(loc="outside upper left", ncols=min(4, len(parts)), frameon=False, fontsize=11.5, handlelength=1.0, columnspacing=1.2)
        words = "; ".join(
            f"{name}: " + ", ".join(f"{r} {100 * v:.0f} %" for r, v in zip(rows, shares, strict=True)) for name, shares in parts.items()
        )
        return Panel(key, title, caption, f"{title}. {words}.", _finish(fig))


def _category_axis(ax: Axes, categories: Sequence[str]) -> None:
    names = [name if len(name) <= 22 else name[:21] + "…" for name in categories]
    ax.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])  # a dollar sign would start a formula
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
