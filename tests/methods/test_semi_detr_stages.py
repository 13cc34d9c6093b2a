"""The two stages of Semi-DETR: what runs in which, and that leaving the rest out changes nothing over optimizer steps and resumes."""

from __future__ import annotations

import contextlib
import copy
import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from semi_detr_models import gradients, make_model, make_views
from semi_detr_oracle import LiteralStep, Slow
from torch import Tensor, nn

from ssod_fast.methods import SemiDETR, SemiDETRConfig, SemiSupervisedDetector
from ssod_fast.methods.semi_detr import branches, consistency, mining

STAGE1, STAGE2 = 3, 12  # iterations on both sides of switch_at = 10
CLIP = 0.1


def test_stage_two_begins_at_the_switch() -> None:
    method = SemiDETR(SemiDETRConfig(switch_at=60_000))
    assert [method.stage(step) for step in (0, 59_999, 60_000, 119_999)] == [1, 1, 2, 2]
    assert [method.losses(step).stage for step in (59_999, 60_000)] == ["o2m", "o2o"]


def optimizer_of(model: SemiSupervisedDetector) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for part in model.trained for p in part.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-2)


def train(model: SemiSupervisedDetector, optimizer: torch.optim.Optimizer, steps: range, *, detours: Slow | None = None) -> list[Tensor]:
    """Optimizer steps, by the step itself or by the oracle; gradient norms before clipping."""
    norms = []
    for step in steps:
        if detours is None:
            loss = model.training_step(*make_views(step), step).loss
        else:
            loss = torch.stack(list(LiteralStep(model, detours)(*make_views(step), step).values())).sum()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.student.parameters(), CLIP))
        nn.utils.clip_grad_norm_(model.trainable.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(step)
    return norms


def test_five_optimizer_steps_across_the_switch_equal_those_of_the_full_graph() -> None:
    ours, theirs = make_model(switch_at=2), make_model(switch_at=2)
    norms = train(ours, optimizer_of(ours), range(5))
    expected = train(theirs, optimizer_of(theirs), range(5), detours=Slow(solver="shipped"))
    torch.testing.assert_close(torch.stack(norms), torch.stack(expected), rtol=1e-8, atol=0)
    assert min(float(norm) for norm in norms) > CLIP
    for name in ("student", "teacher"):
        for key, value in getattr(theirs, name).state_dict().items():
            torch.testing.assert_close(getattr(ours, name).state_dict()[key], value, rtol=1e-8, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
    moved = [not torch.equal(a, b) for a, b in zip(ours.student.parameters(), make_model().student.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)


def test_the_projector_stays_put_in_stage_two() -> None:
    """The full graph gives it gradients of 0 there, so that weight decay goes on; nobody uses it any more."""
    model = make_model(switch_at=1)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(1))
    before = [p.clone() for p in model.trainable.parameters()]
    train(model, optimizer, range(1, 3))
    assert all(torch.equal(a, b) for a, b in zip(before, model.trainable.parameters(), strict=True))


class TestDeadWork:
    @pytest.mark.parametrize("step", [STAGE1, STAGE2])
    @pytest.mark.parametrize("family", ["dino", "deformable_detr"])
    def test_gradients_and_their_norm_equal_the_full_graph(self, step: int, family: str) -> None:
        model = make_model(family)
        model.training_step(*make_views(step), step).loss.backward()
        norm = nn.utils.clip_grad_norm_(model.student.parameters(), CLIP)
        ours = gradients(model)
        terms = LiteralStep(model, Slow(solver="shipped"))(*make_views(step), step)
        torch.stack(list(terms.values())).sum().backward()
        expected_norm = nn.utils.clip_grad_norm_(model.student.parameters(), CLIP)
        torch.testing.assert_close(norm, expected_norm, rtol=1e-10, atol=0)
        expected = gradients(model)
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")

    def test_calls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = make_model()
        with _counted_calls(monkeypatch, model) as calls:
            model.training_step(*make_views(STAGE2), STAGE2)
        assert calls == {"pseudo denoising": 1, "labeled denoising": 1}
        with _counted_calls(monkeypatch, model) as calls:
            model.training_step(*make_views(STAGE1), STAGE1)
        once = ("RoI features", "projector", "costs", "gather", "mixture", "consistency", "teacher queries", "student queries")
        assert calls == {**dict.fromkeys(once, 1), "labeled denoising": 1}

    def test_no_gradient_reaches_the_projector_in_stage_two(self) -> None:
        model = make_model()
        model.training_step(*make_views(STAGE2), STAGE2).loss.backward()
        assert all(p.grad is None for p in model.trainable.parameters())
        model.training_step(*make_views(STAGE1), STAGE1).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trainable.parameters())
        assert sum(float(p.grad.abs().sum()) for p in model.trainable.parameters()) > 0  # type: ignore[union-attr]


@contextlib.contextmanager
def _counted_calls(monkeypatch: pytest.MonkeyPatch, model: SemiSupervisedDetector) -> Iterator[Counter[str]]:
    """Counts the calls of all parts that only one stage needs."""
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str, label: str) -> None:
        function = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls[label] += 1
            return function(*args, **kwargs)

        patch.setattr(owner, name, wrapper)

    denoise = branches.DetectionLosses.denoise
    with monkeypatch.context() as patch:
        count(consistency, "roi_features", "RoI features")
        count(consistency, "consistency_loss", "consistency")
        count(mining, "match", "costs")
        count(mining.CostMiner, "_pool", "gather")
        count(mining, "gmm_threshold", "mixture")
        count(model.trainable.projector, "forward", "projector")
        for name, detector in (("student", model.student), ("teacher", model.teacher)):
            _count_box_queries(patch, detector.network, f"{name} queries", calls)
        patch.setattr(
            branches.DetectionLosses,
            "denoise",
            lambda self, detector, targets, purpose: calls.update([f"{purpose} denoising"]) or denoise(self, detector, targets, purpose),
        )
        yield calls


def _count_box_queries(patch: pytest.MonkeyPatch, network: Any, label: str, calls: Counter[str]) -> None:
    """Queries at boxes, but not those that denoising makes by the same function."""
    function = network.box_queries

    def wrapper(content: Tensor, boxes: Tensor) -> Any:
        return function(content, boxes)

    def counted(content: Tensor, boxes: Tensor) -> Any:
        calls[label] += 1
        return function(content, boxes)

    labels = network.label_queries

    def label_queries(*args: Tensor) -> Any:
        network.box_queries = wrapper
        result = labels(*args)
        network.box_queries = counted
        return result

    patch.setattr(network, "box_queries", counted)
    patch.setattr(network, "label_queries", label_queries)


class TestResume:
    @pytest.mark.parametrize("at", [1, 2, 3])
    def test_is_exact_on_both_sides_of_the_switch(self, at: int) -> None:
        whole = make_model(switch_at=2, dtype=torch.float32)
        train(whole, optimizer := optimizer_of(whole), range(at))
        file = io.BytesIO()
        torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
        train(whole, optimizer, range(at, 5))

        file.seek(0)
        state = torch.load(file)
        resumed = make_model(switch_at=2, dtype=torch.float32, net_seed=9)
        resumed.load_state_dict(state["model"])
        optimizer = optimizer_of(resumed)
        optimizer.load_state_dict(state["optimizer"])
        train(resumed, optimizer, range(at, 5))
        expected = whole.state_dict()
        assert {"student", "teacher", "trainable"} <= {key.split(".")[0] for key in expected}
        for key, value in resumed.state_dict().items():
            assert torch.equal(value, expected[key]) if isinstance(value, Tensor) else value == expected[key]

    def test_the_average_is_in_the_checkpoint(self) -> None:
        model = make_model(switch_at=2, dtype=torch.float32)
        train(model, optimizer_of(model), range(2))
        assert model.ema is not None
        other = copy.deepcopy(make_model(switch_at=2, dtype=torch.float32))
        other.load_state_dict(model.state_dict())
        assert other.ema is not None
        assert other.ema.updates == model.ema.updates == 2


class TestTeacher:
    def test_follows_as_published(self) -> None:
        """Before iteration it, the teacher keeps the share min(.999, 1 - 1 / (it + 1)) of itself."""
        model = make_model(dtype=torch.float32)
        for it, alpha in ((1, 0.5), (9, 0.9), (998, 998 / 999), (999, 0.999), (5000, 0.999)):
            with torch.no_grad():
                for p in model.student.parameters():
                    p.fill_(1.0)
                for p in model.teacher.parameters():
                    p.fill_(0.0)
            model.update_teacher(it - 1)
            p = next(iter(model.teacher.parameters()))
            torch.testing.assert_close(1 - p, torch.full_like(p, alpha), rtol=1e-5, atol=1e-6)

    def test_predicts_with_suppression_in_stage_one_alone(self) -> None:
        model = make_model(dtype=torch.float32, eval_nms_thr=0.55)
        for step, expected in ((STAGE1, 0.55), (9, 0.55), (10, None), (STAGE2, None)):
            model.training_step(*make_views(step), step)
            assert model.student.nms_thr == model.teacher.nms_thr == expected
            assert model.student.build_options["nms_thr"] == expected
