"""What README.md shows runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from ssod_fast import ops
from ssod_fast.cli.train import parse_train
from ssod_fast.data import LoaderConfig, TrainLoader, ViewConfig, list_images, load_detection_data
from ssod_fast.data.synthetic import write_scenes

README = Path(__file__).resolve().parent.parent / "README.md"
COMMANDS = [line.split("#")[0].strip() for line in README.read_text().splitlines() if line.startswith("ssod-fast train")]


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """The names left behind by the Python blocks, which are run one after the other."""
    parts, _ = README.read_text().split("## Drop-ins\n")  # which tests/dropin/test_readme_snippets.py runs
    blocks = re.findall(r"```python\n(.*?)```", parts, flags=re.S)
    assert len(blocks) == 12
    found: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), found)
    return found


def test_boxes(names: dict[str, Any]) -> None:
    assert names["overlaps"].shape == (900, 20)
    assert torch.isfinite(names["predicted"].grad).all()


def test_matching(names: dict[str, Any]) -> None:
    assert [(len(i), sorted(j.tolist())) for i, j in names["pairs"]] == [(2, [0, 1]), (0, [])]
    assert torch.isfinite(names["logits"].grad).all()
    assert (names["boxes"].grad != 0).any()


def test_mining(names: dict[str, Any]) -> None:
    cheap, mined, padded = names["cheap"], names["mined"], names["padded"]
    assert mined.count.tolist() == [int(part.sum()) for part in cheap.split([12, 7])]
    assert (mined.count > 0).all()
    assert (mined.count <= padded.count).all()
    assert torch.equal(mined.boxes[0, : mined.count[0]], padded.boxes[0, :12][cheap[:12]])


def test_one_to_many(names: dict[str, Any]) -> None:
    assert names["assigned"].count.shape == (6, 4)
    assert names["positive"].any()
    assert not names["assigned"].weight[~names["positive"]].any()


def test_pseudo_labels(names: dict[str, Any]) -> None:
    kept, keep = names["kept"], names["fit"].keep
    assert names["pseudo_boxes"].shape == (4, 300, 4)
    assert not keep[kept.index < 0].any()
    assert (keep.sum(1) > 0).all()


def test_bags(names: dict[str, Any]) -> None:
    bags, negatives = names["bags"], names["negatives"]
    assert bags.boxes.shape == bags.targets.shape == (20, 125, 4)
    assert bags.rois.shape == (2500, 5)
    torch.testing.assert_close(names["refined"], bags.boxes, atol=1e-3, rtol=0)
    assert negatives.keep.any()


def test_attention(names: dict[str, Any]) -> None:
    assert names["attended"].shape == names["sampled"].shape == (2, 300, 256)
    assert names["attended"].requires_grad
    assert 0.1 < names["sampled"].std() < 1


def test_detection_transformers(names: dict[str, Any]) -> None:
    assert torch.isfinite(names["dino_loss"])
    assert names["later"].boxes.shape == (2, 2, 5, 4)


def test_parts_of_semi_detr(names: dict[str, Any]) -> None:
    assert not names["cheaply"].keep[~names["pseudo"].valid].any()
    assert names["cheaply"].keep.any()
    assert all(torch.isfinite(loss) for loss in names["one_to_many"].values())


def test_detectors_of_transformers(names: dict[str, Any]) -> None:
    assert all(torch.isfinite(loss) for loss in names["hf_losses"].values())
    assert names["detections"][0]["boxes"].shape[1] == 4


def test_images(names: dict[str, Any]) -> None:
    assert names["batch"].shape == (1, 3, 640, 640)
    assert names["batch"].std() > 0.1


def test_training_loop(names: dict[str, Any], tmp_path: Path) -> None:
    write_scenes(tmp_path, 8, 2, seed=0)
    data = load_detection_data(tmp_path, split="train")
    views = ViewConfig(short_side=(96, 128), max_side=192, test_short_side=112)
    loader = TrainLoader(
        data.subset([record.id for record in data.records[:4]]),
        list_images(tmp_path / "images"),
        LoaderConfig(2, 2, workers=0, views=views),
    )
    model = names["model"]
    before = [p.detach().clone() for p in model.student.parameters()]
    batches = iter(loader)
    names["train"]([next(batches) for _ in range(5)])
    assert any(not torch.equal(a, b) for a, b in zip(before, model.student.parameters(), strict=True))
    assert all(torch.isfinite(p).all() for p in model.student.parameters())


@pytest.mark.parametrize("command", COMMANDS)
def test_train_commands_parse(command: str) -> None:
    config = parse_train(shlex.split(command)[2:])
    assert str(config.labeled).startswith("data/")


def test_table_of_ops_is_complete() -> None:
    """Every function of `ssod_fast.ops` that computes on boxes, costs or images has a row, and every row is of a function."""
    table = README.read_text().split("| ops of `ssod_fast.ops` |")[1].split("\n\n")[0]
    listed = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    public = {name for name in ops.__all__ if name.islower()}
    short_forms = {"complete_box_iou", "distance_box_iou", "generalized_box_iou"}
    helpers = {"cache_view", "cache_write", "pack_targets", "valid_mask"}
    assert listed == public - short_forms - helpers
