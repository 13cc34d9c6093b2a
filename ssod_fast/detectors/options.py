"""Options that a user gives by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .protocol import near


def check_options(given: Mapping[str, Any], known: Collection[str], name: str) -> None:
    """Refuses options that `name` does not have.

    Raises:
        ValueError: the message offers the nearest ones and lists all.
    """
    for option in given:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}{near(option, sorted(known))}; known: {', '.join(sorted(known))}")
