"""Options of SSD-Det, official behaviour by default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

from ssod_fast.methods.ema import EMAConfig
from ssod_fast.ops._image_rows import check_factors, check_threshold


@dataclass(frozen=True)
class RefinerConfig:
    """Refiner and losses of SSD-Det (arXiv 2307.12101); defaults are those of the released code at commit 9ffa750d, or said to differ."""

    # Factors on width and on height of a noisy box, in all pairs. For VOC with up to 20 % noise 1, 1.1 and 0.9.
    ratios: tuple[float, ...] = (1.0, 1.2, 1.3, 0.8, 0.7)
    # Shifts of each scaled box to four sides, in shares of its size. For VOC with up to 20 % noise 0.1.
    shakes: tuple[float, ...] = (0.2,)
    # Proposals count if more than this share of their area lies in the image.
    iof_thr: float = 0.7
    # Where the proposals of stage II come from. "regress": those of stage I, moved by its regression (the code). "resample": a new bag
    # around the box of stage I, moved by a regression of its own (the paper).
    stage2_bag: Literal["regress", "resample"] = "regress"
    # Proposals that are averaged to one box.
    topk: int = 7

    # Random boxes per image that stage II learns as background.
    negatives: int = 500
    # They overlap every proposal by less than this.
    negative_iou: float = 0.3

    # Predict how well proposals overlap the object, to choose among them by it. In the released code off unless asked for, as the training
    # command does.
    sisd: bool = True
    # What proposals are chosen by beside that: "cls", or "cls_ins" (the paper).
    sisd_score: Literal["cls", "cls_ins"] = "cls"

    # Weight of the classification of bags in stage I.
    mil1_weight: float = 0.25
    # The same in stage II.
    mil2_weight: float = 0.25
    # Weight of the negatives.
    negative_weight: float = 0.75
    # Weight of the regression from the noisy box's bag to the noisy box.
    spsd1_weight: float = 0.25
    # Weight of the regression to the box of stage I, or in a resampled bag.
    spsd2_weight: float = 0.25
    # Trust bags in that regression as far as stage I was sure of them.
    spsd2_weighted: bool = True
    # Weight of the predicted overlaps; the paper has 0.25.
    sisd_weight: float = 5.0
    # Weight of the detector's losses but one.
    det_weight: float = 4.0
    # That one: of the boxes of the first stage of the detector. The paper has 4 for all.
    rpn_box_weight: float = 1.0
    # Leave bags without any valid proposal out of the classification. Officially they add a constant.
    mask_empty_bags: bool = True

    # Units of the refiner's linear layers.
    hidden: int = 1024
    # Boxes per image that losses are computed for, drawn at random where there are more; the others are refined without gradients.
    # Officially all, whatever the memory.
    max_boxes_per_image: int = 50
    # Proposals that are pooled at once. Batches of more are computed twice, in forward and again in backward, instead of being kept.
    rois_per_pass: int = 8192

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_ranges(self)
        for name, positive in (("ratios", True), ("shakes", False)):
            check_factors(name, getattr(self, name), positive=positive)
        check_threshold("iof_thr", self.iof_thr)
        check_threshold("negative_iou", self.negative_iou)

    @property
    def bag_size(self) -> int:
        """Proposals per box."""
        return len(self.ratios) ** 2 * (1 + 4 * len(self.shakes))


@dataclass(frozen=True)
class SSDDetConfig(RefinerConfig):
    """SSD-Det (arXiv 2307.12101). Defaults are those of the released code at commit 9ffa750d, where not said otherwise.

    The released COCO recipe trains Faster R-CNN with SGD, learning rate 0.02, momentum 0.9 and weight decay 1e-4, gradients clipped to a
    norm of 10, for 12 epochs with drops after 8 and 11, on 8 GPUs with 2 images each. That the published AP is reached has not been
    verified.
    """

    # None: no averaged model, as in the paper.
    ema: EMAConfig | None = None
    # Of the refiner's weights, the negatives and the draw of boxes; the command line takes the seed of the run.
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_integers(self, {"seed": 0})


def _check_choices(config: RefinerConfig) -> None:
    for name, allowed in {"stage2_bag": ("regress", "resample"), "sisd_score": ("cls", "cls_ins")}.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")
    for name in ("sisd", "spsd2_weighted", "mask_empty_bags"):
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(config, name)!r}")


_WEIGHTS = (
    "mil1_weight",
    "mil2_weight",
    "negative_weight",
    "spsd1_weight",
    "spsd2_weight",
    "sisd_weight",
    "det_weight",
    "rpn_box_weight",
)
_INTEGERS = {"topk": 1, "hidden": 1, "max_boxes_per_image": 1, "rois_per_pass": 1, "negatives": 0}


def _check_ranges(config: RefinerConfig) -> None:
    _check_numbers(config, dict.fromkeys(_WEIGHTS, 0), Real, "a number")
    _check_integers(config, _INTEGERS)


def _check_integers(config: RefinerConfig, least: Mapping[str, int]) -> None:
    _check_numbers(config, least, Integral, "an integer")


def _check_numbers(config: RefinerConfig, least: Mapping[str, int], kind: type, words: str) -> None:
    for name, low in least.items():
        value = getattr(config, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} must be {words}, got {value!r}")
        if not low <= value < math.inf:  # type: ignore[operator]
            raise ValueError(f"{name} must be finite and at least {low}, got {value}")
