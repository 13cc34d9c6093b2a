from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ssod_fast.training.config import TrainConfig
from ssod_fast.training.sets import DataError, load_sets
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


def test_hidden_truth_is_matched_by_file_name(make_config: MakeConfig, scenes: Path) -> None:
    config = make_config(percent=None, unlabeled=str(scenes / "images"), hidden_gt=scenes / "annotations" / "instances_val.json")
    data = load_sets(config)
    assert data.unlabeled is not None
    assert data.hidden is not None
    assert (len(data.unlabeled), len(data.hidden)) == (20, 4)
    assert all(("val" in r.path.name) == (r.id in data.hidden) for r in data.unlabeled)


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


def test_hidden_truth_of_other_images(make_config: MakeConfig, scenes: Path, tmp_path: Path) -> None:
    hidden = edited(scenes, tmp_path / "hidden.json")
    with pytest.raises(DataError, match="describes none of the 8 unlabelled images"):
        load_sets(make_config(hidden_gt=hidden))


def test_method_needs_unlabelled_images(make_config: MakeConfig) -> None:
    config: TrainConfig[object] = make_config(percent=None)
    with pytest.raises(ConfigError, match="needs unlabelled images"):
        load_sets(config)
