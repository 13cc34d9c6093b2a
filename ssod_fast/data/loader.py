"""Loaders: decoding and views in worker processes, batches that depend on (seed, rank, iteration) alone."""

from __future__ import annotations

import itertools
import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..structures import Target
from .batches import EvalBatch, LabeledBatch, UnlabeledBatch
from .cache import ImageCache
from .image_io import UnreadableImageError, read_image
from .records import DataReport, DetectionData, ImageRecord
from .sampling import Sampler, SamplingConfig, Slot
from .streams import generator
from .views import View, ViewConfig, labeled_view, test_view, weak_strong_views

LOG = logging.getLogger(__name__)
UNREADABLE = "unreadable images, replaced or skipped"
T = TypeVar("T")


@dataclass(frozen=True)
class LoaderConfig(SamplingConfig):
    """Batch composition (inherited) and how batches are made."""

    views: ViewConfig = field(default_factory=ViewConfig)
    workers: int = 2  # 0 decodes in the training process
    prefetch: int = 4  # batches each worker prepares ahead
    cache_mb: int = 0  # decoded images kept in memory shared by the workers; worth it for a few hundred images on few cores
    pin_memory: bool = False  # page-locked batches, for a GPU

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 0 or self.prefetch < 1 or self.cache_mb < 0:
            got = f"{self.workers}, {self.prefetch} and {self.cache_mb}"
            raise ValueError(f"workers must be >= 0, prefetch >= 1 and cache_mb >= 0, got {got}")


SPOKEN = {"labeled": "labelled", "unlabeled": "unlabelled"}  # purposes of streams, in messages


class _Fault(NamedTuple):
    """A file that could not be used."""

    path: Path
    reason: str


def _none_readable(which: str, faults: Sequence[_Fault]) -> str:
    """The message where no image can be used: the first five files, and what is wrong with the first."""
    names = ", ".join(str(fault.path) for fault in faults[:5])
    return f"none of the {which} images can be read, such as {names}; the fault of the first: {faults[0].reason}"


class _Reader:
    """Decodes images by row through the cache; remembers rows that failed, so that each broken file is tried once per process."""

    def __init__(self, records: Sequence[ImageRecord], cache_mb: int) -> None:
        self.records = records
        self.cache = ImageCache(len(records), cache_mb)
        self.broken: dict[int, str] = {}

    def read(self, row: int) -> Tensor:
        """uint8 [3, h, w], not to be written to; raises UnreadableImageError."""
        if row in self.broken:
            raise UnreadableImageError(self.broken[row])
        cached = self.cache.get(row)
        if cached is not None:
            return cached
        record = self.records[row]
        try:
            image = read_image(record.path, record.size)
        except UnreadableImageError as error:
            self.broken[row] = str(error)
            raise
        self.cache.put(row, image)
        return image

    def first_readable(self, slot: Slot) -> tuple[int, Tensor, list[_Fault]]:
        """The slot's image, or the first replacement that can be read.

        Raises:
            UnreadableImageError: If no image of the stream can be read; the message names the first five.
        """
        faults: list[_Fault] = []
        for row in slot.rows():
            try:
                return row, self.read(row), faults
            except UnreadableImageError as error:
                faults.append(_Fault(self.records[row].path, str(error)))
        raise UnreadableImageError(_none_readable(f"{len(faults)} {SPOKEN[slot.stream.purpose]}", faults))


class _Item(NamedTuple):
    """One iteration on its way from a worker."""

    labeled: LabeledBatch
    unlabeled: UnlabeledBatch | None
    faults: list[_Fault]


class _Iterations(Dataset[_Item]):
    """Makes the batches of any iteration."""

    def __init__(self, labeled: DetectionData, unlabeled: Sequence[ImageRecord] | None, config: LoaderConfig) -> None:
        self.config = config
        self.sampler = Sampler(labeled, unlabeled, config)
        self.targets = labeled.targets
        share = len(labeled) / (len(labeled) + len(unlabeled or ()))  # of the cache: every image has the same chance to get in
        labeled_mb = round(config.cache_mb * share)
        self.labeled = _Reader(labeled.records, labeled_mb)
        self.unlabeled = _Reader(list(unlabeled or ()), config.cache_mb - labeled_mb)

    def __getitem__(self, iteration: int) -> _Item:
        labeled_slots, unlabeled_slots = self.sampler.slots(iteration)
        faults: list[_Fault] = []
        labeled = self._labeled_batch(labeled_slots, iteration, faults)
        unlabeled = self._unlabeled_batch(unlabeled_slots, iteration, faults) if unlabeled_slots else None
        return _Item(labeled, unlabeled, faults)

    def _labeled_batch(self, slots: list[Slot], iteration: int, faults: list[_Fault]) -> LabeledBatch:
        images: list[Tensor] = []
        targets: list[Target] = []
        for place, slot in enumerate(slots):
            row, image, met = self.labeled.first_readable(slot)
            faults += met
            rng = generator("labeled_view", self.config.seed, self.config.rank, iteration, place)
            view, target = labeled_view(image, self.targets[row], self.config.views, rng)
            images.append(view.image)
            targets.append(target)
        return LabeledBatch(images, targets)

    def _unlabeled_batch(self, slots: list[Slot], iteration: int, faults: list[_Fault]) -> UnlabeledBatch:
        pairs: list[tuple[View, View]] = []
        sizes: list[tuple[int, int]] = []
        ids: list[int] = []
        for place, slot in enumerate(slots):
            row, image, met = self.unlabeled.first_readable(slot)
            faults += met
            rng = generator("unlabeled_view", self.config.seed, self.config.rank, iteration, place)
            pairs.append(weak_strong_views(image, self.config.views, rng))
            sizes.append((image.shape[1], image.shape[2]))
            ids.append(self.unlabeled.records[row].id)
        weak, strong = zip(*pairs, strict=True)
        return UnlabeledBatch(
            weak=[view.image for view in weak],
            strong=[view.image for view in strong],
            weak_matrix=_stack_matrices(weak),
            strong_matrix=_stack_matrices(strong),
            original_hw=sizes,
            image_ids=ids,
        )


class TrainLoader:
    """Endless batches for training.

    Iterating yields (LabeledBatch, UnlabeledBatch | None) for the iterations start_iteration, start_iteration + 1, ... Which images an
    iteration uses and how their views look depends on (seed, rank, iteration) alone, whatever the number of workers, so a run resumes by
    its iteration number. Images that cannot be read are replaced by the next one in their place of the stream, counted in `report`, and
    named once in the log.

    Args:
        labeled: The labelled set.
        unlabeled: Unlabelled images, or None for supervised training.
        config: Batches, views, processes.
        start_iteration: First iteration to yield.

    Raises:
        ValueError: If a set is empty or a setting is out of range.
    """

    def __init__(
        self,
        labeled: DetectionData,
        unlabeled: Sequence[ImageRecord] | None = None,
        config: LoaderConfig | None = None,
        start_iteration: int = 0,
    ) -> None:
        if start_iteration < 0:
            raise ValueError(f"start_iteration must be >= 0, got {start_iteration}")
        self.config = config or LoaderConfig()
        self.start_iteration = start_iteration
        self.report = DataReport()
        self._iterations = _Iterations(labeled, unlabeled, self.config)
        self._faults = _FaultLog(self.report)

    @property
    def sampler(self) -> Sampler:
        """Which images an iteration uses."""
        return self._iterations.sampler

    def batch(self, iteration: int) -> tuple[LabeledBatch, UnlabeledBatch | None]:
        """The batches of one iteration, made here and now.

        Raises:
            UnreadableImageError: If no image of a set can be read.
        """
        return self._hand_out(self._iterations[iteration])

    def __iter__(self) -> Iterator[tuple[LabeledBatch, UnlabeledBatch | None]]:
        config = self.config
        items = _in_workers(self._iterations, _CountFrom(self.start_iteration), config.workers, config.prefetch, config.pin_memory)
        return map(self._hand_out, items)

    def _hand_out(self, item: _Item) -> tuple[LabeledBatch, UnlabeledBatch | None]:
        self._faults.add(item.faults)
        return item.labeled, item.unlabeled


class _EvalBatches(Dataset[tuple[EvalBatch, list[_Fault]]]):
    """Makes the k-th batch of test views."""

    def __init__(self, records: Sequence[ImageRecord], views: ViewConfig, batch_size: int, cache_mb: int) -> None:
        self.reader = _Reader(records, cache_mb)
        self.views, self.batch_size = views, batch_size

    def __getitem__(self, number: int) -> tuple[EvalBatch, list[_Fault]]:
        faults: list[_Fault] = []
        views: list[View] = []
        kept: list[tuple[int, tuple[int, int]]] = []
        start = number * self.batch_size
        for row in range(start, min(start + self.batch_size, len(self.reader.records))):
            record = self.reader.records[row]
            try:
                image = self.reader.read(row)
            except UnreadableImageError as error:
                faults.append(_Fault(record.path, str(error)))
                continue
            views.append(test_view(image, self.views))
            kept.append((record.id, (image.shape[1], image.shape[2])))
        return EvalBatch([v.image for v in views], _stack_matrices(views), [hw for _, hw in kept], [i for i, _ in kept]), faults


class EvalLoader:
    """Test views of every image, once, in order.

    Images that cannot be read are left out, counted in `report` and named once in the log; if there is none left, iterating raises.

    Args:
        data: A labelled set or a list of records; annotations are not touched.
        views: Supplies the test size.
        batch_size: Images per batch; the last batch may be smaller.
        workers: Processes; 0 decodes in this one.
        rank: This process takes images rank, rank + world_size, ...: no image is seen twice, ranks may differ by one image.
        world_size: Number of processes.
        cache_mb: Decoded images kept between evaluations.
        pin_memory: Page-locked batches, for a GPU.
    """

    def __init__(
        self,
        data: DetectionData | Sequence[ImageRecord],
        views: ViewConfig | None = None,
        batch_size: int = 1,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        cache_mb: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1 or workers < 0:
            raise ValueError(f"batch_size must be >= 1 and workers >= 0, got {batch_size} and {workers}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size), got {rank} of {world_size}")
        records = data.records if isinstance(data, DetectionData) else list(data)
        self.records = records[rank::world_size]
        self.workers, self.pin_memory = workers, pin_memory
        self.report = DataReport()
        self._batches = _EvalBatches(self.records, views or ViewConfig(), batch_size, cache_mb)
        self._faults = _FaultLog(self.report)

    def __len__(self) -> int:
        return -(-len(self.records) // self._batches.batch_size)

    def __iter__(self) -> Iterator[EvalBatch]:
        """Raises UnreadableImageError at the end if there are images and none could be read."""
        seen, broken = 0, []
        for batch, faults in _in_workers(self._batches, range(len(self)), self.workers, 2, self.pin_memory):
            self._faults.add(faults)
            broken += faults
            seen += len(batch)
            if len(batch):
                yield batch
        if self.records and not seen:
            raise UnreadableImageError(_none_readable(str(len(self.records)), broken))


class _FaultLog:
    """Counts every broken file once and names it once."""

    def __init__(self, report: DataReport) -> None:
        self.report = report
        self.seen: set[Path] = set()

    def add(self, faults: Sequence[_Fault]) -> None:
        for fault in faults:
            if fault.path not in self.seen:
                self.seen.add(fault.path)
                self.report.drop(UNREADABLE, str(fault.path))
                LOG.warning("skipped an image: %s", fault.reason)


class _CountFrom:
    """Iteration numbers without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def _in_workers(dataset: Dataset[T], keys: Any, workers: int, prefetch: int, pin_memory: bool) -> Iterator[T]:
    """dataset[key] for each key, in order, made by worker processes."""
    loader: DataLoader[T] = DataLoader(
        dataset,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,
        worker_init_fn=_ignore_interrupts,
        # A generator of its own: the loader must not draw from the global stream that the training process saves and restores.
        generator=torch.Generator().manual_seed(0),
    )
    return iter(loader)


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the training process decides when to stop and still needs its batches until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(item: T) -> T:
    return item


def _stack_matrices(views: Sequence[View]) -> Tensor:
    """float64 [B, 3, 3]."""
    return torch.from_numpy(np.stack([view.matrix for view in views])) if views else torch.zeros(0, 3, 3, dtype=torch.float64)
