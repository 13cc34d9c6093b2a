"""Every shortcut of the Semi-DETR step against the detour that it spares: equal losses, states and gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from semi_detr_models import gradients, make_detector, make_model, make_views
from semi_detr_oracle import LiteralStep, Slow, or_dummy
from torch import Tensor, nn

from ssod_fast.detectors.deformable_detr.denoising import denoising_blocked, make_denoising
from ssod_fast.detectors.deformable_detr.detector import join_queries
from ssod_fast.detectors.deformable_detr.stages import Decoded, LayerInput, Memory
from ssod_fast.methods import SemiDETR, SemiDETRConfig, SemiSupervisedDetector
from ssod_fast.methods.inputs import detector_batch
from ssod_fast.methods.semi_detr import branches
from ssod_fast.methods.semi_detr.branches import denoising_queries
from ssod_fast.methods.semi_detr.passes import Look, QueryGroups, decode_groups, look
from ssod_fast.structures import PaddedTargets, Target

FAMILIES = ["dino", "deformable_detr"]
STAGE1, STAGE2 = 3, 12  # iterations on both sides of switch_at = 10


def fast(model: SemiSupervisedDetector, step: int, unlabeled: int = 2) -> tuple[Any, dict[str, Tensor]]:
    """Output and gradients of the step itself."""
    out = model.training_step(*make_views(step, unlabeled), step)
    out.loss.backward()
    return out, gradients(model)


Slowly = tuple[LiteralStep, dict[str, Tensor], dict[str, Tensor]]


def slow(model: SemiSupervisedDetector, step: int, detours: Slow, unlabeled: int = 2) -> Slowly:
    """The oracle, its losses and its gradients."""
    oracle = LiteralStep(model, detours)
    terms = oracle(*make_views(step, unlabeled), step)
    torch.stack([term.double() for term in terms.values()]).sum().backward()
    return oracle, {name: term.detach() for name, term in terms.items()}, gradients(model)


@functools.cache
def usual(step: int) -> tuple[SemiSupervisedDetector, tuple[Any, dict[str, Tensor]]]:
    """The usual model after a step, which tests do not change."""
    model = make_model()
    return model, fast(model, step)


def assert_equal(ours: tuple[Any, dict[str, Tensor]], theirs: Slowly, tolerance: float = 1e-10) -> None:
    """Equal losses, those of weight 0 aside, and equal gradients of all parameters."""
    (out, found), (_, terms, expected) = ours, theirs
    for name, term in terms.items():
        torch.testing.assert_close(out.losses.get(name, torch.zeros(())), term.float(), rtol=max(tolerance, 1e-6), atol=1e-7)
    assert set(out.losses) <= set(terms)
    assert found.keys() == expected.keys()
    assert_close(found, expected, tolerance)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    scale = max(1.0, *(float(g.abs().max()) for g in expected.values()))
    for name, gradient in expected.items():
        assert found[name].isfinite().all()
        where = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * scale, msg=where)


@contextlib.contextmanager
def counted(**modules: nn.Module) -> Iterator[Counter[str]]:
    """Counts the forward calls of modules."""
    calls: Counter[str] = Counter()
    hooks = [module.register_forward_hook(lambda *_, name=name: calls.update([name])) for name, module in modules.items()]
    yield calls
    for hook in hooks:
        hook.remove()


def modules_of(model: SemiSupervisedDetector) -> dict[str, nn.Module]:
    found = {}
    for name, detector in (("teacher", model.teacher), ("student", model.student)):
        network = detector.network
        found |= {f"{name} backbone": network.backbone, f"{name} projection": network.projections[0], f"{name} encoder": network.encoder}
    return found


class TestWholeStep:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("step", [STAGE1, STAGE2])
    def test_equals_the_slow_step_with_the_same_solvers(self, family: str, step: int) -> None:
        model = make_model(family)
        assert_equal(fast(model, step), slow(model, step, Slow(solver="shipped")))

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("step", [STAGE1, STAGE2])
    def test_equals_the_slow_step_with_loops_and_scipy(self, family: str, step: int) -> None:
        # Assignments of several queries have weights of single precision, whatever the network has.
        model = make_model(family)
        assert_equal(fast(model, step), slow(model, step, Slow()), tolerance=2e-6)

    @pytest.mark.parametrize(
        ("step", "options"),
        [
            (STAGE1, {"content": "cross", "mask_group_padding": True}),
            (STAGE1, {"consistency_reduction": "weighted", "drop_degenerate": False}),
            (STAGE1, {"consistency_stages": (), "pseudo_denoising_stages": (1,)}),
            (STAGE2, {"consistency_stages": (1, 2), "pseudo_denoising_stages": (2,)}),
            (STAGE2, {"l1_weight": 5.0, "pseudo_denoising_stages": (), "unsup_weight": 2.0, "sup_weight": 3.0}),
        ],
    )
    def test_options(self, options: dict[str, Any], step: int) -> None:
        model = make_model(**options)
        assert_equal(fast(model, step), slow(model, step, Slow(solver="shipped")))

    def test_thresholds_and_the_rule_of_assignment(self) -> None:
        of_teacher = {"teacher_score_thr": 0.2, "teacher_nms_thr": 0.4, "teacher_topk": 12, "cls_pseudo_thr": 0.9}
        model = make_model(**of_teacher, o2m_topk=4, o2m_alpha=0.5, o2m_beta=2.0)
        assert_equal(fast(model, STAGE1), slow(model, STAGE1, Slow()), tolerance=2e-6)

    def test_float32(self) -> None:
        model = make_model(dtype=torch.float32)
        assert_equal(fast(model, STAGE1), slow(model, STAGE1, Slow(solver="shipped")), tolerance=1e-5)

    def test_the_models_have_boxes_of_all_kinds(self) -> None:
        """Else the tests of this file would compare zeros."""
        model = make_model()
        oracle, terms, _ = slow(model, STAGE1, Slow(solver="shipped"))
        chosen, targets = oracle.seen["pairs"], oracle.seen["targets"]
        assert all(len(labels) < int(pair.sum()) < len(pair) for (_, labels), pair in zip(targets, chosen, strict=True))
        assert all(len(labels) > 0 for _, labels in targets)
        assert len({int(pair.sum()) for pair in chosen}) > 1  # so that groups have padding
        assert terms["unsup/loss_consistency"] > 0

    @pytest.mark.parametrize("step", [STAGE1, STAGE2])
    def test_no_parameter_changes_within_a_step(self, step: int) -> None:
        model = make_model()
        parts = [model.student, model.teacher, model.trainable.projector]
        before = [p._version for part in parts for p in part.parameters()]
        fast(model, step)
        assert [p._version for part in parts for p in part.parameters()] == before


@pytest.mark.parametrize("step", [STAGE1, STAGE2])
@pytest.mark.parametrize(
    "detour",
    [{"backbone": True}, {"encoder": True}, {"joint": True}, {"groups": 5}, {"teacher_denoising": True}, {"dead_work": True}],
    ids=lambda detour: next(iter(detour)),
)
def test_each_detour_alone_changes_nothing(detour: dict[str, Any], step: int) -> None:
    model, ours = usual(step)
    assert_equal(ours, slow(model, step, dataclasses.replace(Slow.none(), **detour)))


class TestBackboneAndEncoderOnce:
    @pytest.mark.parametrize("step", [STAGE1, STAGE2])
    def test_counters(self, step: int) -> None:
        model = make_model()
        parts = ("backbone", "projection", "encoder")
        with counted(**modules_of(model)) as calls:
            fast(model, step)
        # The student has two sets of images: labelled ones and strong views.
        assert calls == {**{f"teacher {part}": 1 for part in parts}, **{f"student {part}": 2 for part in parts}}
        with counted(**modules_of(model)) as calls:
            slow(model, step, Slow(solver="shipped"))
        expected = {"teacher backbone": 3, "teacher projection": 3, "teacher encoder": 2}
        assert calls == {**expected, **{f"student {part}": 3 for part in parts}}

    def test_the_users_of_the_teachers_features_get_the_same_tensors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = make_model()
        encoded, decoded, pooled = [], [], []
        network, consistency = model.teacher.network, model.trainable
        encode, decode, content = network.encode, network.decode, consistency.content
        monkeypatch.setattr(network, "encode", lambda pyramid: encoded.append(pyramid.maps) or encode(pyramid))
        monkeypatch.setattr(network, "decode", lambda memory, *args, **kw: decoded.append(memory.tokens) or decode(memory, *args, **kw))
        monkeypatch.setattr(consistency, "content", lambda maps, *args: pooled.append(maps) or content(maps, *args))
        fast(model, STAGE1)
        assert len(encoded) == len(pooled) == 1
        assert all(a is b for a, b in zip(encoded[0], pooled[0], strict=True))
        assert len(decoded) == 2  # pseudo boxes and consistency
        assert decoded[0] is decoded[1]

    def test_costs_of_mining_are_those_of_a_pass_of_their_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = make_model()
        found = []
        monkeypatch.setattr(branches.UnsupervisedBranch, "_mine", _recording(branches.UnsupervisedBranch._mine, found))
        fast(model, STAGE1)
        oracle, _, _ = slow(model, STAGE1, Slow(solver="shipped"))
        ours, theirs = found[0].cost, oracle.seen["cost"]
        assert torch.equal(ours[:, : theirs.shape[1]], theirs)
        assert theirs.isfinite().sum() > 10


def _recording(method: Any, found: list[Any]) -> Any:
    def record(self: Any, *args: Any) -> Any:
        result = method(self, *args)
        found.append(self.mined)
        return result

    return record


class Scene:
    """A network, its memory and two further groups of queries, all with gradients."""

    def __init__(self, family: str, mask_padding: bool = False) -> None:
        self.detector = make_detector(family).double()
        self.network: Any = self.detector.network
        _, views = make_views(1)
        with torch.no_grad():
            memory = self.network.encode(self.network.extract(detector_batch(self.detector, views.strong)))
        self.tokens = memory.tokens.clone().requires_grad_()
        self.memory: Memory = dataclasses.replace(memory, tokens=self.tokens)
        generator = torch.Generator().manual_seed(0)
        self.boxes = torch.rand(2, 5, 4, generator=generator, dtype=torch.float64) * 0.5 + 0.25
        self.content = torch.randn(2, 5, 32, generator=generator, dtype=torch.float64, requires_grad=True)
        self.hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if mask_padding else None
        targets = [Target(boxes=self.boxes[b, : 2 + b].float(), labels=torch.arange(2 + b)) for b in range(2)]
        self.denoising = make_denoising(PaddedTargets.from_list(targets), 3, number=6, generator=generator)

    @property
    def parts(self) -> list[QueryGroups]:
        """Queries at boxes, and denoising queries where there are such."""
        parts = [QueryGroups(self.network.box_queries(self.content, self.boxes), [5], self.hidden)]
        return [*parts, denoising_queries(self.detector, self.denoising)] if self.detector.config.denoising else parts

    def split(self, detach: bool = False) -> list[Tensor]:
        """The others first, then matching queries: hidden states, logits and boxes of all layers."""
        queries, proposals = self.network.select(self.memory)
        found = self.network.decode(self.memory, queries, keep_inputs=True)
        if detach:
            inputs = tuple(LayerInput(given.state.detach(), given.position.detach()) for given in found.inputs)
            found = dataclasses.replace(found, inputs=inputs)
        extra = decode_groups(self.network, Look(None, self.memory, found, proposals), self.parts)  # type: ignore[arg-type]
        return _side_by_side([*extra, found])

    def joint(self) -> list[Tensor]:
        """All in one pass under a mask."""
        oracle = LiteralStep.__new__(LiteralStep)
        oracle.slow = Slow(joint=True)
        found, extra, _ = oracle._decode(self.network, self.memory, self.parts)
        return _side_by_side([*extra, found])

    def gradients(self, outputs: list[Tensor]) -> list[Tensor]:
        """Of a random sum of the outputs: for every parameter that takes part, the memory and the queries."""
        generator = torch.Generator().manual_seed(2)
        total = torch.stack([(o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs]).sum()
        wanted = [*(p for p in self.network.parameters() if p.requires_grad), self.tokens, self.content]
        found = torch.autograd.grad(total, wanted, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


def _side_by_side(results: list[Decoded]) -> list[Tensor]:
    return [torch.cat([getattr(r, name) for r in results], 2) for name in ("hidden", "logits", "boxes")]


class TestMatchingQueriesOnce:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("mask_padding", [False, True])
    def test_states_boxes_and_gradients_equal_joint_decoding(self, family: str, mask_padding: bool) -> None:
        scene = Scene(family, mask_padding)
        ours, theirs = scene.split(), scene.joint()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        for a, b in zip(scene.gradients(ours), scene.gradients(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    def test_the_kept_states_need_their_gradient(self) -> None:
        scene = Scene("dino")
        wrong, right = scene.gradients(scene.split(detach=True)), scene.gradients(scene.joint())
        assert max(float((a - b).abs().max()) for a, b in zip(wrong, right, strict=True)) > 1e-3

    @pytest.mark.parametrize("family", FAMILIES)
    def test_other_queries_do_not_touch_matching_ones(self, family: str) -> None:
        scene = Scene(family)
        first = scene.joint()
        with torch.no_grad():
            scene.content.mul_(-3).add_(1)
        second = scene.joint()
        assert not torch.equal(first[0][:, :, :5], second[0][:, :, :5])
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a[:, :, -20:], b[:, :, -20:])

    def test_denoising_queries_are_what_the_detector_makes_of_them(self) -> None:
        """The detector decodes them together with the matching queries, the method after them."""
        scene = Scene("dino")
        queries, _ = scene.network.select(scene.memory)
        part = denoising_queries(scene.detector, scene.denoising)
        blocked = denoising_blocked(scene.denoising, queries.content.shape[1])
        together = scene.network.decode(scene.memory, join_queries(part.queries, queries), blocked=blocked)
        apart = scene.split()[0][:, :, 5 : 5 + sum(part.sizes)]
        torch.testing.assert_close(together.hidden[:, :, : apart.shape[2]], apart, rtol=0, atol=1e-12)

    def test_dropout_is_refused(self) -> None:
        method = SemiDETR(SemiDETRConfig(switch_at=1))
        with pytest.raises(ValueError, match=r"dropout must be 0 for semi_detr, got 0\.1"):
            SemiSupervisedDetector(make_detector(dropout=0.1), method)


class TestOneGroup:
    """Consistency queries in one group per image against five copies."""

    @staticmethod
    def run(model: SemiSupervisedDetector, groups: int, counts: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients with `counts` boxes per image."""
        oracle = LiteralStep(model, dataclasses.replace(Slow.none(), groups=groups))
        _, views = make_views(2, len(counts))
        generator = torch.Generator().manual_seed(4)
        corner = [torch.rand(n, 2, generator=generator, dtype=torch.float64) * 20 for n in counts]
        boxes = [torch.cat([c, c + 8 + 20 * torch.rand(len(c), 2, generator=generator, dtype=torch.float64)], 1) for c in corner]
        weak, strong = detector_batch(model.teacher, views.weak), detector_batch(model.student, views.strong)
        with torch.no_grad():
            seen = look(model.teacher.network, weak, keep_inputs=True)
        own = look(model.student.network, strong, keep_inputs=True)
        content = oracle._content(seen.pyramid.maps, [or_dummy(b, hw) for b, hw in zip(boxes, weak.sizes, strict=True)])
        with torch.no_grad():
            (heard,) = decode_groups(model.teacher.network, seen, [oracle._box_queries(model.teacher, content, boxes, weak.sizes)])
        (found,) = decode_groups(model.student.network, own, [oracle._box_queries(model.student, content, boxes, strong.sizes)])
        loss = oracle._consistency(found, heard, [torch.ones(n, dtype=torch.bool) for n in counts])
        loss.backward()
        return loss.detach(), gradients(model)

    @pytest.mark.parametrize("counts", [[1, 1], [4, 3], [2, 0], [0, 7, 0]], ids=str)
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
    def test_equals_five(self, counts: list[int], dtype: torch.dtype, tolerance: float) -> None:
        self.compare(make_model(dtype=dtype), counts, tolerance)

    @pytest.mark.parametrize("counts", [[1], [0]], ids=str)
    def test_a_single_row(self, counts: list[int]) -> None:
        model = make_model()
        with torch.no_grad():  # away from 0, where normalised values of 0 would sit on the kink of the next ReLU
            for module in model.trainable.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    module.bias.uniform_(0.2, 0.5, generator=torch.Generator().manual_seed(1))
        self.compare(model, counts, 1e-10)

    def compare(self, model: SemiSupervisedDetector, counts: list[int], tolerance: float) -> None:
        loss, found = self.run(model, 1, counts)
        expected_loss, expected = self.run(model, 5, counts)
        assert (loss > 0) == (sum(counts) > 0)
        torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance)
        assert_close(found, expected, tolerance)
        if sum(counts):
            assert any(gradient.abs().max() > 0 for name, gradient in found.items() if name.startswith("projector"))


@pytest.mark.parametrize("joint", [False, True])
def test_denoising_queries_do_not_touch_the_teachers_states(joint: bool) -> None:
    model = make_model()
    states = []
    for teacher_denoising in (False, True):
        detours = dataclasses.replace(Slow.none(), joint=joint, teacher_denoising=teacher_denoising)
        oracle, _, _ = slow(model, STAGE1, detours)
        states.append(oracle.seen["teacher"].hidden)
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-12)
