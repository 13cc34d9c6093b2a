"""What loaders hand to training and evaluation: ragged uint8 views on the host, one list entry per image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..structures import Target, upload


@dataclass(frozen=True)
class LabeledBatch:
    """Labelled views.

    Attributes:
        images: uint8 [3, h, w] each.
        targets: Boxes in the pixels of their view.
    """

    images: list[Tensor]
    targets: list[Target]

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> LabeledBatch:
        """The same batch in page-locked memory."""
        return LabeledBatch([image.pin_memory() for image in self.images], [_map_target(t, Tensor.pin_memory) for t in self.targets])

    def to(self, device: torch.device | str) -> LabeledBatch:
        """The same batch on `device`; copies do not block."""
        where = torch.device(device)
        return LabeledBatch(_upload_all(self.images, where), [_map_target(t, lambda v: upload(v, where)) for t in self.targets])


@dataclass(frozen=True)
class UnlabeledBatch:
    """Two views of each unlabelled image. There is no place for annotations in it.

    Attributes:
        weak: uint8 [3, h, w] each, the teacher's views.
        strong: uint8 [3, h', w'] each, the student's views.
        weak_matrix: float64 [B, 3, 3], original pixels -> pixels of the weak view; stays on the host, where it is inverted.
        strong_matrix: float64 [B, 3, 3], the same for the strong view.
        original_hw: (h, w) of each original.
        image_ids: Identity of each image.
    """

    weak: list[Tensor]
    strong: list[Tensor]
    weak_matrix: Tensor
    strong_matrix: Tensor
    original_hw: list[tuple[int, int]]
    image_ids: list[int]

    def __len__(self) -> int:
        return len(self.weak)

    def pin_memory(self) -> UnlabeledBatch:
        """The same batch, its images in page-locked memory."""
        return replace(self, weak=[i.pin_memory() for i in self.weak], strong=[i.pin_memory() for i in self.strong])

    def to(self, device: torch.device | str) -> UnlabeledBatch:
        """The same batch with its images on `device`; copies do not block."""
        where = torch.device(device)
        return replace(self, weak=_upload_all(self.weak, where), strong=_upload_all(self.strong, where))


@dataclass(frozen=True)
class EvalBatch:
    """Test views.

    Attributes:
        images: uint8 [3, h, w] each.
        matrix: float64 [B, 3, 3], original pixels -> pixels of the view.
        original_hw: (h, w) of each original.
        image_ids: Identity of each image.
    """

    images: list[Tensor]
    matrix: Tensor
    original_hw: list[tuple[int, int]]
    image_ids: list[int]

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> EvalBatch:
        """The same batch, its images in page-locked memory."""
        return replace(self, images=[image.pin_memory() for image in self.images])

    def to(self, device: torch.device | str) -> EvalBatch:
        """The same batch with its images on `device`; copies do not block."""
        return replace(self, images=_upload_all(self.images, torch.device(device)))


def _upload_all(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    return [upload(tensor, device) for tensor in tensors]


def _map_target(target: Target, function: Callable[[Tensor], Tensor]) -> Target:
    moved = target.copy()
    for key in ("boxes", "labels", "scores", "weights", "clean_boxes"):
        if key in target:
            moved[key] = function(target[key])
    return moved
