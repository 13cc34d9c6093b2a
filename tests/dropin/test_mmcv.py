"""mmcv, by a stand-in with its published surface."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from dropin_cases import OurOps, assert_same, gradients, level_tensors, perturb, samples
from torch import Tensor

from ssod_fast.dropin import UnknownSurface, install_as, mmcv

NAME = "mmcv.ops.multi_scale_deform_attn"


def compiled(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An extension as picky as mmcv's, whose backward fills tensors."""
    from standin_attention import compiled_backward, compiled_forward

    def backward(*args: Any, im2col_step: int) -> None:
        for target, grad in zip(args[6:], compiled_backward(*args[:6], im2col_step), strict=True):
            target.add_(grad)

    extension = ModuleType("mmcv._ext")
    extension.ms_deform_attn_forward = compiled_forward
    extension.ms_deform_attn_backward = backward
    extension.nms = extension.roi_align_forward = lambda *_: None
    monkeypatch.setitem(sys.modules, "mmcv._ext", extension)
    return extension


@pytest.fixture
def module(standins: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    compiled(monkeypatch)
    return importlib.import_module(NAME)


def call(module: ModuleType, leaves: tuple[Tensor, ...]) -> Tensor:
    value, locations, weights = leaves
    return module.MultiScaleDeformableAttnFunction.apply(value, *level_tensors(), locations, weights, 64)


def test_function_and_composition_before_and_after(module: ModuleType) -> None:
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction as by_name

    torch.manual_seed(0)
    leaves = samples()
    value, locations, weights = leaves
    sizes, start = level_tensors()
    compose = lambda: module.multi_scale_deformable_attn_pytorch(value, sizes, locations, weights)  # noqa: E731
    before = gradients(lambda: call(module, leaves), *leaves), gradients(compose, *leaves)
    with mmcv.patch() as patched, OurOps() as ops:
        assert patched.count == 5
        assert_same(gradients(lambda: call(module, leaves), *leaves), before[0])
        assert_same(gradients(lambda: by_name.apply(value, sizes, start, locations, weights, 64), *leaves), before[0])
        assert_same(gradients(compose, *leaves), before[1])
    assert ops.names == ["ms_deform_attn", "ms_deform_attn_backward"] * 3
    with OurOps() as ops:
        assert_same(gradients(compose, *leaves), before[1])
        assert_same(gradients(lambda: call(module, leaves), *leaves), before[0])
    assert ops.names == []


def test_module_keeps_its_state_and_results(module: ModuleType) -> None:
    torch.manual_seed(0)
    sizes, start = level_tensors()
    attention = module.MultiScaleDeformableAttention(32, 4, 3, 2, dropout=0.0)
    perturb(attention)
    query, tokens = torch.randn(6, 2, 32, requires_grad=True), torch.randn(51, 2, 32, requires_grad=True)
    points, padding = torch.rand(2, 6, 3, 4), torch.rand(2, 51) < 0.2
    named = {"reference_points": points, "spatial_shapes": sizes, "level_start_index": start, "key_padding_mask": padding}
    leaves = query, tokens, *attention.parameters()
    before, state = gradients(lambda: attention(query, value=tokens, **named), *leaves), list(attention.state_dict())
    with mmcv.patch(), OurOps() as ops:
        assert_same(gradients(lambda: attention(query, value=tokens, **named), *leaves), before)
        assert list(attention.state_dict()) == state
    assert ops.names == ["ms_deform_attn", "ms_deform_attn_backward"]


@pytest.mark.gpu
def test_module_on_a_gpu_calls_the_function(module: ModuleType) -> None:
    torch.manual_seed(0)
    attention = module.MultiScaleDeformableAttention(32, 4, 3, 2, dropout=0.0)
    perturb(attention)
    query, tokens, points = torch.randn(6, 2, 32), torch.randn(51, 2, 32), torch.rand(2, 6, 3, 4)
    outputs = []
    for device in ("cpu", "cuda"):
        sizes, start = level_tensors(device)
        named = {"reference_points": points.to(device), "spatial_shapes": sizes, "level_start_index": start}
        with mmcv.patch(), OurOps() as ops:
            outputs.append(attention.to(device)(query.to(device), value=tokens.to(device), **named).cpu())
        assert ops.names == ["ms_deform_attn"]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


def test_what_the_compiled_kernel_refuses_works(module: ModuleType) -> None:
    leaves = samples(batch=65)
    with pytest.raises(RuntimeError, match="refuses"):
        call(module, leaves)
    halves = leaves[0].bfloat16(), *leaves[1:]
    with mmcv.patch():
        assert call(module, leaves).shape == (65, 6, 32)
        mixed = call(module, halves)
        exact = call(module, tuple(t.double() for t in (halves[0], *leaves[1:])))
    assert mixed.dtype is torch.bfloat16
    torch.testing.assert_close(mixed.double(), exact, atol=2**-8, rtol=2**-8)  # locations were not rounded to bfloat16


def test_extension_fills_tensors_of_its_caller(module: ModuleType) -> None:
    extension = sys.modules["mmcv._ext"]
    torch.manual_seed(0)
    value, locations, weights = leaves = samples()
    sizes, start = level_tensors()
    grad = torch.randn(2, 6, 32)
    targets = torch.ones_like(value), torch.ones_like(locations), torch.ones_like(weights)
    named = {
        "value": value,
        "value_spatial_shapes": sizes,
        "value_level_start_index": start,
        "sampling_locations": locations,
        "attention_weights": weights,
        "im2col_step": 64,
    }
    with mmcv.patch():
        out = extension.ms_deform_attn_forward(**named)
        names = "grad_value", "grad_sampling_loc", "grad_attn_weight"
        result = extension.ms_deform_attn_backward(**named, grad_output=grad, **dict(zip(names, targets, strict=True)))
    assert result is None
    expected = torch.autograd.grad(module.multi_scale_deformable_attn_pytorch(value, sizes, locations, weights), leaves, grad)
    assert_same(targets, (1 + expected[0], *expected[1:]))  # value gradients are added, as mmcv's atomics do; the others are written
    assert out.shape == (2, 6, 32)


def test_patching_twice_and_unpatching_twice(module: ModuleType) -> None:
    function = module.MultiScaleDeformableAttnFunction
    before = vars(function)["forward"], vars(function)["backward"], module.multi_scale_deformable_attn_pytorch
    places = mmcv.patch().places
    forward = vars(function)["forward"]
    assert mmcv.patch().places == places
    assert vars(function)["forward"] is forward
    assert mmcv.unpatch() == 5
    assert mmcv.unpatch() == 0
    assert (vars(function)["forward"], vars(function)["backward"], module.multi_scale_deformable_attn_pytorch) == before


def test_copies_of_the_composition_are_replaced_too(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    user = ModuleType("projects.bevformer.decoder")
    user.multi_scale_deformable_attn_pytorch = theirs = module.multi_scale_deformable_attn_pytorch
    monkeypatch.setitem(sys.modules, user.__name__, user)
    with mmcv.patch() as patched:
        assert "projects.bevformer.decoder.multi_scale_deformable_attn_pytorch" in patched.places
        assert user.multi_scale_deformable_attn_pytorch is module.multi_scale_deformable_attn_pytorch is not theirs
    assert user.multi_scale_deformable_attn_pytorch is theirs


@pytest.mark.parametrize("given", [False, True])
def test_deterministic_reaches_the_op(module: ModuleType, given: bool) -> None:
    leaves = samples()
    with mmcv.patch(deterministic=given), OurOps() as ops:
        call(module, leaves).sum().backward()
        module.multi_scale_deformable_attn_pytorch(leaves[0], level_tensors()[0], *leaves[1:]).sum().backward()
    assert ops.deterministic == [given, given]


def test_unknown_version_is_refused_and_left_alone(module: ModuleType) -> None:
    theirs = module.multi_scale_deformable_attn_pytorch = lambda value, shapes, locations, weights, padding: value
    forward = vars(module.MultiScaleDeformableAttnFunction)["forward"]
    with pytest.raises(UnknownSurface, match=r"takes \(value, shapes, locations, weights, padding\), expected \(value, value_spatial"):
        mmcv.patch()
    assert vars(module.MultiScaleDeformableAttnFunction)["forward"] is forward
    assert module.multi_scale_deformable_attn_pytorch is theirs
    del module.MultiScaleDeformableAttnFunction
    with pytest.raises(UnknownSurface, match="has no MultiScaleDeformableAttnFunction"):
        mmcv.patch()
    module.MultiScaleDeformableAttnFunction = object
    with pytest.raises(UnknownSurface, match="must be an autograd function"):
        mmcv.patch()


def test_missing_package_is_named() -> None:
    with pytest.raises(ImportError, match=r'cannot be imported: install mmcv, or call ssod_fast\.dropin\.install_as\("mmcv\._ext"\)'):
        mmcv.patch()


def test_a_build_without_its_extension(standins: None) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"mmcv\._ext"):
        importlib.import_module("mmcv.ops")
    for name in [name for name in sys.modules if name.startswith("mmcv")]:
        del sys.modules[name]
    with install_as("mmcv._ext"):
        ops = importlib.import_module("mmcv.ops")
        leaves = samples()
        module = sys.modules[NAME]
        expected = gradients(lambda: module.multi_scale_deformable_attn_pytorch(leaves[0], level_tensors()[0], *leaves[1:]), *leaves)
        assert_same(gradients(lambda: call(module, leaves), *leaves), expected)
        with pytest.raises(NotImplementedError, match=r"mmcv\._ext\.nms is not there: ssod_fast stands in for mmcv\._ext"):
            ops._ext.nms(1, 2)
        assert mmcv.patch().count == 5
        mmcv.unpatch()


def test_compile_has_no_graph_break(module: ModuleType) -> None:
    leaves = samples()
    with mmcv.patch():
        torch._dynamo.reset()
        compose = torch.compile(module.multi_scale_deformable_attn_pytorch, fullgraph=True, backend="aot_eager")
        compiled_call = torch.compile(lambda: call(module, leaves), fullgraph=True, backend="aot_eager")
        expected = gradients(lambda: call(module, leaves), *leaves)
        with OurOps() as ops:
            assert_same(gradients(lambda: compose(leaves[0], level_tensors()[0], *leaves[1:]), *leaves), expected)
            assert_same(gradients(compiled_call, *leaves), expected)
        assert ops.names == ["ms_deform_attn", "ms_deform_attn_backward"] * 2
