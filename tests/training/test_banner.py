"""What a run says about itself before it starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssod_fast.methods import SupervisedConfig
from ssod_fast.training.banner import banner
from ssod_fast.training.config import TrainConfig


class _Images(list[str]):
    classes = ("a",)


def rows(val: _Images | None, **changes: Any) -> dict[str, str]:
    options: dict[str, Any] = {"labeled": Path("data"), "method": SupervisedConfig(), "batch": "2", "eval_every": 3}
    data: Any = SimpleNamespace(labeled=_Images(["x"]), unlabeled=None, val=val, hidden=None)
    evaluation = "none (no --val)" if val is None else "1 images with judge"
    text = banner(
        TrainConfig(**options | changes), data, it=0, processes=1, passes=(1.0, 0.0), lr=0.1, precision="fp32", evaluation=evaluation
    )
    return {name: value.strip() for name, value in (line.split(maxsplit=1) for line in text.splitlines())}


def test_nothing_is_said_of_an_evaluation_that_never_is() -> None:
    assert rows(None)["evaluation"] == "none (no --val)"
    assert rows(_Images(["y"]))["evaluation"] == "1 images with judge, every 3 iterations, scores above 0.001"
    assert rows(_Images(["y"]), eval_every=1)["evaluation"].startswith("1 images with judge, every iteration, ")


@pytest.mark.parametrize("option", ["weights", "backbone_weights", "init_from"])
def test_weights_are_those_of_the_file(option: str, tmp_path: Path) -> None:
    assert rows(None)["weights"] == "random"
    assert rows(None, **{option: tmp_path / "w.safetensors"})["weights"] == str(tmp_path / "w.safetensors")


def test_a_folder_of_transformers_has_weights_and_a_name_has_none(tmp_path: Path) -> None:
    assert rows(None, model=f"hf:{tmp_path}")["weights"] == str(tmp_path)
    assert rows(None, model="hf:rt_detr")["weights"] == "random"
