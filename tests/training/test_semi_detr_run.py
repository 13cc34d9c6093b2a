"""Semi-DETR through the trainer: presets, both stages, logs, resume, report."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ssod_fast.cli.train import parse_train
from ssod_fast.data.views import ViewConfig
from ssod_fast.methods import SemiDETRConfig
from ssod_fast.methods.ema import EMAConfig
from ssod_fast.report.runs import read_runs
from ssod_fast.report.verdict import verdict
from ssod_fast.training.checkpoint import load_detector
from ssod_fast.training.config import TrainConfig, config_from_tree, resolve, tree_of
from ssod_fast.training.optim import OptimizerConfig
from ssod_fast.training.run_folder import RunStart
from ssod_fast.training.trainer import Trainer, train

from .conftest import VIEWS, MakeConfig
from .test_trainer import Stopping, assert_same_weights, curves, of_type

SIZES = ("width=32", "heads=4", "encoder_layers=1", "decoder_layers=2", "queries=20", "ffn=64", "levels=2", "denoising=4")


@pytest.fixture
def semi_run(make_config: MakeConfig) -> MakeConfig:
    """A run that passes from stage 1 to stage 2 after half of its iterations, with pseudo boxes from the first one on."""

    def make(**changes: Any) -> TrainConfig[Any]:
        method = SemiDETRConfig(cls_pseudo_thr=0.01, teacher_score_thr=0.001, ema=EMAConfig("constant", keep=0.9), denoising=4)
        settings = {
            "method": method,
            "model": "own:dino_tiny",
            "model_options": SIZES,
            "lr": 1e-3,
            "optimizer": OptimizerConfig("adamw", clip_norm=0.1, backbone_lr_scale=0.1),
            "views": dataclasses.replace(VIEWS, erase_patches=(1, 5)),
        }
        return dataclasses.replace(make_config("supervised"), **{**settings, **changes})

    return make


def test_a_run_through_both_stages(semi_run: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = semi_run(report=True)
    assert train(config).status == "finished"
    assert "stages        one-to-many matching for 3 iterations, then one-to-one" in capsys.readouterr().err
    lines = of_type(config.folder, "train")
    assert ["unsup/loss_consistency" in line["losses"] for line in lines] == [True] * 3 + [False] * 3
    assert ["unsup/dn_loss_cls" in line["losses"] for line in lines] == [False] * 3 + [True] * 3
    for line in lines:
        assert all(math.isfinite(value) for value in line["losses"].values())
        assert line["pseudo"]["raw_per_image"] >= line["pseudo"]["reliable_per_image"] >= line["pseudo"]["kept_per_image"]
        assert "gate" not in line["pseudo"]
    assert sum(line["pseudo"]["kept_per_image"] for line in lines) > 0
    assert ["mined_per_image" in line["pseudo"] for line in lines] == [True] * 3 + [False] * 3
    (run,) = of_type(config.folder, "run")
    assert run["config"]["method"]["switch_at"] == 3
    page = (config.folder / "report.html").read_text()
    assert "Boxes mined by their matching cost, per image" in page
    assert "Open rate of the gates" not in page


def test_best_detectors_keep_the_suppression_of_their_stage(semi_run: MakeConfig) -> None:
    for switch, expected in ((6, 0.6), (0, None)):
        config = semi_run(name=f"switch{switch}", iters=1, eval_every=1)
        config = dataclasses.replace(config, method=dataclasses.replace(config.method, switch_at=switch))
        train(config)
        for name in ("teacher", "student"):
            detector, _ = load_detector(config.folder / "weights" / f"best_{name}.safetensors")
            assert detector.nms_thr == expected


def test_interrupted_runs_continue_bit_for_bit(semi_run: MakeConfig) -> None:
    """Within stage 1, at its very end, and within stage 2."""

    def run(name: str) -> TrainConfig[Any]:
        config = semi_run(name=name, iters=5, eval_every=5)
        return dataclasses.replace(config, method=dataclasses.replace(config.method, switch_at=3))

    whole = run("whole")
    train(whole)
    for stop_at in (2, 3, 4):
        parts = run(f"parts{stop_at}")
        trainer = Stopping(parts)
        trainer.stop_at = stop_at
        assert trainer.run().it == stop_at
        assert train(parts).it == 5
        assert curves(parts.folder) == curves(whole.folder)
        assert of_type(parts.folder, "eval") == of_type(whole.folder, "eval")
        assert_same_weights(parts.folder, whole.folder)


def test_projector_is_trained_in_stage_1_alone(semi_run: MakeConfig) -> None:
    config = semi_run(dry_run=True, method=SemiDETRConfig(teacher_score_thr=0.001, switch_at=1))
    trainer = Trainer(config)
    trainer._build(RunStart("new", None, []))
    network = trainer.model.trainable
    assert network is not None
    states = [[p.detach().clone() for p in network.parameters()]]
    for _ in range(2):
        trainer._iterate(want_preview=False)
        states.append([p.detach().clone() for p in network.parameters()])
    assert any(not torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))


def test_burn_in_is_supervised_and_ends_with_a_copy(semi_run: MakeConfig) -> None:
    config = semi_run(dry_run=True, method=SemiDETRConfig(teacher_score_thr=0.001, burn_in=2, switch_at=3))
    trainer = Trainer(config)
    trainer._build(RunStart("new", None, []))
    branches = []
    for it in range(3):
        output = trainer._iterate(want_preview=False)
        branches.append({name.split("/")[0] for name in output.losses})
        assert (output.stats is None) == (it < 2)
        pairs = zip(trainer.model.teacher.parameters(), trainer.model.student.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == (it == 1)
    assert branches == [{"sup"}, {"sup"}, {"sup", "unsup"}]
    with pytest.raises(ValueError, match="burn_in must be finite and at least 0, got -1"):
        SemiDETRConfig(burn_in=-1)


def test_drawn_batches(semi_run: MakeConfig) -> None:
    config = semi_run(batch="1:3", batch_draw="bernoulli")
    trainer = Trainer(dataclasses.replace(config, dry_run=True))
    trainer._build(RunStart("new", None, []))
    sizes = {tuple(len(part) for part in trainer.loader.batch(i)) for i in range(12)}  # type: ignore[arg-type]
    assert len(sizes) > 1
    assert {sum(size) for size in sizes} == {4}
    train(config)
    assert len(of_type(config.folder, "train")) == 6


def test_presets_of_the_command_line(tmp_path: Path) -> None:
    config = resolve(parse_train([str(tmp_path), "--method", "semi_detr", "--iters", "120000"]))
    assert config.model == "own:dino_resnet50"
    assert config.method == SemiDETRConfig(switch_at=60_000)
    chosen = config.optimizer
    assert (chosen.name, chosen.weight_decay, chosen.clip_norm, chosen.backbone_lr_scale) == ("adamw", 1e-4, 0.1, 0.1)
    assert config.views == ViewConfig(short_side=(480, 800), erase_patches=(1, 5))
    assert config_from_tree(tree_of(config)) == config
    given = parse_train([str(tmp_path), "--method", "semi_detr", "--method.switch-at", "7", "--optimizer.clip-norm", "3", "--thr", "0.5"])
    assert resolve(given).method == SemiDETRConfig(switch_at=7, cls_pseudo_thr=0.5)
    assert (given.optimizer.clip_norm, given.optimizer.name) == (3.0, "adamw")


def test_report_compares_with_the_supervised_run(semi_run: MakeConfig, make_config: MakeConfig) -> None:
    semi = semi_run(name="semi", iters=2, eval_every=2)
    base = dataclasses.replace(semi, method=make_config("supervised").method, name="base")
    for config in (semi, base):
        train(config)
    assert verdict(read_runs([semi.folder, base.folder]))[0].endswith("the seed and every setting that both have.")
