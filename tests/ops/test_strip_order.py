"""The order of queries in csrc/strip_order.h, through a module that only this test builds."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
from cpp_module import build
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return build("strip_order", Path(tmp_path_factory.mktemp("strip_order")))


def test_golden_level(order: ModuleType) -> None:
    strip = [column + 3 * row for column in range(3) for row in range(8)]
    assert order.level(10, 3) == [*strip, 24, 27, 25, 28, 26, 29]


def test_a_patch_is_compact(order: ModuleType) -> None:
    """64 positions of a full strip are 8 rows by 8 columns."""
    tokens = order.level(16, 32)[64:128]
    assert {t // 32 for t in tokens} == set(range(8))
    assert {t % 32 for t in tokens} == set(range(8, 16))


@hypothesis.given(sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=4))
def test_levels_follow_each_other(order: ModuleType, sizes: list[tuple[int, int]]) -> None:
    expected: list[int] = []
    for height, width in sizes:
        assert sorted(order.level(height, width)) == list(range(height * width))
        expected += [len(expected) + token for token in order.level(height, width)]
    assert order.pyramid(sizes) == expected
