"""What a CUDA block does for one-to-many assignment (csrc/one_to_many_team.h), done by threads of the CPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cpp_module import build
from one_to_many_cases import RULE_CASES, arguments, random_case
from torch import Tensor

from ssod_fast.ops import one_to_many_assign

op_file = importlib.import_module("ssod_fast.ops.one_to_many_assign")


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return build("one_to_many", Path(tmp_path_factory.mktemp("one_to_many")))


def check(teams: ModuleType, values: tuple[Any, ...], size: int) -> None:
    expected = op_file._reference(*values)
    plain = [v.contiguous().numpy() if isinstance(v, Tensor) else v for v in values]
    actual = [torch.from_numpy(v).view(e.shape) for v, e in zip(teams.assign(*plain, size), expected, strict=True)]
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[4], expected[4])
    for got, wanted in zip(actual[1:4], expected[1:4], strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("size", [1, 4, 32])
@pytest.mark.parametrize("name", RULE_CASES)
def test_team_equals_reference(teams: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    seen: list[tuple[Any, ...]] = []

    def record(*values: Any) -> Any:
        seen.append(values)
        return torch.ops.ssod_fast.one_to_many_assign(*values)

    monkeypatch.setattr(op_file, "_op", record)
    for sizes, queries, seed in (((4, 0, 3), 61, 0), ((9,), 5, 1)):
        args, options = arguments(random_case(sizes, queries, seed=seed, layers=1), RULE_CASES[name])
        if "levels" in options:
            options["levels"] = [queries // 2, 0, queries - queries // 2]
        one_to_many_assign(*args, **options)
    for values in seen:
        check(teams, values, size)


@pytest.mark.parametrize("size", [1, 32])
def test_ties(teams: ModuleType, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """A grid of few places and scores, where almost everything is equal to something."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 4, (1, 1, 78, 2), generator=generator).float()
    boxes = torch.cat([corner, corner + torch.randint(1, 4, corner.shape, generator=generator)], -1)
    scores = torch.randint(0, 3, (1, 1, 70, 2), generator=generator).float() / 2
    targets = [{"boxes": boxes[0, 0, 70:], "labels": torch.randint(0, 2, (8,), generator=generator)}]
    seen: list[tuple[Any, ...]] = []

    def record(*values: Any) -> Any:
        seen.append(values)
        return torch.ops.ssod_fast.one_to_many_assign(*values)

    monkeypatch.setattr(op_file, "_op", record)
    for conflict in ("iou", "metric", "any_iou", "any_metric"):
        for final_topk in (None, 2):
            one_to_many_assign(scores, boxes[:, :, :70], targets, conflict=conflict, final_topk=final_topk, keep_one=True)
    for values in seen:
        check(teams, values, size)
