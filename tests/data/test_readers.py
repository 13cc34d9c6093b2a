"""COCO, YOLO and VOC readers, format detection."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_data import CATEGORY_IDS, CLASSES, IMAGES, coco_dict, write_coco, write_image, write_voc, write_yolo

from ssod_fast.data import check_same_classes, has_split, load_detection_data, read_coco
from ssod_fast.data.split import split_source
from ssod_fast.data.yolo import read_yolo


def one_image(bbox: list[float], **extra: Any) -> dict[str, Any]:
    """A 50 x 100 image with a healthy box and the given one."""
    image = {"id": 7, "file_name": "x.png", "height": 50, "width": 100}
    good = {"id": 1, "image_id": 7, "category_id": 1, "bbox": [10, 10, 20, 20]}
    return {
        "images": [image],
        "annotations": [good, {"id": 2, "image_id": 7, "category_id": 1, "bbox": bbox, **extra}],
        "categories": [{"id": 1, "name": "thing"}],
    }


def test_bccd(bccd: Path) -> None:
    data = read_coco(bccd, split="train")
    assert (data.name, len(data), data.classes, data.category_ids) == ("bccd", 205, ("RBC", "WBC", "Platelets"), (1, 2, 3))
    assert sum(data.class_counts()) == 2799
    assert not data.warnings
    assert str(data.warnings) == "nothing was dropped"
    first = data.targets[0]
    assert first["boxes"].dtype == torch.float32
    assert first["labels"].dtype == torch.int64
    assert first["boxes"][0].tolist() == [67, 314, 286, 480]
    assert first["labels"][0] == 1
    assert data.records[0].size == (480, 640)
    assert all(record.path.is_file() for record in data.records)


def test_the_same_set_in_three_formats(tmp_path: Path) -> None:
    coco = load_detection_data(write_coco(tmp_path / "coco").parent.parent)
    yolo = load_detection_data(write_yolo(tmp_path / "yolo"))
    voc = load_detection_data(write_voc(tmp_path / "voc"))
    for data in (coco, yolo, voc):
        assert data.classes == CLASSES
        assert [record.path.name for record in data.records] == list(IMAGES)
        assert [record.size for record in data.records] == [size for size, _ in IMAGES.values()]
        for target, (_, boxes) in zip(data.targets, IMAGES.values(), strict=True):
            assert target["boxes"].shape == (len(boxes), 4)
            torch.testing.assert_close(target["boxes"], torch.tensor([b[:4] for b in boxes], dtype=torch.float32).reshape(-1, 4))
            assert target["labels"].tolist() == [b[4] for b in boxes]
        assert data.warnings.notes["images without boxes, kept as background"] == 1


def test_a_data_set_describes_itself_in_a_line(tmp_path: Path) -> None:
    data = read_coco(write_coco(tmp_path))
    assert re.fullmatch(r"DetectionData\('\S+', 4 images, 4 boxes of 3 classes, '\S+instances_train.json'\)", repr(data))


def test_category_ids_go_there_and_back(tmp_path: Path) -> None:
    data = read_coco(write_coco(tmp_path))
    assert data.category_ids == CATEGORY_IDS
    back = data.to_coco()
    original = coco_dict()
    assert [a["category_id"] for a in back["annotations"]] == [a["category_id"] for a in original["annotations"]]
    assert [a["bbox"] for a in back["annotations"]] == [a["bbox"] for a in original["annotations"]]
    assert back["categories"] == original["categories"]


def test_classes_in_the_order_of_another_set(tmp_path: Path) -> None:
    file = write_coco(tmp_path)
    data = read_coco(file, classes=("owl", "cat", "dog"))
    assert data.category_ids == (90, 1, 5)
    assert data.targets[0]["labels"].tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"classes must be those of .*\['cat', 'dog', 'owl'\], got \['cat'\]"):
        read_coco(file, classes=("cat",))
    with pytest.raises(ValueError, match="the order differs"):
        check_same_classes(read_coco(file), data)


def test_differing_classes_are_named(tmp_path: Path) -> None:
    other = coco_dict()
    other["categories"][2]["name"] = "crow"
    with pytest.raises(ValueError, match=r"only in the first: \['owl'\], only in the second: \['crow'\]"):
        check_same_classes(read_coco(write_coco(tmp_path / "a")), read_coco(write_coco(tmp_path / "b", other)))


@pytest.mark.parametrize(
    ("bbox", "reason"),
    [
        ([math.nan, 0, 5, 5], "boxes with NaN or infinite coordinates"),
        ([0, 0, math.inf, 5], "boxes with NaN or infinite coordinates"),
        ([30, 30, -5, 5], "inverted boxes (negative width or height)"),
        ([30, 30, 5, -5], "inverted boxes (negative width or height)"),
        ([30, 30, 0, 5], "degenerate boxes (zero width or height)"),
        ([200, 10, 20, 20], "boxes outside of their image"),
        ([10, -40, 20, 20], "boxes outside of their image"),
        ([99.995, 10, 20, 20], "boxes outside of their image"),
        ([10, 10, 5], "annotations whose bbox is not four numbers"),
        (["a", 1, 2, 3], "annotations whose bbox is not four numbers"),
    ],
)
def test_bad_boxes_are_dropped_and_counted(tmp_path: Path, bbox: list[Any], reason: str) -> None:
    file = write_coco(tmp_path, one_image(bbox))
    data = read_coco(file)
    assert data.warnings.dropped == {reason: 1}
    assert f"dropped 1 {reason}" in str(data.warnings)
    assert data.targets[0]["boxes"].tolist() == [[10, 10, 30, 30]]
    with pytest.raises(ValueError, match="strict reading found faults"):
        read_coco(file, strict=True)


def test_boxes_beyond_the_border_are_clipped(tmp_path: Path) -> None:
    data = read_coco(write_coco(tmp_path, one_image([-5, 40, 20, 30])), strict=True)
    assert data.targets[0]["boxes"][1].tolist() == [0, 40, 15, 50]
    assert data.warnings.notes == {"boxes reached beyond their image and were clipped": 1}


def test_a_rounding_hair_beyond_the_border_is_no_finding(tmp_path: Path) -> None:
    data = read_coco(write_coco(tmp_path, one_image([80, 40, 20.4, 10.2])))
    assert data.targets[0]["boxes"][1].tolist() == [80, 40, 100, 50]
    assert not data.warnings


def test_crowds_are_kept_apart(tmp_path: Path) -> None:
    data = read_coco(write_coco(tmp_path, one_image([0, 0, 90, 40], iscrowd=1)))
    assert len(data.targets[0]["labels"]) == 1
    assert data.crowds[0]["boxes"].tolist() == [[0, 0, 90, 40]]
    assert [a["iscrowd"] for a in data.to_coco()["annotations"]] == [0, 1]


def test_stated_areas_are_kept(tmp_path: Path) -> None:
    data = read_coco(write_coco(tmp_path, one_image([0, 0, 20, 10], area=77.0)))
    assert data.areas[0].tolist() == [400, 77]


def test_unknown_images_and_categories_are_counted(tmp_path: Path) -> None:
    content = coco_dict()
    content["annotations"][0]["image_id"] = 99
    content["annotations"][1]["category_id"] = 3
    data = read_coco(write_coco(tmp_path, content))
    assert data.warnings.dropped == {
        "annotations of images that are not listed": 1,
        "annotations of categories that are not listed": 1,
    }


def test_missing_image_files_are_reported(tmp_path: Path) -> None:
    file = write_coco(tmp_path)
    (tmp_path / "images" / "b.png").unlink()
    data = read_coco(file)
    assert len(data) == 3
    assert data.warnings.dropped == {"listed images whose file is missing": 1}
    assert "b.png" in str(data.warnings)
    with pytest.raises(ValueError, match=r"listed images whose file is missing \(b.png\)"):
        read_coco(file, strict=True)
    for name in IMAGES:
        (tmp_path / "images" / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"none of its 4 images exists or can be read; looked in .*images"):
        read_coco(file)


def test_sizes_are_read_from_the_files_where_the_json_has_none(tmp_path: Path) -> None:
    content = coco_dict()
    file = write_coco(tmp_path, content)
    for image in content["images"]:
        del image["height"]
    file.write_text(json.dumps(content))
    assert [r.size for r in read_coco(file).records] == [size for size, _ in IMAGES.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: expected a COCO json with the keys images, annotations, categories"),
        ("  \n", "is empty"),
        ("{", "is not valid json"),
        ("[]", "is not a COCO file: it needs lists under images, annotations, categories"),
        ('{"images": [{"id": 1}], "categories": []}', "missing: annotations"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "lists no image"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [], "categories": []}', "has no categories"),
        ('{"images": [{"file_name": "a"}], "annotations": [], "categories": []}', r"images\[0\] has no 'id', only 'file_name'"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', r"images\[0\] has no 'file_name', only 'id'"),
        ('{"images": ["a.png"], "annotations": [], "categories": []}', r"images\[0\] must be a mapping, got 'a.png'"),
        ('{"images": [{"id": "x_1", "file_name": "a"}], "annotations": [], "categories": []}', r"id of images\[0\] must be an integer"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [null], "categories": []}', r"annotations\[0\] must be a mapping"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [], "categories": [{"name": "a"}]}', r"categories\[0\] has no 'id'"),
    ],
)
def test_unusable_annotation_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_coco(file)


def test_ids_written_as_text_or_floats_lose_no_box(tmp_path: Path) -> None:
    content = one_image([1, 2, 3, 4])
    plain = read_coco(write_coco(tmp_path, content))
    for row in content["annotations"]:
        row |= {"image_id": "7", "category_id": 1.0}
    content["images"][0]["id"] = "7"
    content["categories"][0]["id"] = "1"
    file = write_coco(tmp_path, content)
    data = read_coco(file)
    assert data.targets[0]["boxes"].tolist() == plain.targets[0]["boxes"].tolist()
    assert len(data.targets[0]["boxes"]) == 2
    assert split_source(file).classes == [{1}]


def test_annotations_without_an_image_are_counted(tmp_path: Path) -> None:
    content = one_image([1, 2, 3, 4])
    del content["annotations"][0]["image_id"]
    content["annotations"][1]["category_id"] = [1]
    file = write_coco(tmp_path, content)
    assert read_coco(file).warnings.dropped == {
        "annotations of images that are not listed": 1,
        "annotations of categories that are not listed": 1,
    }
    assert split_source(file).classes == [set()]


@pytest.mark.parametrize("size", [(0, 100), (-50, 100), (None, 100)])
def test_impossible_stated_sizes_are_read_from_the_file(tmp_path: Path, size: tuple[int | None, int]) -> None:
    content = one_image([1, 2, 3, 4])
    file = write_coco(tmp_path, content)
    content["images"][0] |= {"height": size[0], "width": size[1]}
    file.write_text(json.dumps(content))
    data = read_coco(file)
    assert data.records[0].size == (50, 100)
    assert len(data.targets[0]["boxes"]) == 2


def test_doubled_ids_are_errors(tmp_path: Path) -> None:
    content = coco_dict()
    content["images"][1]["id"] = 0
    with pytest.raises(ValueError, match=r"lists image ids twice: \[0\]"):
        read_coco(write_coco(tmp_path, content))
    content = coco_dict()
    content["categories"][1]["name"] = "cat"
    with pytest.raises(ValueError, match="lists a category id or name twice"):
        read_coco(write_coco(tmp_path, content))


def test_no_annotations_at_all_is_valid(tmp_path: Path) -> None:
    data = read_coco(write_coco(tmp_path, {**coco_dict(), "annotations": []}))
    assert all(t["boxes"].shape == (0, 4) and t["labels"].shape == (0,) for t in data.targets)
    assert data.class_counts() == [0, 0, 0]


def test_folder_with_several_parts(tmp_path: Path) -> None:
    write_coco(tmp_path)
    write_coco(tmp_path, name="annotations/instances_val2017.json")
    write_coco(tmp_path, name="annotations/instances_train.1@10-hidden.json")
    with pytest.raises(ValueError, match=r"several annotation files .*instances_train.json, .*instances_val2017.json.*split='train'"):
        read_coco(tmp_path)
    assert read_coco(tmp_path, split="val").source.name == "instances_val2017.json"
    with pytest.raises(ValueError, match="no annotation file of split 'test', only"):
        read_coco(tmp_path, split="test")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_coco(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no COCO json"):
        read_coco(tmp_path / "images")


def test_exported_layout_beside_the_images(tmp_path: Path) -> None:
    content = coco_dict()
    for i, image in enumerate(content["images"]):
        write_image(tmp_path / "train" / image["file_name"], (image["height"], image["width"]), i)
    (tmp_path / "train" / "_annotations.coco.json").write_text(json.dumps(content))
    assert len(load_detection_data(tmp_path, split="train")) == 4
    with pytest.raises(ValueError, match="no annotation file of split 'val'"):
        load_detection_data(tmp_path, split="val")


def test_paths_do_not_depend_on_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path / "set")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(read_coco(Path("../set/annotations/instances_train.json"))) == 4


def test_two_formats_are_an_error(tmp_path: Path) -> None:
    write_coco(tmp_path)
    write_yolo(tmp_path)
    with pytest.raises(ValueError, match=r"several formats \(coco: .*instances_train.json; yolo: data.yaml\): choose one by format="):
        load_detection_data(tmp_path)
    assert load_detection_data(tmp_path, format="coco").category_ids == CATEGORY_IDS
    assert load_detection_data(tmp_path, format="yolo").category_ids == (0, 1, 2)
    with pytest.raises(ValueError, match="format must be one of coco, yolo, voc, got 'cvat'"):
        load_detection_data(tmp_path, format="cvat")


def test_no_format_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no labelled data: looked for a COCO json .* data.yaml .* Annotations"):
        load_detection_data(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_detection_data(tmp_path / "nowhere")


def yolo_line(tmp_path: Path, line: str) -> Any:
    write_image(tmp_path / "images" / "x.png", (480, 640))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "x.txt").write_text(line)
    return read_yolo(tmp_path)


def test_yolo_golden_box(tmp_path: Path) -> None:
    data = yolo_line(tmp_path, "0 .5 .5 1 1\n")
    assert data.targets[0]["boxes"].tolist() == [[0, 0, 640, 480]]
    assert data.classes == ("class_0",)


def test_yolo_polygon_becomes_its_box(tmp_path: Path) -> None:
    data = yolo_line(tmp_path, "1 .1 .2 .5 .25 .3 .75")
    torch.testing.assert_close(data.targets[0]["boxes"], torch.tensor([[64.0, 96.0, 320.0, 360.0]]))
    assert data.targets[0]["labels"].tolist() == [1]


def test_yolo_faults_are_counted(tmp_path: Path) -> None:
    data = yolo_line(tmp_path, "0 .5 .5 1\n0 x y z w\nnan .5 .5 1 1\ninf .5 .5 1 1\n0 5 5 1 1\n0 nan .5 1 1\n0 .5 .5 .2 .2\n")
    assert data.warnings.dropped == {
        "label lines that are not `class cx cy w h` or a polygon": 4,
        "boxes outside of their image": 1,
        "boxes with NaN or infinite coordinates": 1,
    }
    assert len(data.targets[0]["boxes"]) == 1


def test_yolo_label_file_that_is_no_text_is_counted(tmp_path: Path) -> None:
    yolo_line(tmp_path, "")
    next((tmp_path / "labels").rglob("*.txt")).write_bytes(b"\xff\xfe\x00\x81")
    assert read_yolo(tmp_path).warnings.dropped == {"label lines that are not `class cx cy w h` or a polygon": 1}


def test_yolo_missing_label_file_is_background(tmp_path: Path) -> None:
    data = read_yolo(write_yolo(tmp_path))
    assert data.warnings.notes["images without a label file, taken as background"] == 1
    assert not data.warnings.dropped


def test_yolo_splits_and_names(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    with pytest.raises(FileNotFoundError, match="no image folder for split 'val'"):
        read_yolo(tmp_path, split="val")
    (tmp_path / "data.yaml").write_text("train: ../images/train\nnames: {0: cat, 1: dog}\n")
    data = read_yolo(tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.warnings.dropped == {"boxes of a class that has no name": 2}
    (tmp_path / "data.yaml").write_text("names: {0: cat, 2: dog}\ntrain: images/train\n")
    with pytest.raises(ValueError, match="without gaps"):
        read_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="must hold a mapping"):
        read_yolo(tmp_path)


def voc_box(tmp_path: Path, values: tuple[Any, ...], extra: str = "", **options: Any) -> Any:
    write_image(tmp_path / "JPEGImages" / "x.jpg", (480, 640))
    (tmp_path / "Annotations").mkdir(exist_ok=True)
    box = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), values, strict=True))
    xml = f"<annotation><object><name>cat</name>{extra}<bndbox>{box}</bndbox></object></annotation>"
    (tmp_path / "Annotations" / "x.xml").write_text(xml)
    return load_detection_data(tmp_path, format="voc", **options)


def test_voc_golden_box(tmp_path: Path) -> None:
    assert voc_box(tmp_path, (1, 1, 640, 480)).targets[0]["boxes"].tolist() == [[0, 0, 640, 480]]
    assert voc_box(tmp_path, (1, 1, 640, 480), voc_zero_based=True).targets[0]["boxes"].tolist() == [[1, 1, 640, 480]]


def test_voc_difficult_objects_are_ignored(tmp_path: Path) -> None:
    data = voc_box(tmp_path, (10, 10, 50, 50), "<difficult>1</difficult>")
    assert len(data.targets[0]["labels"]) == 0
    assert len(data.crowds[0]["labels"]) == 1


def test_voc_faults(tmp_path: Path) -> None:
    assert voc_box(tmp_path, (10, 10, "", 50)).warnings.dropped == {"objects without a name or four box numbers": 1}
    assert voc_box(tmp_path, (1, 1, 9, 9), classes=("dog",)).warnings.dropped == {"objects of classes that are not listed": 1}
    (tmp_path / "Annotations" / "x.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match="cannot be read as xml"):
        load_detection_data(tmp_path)


def test_voc_image_sets(tmp_path: Path) -> None:
    write_voc(tmp_path)
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "trainval.txt").write_text("b\nd\n")
    assert [r.path.name for r in load_detection_data(tmp_path, split="trainval").records] == ["b.png", "d.png"]
    with pytest.raises(FileNotFoundError, match="split must name a list in ImageSets/Main"):
        load_detection_data(tmp_path, split="val")


def test_subset(tmp_path: Path) -> None:
    data = read_coco(write_coco(tmp_path))
    part = data.subset([3, 0])
    assert [r.id for r in part.records] == [0, 3]
    assert [t["image_id"] for t in part.targets] == [0, 3]
    with pytest.raises(ValueError, match=r"image_ids must be ids of .*got unknown \[44\]"):
        data.subset([44])


def test_has_split(bccd: Path, tmp_path: Path) -> None:
    assert has_split(bccd, "val")
    assert not has_split(bccd / "annotations" / "instances_train.json", "val")
    write_coco(tmp_path / "coco")
    assert has_split(tmp_path / "coco", "train")
    assert not has_split(tmp_path / "coco", "val")
    write_yolo(tmp_path / "yolo")
    assert not has_split(tmp_path / "yolo", "val")
    (tmp_path / "yolo" / "images" / "val").mkdir()
    assert has_split(tmp_path / "yolo", "val")
    assert not has_split(write_voc(tmp_path / "voc"), "val")
