"""detrex, by a stand-in with its published surface."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
from dropin_cases import OurOps, assert_same, gradients, level_tensors, perturb, samples

from ssod_fast.dropin import UnknownSurface, detrex, install_as

NAME = "detrex.layers.multi_scale_deform_attn"

pytestmark = pytest.mark.usefixtures("standins")


def check_module(attention_class: type) -> None:
    """The attention module equals itself built on the composition."""
    from standin_attention import compose

    torch.manual_seed(0)
    sizes, start = level_tensors()
    attention = attention_class(32, 4, 3, 2, dropout=0.0, batch_first=True)
    perturb(attention)
    query, tokens = torch.randn(2, 6, 32, requires_grad=True), torch.randn(2, 51, 32, requires_grad=True)
    points = torch.rand(2, 6, 3, 2)

    def run() -> torch.Tensor:
        return attention(query, value=tokens, reference_points=points, spatial_shapes=sizes, level_start_index=start)

    def composed() -> torch.Tensor:
        attended = compose(attention.heads_of(tokens, None), sizes, *attention.sample(query, points, sizes))
        return attention.output_proj(attended) + query

    leaves = query, tokens, *attention.parameters()
    with OurOps() as ops:
        actual = gradients(run, *leaves)
    assert ops.names == ["ms_deform_attn", "ms_deform_attn_backward"]
    assert_same(actual, gradients(composed, *leaves))


def check_function(module: ModuleType) -> None:
    leaves = samples()
    sizes, start = level_tensors()
    expected = gradients(lambda: module.multi_scale_deformable_attn_pytorch(leaves[0], sizes, *leaves[1:]), *leaves)
    assert_same(
        gradients(lambda: module.MultiScaleDeformableAttnFunction.apply(leaves[0], sizes, start, *leaves[1:], 64), *leaves), expected
    )


def test_extension_before_the_import() -> None:
    with install_as("detrex._C"):
        module = importlib.import_module(NAME)
        check_function(module)
        with detrex.patch() as patched:
            assert f"{NAME}.MultiScaleDeformableAttention" not in patched.places  # it is the real one already
            check_module(module.MultiScaleDeformableAttention)


def test_patch_after_an_import_that_missed_the_extension() -> None:
    module = importlib.import_module(NAME)
    layers = sys.modules["detrex.layers"]
    dummy = layers.MultiScaleDeformableAttention
    with pytest.raises(ImportError, match=r"Cannot import 'detrex\._C'"):
        dummy()
    with detrex.patch() as patched:
        assert {f"{m}.MultiScaleDeformableAttention" for m in (NAME, "detrex.layers")} < set(patched.places)
        assert patched.count == len(set(patched.places)) == 9
        assert layers.MultiScaleDeformableAttention is module.MultiScaleDeformableAttention is not dummy
        check_module(layers.MultiScaleDeformableAttention)
        check_function(module)
        assert set(detrex.patch().places) <= set(patched.places)
    assert layers.MultiScaleDeformableAttention is module.MultiScaleDeformableAttention is dummy
    assert "detrex._C" not in sys.modules
    assert not hasattr(module, "_C")


def test_unpatch() -> None:
    importlib.import_module(NAME)
    detrex.patch()
    assert detrex.unpatch() > 0
    assert detrex.unpatch() == 0


def test_shim_after_the_import_serves_the_function_alone() -> None:
    module = importlib.import_module(NAME)
    with install_as("detrex._C") as patched:
        assert f"{NAME}._C" in patched.places
        check_function(module)


def test_unknown_version_is_refused() -> None:
    module = importlib.import_module(NAME)
    module.MultiScaleDeformableAttnFunction.forward = staticmethod(lambda ctx, value, locations: value)
    with pytest.raises(UnknownSurface, match=r"forward takes \(ctx, value, locations\), expected \(ctx, value, value_spatial_shapes,"):
        detrex.patch()
    assert "detrex._C" not in sys.modules


def test_missing_package_is_named() -> None:
    sys.path.pop(0)
    with pytest.raises(ImportError, match="install detrex from its repository"):
        detrex.patch()
