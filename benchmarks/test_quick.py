"""The quick CPU set under pytest-benchmark: `pytest benchmarks/test_quick.py` (not part of tests/).

One typical call of each op, ours alone, to compare two states of the code (`--benchmark-autosave`, `--benchmark-compare`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the benchmark's own modules; the repository root stays off the path

from harness import OURS, Case
from run import available, load


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


def first_cases(stem: str) -> list[Case]:
    """The first case of every mode of one op, on small shapes."""
    by_mode: dict[str, Case] = {}
    for case in load(stem)(torch.device("cpu"), True):
        by_mode.setdefault(case.mode, case)
    return list(by_mode.values())


@pytest.mark.parametrize("case", [case for stem in available() for case in first_cases(stem)], ids=str)
def test_quick(case: Case, benchmark: Any) -> None:
    case.check()
    benchmark(case.providers[OURS])
