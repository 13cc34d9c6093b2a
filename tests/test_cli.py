from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_detector import TinyDetector

from ssod_fast import cli
from ssod_fast.cli.train import parse_train
from ssod_fast.data.synthetic import write_scenes
from ssod_fast.methods import METHODS, MixPLConfig, SupervisedConfig
from ssod_fast.training.config import resolve, write_config
from ssod_fast.training.tree import ConfigError

TINY = ["--model", "torchvision:fcos_tiny_fpn", "--model-options", "fpn_channels=16", "head_convs=1", "--device", "cpu", "--workers", "0"]
SMALL = ["--views.short-side", "48", "64", "--views.max-side", "96", "--views.test-short-side", "64", "--lr", "0.01", "--no-report"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, n_train=10, n_val=3, seed=4, size=(64, 96))
    return folder


def result_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out))


def test_train_val_predict_report(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["train", str(scenes), "--percent", "40", "--batch", "1:2", "--iters", "3", "--out", str(tmp_path), "--name", "r", *TINY, *SMALL]
    run += ["--thr", "0.02", "--method.teacher-score-thr", "0.01", "--log-every", "1", "--eval-every", "3"]
    assert cli.main([*run, "--json"]) == 0
    result = result_of(capsys)
    assert (result["status"], result["it"]) == ("finished", 3)
    assert cli.main(run) == 0
    assert "is finished (3 iterations)" in capsys.readouterr().err

    assert cli.main(["val", str(tmp_path / "r"), str(scenes), "--json"]) == 0
    rows = result_of(capsys)["results"]
    assert [row["which"] for row in rows] == ["teacher", "student"]
    assert rows[0]["AP"] == pytest.approx(result["metrics"]["teacher"]["AP"])
    assert cli.main(["val", str(tmp_path / "r" / "weights" / "best_student.safetensors"), str(scenes)]) == 0
    text = capsys.readouterr().out
    assert "3 images, scores above 0.001, top 100" in text
    assert "striped_disk" in text

    assert cli.main(["predict", str(tmp_path / "r"), str(scenes / "images"), "--score-thr", "0.01", "--out", str(tmp_path / "p.json")]) == 0
    assert len(json.loads((tmp_path / "p.json").read_text())) == 13
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path / "r"), "--json"]) == 0
    assert Path(result_of(capsys)["report"]).read_text().startswith("<!")


def test_split_writes_files(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(scenes / "annotations" / "instances_train.json")
    assert cli.main(["split", source, "--percent", "50", "--folds", "2", "--out", str(tmp_path), "--json"]) == 0
    splits = result_of(capsys)["splits"]
    assert [(s["fold"], s["labeled"], s["unlabeled"]) for s in splits] == [(1, 5, 5), (2, 5, 5)]
    assert json.loads((tmp_path / "instances_train.1@50-unlabeled.json").read_text())["annotations"] == []
    assert cli.main(["split", source, "--percent", "1", "--out", str(tmp_path)]) == 3
    assert "percent too small" in capsys.readouterr().err


def test_split_takes_a_folder_and_covers_classes(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["split", str(scenes), "--percent", "50", "--fold", "1", "--out", str(tmp_path)]) == 0
    splits = json.loads((tmp_path / "split.json").read_text())["splits"]
    assert splits["1@50"]["missing_classes"] == []
    tiny = ["split", str(scenes), "--percent", "10", "--fold", "1", "--out", str(tmp_path)]
    assert cli.main(tiny) == 3  # one image cannot hold every class
    assert "cover_classes: 1000 draws of 1 of 10 images each missed a class" in capsys.readouterr().err
    assert cli.main([*tiny, "--no-cover-classes"]) == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("os.path:join", "'os.path:join' cannot be called with num_classes: missing a required argument"),
        ("os.path:sep", "'os.path:sep' must be a function that returns a detector, got str"),
        ("user_models:mini", "needs a detector (an nn.Module with losses, predict, forward, num_classes, pixel_stats, stride), got Linear"),
        ("user_models:without_forward", "got WithoutForward without forward;"),
        ("no_such_package:build", "put the folder of the package on PYTHONPATH, or install it"),
    ],
)
def test_models_that_are_no_detector(
    model: str, message: str, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class WithoutForward(TinyDetector):
        forward = torch.nn.Module.forward

    module = types.ModuleType("user_models")
    module.mini = lambda num_classes: torch.nn.Linear(2, 2)  # type: ignore[attr-defined]
    module.without_forward = WithoutForward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "user_models", module)
    arguments = ["train", str(scenes), "--method", "supervised", "--model", model, "--out", str(tmp_path), "--device", "cpu"]
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error() -> None:
    with subprocess.Popen([sys.executable, "-m", "ssod_fast.cli", "ops", "--json"], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == cli.FAILED


def test_precedence_of_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("labeled: d\niters: 70\nlr: 0.5\nmethod: {name: mixpl, unsup_weight: 4.0}\nmodel: torchvision:retinanet_resnet50_fpn\n")
    config = parse_train(["--config", str(path), "--lr", "0.1", "--method.least-num", "2"])
    assert (config.labeled, config.iters, config.lr) == (Path("d"), 70, 0.1)
    assert config.method == MixPLConfig(cls_pseudo_thr=0.4, unsup_weight=4.0, least_num=2)  # 0.4: the preset for RetinaNet
    assert parse_train(["x", f"--config={path}", "--method=supervised"]).method == SupervisedConfig()
    assert parse_train(["x", "--model", "torchvision:fcos_resnet50_fpn"]).method.cls_pseudo_thr == 0.55
    assert parse_train(["x", "--config", str(path)]).labeled == Path("x")


def test_written_config_is_accepted_back(tmp_path: Path) -> None:
    config = resolve(
        parse_train(["data", "pool", "--batch", "2:3", "--views.short-side", "100", "200", "--method.gate", "sum", "--thr=0.6"])
    )
    write_config(config, tmp_path / "config.yaml")
    assert resolve(parse_train(["--config", str(tmp_path / "config.yaml")])) == config
    assert config.method.cls_pseudo_thr == 0.6


def test_short_names() -> None:
    config = parse_train(["d", "--burn-in", "100", "--resume", "--thr", "0.9"])
    assert (config.method.burn_in, config.resume, config.method.cls_pseudo_thr) == (100, "yes", 0.9)
    assert parse_train(["d", "--no-resume"]).resume == "no"
    assert parse_train(["d", "--resume", "auto"]).resume == "auto"


def test_settings_of_the_run_decide_those_of_the_method(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method.unlabeled_batch follows from batch \(2 here\) and cannot be 7: leave it out"):
        parse_train(["d", "--method.unlabeled-batch", "7", "--batch", "1:2"])
    with pytest.raises(ConfigError, match=r"method.seed follows from seed \(0 here\) and cannot be 5: leave it out and set --seed"):
        parse_train(["d", "--method.seed", "5"])
    path = tmp_path / "config.yaml"
    write_config(resolve(parse_train(["d", "--batch", "1:2", "--seed", "3"])), path)
    changed = resolve(parse_train(["--config", str(path), "--batch", "1:5", "--seed", "6"]))
    assert (changed.method.unlabeled_batch, changed.method.seed) == (5, 6)
    path.write_text("labeled: d\nbatch: '1:2'\nmethod: {name: mixpl, unlabeled_batch: 7}\n")
    with pytest.raises(ConfigError, match="unlabeled_batch follows from batch"):
        parse_train(["--config", str(path)])


def test_early_options_need_values() -> None:
    with pytest.raises(ConfigError, match="--method needs a value"):
        parse_train(["d", "--method"])
    with pytest.raises(ConfigError, match="--config needs a value"):
        parse_train(["d", "--config", "--lr", "1"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "usage: ssod-fast COMMAND"),
        (["--help"], 0, "train LABELED [UNLABELED]"),
        (["trian"], 2, "unknown command 'trian', did you mean 'train'?"),
        (["train"], 2, "Missing from ssod-fast train"),
        (["train", "d", "--itres", "5"], 2, "--iters INT"),
        (["train", "d", "--method", "mixpi"], 2, "unknown method 'mixpi', did you mean 'mixpl'?"),
        (["train", "d", "--config", "/nowhere.yaml"], 2, "cannot read the config /nowhere.yaml"),
        (["train", "/nowhere", "--method", "supervised", "--out", "{tmp}"], 3, "/nowhere does not exist"),
        (["train", "d", "--batch", "x"], 2, "batch must be LABELED or LABELED:UNLABELED"),
        (["val", "/nowhere", "/nowhere"], 3, "no detector at /nowhere"),
        (["report"], 2, "report needs at least one run folder"),
        (["report", "/nowhere"], 3, "expected a run folder, got '/nowhere', which is not a folder"),
        (["split", "/nope.json", "--out", "{tmp}"], 3, "/nope.json does not exist: expected a COCO json or a folder that holds one"),
        (["split", "{tmp}", "--out", "{tmp}"], 3, "holds no COCO json"),
        (["split", "x.json", "--out", "/dev/null/x"], 1, "cannot write to the folder /dev/null/x: Not a directory"),
        (["predict", "r", "i", "--out", "/dev/null/x/p.json"], 1, "cannot write to the folder /dev/null/x"),
        (["predict", "r", "i", "--out", "{tmp}"], 2, "--out must be a file, got the folder"),
        (["val", __file__, "/nowhere"], 3, "a detector is in weights/best_*.safetensors of a run folder, last.pt is for resuming alone"),
        (["ops", "--verbose"], 2, "ops takes no option but --json, got --verbose"),
        (["train", "--help"], 0, "--optimizer.clip-norm"),
        (["train", "--help"], 0, f"--method {{{','.join(METHODS)}}}"),
        (["train", "--model", "own:dino_tiny", "--help"], 0, "0.1)"),
        (["train", "--help"], 0, "LABELED [UNLABELED]"),
        (["val", "--help"], 0, "CHECKPOINT DATA"),
        (["predict", "--help"], 0, "by default the teacher if there is one"),
    ],
)
def test_exit_codes(arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([a.replace("{tmp}", str(tmp_path)) for a in arguments]) == code
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


def test_report_says_where_that_of_several_runs_lies(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "without it report.html in the run folder, of several runs in the folder that holds them all." in words


def test_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["val", "/nowhere", "/nowhere", "--json"]) == 3
    result = result_of(capsys)
    assert result["code"] == 3
    assert "no detector at /nowhere" in result["error"]


def test_ops_lists_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ops", "--json"]) == 0
    info = result_of(capsys)
    names = {op["name"] for op in info["ops"]}
    assert {"box_iou", "paired_box_iou", "compose_images"} <= names
    assert {op["cpu"] for op in info["ops"]} <= {"C++", "reference"}
    assert {"python", "torch", "cuda", "triton"} <= set(info["versions"])
    assert cli.main(["ops"]) == 0
    assert "ssod_fast._C: " in capsys.readouterr().out


def run_without(package: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process in which a package is not installed."""
    code = f"""
        import sys
        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == {package!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        sys.meta_path.insert(0, Missing())
        from ssod_fast.cli import main
        sys.exit(main({list(arguments)!r}))
    """
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", ["tyro", "yaml"])
def test_missing_extra_is_named(package: str) -> None:
    done = run_without(package, "train", "d")
    assert done.returncode == 2
    assert done.stderr.strip() == f'ssod-fast: this command needs {package}: pip install "ssod-fast[train]"'


def test_ops_needs_no_extra() -> None:
    done = run_without("tyro", "ops")
    assert done.returncode == 0
    assert "box_iou" in done.stdout


def test_import_stays_free_of_the_extra() -> None:
    code = """
        import sys, ssod_fast, ssod_fast.ops, ssod_fast.cli
        heavy = {"tyro", "yaml", "accelerate", "rich", "matplotlib", "PIL", "safetensors", "faster_coco_eval", "pycocotools", "torchvision"}
        print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
