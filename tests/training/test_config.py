from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssod_fast.data.views import ViewConfig
from ssod_fast.methods import MixPLConfig, SupervisedConfig
from ssod_fast.training.config import (
    TrainConfig,
    config_from_tree,
    parse_batch,
    read_tree,
    resolve,
    to_yaml,
    tree_of,
    write_config,
)
from ssod_fast.training.optim import OptimizerConfig, ScheduleConfig
from ssod_fast.training.presets import merged, method_defaults, run_defaults
from ssod_fast.training.tree import ConfigError


def test_written_config_is_read_back_unchanged(tmp_path: Path) -> None:
    config = resolve(
        TrainConfig(
            labeled=Path("data/train.json"),
            method=MixPLConfig(gate="per_image", erase_patches=None),
            unlabeled="pool/*.jpg",
            model_options=("fpn_channels=64",),
            views=ViewConfig(short_side=(100, 200), max_side=300, test_short_side=160),
            schedule=ScheduleConfig(milestones=(0.5, 0.9)),
            optimizer=OptimizerConfig(name="adamw"),
            lr=0.01,
        )
    )
    path = tmp_path / "config.yaml"
    write_config(config, path)
    again = config_from_tree(read_tree(path))
    assert again == config
    assert resolve(again) == config
    assert to_yaml(again) == path.read_text()


def test_supervised_round_trip() -> None:
    config = resolve(TrainConfig(labeled=Path("x"), method=SupervisedConfig(), batch="2:8"))
    assert config.batch == "2"
    assert config.total_batch(processes=2) == 4
    assert config_from_tree(tree_of(config)) == config


def test_short_forms_of_the_method() -> None:
    assert config_from_tree({"labeled": "x", "method": "supervised"}).method == SupervisedConfig()
    config = config_from_tree({"labeled": "x", "method": {"name": "mixpl", "unsup_weight": 4}})
    assert config.method.unsup_weight == 4.0
    assert config.method_name == "mixpl"
    assert config_from_tree({"labeled": "x"}).method_name == "mixpl"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"labeled": "x", "itres": 5}, "unknown key 'itres', did you mean 'iters'"),
        ({"labeled": "x", "method": {"name": "mixpl", "gaet": "sum"}}, "unknown key 'method.gaet', did you mean 'gate'"),
        ({"labeled": "x", "views": {"max_size": 3}}, "unknown key 'views.max_size', did you mean 'max_side'"),
        ({"labeled": "x", "method": "mixpi"}, "unknown method 'mixpi', did you mean 'mixpl'"),
        ({"method": "mixpl"}, "missing key labeled"),
        ({"labeled": "x", "iters": "many"}, "iters must be int, got 'many'"),
        ({"labeled": "x", "iters": 2.5}, "iters must be int, got 2.5"),
        ({"labeled": "x", "scale_lr": 1}, "scale_lr must be bool, got 1"),
        ({"labeled": "x", "precision": "int8"}, "precision must be one of 'auto', 'bf16', 'fp16', 'fp32', got 'int8'"),
        ({"labeled": "x", "views": {"short_side": [1, 2, 3]}}, "views.short_side must be tuple"),
        ({"labeled": "x", "method": 3}, "method must be a name or a mapping with the key name, got 3"),
        ({"labeled": "x", "views": 3}, "views must be a mapping, got 3"),
        ({"labeled": "x", "batch": "0:4"}, "batch must be LABELED or LABELED:UNLABELED"),
        ({"labeled": "x", "percent": 0.0}, r"percent must lie in \(0, 100\], got 0.0"),
        ({"labeled": "x", "model_options": ["a"]}, "model_options must be name=value, got 'a'"),
        ({"labeled": "x", "lr": -1.0}, "lr must be positive"),
        ({"labeled": "x", "workers": -1}, "workers must not be negative, got -1"),
        ({"labeled": "x", "seed": -1}, "seed must not be negative, got -1"),
        ({"labeled": "x", "views": {"short_side": [50, 20]}}, r"views: short_side must be \(low, high\)"),
        ({"labeled": "x", "method": {"name": "mixpl", "ema": {"gamma": 0.0}}}, "method.ema: gamma must be positive"),
    ],
)
def test_bad_settings_are_named(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_tree(tree)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config"):
        read_tree(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold a mapping of settings, got list"):
        read_tree(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_tree(tmp_path / "b.yaml")


def test_resolved_values_follow_from_others() -> None:
    views = ViewConfig(short_side=(120, 240), max_side=400, test_short_side=200)
    config = resolve(TrainConfig(labeled=Path("d/bccd"), method=MixPLConfig(), iters=90_000, batch="2:3", seed=7, views=views))
    assert (config.eval_every, config.save_every, config.name) == (4500, 4500, "mixpl-bccd")
    assert (config.method.unlabeled_batch, config.method.seed, config.method.cache_length) == (3, 7, 7)
    assert config.method.mosaic_shape == ((120, 120), (200, 200))
    assert resolve(dataclasses.replace(config, iters=100, eval_every=None)).eval_every == 20
    official = resolve(TrainConfig(labeled=Path("d"), method=MixPLConfig()))
    assert official.method.mosaic_shape == ((400, 400), (800, 800))
    with pytest.raises(ConfigError, match="batch must name unlabelled images for --method mixpl, such as 2:4, got '2'"):
        resolve(TrainConfig(labeled=Path("d"), method=MixPLConfig(), batch="2"))


def test_threshold_preset_by_detector_family() -> None:
    assert method_defaults("mixpl", "torchvision:fcos_mobilenet_v2_fpn").cls_pseudo_thr == 0.55
    assert method_defaults("mixpl", "torchvision:retinanet_resnet50_fpn").cls_pseudo_thr == 0.4
    assert method_defaults("mixpl", "my.module:make").cls_pseudo_thr == 0.7
    assert method_defaults("supervised", "x") == SupervisedConfig()


DETR = {"name": "adamw", "weight_decay": 1e-4, "clip_norm": 0.1, "backbone_lr_scale": 0.1, "lr_scaling": "sqrt"}


@pytest.mark.parametrize("model", ["own:dino_resnet50", "own:deformable_detr_mobilenet_v2", "hf:some/folder"])
@pytest.mark.parametrize("method", ["supervised", "mixpl"])
def test_detection_transformers_get_their_optimizer(method: str, model: str) -> None:
    config = config_from_tree({"labeled": "x", "method": method, "model": model})
    assert {name: getattr(config.optimizer, name) for name in DETR} == DETR
    if method == "mixpl":
        assert config.method.cls_pseudo_thr == 0.4
        assert config.views == ViewConfig()
    else:
        assert (config.views.short_side, config.views.erase_patches) == ((480, 800), (1, 5))
    assert resolve(config_from_tree(tree_of(resolve(config)))) == resolve(config)


def test_settings_of_the_user_come_before_presets() -> None:
    optimizer = {"name": "sgd", "clip_norm": 20.0}
    tree = {
        "labeled": "x",
        "method": "supervised",
        "model": "own:dino_resnet50",
        "optimizer": optimizer,
        "views": {"short_side": [90, 120]},
    }
    config = config_from_tree(tree)
    assert (config.optimizer.name, config.optimizer.clip_norm, config.optimizer.backbone_lr_scale) == ("sgd", 20.0, 0.1)
    assert (config.views.short_side, config.views.max_side) == ((90, 120), 1333)
    assert config_from_tree({**tree, "views": {"erase_patches": None}}).views.erase_patches is None
    plain = config_from_tree({"labeled": "x", "method": "supervised", "model": "my.own:detector"})
    assert (plain.optimizer, plain.views) == (OptimizerConfig(), ViewConfig())
    with pytest.raises(ConfigError, match="optimizer must be a mapping, got 3"):
        config_from_tree({**tree, "optimizer": 3})


def test_presets_of_methods() -> None:
    assert run_defaults("mixpl", None) == run_defaults("supervised", "torchvision:fcos_tiny_fpn") == {}
    semi = run_defaults("semi_detr", None)
    assert semi["model"] == "own:dino_resnet50"
    assert semi["optimizer"] == run_defaults("semi_detr", "my.module:detr")["optimizer"] == DETR
    assert "model" not in run_defaults("semi_detr", "my.module:detr")
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}, "e": 5}) == {"a": {"b": 1, "c": 4}, "d": 3, "e": 5}
    assert merged({"a": {"b": 1}}, {"a": 2}) == {"a": 2}


def test_drawn_batches_are_refused_where_all_are_alike() -> None:
    for method in ("mixpl", "supervised"):
        with pytest.raises(ConfigError, match=rf"batch_draw must be fixed for --method {method}, .* got 'bernoulli'"):
            resolve(config_from_tree({"labeled": "x", "method": method, "batch_draw": "bernoulli"}))


def test_batch_and_model_options() -> None:
    assert parse_batch("1:4") == (1, 4)
    assert parse_batch("8") == (8, 0)
    config = TrainConfig(labeled=Path("x"), method=SupervisedConfig(), model_options=("a=64", "b=[1, 2]", "c=true", "d=name"))
    assert config.model_kwargs == {"a": 64, "b": [1, 2], "c": True, "d": "name"}
    assert yaml.safe_load(to_yaml(config))["model_options"] == ["a=64", "b=[1, 2]", "c=true", "d=name"]
