"""The mixed inputs of MixPL against a slow loop that normalises first and then resizes, mirrors, erases, adds and pads, image by image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_detector import TinyDetector
from torch import Tensor
from torch.nn import functional as F

from ssod_fast.methods.mixpl import MixPL, MixPLConfig
from ssod_fast.methods.mixpl.method import MixedBatch
from ssod_fast.ops.compose_plan import ComposePlan, PlaceF, PlaceI
from ssod_fast.ops.planners import MixPLPlanner
from ssod_fast.structures import PaddedTargets, Target

THR = 0.4
Entry = tuple[Tensor, Target]  # a normalised image and its boxes
Size = tuple[int, int]


class RecordingPlanner(MixPLPlanner):
    """Keeps its plans and the targets that cached images were fitted to, in the order of drawing."""

    def plan(self, sizes: Any, cache_sizes: Any) -> Any:
        self.targets: list[Size] = []
        self.plans = super().plan(sizes, cache_sizes)
        return self.plans

    def _cached(self, src: int, size: Size, target: Size) -> Any:
        self.targets.append(target)
        return super()._cached(src, size, target)


def tile(image: Tensor, boxes: Tensor, target: Size) -> tuple[Tensor, Tensor]:
    """Nearest with the given scale, then mirrored."""
    scale = min(target[0] / image.shape[1], target[1] / image.shape[2])
    image = F.interpolate(image[None], scale_factor=scale)[0].flip(-1)
    h, w = image.shape[-2:]
    boxes = torch.stack([(boxes[:, i] * scale).clamp(0, (w, h)[i % 2]) for i in range(4)], dim=1)
    return image, torch.stack([w - boxes[:, 2], boxes[:, 1], w - boxes[:, 0], boxes[:, 3]], dim=1)


def erase(image: Tensor, boxes: Tensor, patches: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Patches become 0, the mean colour; also which boxes stay."""
    image = image.clone()
    covered = torch.zeros(len(boxes))
    for x0, y0, x1, y1 in patches:
        image[:, y0:y1, x0:x1] = 0
        width = (boxes[:, 2].clamp(max=x1) - boxes[:, 0].clamp(min=x0)).clamp(min=0)
        covered += width * (boxes[:, 3].clamp(max=y1) - boxes[:, 1].clamp(min=y0)).clamp(min=0)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return image, covered / (area + 1e-7) < 0.7


def canvas(plan: ComposePlan, b: int, sources: list[Entry], targets: list[Size | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, boxes and labels of one canvas; `targets` names what each placement was fitted to, None for the image of the step."""
    h, w = plan.canvas[b].tolist()
    pixels, boxes, labels = torch.zeros(3, h, w), [], []
    for k, target in enumerate(targets):
        place = {c.name: int(plan.place_i[b, k, c]) for c in PlaceI}
        image, entry = sources[place["SRC"]]
        image, box = (image, entry["boxes"]) if target is None else tile(image, entry["boxes"], target)
        image, keep = erase(image, box, plan.erase[b, k, : place["N_ERASE"]].tolist())
        x, y = place["OFF_X"], place["OFF_Y"]
        pixels[:, y : y + image.shape[1], x : x + image.shape[2]] += image * float(plan.place_f[b, k, PlaceF.WEIGHT])
        keep &= entry["scores"] > THR
        boxes.append(box[keep] + torch.tensor([x, y, x, y]))
        labels.append(entry["labels"][keep])
    return pixels, torch.cat(boxes), torch.cat(labels)


def check(batch: MixedBatch, expected: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    height, width = (-(-max(pixels.shape[axis] for pixels, _, _ in expected) // 32) * 32 for axis in (1, 2))
    for b, (pixels, boxes, labels) in enumerate(expected):
        padded = torch.zeros(3, height, width)
        padded[:, : pixels.shape[1], : pixels.shape[2]] = pixels
        assert torch.equal(batch.images.tensor[b], padded)
        assert batch.images.sizes[b] == tuple(pixels.shape[1:])
        n = int(batch.targets.count[b])
        assert torch.equal(batch.targets.boxes[b, :n], boxes)
        assert torch.equal(batch.targets.labels[b, :n], labels)


def random_entry(generator: torch.Generator, dtype: torch.dtype) -> Entry:
    h, w = (int(torch.randint(20, 90, (), generator=generator)) for _ in range(2))
    image = torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8).to(dtype)
    n = int(torch.randint(0, 6, (), generator=generator))
    corner = torch.rand(n, 2, generator=generator) * torch.tensor([w - 2, h - 2])
    boxes = torch.cat([corner, (corner + 1 + torch.rand(n, 2, generator=generator) * 40).clamp(max=torch.tensor([w, h]).float())], dim=1)
    labels = torch.randint(0, 5, (n,), generator=generator)
    return image, Target(boxes=boxes, labels=labels, scores=torch.rand(n, generator=generator))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("rng", ["philox", "numpy_legacy"])
def test_equals_normalising_first_bit_for_bit(dtype: torch.dtype, rng: Any) -> None:
    config = MixPLConfig(cls_pseudo_thr=THR, mosaic_shape=((30, 30), (70, 70)), teacher_topk=6, rng=rng, seed=3)
    method, detector = MixPL(config), TinyDetector()
    method.planner = planner = RecordingPlanner(mosaic_shape=config.mosaic_shape, rng=rng, seed=3)
    generator = torch.Generator().manual_seed(1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (detector.pixel_stats.mean, detector.pixel_stats.std))
    cache: list[Entry] = []
    for step in range(7):
        raw = [random_entry(generator, dtype) for _ in range(4)]
        confident = [int((t["scores"] > THR).sum()) for _, t in raw]
        batches = method.mix(detector, [image for image, _ in raw], PaddedTargets.from_list([t for _, t in raw], nmax=6), confident, step)
        entries = [((image.float() - mean) / std, target) for image, target in raw]
        mixup, mosaic = planner.plans
        partners = [[None, target] for target in planner.targets[:4]] if cache[4:] else [[None]] * 4
        check(batches[0], [canvas(mixup, b, entries + cache, partners[b]) for b in range(4)])
        assert len(batches) == (2 if len(cache) == 8 else 1)
        if mosaic is not None:
            check(batches[1], [canvas(mosaic, 0, entries + cache, planner.targets[4:])])
        cache = (cache + entries)[-8:]


def test_normalise_then_weight() -> None:
    # Pixel 200, mean 120, std 58, covered by one image of weight 0.5.
    method, detector = MixPL(MixPLConfig(erase_patches=None, unlabeled_batch=1)), TinyDetector()
    images = [torch.full((3, 10, 40), 200, dtype=torch.uint8), torch.full((3, 40, 10), 200, dtype=torch.uint8)]
    method.planner._mosaics = 0  # type: ignore[attr-defined]
    for step in range(6):
        batch = method.mix(detector, [images[step % 2]], PaddedTargets.empty(1, 100), [0], step)[0]
    values = batch.images.tensor[0, 0].unique()
    assert values.tolist() == pytest.approx([0.0, 0.6896552, 1.3793104], abs=1e-6)


@pytest.mark.parametrize("interp", ["nearest", "bilinear"])
def test_a_bright_patch_stays_under_its_box(interp: Any) -> None:
    """Images of sides 60 to 120 with one white patch on the mean colour, boxes around it, random mixes."""
    detector = TinyDetector()
    mean = torch.tensor(detector.pixel_stats.mean).to(torch.uint8).view(3, 1, 1)
    method = MixPL(MixPLConfig(erase_patches=None, interp=interp, mosaic_shape=((60, 60), (130, 130)), teacher_topk=1))
    generator = torch.Generator().manual_seed(0)
    seen = 0
    for step in range(12):
        images, targets = [], []
        for _ in range(4):
            h, w = (int(torch.randint(60, 120, (), generator=generator)) for _ in range(2))
            x, y = (int(torch.randint(0, side - 20, (), generator=generator)) for side in (w, h))
            image = mean.expand(3, h, w).clone()
            image[:, y : y + 16, x : x + 20] = 255
            images.append(image)
            targets.append(Target(boxes=torch.tensor([[x, y, x + 20, y + 16]]).float(), labels=torch.tensor([0])))
        for batch in method.mix(detector, images, PaddedTargets.from_list(targets, nmax=1), [1] * 4, step):
            for pixels, target in zip(batch.images.tensor, batch.targets.to_list(), strict=True):
                for x1, y1, x2, y2 in target["boxes"].round().int().tolist():
                    inner = pixels[0, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2]
                    assert inner.numel()
                    assert inner.mean() > 0.9  # half of a white pixel's 2.33 lies at 1.16
                    seen += 1
    assert seen > 100
