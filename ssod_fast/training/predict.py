"""Runs detectors over test views and brings their boxes back to the original images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ssod_fast.data.batches import EvalBatch
from ssod_fast.detectors import preprocess
from ssod_fast.methods.inputs import input_dtype
from ssod_fast.ops.project import invert_homographies, warp_boxes
from ssod_fast.structures import PaddedTargets, Target

Autocast = Callable[[], AbstractContextManager[Any]]


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """What happens inside does not change the random numbers that come afterwards."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


@torch.no_grad()
def predict_batch(detector: Any, batch: EvalBatch, score_thr: float, topk: int) -> list[Target]:
    """Detections in pixels of the original images, on the host.

    Args:
        detector: follows the detector protocol.
        batch: test views on the detector's device.
        score_thr: scores below are dropped.
        topk: boxes per image at most.
    """
    images = preprocess(batch.images, detector.pixel_stats, detector.stride, input_dtype(batch.images[0].device))
    predictions = detector.predict(images, score_thr=score_thr, topk=topk)
    host = [_to_host(p) for p in predictions]
    # One path for boxes: the same projection as training uses, here on the host and with one row per box.
    padded = PaddedTargets.from_list(host)
    original = warp_boxes(padded, invert_homographies(batch.matrix), batch.original_hw)
    return [Target(boxes=t["boxes"], labels=t["labels"], scores=t["scores"]) for t in original.to_list()]


def _to_host(prediction: Target) -> Target:
    boxes, labels, scores = (prediction[k].detach().cpu() for k in ("boxes", "labels", "scores"))
    return Target(boxes=boxes.float(), labels=labels, scores=scores.float())


def predict_all(
    detectors: Mapping[str, nn.Module],
    batches: Iterable[EvalBatch],
    device: torch.device,
    score_thr: float,
    topk: int = 100,
    autocast: Autocast = contextlib.nullcontext,
) -> Iterator[tuple[EvalBatch, dict[str, list[Target]]]]:
    """Detections of several models on the same views, which are decoded once.

    Yields:
        Each batch and the detections by model.
    """
    for batch in batches:
        there = batch.to(device)
        with autocast():
            yield batch, {name: predict_batch(model, there, score_thr, topk) for name, model in detectors.items()}
