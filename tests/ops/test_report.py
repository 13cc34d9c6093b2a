"""`python -m ssod_fast.ops`, and that results name their parts."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from ssod_fast import ops


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ssod_fast.ops", *arguments], capture_output=True, text=True, check=False)


def test_table_explains_its_words() -> None:
    done = run()
    assert done.returncode == 0
    assert re.search(r"^box_iou +(C\+\+|reference) ", done.stdout, re.MULTILINE)
    assert "composed: nothing but calls of other ops of this table" in done.stdout


def test_options() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m ssod_fast.ops [-h] [--json]")
    done = run("--junk")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "usage: python -m ssod_fast.ops" in done.stderr
    assert "unrecognized arguments: --junk" in done.stderr


RESULTS = [
    value
    for value in vars(ops).values()
    if isinstance(value, type) and (hasattr(value, "_fields") or hasattr(value, "__dataclass_fields__"))
]


@pytest.mark.parametrize("result", RESULTS)
def test_every_part_of_a_result_is_described(result: type) -> None:
    names = getattr(result, "_fields", None) or result.__dataclass_fields__  # type: ignore[attr-defined]
    text = result.__doc__ or ""
    assert "Attributes:" in text
    for name in names:
        assert re.search(rf"^ *{name}: \S", text.partition("Attributes:")[2], re.MULTILINE), name
