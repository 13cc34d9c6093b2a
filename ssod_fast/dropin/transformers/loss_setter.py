"""Gives a model of transformers one of our losses through its public setter."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from .._patch import Patched, Plan, UnknownSurface, check_parameters, require, restore
from .losses import DeformableDetrLoss, DetrLoss, GroundingDinoLoss, Loss, LwDetrLoss
from .models import check_version
from .rt_detr_losses import DEIMv2Loss, DFineLoss, RTDetrLoss


class _Family(NamedTuple):
    """Our loss and the parameters of the one that it replaces."""

    loss: type[Loss]
    parameters: tuple[str, ...]


_DETR = ("logits", "labels", "device", "pred_boxes", "config", "outputs_class", "outputs_coord", "**kwargs")
_RT_DETR = (*_DETR[:7], "enc_topk_logits", "enc_topk_bboxes", "denoising_meta_values", "**kwargs")
_D_FINE = (*_RT_DETR[:10], "predicted_corners", "initial_reference_points", "**kwargs")
_LW_DETR = (*_DETR[:7], "enc_outputs_class", "enc_outputs_coord", "**kwargs")
_GROUNDING_DINO = (
    *_DETR[:5], "label_maps", "text_mask", "outputs_class", "outputs_coord", "encoder_logits", "encoder_pred_boxes",
)  # fmt: skip
_OTHER_KEYS = ("class_labels", "boxes")
_FAMILIES = {
    "ForObjectDetection": _Family(DetrLoss, _DETR),
    "DeformableDetrForObjectDetection": _Family(DeformableDetrLoss, _DETR),
    "ConditionalDetrForObjectDetection": _Family(DeformableDetrLoss, _DETR),
    "DabDetrForObjectDetection": _Family(DeformableDetrLoss, _DETR),
    "RTDetrForObjectDetection": _Family(RTDetrLoss, _RT_DETR),
    "RTDetrV2ForObjectDetection": _Family(RTDetrLoss, _RT_DETR),
    "DFineForObjectDetection": _Family(DFineLoss, _D_FINE),
    "Deimv2ForObjectDetection": _Family(DEIMv2Loss, _D_FINE),
    "LwDetrForObjectDetection": _Family(LwDetrLoss, _LW_DETR),
    "RfDetrForObjectDetection": _Family(LwDetrLoss, _LW_DETR),
    "GroundingDinoForObjectDetection": _Family(GroundingDinoLoss, _GROUNDING_DINO),
    "MMGroundingDinoForObjectDetection": _Family(GroundingDinoLoss, _GROUNDING_DINO),
}


def set_loss(model: nn.Module, weights_key: str = "weights") -> Patched:
    """Makes a detector of transformers compute its loss by our matching, with a weight per target box.

    Labels are those of transformers; each image may have one more key with the weights of its boxes, for instance the confidence of pseudo
    labels. A weight lies in [0, 1] and says how much its box counts: its terms of the loss are multiplied by it, and what is missing to 1
    its query learns as background. With 0 it is all background, but the box still takes its query, and remains one of the N boxes that
    losses are divided by. That is not what transformers computes where the box is left out of the labels, which frees the query and
    lowers N.

    Without weights, all are 1, and values and gradients are those of transformers. Where transformers raises an error since a
    predicted box is NaN, this goes on: its query gets a target only where no other is left. The loss survives `copy.deepcopy` and is not
    part of a config.

    A step raises ValueError where the weights of an image are not as many as its boxes, and where some images with boxes have weights and
    others have none.

    Args:
        model: DETR, Conditional DETR, DAB-DETR, Deformable DETR, YOLOS, RT-DETR, RT-DETRv2, D-FINE, DEIMv2, LW-DETR, RF-DETR,
            Grounding DINO or MM Grounding DINO, `...ForObjectDetection`, also as `torch.compile` and DistributedDataParallel wrap it.
        weights_key: key of the weights, float [N] in [0, 1], in the labels of an image. If no image has it, all weights are 1.

    Returns:
        What is replaced now.

    Raises:
        TypeError: if `model` is no detector of transformers whose loss is known here, or `weights_key` is no string.
        ValueError: if `weights_key` is "class_labels" or "boxes", or the model has our loss with another key.
        ImportError: if transformers is missing, or a version that is not known; nothing is changed then.
    """
    if not isinstance(weights_key, str):
        raise TypeError(f"weights_key must be a string, got {weights_key!r}")
    if weights_key in _OTHER_KEYS:
        raise ValueError(f"weights_key must be another key than {' and '.join(map(repr, _OTHER_KEYS))}, got {weights_key!r}")
    check_version()
    model = _detector(model)
    kind = getattr(model, "loss_type", None)
    family = _FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        note = "; losses of masks stay those of transformers" if "Segmentation" in type(model).__name__ else ""
        raise TypeError(f"model must be one of {', '.join(_FAMILIES)}, got {type(model).__name__} with loss type {kind!r}{note}")
    mapping: dict[str, Any] = require("transformers.loss.loss_utils", "transformers>=5.17,<6").LOSS_MAPPING
    check_parameters(mapping[str(kind)], f"the loss of {kind}", family.parameters)
    if not isinstance(getattr(type(model), "loss_function", None), property):
        raise UnknownSurface(f"{type(model).__name__}.loss_function is no property: this version is not known, nothing was patched")
    plan = Plan("unset_loss", weights_key=weights_key)
    plan.add(model, "_loss_function", family.loss(weights_key), f"{type(model).__name__}.loss_function")
    return plan.apply(f"{type(model).__name__} has no loss")


def unset_loss(model: nn.Module) -> int:
    """Takes :func:`set_loss` back.

    Args:
        model: a model, or a copy of one.

    Returns:
        1, or 0 if the model has its own loss.

    Raises:
        RuntimeError: if the loss has been set again by somebody else; nothing is changed then.
        TypeError: if `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return int(restore(_detector(model), "_loss_function"))


def _detector(model: nn.Module) -> nn.Module:
    """What `torch.compile` or DistributedDataParallel have wrapped; other models as they are."""
    while isinstance(model, nn.Module) and not hasattr(type(model), "loss_function"):
        inner = model._modules.get("_orig_mod", model._modules.get("module"))
        if inner is None:
            break
        model = inner
    return model
