"""`ssod-fast noise` and `ssod-fast refine`: from clean annotations over noisy ones to corrected ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ssod_fast import cli
from ssod_fast.data import read_coco
from ssod_fast.data.synthetic import write_scenes
from ssod_fast.data.views import ViewConfig
from ssod_fast.report.refined import write_pictures
from ssod_fast.structures import Target
from ssod_fast.training.build import build_student
from ssod_fast.training.config import config_from_tree, read_tree
from ssod_fast.training.metrics import read_lines
from ssod_fast.training.refine import SavedRefiner, _structure, load_refiner, refine_set, write_refined
from ssod_fast.training.tree import ConfigError

MODEL = ["--model", "torchvision:fasterrcnn_tiny_fpn", "--model-options", "fpn_channels=16", "representation_size=16"]
METHOD = ["--method", "ssd_det", "--method.hidden", "16", "--method.ratios", "1", "0.8", "--method.negatives", "8"]
VIEWS = ["--views.short-side", "48", "64", "--views.max-side", "96", "--views.test-short-side", "64"]
RUN = ["--iters", "2", "--batch", "2", "--log-every", "1", "--eval-every", "2", "--lr", "0.001", "--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, n_train=6, n_val=1, seed=4, size=(64, 96))
    return folder


@pytest.fixture(scope="module")
def noisy(scenes: Path) -> Path:
    assert cli.main(["noise", str(scenes), "--level", "0.3", "--out", str(scenes / "noisy"), "--quiet"]) == 0
    return scenes / "noisy" / "instances_train_noise-r0.3.json"


@pytest.fixture(scope="module")
def trained(scenes: Path, noisy: Path) -> Path:
    words = ["train", str(noisy), *METHOD, *MODEL, *VIEWS, *RUN, "--out", str(scenes / "runs"), "--name", "r", "--no-report", "--quiet"]
    assert cli.main(words) == 0
    return scenes / "runs" / "r"


def result_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out))


def test_noise_reports_severity(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["noise", str(scenes), "--out", str(tmp_path), "--json"]) == 0
    result = result_of(capsys)
    assert result["sha256"] == hashlib.sha256(Path(result["annotations"]).read_bytes()).hexdigest()
    assert 0.3 < result["severity"]["mean_iou"] < 0.6
    assert json.loads(Path(result["manifest"]).read_text())["noise_seed"] == 45
    assert cli.main(["noise", str(scenes), "--out", str(tmp_path), "--seed", "7"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("noise 0.4, seed 7, official clip: mean IoU 0.")
    assert "by class: " in text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{}", "--level", "1"], 2, "--level must lie in [0, 1), got 1.0"),
        (["{}", "--seed", "-1"], 2, "--seed must lie in"),
        (["{}/missing"], 3, "does not exist"),
    ],
)
def test_noise_refuses(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str) -> None:
    assert cli.main(["noise", *(w.format(scenes) for w in words), "--out", str(tmp_path)]) == code
    assert message in capsys.readouterr().err


def test_training_logs_what_the_clean_boxes_say(trained: Path) -> None:
    lines = [line for line in read_lines(trained / "metrics.jsonl") if line["type"] == "train"]
    assert len(lines) == 2
    for line in lines:
        names = {"noisy_iou", "bag0_iou", "bag1_iou", "bag2_iou", "bag2_max_iou", "stage1_iou", "refined_iou"}
        assert names <= set(line["diagnostics"])
        assert 0.3 < line["diagnostics"]["noisy_iou"] < 0.8
        assert not any("iou" in name for name in line["losses"])
    assert "diagnostics/refined_iou" in (trained / "results.csv").read_text().splitlines()[0]


def test_clean_boxes_change_no_weight(scenes: Path, noisy: Path, trained: Path, tmp_path: Path) -> None:
    raw = json.loads(noisy.read_text())
    for row in raw["annotations"]:
        del row["true_bbox"]
    blind = noisy.parent / "blind.json"
    blind.write_text(json.dumps(raw))
    words = ["train", str(blind), *METHOD, *MODEL, *VIEWS, *RUN, "--out", str(tmp_path), "--name", "blind", "--no-report", "--quiet"]
    assert cli.main(words) == 0
    a, b = (torch.load(run / "weights" / "last.pt", weights_only=True)["model"] for run in (trained, tmp_path / "blind"))
    tensors = [name for name, value in a.items() if isinstance(value, torch.Tensor)]
    assert any(name.startswith("trainable.") for name in tensors)
    assert all(torch.equal(a[name], b[name]) for name in tensors)
    lines = read_lines(tmp_path / "blind" / "metrics.jsonl")
    assert not any(name.endswith("iou") for line in lines for name in line.get("diagnostics", {}))


def test_refine_writes_annotations_and_pictures(noisy: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["refine", str(trained), str(noisy), "--out", str(tmp_path), "--pictures", "2", "--batch", "2", "--device", "cpu"]
    assert cli.main([*words, "--json"]) == 0
    result = result_of(capsys)
    given, refined = read_coco(noisy), read_coco(result["annotations"])
    assert [r.path for r in refined.records] == [r.path for r in given.records]
    rows = json.loads(Path(result["annotations"]).read_text())["annotations"]
    noise = json.loads(noisy.read_text())["annotations"]
    assert len(rows) == len(noise)
    for row, before in zip(rows, noise, strict=True):
        assert row["noisy_bbox"] == pytest.approx(before["bbox"], abs=1e-3)
        assert row["true_bbox"] == pytest.approx(before["true_bbox"], abs=1e-3)
        assert row["category_id"] == before["category_id"]
        assert 0 <= row["refined_score"] <= 1
    assert any(row["bbox"] != row["noisy_bbox"] for row in rows)
    assert result["before"]["mean_iou"] == pytest.approx(
        json.loads(noisy.with_suffix(".manifest.json").read_text())["severity"]["mean_iou"]
    )
    assert result["after"]["boxes"] == len(rows)
    assert result["sha256"] == hashlib.sha256(Path(result["annotations"]).read_bytes()).hexdigest()
    assert [Image.open(p).size for p in result["pictures"]] == [(96, 64 + 22)] * 2
    assert cli.main([*words, "--pictures", "0"]) == 0
    text = capsys.readouterr().out
    assert "before: mean IoU 0." in text
    assert "after:  mean IoU 0." in text


def test_refined_boxes_land_where_the_refiner_put_them(noisy: Path) -> None:
    """A refiner that knows the answer: what it says in the frame of a view must arrive in the frame of the original."""
    data = read_coco(noisy)
    clean = {float(t["boxes"].shape[0]) + float(t["boxes"].sum()): t["clean_boxes"] for t in data.targets}

    def oracle(images: list[torch.Tensor], targets: list[Target]) -> list[Target]:
        results = []
        for image, target in zip(images, targets, strict=True):
            scale = image.shape[1] / 64
            key = min(clean, key=lambda k: abs(k - len(target["labels"]) - float(target["boxes"].sum()) / scale))
            results.append(Target(boxes=clean[key] * scale, labels=target["labels"], scores=torch.ones(len(target["labels"]))))
        return results

    refiner = SavedRefiner(oracle, list(data.classes), ViewConfig(test_short_side=128, max_side=500), torch.device("cpu"))
    result = refine_set(data, refiner)
    assert result.before is not None
    assert result.after is not None
    assert result.before.mean_iou is not None
    assert result.before.mean_iou < 0.8
    assert result.after.mean_iou == pytest.approx(1.0, abs=1e-4)
    unknown = dataclasses.replace(data, targets=[Target(boxes=t["boxes"], labels=t["labels"]) for t in data.targets])
    assert refine_set(unknown, refiner).after is None


def test_boxes_that_vanish_and_images_that_cannot_be_read_stay(noisy: Path, tmp_path: Path) -> None:
    data = read_coco(noisy)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    data = dataclasses.replace(data, records=[dataclasses.replace(data.records[0], path=tmp_path / "broken.jpg"), *data.records[1:]])

    def far_away(images: list[torch.Tensor], targets: list[Target]) -> list[Target]:
        return [Target(boxes=t["boxes"] + 1e4, labels=t["labels"], scores=torch.ones(len(t["labels"]))) for t in targets]

    result = refine_set(data, SavedRefiner(far_away, list(data.classes), ViewConfig(), torch.device("cpu")))
    assert result.skipped == 1
    for given, refined in zip(data.targets, result.refined.targets, strict=True):
        torch.testing.assert_close(refined["boxes"], given["boxes"])
    assert float(result.refined.targets[0]["scores"].sum()) == 0
    assert len(write_pictures(data, result.refined, tmp_path / "pictures", 1)) == 0
    assert len(write_pictures(data, result.refined, tmp_path / "pictures", 99)) == 5


def test_crowd_regions_stay_between_refined_boxes(noisy: Path, tmp_path: Path) -> None:
    """Rows of regions are no rows of boxes: each box keeps its own numbers, and areas follow the refined boxes."""
    raw = json.loads(noisy.read_text())
    crowd = {**raw["annotations"][0], "id": 9999, "iscrowd": 1, "bbox": [1, 1, 9, 9], "area": 81}
    del crowd["true_bbox"]
    raw["annotations"].insert(0, crowd)
    file = noisy.parent / "crowd.json"
    file.write_text(json.dumps(raw))
    data = read_coco(file)

    def shift(images: list[torch.Tensor], targets: list[Target]) -> list[Target]:
        halves = [torch.cat([t["boxes"][:, :2], t["boxes"][:, :2] + (t["boxes"][:, 2:] - t["boxes"][:, :2]) / 2], 1) for t in targets]
        return [Target(boxes=b, labels=t["labels"], scores=torch.ones(len(b))) for b, t in zip(halves, targets, strict=True)]

    result = refine_set(data, SavedRefiner(shift, list(data.classes), ViewConfig(test_short_side=64, max_side=96), torch.device("cpu")))
    rows = json.loads(write_refined(result, tmp_path, {})[0].read_text())["annotations"]
    boxes = [row for row in rows if not row["iscrowd"]]
    assert len(rows) == len(boxes) + 1
    (region,) = (row for row in rows if row["iscrowd"])
    assert region["bbox"] == [1, 1, 9, 9]
    assert not {"true_bbox", "noisy_bbox", "refined_score"} & region.keys()
    assert len(boxes) == len(raw["annotations"]) - 1
    for row, before in zip(boxes, raw["annotations"][1:], strict=True):
        assert row["noisy_bbox"] == pytest.approx(before["bbox"], abs=1e-3)
        assert row["true_bbox"] == pytest.approx(before["true_bbox"], abs=1e-3)
        assert row["bbox"][2:] == pytest.approx([side / 2 for side in before["bbox"][2:]], abs=1e-3)
        assert row["area"] == pytest.approx(row["bbox"][2] * row["bbox"][3], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{run}", "{data}", "--batch", "0"], 2, "--batch must be at least 1, got 0"),
        (["{run}", "{data}", "--device", "tpu"], 2, "--device must be auto, cpu or cuda, got 'tpu'"),
        (["{run}/weights", "{data}"], 3, "no refiner at"),
        (["{run}", "{data}.missing"], 3, "does not exist"),
        (["{run}", "{other}"], 3, "they must be the same"),
    ],
)
def test_refine_refuses(
    noisy: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    raw = json.loads(noisy.read_text())
    raw["categories"][0]["name"] = "something else"
    other = noisy.parent / "other.json"
    other.write_text(json.dumps(raw))
    assert cli.main(["refine", *(w.format(run=trained, data=noisy, other=other) for w in words), "--out", str(tmp_path)]) == code
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", ["refine", "val"])
def test_cuda_without_a_gpu(command: str, noisy: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path)] if command == "refine" else []
    assert cli.main([command, str(trained), str(noisy), "--device", "cuda", *out]) == 2
    assert "device cuda was asked for, but torch sees no GPU" in capsys.readouterr().err


def test_a_run_without_a_refiner_is_refused(noisy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train",
        str(noisy),
        "--method",
        "supervised",
        *MODEL,
        *VIEWS,
        *RUN,
        "--out",
        str(tmp_path),
        "--name",
        "s",
        "--no-report",
        "--quiet",
    ]
    assert cli.main(words) == 0
    assert cli.main(["refine", str(tmp_path / "s"), str(noisy), "--out", str(tmp_path)]) == 2
    assert "which has no refiner: train one with --method ssd_det" in capsys.readouterr().err


def test_noisy_labels_and_unlabelled_images_in_one_command(
    scenes: Path, noisy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refiner = ["--method.refiner.hidden", "16", "--method.refiner.ratios", "1", "0.8", "--method.refiner.negatives", "8"]
    words = ["train", str(noisy), str(scenes / "images"), "--method", "mixpl_ssd_det", *refiner, *MODEL, *VIEWS, *RUN, "--batch", "2:1"]
    assert cli.main([*words, "--out", str(tmp_path), "--name", "both", "--no-report", "--quiet"]) == 0
    train = [line for line in read_lines(tmp_path / "both" / "metrics.jsonl") if line["type"] == "train"]
    assert {"noisy_iou", "refined_iou"} <= set(train[-1]["diagnostics"])
    assert cli.main(["refine", str(tmp_path / "both"), str(noisy), "--out", str(tmp_path), "--pictures", "0", "--json"]) == 0
    assert result_of(capsys)["after"]["mean_iou"] > 0.2


def test_loaded_refiner_is_that_of_the_checkpoint(trained: Path) -> None:
    refiner = load_refiner(trained, torch.device("cpu"))
    assert refiner.views.test_short_side == 64
    images = [torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))]
    targets = [Target(boxes=torch.tensor([[10.0, 10, 40, 40]]), labels=torch.tensor([0]))]
    first, again = (load(trained, torch.device("cpu")).run(images, targets)[0] for load in (load_refiner, load_refiner))
    assert torch.equal(first["boxes"], again["boxes"])
    assert first["boxes"].shape == (1, 4)


def test_structure_that_starting_weights_decided(noisy: Path, backbone_weights: Path, tmp_path: Path) -> None:
    """Frozen norms and padding follow from the file of the backbone, which may be gone when boxes are refined."""
    file = tmp_path / "backbone.safetensors"
    file.write_bytes(backbone_weights.read_bytes())
    options = ["--model", "torchvision:fasterrcnn_mobilenet_v2_fpn", *MODEL[2:], "--backbone-weights", str(file)]
    words = ["train", str(noisy), *METHOD, *options, *VIEWS, *RUN, "--iters", "1", "--no-report", "--quiet"]
    assert cli.main([*words, "--out", str(tmp_path), "--name", "r"]) == 0
    config = config_from_tree(read_tree(tmp_path / "r" / "config.yaml"))
    wanted = build_student(config, ["a", "b"], print).eval()
    ways = [_structure(tmp_path / "r", config, ["a", "b"])]
    file.rename(tmp_path / "elsewhere.safetensors")
    ways.append(_structure(tmp_path / "r", config, ["a", "b"]))
    for way in ways:
        assert [(n, type(m)) for n, m in way.named_modules()] == [(n, type(m)) for n, m in wanted.named_modules()]
    load_refiner(tmp_path / "r", torch.device("cpu"))
    (tmp_path / "r" / "weights" / "best_student.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"backbone.safetensors does not exist"):
        load_refiner(tmp_path / "r", torch.device("cpu"))
