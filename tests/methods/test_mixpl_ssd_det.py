"""MixPL whose labelled boxes SSD-Det refines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ssd_det_cases import SMALL, gradients, make_detector, noisy_batch
from tiny_detector import TinyDetector, make_batches

from ssod_fast.methods import MixPL, MixPLConfig, MixPLSSDDet, MixPLSSDDetConfig, SemiSupervisedDetector, SSDDetConfig, StepOutput
from ssod_fast.methods.ssd_det import RefinerConfig

MIX: dict[str, Any] = {"mosaic_shape": ((40, 40), (90, 90)), "cls_pseudo_thr": 0.1, "teacher_score_thr": 0.01, "teacher_topk": 20}


def make_model(**options: Any) -> SemiSupervisedDetector:
    config = MixPLSSDDetConfig(**{**MIX, "refiner": RefinerConfig(**SMALL), **options})
    return SemiSupervisedDetector(make_detector(), MixPLSSDDet(config)).train()


def run(model: SemiSupervisedDetector, steps: range, unlabeled: bool = True) -> list[StepOutput]:
    outputs = []
    for step in steps:
        torch.manual_seed(step)
        views = make_batches(step)[1] if unlabeled else None
        outputs.append(model.training_step(noisy_batch(step), views, step, want_preview=True))
    return outputs


def branches(output: StepOutput) -> list[str]:
    return sorted({name.partition("/")[0] for name in output.losses})


def test_step() -> None:
    model = make_model(sup_weight=0.5)
    outputs = run(model, range(3))
    assert [branches(output) for output in outputs] == [["mixup", "sup"]] * 2 + [["mixup", "mosaic", "sup"]]
    last = outputs[-1]
    assert {"sup/loss_mil1", "sup/loss_sisd", "sup/loss_box_reg", "mixup/loss_box_reg"} <= set(last.losses)
    assert [preview.kind for preview in last.previews] == ["refined", "mixup", "mosaic"]
    assert "refined_iou" in last.diagnostics
    assert last.stats is not None
    last.loss.backward()
    assert len(gradients(*model.trained)) == sum(p.requires_grad for module in model.trained for p in module.parameters())
    assert all(p.grad is None for p in model.teacher.parameters())
    plain = make_model()
    torch.testing.assert_close(run(plain, range(1))[0].losses["sup/loss_spsd1"], 2 * outputs[0].losses["sup/loss_spsd1"])


def test_unlabelled_branches_are_those_of_mixpl() -> None:
    ours = run(make_model(), range(1))[0]
    model = SemiSupervisedDetector(make_detector(), MixPL(MixPLConfig(**MIX))).train()
    theirs = run(model, range(1))[0]
    assert ours.stats is not None
    assert theirs.stats is not None
    assert torch.equal(ours.stats.pseudo.boxes, theirs.stats.pseudo.boxes)
    assert torch.equal(ours.previews[-1].images.tensor, theirs.previews[-1].images.tensor)


def test_burn_in_without_unlabelled_images() -> None:
    output = run(make_model(burn_in=1), range(1), unlabeled=False)[0]
    assert branches(output) == ["sup"]
    assert [preview.kind for preview in output.previews] == ["refined"]


def test_resume_is_exact() -> None:
    through = make_model()
    expected = run(through, range(4))[2:]
    first, second = make_model(), make_model(seed=3)
    run(first, range(2))
    second.load_state_dict(first.state_dict())
    for ours, theirs in zip(run(second, range(2, 4)), expected, strict=True):
        assert sorted(ours.losses) == sorted(theirs.losses)
        assert all(torch.equal(ours.losses[name], theirs.losses[name]) for name in ours.losses)


def test_options_of_the_method_serve_as_those_of_its_refiner() -> None:
    method = MixPLSSDDet(MixPLSSDDetConfig(seed=4, refiner=SSDDetConfig(**{**SMALL, "topk": 5, "seed": 9})))
    assert (method.refinement.config.topk, method.refinement.config.seed) == (5, 4)


def test_bad_options() -> None:
    with pytest.raises(TypeError, match="ssd_det needs torchvision's Faster R-CNN"):
        SemiSupervisedDetector(TinyDetector(), MixPLSSDDet())
    with pytest.raises(ValueError, match="topk must be finite and at least 1, got 0"):
        MixPLSSDDetConfig(refiner=RefinerConfig(topk=0))
    with pytest.raises(ValueError, match="gate must be one of"):
        MixPLSSDDetConfig(gate="none")  # type: ignore[arg-type]
