"""Planners of two images per canvas: mixup and cutmix, and the mixup of two finished plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ssod_fast.ops.compose_plan import FLIP_X, ComposePlan, FloatArray, PlaceF, Placement

from ._base import RandomPlanner, Size, Sizes, check_choice, check_pair, check_sizes, fit_scale, largest, round_up

Partner = Literal["permutation", "roll"]
Weight = float | tuple[str, float, float]


class MixUpPlanner(RandomPlanner):
    """Blends each image with a partner from the same batch or from a cache.

    Args:
        weight: share of the image itself: a number (MixPL and mmdetection 0.5), ("uniform", low, high) (DEIM 0.45, 0.55) or
            ("beta", a, b) (YOLO style 32, 32).
        partner: "permutation" draws a random order, "roll" takes the previous image.
        offset: where the two lie on the canvas, which is the elementwise maximum of their sizes.
        fit_partner: enlarges or shrinks the partner until it fits into the padded batch, as MixPL does.
        flip_p: probability that a partner is mirrored.
        stride: of the padded batch.
        options: seed, rank and rng, see :class:`RandomPlanner`.
    """

    def __init__(
        self,
        *,
        weight: Weight = 0.5,
        partner: Partner = "permutation",
        offset: Literal["random", "top_left", "center"] = "random",
        fit_partner: bool = True,
        flip_p: float = 0.5,
        stride: int = 32,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_choice("partner", partner, ("permutation", "roll"))
        check_choice("offset", offset, ("random", "top_left", "center"))
        check_pair("flip_p", (flip_p, flip_p), 0, 1)
        _check_weight(weight)
        self._weight, self._partner, self._offset = weight, partner, offset
        self._fit_partner, self._flip_p, self._stride = fit_partner, flip_p, stride

    def plan(self, sizes: Sizes, cache_sizes: Sizes = (), empty: Sequence[bool] | None = None) -> ComposePlan:
        """One canvas per image, with placements (image, partner).

        Args:
            sizes: (height, width) of the batch, sources 0..B-1.
            cache_sizes: of cached images, sources B, B+1, ...; if there are at least B, partners come from the first B of them.
            empty: per source, whether it holds no box; a partner without boxes is left out and its canvas shows the image alone.
        """
        check_sizes("sizes", sizes)
        check_sizes("cache_sizes", cache_sizes)
        everything = [*sizes, *cache_sizes]
        base = len(sizes) if len(cache_sizes) >= len(sizes) else 0
        target = tuple(round_up(side, self._stride) for side in largest(sizes)) if sizes else (1, 1)
        canvases, rows = [], []
        for i, partner in enumerate(self._partners(len(sizes))):
            src = base + partner
            alone = empty is not None and empty[src]
            canvas, row = self._alone(i, sizes[i]) if alone else self._pair(i, src, everything, (target[0], target[1]))
            canvases.append(canvas)
            rows.append(row)
        return ComposePlan.from_placements(canvases, rows)

    def _partners(self, n: int) -> list[int]:
        return self._draws.permutation(n) if self._partner == "permutation" else [(i - 1) % n for i in range(n)]

    def _alone(self, i: int, size: Size) -> tuple[Size, list[Placement]]:
        return size, [Placement(i, size)]

    def _pair(self, dst: int, src: int, sizes: Sizes, target: Size) -> tuple[Size, list[Placement]]:
        scale = fit_scale(sizes[src], target) if self._fit_partner else 1.0
        flip = FLIP_X if self._draws.uniform(0, 1) < self._flip_p else 0
        share = self._share()
        image = Placement(dst, sizes[dst], weight=share)
        partner = Placement.scaled(src, sizes[src], scale, weight=1 - share, flip=flip)
        canvas = largest([image.out_hw, partner.out_hw])
        return canvas, [self._shift(image, canvas), self._shift(partner, canvas)]

    def _shift(self, placement: Placement, canvas: Size) -> Placement:
        room_y, room_x = canvas[0] - placement.out_hw[0], canvas[1] - placement.out_hw[1]
        if self._offset == "random":
            offset = (self._draws.integer(0, room_x + 1), self._draws.integer(0, room_y + 1))
        else:
            offset = (0, 0) if self._offset == "top_left" else (room_x // 2, room_y // 2)
        return dataclasses.replace(placement, offset=offset)

    def _share(self) -> float:
        if isinstance(self._weight, tuple):
            kind, a, b = self._weight
            return self._draws.uniform(a, b) if kind == "uniform" else self._draws.beta(a, b)
        return self._weight


class CutMixPlanner(RandomPlanner):
    """Pastes a rectangle of a partner over each image; compose with `blend="over"`.

    The share that the image keeps is Beta(alpha, alpha) distributed (CutMix, arXiv 1905.04899); the partner is fitted to the image and
    shows its own content at the pasted place.

    Args:
        alpha: of the Beta distribution.
        partner: "permutation" or "roll".
        options: seed, rank and rng, see :class:`RandomPlanner`.
    """

    def __init__(self, *, alpha: float = 1.0, partner: Partner = "permutation", **options: Any) -> None:
        super().__init__(**options)
        check_choice("partner", partner, ("permutation", "roll"))
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        self._alpha, self._partner = alpha, partner

    def plan(self, sizes: Sizes) -> ComposePlan:
        """One canvas per image, of its own size, with placements (image, pasted partner)."""
        check_sizes("sizes", sizes)
        n = len(sizes)
        partners = self._draws.permutation(n) if self._partner == "permutation" else [(i - 1) % n for i in range(n)]
        rows = [[Placement(i, sizes[i]), self._paste(p, sizes[p], sizes[i])] for i, p in enumerate(partners)]
        return ComposePlan.from_placements(list(sizes), rows)

    def _paste(self, src: int, size: Size, canvas: Size) -> Placement:
        pasted = Placement.scaled(src, size, fit_scale(size, canvas))
        side = (1 - self._draws.beta(self._alpha, self._alpha)) ** 0.5  # share of the canvas's sides
        cut_h, cut_w = int(canvas[0] * side), int(canvas[1] * side)
        x0, y0 = self._draws.integer(0, canvas[1] - cut_w + 1), self._draws.integer(0, canvas[0] - cut_h + 1)
        x1, y1 = min(x0 + cut_w, pasted.out_hw[1]), min(y0 + cut_h, pasted.out_hw[0])
        rect = (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else (0, 0, 0, 0)
        return dataclasses.replace(pasted, rect=rect)


def mixup_plans(first: ComposePlan, second: ComposePlan, share: float) -> ComposePlan:
    """Blends two plans canvas by canvas, for example two mosaics into one canvas of eight placements.

    Args:
        first: its placements count `share` times.
        second: its placements count `1 - share` times; as many canvases as `first`, on the same sources.
        share: in [0, 1].
    """
    if first.batch != second.batch:
        raise ValueError(f"the plans must have equally many canvases, got {first.batch} and {second.batch}")
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    patches = max(first.erase.shape[2], second.erase.shape[2])
    weighted = [_weighted(first, share), _weighted(second, 1 - share)]
    erase = [np.pad(plan.erase, ((0, 0), (0, 0), (0, patches - plan.erase.shape[2]), (0, 0))) for plan in (first, second)]
    return ComposePlan(
        canvas=np.maximum(first.canvas, second.canvas),
        place_i=np.concatenate([first.place_i, second.place_i], axis=1),
        place_f=np.concatenate(weighted, axis=1),
        erase=np.concatenate(erase, axis=1),
    )


def _weighted(plan: ComposePlan, share: float) -> FloatArray:
    place_f: FloatArray = plan.place_f.copy()
    place_f[..., PlaceF.WEIGHT] *= share
    return place_f


def _check_weight(weight: Weight) -> None:
    if not isinstance(weight, tuple):
        check_pair("weight", (weight, weight), 0, 1)
        return
    kind, a, b = weight
    check_choice("weight[0]", kind, ("uniform", "beta"))
    if kind == "uniform":
        check_pair("weight[1:]", (a, b), 0, 1)
    elif not (a > 0 and b > 0):
        raise ValueError(f"weight[1:] must be positive for a Beta distribution, got {(a, b)}")
