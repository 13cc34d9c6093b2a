"""Where results of commands go."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Output:
    """Where results go.

    Attributes:
        as_json: print one JSON object instead of text.
        quiet: print warnings only.
    """

    as_json: bool = False
    quiet: bool = False

    def result(self, value: dict[str, Any], text: str) -> None:
        """Prints the result of a command."""
        if self.as_json:
            print(json.dumps(value, indent=2, default=str))
        elif text and not self.quiet:
            print(text)

    def error(self, code: int, message: str) -> int:
        """Prints an error and returns its code."""
        if self.as_json:
            print(json.dumps({"error": message, "code": code}))
        print(f"ssod-fast: {message}", file=sys.stderr)
        return code
