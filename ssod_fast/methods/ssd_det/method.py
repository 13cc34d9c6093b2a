"""SSD-Det (arXiv 2307.12101): training on boxes that are right in class and wrong in place."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign

from ssod_fast.detectors.adapter import eval_mode
from ssod_fast.detectors.faster_rcnn import FasterRCNNDetector
from ssod_fast.detectors.protocol import ImageBatch, as_image_batch, require
from ssod_fast.methods.inputs import detector_batch
from ssod_fast.methods.step import BackwardDriver, LossBook, Preview, StepOutput
from ssod_fast.structures import PaddedTargets, Target, upload

from .bags import NoisyBoxes, check_boxes
from .config import SSDDetConfig
from .refiner import Levels, Refined, Refiner

if TYPE_CHECKING:
    from ssod_fast.data.batches import LabeledBatch, UnlabeledBatch
    from ssod_fast.methods.semi_supervised import SemiSupervisedDetector


class SSDDet:
    """The recipe, with the refiner and its random numbers.

    A refiner turns every noisy box into a better one, from the same features as the detector, which trains on the result. It learns from
    the noisy boxes, their labels and its own output, and is no part of the detector: models are saved and run without it.

    Args:
        config: options.
        rank: of this process in a distributed run; each rank draws its own negatives.

    Attributes:
        trainable: the refiner; there after :meth:`check`.
    """

    def __init__(self, config: SSDDetConfig | None = None, *, rank: int = 0) -> None:
        self.config = config = SSDDetConfig() if config is None else config
        self.ema = config.ema
        self.burn_in = 0
        self.trainable: Refiner | None = None
        digest = hashlib.blake2b(repr((config.seed, rank)).encode(), digest_size=8).digest()
        # On the host: the same numbers for every device, in a state that fits every device.
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        self._checked = False

    def check(self, student: nn.Module) -> None:
        """Needs a :class:`~ssod_fast.detectors.faster_rcnn.FasterRCNNDetector` with a feature pyramid.

        Raises:
            TypeError: another detector.
            ValueError: a method that serves a model of other channels or classes.
        """
        require(student, for_method="ssd_det")
        if not isinstance(student, FasterRCNNDetector) or not isinstance(student.model.roi_heads.box_roi_pool, MultiScaleRoIAlign):
            raise TypeError(
                f"ssd_det needs torchvision's Faster R-CNN with a feature pyramid (torchvision:fasterrcnn_...), "
                f"got {type(student).__name__}: it pools features under proposals"
            )
        served = (int(student.model.backbone.out_channels), student.num_classes)
        if self.trainable is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)
                self.trainable = Refiner(self.config, *served)
        elif (self.trainable.channels, self.trainable.num_classes) != served:
            mine = (self.trainable.channels, self.trainable.num_classes)
            raise ValueError(f"a method serves one model: its (channels, classes) are {mine}, got a detector of {served}")

    def step(
        self,
        model: SemiSupervisedDetector,
        labeled: LabeledBatch,
        unlabeled: UnlabeledBatch | None,
        step: int,
        driver: BackwardDriver | None = None,
        want_preview: bool = False,
    ) -> StepOutput:
        """The losses of refiner and detector. Unlabelled images, if a loader gives any, are not looked at."""
        book = LossBook(driver)
        return book.output(previews=self.supervised(book, model, labeled, last=True, want_preview=want_preview))

    def supervised(
        self,
        book: LossBook,
        model: SemiSupervisedDetector,
        labeled: LabeledBatch,
        *,
        weight: float = 1.0,
        last: bool,
        want_preview: bool = False,
    ) -> tuple[Preview, ...]:
        """The branch "sup": the student's losses on refined boxes, with those of the refiner.

        Args:
            book: runs the branch; gets the numbers for the log.
            model: whose student this is.
            labeled: images with noisy boxes.
            weight: of all losses.
            last: whether no other branch follows.
            want_preview: whether to return the images with their refined boxes.

        Raises:
            ValueError: a coordinate that is not finite, a box that ends before it begins, or a label that is no class (on a GPU, this is
                looked at in the first step only).
        """
        assert self.trainable is not None
        if not self._checked or all(target["boxes"].device.type == "cpu" for target in labeled.targets):
            check_boxes(labeled.targets, model.student.num_classes)
            self._checked = True
        images = detector_batch(model.student, labeled.images)
        program = RefineAndDetect(self.trainable, labeled.targets, self.generator)
        book.run("sup", lambda: model.run_student(images, program), weight=weight, last=last)
        book.diagnostics.update(program.diagnostics)
        return (Preview("refined", images, PaddedTargets.from_list(program.refined)),) if want_preview else ()

    def state_dict(self) -> dict[str, Any]:
        """Random numbers; the refiner is saved with the model."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.generator.set_state(state["generator"])


class RefineAndDetect:
    """Losses of refiner and detector from one pass of the backbone, as a program that the detector runs in its forward.

    Args:
        refiner: with the options.
        targets: noisy boxes of the batch.
        generator: of negatives and of the draw of boxes, on the host.

    Attributes:
        refined: what the detector learned from, after the call.
        diagnostics: scalars for the log, after the call.
    """

    def __init__(self, refiner: Refiner, targets: Sequence[Target], generator: torch.Generator) -> None:
        self.refiner, self.targets, self.generator = refiner, targets, generator
        self.refined: list[Target] = []
        self.diagnostics: dict[str, Tensor] = {}

    def __call__(self, detector: FasterRCNNDetector, images: ImageBatch) -> dict[str, Tensor]:
        """The losses."""
        maps = detector.pyramid(images)
        levels = levels_of(detector, maps, images)
        noisy = NoisyBoxes.pack(self.targets, images.sizes, images.tensor.device)
        found = self.refine(levels, noisy)
        self.diagnostics = dict(found.diagnostics)
        self.refined = _with_boxes(self.targets, found.boxes, noisy.counts)
        return {**found.losses, **self._weighted(detector.losses_from(maps, images, self.refined))}

    def refine(self, levels: Levels, noisy: NoisyBoxes) -> Refined:
        """Refined boxes of the batch, and the losses of as many as the refiner takes. Nothing waits for the device."""
        config, device = self.refiner.config, noisy.boxes.device
        uniforms = upload(torch.rand(len(noisy.counts), config.negatives, 4, generator=self.generator), device)
        parts = noisy.divide(config.max_boxes_per_image, self.generator)
        if parts is None:
            found: Refined = self.refiner(levels, noisy, uniforms)
            return dataclasses.replace(found, diagnostics={**found.diagnostics, "left_out": uniforms.new_zeros(())})
        rows, counts, other_rows, other_counts = parts
        others = noisy.take(other_rows, other_counts)
        found = self.refiner(levels, noisy.take(rows, counts), uniforms, others)
        rest = self.refiner.refine(levels, others)
        boxes = noisy.boxes.index_copy(0, rows, found.boxes).index_copy(0, other_rows, rest.boxes)
        scores = boxes.new_zeros(len(noisy)).index_copy(0, rows, found.scores).index_copy(0, other_rows, rest.scores)
        left_out = uniforms.new_full((), len(others))
        return Refined(boxes, scores, found.losses, {**found.diagnostics, "left_out": left_out})

    def _weighted(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        config = self.refiner.config
        return {name: loss * (config.rpn_box_weight if name == "loss_rpn_box_reg" else config.det_weight) for name, loss in losses.items()}


@torch.no_grad()
def refine(detector: FasterRCNNDetector, refiner: Refiner, images: ImageBatch | list[Tensor], targets: Sequence[Target]) -> list[Target]:
    """Better boxes for annotated images, by networks that were trained together.

    Args:
        detector: whose features the refiner reads.
        refiner: `SSDDet.trainable` of the run.
        images: normalised batch, or [3, h, w] tensors with values in 0..255.
        targets: one per image, on the detector's device; boxes in pixels of the image.

    Returns:
        The targets with other boxes, in their order, and with `scores`, how sure the refiner is, in [0, 1].

    Raises:
        ValueError: not one target per image, a coordinate that is not finite, a box that ends before it begins, or a label that is no
            class.
    """
    check_boxes(targets, detector.num_classes)
    with eval_mode(detector), eval_mode(refiner):
        batch = as_image_batch(images, detector.pixel_stats, detector.stride)
        noisy = NoisyBoxes.pack(targets, batch.sizes, batch.tensor.device)
        found = refiner.refine(levels_of(detector, detector.pyramid(batch), batch), noisy)
    return _with_boxes(targets, found.boxes, noisy.counts, found.scores)


def levels_of(detector: FasterRCNNDetector, maps: OrderedDict[str, Tensor], batch: ImageBatch) -> Levels:
    """The maps from which the detector pools, with their strides. Its pooling may name more than its backbone has."""
    pooled = [maps[name] for name in detector.model.roi_heads.box_roi_pool.featmap_names if name in maps]
    height = batch.tensor.shape[-2]  # a multiple of the strides
    return Levels(pooled, [2 ** round(math.log2(height / level.shape[-2])) for level in pooled])


def _with_boxes(targets: Sequence[Target], boxes: Tensor, counts: Sequence[int], scores: Tensor | None = None) -> list[Target]:
    """The targets with their share of `boxes`, and of `scores` if there are any."""
    result: list[Target] = []
    each = [None] * len(counts) if scores is None else scores.split(list(counts))
    for target, own, sure in zip(targets, boxes.split(list(counts)), each, strict=True):
        changed: Target = {**target, "boxes": own}
        result.append(changed if sure is None else {**changed, "scores": sure})
    return result
