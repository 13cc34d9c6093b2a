"""MSDeformAttn of the real RF-DETR, where that package is at hand, and of a stand-in for the Deformable DETR family."""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deform_cases import DEVICES
from dropin_cases import CLOSE, SHAPES, OurOps, assert_same, gradients, level_tensors, perturb
from no_sync import no_sync
from torch import Tensor, nn

from ssod_fast.dropin import NothingPatched, UnknownSurface, rfdetr


@pytest.fixture
def real(peers: Path, bare_package: Callable[[str, Path], None]) -> Any:
    """RF-DETR's class; the package's own __init__ wants more dependencies than attention needs."""
    if not (peers / "rfdetr").is_dir():
        pytest.skip("rfdetr is not in .peers")
    for name in ("rfdetr", "rfdetr.models", "rfdetr.utilities"):
        bare_package(name, peers / name.replace(".", "/"))
    return importlib.import_module("rfdetr.models.ops.modules.ms_deform_attn").MSDeformAttn


@pytest.fixture(params=["real", "standin"])
def attention_class(request: pytest.FixtureRequest, standins: None) -> Any:
    if request.param == "real":
        return request.getfixturevalue("real")
    return importlib.import_module("standin_ms_deform_attn").MSDeformAttn


class Layer(nn.Module):
    """What contains the attention."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.cross_attn = attention

    def forward(self, *args: Any, **named: Any) -> Tensor:
        return self.cross_attn(*args, **named)


def make(attention_class: Any) -> Layer:
    torch.manual_seed(0)
    layer = Layer(attention_class(32, 3, 4, 2))
    perturb(layer)
    return layer


def inputs(numbers: int = 4, levels: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    query, tokens = (torch.randn(2, n, 32, generator=generator).requires_grad_() for n in (6, 51))
    points = torch.rand(2, 6, levels, numbers, generator=generator).requires_grad_()
    return query, points, tokens, *level_tensors(), torch.rand(2, 51, generator=generator) < 0.2


@pytest.mark.parametrize(("numbers", "levels"), [(2, 3), (4, 3), (4, 1)])
def test_output_and_gradients_before_and_after(attention_class: Any, numbers: int, levels: int) -> None:
    layer, args = make(attention_class), inputs(numbers, levels)
    leaves = *args[:3], *layer.parameters()
    before, state = gradients(lambda: layer(*args), *leaves), list(layer.state_dict())
    with rfdetr.patch(layer) as patched, OurOps() as ops:
        assert patched.places == ("cross_attn.forward",)
        assert_same(gradients(lambda: layer(*args), *leaves), before)
        assert list(layer.state_dict()) == state
    assert ops.names == ["ms_deform_attn_fused", "ms_deform_attn_fused_backward"]
    with OurOps() as ops:
        assert_same(gradients(lambda: layer(*args), *leaves), before)
    assert ops.names == []


def test_decoder_of_the_package(real: Any) -> None:
    transformer_class = importlib.import_module("rfdetr.models.transformer").Transformer
    torch.manual_seed(0)
    model = transformer_class(
        32, 4, 4, 6, 2, 48, return_intermediate_dec=True, num_feature_levels=2, dec_n_points=2, bbox_reparam=True, lite_refpoint_refine=True
    )
    perturb(model)
    sizes = [(5, 7), (3, 4)]
    maps, positions = ([torch.randn(2, 32, h, w, requires_grad=True) for h, w in sizes] for _ in range(2))
    masks = [torch.rand(2, h, w) < 0.2 for h, w in sizes]
    boxes, queries = torch.rand(6, 4), torch.randn(6, 32, requires_grad=True)
    leaves = *maps, queries, *model.parameters()

    def run() -> Tensor:
        return model(maps, masks, positions, boxes, queries)[0]

    before = gradients(run, *leaves)
    with rfdetr.patch(model) as patched, OurOps() as ops:
        assert patched.places == tuple(f"decoder.layers.{i}.cross_attn.forward" for i in range(2))
        assert_same(gradients(run, *leaves), before)
    assert ops.names == ["ms_deform_attn_fused"] * 2 + ["ms_deform_attn_fused_backward"] * 2


def test_sizes_on_the_host(real: Any) -> None:
    layer, args = make(real), inputs()
    expected = layer(*args)
    with rfdetr.patch(layer):
        torch.testing.assert_close(layer(*args, input_spatial_shapes_hw=list(SHAPES)), expected, **CLOSE)
        with pytest.raises(ValueError, match="spatial_shapes"):
            layer(*args, input_spatial_shapes_hw=[(5, 7), (3, 4), (2, 3)])


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_waits_for_the_device(attention_class: Any, device: str) -> None:
    layer, args = make(attention_class).to(device), [t.detach().to(device) for t in inputs()]
    with rfdetr.patch(layer), no_sync():
        layer(*args).sum().backward()


def test_export_mode_goes_through_the_original(real: Any) -> None:
    layer, args = make(real), inputs(levels=1)
    expected = layer(*args)
    with rfdetr.patch(layer):
        exported = torch.export.export(layer, args, {"input_spatial_shapes_hw": list(SHAPES)})
        layer.cross_attn.export()
        with OurOps() as ops:
            torch.testing.assert_close(layer(*args, input_spatial_shapes_hw=list(SHAPES)), expected, **CLOSE)
    assert ops.names == []
    assert "ssod_fast" not in str(exported.graph)


def test_compile_has_no_graph_break(attention_class: Any) -> None:
    layer, args = make(attention_class), inputs()
    leaves = *args[:3], *layer.parameters()
    before = gradients(lambda: layer(*args), *leaves)
    with rfdetr.patch(layer):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with OurOps() as ops:
            assert_same(gradients(lambda: compiled(*args), *leaves), before)
    assert ops.names == ["ms_deform_attn_fused", "ms_deform_attn_fused_backward"]


def test_copies_and_pickles_keep_the_patch_and_their_own_parameters(standins: None) -> None:
    layer, args = make(importlib.import_module("standin_ms_deform_attn").MSDeformAttn), inputs()
    rfdetr.patch(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for clone in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        nn.init.zeros_(clone.cross_attn.output_proj.weight)
        nn.init.ones_(clone.cross_attn.output_proj.bias)
        with OurOps() as ops:
            assert (clone(*args) == 1).all()
        assert ops.names == ["ms_deform_attn_fused"]
        assert rfdetr.unpatch(clone) == 1
        with OurOps() as ops:
            assert (clone(*args) == 1).all()
        assert ops.names == []
    assert rfdetr.unpatch(layer) == 1
    assert rfdetr.unpatch(layer) == 0


def test_patching_twice_changes_nothing(attention_class: Any) -> None:
    layer = make(attention_class)
    first = rfdetr.patch(layer)
    forward = layer.cross_attn.forward
    assert rfdetr.patch(layer).places == first.places
    with pytest.raises(ValueError, match=r"cross_attn\.forward is patched with deterministic=None, .*=True does not change"):
        rfdetr.patch(layer, deterministic=True)
    assert layer.cross_attn.forward is forward


@pytest.mark.parametrize("given", [False, True])
def test_deterministic_reaches_the_op(attention_class: Any, given: bool) -> None:
    layer = make(attention_class)
    with rfdetr.patch(layer, deterministic=given), OurOps() as ops:
        layer(*inputs()).sum().backward()
    assert ops.deterministic == [given]


def test_autocast(attention_class: Any) -> None:
    layer, args = make(attention_class), inputs()
    expected = layer(*args)
    with rfdetr.patch(layer), torch.autocast("cpu", torch.bfloat16):
        actual = layer(*args)
    assert actual.dtype is torch.bfloat16
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()


def test_wrappers_of_the_package(attention_class: Any) -> None:
    layer = make(attention_class)
    wrapped = SimpleNamespace(model=SimpleNamespace(model=layer))
    assert rfdetr.patch(wrapped).count == 1
    assert rfdetr.unpatch(wrapped) == 1
    with pytest.raises(TypeError, match=r"model must be a torch module or hold one as \.model or \.model\.model, got Simple"):
        rfdetr.patch(SimpleNamespace(model=3))


def test_refusals(attention_class: Any) -> None:
    with pytest.raises(NothingPatched, match="Linear has no module MSDeformAttn"):
        rfdetr.patch(nn.Linear(2, 2))
    good = make(attention_class)

    class MSDeformAttn(nn.Module):
        def __init__(self, d_model: int, n_levels: int, n_heads: int, n_points: int, use_4D_normalizer: bool = False) -> None:
            super().__init__()

    with pytest.raises(UnknownSurface, match=r"takes \(d_model, .*, use_4D_normalizer\), expected \(d_model, n_levels, n_heads,"):
        rfdetr.patch(nn.ModuleList([good, MSDeformAttn(1, 1, 1, 1)]))
    assert "forward" not in vars(good.cross_attn)

    class Renamed(attention_class):
        def forward(self, query: Tensor, refer_bbox: Tensor, value: Tensor) -> Tensor:
            return query

    Renamed.__name__ = "MSDeformAttn"
    with pytest.raises(UnknownSurface, match=r"forward takes \(self, query, refer_bbox, value\), expected \(self, query,"):
        rfdetr.patch(Renamed(32, 3, 4, 2))
