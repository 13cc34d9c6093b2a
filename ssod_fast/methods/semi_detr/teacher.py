"""What the teacher says about a batch, with everything that is needed of it later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssod_fast.methods.inputs import detector_batch
from ssod_fast.methods.step import PseudoLabelStats
from ssod_fast.ops.project import invert_homographies, warp_boxes
from ssod_fast.structures import PaddedTargets

from .config import SemiDETRConfig
from .mining import Mined
from .passes import Look, look
from .pseudo import Detections, project_rows, reliable, teacher_detections

if TYPE_CHECKING:
    from ssod_fast.data.batches import UnlabeledBatch
    from ssod_fast.detectors.deformable_detr.detector import DETRDetector


@dataclass(frozen=True)
class Watched:
    """The weak views as the teacher saw them.

    Attributes:
        seen: features, memory and matching queries, which no later pass computes again.
        detections: on the weak views.
        weak: those that reach the threshold of their image, in pixels of the weak views.
        strong: the same boxes, row by row, in pixels of the strong views.
    """

    seen: Look
    detections: Detections
    weak: PaddedTargets
    strong: PaddedTargets


@torch.no_grad()
def watch(teacher: DETRDetector, views: UnlabeledBatch, config: SemiDETRConfig, *, keep_inputs: bool) -> Watched:
    """Runs the teacher on the weak views. Nothing waits for the device.

    Args:
        teacher: in eval mode.
        views: of unlabelled images.
        config: thresholds of the detections.
        keep_inputs: whether the teacher is to decode other queries later.
    """
    seen = look(teacher.network, detector_batch(teacher, views.weak), keep_inputs=keep_inputs)
    detections = teacher_detections(
        seen.found.logits[-1],
        seen.found.boxes[-1],
        seen.memory.image_hw,
        score_thr=config.teacher_score_thr,
        nms_thr=config.teacher_nms_thr,
        topk=config.teacher_topk,
    )
    weak = reliable(detections.targets)
    across = views.strong_matrix.double() @ invert_homographies(views.weak_matrix)
    strong = project_rows(weak, across, [(int(image.shape[1]), int(image.shape[2])) for image in views.strong])
    return Watched(seen, detections, weak, strong)


def statistics(
    watched: Watched, targets: PaddedTargets, mined: Mined | None, views: UnlabeledBatch, config: SemiDETRConfig
) -> PseudoLabelStats:
    """Numbers for the log, on the device.

    Args:
        watched: what the teacher said.
        targets: the boxes that the detection loss learned from.
        mined: the boxes of the consistency; None in a stage without.
        views: whose images these are.
        config: for the threshold.
    """
    raw = watched.detections.targets
    extra: dict[str, Tensor] = {
        "reliable_per_image": watched.weak.count.float().mean(),
        "truncated_images": watched.detections.truncated.float().sum(),
    }
    if mined is not None:
        extra |= {
            "mined_per_image": mined.keep.sum(1).float().mean(),
            "cost_thr": mined.threshold.float(),
            "mixture_converged": mined.converged.float(),
        }
    return PseudoLabelStats(
        raw_count=raw.count,
        kept_count=targets.count,
        max_score=torch.where(raw.valid, raw.scores, 0).amax(1),
        mean_score=torch.where(raw.valid, raw.scores, 0).sum() / raw.count.sum().clamp(min=1),
        non_finite=watched.detections.non_finite,
        pseudo=warp_boxes(watched.weak, invert_homographies(views.weak_matrix), views.original_hw),
        score_thr=config.cls_pseudo_thr,
        image_ids=views.image_ids,
        extra=extra,
    )
