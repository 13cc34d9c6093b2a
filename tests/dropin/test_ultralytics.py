"""The real RT-DETR decoder of ultralytics, where that package is at hand."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from dropin_cases import CLOSE, OurOps, assert_same, gradients, perturb
from torch import Tensor

from ssod_fast.dropin import UnknownSurface, ultralytics

NAME = "ultralytics.nn.modules.transformer"
SHAPES = [[4, 6], [2, 3]]


@pytest.fixture
def transformer(peers: Path) -> Iterator[ModuleType]:
    if not (peers / "ultralytics").is_dir():
        pytest.skip("ultralytics is not in .peers")
    yield importlib.import_module(NAME)
    ultralytics.unpatch()


def attention(transformer: ModuleType, boxes: int) -> tuple[Callable[[], Tensor], tuple[Tensor, ...], torch.nn.Module]:
    """A run of the module, the leaves it depends on, and the module."""
    torch.manual_seed(0)
    module = transformer.MSDeformAttn(32, 2, 4, 3)
    perturb(module)
    query, tokens = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 30, 32, requires_grad=True)
    points = torch.rand(2, 5, 1, boxes, requires_grad=True)
    padding = torch.rand(2, 30) < 0.2
    return lambda: module(query, points, tokens, SHAPES, padding), (query, tokens, points, *module.parameters()), module


@pytest.mark.parametrize("boxes", [2, 4])
def test_attention_module_before_and_after(transformer: ModuleType, boxes: int) -> None:
    run, leaves, module = attention(transformer, boxes)
    before, state = gradients(run, *leaves), list(module.state_dict())
    with ultralytics.patch() as patched, OurOps() as ops:
        assert {f"{NAME}.multi_scale_deformable_attn_pytorch", "ultralytics.nn.modules.utils.multi_scale_deformable_attn_pytorch"} == set(
            patched.places
        )
        assert_same(gradients(run, *leaves), before)
        assert list(module.state_dict()) == state
    assert ops.names == ["ms_deform_attn", "ms_deform_attn_backward"]
    with OurOps() as ops:
        assert_same(gradients(run, *leaves), before)
    assert ops.names == []


def test_detection_head_before_and_after(transformer: ModuleType) -> None:
    torch.manual_seed(0)
    head_class = importlib.import_module("ultralytics.nn.modules.head").RTDETRDecoder
    head = head_class(nc=3, ch=(16, 16), hd=32, nq=12, ndp=2, nh=4, ndl=2, d_ffn=32, nd=0)
    perturb(head)
    maps = [torch.randn(2, 16, h, w) for h, w in SHAPES]

    def run() -> Tensor:
        boxes, scores, *_ = head(list(maps), None)
        return torch.cat((boxes, scores), -1)

    leaves = [p for p in head.parameters() if p.requires_grad]
    before = gradients(run, *leaves)
    with torch.no_grad():
        detections = head.eval()(list(maps))[0]
    with ultralytics.patch(), OurOps() as ops:
        with torch.no_grad():
            torch.testing.assert_close(head(list(maps))[0], detections, **CLOSE)
        head.train()
        actual = gradients(run, *leaves)
    assert ops.names.count("ms_deform_attn") == 4
    assert_same(actual, before)


def test_patching_twice_and_unpatching_twice(transformer: ModuleType) -> None:
    theirs = transformer.multi_scale_deformable_attn_pytorch
    assert ultralytics.patch().places == ultralytics.patch().places
    assert transformer.multi_scale_deformable_attn_pytorch.__doc__ == theirs.__doc__
    assert ultralytics.unpatch() == 2
    assert ultralytics.unpatch() == 0
    assert transformer.multi_scale_deformable_attn_pytorch is theirs


def test_deterministic_reaches_the_op(transformer: ModuleType) -> None:
    run, _, module = attention(transformer, 4)
    with ultralytics.patch(deterministic=True), OurOps() as ops:
        run().sum().backward()
    assert ops.deterministic == [True]
    assert copy.deepcopy(module).state_dict().keys() == module.state_dict().keys()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
def test_compile_has_no_graph_break_and_exports_hold_no_op_of_ours(transformer: ModuleType) -> None:
    run, leaves, module = attention(transformer, 4)
    query, tokens, points = (t.detach() for t in leaves[:3])
    with ultralytics.patch(), torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with OurOps() as ops:
            actual = compiled(query, points, tokens, SHAPES)
        assert ops.names == ["ms_deform_attn"]
        torch.testing.assert_close(actual, module(query, points, tokens, SHAPES), **CLOSE)
        exported = torch.export.export(module, (query, points, tokens, SHAPES))
        traced = torch.jit.trace(module, (query, points, tokens, torch.tensor(SHAPES)))
    assert "ssod_fast" not in str(exported.graph)
    assert "grid_sampler" in str(exported.graph)
    assert "ssod_fast" not in str(traced.inlined_graph)
    assert run().shape == (2, 5, 32)


def test_unknown_version_is_refused(transformer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "multi_scale_deformable_attn_pytorch", lambda value, shapes: value)
    with pytest.raises(UnknownSurface, match=r"takes \(value, shapes\), expected \(value, value_spatial_shapes, sampling_locations,"):
        ultralytics.patch()
    monkeypatch.delattr(transformer, "multi_scale_deformable_attn_pytorch")
    with pytest.raises(UnknownSurface, match=r"ultralytics\.nn\.modules\.transformer has no multi_scale_deformable_attn_pytorch"):
        ultralytics.patch()
    monkeypatch.undo()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, NAME, None)
    with pytest.raises(ImportError, match="cannot be imported: install ultralytics"):
        ultralytics.patch()
