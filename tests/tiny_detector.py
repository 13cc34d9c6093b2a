"""A detector small enough for tests of methods, and coloured rectangles that it can learn in seconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssod_fast.data.batches import LabeledBatch, UnlabeledBatch
from ssod_fast.detectors.protocol import ImageBatch, PixelStats, preprocess
from ssod_fast.structures import PaddedTargets, Target

CELL = 8  # pixels per cell of the output


class TinyDetector(nn.Module):
    """Every cell classifies the smallest box around its centre and regresses the distances to its sides. Dense and free of syncs."""

    supports_padded = True
    supports_weights = False
    stride = CELL
    pixel_stats = PixelStats((120.0, 110.0, 100.0), (58.0, 57.0, 56.0))

    def __init__(self, num_classes: int = 2, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.num_classes = num_classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(3, width, 3, stride=2, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, stride=2, padding=2, dilation=2),
                nn.ReLU(),
            )
            self.classify = nn.Conv2d(width, num_classes, 1)
            self.regress = nn.Conv2d(width, 4, 1)
        nn.init.constant_(self.classify.bias, -2.0)

    def forward(self, images: Any, targets: Any) -> dict[str, Tensor]:
        return self.losses(images, targets)

    def losses(self, images: ImageBatch | list[Tensor], targets: PaddedTargets | list[Target]) -> dict[str, Tensor]:
        scores, sides, centres = self._run(images)
        padded = targets if isinstance(targets, PaddedTargets) else PaddedTargets.from_list(targets)
        positive, label, wanted = _assign(padded, centres, self.num_classes)
        onehot = (label[..., None] == torch.arange(self.num_classes, device=label.device)) * positive[..., None].float()
        total = positive.sum().clamp(min=1)
        p = scores.float().sigmoid()
        focal = F.binary_cross_entropy_with_logits(scores.float(), onehot, reduction="none") * (onehot - p).abs() ** 2
        regression = (sides.float() - (wanted.clamp(min=1) / CELL).log()).abs().mean(-1)
        return {"loss_cls": focal.sum() / total, "loss_box": 0.5 * (regression * positive).sum() / total}

    @torch.no_grad()
    def predict(self, images: ImageBatch | list[Tensor], score_thr: float = 0.0, topk: int = 300) -> list[Target]:
        training = self.training
        self.eval()
        scores, sides, centres = self._run(images)
        self.train(training)
        score, label = scores.float().sigmoid().max(-1)
        distance = sides.float().exp() * CELL
        boxes = torch.cat([centres - distance[..., :2], centres + distance[..., 2:]], dim=-1)
        result = []
        for s, c, b in zip(score, label, boxes, strict=True):
            s, order = s.sort(descending=True)
            keep = order[s > score_thr][:topk]
            result.append(Target(boxes=b[keep], labels=c[keep], scores=s[: len(keep)]))
        return result

    def _run(self, images: ImageBatch | list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        batch = images if isinstance(images, ImageBatch) else preprocess(images, self.pixel_stats, self.stride)
        feature = self.body(batch.tensor.to(self.classify.weight.dtype))
        scores, sides = self.classify(feature).flatten(2).mT, self.regress(feature).flatten(2).mT
        height, width = feature.shape[-2:]
        y = (torch.arange(height, device=feature.device) + 0.5) * CELL
        x = (torch.arange(width, device=feature.device) + 0.5) * CELL
        centres = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1)
        return scores, sides, centres


def _assign(targets: PaddedTargets, centres: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per cell: whether it is positive, its label, its distances to the sides."""
    boxes = torch.cat([targets.boxes, targets.boxes.new_zeros(len(targets), 1, 4)], dim=1)  # one row more, so that there is one
    labels = F.pad(targets.labels, (0, 1), value=-1)
    point = centres[None, :, None]
    sides = torch.cat([point - boxes[:, None, :, :2], boxes[:, None, :, 2:] - point], dim=-1)  # [B, P, N, 4]
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    inside = (sides.amin(-1) > 0) & (labels >= 0)[:, None]
    area = torch.where(inside, area[:, None], torch.inf)
    best = area.argmin(-1, keepdim=True)
    wanted = sides.gather(2, best[..., None].expand(-1, -1, 1, 4)).squeeze(2)
    label = labels[:, None].expand_as(area).gather(2, best).squeeze(2)
    return inside.any(-1), label.clamp(0, num_classes - 1), wanted


def rectangles(generator: torch.Generator, hw: tuple[int, int] = (64, 80), boxes: int = 2) -> tuple[Tensor, Target]:
    """A noisy uint8 image with coloured rectangles: class 0 red, class 1 blue."""
    image = torch.randint(90, 130, (3, *hw), generator=generator, dtype=torch.uint8)
    rows, labels = [], []
    for i in range(boxes):
        half = hw[1] // max(boxes, 1)
        w, h = (int(torch.randint(18, 30, (), generator=generator)) for _ in range(2))
        x = i * half + int(torch.randint(0, max(1, half - w), (), generator=generator))
        y = int(torch.randint(0, hw[0] - h, (), generator=generator))
        label = int(torch.randint(0, 2, (), generator=generator))
        image[:, y : y + h, x : x + w] = 10
        image[0 if label == 0 else 2, y : y + h, x : x + w] = 250
        rows.append([x, y, x + w, y + h])
        labels.append(label)
    return image, Target(boxes=torch.tensor(rows).float().reshape(-1, 4), labels=torch.tensor(labels, dtype=torch.int64))


def make_batches(
    seed: int, labeled: int = 2, unlabeled: int = 4, hw: tuple[int, int] = (64, 80), device: str = "cpu", dtype: torch.dtype = torch.uint8
) -> tuple[LabeledBatch, UnlabeledBatch]:
    """Random batches; the strong view is mirrored, the weak one is the original."""
    generator = torch.Generator().manual_seed(seed)
    scenes = [rectangles(generator, hw) for _ in range(labeled)]
    originals = [rectangles(generator, hw)[0].to(dtype) for _ in range(unlabeled)]
    mirror = torch.tensor([[-1.0, 0, hw[1]], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    supervised = LabeledBatch([image.to(dtype) for image, _ in scenes], [target for _, target in scenes])
    pairs = UnlabeledBatch(
        weak=originals,
        strong=[image.flip(-1) for image in originals],
        weak_matrix=torch.eye(3, dtype=torch.float64).expand(unlabeled, 3, 3).clone(),
        strong_matrix=mirror.expand(unlabeled, 3, 3).clone(),
        original_hw=[hw] * unlabeled,
        image_ids=[seed * 100 + i for i in range(unlabeled)],
    )
    return supervised.to(device), pairs.to(device)
