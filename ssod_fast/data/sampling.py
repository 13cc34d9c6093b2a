"""Which images an iteration uses: counts, groups and positions, all computed from (seed, rank, iteration)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .records import DetectionData, ImageRecord
from .resample import LabeledResampler, RepeatFactors
from .streams import GroupOrder, Stream, aspect_groups, bernoulli_counts, expected_labeled

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingConfig:
    """How batches are filled; see `LoaderConfig`, which adds how they are made."""

    labeled_per_batch: int = 1  # per process; MixPL's Faster R-CNN config uses 1 + 4
    unlabeled_per_batch: int = 4
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    sampling: str = (
        "fixed"  # "bernoulli": each slot drawn, at least one of each (the official SoftTeacher sampler: 1.33 + 3.67 on average for 1:4)
    )
    aspect_groups: bool = False  # all images of a batch wide, or all tall: less padding; MixPL's sampler does it
    resample_t: float | None = None  # repeat-factor threshold of the labelled set, see LabeledResampler

    def __post_init__(self) -> None:
        if self.labeled_per_batch < 1:
            raise ValueError(f"labeled_per_batch must be >= 1, got {self.labeled_per_batch}")
        if self.unlabeled_per_batch < 0:
            raise ValueError(f"unlabeled_per_batch must be >= 0, got {self.unlabeled_per_batch}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must lie in [0, world_size), got {self.rank} of {self.world_size}")
        if self.sampling not in ("fixed", "bernoulli"):
            raise ValueError(f'sampling must be "fixed" or "bernoulli", got {self.sampling!r}')


@dataclass(frozen=True)
class Slot:
    """One image of a batch: a place in a stream, and the same place in later batches as replacements if the image cannot be read."""

    stream: Stream
    position: int
    stride: int

    def rows(self) -> Iterator[int]:
        """Rows to try, in order, each at most once; in the end every row of the stream has been offered."""
        seen: set[int] = set()
        for step in range(32):
            row = self.stream.at(self.position + step * self.stride)
            if row not in seen:
                seen.add(row)
                yield row
        yield from (row for row in dict.fromkeys(self.stream.rows.tolist()) if row not in seen)


class Sampler:
    """Assigns images to iterations.

    Args:
        labeled: The labelled set.
        unlabeled: The unlabelled images, or None.
        config: Batch composition.

    Raises:
        ValueError: If a set is empty, or `sampling="bernoulli"` lacks one of the two kinds.
    """

    def __init__(self, labeled: DetectionData, unlabeled: Sequence[ImageRecord] | None, config: SamplingConfig) -> None:
        _check_sets(labeled, unlabeled, config)
        self.config = config
        rows, self.factors = LabeledResampler(config.resample_t).rows(labeled.targets, len(labeled.classes))
        _say_resampling(self.factors)
        self.unlabeled_count = len(unlabeled) if unlabeled is not None and config.unlabeled_per_batch else 0
        groups = _groups(labeled, unlabeled if self.unlabeled_count else None, config.aspect_groups)
        self.order = GroupOrder(config.seed, _share_of_wide(groups))
        self.labeled = [Stream("labeled", config.seed, rows[groups[0][rows] == g], g) for g in (0, 1)]
        self.unlabeled = [Stream("unlabeled", config.seed, np.flatnonzero(groups[1] == g), g) for g in (0, 1)]
        needed, present = config.labeled_per_batch, min(len(set(s.rows.tolist())) for s in self.labeled if len(s))
        if present < needed:
            LOG.warning("a batch takes %d labelled images, only %d exist: images repeat within a batch", needed, present)

    def slots(self, iteration: int) -> tuple[list[Slot], list[Slot]]:
        """The labelled and the unlabelled slots of an iteration of this rank."""
        config = self.config
        group, turn = self.order.at(iteration)
        labeled, unlabeled = config.labeled_per_batch, config.unlabeled_per_batch if self.unlabeled_count else 0
        widths = (labeled, unlabeled)
        if config.sampling == "bernoulli":
            widths = (labeled + unlabeled,) * 2  # every iteration reserves as many places as it could need
            labeled, unlabeled = bernoulli_counts(config.seed, config.rank, iteration, labeled, unlabeled)
        return self._slots(self.labeled[group], turn, widths[0], labeled), self._slots(self.unlabeled[group], turn, widths[1], unlabeled)

    def _slots(self, stream: Stream, turn: int, width: int, count: int) -> list[Slot]:
        stride = width * self.config.world_size
        start = turn * stride + self.config.rank * width
        return [Slot(stream, start + s, stride) for s in range(count)]

    def epochs(self, iteration: int) -> tuple[float, float]:
        """Passes over the labelled and the unlabelled set up to an iteration, all ranks together (on average, if counts are drawn)."""
        config = self.config
        batches = iteration * config.world_size
        labeled, unlabeled = float(config.labeled_per_batch), float(config.unlabeled_per_batch)
        if config.sampling == "bernoulli":
            drawn = expected_labeled(config.labeled_per_batch, config.unlabeled_per_batch)
            labeled, unlabeled = drawn, labeled + unlabeled - drawn
        passes = batches * labeled / sum(len(s) for s in self.labeled)
        return passes, batches * unlabeled / self.unlabeled_count if self.unlabeled_count else 0.0


def _check_sets(labeled: DetectionData, unlabeled: Sequence[ImageRecord] | None, config: SamplingConfig) -> None:
    if not len(labeled):
        raise ValueError("labeled must hold at least one image")
    if unlabeled is not None and not len(unlabeled):
        raise ValueError("unlabeled must hold at least one image; pass None to train without")
    if config.sampling == "bernoulli" and (unlabeled is None or not config.unlabeled_per_batch):
        raise ValueError('sampling="bernoulli" needs unlabelled images and unlabeled_per_batch >= 1')


def _say_resampling(factors: RepeatFactors | None) -> None:
    if factors is None:
        return
    if (factors.times > 1).any():
        LOG.info("%s", factors)
    else:
        LOG.warning("%s: raise resample_t, or leave it off", factors)


def _groups(labeled: DetectionData, unlabeled: Sequence[ImageRecord] | None, wanted: bool) -> list[NDArray[np.int64]]:
    """Group of each labelled and each unlabelled image; all 0 where grouping is off or would leave a group without one of the kinds."""
    sets = [labeled.records, list(unlabeled or ())]
    none = [np.zeros(len(records), np.int64) for records in sets]
    if not wanted:
        return none
    groups = [aspect_groups([_known_size(record) for record in records]) for records in sets]
    present = [set(g.tolist()) for g in groups if len(g)]
    if any(p != {0, 1} for p in present):
        if any(len(p) > 1 or p != present[0] for p in present):
            LOG.info("an aspect-ratio group holds no labelled or no unlabelled image: the groups are merged")
        return none
    return groups


def _known_size(record: ImageRecord) -> tuple[int, int] | None:
    from .image_io import UnreadableImageError, image_size

    if record.size is not None:
        return record.size
    try:
        return image_size(record.path)
    except UnreadableImageError:  # met again, and counted, when it is decoded
        return None


def _share_of_wide(groups: Sequence[NDArray[np.int64]]) -> float:
    wide, total = sum(int(g.sum()) for g in groups), sum(len(g) for g in groups)
    share = wide / total
    return 0.0 if math.isclose(share, 0.0) else share
