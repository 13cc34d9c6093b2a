from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from toy_data import CLASSES, write_voc, write_yolo

from ssod_fast.data import load_detection_data
from ssod_fast.training.config import TrainConfig
from ssod_fast.training.sets import DataError, load_sets, read_evaluation_set
from ssod_fast.training.tree import ConfigError

from .conftest import MakeConfig


def edited(scenes: Path, target: Path, **changes: object) -> Path:
    """A copy of the validation json whose pictures are still found."""
    tree = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    for image in tree["images"]:
        image["file_name"] = str((scenes / "images" / Path(image["file_name"]).name).resolve())
    target.write_text(json.dumps({**tree, **changes}))
    return target


def test_draw_strips_truth_and_keeps_it_hidden(make_config: MakeConfig) -> None:
    data = load_sets(make_config(percent=25.0))
    assert data.unlabeled is not None
    assert data.hidden is not None
    assert (len(data.labeled), len(data.unlabeled), len(data.hidden)) == (4, 12, 12)
    assert not {r.id for r in data.labeled.records} & {r.id for r in data.unlabeled}
    assert not any(hasattr(record, name) for record in data.unlabeled for name in ("boxes", "target", "targets"))
    assert data.split is not None
    assert data.split_hash == data.split["labeled_sha256"]
    again = load_sets(make_config(percent=25.0))
    assert again.split_hash == data.split_hash
    assert load_sets(make_config(percent=25.0, fold=2)).split_hash != data.split_hash


def test_val_split_of_the_folder_is_found(make_config: MakeConfig, scenes: Path) -> None:
    data = load_sets(make_config())
    assert data.val is not None
    assert len(data.val) == 4
    alone = make_config(labeled=scenes / "annotations" / "instances_train.json")
    assert load_sets(alone).val is None


def test_val_with_classes_in_another_order(make_config: MakeConfig, scenes: Path, tmp_path: Path) -> None:
    tree = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    renumbered = [{**c, "id": 100 - c["id"]} for c in tree["categories"]]
    annotations = [{**a, "category_id": 100 - a["category_id"]} for a in tree["annotations"]]
    val = edited(scenes, tmp_path / "val.json", categories=renumbered, annotations=annotations)
    plain, other = load_sets(make_config()), load_sets(make_config(val=val))
    assert plain.val is not None
    assert other.val is not None
    assert other.val.classes == plain.val.classes
    for a, b in zip(plain.val.targets, other.val.targets, strict=True):
        assert torch.equal(a["labels"], b["labels"])


def test_flat_voc_folder_is_evaluated_as_a_whole(tmp_path: Path) -> None:
    whole = write_voc(tmp_path / "a")
    names = load_detection_data(whole).classes
    assert read_evaluation_set(whole, names[::-1]).classes == names[::-1]
    wider = (*names, "zebra")  # a rare class may not occur among the images for evaluation
    assert read_evaluation_set(whole, wider).classes == wider
    assert set(read_evaluation_set(whole, ("zebra",)).classes) == set(names)  # the caller compares and refuses


def test_flat_yolo_folder_is_evaluated_as_a_whole(tmp_path: Path) -> None:
    parts = write_yolo(tmp_path / "parts", with_yaml=False)
    whole = tmp_path / "whole"
    for kind in ("images", "labels"):
        shutil.copytree(parts / kind / "train", whole / kind)
    (whole / "classes.txt").write_text("\n".join(CLASSES))
    assert len(read_evaluation_set(whole, load_detection_data(whole).classes)) == len(load_detection_data(whole))


def test_hidden_truth_is_matched_by_file_name(make_config: MakeConfig, scenes: Path) -> None:
    config = make_config(percent=None, unlabeled=str(scenes / "images"), hidden_gt=scenes / "annotations" / "instances_val.json")
    data = load_sets(config)
    assert data.unlabeled is not None
    assert data.hidden is not None
    assert (len(data.unlabeled), len(data.hidden)) == (20, 4)
    assert all(("val" in r.path.name) == (r.id in data.hidden) for r in data.unlabeled)


def test_hidden_truth_of_names_that_two_folders_use(make_config: MakeConfig, scenes: Path, tmp_path: Path) -> None:
    tree = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    for i, image in enumerate(tree["images"]):  # a/0.png, b/0.png, a/1.png, b/1.png
        name = f"{'ab'[i % 2]}/{i // 2}.png"
        (tmp_path / "u" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scenes / "images" / image["file_name"], tmp_path / "u" / name)
        image["file_name"] = name
    boxes = [sum(a["image_id"] == image["id"] for a in tree["annotations"]) for image in tree["images"]]
    (tmp_path / "u" / "truth.json").write_text(json.dumps(tree))
    config = make_config(percent=None, unlabeled=str(tmp_path / "u"), hidden_gt=tmp_path / "u" / "truth.json")
    data = load_sets(config)
    assert data.unlabeled is not None
    assert data.hidden is not None
    assert [len(data.hidden[r.id][1]) for r in data.unlabeled] == [boxes[i] for i in (0, 2, 1, 3)]  # sorted: a/0, a/1, b/0, b/1
    # From elsewhere the paths differ, and the names alone do not say which image is meant.
    shutil.copytree(tmp_path / "u", tmp_path / "copy")
    with pytest.raises(DataError, match="describes none of the 4 unlabelled images"):
        load_sets(dataclasses.replace(config, hidden_gt=tmp_path / "copy" / "truth.json"))


def test_unlabelled_images_of_the_validation_set_are_told(make_config: MakeConfig, scenes: Path) -> None:
    notes = load_sets(make_config(unlabeled=str(scenes / "images"))).notes
    assert [n for n in notes if n.startswith("4 images for evaluation are among the unlabelled ones (val_00000.png, val_00001.png")]
    assert load_sets(make_config()).notes == []


def test_more_unlabelled_images_get_ids_of_their_own(make_config: MakeConfig, scenes: Path) -> None:
    data = load_sets(make_config(unlabeled=str(scenes / "images")))
    assert data.unlabeled is not None
    assert len(data.unlabeled) == 8 + 20
    assert len({r.id for r in data.unlabeled}) == 28


def test_supervised_ignores_missing_unlabelled_images(make_config: MakeConfig) -> None:
    assert load_sets(make_config("supervised", percent=None)).unlabeled is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labeled": Path("/nowhere")}, "/nowhere does not exist"),
        ({"val": Path("/nowhere")}, "/nowhere does not exist"),
        ({"percent": 1.0}, "percent too small"),
        ({"protocol": "stca"}, "protocol must be one of"),
        ({"percent": None, "unlabeled": "/nowhere"}, "/nowhere does not exist"),
    ],
)
def test_unusable_data_is_named(make_config: MakeConfig, changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_sets(make_config(**changes))


def test_labelled_set_without_any_box(make_config: MakeConfig, scenes: Path, tmp_path: Path) -> None:
    empty = edited(scenes, tmp_path / "empty.json", annotations=[])
    with pytest.raises(DataError, match=r"none of the 4 labelled images in \S+empty.json has a box to learn from$"):
        load_sets(make_config("supervised", labeled=empty, percent=None))
    with pytest.raises(DataError, match=r"has a box to learn from: draw another --fold or raise --percent"):
        load_sets(make_config(labeled=empty))


def test_hidden_truth_of_other_images(make_config: MakeConfig, scenes: Path, tmp_path: Path) -> None:
    hidden = edited(scenes, tmp_path / "hidden.json")
    with pytest.raises(DataError, match="describes none of the 8 unlabelled images"):
        load_sets(make_config(hidden_gt=hidden))


def test_method_needs_unlabelled_images(make_config: MakeConfig) -> None:
    config: TrainConfig[object] = make_config(percent=None)
    with pytest.raises(ConfigError, match="needs unlabelled images"):
        load_sets(config)
