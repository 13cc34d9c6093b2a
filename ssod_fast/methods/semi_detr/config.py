"""Options of Semi-DETR, official behaviour by default."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal

from ssod_fast.methods.ema import EMAConfig

Stages = tuple[Literal[1, 2], ...]


def _official_ema() -> EMAConfig:
    # Officially parameters alone: batch norm is frozen there. Where it is trained, its statistics have to follow.
    return EMAConfig("warmup", keep=0.999, ahead=1)


@dataclass(frozen=True)
class SemiDETRConfig:
    """Semi-DETR (arXiv 2307.08095). Defaults are those of the released code at commit 6afea66, where not said otherwise.

    The released recipes train with AdamW, learning rate and weight decay 1e-4, a tenth of that rate for the backbone and gradients clipped
    to a norm of 0.1, on 8 GPUs with 5 images each. Smaller global batches are reported to lose several AP or to diverge: accumulate, or
    scale the learning rate. That the published AP is reached has not been verified.
    """

    # Weight of the labelled loss.
    sup_weight: float = 1.0
    # Weight of the unlabelled losses; 2 in the COCO-full recipe. The reason for 4 is not published.
    unsup_weight: float = 4.0
    # First iteration of stage 2 (one-to-one matching), 60,000 of 120,000 in the released COCO recipes. The trainer reads None as half of
    # the run, as in all released recipes; who runs the method without it has to say.
    switch_at: int | None = None

    # Detections of the teacher: scores must exceed this.
    teacher_score_thr: float = 0.01
    # Overlap of their class-wise suppression, in both stages.
    teacher_nms_thr: float = 0.6
    # Most detections per image; the image's own threshold, mean plus deviation of the scores, is taken over them.
    teacher_topk: int = 300
    # Of the detections that pass their image's threshold, those that reach this one are targets of the detection loss.
    cls_pseudo_thr: float = 0.4
    # Targets of the detection loss must have an area in the student's view. Officially boxes clipped to a line stay.
    drop_degenerate: bool = True
    # Whose costs the mixture is fitted to: those of all processes, or of each its own.
    mining_scope: Literal["global", "rank"] = "global"

    # One-to-many matching: candidates per box, exponents of score and overlap.
    o2m_topk: int = 13
    o2m_alpha: float = 1.0
    o2m_beta: float = 6.0

    # Weights of the detection losses in both stages. Original DINO: 1, 5, 2.
    cls_weight: float = 2.0
    # Officially 5, but two parts of the term that were meant for the log are summed as losses too: 10 in effect.
    l1_weight: float = 10.0
    # Of the GIoU loss.
    giou_weight: float = 2.0

    # Denoising queries per image, positive ones; original DINO too. In place of the detector's own option, of which 0 means none here too.
    denoising: int = 100
    # Share of noisy labels; half of them change.
    label_noise: float = 0.5
    # Shift of box corners in half sides; original DINO 1.
    box_noise: float = 0.4
    # Stages in which pseudo boxes get denoising queries. Officially they run in stage 1 as well, at weight 0.
    pseudo_denoising_stages: Stages = (2,)

    # Weight of the consistency between decoder states; the paper has 1.
    consistency_weight: float = 10.0
    # "mean_product": mean error times mean weight, in effect of the official code, where images without boxes dilute the loss.
    # "weighted": mean over the rows that count.
    consistency_reduction: Literal["mean_product", "weighted"] = "mean_product"
    # Stages with consistency. The paper has both; officially its weight is 0 in stage 2.
    consistency_stages: Stages = (1,)
    # Whose features become the extra queries. "teacher": the teacher's, for both networks (official). "cross": each network gets those of
    # the other (the paper).
    content: Literal["teacher", "cross"] = "teacher"
    # Images with fewer boxes than others have padding among their extra queries, which the real ones see (official). True hides it.
    mask_group_padding: bool = False

    # Overlap of the suppression with which models of stage 1 are evaluated: one-to-many matching leaves duplicates.
    eval_nms_thr: float = 0.6

    # Iterations on labelled images alone, at whose end the teacher becomes the student. Officially none; it helps short runs, in which
    # unlabelled images without pseudo boxes would for long teach nothing but background, at unsup_weight times the labelled loss.
    burn_in: int = 0
    # Unlabelled images per step and process.
    unlabeled_batch: int = 4
    # How the teacher follows the student.
    ema: EMAConfig = field(default_factory=_official_ema)
    # Of the denoising and of the projector's weights; the command line takes the seed of the run.
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_stages(self)
        _check_ranges(self)


def _check_choices(config: SemiDETRConfig) -> None:
    choices = {
        "mining_scope": ("global", "rank"),
        "consistency_reduction": ("mean_product", "weighted"),
        "content": ("teacher", "cross"),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")
    for name in ("drop_degenerate", "mask_group_padding"):
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(config, name)!r}")


def _check_stages(config: SemiDETRConfig) -> None:
    for name in ("pseudo_denoising_stages", "consistency_stages"):
        stages = getattr(config, name)
        if not isinstance(stages, tuple) or any(stage not in (1, 2) for stage in stages) or len(set(stages)) != len(stages):
            raise ValueError(f"{name} must be (), (1,), (2,) or (1, 2), got {stages!r}")


_SHARES = ("teacher_score_thr", "teacher_nms_thr", "cls_pseudo_thr", "label_noise", "eval_nms_thr")
_NUMBERS = (
    "sup_weight",
    "unsup_weight",
    "o2m_alpha",
    "o2m_beta",
    "cls_weight",
    "l1_weight",
    "giou_weight",
    "box_noise",
    "consistency_weight",
)
_INTEGERS = {"teacher_topk": 1, "o2m_topk": 1, "unlabeled_batch": 1, "denoising": 0, "burn_in": 0, "seed": 0}


def _check_ranges(config: SemiDETRConfig) -> None:
    _check_kind(config, (*_NUMBERS, *_SHARES), Real, "a number")
    _check_kind(config, _INTEGERS, Integral, "an integer")
    if config.switch_at is not None:
        _check_kind(config, ("switch_at",), Integral, "an integer or None")
    least = {**dict.fromkeys((*_NUMBERS, *_SHARES), 0), **_INTEGERS, **({} if config.switch_at is None else {"switch_at": 0})}
    for name, low in least.items():
        if not low <= getattr(config, name) < float("inf"):
            raise ValueError(f"{name} must be finite and at least {low}, got {getattr(config, name)}")
    for name in _SHARES:
        if getattr(config, name) > 1:
            raise ValueError(f"{name} must be at most 1, got {getattr(config, name)}")
    if config.o2m_beta == 0:
        raise ValueError("o2m_beta must be positive, got 0: boxes that do not overlap a target would be matched with it")


def _check_kind(config: SemiDETRConfig, names: Iterable[str], kind: type, words: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), kind) or isinstance(getattr(config, name), bool):
            raise TypeError(f"{name} must be {words}, got {getattr(config, name)!r}")
