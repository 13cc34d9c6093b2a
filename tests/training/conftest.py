"""Small scenes and small runs for the trainer's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssod_fast.data.synthetic import write_scenes
from ssod_fast.data.views import ViewConfig
from ssod_fast.methods import MixPLConfig, SupervisedConfig
from ssod_fast.methods.ema import EMAConfig
from ssod_fast.training.config import TrainConfig

VIEWS = ViewConfig(short_side=(48, 64), max_side=96, test_short_side=64)
MakeConfig = Callable[..., TrainConfig[Any]]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, n_train=16, n_val=4, seed=3, size=(64, 96))
    return folder


@pytest.fixture
def make_config(scenes: Path, tmp_path: Path) -> MakeConfig:
    """A run of a few seconds; keyword arguments replace settings."""

    def make(method: str = "mixpl", **changes: Any) -> TrainConfig[Any]:
        # An untrained network scores about 0.1: a low threshold makes pseudo labels from the first iteration on.
        mixpl = MixPLConfig(cls_pseudo_thr=0.02, teacher_score_thr=0.01, teacher_topk=20, ema=EMAConfig("constant", keep=0.9))
        settings: dict[str, Any] = {
            "labeled": scenes,
            "method": mixpl if method == "mixpl" else SupervisedConfig(),
            "model": "torchvision:fcos_tiny_fpn",
            "model_options": ("fpn_channels=16", "head_convs=1"),
            "iters": 6,
            "batch": "1:2",
            "percent": 50.0,
            "lr": 0.01,
            "views": VIEWS,
            "workers": 0,
            "log_every": 1,
            "eval_every": 3,
            "preview_images": 2,
            "device": "cpu",
            "out": tmp_path / "runs",
            "name": "run",
            "report": False,
        }
        return TrainConfig(**{**settings, **changes})

    return make
