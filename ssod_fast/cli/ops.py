"""`ssod-fast ops`: needs no extra."""

from __future__ import annotations

from ssod_fast.ops import _report

from .output import Output


def run(arguments: list[str], output: Output) -> int:
    """Prints what each op runs on here."""
    if arguments in (["-h"], ["--help"]):
        print("usage: ssod-fast ops [--json]\n\nWhat each op runs on here, how it was built, versions, GPU: paste it into bug reports.")
        return 0
    if arguments:
        return output.error(2, f"ops takes no option but --json, got {' '.join(arguments)}")
    return _report.main(["--json"] if output.as_json else [])
