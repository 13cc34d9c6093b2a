"""Decoding, EXIF orientation, unlabelled sources, the shared cache."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_data import coco_dict, write_coco, write_image

from ssod_fast.data import UnreadableImageError, list_images, read_image
from ssod_fast.data.cache import ImageCache
from ssod_fast.data.image_io import image_size


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif", "X.TIFF", "x.webp"])
def test_lossless_formats(tmp_path: Path, name: str) -> None:
    options = {"lossless": True} if name.endswith("webp") else {}
    path = write_image(tmp_path / name, (20, 31), 3, **options)
    image = read_image(path)
    expected = np.random.default_rng(3).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.fromarray(np.full((8, 9, 3), 200, np.uint8)).convert(mode, palette=Image.Palette.ADAPTIVE).save(path)
    image = read_image(path)
    assert image.shape == (3, 8, 9)
    if mode != "1":
        assert (image.int() - 200).abs().max() <= 4


def test_sixteen_bits_keep_the_high_byte(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 5), 0x8040, np.uint16)).save(tmp_path / "x.png")
    assert torch.equal(read_image(tmp_path / "x.png"), torch.full((3, 4, 5), 0x80, dtype=torch.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_exif_orientation_is_applied_once(tmp_path: Path, orientation: int, suffix: str) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = 255  # the upper left quarter is white
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif)
    size = (32, 16) if orientation >= 5 else (16, 32)
    white = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    image = read_image(path)
    assert tuple(image.shape[1:]) == size == image_size(path)
    h, w = size
    quarters = [(r, c) for r in (0, 1) for c in (0, 1) if image[0, h // 4 + r * h // 2, w // 4 + c * w // 2] > 128]
    assert quarters == [white]


def test_annotated_size_decides_about_the_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write_image(tmp_path / "x.jpg", (16, 32), exif=exif)
    assert read_image(path).shape == (3, 32, 16)
    assert read_image(path, expected=(16, 32)).shape == (3, 16, 32)
    with pytest.raises(UnreadableImageError, match="the file is 16x32 pixels, its annotation says 5x4"):
        read_image(path, expected=(4, 5))


def test_a_size_that_is_merely_swapped_is_an_error(tmp_path: Path) -> None:
    path = write_image(tmp_path / "x.png", (16, 32))
    with pytest.raises(UnreadableImageError, match=r"the file is 32x16 pixels, its annotation says 16x32 \(width and height are swapped\)"):
        read_image(path, expected=(32, 16))


def test_unreadable_files(tmp_path: Path) -> None:
    whole = write_image(tmp_path / "whole.jpg", (64, 64)).read_bytes()
    for name, content in {"cut.jpg": whole[: len(whole) // 2], "empty.jpg": b"", "text.png": b"hello", "text.bmp": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableImageError, match=rf"{name}: cannot be decoded"):
            read_image(tmp_path / name)
    with pytest.raises(UnreadableImageError, match=r"missing\.jpg"):
        read_image(tmp_path / "missing.jpg")
    with pytest.raises(UnreadableImageError, match=r"text.png: cannot be read"):
        image_size(tmp_path / "text.png")


def test_folder_is_listed_recursively_and_sorted(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "a/1.png", "c.jpeg"):
        write_image(tmp_path / name, (8, 8))
    (tmp_path / "notes.txt").write_text("no image")
    records = list_images(tmp_path)
    assert [str(r.path.relative_to(tmp_path)) for r in records] == ["a/1.png", "b/2.JPG", "c.jpeg"]
    assert [r.id for r in records] == [0, 1, 2]
    assert [r.path.name for r in list_images(str(tmp_path / "*" / "*.png"))] == ["1.png"]
    assert [r.path.name for r in list_images(tmp_path / "c.jpeg")] == ["c.jpeg"]


def test_txt_list_is_relative_to_its_folder(tmp_path: Path) -> None:
    write_image(tmp_path / "pictures" / "a.png", (8, 8))
    (tmp_path / "list.txt").write_text("# mine\npictures/a.png\n\n")
    assert [r.path for r in list_images(tmp_path / "list.txt")] == [tmp_path / "pictures" / "a.png"]
    (tmp_path / "list.txt").write_text("pictures/a.png\npictures/b.png\n")
    with pytest.raises(FileNotFoundError, match=r"lists 1 files that do not exist, such as .*b.png"):
        list_images(tmp_path / "list.txt")


def test_json_needs_neither_annotations_nor_categories(tmp_path: Path) -> None:
    file = write_coco(tmp_path, {"images": coco_dict()["images"]})
    records = list_images(file)
    assert [(r.id, r.size) for r in records] == [(0, (48, 64)), (1, (80, 40)), (2, (32, 32)), (3, (40, 80))]
    write_coco(tmp_path, {**coco_dict(), "annotations": "not even a list"})
    assert list_images(file) == records


def test_sources_without_an_image(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no image: expected files ending in .jpg, .jpeg, .png"):
        list_images(tmp_path / "empty")
    with pytest.raises(ValueError, match="holds no image"):
        list_images(str(tmp_path / "*.jpg"))
    with pytest.raises(FileNotFoundError, match="does not exist: expected a folder of images, a txt list, a glob pattern"):
        list_images(tmp_path / "nowhere")
    file = write_coco(tmp_path, {"images": coco_dict()["images"]})
    for image in (tmp_path / "images").iterdir():
        image.unlink()
    with pytest.raises(FileNotFoundError, match="none of its 4 images exists"):
        list_images(file)


def test_cache_returns_what_was_put_until_it_is_full() -> None:
    cache = ImageCache(keys=4, limit_mb=1)
    first = torch.randint(0, 256, (3, 301, 407), dtype=torch.uint8)
    assert cache.get(0) is None
    for key in range(4):  # 3 * 301 * 407 bytes: two fit into a MiB
        cache.put(key, first + key)
    for key in range(2):
        stored = cache.get(key)
        assert stored is not None
        assert torch.equal(stored, first + key)
    assert cache.get(2) is None
    assert cache.get(3) is None
    assert cache.used_mb == pytest.approx(2 * first.numel() / 2**20)
    small = torch.zeros(3, 5, 7, dtype=torch.uint8)
    cache.put(3, small)
    assert torch.equal(cache.get(3), small)


def test_cache_switched_off_and_pickled() -> None:
    off = ImageCache(keys=2, limit_mb=0)
    off.put(0, torch.zeros(3, 2, 2, dtype=torch.uint8))
    assert off.get(0) is None
    assert off.used_mb == 0
    cache = ImageCache(keys=2, limit_mb=1)
    cache.put(0, torch.zeros(3, 2, 2, dtype=torch.uint8))
    assert pickle.loads(pickle.dumps(cache)).get(0) is None
    with pytest.raises(ValueError, match="limit_mb must be >= 0, got -1"):
        ImageCache(1, -1)
