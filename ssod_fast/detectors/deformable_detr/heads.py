"""What is read out of a query or a token: a class and a box."""

from __future__ import annotations

import itertools
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .positions import wide

# An untrained head gives every class this probability, so that the focal loss does not start with thousands of false alarms.
PRIOR = 0.01


class MLP(nn.Module):
    """Linear layers with a ReLU between each two.

    Args:
        sizes: channels of the input, of each hidden layer and of the output.
    """

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """[..., first size] -> [..., last size]."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return cast(Tensor, last(x))


def class_head(width: int, num_classes: int) -> nn.Linear:
    """Logits of classes, each of probability `PRIOR` at the start."""
    head = nn.Linear(width, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))
    return head


class BoxHead(MLP):
    """Change of a box, in logits of its coordinates. At the start it changes nothing but, if wanted, the size.

    Args:
        width: of queries.
        size_logit: of width and height of an untrained head's boxes, where these start from points.
    """

    def __init__(self, width: int, size_logit: float = 0.0) -> None:
        super().__init__(width, width, width, 4)
        last = cast(nn.Linear, self.layers[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        with torch.no_grad():
            last.bias[2:] = size_logit

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> float32 [..., 4]."""
        return wide(super().forward(x))


class LayerHeads(nn.Module):
    """Class head and box head of each decoder layer.

    Args:
        width: of queries.
        num_classes: without background.
        layers: of the decoder.
        own: whether each layer has heads of its own.
        size_logit: see :class:`BoxHead`; of the first layer's head alone if each has its own, because later ones start from boxes.
    """

    def __init__(self, width: int, num_classes: int, layers: int, own: bool, size_logit: float) -> None:
        super().__init__()
        number = layers if own else 1
        self.classes = nn.ModuleList(class_head(width, num_classes) for _ in range(number))
        self.boxes = nn.ModuleList(BoxHead(width, size_logit if i == 0 else 0.0) for i in range(number))

    def logits(self, layer: int, hidden: Tensor) -> Tensor:
        """[B, Q, D] -> [B, Q, C]."""
        return cast(Tensor, self.classes[layer % len(self.classes)](hidden))

    def change(self, layer: int, hidden: Tensor) -> Tensor:
        """[B, Q, D] -> float32 [B, Q, 4], to be added to the logits of the reference."""
        return cast(Tensor, self.boxes[layer % len(self.boxes)](hidden))
