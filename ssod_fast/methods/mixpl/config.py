"""Options of MixPL, official behaviour by default."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal

from ssod_fast.methods.ema import EMAConfig
from ssod_fast.ops.planners._base import check_bounds
from ssod_fast.ops.planners.mixpl import TILES, check_erasing


def _official_ema() -> EMAConfig:
    return EMAConfig("mmdet", floor=2e-4, gamma=4.0, interval=3)


@dataclass(frozen=True)
class MixPLConfig:
    """MixPL (arXiv 2312.07006). Defaults are those of the released code at commit 9f2176a, where not said otherwise."""

    # Scores must exceed this. Released configs: Faster R-CNN 0.7, RetinaNet, TOOD and DINO 0.4, FCOS 0.3 (of class times centerness, whose
    # square root torchvision takes: 0.55 there). It also is the only burn-in of the official recipe: while one image of the batch has no
    # box above it, the unsupervised loss is shut.
    cls_pseudo_thr: float = 0.7
    # Weight of the labelled loss.
    sup_weight: float = 1.0
    # Weight of the unlabelled losses.
    unsup_weight: float = 2.0
    # On top of unsup_weight: the mosaic counts 0.5 * 2 = 1.
    mosaic_weight: float = 0.5

    # "batch_min": open if every image of the batch keeps `least_num` boxes (official).
    # "sum": open if the batch keeps that many altogether (mmdetection's base class); small or rare objects shut it less often.
    # "per_image": images below leave the batch, which the host has to wait for.
    gate: Literal["batch_min", "sum", "per_image"] = "batch_min"
    # Boxes that the gate asks for.
    least_num: int = 1
    # Leaves a shut branch out instead of multiplying it by 0. Saves time early on, but the host waits for the gate, trainable batch norm
    # notices, and ranks of a distributed run would disagree: not allowed there.
    skip_closed_gate: bool = False

    # Unlabelled images per step and process. The cache holds this many mixup partners and 4 tiles: 8 in the official 4 + 4.
    unlabeled_batch: int = 4
    # Images that are kept for mixing; none: unlabeled_batch + 4, the least that is possible.
    cache_size: int | None = None
    # Mix every unlabelled image with one of the cache.
    mixup: bool = True
    # Mosaics of 4 cached images; 0 switches them off.
    mosaics_per_step: int = 1
    # Bounds (height, width) of a mosaic tile, upper end excluded. Scale them with the view sizes: these belong to short sides of 400-1200.
    mosaic_shape: tuple[tuple[int, int], tuple[int, int]] = ((400, 400), (800, 800))
    # "always": cached images are mirrored every time they are used, as the official code does.
    cache_flip: Literal["always", "random"] = "always"
    # "nearest" made the published numbers, because a scale without a mode means nearest; "bilinear" (antialiased where an image shrinks)
    # looks better and differs by 8 to 17 grey levels on average when shrinking to half.
    interp: Literal["nearest", "bilinear"] = "nearest"
    # "scale_factor" rounds a size down, so that it may miss its target by a pixel (official); "size" hits it.
    resize: Literal["scale_factor", "size"] = "scale_factor"

    # Patches per image, upper end excluded; None switches erasing off.
    erase_patches: tuple[int, int] | None = (1, 20)
    # Bounds of a patch side as a share of the image side.
    erase_ratio: tuple[float, float] = (0.0, 0.1)
    # Boxes with at least this share of their area erased are dropped.
    erase_thr: float = 0.7
    # "sum" counts overlapping patches twice (official), "union" once.
    erase_overlap: Literal["sum", "union"] = "sum"

    # Of the teacher's raw boxes: what FCOS and TOOD test with in the released configs.
    teacher_score_thr: float = 0.05
    # Most boxes of the teacher per image.
    teacher_topk: int = 100
    # Pseudo boxes must be wider and higher than this, in pixels of the strong view.
    min_pseudo_bbox_wh: float = 1e-2

    # Iterations on labelled images alone, at whose end the teacher becomes the student. Officially none; it helps where the labelled set
    # is so small that early pseudo labels mislead.
    burn_in: int = 0
    # Iterations over which the unsupervised weights then grow from 0. Officially none.
    ramp: int = 0
    # An unreleased schedule may stand behind the published AP (a user's report of a missing hook); this is the released one.
    ema: EMAConfig = field(default_factory=_official_ema)

    # "numpy_legacy" draws what NumPy's legacy generator would give the official code; "philox" is faster.
    rng: Literal["philox", "numpy_legacy"] = "philox"
    # Of the mixing; the command line takes the seed of the run.
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_ranges(self)
        check_bounds("mosaic_shape", self.mosaic_shape)
        check_erasing(self.erase_patches, self.erase_ratio)
        if self.cache_size is not None:
            _check_kind(self, ("cache_size",), Integral, "an integer")
        if self.cache_size is not None and self.cache_size < self.unlabeled_batch + TILES:
            raise ValueError(
                f"cache_size must be at least unlabeled_batch + {TILES} = {self.unlabeled_batch + TILES}, got {self.cache_size}"
            )

    @property
    def cache_length(self) -> int:
        """Images in the cache: `cache_size`, by default `unlabeled_batch + 4`."""
        return self.unlabeled_batch + TILES if self.cache_size is None else self.cache_size


def _check_choices(config: MixPLConfig) -> None:
    choices = {
        "gate": ("batch_min", "sum", "per_image"),
        "cache_flip": ("always", "random"),
        "interp": ("nearest", "bilinear"),
        "resize": ("scale_factor", "size"),
        "erase_overlap": ("sum", "union"),
        "rng": ("philox", "numpy_legacy"),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")


def _check_ranges(config: MixPLConfig) -> None:
    numbers = ("cls_pseudo_thr", "teacher_score_thr", "sup_weight", "unsup_weight", "mosaic_weight", "min_pseudo_bbox_wh")
    least = {
        **dict.fromkeys(("mosaics_per_step", "burn_in", "ramp", "seed"), 0),
        **dict.fromkeys(("least_num", "unlabeled_batch", "teacher_topk"), 1),
    }
    _check_kind(config, (*numbers, "erase_thr"), Real, "a number")
    _check_kind(config, least, Integral, "an integer")
    for name, low in {**dict.fromkeys(numbers, 0), **least}.items():
        if not getattr(config, name) >= low:
            raise ValueError(f"{name} must be at least {low}, got {getattr(config, name)}")
    if not config.erase_thr > 0:
        raise ValueError(f"erase_thr must be positive, got {config.erase_thr}")
    for name in ("cls_pseudo_thr", "teacher_score_thr"):
        if getattr(config, name) > 1:
            raise ValueError(f"{name} is compared with scores and must be at most 1, got {getattr(config, name)}")


def _check_kind(config: MixPLConfig, names: Iterable[str], kind: type, words: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), kind):
            raise TypeError(f"{name} must be {words}, got {getattr(config, name)!r}")
