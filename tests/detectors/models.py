"""Small torchvision models for the tests: a few thousand weights, real heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from ssod_fast.structures import Target

FAMILIES = ("fcos", "retinanet", "fasterrcnn")
DENSE = ("fcos", "retinanet")


class _Trunk(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        for name, (cin, cout, stride) in {"a": (3, 16, 8), "b": (16, 32, 2), "c": (32, 32, 2)}.items():
            self.add_module(name, nn.Sequential(nn.Conv2d(cin, cout, 3, stride, 1), nn.ReLU()))


def backbone() -> BackboneWithFPN:
    return BackboneWithFPN(_Trunk(), {"a": "0", "b": "1"}, [16, 32], 32)


def build(family: str, num_classes: int = 3, **options: Any) -> nn.Module:
    """A model of `family` for `num_classes` classes without background, levels of stride 8, 16 and 32."""
    torch.manual_seed(0)
    if family == "fasterrcnn":
        return FasterRCNN(
            backbone(),
            num_classes=None,
            rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3),
            box_roi_pool=MultiScaleRoIAlign(["0", "1"], 7, 2),
            box_head=TwoMLPHead(32 * 49, 64),
            box_predictor=_predictor(num_classes),
            rpn_post_nms_top_n_test=50,
            **options,
        )
    if family == "fcos":
        return FCOS(backbone(), num_classes, anchor_generator=AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3), **options)
    generator = AnchorGenerator(((16, 24), (32, 48), (64, 96)), ((0.5, 1.0, 2.0),) * 3)
    return RetinaNet(backbone(), num_classes, anchor_generator=generator, **options)


def _predictor(num_classes: int) -> nn.Module:
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    return FastRCNNPredictor(64, num_classes + 1)


def images(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in sizes]


def random_target(hw: tuple[int, int], n: int, num_classes: int = 3, seed: int = 0) -> Target:
    generator = torch.Generator().manual_seed(seed)
    h, w = hw
    centre = torch.rand(n, 2, generator=generator) * torch.tensor([w, h])
    size = 6 + torch.rand(n, 2, generator=generator) ** 2 * torch.tensor([0.9 * w, 0.9 * h])
    boxes = torch.cat([centre - size / 2, centre + size / 2], 1)
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, w)
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, h)
    return Target(boxes=boxes, labels=torch.randint(0, num_classes, (n,), generator=generator))


def empty_target() -> Target:
    return Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
