"""SSD-Det, alone and within MixPL, through the trainer: presets, logs, resume, the detector that is left."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ssod_fast.cli.train import parse_train
from ssod_fast.detectors.faster_rcnn import FasterRCNNDetector
from ssod_fast.methods import MixPLSSDDetConfig, SSDDetConfig
from ssod_fast.methods.ema import EMAConfig
from ssod_fast.methods.ssd_det import RefinerConfig
from ssod_fast.training.checkpoint import load_detector, read_detector_info
from ssod_fast.training.config import TrainConfig, config_from_tree, resolve, tree_of
from ssod_fast.training.trainer import train
from ssod_fast.training.tree import ConfigError

from .conftest import MakeConfig
from .test_trainer import Stopping, assert_same_weights, curves, of_type

SMALL: dict[str, Any] = {"ratios": (1.0, 1.2), "hidden": 16, "negatives": 8, "max_boxes_per_image": 2}
REFINER = SSDDetConfig(**SMALL)
MODEL: dict[str, Any] = {
    "model": "torchvision:fasterrcnn_tiny_fpn",
    "model_options": ("fpn_channels=16", "representation_size=32", "rpn_post_nms_top_n_train=40"),
}


@pytest.fixture
def noisy_run(make_config: MakeConfig) -> MakeConfig:
    """A run of a few seconds of either method."""

    def make(method: str = "ssd_det", **changes: Any) -> TrainConfig[Any]:
        mixed = MixPLSSDDetConfig(
            cls_pseudo_thr=0.02,
            teacher_score_thr=0.01,
            teacher_topk=20,
            ema=EMAConfig("constant", keep=0.9),
            refiner=RefinerConfig(**SMALL),
        )
        options = REFINER if method == "ssd_det" else mixed
        return dataclasses.replace(make_config("supervised"), **{"method": options, **MODEL, **changes})

    return make


def test_run(noisy_run: MakeConfig) -> None:
    config = noisy_run(report=True, seed=4)
    result = train(config)
    assert result.status == "finished"
    lines = of_type(config.folder, "train")
    assert len(lines) == 6
    for line in lines:
        assert {"sup/loss_spsd1", "sup/loss_sisd", "sup/loss_box_reg"} < set(line["losses"])
        assert all(math.isfinite(value) for value in line["losses"].values())
        assert line["diagnostics"]["left_out"] >= 0
    (run,) = of_type(config.folder, "run")
    assert run["config"]["method"]["seed"] == 4
    assert run["config"]["batch"] == "1"
    assert (config.folder / "report.html").exists()
    path = config.folder / "weights" / "best_student.safetensors"
    assert read_detector_info(path).method == "ssd_det"
    detector, _ = load_detector(path)
    assert type(detector) is FasterRCNNDetector
    last = torch.load(config.folder / "weights" / "last.pt", weights_only=True)
    assert any(name.startswith("trainable.fc_distill_reg_ori") for name in last["model"])


@pytest.mark.parametrize("method", ["ssd_det", "mixpl_ssd_det"])
def test_interrupted_runs_continue_bit_for_bit(noisy_run: MakeConfig, method: str) -> None:
    whole, parts = (noisy_run(method, name=name, iters=5, eval_every=5) for name in ("whole", "parts"))
    train(whole)
    trainer = Stopping(parts)
    trainer.stop_at = 3
    assert trainer.run().it == 3
    assert train(parts).it == 5
    assert curves(parts.folder) == curves(whole.folder)
    assert_same_weights(parts.folder, whole.folder)


def test_noisy_and_unlabelled_images_in_one_run(noisy_run: MakeConfig) -> None:
    config = noisy_run("mixpl_ssd_det")
    assert train(config).status == "finished"
    last = of_type(config.folder, "train")[-1]
    assert {name.partition("/")[0] for name in last["losses"]} == {"sup", "mixup", "mosaic"}
    assert "sup/loss_mil2" in last["losses"]
    assert last["diagnostics"]["left_out"] >= 0
    assert load_detector(config.folder / "weights" / "best_teacher.safetensors")[1].which == "teacher"


def test_command_line(scenes: Path) -> None:
    config = resolve(parse_train([str(scenes), "--method", "ssd_det", "--method.stage2-bag", "resample", "--seed", "3"]))
    assert config.model == "torchvision:fasterrcnn_resnet50_fpn"
    assert config.optimizer.clip_norm == 10
    assert (config.method.stage2_bag, config.method.seed, config.method.bag_size) == ("resample", 3, 125)
    assert config.total_batch() == 1
    assert config_from_tree(tree_of(config)) == config
    words = [str(scenes), "photos", "--method", "mixpl_ssd_det", "--method.refiner.ratios", "1", "1.1", "0.9", "--method.burn-in", "500"]
    mixed = resolve(parse_train(words))
    assert mixed.model == "torchvision:fasterrcnn_resnet50_fpn"
    assert mixed.method.cls_pseudo_thr == 0.7  # that of Faster R-CNN
    assert (mixed.method.refiner.ratios, mixed.method.burn_in) == ((1.0, 1.1, 0.9), 500)
    assert config_from_tree(tree_of(mixed)) == mixed


def test_settings_that_others_decide(scenes: Path, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"method.seed follows from seed \(0 here\) and cannot be 3"):
        parse_train([str(scenes), "--method", "ssd_det", "--method.seed", "3"])
    with pytest.raises(ConfigError, match=r"ssd_det needs torchvision's Faster R-CNN"):
        train(dataclasses.replace(make_config("supervised"), method=REFINER))
    with pytest.raises(ConfigError, match="batch_draw must be fixed for --method ssd_det"):
        resolve(dataclasses.replace(make_config("supervised"), method=REFINER, batch_draw="bernoulli"))
