"""Loaders: batches as a pure function of (seed, rank, iteration), bad images, grouping, evaluation."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_data import write_image

from ssod_fast.data import (
    DetectionData,
    EvalLoader,
    ImageRecord,
    LabeledBatch,
    LoaderConfig,
    TrainLoader,
    UnlabeledBatch,
    UnreadableImageError,
    ViewConfig,
    read_coco,
    write_scenes,
)
from ssod_fast.data.sampling import Sampler, SamplingConfig
from ssod_fast.data.streams import GROUP_BLOCK, GroupOrder, Stream, bernoulli_counts, expected_labeled

VIEWS = ViewConfig(short_side=(24, 40), max_side=64, test_short_side=32)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> DetectionData:
    return read_coco(write_scenes(tmp_path_factory.mktemp("scenes"), n_train=20, n_val=0, size=(48, 64), suffix="jpg").train)


def config(**kwargs: Any) -> LoaderConfig:
    return LoaderConfig(**{"labeled_per_batch": 2, "unlabeled_per_batch": 3, "views": VIEWS, "workers": 0, "seed": 7, **kwargs})


def fingerprint(batch: tuple[LabeledBatch, UnlabeledBatch | None]) -> list[Any]:
    """Everything in a batch, comparable by ==."""
    labeled, unlabeled = batch
    parts: list[Any] = [[(i.shape, i.numpy().tobytes()) for i in labeled.images]]
    parts.append([(t["image_id"], t["boxes"].tolist(), t["labels"].tolist()) for t in labeled.targets])
    if unlabeled is not None:
        parts.append([(i.shape, i.numpy().tobytes()) for i in unlabeled.weak + unlabeled.strong])
        parts.append([unlabeled.weak_matrix.tolist(), unlabeled.strong_matrix.tolist(), unlabeled.original_hw, unlabeled.image_ids])
    return parts


def take(loader: TrainLoader, n: int) -> list[list[Any]]:
    return [fingerprint(batch) for batch in itertools.islice(loader, n)]


def test_shapes_and_types(scenes: DetectionData) -> None:
    labeled, unlabeled = TrainLoader(scenes, scenes.records, config()).batch(0)
    assert unlabeled is not None
    assert (len(labeled), len(unlabeled)) == (2, 3)
    for image in labeled.images + unlabeled.weak + unlabeled.strong:
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3
        assert image.is_contiguous()
        assert 24 <= min(image.shape[1:]) <= 40
    for image, target in zip(labeled.images, labeled.targets, strict=True):
        assert target["boxes"].dtype == torch.float32
        assert target["labels"].dtype == torch.int64
        limit = torch.tensor([image.shape[2], image.shape[1]] * 2)
        assert ((target["boxes"] >= 0) & (target["boxes"] <= limit)).all()
    assert unlabeled.weak_matrix.shape == (3, 3, 3)
    assert unlabeled.weak_matrix.dtype == torch.float64
    assert unlabeled.original_hw == [(48, 64)] * 3
    for matrix, image in zip(unlabeled.weak_matrix, unlabeled.weak, strict=True):
        assert abs(matrix[0, 0]) == pytest.approx(image.shape[2] / 64)


def test_the_unlabelled_batch_has_no_place_for_truth() -> None:
    names = {f.name for f in dataclasses.fields(UnlabeledBatch)}
    assert names == {"weak", "strong", "weak_matrix", "strong_matrix", "original_hw", "image_ids"}


def test_batches_do_not_depend_on_the_number_of_workers(scenes: DetectionData) -> None:
    reference = take(TrainLoader(scenes, scenes.records, config()), 6)
    for workers, cache in ((0, 16), (1, 0), (2, 16)):
        assert take(TrainLoader(scenes, scenes.records, config(workers=workers, cache_mb=cache)), 6) == reference


def test_resume_needs_only_the_iteration(scenes: DetectionData) -> None:
    whole = take(TrainLoader(scenes, scenes.records, config()), 8)
    resumed = take(TrainLoader(scenes, scenes.records, config(workers=1), start_iteration=5), 3)
    assert resumed == whole[5:]
    assert fingerprint(TrainLoader(scenes, scenes.records, config()).batch(6)) == whole[6]


def test_spawned_workers_would_make_the_same_batches(scenes: DetectionData) -> None:
    loader = TrainLoader(scenes, scenes.records, config(cache_mb=4))
    expected = fingerprint(loader.batch(3))
    copy = pickle.loads(pickle.dumps(loader))  # how a spawned worker gets it: without the shared cache
    assert fingerprint(copy.batch(3)) == expected


def test_workers_survive_ctrl_c(scenes: DetectionData) -> None:
    batches = iter(TrainLoader(scenes, None, config(workers=1, prefetch=1)))
    next(batches)
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGINT)
    time.sleep(0.2)
    for _ in range(4):
        next(batches)


def test_seeds_and_ranks_differ(scenes: DetectionData) -> None:
    base = take(TrainLoader(scenes, scenes.records, config(world_size=2)), 2)
    assert take(TrainLoader(scenes, scenes.records, config(world_size=2, seed=8)), 2) != base
    assert take(TrainLoader(scenes, scenes.records, config(world_size=2, rank=1)), 2) != base


def test_the_global_generators_are_not_touched(scenes: DetectionData) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for workers in (0, 1):
        take(TrainLoader(scenes, scenes.records, config(workers=workers)), 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_an_epoch_over_all_ranks_sees_every_image_once(scenes: DetectionData) -> None:
    seen: Counter[int] = Counter()
    for rank in range(2):
        sampler = Sampler(scenes, scenes.records, config(world_size=2, rank=rank))
        seen.update(slot.stream.at(slot.position) for i in range(5) for slot in sampler.slots(i)[0])
    assert seen == Counter(range(20))  # 5 iterations x 2 ranks x 2 images
    sampler = Sampler(scenes, scenes.records, config())
    assert sampler.epochs(10) == (1.0, 1.5)


def test_supervised_only(scenes: DetectionData) -> None:
    labeled, unlabeled = TrainLoader(scenes, None, config()).batch(0)
    assert unlabeled is None
    assert len(labeled) == 2
    assert TrainLoader(scenes, scenes.records, config(unlabeled_per_batch=0)).batch(0)[1] is None


def test_labelled_images_repeat_when_a_batch_needs_more_than_there_are(scenes: DetectionData, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loader = TrainLoader(scenes.subset([1, 2]), None, config(labeled_per_batch=5))
        labeled, _ = loader.batch(0)
    assert Counter(t["image_id"] for t in labeled.targets).keys() == {1, 2}
    assert [r.message for r in caplog.records] == ["a batch takes 5 labelled images, only 2 exist: images repeat within a batch"]


def test_bernoulli_counts() -> None:
    drawn = [bernoulli_counts(0, 0, i, 1, 4) for i in range(4000)]
    assert all(a + b == 5 and a >= 1 and b >= 1 for a, b in drawn)
    assert np.mean([a for a, _ in drawn]) == pytest.approx(1.327, abs=0.03)
    assert expected_labeled(1, 4) == pytest.approx(1.32736)
    assert expected_labeled(4, 4) == 4


def test_passes_of_drawn_batches(scenes: DetectionData) -> None:
    drawn = config(labeled_per_batch=1, unlabeled_per_batch=4, sampling="bernoulli", world_size=2)
    assert Sampler(scenes, scenes.records, drawn).epochs(10) == pytest.approx((1.32736, 3.67264))


def test_bernoulli_batches(scenes: DetectionData) -> None:
    loader = TrainLoader(scenes, scenes.records, config(labeled_per_batch=1, unlabeled_per_batch=4, sampling="bernoulli"))
    sizes = []
    for labeled, unlabeled in itertools.islice(loader, 12):
        assert unlabeled is not None
        sizes.append((len(labeled), len(unlabeled)))
    assert len(set(sizes)) > 1
    assert all(sum(size) == 5 for size in sizes)


def mixed_records(tmp_path: Path) -> list[ImageRecord]:
    """6 wide and 3 tall images."""
    sizes = [(32, 48)] * 6 + [(48, 32)] * 3
    return [ImageRecord(i, write_image(tmp_path / f"{i}.png", size, i), size) for i, size in enumerate(sizes)]


def as_labeled(scenes: DetectionData, records: list[ImageRecord]) -> DetectionData:
    n = len(records)
    return dataclasses.replace(scenes, records=records, targets=scenes.targets[:n], crowds=scenes.crowds[:n], areas=scenes.areas[:n])


def test_aspect_groups_fill_whole_batches(scenes: DetectionData, tmp_path: Path) -> None:
    records = mixed_records(tmp_path)
    sampler = Sampler(as_labeled(scenes, records), records, config(aspect_groups=True))
    groups = []
    for i in range(GROUP_BLOCK):
        labeled, unlabeled = sampler.slots(i)
        rows = [slot.stream.at(slot.position) for slot in labeled + unlabeled]
        assert len({row < 6 for row in rows}) == 1
        groups.append(rows[0] < 6)
    assert sum(groups) == int(GROUP_BLOCK * 6 / 9)
    assert len(set(itertools.pairwise(groups))) == 4  # shuffled, no fixed pattern


def test_group_order_counts_without_history() -> None:
    order = GroupOrder(seed=3, share=0.37)
    counts = [0, 0]
    for i in range(3 * GROUP_BLOCK):
        group, before = order.at(i)
        assert before == counts[group]
        counts[group] += 1
    assert GroupOrder(0, 1.0).at(17) == (1, 17)
    assert GroupOrder(0, 0.0).at(17) == (0, 17)


def test_an_empty_group_is_merged(scenes: DetectionData, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = mixed_records(tmp_path)
    with caplog.at_level(logging.INFO):
        sampler = Sampler(as_labeled(scenes, records[:6]), records, config(aspect_groups=True))
    assert [r.message for r in caplog.records] == ["an aspect-ratio group holds no labelled or no unlabelled image: the groups are merged"]
    rows = {slot.stream.at(slot.position) for i in range(3) for slot in sampler.slots(i)[1]}
    assert rows == set(range(9))


def test_resampled_images_come_as_often_as_their_factor(scenes: DetectionData, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        sampler = Sampler(scenes, None, config(resample_t=1.0))
    assert sampler.factors is not None
    assert "resampling repeats" in caplog.text
    stream = sampler.labeled[0]
    assert Counter(stream.at(p) for p in range(len(stream))) == Counter(dict(enumerate(sampler.factors.times.tolist())))


def break_files(tmp_path: Path, scenes: DetectionData, broken: set[int]) -> DetectionData:
    """A copy of the set in which the files of some rows hold no image."""
    records = []
    for row, record in enumerate(scenes.records):
        path = tmp_path / record.path.name
        path.write_bytes(b"broken" if row in broken else record.path.read_bytes())
        records.append(dataclasses.replace(record, path=path))
    return dataclasses.replace(scenes, records=records)


def test_unreadable_images_are_replaced_deterministically_and_counted(
    scenes: DetectionData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = break_files(tmp_path, scenes, {0, 3, 11})
    loader = TrainLoader(data, data.records, config())
    with caplog.at_level(logging.WARNING):
        reference = take(loader, 14)
    ids = {row[0] for batch in reference for row in batch[1]} | {i for batch in reference for i in batch[3][3]}
    assert ids.isdisjoint({data.records[r].id for r in (0, 3, 11)})
    assert loader.report.dropped == {"unreadable images, replaced or skipped": 3}
    assert len([r for r in caplog.records if "skipped an image" in r.message]) == 3  # once per file
    assert take(TrainLoader(data, data.records, config(workers=2)), 14) == reference
    untouched = take(TrainLoader(scenes, scenes.records, config()), 14)
    assert sum(a == b for a, b in zip(reference, untouched, strict=True)) >= 2  # batches without a broken image stay as they were


@pytest.mark.parametrize("workers", [0, 1])
def test_all_unreadable_is_an_error_that_names_five(scenes: DetectionData, tmp_path: Path, workers: int) -> None:
    data = break_files(tmp_path, scenes, set(range(20)))
    with pytest.raises(UnreadableImageError, match=r"none of the 20 unlabelled images can be read, such as (\S+jpg,? ?){5}"):
        next(iter(TrainLoader(scenes, data.records, config(workers=workers))))
    with pytest.raises(
        UnreadableImageError, match=r"none of the 20 labelled images can be read, .*; the fault of the first: \S+jpg: cannot be decoded"
    ):
        next(iter(TrainLoader(data, scenes.records, config(workers=workers))))


def test_one_readable_image_is_found_among_many(scenes: DetectionData, tmp_path: Path) -> None:
    data = break_files(tmp_path, scenes, set(range(19)))
    labeled, _ = TrainLoader(data, None, config()).batch(0)
    assert {t["image_id"] for t in labeled.targets} == {scenes.records[19].id}


def test_images_without_boxes_are_valid(scenes: DetectionData) -> None:
    empty = dataclasses.replace(
        scenes, targets=[{**t, "boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()} for t in scenes.targets]
    )
    labeled, _ = TrainLoader(empty, None, config()).batch(0)
    assert all(t["boxes"].shape == (0, 4) and t["labels"].shape == (0,) for t in labeled.targets)


def test_batches_pickle_and_move(scenes: DetectionData) -> None:
    labeled, unlabeled = pickle.loads(pickle.dumps(TrainLoader(scenes, scenes.records, config()).batch(0)))
    moved = labeled.to("cpu")
    assert torch.equal(moved.images[0], labeled.images[0])
    assert moved.targets[0]["boxes"].tolist() == labeled.targets[0]["boxes"].tolist()
    assert unlabeled.to("cpu").image_ids == unlabeled.image_ids


@pytest.mark.gpu
def test_batches_reach_the_gpu_pinned(scenes: DetectionData) -> None:
    labeled, unlabeled = next(iter(TrainLoader(scenes, scenes.records, config(workers=1, pin_memory=True))))
    assert unlabeled is not None
    assert all(image.is_pinned() for image in labeled.images + unlabeled.weak + unlabeled.strong)
    moved = labeled.to("cuda")
    assert moved.images[0].device.type == moved.targets[0]["boxes"].device.type == "cuda"
    assert torch.equal(moved.images[0].cpu(), labeled.images[0])
    assert unlabeled.to("cuda").weak[0].device.type == "cuda"


def test_streams_offer_every_row_as_replacement(scenes: DetectionData) -> None:
    sampler = Sampler(scenes, None, config())
    for i in range(5):
        for slot in sampler.slots(i)[0]:
            rows = list(slot.rows())
            assert rows[0] == slot.stream.at(slot.position)
            assert sorted(rows) == list(range(20))


def test_epochs_of_a_stream_are_different_permutations() -> None:
    stream = Stream("labeled", 0, np.arange(50))
    first, second = ([stream.at(e * 50 + p) for p in range(50)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"labeled_per_batch": 0}, "labeled_per_batch must be >= 1, got 0"),
        ({"unlabeled_per_batch": -1}, "unlabeled_per_batch must be >= 0, got -1"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"rank": 2, "world_size": 2}, r"rank must lie in \[0, world_size\), got 2 of 2"),
        ({"sampling": "poisson"}, 'sampling must be "fixed" or "bernoulli", got \'poisson\''),
        ({"workers": -1}, "workers must be >= 0, prefetch >= 1 and cache_mb >= 0, got -1, 4 and 0"),
    ],
)
def test_bad_configs(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoaderConfig(**kwargs)


def test_bad_sets(scenes: DetectionData) -> None:
    with pytest.raises(ValueError, match="labeled must hold at least one image"):
        TrainLoader(scenes.subset([]), None, config())
    with pytest.raises(ValueError, match="unlabeled must hold at least one image; pass None"):
        TrainLoader(scenes, [], config())
    with pytest.raises(ValueError, match='sampling="bernoulli" needs unlabelled images'):
        Sampler(scenes, None, SamplingConfig(sampling="bernoulli"))
    with pytest.raises(ValueError, match="start_iteration must be >= 0, got -3"):
        TrainLoader(scenes, None, config(), start_iteration=-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once_in_order(scenes: DetectionData, workers: int) -> None:
    loader = EvalLoader(scenes, VIEWS, batch_size=8, workers=workers)
    batches = list(loader)
    assert [len(b) for b in batches] == [8, 8, 4]
    assert len(loader) == 3
    assert [i for b in batches for i in b.image_ids] == [r.id for r in scenes.records]
    assert batches[0].images[0].shape == (3, 32, 43)
    np.testing.assert_allclose(batches[0].matrix[0].numpy(), np.diag([43 / 64, 32 / 48, 1]))
    assert batches[0].original_hw[0] == (48, 64)
    assert [i for b in loader for i in b.image_ids] == [r.id for r in scenes.records]  # again


def test_evaluation_over_ranks_has_no_duplicates(scenes: DetectionData) -> None:
    ids = [i for rank in range(3) for b in EvalLoader(scenes.records, VIEWS, batch_size=4, rank=rank, world_size=3) for i in b.image_ids]
    assert sorted(ids) == [r.id for r in scenes.records]


def test_evaluation_skips_and_reports_unreadable_images(scenes: DetectionData, tmp_path: Path) -> None:
    data = break_files(tmp_path, scenes, {2, 5})
    loader = EvalLoader(data, VIEWS, batch_size=1)
    assert sum(len(b) for b in loader) == 18
    assert sum(len(b) for b in loader) == 18
    assert loader.report.dropped == {"unreadable images, replaced or skipped": 2}
    with pytest.raises(UnreadableImageError, match="none of the 2 images can be read, such as"):
        list(EvalLoader([data.records[2], data.records[5]], VIEWS))
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        EvalLoader(data, VIEWS, batch_size=0)


def test_bccd_batches(bccd: Path) -> None:
    data = read_coco(bccd, split="train")
    loader = TrainLoader(data, data.records, LoaderConfig(views=ViewConfig().scaled(0.25), workers=2))
    for labeled, unlabeled in itertools.islice(loader, 4):
        assert unlabeled is not None
        assert (len(labeled), len(unlabeled)) == (1, 4)
        assert unlabeled.original_hw == [(480, 640)] * 4
        assert max(max(i.shape[1:]) for i in unlabeled.weak) <= 333
    assert not loader.report
