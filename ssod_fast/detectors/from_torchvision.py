"""Picks the adapter of a torchvision detection model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet

from .adapter import TorchvisionDetector
from .dense import FCOSDetector, RetinaNetDetector
from .faster_rcnn import FasterRCNNDetector


def from_torchvision(model: nn.Module, num_classes: int | None = None) -> TorchvisionDetector:
    """Makes a torchvision FasterRCNN, FCOS or RetinaNet follow the detector protocol.

    The model is taken over, not copied: its resize-and-normalise step is replaced, because views come finished.

    Args:
        model: as built by torchvision. Its heads may have been exchanged.
        num_classes: classes without background; read from the heads by default. Faster R-CNN has one output more than that, for background;
            FCOS and RetinaNet treat each of their outputs as a class, so a model with torchvision's COCO weights has 91.

    Raises:
        TypeError: another kind of model.
        ValueError: `num_classes` contradicts the heads, or cannot be read from them; or the model predicts masks or keypoints.
    """
    if isinstance(model, FasterRCNN):
        if model.roi_heads.has_mask() or model.roi_heads.has_keypoint():
            raise ValueError(f"model must predict boxes only, got {type(model).__name__}")
        return FasterRCNNDetector(model, _checked(num_classes, _rcnn_classes(model)))
    if isinstance(model, FCOS):
        return FCOSDetector(model, _checked(num_classes, int(model.head.classification_head.num_classes)))
    if isinstance(model, RetinaNet):
        return RetinaNetDetector(model, _checked(num_classes, int(model.head.classification_head.num_classes)))
    raise TypeError(f"model must be a torchvision FasterRCNN, FCOS or RetinaNet, got {type(model).__name__}")


def _rcnn_classes(model: Any) -> int | None:
    scores = getattr(model.roi_heads.box_predictor, "cls_score", None)
    return int(scores.out_features) - 1 if isinstance(scores, nn.Linear) else None


def _checked(given: int | None, found: int | None) -> int:
    if given is None and found is None:
        raise ValueError("num_classes must be given: it cannot be read from the model's box predictor")
    if given is not None and found is not None and given != found:
        raise ValueError(f"num_classes is {given}, but the model predicts {found} classes (background not counted)")
    result = found if given is None else given
    assert result is not None
    if result < 1:
        raise ValueError(f"num_classes must be at least 1, got {result}")
    return result
