"""Labelled fractions: published draws, files, bad input."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_data import coco_dict, write_coco

from ssod_fast.data import apply_split, draw_split, list_images, read_coco, split_main, write_split
from ssod_fast.data.split import DRAWS, SplitSource, ids_sha256
from ssod_fast.data.split_files import describe


def plain(n: int) -> SplitSource:
    """n images with ids equal to their positions, all of one class."""
    return SplitSource(list(range(n)), [f"{i}.jpg" for i in range(n)], [{0}] * n, {0: "thing"}, None)


@pytest.mark.parametrize(
    ("protocol", "fold", "n", "k", "expected"),
    [
        ("stac", 1, 40, 10, [37, 12, 8, 9, 11, 5, 15, 0, 16, 1]),
        ("stac", 2, 40, 10, [15, 8, 22, 18, 11, 7, 34, 31, 11, 21]),
        ("softteacher", 1, 40, 10, [2, 31, 3, 21, 27, 29, 22, 39, 19, 26]),
        ("softteacher", 2, 40, 10, [27, 9, 14, 0, 2, 30, 13, 36, 17, 37]),
        ("stac", 1, 40, 4, [37, 12, 8, 9]),
        ("softteacher", 1, 40, 4, [2, 31, 3, 21]),
        ("stac", 1, 100, 10, [37, 12, 72, 9, 75, 5, 79, 64, 16, 1]),
        ("stac", 2, 100, 10, [40, 15, 72, 22, 43, 82, 75, 7, 34, 49]),
        ("softteacher", 1, 100, 10, [80, 84, 33, 81, 93, 17, 36, 82, 69, 65]),
        ("softteacher", 2, 100, 10, [83, 30, 56, 24, 16, 23, 2, 27, 28, 13]),
    ],
)
def test_small_golden_draws(protocol: str, fold: int, n: int, k: int, expected: list[int]) -> None:
    assert DRAWS[protocol](fold, n, k) == expected
    split = draw_split(plain(n), 100 * k / n, fold, protocol)
    assert split.labeled_ids == sorted(set(expected))
    assert split.manifest["requested"] == k
    assert split.manifest["unique"] == len(set(expected))


COCO_SIZE = 118_287


@pytest.mark.parametrize(
    ("protocol", "fold", "first", "total", "unique"),
    [
        ("stac", 1, [98539, 77708, 5192, 98047, 50057], 668826456, 11285),
        ("stac", 2, [89256, 100879, 72173, 95816, 44566], 665692926, 11261),
        ("stac", 3, [71530, 67224, 77049, 59011, 48056], 664039673, 11234),
        ("stac", 4, [83066, 73902, 92599, 115397, 11863], 669087064, 11262),
        ("stac", 5, [35683, 18638, 20463, 101350, 5520], 671351566, 11235),
        ("softteacher", 1, [105285, 107335, 49358, 65744, 101669], 692108723, 11828),
        ("softteacher", 2, [50732, 104846, 84723, 53526, 109616], 695376208, 11828),
        ("softteacher", 3, [52896, 111834, 21472, 4886, 86848], 698404979, 11828),
        ("softteacher", 4, [909, 68942, 105360, 36552, 106943], 696089175, 11828),
        ("softteacher", 5, [109242, 42571, 69389, 35409, 114293], 699531505, 11828),
    ],
)
def test_golden_draws_of_coco(protocol: str, fold: int, first: list[int], total: int, unique: int) -> None:
    draw = DRAWS[protocol](fold, COCO_SIZE, 11828)
    assert draw[:5] == first
    assert len(set(draw)) == unique
    assert sum(set(draw)) == total


@pytest.mark.parametrize(("percent", "uniques"), [(1, (1174, 1175, 1174, 1174, 1175)), (2, (2329, 2346, 2342, 2337, 2343))])
def test_unique_images_of_coco_with_replacement(percent: int, uniques: tuple[int, ...]) -> None:
    k = int(percent / 100.0 * COCO_SIZE)
    assert tuple(len(set(DRAWS["stac"](fold, COCO_SIZE, k))) for fold in range(1, 6)) == uniques


def test_formula_of_the_count_truncates() -> None:
    assert draw_split(plain(100), 29).manifest["requested"] == 28
    assert [int(p / 100.0 * COCO_SIZE) for p in (1, 2, 5, 10)] == [1182, 2365, 5914, 11828]


def test_small_sets_with_replacement() -> None:
    assert [draw_split(plain(478), 10, fold, "mmdet").manifest["unique"] for fold in (1, 2)] == [46, 46]
    assert draw_split(plain(478), 10, 1, "mmdet").manifest["protocol"] == "stac"


@settings(deadline=None, max_examples=40)
@given(n=st.integers(10, 300), percent=st.integers(10, 100), fold=st.integers(1, 9), protocol=st.sampled_from(["stac", "softteacher"]))
def test_the_parts_partition_the_set(n: int, percent: int, fold: int, protocol: str) -> None:
    split = draw_split(plain(n), percent, fold, protocol)
    assert sorted(split.labeled_ids + split.unlabeled_ids) == list(range(n))
    smaller = draw_split(plain(n), 10, fold, protocol)
    assert set(smaller.labeled_ids) <= set(split.labeled_ids)  # draws of a fold are nested


def test_manifest() -> None:
    split = draw_split(plain(100), 10.0, fold=2, seed_offset=40)
    m = split.manifest
    assert split.tag == "2@10"
    assert (m["protocol"], m["fold"], m["seed"], m["seed_offset"], m["images"]) == ("softteacher", 2, 42, 40, 100)
    assert m["labeled_ids"] == split.labeled_ids
    assert split.ids_hash == hashlib.sha256("\n".join(map(str, split.labeled_ids)).encode()).hexdigest()
    assert m["numpy"] == np.__version__
    assert draw_split(plain(200), 0.5).tag == "1@0.5"
    assert "10 of 100 images labelled" in describe(split)


def rare_class(n: int = 40) -> SplitSource:
    classes: list[set[int]] = [{0} for _ in range(n)]
    classes[5] = {0, 1}
    return SplitSource(list(range(n)), [f"{i}.jpg" for i in range(n)], classes, {0: "common", 1: "rare"}, None)


def test_missing_classes_are_told_and_can_be_covered() -> None:
    first = draw_split(rare_class(), 10)
    assert first.manifest["missing_classes"] == ["rare"]
    assert "no labelled box of: rare" in describe(first)
    covered = draw_split(rare_class(), 10, cover_classes=True)
    assert 5 in covered.labeled_ids
    assert covered.manifest["redraws"] > 0
    assert covered.manifest["seed"] == 1 + 1000 * covered.manifest["redraws"]
    assert covered.manifest["missing_classes"] == []


def test_covering_gives_up_with_a_message() -> None:
    classes: list[set[int]] = [{i} for i in range(20)]
    source = SplitSource(list(range(20)), [str(i) for i in range(20)], classes, {i: str(i) for i in range(20)}, None)
    with pytest.raises(ValueError, match="cover_classes: 1000 draws of 2 of 20 images each missed a class"):
        draw_split(source, 10, cover_classes=True)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"percent": 0}, r"percent must lie in \(0, 100\], got 0"),
        ({"percent": 101}, r"percent must lie in \(0, 100\], got 101"),
        ({"percent": 1}, "percent too small: 0 of 40 images"),
        (
            {"percent": 10, "protocol": "other"},
            "protocol must be one of stac, mmdet, softteacher, no_replacement, ub_teacher, from_file, got 'other'",
        ),
        ({"percent": 10, "protocol": "from_file"}, "protocol 'from_file' needs list_file"),
        ({"percent": 10, "seed_offset": -5}, r"fold \+ seed_offset must be >= 0"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_split(plain(40), **kwargs)


def test_doubled_ids() -> None:
    source = SplitSource([1, 1, 2], ["a", "b", "c"], [{0}] * 3, {0: "x"}, None)
    with pytest.raises(ValueError, match=r"image ids twice: \[1\]"):
        draw_split(source, 50)


def test_from_file(tmp_path: Path) -> None:
    source = plain(10)
    (tmp_path / "ids.txt").write_text("3\n7\n\n")
    (tmp_path / "names.json").write_text('["folder/2.jpg", "5.jpg"]')
    assert draw_split(source, 20, protocol="from_file", list_file=tmp_path / "ids.txt").labeled_ids == [3, 7]
    split = draw_split(source, 20, protocol="from_file", list_file=tmp_path / "names.json")
    assert split.labeled_ids == [2, 5]
    assert len(split.manifest["list_sha256"]) == 64
    (tmp_path / "ids.txt").write_text("3\n77\nx.jpg\n")
    with pytest.raises(ValueError, match=r"that the data set does not have, such as x\.jpg"):
        draw_split(source, 20, protocol="from_file", list_file=tmp_path / "ids.txt")
    (tmp_path / "ids.txt").write_text("\n")
    with pytest.raises(ValueError, match="names no image"):
        draw_split(source, 20, protocol="from_file", list_file=tmp_path / "ids.txt")
    with pytest.raises(ValueError, match="cover_classes needs a drawn protocol"):
        draw_split(source, 20, protocol="from_file", list_file=tmp_path / "ids.txt", cover_classes=True)


def test_list_of_unbiased_teacher(tmp_path: Path) -> None:
    # Ids run backwards and image 0 has no box: the filtered list is [18, 17, ..., 0] turned round, without that image.
    ids = list(range(19, -1, -1))
    classes: list[set[int]] = [set()] + [{0}] * 19
    source = SplitSource(ids, [str(i) for i in ids], classes, {0: "x"}, None)
    file = tmp_path / "list.txt"
    file.write_text(json.dumps({"10.0": {"1": [0], "2": [18]}, "20.0": {"1": [1, 2, 5]}}))
    kwargs: dict[str, Any] = {"protocol": "ub_teacher", "list_file": file}
    assert draw_split(source, 10, fold=1, **kwargs).labeled_ids == [0]
    assert draw_split(source, 10, fold=2, **kwargs).labeled_ids == [18]
    assert draw_split(source, 20, fold=1, **kwargs).labeled_ids == [1, 2, 5]
    other = draw_split(source, 20, fold=1, index_base="all", **kwargs)
    assert other.labeled_ids == [14, 17, 18]
    assert other.manifest["index_base"] == "all"
    with pytest.raises(ValueError, match=r"percent must be one of .*10.0, 20.0, got 5"):
        draw_split(source, 5, **kwargs)
    with pytest.raises(ValueError, match=r"fold must be a run of .*: 1, got 3"):
        draw_split(source, 20, fold=3, **kwargs)
    with pytest.raises(ValueError, match='index_base must be "filtered" or "all"'):
        draw_split(source, 10, index_base="some", **kwargs)
    file.write_text(json.dumps({"10.0": {"1": [0, 1]}, "20.0": {"1": [25]}}))
    with pytest.raises(ValueError, match=r"has 2 indices at 10 %, 1 fit the 19 filtered images .*index_base=\"all\""):
        draw_split(source, 10, **kwargs)
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 19\), the filtered image list, got \[25\]"):
        draw_split(source, 20, **kwargs)


def test_written_files(bccd: Path, tmp_path: Path) -> None:
    results = split_main(bccd / "annotations" / "instances_train.json", tmp_path / "splits", percent=10, folds=2, cover_classes=True)
    split, files = results[1]
    assert sorted(p.name for p in files.labeled.parent.iterdir()) == sorted(
        ["split.json"] + [f"instances_train.{f}@10{s}.json" for f in (1, 2) for s in ("", "-unlabeled", "-hidden")]
    )
    labeled, hidden = read_coco(files.labeled), read_coco(files.hidden)
    assert [r.id for r in labeled.records] == split.labeled_ids
    assert len(labeled) == 20
    assert [r.id for r in hidden.records] == split.unlabeled_ids
    assert sum(labeled.class_counts()) + sum(hidden.class_counts()) == 2799
    raw = json.loads(files.unlabeled.read_text())
    assert raw["annotations"] == []
    assert len(raw["categories"]) == 3
    assert sorted(r.id for r in list_images(files.unlabeled)) == split.unlabeled_ids
    assert all(r.path.is_file() for r in list_images(files.unlabeled))
    manifest = json.loads(files.manifest.read_text())
    assert set(manifest["splits"]) == {"1@10", "2@10"}
    assert manifest["splits"]["2@10"]["labeled_sha256"] == ids_sha256(split.labeled_ids)
    assert manifest["source_sha256"] == hashlib.sha256((bccd / "annotations" / "instances_train.json").read_bytes()).hexdigest()


def test_unlabelled_file_holds_nothing_of_the_truth(bccd: Path, tmp_path: Path) -> None:
    ((_, files),) = split_main(bccd / "annotations" / "instances_train.json", tmp_path)
    assert "bbox" not in files.unlabeled.read_text()
    assert "bbox" in files.hidden.read_text()


def test_in_memory_and_on_disk_agree(bccd: Path, tmp_path: Path) -> None:
    file = bccd / "annotations" / "instances_train.json"
    data = read_coco(file)
    split = draw_split(data, 10, fold=3)
    assert split.labeled_ids == draw_split(file, 10, fold=3).labeled_ids
    parts = apply_split(data, split)
    assert [r.id for r in parts.labeled.records] == split.labeled_ids
    assert [r.id for r in parts.unlabeled] == split.unlabeled_ids
    assert [r.id for r in parts.hidden.records] == split.unlabeled_ids
    write_split(file, tmp_path, split)


def test_a_split_of_another_file_is_refused(tmp_path: Path) -> None:
    file = write_coco(tmp_path)
    split = draw_split(coco_dict(), 50)
    with pytest.raises(ValueError, match="split was drawn from another file"):
        write_split(file, tmp_path / "out", split)
    with pytest.raises(ValueError, match="folds must be >= 1"):
        split_main(file, tmp_path / "out", folds=0)
