"""A network of the Deformable DETR family as a detector that methods can train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssod_fast.structures import PaddedTargets, Target

from ..adapter import check_prediction, eval_mode
from ..protocol import IMAGENET, ImageBatch, LossProgram, PixelStats, as_image_batch
from ..targets import to_padded
from .config import DETRConfig
from .criterion import DETRCriterion, normalised_targets, normalisers, objectness_targets
from .denoising import Denoising, denoising_blocked, make_denoising
from .predictions import best_pairs, separate_pairs
from .stages import Decoded, DETRStages, Memory, Proposals, Queries


@dataclass(frozen=True)
class Outputs:
    """What a forward for training gives.

    Attributes:
        decoded: of the matching queries.
        proposals: of the encoder, if the network selects queries.
        denoised: of the denoising queries, if there are any.
    """

    decoded: Decoded
    proposals: Proposals | None
    denoised: Decoded | None


class DETRDetector(nn.Module):
    """Deformable DETR or DINO behind the detector protocol.

    Attributes:
        network: follows :class:`~ssod_fast.detectors.deformable_detr.DETRStages`, with its options in `config`.
        criterion: matching and losses.
        num_classes: without background.
        pixel_stats: what images are normalised with.
        stride: multiple that batches are padded to.
        nms_thr: overlap above which :meth:`predict` drops the lower-scored of two detections of one class; None for none, which suits
            networks trained with one query per object.
        build_options: what :func:`~ssod_fast.detectors.build_detector` rebuilds this detector from.
    """

    supports_weights = True
    supports_padded = True
    stride = 32

    def __init__(
        self,
        network: nn.Module,
        criterion: DETRCriterion | None = None,
        *,
        nms_thr: float | None = None,
        pixel_stats: PixelStats = IMAGENET,
    ) -> None:
        super().__init__()
        if not isinstance(network, DETRStages):
            raise TypeError(f"network must follow DETRStages (extract, encode, select, decode, ...), got {type(network).__name__}")
        self.network: Any = network
        self.config = cast(DETRConfig, self.network.config)
        self.criterion = DETRCriterion() if criterion is None else criterion
        self.num_classes = self.config.num_classes
        self.pixel_stats = pixel_stats
        self.build_options: dict[str, Any] = {}
        self.nms_thr: float | None = None
        if nms_thr is not None:
            self.set_nms(nms_thr)

    def set_nms(self, thr: float | None) -> None:
        """Sets `nms_thr`, in `build_options` too, so that a saved detector keeps it.

        Raises:
            ValueError: not in (0, 1].
            TypeError: no number.
        """
        if thr is not None and (not isinstance(thr, int | float) or isinstance(thr, bool)):
            raise TypeError(f"nms_thr must be a number or None, got {thr!r}")
        if thr is not None and not 0 < thr <= 1:
            raise ValueError(f"nms_thr must lie in (0, 1] or be None, got {thr!r}")
        self.nms_thr = thr
        self.build_options = {**self.build_options, "nms_thr": thr}

    def forward(self, images: ImageBatch | list[Tensor], targets: PaddedTargets | list[Target] | LossProgram) -> dict[str, Tensor]:
        """The losses, so that DistributedDataParallel can wrap the detector.

        Args:
            images: normalised batch, or [3, h, w] tensors with values in 0..255.
            targets: as for :meth:`losses`; or a program, which computes losses from the stages of the network.
        """
        if callable(targets):
            return targets(self, self.batch(images))
        return self.losses(images, targets)

    def losses(self, images: ImageBatch | list[Tensor], targets: PaddedTargets | list[Target]) -> dict[str, Tensor]:
        """Losses to be summed. Nothing waits for the device if the targets are padded.

        Boxes that are not finite or have no area are left out; images without boxes are background.

        Args:
            images: normalised batch, or [3, h, w] tensors with values in 0..255.
            targets: one entry per image, boxes in pixels of the image; `weights` in [0, 1] are shares of their losses.

        Returns:
            Scalars `loss_cls`, `loss_l1` and `loss_giou` of all decoder layers; with prefix `enc_` those of the encoder's proposals, where
            the network selects queries from them; with prefix `dn_` those of denoising queries, in training mode where `config.denoising`
            is not 0.

        Raises:
            ValueError: number of targets, or a label outside of 0..num_classes - 1 (list form).
        """
        batch = self.batch(images)
        padded = to_padded(targets, len(batch), self.num_classes, batch.tensor.device)
        memory = self.encode(batch)
        wanted = normalised_targets(padded, memory.image_hw, self.num_classes)
        denoising = self.denoise(wanted)
        return self.loss_terms(self.run(memory, denoising), wanted, denoising)

    def predict(self, images: ImageBatch | list[Tensor], score_thr: float = 0.0, topk: int = 300) -> list[Target]:
        """The best pairs of query and class of the last layer, best first; without non-maximum suppression unless `nms_thr` is set.

        Args:
            images: normalised batch, or [3, h, w] tensors with values in 0..255.
            score_thr: only detections with a strictly larger score.
            topk: at most so many per image.

        Returns:
            Per image: boxes float32 [n, 4] xyxy, in pixels of the given image and inside of it; labels int64 [n], 0-based; scores [n].

        Raises:
            ValueError: `topk` < 1, `score_thr` outside of 0..1, or bad images.
        """
        check_prediction(score_thr, topk)
        with eval_mode(self), torch.no_grad():
            memory = self.encode(self.batch(images))
            queries, _ = self.network.select(memory)
            decoded: Decoded = self.network.decode(memory, queries)
        found = decoded.logits[-1], decoded.boxes[-1], memory.image_hw
        if self.nms_thr is None:
            return best_pairs(*found, score_thr=score_thr, topk=topk)
        return separate_pairs(*found, nms_thr=self.nms_thr, score_thr=score_thr, topk=topk)

    def features(self, images: ImageBatch | list[Tensor]) -> list[Tensor]:
        """Feature maps [B, D, h, w] that the encoder reads, finest first."""
        return cast(list[Tensor], self.network.extract(self.batch(images)).maps)

    def batch(self, images: ImageBatch | list[Tensor]) -> ImageBatch:
        """`images` itself if it is a batch already, else the preprocessed list."""
        return as_image_batch(images, self.pixel_stats, self.stride)

    def encode(self, batch: ImageBatch) -> Memory:
        """Backbone and encoder."""
        return cast(Memory, self.network.encode(self.network.extract(batch)))

    def denoise(self, targets: PaddedTargets, max_gt: int | None = None, generator: torch.Generator | None = None) -> Denoising | None:
        """Denoising queries for normalised targets; None in eval mode or where the network has none.

        Args:
            targets: boxes cxcywh, normalised.
            max_gt: most targets of an image, by default the rows of `targets`, but no more than `config.denoising`: padding would fill the
                queries otherwise. Further targets get no denoising queries.
            generator: of random numbers, by default that of the device.
        """
        options = self.config
        if not (self.training and options.denoising):
            return None
        most = min(targets.nmax, options.denoising) if max_gt is None else max_gt
        noise = {"label_noise": options.label_noise, "box_noise": options.box_noise}
        return make_denoising(targets, self.num_classes, number=options.denoising, max_gt=most, generator=generator, **noise)

    def run(self, memory: Memory, denoising: Denoising | None = None) -> Outputs:
        """Selects queries and decodes them together with denoising queries."""
        queries, proposals = self.network.select(memory)
        if denoising is None:
            return Outputs(self.network.decode(memory, queries), proposals, None)
        noisy = self.network.label_queries(denoising.labels, denoising.boxes)
        blocked = denoising_blocked(denoising, queries.content.shape[1])
        decoded = self.network.decode(memory, join_queries(noisy, queries), blocked=blocked)
        count = denoising.labels.shape[1]
        return Outputs(_part(decoded, count, None), proposals, _part(decoded, 0, count))

    def loss_terms(self, found: Outputs, targets: PaddedTargets, denoising: Denoising | None) -> dict[str, Tensor]:
        """Losses of everything that a forward gives, see :meth:`losses`; `targets` are normalised."""
        norm, dn_norm = normalisers(targets, denoising)
        terms = self.criterion.losses(found.decoded.logits, found.decoded.boxes, targets, norm=norm)
        if found.proposals is not None:
            proposed = objectness_targets(targets) if self.config.selection == "two_stage" else targets
            terms |= self.criterion.losses(found.proposals.logits, found.proposals.boxes, proposed, prefix="enc_", norm=norm)
        if found.denoised is not None and denoising is not None:
            terms |= self.criterion.denoising_losses(found.denoised.logits, found.denoised.boxes, denoising, norm=dn_norm)
        return terms


def join_queries(first: Queries, second: Queries) -> Queries:
    """The queries of both, side by side."""
    position = None
    if first.position is not None and second.position is not None:
        position = torch.cat([first.position, second.position], 1)
    return Queries(torch.cat([first.content, second.content], 1), torch.cat([first.reference, second.reference], 1), position)


def _part(decoded: Decoded, start: int, stop: int | None) -> Decoded:
    """Some of the queries."""
    rows = slice(start, stop)
    return Decoded(decoded.hidden[:, :, rows], decoded.logits[:, :, rows], decoded.boxes[:, :, rows])
