"""Views: matrices must carry boxes exactly where the pixels go."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from ssod_fast.data import View, ViewConfig, labeled_view, test_view, weak_strong_views
from ssod_fast.data.geometry import Matrix, flip, map_boxes, resize, rotate_matrix, shear_matrix, translate_matrix, warp
from ssod_fast.data.photometric import COLOUR_OPS, adjust_sharpness
from ssod_fast.data.views import GEOMETRIC_OPS, fitted_size, target_in_view
from ssod_fast.structures import Target

PLAIN = ViewConfig(short_side=(90, 130), max_side=200, colour_ops=("identity",))


def patch_image(size: tuple[int, int], box: tuple[int, int, int, int]) -> Tensor:
    """White rectangle on black."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    x1, y1, x2, y2 = box
    image[:, y1:y2, x1:x2] = 255
    return image


def corners_inside(box: tuple[int, int, int, int], matrix: Matrix, size: tuple[int, int]) -> bool:
    """True if the whole moved rectangle lies inside of the view."""
    x1, y1, x2, y2 = box
    points = matrix @ np.array([[x1, x2, x2, x1], [y1, y1, y2, y2], [1, 1, 1, 1]], float)
    return bool((points[:2] >= 1).all() and (points[0] <= size[1] - 1).all() and (points[1] <= size[0] - 1).all())


def assert_patch_under_box(image: Tensor, box: tuple[int, int, int, int], matrix: Matrix) -> None:
    """The white pixels lie in the mapped box and, where the frame cuts nothing, fill it and have their centroid at the mapped centre."""
    h, w = image.shape[1:]
    mapped, keep = map_boxes(torch.tensor([box], dtype=torch.float32), matrix, (h, w))
    white = image[0].double() / 255
    white = torch.where(white > 0.52, white, 0)  # half of a border pixel is still black
    rows, cols = torch.nonzero(white.sum(1))[:, 0], torch.nonzero(white.sum(0))[:, 0]
    if not keep[0] or not len(rows):  # cut away by the frame
        assert not corners_inside(box, matrix, (h, w))
        assert white.sum() < 4
        return
    found = torch.tensor([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1], dtype=torch.float32)
    assert (found[:2] >= mapped[0, :2] - 1).all(), (found, mapped[0])
    assert (found[2:] <= mapped[0, 2:] + 1).all(), (found, mapped[0])
    if corners_inside(box, matrix, (h, w)):
        # Tight as well, up to the sharp tip of a rotated corner, whose last pixels are less than half covered. A slanted shape that
        # the frame cuts may be smaller than the clipped box around its corners.
        assert (found - mapped[0]).abs().max() <= 2.5, (found, mapped[0])
        x1, y1, x2, y2 = box
        centre = matrix @ [(x1 + x2) / 2, (y1 + y2) / 2, 1]
        ys, xs = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        assert abs(float((xs * white).sum() / white.sum()) - centre[0]) < 0.35
        assert abs(float((ys * white).sum() / white.sum()) - centre[1]) < 0.35


@pytest.mark.parametrize("op", sorted(GEOMETRIC_OPS))
@pytest.mark.parametrize("magnitude", [-1.0, -0.4, 0.3, 1.0])
@pytest.mark.parametrize("size", [(90, 140), (141, 89)])
def test_geometric_ops_move_boxes_with_pixels(op: str, magnitude: float, size: tuple[int, int]) -> None:
    box = (50, 30, 74, 62)
    image = patch_image(size, box)
    matrix = GEOMETRIC_OPS[op](size, ViewConfig(), magnitude)
    moved = warp(image, matrix, fill=0)
    assert moved.shape == image.shape
    assert_patch_under_box(moved, box, matrix)


@pytest.mark.parametrize("target", [(45, 70), (97, 201), (180, 280), (31, 140)])
def test_resize_and_flip_move_boxes_with_pixels(target: tuple[int, int]) -> None:
    box = (24, 36, 88, 60)
    image, matrix = resize(patch_image((90, 140), box), target)
    assert_patch_under_box(image, box, matrix)
    mirrored, mirror = flip(image)
    assert_patch_under_box(mirrored, box, mirror @ matrix)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), h=st.integers(60, 180), w=st.integers(60, 180))
def test_whole_views_move_boxes_with_pixels(seed: int, h: int, w: int) -> None:
    rng = np.random.default_rng(seed)
    x1, y1 = int(rng.integers(0, w - 24)), int(rng.integers(0, h - 24))
    box = (x1, y1, int(rng.integers(x1 + 20, w + 1)), int(rng.integers(y1 + 20, h + 1)))
    config = ViewConfig(short_side=(50, 150), max_side=220, colour_ops=("identity",), fill=0)
    for view in weak_strong_views(patch_image((h, w), box), config, rng):
        assert_patch_under_box(view.image, box, view.matrix)


@pytest.mark.parametrize("op", sorted(GEOMETRIC_OPS))
def test_inverse_matrix_leads_back(op: str) -> None:
    matrix = GEOMETRIC_OPS[op]((90, 140), ViewConfig(), 0.7)
    boxes = torch.tensor([[50.0, 30, 74, 62]])
    there, _ = map_boxes(boxes, matrix, (90, 140))
    back, _ = map_boxes(there, np.linalg.inv(matrix), (90, 140))
    # Box around box: it can only grow.
    assert (back[:, :2] <= boxes[:, :2] + 1e-4).all()
    assert (back[:, 2:] >= boxes[:, 2:] - 1e-4).all()


def test_literal_matrices() -> None:
    assert shear_matrix(degrees_x=45).round(9).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert shear_matrix(degrees_y=45).round(9).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert translate_matrix(3, -2).tolist() == [[1, 0, 3], [0, 1, -2], [0, 0, 1]]
    turned = rotate_matrix((40, 60), 90)  # clockwise: the right edge's middle goes to the bottom
    np.testing.assert_allclose(turned @ [60, 20, 1], [30, 50, 1], atol=1e-9)
    np.testing.assert_allclose(turned @ [30, 20, 1], [30, 20, 1], atol=1e-9)


def test_literal_projections() -> None:
    box = torch.tensor([[100.0, 40, 300, 200]])
    mirror = np.array([[-0.5, 0, 320], [0, 0.5, 0], [0, 0, 1]])
    mapped, keep = map_boxes(box, mirror, (240, 320))
    assert mapped.tolist() == [[170, 20, 270, 100]]
    assert keep.tolist() == [True]
    c, s = math.cos(math.radians(30)), math.sin(math.radians(30))
    mapped, _ = map_boxes(torch.tensor([[100.0, 0, 200, 100]]), np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]), (400, 400))
    torch.testing.assert_close(mapped, torch.tensor([[36.60254, 50, 173.20508, 186.60254]]))


def test_projection_divides_by_w_and_drops_what_left() -> None:
    perspective = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 2]])
    mapped, _ = map_boxes(torch.tensor([[10.0, 20, 30, 40]]), perspective, (100, 100))
    assert mapped.tolist() == [[5, 10, 15, 20]]
    mapped, keep = map_boxes(torch.tensor([[10.0, 20, 30, 40], [0, 0, 5, 5]]), translate_matrix(-29.995, 0), (100, 100))
    assert keep.tolist() == [False, False]
    assert map_boxes(torch.zeros(0, 4), perspective, (10, 10))[0].shape == (0, 4)


def test_identity_warp_is_exact_and_whole_shifts_move_pixels() -> None:
    image = torch.randint(0, 256, (3, 37, 53), dtype=torch.uint8)
    assert torch.equal(warp(image, np.eye(3), 128), image)
    moved = warp(image, translate_matrix(5, -3), 77)
    assert torch.equal(moved[:, :-3, 5:], image[:, 3:, :-5])
    assert (moved[:, -3:] == 77).all()
    assert (moved[:, :, :5] == 77).all()


def test_rotation_by_a_quarter_of_a_square_is_a_permutation() -> None:
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    assert torch.equal(warp(image, rotate_matrix((40, 40), 90), 0), torch.rot90(image, -1, (1, 2)))


@pytest.mark.parametrize("name", sorted(COLOUR_OPS))
def test_colour_ops_keep_shape_and_input(name: str) -> None:
    image = torch.randint(0, 256, (3, 23, 31), dtype=torch.uint8)
    before = image.clone()
    for seed in range(5):
        result = COLOUR_OPS[name](image, np.random.default_rng(seed))
        assert result.dtype == torch.uint8
        assert result.shape == image.shape
    assert torch.equal(image, before)


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 1.9])
@pytest.mark.parametrize("size", [(23, 31), (3, 3), (2, 9), (1, 1)])
def test_sharpness_is_torchvisions(factor: float, size: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    assert torch.equal(adjust_sharpness(image, factor), tvf.adjust_sharpness(image, factor))


def test_fitted_sizes() -> None:
    assert fitted_size((480, 640), 800, 1333) == (800, 1067)
    assert fitted_size((480, 640), 1200, 1333) == (1000, 1333)
    assert fitted_size((640, 480), 240, 1333) == (320, 240)
    assert fitted_size((1, 3000), 400, 1333) == (1, 1333)


def test_test_view_is_deterministic() -> None:
    image = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    view = test_view(image, PLAIN.scaled(0.1))
    assert view.size == fitted_size((48, 64), PLAIN.scaled(0.1).test_short_side, PLAIN.scaled(0.1).max_side)
    np.testing.assert_allclose(view.matrix, np.diag([view.size[1] / 64, view.size[0] / 48, 1]))
    same = test_view(image, ViewConfig(test_short_side=48))
    assert torch.equal(same.image, image)
    assert same.image.data_ptr() != image.data_ptr()


def test_views_are_reproducible_and_differ_between_seeds() -> None:
    image = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    config = ViewConfig().scaled(0.1)
    first = weak_strong_views(image, config, np.random.default_rng(1))
    again = weak_strong_views(image, config, np.random.default_rng(1))
    other = weak_strong_views(image, config, np.random.default_rng(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.image, b.image)
        assert np.array_equal(a.matrix, b.matrix)
    assert any(a.matrix.tolist() != b.matrix.tolist() for a, b in zip(first, other, strict=True))
    assert all(v.image.dtype == torch.uint8 and v.image.is_contiguous() and v.matrix.dtype == np.float64 for v in first)


def test_the_global_generators_are_not_touched() -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    image = torch.zeros(3, 40, 50, dtype=torch.uint8)
    for seed in range(20):
        weak_strong_views(image, ViewConfig().scaled(0.1), np.random.default_rng(seed))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_short_sides_cover_the_range() -> None:
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    config = ViewConfig(short_side=(20, 23), max_side=1333, geometric_ops=(), colour_ops=())
    sides = {weak_strong_views(image, config, np.random.default_rng(s))[0].size[0] for s in range(60)}
    assert sides == {20, 21, 22, 23}


def test_labeled_view_moves_the_target() -> None:
    target = Target(boxes=torch.tensor([[10.0, 5, 30, 25]]), labels=torch.tensor([2]), image_id=9, orig_size=(50, 60))
    config = ViewConfig(short_side=(100, 100), flip=1.0)
    view, moved = labeled_view(torch.zeros(3, 50, 60, dtype=torch.uint8), target, config, np.random.default_rng(0))
    assert view.size == (100, 120)
    torch.testing.assert_close(moved["boxes"], torch.tensor([[60.0, 10, 100, 50]]))
    assert (moved["labels"].tolist(), moved["image_id"], moved["orig_size"]) == ([2], 9, (50, 60))
    assert target["boxes"].tolist() == [[10, 5, 30, 25]]


def test_target_without_boxes_and_with_extras() -> None:
    view = View(torch.zeros(3, 10, 10, dtype=torch.uint8), translate_matrix(8, 0))
    empty = target_in_view(Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)), view)
    assert empty["boxes"].shape == (0, 4)
    both = Target(boxes=torch.tensor([[0.0, 0, 5, 5], [5, 5, 9, 9]]), labels=torch.tensor([0, 1]), weights=torch.tensor([0.5, 0.25]))
    moved = target_in_view(both, view)
    assert moved["boxes"].tolist() == [[8, 0, 10, 5]]
    assert moved["weights"].tolist() == [0.5]


def erased_parts(seed: int, size: tuple[int, int] = (200, 300), **changes: Any) -> tuple[View, View, list[tuple[int, ...]]]:
    """Views of a black picture, and bounding boxes (x1, y1, x2, y2) of the connected grey patches of the strong one."""
    config = ViewConfig(short_side=(size[0], size[0]), colour_ops=(), geometric_ops=(), flip=0.0, erase_patches=(1, 5), **changes)
    weak, strong = weak_strong_views(torch.zeros(3, *size, dtype=torch.uint8), config, np.random.default_rng(seed))
    assert set(strong.image.unique().tolist()) <= {0, config.erase_fill}
    assert (strong.image == strong.image[:1]).all()
    labels, count = ndimage.label(strong.image[0].numpy())
    boxes = [tuple(int(v) for v in (s[1].start, s[0].start, s[1].stop, s[0].stop)) for s in ndimage.find_objects(labels)[:count]]
    return weak, strong, boxes


def test_erased_patches_of_the_strong_view() -> None:
    counts, sides = set(), []
    for seed in range(60):
        weak, strong, boxes = erased_parts(seed, erase_ratio=(0.05, 0.2))
        assert not weak.image.any()
        assert strong.size == (200, 300)
        counts.add(len(boxes))
        if len(boxes) == 1:  # alone, or several that touch
            x1, y1, x2, y2 = boxes[0]
            sides.append((x2 - x1, y2 - y1))
    assert counts == {1, 2, 3, 4}  # the upper end is excluded
    single = [(w, h) for w, h in sides if w <= 60 and h <= 40]
    assert len(single) >= 8
    assert all(w >= 15 and h >= 10 and abs(w / 300 - h / 200) < 0.006 for w, h in single)  # one share for both sides


def test_erasing_is_the_last_step_and_changes_no_draw_before_it() -> None:
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    plain = ViewConfig(short_side=(50, 70), colour_ops=("identity", "equalize"))
    for seed in range(5):
        weak, strong = weak_strong_views(image, plain, np.random.default_rng(seed))
        erasing = dataclasses.replace(plain, erase_patches=(4, 5), erase_ratio=(0.1, 0.2), erase_fill=7)
        same_weak, erased = weak_strong_views(image, erasing, np.random.default_rng(seed))
        assert torch.equal(weak.image, same_weak.image)
        assert np.array_equal(strong.matrix, erased.matrix)
        changed = (strong.image != erased.image).any(0)
        assert 0 < changed.float().mean() < 4 * 0.2**2
        assert (erased.image[:, changed] == 7).all()


def test_nothing_is_erased_unless_asked_for() -> None:
    assert ViewConfig().erase_patches is None
    _, strong, boxes = erased_parts(0, erase_ratio=(0.0, 0.0))  # patches of no size
    assert boxes == []
    assert not strong.image.any()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"short_side": (0, 5)}, r"short_side must be \(low, high\) with 1 <= low <= high, got \(0, 5\)"),
        ({"short_side": (9, 5)}, "short_side must be"),
        ({"max_side": 0}, "max_side and test_short_side must be >= 1, got 0 and 800"),
        ({"flip": 1.5}, "flip must be a probability, got 1.5"),
        ({"fill": 256}, r"^fill must lie in \[0, 255\], got 256"),
        ({"erase_fill": -1}, r"erase_fill must lie in \[0, 255\], got -1"),
        ({"erase_patches": (0, 5)}, r"erase_patches must satisfy 1 <= low < high, got \(0, 5\)"),
        ({"erase_patches": (3, 3)}, r"erase_patches must satisfy 1 <= low < high, got \(3, 3\)"),
        ({"erase_ratio": (0.0, 1.0)}, r"erase_ratio must stay below 1, got \(0.0, 1.0\)"),
        ({"shear_degrees": 90.0}, r"shear_degrees in \[0, 90\)"),
        ({"colour_ops": ("sepia",)}, "colour_ops must be among identity, autocontrast, .* got 'sepia'"),
        ({"geometric_ops": ("twist",)}, "geometric_ops must be among rotate, .* got 'twist'"),
    ],
)
def test_bad_configs(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewConfig(**kwargs)


def test_scaled_config() -> None:
    small = ViewConfig().scaled(0.25)
    assert (small.short_side, small.max_side, small.test_short_side) == ((100, 300), 333, 200)
