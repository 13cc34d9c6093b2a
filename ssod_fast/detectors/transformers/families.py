"""In what the detectors of transformers differ from each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..protocol import IMAGENET, PixelStats

UNIT = PixelStats(mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0))
"""Values in 0..1, as RT-DETR and its successors read images."""

_RT_DETR_TERMS = ("loss_vfl", "loss_bbox", "loss_giou")


@dataclass(frozen=True)
class Family:
    """One kind of detector.

    Attributes:
        model: its class in transformers.
        frame: what a box of 0..1 is a share of. "image": the model is told which pixels are padding, and counts from the image's own
            borders. "canvas": it knows of no padding, and counts from the borders of the whole batch.
        pixel_stats: of the image processor, unless a checkpoint says otherwise.
        terms: the losses that its loss is the sum of, of each layer.
        factors: fields of the config with the factors of terms that enter the loss dict without.
        spare: parameters that take part in no loss, at least for a batch without boxes. DistributedDataParallel waits for their gradients.
        padded: whether a training step can do without waiting for the device: labels go to the loss alone, and nothing else reads values.
        defaults: options of a model built from its config, where transformers' own need a download or a further package.
    """

    model: str
    frame: Literal["image", "canvas"]
    pixel_stats: PixelStats
    terms: tuple[str, ...]
    factors: Mapping[str, str]
    spare: tuple[str, ...]
    padded: bool
    defaults: Mapping[str, Any]

    def coefficients(self, config: Any) -> dict[str, float]:
        """Factor of each term of the loss dict in the loss."""
        return {term: float(getattr(config, self.factors[term])) if term in self.factors else 1.0 for term in self.terms}


def _canvas(model: str, *further: str) -> Family:
    """RT-DETR and what followed from it: the terms of their loss dicts have their factors already."""
    terms = (*_RT_DETR_TERMS, *further)
    return Family(model, "canvas", UNIT, terms, {}, ("model.denoising_class_embed.weight",), False, {})


_BOX_FACTORS = {"loss_bbox": "bbox_loss_coefficient", "loss_giou": "giou_loss_coefficient"}
_BOX_TERMS = ("loss_ce", "loss_bbox", "loss_giou")

FAMILIES: dict[str, Family] = {
    "deformable_detr": Family(
        model="DeformableDetrForObjectDetection",
        frame="image",
        pixel_stats=IMAGENET,
        terms=_BOX_TERMS,
        factors=_BOX_FACTORS,
        spare=(),
        padded=False,  # its encoder asks after each layer whether all is finite
        # transformers' own default is a network of timm.
        defaults={"backbone_config": {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]}},
    ),
    "rt_detr": _canvas("RTDetrForObjectDetection"),
    "rt_detr_v2": _canvas("RTDetrV2ForObjectDetection"),
    "d_fine": _canvas("DFineForObjectDetection", "loss_fgl", "loss_ddf"),
    "rf_detr": Family(
        model="RfDetrForObjectDetection",
        frame="image",
        pixel_stats=IMAGENET,
        terms=_BOX_TERMS,
        factors={"loss_ce": "class_loss_coefficient", **_BOX_FACTORS},
        spare=("model.backbone.backbone.embeddings.mask_token",),
        padded=True,
        defaults={},
    ),
}
"""By the `model_type` of their configs."""


def family_of(model: nn.Module) -> Family:
    """The family of a live model.

    Raises:
        TypeError: it has none.
    """
    names = {kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.")}
    for family in FAMILIES.values():
        if family.model in names:
            return family
    known = ", ".join(family.model for family in FAMILIES.values())
    raise TypeError(f"model must be one of transformers' {known}, got {type(model).__name__}")


def spare_parameters(model: Any, family: Family) -> list[str]:
    """Names of the parameters that may take part in no loss; with losses that leave out whole heads, simply all."""
    config = model.config
    # The loss of transformers' Deformable DETR has no term for the proposals of its encoder.
    partial = not config.auxiliary_loss or getattr(config, "two_stage", False)
    return [name for name, _ in model.named_parameters() if partial or name in family.spare]


def stride_of(model: Any) -> int:
    """The multiple that the sides of a batch must be of."""
    patches = getattr(model.config.backbone_config, "patch_size", None)
    if patches is None:
        return 32
    return int(patches) * int(getattr(model.config.backbone_config, "num_windows", 1))


def needs_square(model: Any) -> bool:
    """Whether the model divides images into windows, which transformers puts together again rightly for square ones alone."""
    return int(getattr(model.config.backbone_config, "num_windows", 1)) > 1
