"""Theme colours of the figures: drawn with stand-in colours, then replaced by CSS variables (page) or plain colours (files)."""

from __future__ import annotations

import re
from dataclasses import dataclass

INK = "#fe0101"
MUTED = "#fe0102"
GRID = "#fe0103"
SURFACE = "#fe0104"


@dataclass(frozen=True)
class ThemeColor:
    """One colour of the page in light and dark."""

    stand_in: str
    variable: str
    light: str
    dark: str


# Hues after Okabe and Ito, which stay apart for the common forms of colour blindness; the dark values are lighter for contrast.
_SERIES = (
    ("#d55e00", "#ff8a3d"),  # vermilion
    ("#0072b2", "#5cb8f2"),  # blue
    ("#007a5a", "#2fcf9f"),  # bluish green
    ("#a8528a", "#e79bc9"),  # reddish purple
    ("#8a6a00", "#f0c230"),  # dark yellow
    ("#4b4b4b", "#c4c4c4"),  # grey
)
COLORS = (
    ThemeColor(INK, "--ink", "#1c2430", "#e8ecf2"),
    ThemeColor(MUTED, "--muted", "#5a6675", "#a3afbf"),
    ThemeColor(GRID, "--grid", "#dfe4ea", "#333c49"),
    ThemeColor(SURFACE, "--surface", "#ffffff", "#1a2029"),
    *(ThemeColor(f"#fe10{i:02x}", f"--s{i}", light, dark) for i, (light, dark) in enumerate(_SERIES)),
)


def series_color(index: int) -> str:
    """Stand-in colour of run `index`; repeats after six runs."""
    return f"#fe10{index % len(_SERIES):02x}"


def series_variable(index: int) -> str:
    """CSS variable of the same colour."""
    return f"--s{index % len(_SERIES)}"


def css_variables(dark: bool) -> str:
    """Declarations of all theme colours."""
    return " ".join(f"{color.variable}: {color.dark if dark else color.light};" for color in COLORS)


def plain_light(svg: str) -> str:
    """The figure as a file of its own: light colours."""
    for color in COLORS:
        svg = svg.replace(color.stand_in, color.light)
    return svg


def inline(svg: str, prefix: str, alt: str) -> str:
    """The figure as a part of the page: CSS colours, unique ids, page font, accessible name.

    Args:
        svg: complete SVG file text.
        prefix: unique on the page; put before every id, because the figures share one id space there.
        alt: escaped text that says what the figure shows.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r"url\(#", f"url(#{prefix}-", body)
    body = re.sub(r'xlink:href="#', f'href="#{prefix}-', body)
    body = re.sub(r"font: (?:(\d+) )?([\d.]+px)[^;\"]*", lambda m: f"font-size: {m[2]}; font-weight: {m[1] or 400}", body)
    for color in COLORS:
        body = body.replace(color.stand_in, f"var({color.variable})")
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    return body.replace("<svg", f'<svg role="img" aria-label="{alt}"', 1).strip()
