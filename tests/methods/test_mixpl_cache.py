"""The ring of unlabelled images."""

from __future__ import annotations

import pytest
import torch
from no_sync import no_sync
from torch import Tensor

from ssod_fast.methods.mixpl import RingCache
from ssod_fast.structures import PaddedTargets, Target


def numbered(first: int, n: int, dtype: torch.dtype = torch.uint8) -> tuple[list[Tensor], PaddedTargets, list[int]]:
    """Images filled with their number, of sizes that differ, with as many boxes as the number modulo 3."""
    images = [torch.full((3, 4 + i % 3, 5 + i % 4), i, dtype=dtype) for i in range(first, first + n)]
    targets = [
        Target(boxes=torch.full((i % 3, 4), float(i)), labels=torch.full((i % 3,), i), scores=torch.full((i % 3,), i / 100))
        for i in range(first, first + n)
    ]
    return images, PaddedTargets.from_list(targets, nmax=3), [i % 3 for i in range(first, first + n)]


def step(cache: RingCache, first: int, n: int, dtype: torch.dtype = torch.uint8) -> tuple[list[int], list[int]]:
    """Numbers of the images read in a step, from the pixels and from the labels (-1 without boxes)."""
    cache.write(*numbered(first, n, dtype))
    images, targets = cache.read()
    read = [int(image.flatten()[0]) for image in images]
    for number, image in zip(read, images, strict=True):
        assert tuple(image.shape) == (3, 4 + number % 3, 5 + number % 4)
        assert (image == number).all()
    assert targets.count.tolist() == [number % 3 for number in read]
    assert cache.confident == max(number % 3 for number in read)
    for number, target in zip(read, targets.to_list(), strict=True):
        assert (target["boxes"] == number).all()
        assert (target["labels"] == number).all()
    cache.commit()
    return read[:n], read[n:]


def test_first_in_first_out_over_many_turns() -> None:
    cache = RingCache(size=8, batch=4, max_boxes=3)
    kept: list[int] = []
    for i in range(13):
        fresh, entries = step(cache, 4 * i, 4)
        assert fresh == list(range(4 * i, 4 * i + 4))
        assert entries == kept
        kept = (kept + fresh)[-8:]
        assert len(cache) == len(kept)
        assert cache.full == (len(kept) == 8)


def test_timing_of_the_first_steps() -> None:
    # With 4 images per step mixing starts at step 2: mixup partners (the oldest 4) come from step 0, mosaic tiles from step 1.
    cache = RingCache(size=8, batch=4, max_boxes=3)
    full = []
    for i in range(3):
        full.append(cache.full)
        _, entries = step(cache, 10 * i, 4)
    assert full == [False, False, True]
    assert entries == [0, 1, 2, 3, 10, 11, 12, 13]


def test_batches_of_other_sizes() -> None:
    cache = RingCache(size=7, batch=3, max_boxes=3)
    kept: list[int] = []
    first = 0
    for n in (3, 1, 2, 3, 3, 1, 1, 2, 3, 3):
        fresh, entries = step(cache, first, n)
        assert entries == kept
        kept, first = (kept + fresh)[-7:], first + n


def test_an_image_is_written_once_and_never_moved() -> None:
    cache = RingCache(size=8, batch=4, max_boxes=3)
    cache.write(*numbered(0, 4))
    written = [image.data_ptr() for image in cache.read()[0]]
    cache.commit()
    cache.write(*numbered(4, 4))
    assert [image.data_ptr() for image in cache.read()[0][4:]] == written


def test_grows_for_larger_images() -> None:
    cache = RingCache(size=5, batch=1, max_boxes=3)
    step(cache, 0, 1)
    cache.write([torch.full((3, 50, 60), 9, dtype=torch.uint8)], PaddedTargets.empty(1, 3), [0])
    images, _ = cache.read()
    assert (images[0] == 9).all()
    assert (images[1] == 0).all()
    assert cache.sizes == [(4, 5)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    cache = RingCache(size=5, batch=1, max_boxes=3)
    cache.write(*numbered(3, 1, dtype))
    assert cache.read()[0][0].dtype == dtype


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_state_restores_exactly(steps: int) -> None:
    cache, other = RingCache(8, 4, 3), RingCache(8, 4, 3)
    for i in range(steps):
        step(cache, 4 * i, 4)
    step(other, 90, 4)
    other.load_state_dict(cache.state_dict())
    assert other.sizes == cache.sizes
    for i in range(steps, steps + 4):
        assert step(cache, 4 * i, 4) == step(other, 4 * i, 4)


def test_state_is_a_copy() -> None:
    cache = RingCache(5, 1, 3)
    step(cache, 1, 1)
    state = cache.state_dict()
    for i in range(2, 9):
        step(cache, i, 1)
    assert int(state["images"][0].flatten()[0]) == 1
    assert state["targets"]["labels"][0, 0] == 1


def test_does_not_wait_for_the_device() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = RingCache(8, 4, 3)
    batches = [numbered(4 * i, 4) for i in range(5)]
    moved = [([image.to(device) for image in images], targets.to(device), confident) for images, targets, confident in batches]
    with no_sync():
        for images, targets, confident in moved:
            cache.write(images, targets, confident)
            cache.read()
            cache.commit()


def test_bad_input() -> None:
    cache = RingCache(8, 4, 3)
    with pytest.raises(RuntimeError, match="must be written before it is read"):
        cache.read()
    with pytest.raises(ValueError, match="images must be 1 to 4 per step, got 5"):
        cache.write(*numbered(0, 5))
    with pytest.raises(ValueError, match=r"targets must have \[2, 3\] rows"):
        cache.write(numbered(0, 2)[0], PaddedTargets.empty(2, 7), [0, 0])
    with pytest.raises(ValueError, match=r"images\[0\] must be \[3, h, w\], got \[1, 4, 4\]"):
        cache.write([torch.zeros(1, 4, 4)], PaddedTargets.empty(1, 3), [0])
    with pytest.raises(ValueError, match="confident must have one number per image, got 0 for 2 images"):
        cache.write(*numbered(0, 2)[:2], [])
    step(cache, 0, 4)
    with pytest.raises(ValueError, match=r"images must be torch.uint8 like those in the cache, got torch.float32"):
        cache.write(*numbered(0, 1, torch.float32))
    with pytest.raises(ValueError, match="size must be at least 1"):
        RingCache(0, 4, 3)
    with pytest.raises(ValueError, match="holds 4 images, this one 2"):
        RingCache(2, 4, 3).load_state_dict(cache.state_dict())
    with pytest.raises(ValueError, match="holds 3 boxes per image, this one 5"):
        RingCache(8, 4, 5).load_state_dict(cache.state_dict())
