from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ssod_fast.structures import Target
from ssod_fast.training import trainer as trainer_module
from ssod_fast.training.checkpoint import load_detector, load_last
from ssod_fast.training.config import TrainConfig, config_from_tree, read_tree, resolve
from ssod_fast.training.metrics import read_lines
from ssod_fast.training.optim import OptimizerConfig
from ssod_fast.training.quality import HiddenTruth
from ssod_fast.training.sets import DataError, load_sets
from ssod_fast.training.trainer import Trainer, TrainingFailed, train
from ssod_fast.training.tree import ConfigError
from ssod_fast.training.validate import predict, validate

from .conftest import MakeConfig


def of_type(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(folder / "metrics.jsonl") if line["type"] == kind]


def curves(folder: Path) -> list[dict[str, Any]]:
    """Train lines without what depends on the clock."""
    clock = ("time", "time_split", "it_per_s")
    return [{k: v for k, v in line.items() if k not in clock} for line in of_type(folder, "train")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state, _ = load_last(folder / "weights" / "last.pt")
    return {k: v for k, v in state["model"].items() if isinstance(v, torch.Tensor)}


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_mixpl_run_leaves_everything(make_config: MakeConfig) -> None:
    config = make_config(iters=6)
    result = train(config)
    folder = config.folder
    assert (result.status, result.it, result.folder) == ("finished", 6, folder)
    run = read_lines(folder / "metrics.jsonl")[0]
    assert (run["type"], run["method"], run["labeled"], run["unlabeled"]) == ("run", "mixpl", 8, 8)
    assert len(run["split_hash"]) == 64
    assert config_from_tree(run["config"]) == resolve(config) == config_from_tree(read_tree(folder / "config.yaml"))
    train_lines = of_type(folder, "train")
    assert [line["it"] for line in train_lines] == [1, 2, 3, 4, 5, 6]
    branches = [{name.split("/")[0] for name in line["losses"]} for line in train_lines]
    assert branches == [{"sup", "mixup"}] * 3 + [{"sup", "mixup", "mosaic"}] * 3  # the cache holds 6 images and gets 2 per step
    for line in train_lines:
        assert line["loss"] == pytest.approx(sum(line["losses"].values()), rel=1e-5)
        assert line["pseudo"]["raw_per_image"] >= line["pseudo"]["kept_per_image"] > 0
        assert 0 < line["pseudo"]["max_score"] <= 1
    evals = of_type(folder, "eval")
    assert [line["it"] for line in evals] == [3, 6]
    assert evals[0].keys() >= {"teacher", "student"}
    assert set(evals[0]["teacher"]["per_class"]) == set(run["classes"])
    quality = of_type(folder, "quality")
    assert {line["source"] for line in quality} == {"hidden"}
    assert quality[-1]["truth_per_image"] > 0
    assert of_type(folder, "summary")[0]["best"] == result.best
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["it"] for row in rows] == ["3", "6"]
    assert float(rows[-1]["teacher/AP"]) == evals[-1]["teacher"]["AP"]
    env = json.loads((folder / "env.json").read_text())
    assert env["packages"]["torch"] == torch.__version__.partition("+")[0]


def test_previews_fit_their_pictures(make_config: MakeConfig) -> None:
    config = make_config(iters=6)
    train(config)
    folder = config.folder / "pseudo_preview"
    first, last = (json.loads((folder / f"step_{it:06d}.json").read_text()) for it in (3, 6))
    assert [e["image_id"] for e in first] == [e["image_id"] for e in last]
    assert len(first) == 2
    for entry in last:
        assert Image.open(folder / entry["file"]).size == (entry["hw"][1], entry["hw"][0])
        assert entry["truth"]["boxes"]
        for name in ("teacher", "student"):
            assert len(entry[name]["boxes"]) == len(entry[name]["scores"]) == len(entry[name]["labels"])
    mixed = json.loads((folder / "mixed_000006.json").read_text())
    assert {e["kind"] for e in mixed} == {"labeled", "mixup", "mosaic"}
    for entry in mixed:
        width, height = Image.open(folder / entry["file"]).size
        for x1, y1, x2, y2 in entry["boxes"]:
            assert -1 <= x1 <= x2 <= width + 1
            assert -1 <= y1 <= y2 <= height + 1


def test_supervised_run_and_its_detector_file(make_config: MakeConfig, scenes: Path) -> None:
    config = make_config("supervised", iters=4, eval_every=4, batch="2")
    result = train(config)
    assert set(result.metrics) == {"student"}
    assert {p.name for p in (config.folder / "weights").iterdir()} == {"best_student.safetensors", "last.pt"}
    assert all(line["pseudo"] is None for line in of_type(config.folder, "train"))
    (evaluated,) = validate(config.folder, scenes, device="cpu")
    assert evaluated.metrics.stats == pytest.approx({k: result.metrics["student"][k] for k in evaluated.metrics.stats})
    detector, info = load_detector(config.folder / "weights" / "best_student.safetensors")
    assert info.it == 4
    own = detector.state_dict()
    for name, value in weights(config.folder).items():
        assert torch.equal(own[name.removeprefix("student.")], value)
    rows = predict(config.folder, str(scenes / "images"), score_thr=0.0, device="cpu")
    assert len(rows) == 20
    assert set(rows[0]) == {"file", "boxes", "classes", "scores"}
    with pytest.raises(FileNotFoundError, match=r"weights/best_teacher.safetensors"):
        validate(config.folder, scenes, which="teacher")


class Stopping(Trainer):
    """Sends itself a signal during one iteration."""

    stop_at = 4

    def _iterate(self, want_preview: bool) -> Any:
        if self.it + 1 == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super()._iterate(want_preview)


@pytest.mark.parametrize("family", ["fcos", "fasterrcnn"])  # Faster R-CNN draws its samples from torch's generator
def test_signal_saves_and_the_same_command_continues(make_config: MakeConfig, family: str) -> None:
    settings = {"model": f"torchvision:{family}_tiny_fpn", "model_options": ("fpn_channels=16",), "iters": 8}
    whole, parts = make_config(name="whole", **settings), make_config(name="parts", **settings)
    train(whole)
    result = Stopping(parts).run()
    assert (result.status, result.it) == ("interrupted", 4)
    result = train(parts)
    assert (result.status, result.it) == ("finished", 8)
    assert curves(parts.folder) == curves(whole.folder)
    assert of_type(parts.folder, "eval") == of_type(whole.folder, "eval")
    assert_same_weights(parts.folder, whole.folder)


def test_finished_run_says_so(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config("supervised", iters=2)
    first = train(config)
    before = (config.folder / "metrics.jsonl").read_text()
    again = train(config)
    assert again.status == "already finished"
    assert again.metrics == first.metrics
    assert "is finished (2 iterations): nothing to do; --overwrite starts anew" in capsys.readouterr().err
    assert (config.folder / "metrics.jsonl").read_text() == before
    train(dataclasses.replace(config, overwrite=True))
    assert [line["it"] for line in of_type(config.folder, "train")] == [1, 2]


def test_other_settings_are_listed(make_config: MakeConfig) -> None:
    config = make_config("supervised", iters=2)
    train(config)
    changed = dataclasses.replace(config, iters=3, lr=0.02)
    with pytest.raises(ConfigError, match=r"(?s)iters: 2 -> 3.*lr: 0.01 -> 0.02.*use --resume to continue"):
        train(changed)
    with pytest.raises(ConfigError, match="--no-resume was given"):
        train(dataclasses.replace(config, resume="no"))
    result = train(dataclasses.replace(changed, resume="yes"))
    assert (result.status, result.it) == ("finished", 3)
    assert [line["it"] for line in of_type(config.folder, "train")] == [1, 2, 3]
    assert len(of_type(config.folder, "summary")) == 1


def test_hidden_truth_reaches_no_loss(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    true, noise = make_config(name="true"), make_config(name="noise")
    train(true)

    def with_noise(config: TrainConfig[Any]) -> Any:
        data = load_sets(config)
        assert data.unlabeled is not None
        generator = torch.Generator().manual_seed(1)
        corner = [torch.rand(9, 2, generator=generator) * 30 for _ in data.unlabeled]
        targets = [Target(boxes=torch.cat([c, c + 20], 1), labels=torch.arange(9) % 6) for c in corner]
        return dataclasses.replace(data, hidden=HiddenTruth([r.id for r in data.unlabeled], targets))

    monkeypatch.setattr(trainer_module, "load_sets", with_noise)
    train(noise)
    assert of_type(true.folder, "quality") != of_type(noise.folder, "quality")
    assert curves(true.folder) == curves(noise.folder)
    assert_same_weights(true.folder, noise.folder)


def test_quality_is_measured_on_val_without_hidden_truth(make_config: MakeConfig, scenes: Path) -> None:
    config = make_config(percent=None, unlabeled=str(scenes / "images"), iters=3)
    train(config)
    quality = of_type(config.folder, "quality")
    assert [(line["it"], line["source"], line["images"]) for line in quality] == [(3, "val", 4)]


class Broken(Trainer):
    """Its student loses its mind after iteration 3."""

    broken_from = 3

    def _build(self, start: Any) -> None:
        super()._build(start)
        healthy = self.model.run_student

        def run(images: Any, targets: Any) -> dict[str, torch.Tensor]:
            losses = healthy(images, targets)
            return {**losses, "extra": losses["classification"] * (float("nan") if self.it >= self.broken_from else 1.0)}

        self.model.run_student = run


def test_nan_steps_are_skipped_and_named(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("supervised", iters=40, eval_every=3)
    with pytest.raises(TrainingFailed, match=r"20 steps in a row \(loss not finite in sup/extra\); the last good checkpoint is .*last.pt"):
        Broken(config).run()
    assert len(of_type(config.folder, "train")) == 23
    messages = [line["message"] for line in of_type(config.folder, "event")]
    assert messages[-1] == "1 steps were skipped: gradients were not finite (loss not finite in sup/extra)"
    state = weights(config.folder)
    assert all(torch.isfinite(v).all() for k, v in state.items() if "running" not in k)


def test_accumulated_steps_average_their_gradients(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config("supervised", accumulate=2, dry_run=True, batch="1"))
    trainer._build(trainer_module.RunStart("new", None, []))
    trainer._optimizer_step = lambda: None  # type: ignore[method-assign]
    trainer._iterate(want_preview=False)
    together = [p.grad.clone() for p in trainer.parameters if p.grad is not None]
    trainer.driver.accumulate = 1
    separate = []
    for i in range(2):
        trainer.optimizer.zero_grad()
        labeled, _ = trainer.loader.batch(i)
        trainer.model.training_step(labeled, None, 0, trainer.driver)
        separate.append([p.grad.clone() for p in trainer.parameters if p.grad is not None])
    for joint, a, b in zip(together, *separate, strict=True):
        assert torch.allclose(joint, (a + b) / 2, atol=1e-5)


def test_bf16_on_the_cpu(make_config: MakeConfig) -> None:
    config = make_config(iters=3, precision="bf16")
    train(config)
    assert all(line["loss"] is not None for line in of_type(config.folder, "train"))


def test_banner_says_what_was_chosen(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = OptimizerConfig(name="adamw", clip_norm=0.1, backbone_lr_scale=0.5)
    train(make_config("supervised", dry_run=True, batch="2", optimizer=optimizer))
    said = capsys.readouterr().err
    assert "lr            0.01 (adamw, weight decay 0.0001, gradients clipped to 0.1, backbone x 0.5)" in said
    assert "steps         6 of 2 images: 2 x 1 accumulated x 1 process\n" in said
    assert "stages" not in said


def test_dry_run_writes_nothing(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(dry_run=True)
    assert train(config).status == "dry run"
    assert not config.folder.exists()
    assert "dry run, nothing was written" in capsys.readouterr().err


def test_images_without_boxes_train(make_config: MakeConfig, scenes: Path, tmp_path: Path) -> None:
    tree = json.loads((scenes / "annotations" / "instances_train.json").read_text())
    shutil.copytree(scenes, tmp_path / "bare")
    one_box = {**tree, "annotations": tree["annotations"][:1]}  # so that of three batches at least two have none
    (tmp_path / "bare" / "annotations" / "instances_train.json").write_text(json.dumps(one_box))
    config = make_config(labeled=tmp_path / "bare", unlabeled=str(scenes / "images"), percent=None, iters=3)
    train(config)
    assert all(line["loss"] is not None for line in of_type(config.folder, "train"))
    messages = [line["message"] for line in of_type(config.folder, "event")]
    assert any(m.startswith("5 of 6 classes have no labelled box") for m in messages)


def test_teacher_without_pseudo_boxes_trains(make_config: MakeConfig) -> None:
    config = make_config(iters=4)
    train(dataclasses.replace(config, method=dataclasses.replace(config.method, cls_pseudo_thr=0.99)))
    lines = of_type(config.folder, "train")
    assert all(line["pseudo"]["kept_per_image"] == 0 and line["pseudo"]["gate"] == 0 for line in lines)
    assert all(line["losses"][k] == 0 for line in lines for k in line["losses"] if not k.startswith("sup/"))


def test_method_without_unlabelled_images(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"--method mixpl needs unlabelled images: .*--percent 10.*--method supervised"):
        train(make_config(percent=None))


def test_class_names_must_agree(make_config: MakeConfig, scenes: Path, tmp_path: Path) -> None:
    val = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    val["categories"][0]["name"] = "stranger"
    shutil.copytree(scenes, tmp_path / "other")
    path = tmp_path / "other" / "annotations" / "instances_val.json"
    path.write_text(json.dumps(val))
    with pytest.raises(DataError, match=r"class names of .* must agree.*stranger"):
        train(make_config(val=path))
    config = make_config("supervised", iters=1)
    train(config)
    with pytest.raises(DataError, match=r"the detector knows the classes .*stranger.*: they must be the same"):
        validate(config.folder, path)


def test_init_from_says_what_did_not_fit(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_config("supervised", iters=1, name="source")
    train(source)
    wider = make_config("supervised", iters=1, name="wider", init_from=source.folder, model_options=("fpn_channels=32", "head_convs=1"))
    train(wider)
    said = capsys.readouterr().err
    assert "tensors from the student in" in said
    assert "init: not loaded" in said
    with pytest.raises(ConfigError, match="no detector at"):
        train(make_config(name="c", init_from=Path("nowhere")))


def test_unreadable_unlabelled_images_are_counted(make_config: MakeConfig, scenes: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    shutil.copytree(scenes / "images", pool)
    sorted(pool.iterdir())[0].write_bytes(b"not an image")
    config = make_config(percent=None, unlabeled=str(pool), iters=12, eval_every=12)
    train(config)
    messages = [line["message"] for line in of_type(config.folder, "event")]
    assert "training: 1 unreadable images, replaced or skipped" in messages
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        train(make_config(name="b", percent=None, unlabeled=str(tmp_path / "nothing")))


def test_unwritable_run_folder_fails_before_anything(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="cannot write to the folder"):
        train(make_config(out=tmp_path / "file"))


def test_folder_of_somebody_else_is_left_alone(make_config: MakeConfig) -> None:
    config = make_config("supervised", iters=1, overwrite=True)
    (config.folder / "weights").mkdir(parents=True)
    (config.folder / "weights" / "mine.pt").write_text("precious")
    with pytest.raises(ConfigError, match="holds weights, which no run has written: choose another --name"):
        train(config)
    assert (config.folder / "weights" / "mine.pt").read_text() == "precious"


def test_run_without_validation_set(make_config: MakeConfig, scenes: Path) -> None:
    config = make_config(labeled=scenes / "annotations" / "instances_train.json", iters=3)
    result = train(config)
    assert (result.status, result.metrics, result.best) == ("finished", {}, {})
    assert (config.folder / "weights" / "best_teacher.safetensors").exists()  # the newest
    assert len(list(csv.DictReader((config.folder / "results.csv").open()))) == 3
    assert of_type(config.folder, "eval") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        train(make_config(device="cuda"))


def test_bad_model_is_named(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="unknown detector"):
        train(make_config(model="torchvision:fcos_mobilnet_v2_fpn"))
    with pytest.raises(ConfigError, match="has no option 'fpn_chanels'"):
        train(make_config(name="b", model_options=("fpn_chanels=3",)))
    with pytest.raises(ConfigError, match="--model-options do not fit own:dino_tiny: queries must be an integer, got 'many'"):
        train(make_config(name="c", model="own:dino_tiny", model_options=("queries=many",)))


def test_the_drawn_split_is_stored_and_must_stay(make_config: MakeConfig, scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes, tmp_path / "moving")
    config = make_config("supervised", iters=4, labeled=tmp_path / "moving")
    Stopping.stop_at = 2
    Stopping(config).run()
    manifest = json.loads((config.folder / "split.json").read_text())
    assert len(manifest["labeled_ids"]) == manifest["unique"] == 8
    assert manifest["labeled_sha256"] == of_type(config.folder, "run")[0]["split_hash"]
    path = tmp_path / "moving" / "annotations" / "instances_train.json"
    tree = json.loads(path.read_text())
    tree["images"].reverse()
    path.write_text(json.dumps(tree))
    with pytest.raises(TrainingFailed, match="the annotation file has changed, and other images are drawn as labelled"):
        train(config)


def test_checkpoint_of_other_classes(make_config: MakeConfig, scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes, tmp_path / "moving")
    config = make_config("supervised", iters=4, labeled=tmp_path / "moving")
    Stopping.stop_at = 2
    Stopping(config).run()
    for split in ("train", "val"):
        path = tmp_path / "moving" / "annotations" / f"instances_{split}.json"
        tree = json.loads(path.read_text())
        tree["categories"][0]["name"] = "renamed"
        path.write_text(json.dumps(tree))
    with pytest.raises(TrainingFailed, match=r"the checkpoint has the classes .* the labelled set .*renamed"):
        train(config)
