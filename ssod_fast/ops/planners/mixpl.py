"""The planner of MixPL (arXiv 2312.07006): erasing, pseudo-mixup and pseudo-mosaic of one training step."""

from __future__ import annotations

import dataclasses
from numbers import Integral
from typing import Any, Literal

from ssod_fast.ops.compose_plan import FLIP_X, ComposePlan, Placement

from ._base import (
    RandomPlanner,
    Size,
    Sizes,
    check_bounds,
    check_choice,
    check_pair,
    check_sizes,
    fit_scale,
    is_pair,
    largest,
    place_rounded,
    round_up,
)
from .mosaic import draw_size, touching_grid

TILES = 4


class MixPLPlanner(RandomPlanner):
    """Draws the two plans of a step from the sizes of the strong images and of the cache.

    The strong images of the step are sources 0..B-1, the cache follows, oldest first. While the cache fills, the mixup plan holds the
    erased strong images alone and there is no mosaic. Random numbers are drawn in the order of the official code, whichever generator makes
    them: erasing of the strong images; a permutation of the partners and one of the mosaic tiles, needed or not; erasing of the partners;
    the four offsets per image; then per mosaic its target size and the erasing of its tiles.

    Args:
        cache_size: number of cached images at which mixing starts; mixup takes the oldest B, the mosaic the newest 4.
        mosaic_shape: two (height, width) between which the target of the tiles is drawn, upper end excluded; equal for a fixed one.
        erase_patches: bounds of the number of erased patches, upper end excluded; None erases nothing.
        erase_ratio: bounds of a patch's share of the image's sides.
        mixup: whether partners are mixed in.
        mosaics: mosaics per step; the first uses the official draws, each further one draws another permutation.
        cache_flip: cached images are mirrored "always" (official) or at "random".
        resize: "scale_factor" gives size floor(h * s) sampled at 1 / s (official), "size" the nearest size sampled at in / out.
        stride: of the padded batch, which is the target of the mixup partners.
        options: seed, rank and rng, see :class:`RandomPlanner`.
    """

    def __init__(
        self,
        *,
        cache_size: int = 8,
        mosaic_shape: tuple[Size, Size] = ((400, 400), (800, 800)),
        erase_patches: tuple[int, int] | None = (1, 20),
        erase_ratio: tuple[float, float] = (0.0, 0.1),
        mixup: bool = True,
        mosaics: int = 1,
        cache_flip: Literal["always", "random"] = "always",
        resize: Literal["scale_factor", "size"] = "scale_factor",
        stride: int = 32,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_bounds("mosaic_shape", mosaic_shape)
        check_choice("cache_flip", cache_flip, ("always", "random"))
        check_choice("resize", resize, ("scale_factor", "size"))
        check_erasing(erase_patches, erase_ratio)
        if cache_size < TILES:
            raise ValueError(f"cache_size must be at least {TILES}, got {cache_size}")
        if mosaics < 0:
            raise ValueError(f"mosaics must not be negative, got {mosaics}")
        self._cache_size, self._mosaic_shape, self._stride = cache_size, mosaic_shape, stride
        self._erase_patches, self._erase_ratio = erase_patches, erase_ratio
        self._mixup, self._mosaics, self._cache_flip, self._resize = mixup, mosaics, cache_flip, resize

    def plan(self, sizes: Sizes, cache_sizes: Sizes) -> tuple[ComposePlan, ComposePlan | None]:
        """The mixup plan, one canvas per strong image, and the mosaic plan.

        Args:
            sizes: (height, width) of the strong images without padding.
            cache_sizes: those of the cache, oldest first, before this step's images enter it.
        """
        check_sizes("sizes", sizes)
        check_sizes("cache_sizes", cache_sizes)
        everything, batch = [*sizes, *cache_sizes], len(sizes)
        if len(cache_sizes) > self._cache_size:
            raise ValueError(f"cache_sizes must hold at most {self._cache_size} images, got {len(cache_sizes)}")
        full = len(cache_sizes) == self._cache_size
        if full and self._cache_size < batch + TILES:
            raise ValueError(f"cache_size must be at least {batch} + {TILES} for {batch} images, got {self._cache_size}")
        images = [self._erased(Placement(i, size)) for i, size in enumerate(sizes)]
        partners = [batch + i for i in self._draws.permutation(batch)]
        newest = batch + self._cache_size - TILES
        tiles = [newest + i for i in self._draws.permutation(TILES)]
        mixup = self._plan_mixup(images, partners, everything) if full and self._mixup else _plan_alone(images)
        mosaic = self._plan_mosaics(tiles, newest, everything) if full and self._mosaics else None
        return mixup, mosaic

    def _plan_mixup(self, images: list[Placement], partners: list[int], sizes: Sizes) -> ComposePlan:
        batch_hw = largest([image.out_hw for image in images])
        target = (round_up(batch_hw[0], self._stride), round_up(batch_hw[1], self._stride))
        cached = [self._cached(src, sizes[src], target) for src in partners]
        pairs = [self._pair(image, partner) for image, partner in zip(images, cached, strict=True)]
        return ComposePlan.from_placements([canvas for canvas, _ in pairs], [row for _, row in pairs])

    def _pair(self, image: Placement, partner: Placement) -> tuple[Size, list[Placement]]:
        canvas = largest([image.out_hw, partner.out_hw])
        return canvas, [self._half(image, canvas), self._half(partner, canvas)]

    def _half(self, placement: Placement, canvas: Size) -> Placement:
        """At half weight, somewhere on the canvas."""
        x = self._draws.integer(0, canvas[1] - placement.out_hw[1] + 1)
        y = self._draws.integer(0, canvas[0] - placement.out_hw[0] + 1)
        return dataclasses.replace(placement, offset=(x, y), weight=0.5)

    def _plan_mosaics(self, tiles: list[int], newest: int, sizes: Sizes) -> ComposePlan:
        rows = []
        for mosaic in range(self._mosaics):
            chosen = tiles if mosaic == 0 else [newest + i for i in self._draws.permutation(TILES)]
            target = draw_size(self._draws.integer, self._mosaic_shape)
            cached = [self._cached(src, sizes[src], target) for src in chosen]
            rows.append(touching_grid(cached, grid=2, cell_multiple=16))
        return ComposePlan.from_placements([canvas for canvas, _ in rows], [row for _, row in rows])

    def _cached(self, src: int, size: Size, target: Size) -> Placement:
        """A cached image made to fit into `target`, mirrored and erased."""
        flip = FLIP_X if self._cache_flip == "always" or self._draws.uniform(0, 1) < 0.5 else 0
        scale = fit_scale(size, target)
        if self._resize == "scale_factor":
            return self._erased(Placement.scaled(src, size, scale, flip=flip))
        return self._erased(place_rounded(src, size, scale, flip))

    def _erased(self, placement: Placement) -> Placement:
        if self._erase_patches is None:
            return placement
        patches = self._draws.patches(placement.out_hw, self._erase_patches, self._erase_ratio)
        return dataclasses.replace(placement, erase=patches)


def check_erasing(patches: tuple[int, int] | None, ratio: tuple[float, float]) -> None:
    """Raises unless 1 <= patches[0] < patches[1] and 0 <= ratio[0] <= ratio[1] < 1."""
    if patches is not None and not (is_pair(patches, Integral) and 1 <= patches[0] < patches[1]):
        raise ValueError(f"erase_patches must satisfy 1 <= low < high, got {patches}")
    check_pair("erase_ratio", ratio, 0, 1)
    if ratio[1] >= 1:
        raise ValueError(f"erase_ratio must stay below 1, got {ratio}")


def _plan_alone(images: list[Placement]) -> ComposePlan:
    return ComposePlan.from_placements([image.out_hw for image in images], [[image] for image in images])
