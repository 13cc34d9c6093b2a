"""Makes a live model of transformers follow the detector protocol."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from ..protocol import PixelStats
from .adapter import WEIGHTS_KEY, TransformersDetector
from .families import family_of

_CLASS_LAYERS = ("class_embed", "enc_score_head", "enc_out_class_embed")
_RARE = 0.01  # probability of each class in an untrained head, as in the focal loss's paper


def from_transformers(
    model: nn.Module, num_classes: int | None = None, *, patch: bool = True, pixel_stats: PixelStats | None = None
) -> TransformersDetector:
    """Makes a DeformableDetr, RTDetr, RTDetrV2, DFine or RfDetr `...ForObjectDetection` follow the detector protocol.

    The model is taken over, not copied: its loss becomes ours (see :func:`ssod_fast.dropin.transformers.set_loss`), which weights boxes;
    its names of parameters stay. Fixed sizes of RT-DETR and its successors for evaluation (`anchor_image_size`, `eval_size`) are taken
    away, because views have all sizes.

    Args:
        model: on any device. Deformable DETR trains its inner layers only if `model.config.auxiliary_loss` is True, which is not
            transformers' default, and the choice of queries of a two-stage model never: transformers' loss has no term for it (that of
            `own:deformable_detr_...` has one). What is frozen stays so: in Deformable DETR all of a ResNet of transformers, until
            `model.model.unfreeze_backbone()`.
        num_classes: without background; by default those that the model has. Where it differs, the detector gets a new model: untrained
            layers in the place of those that depend on the number of classes, the given weights elsewhere.
        patch: also run attention on our ops, see :func:`ssod_fast.dropin.transformers.patch`.
        pixel_stats: by default those of the family's image processor. A checkpoint's are in its preprocessor_config.json, which
            `build_detector("hf:folder", ...)` reads.

    Raises:
        ImportError: transformers is missing or too old; the message names the extra.
        TypeError: another kind of model.
        ValueError: `num_classes` < 1.
    """
    require_transformers()
    from ssod_fast.dropin import transformers as dropin

    family = family_of(model)
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    any_model: Any = model
    if num_classes is not None and num_classes != any_model.config.num_labels:
        any_model = with_classes(any_model, num_classes)
    _free_sizes(any_model)
    dropin.set_loss(any_model, WEIGHTS_KEY)
    if patch:
        dropin.patch(any_model)
    return TransformersDetector(any_model, family, family.pixel_stats if pixel_stats is None else pixel_stats)


def require_transformers() -> None:
    """Whether a known version of transformers is there.

    Raises:
        ImportError: naming the extra.
    """
    from ssod_fast.dropin.transformers.models import check_version

    try:
        check_version()
    except ImportError as error:
        raise ImportError(f"detectors of transformers need it: pip install 'ssod_fast[hf]' ({error})") from error


@torch.no_grad()
def with_classes(model: Any, num_classes: int) -> Any:
    """A model for another number of classes with the weights, device, mode and frozen parts of `model`."""
    config = copy.deepcopy(model.config)
    config.num_labels = num_classes
    new = type(model)(config).to(device=model.device, dtype=model.dtype)
    start_rare(new)
    own = new.state_dict()
    fitting = {name: value for name, value in model.state_dict().items() if name in own and own[name].shape == value.shape}
    new.load_state_dict(fitting, strict=False)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in new.named_modules():
        module.training = modes.get(name, model.training)
    return new


@torch.no_grad()
def start_rare(model: Any) -> None:
    """Untrained class layers begin with rare objects; transformers' Deformable DETR calls every class as likely as not, and learns late."""
    for name, module in model.named_modules():
        known = any(layer in name.split(".") for layer in _CLASS_LAYERS)
        if known and isinstance(module, nn.Linear) and not module.bias.any():
            nn.init.constant_(module.bias, -math.log((1 - _RARE) / _RARE))


def _free_sizes(model: Any) -> None:
    """Lets RT-DETR and its successors make anchors and positions for the size that comes, also in eval mode."""
    for name in ("anchor_image_size", "eval_size"):
        if getattr(model.config, name, None) is not None:
            setattr(model.config, name, None)
        for module in model.modules():
            if getattr(module, name, None) is not None:
                setattr(module, name, None)
