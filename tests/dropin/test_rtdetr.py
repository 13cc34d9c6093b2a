"""Decoders of RT-DETR v1 and v2, D-FINE and DEIM, by stand-ins with their published surface."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deform_cases import DEVICES
from dropin_cases import CLOSE, OurOps, assert_same, gradients, perturb
from no_sync import no_sync
from torch import Tensor, nn

from ssod_fast.dropin import NothingPatched, UnknownSurface, rtdetr

SHAPES = [[4, 7], [3, 4], [2, 2]]
TALL = [[7, 4], [4, 3], [2, 2]]
REPOSITORIES = ["rtdetr v2", "dfine", "deim dfine", "deim rtdetr"]
SPLITTING = ("dfine", "deim dfine")

pytestmark = pytest.mark.usefixtures("standins")


def make(repository: str, method: str = "default") -> nn.Module:
    torch.manual_seed(0)
    model = importlib.import_module("standin_rtdetr").decoder(repository, method)
    perturb(model)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    query, memory = (torch.randn(2, n, 32, generator=generator).requires_grad_() for n in (5, 44))
    return query, torch.rand(2, 5, 4, generator=generator) * 1.2, memory


def trained(model: nn.Module, *leaves: Tensor) -> tuple[Tensor, ...]:
    return *leaves, *(p for p in model.parameters() if p.requires_grad)


def run(model: nn.Module, shapes: Any = SHAPES) -> tuple[Tensor | None, ...]:
    """Output and gradients of queries, memory and parameters."""
    query, boxes, memory = inputs()
    return gradients(lambda: model(query, boxes, memory, shapes), *trained(model, query, memory))


@pytest.mark.parametrize(("repository", "method"), [("rtdetr v1", "default"), *itertools.product(REPOSITORIES, ["default", "discrete"])])
def test_outputs_and_gradients_before_and_after(repository: str, method: str) -> None:
    model = make(repository, method)
    before, state = run(model), list(model.state_dict())
    with rtdetr.patch(model) as patched, OurOps() as ops:
        cores = tuple(f"layers.{i}.ms_deformable_attn_core" for i in range(2))
        assert patched.places == (*cores, "SplittingDecoder.value_op") if repository in SPLITTING else cores
        assert_same(run(model), before)
        assert list(model.state_dict()) == state
    assert ops.names == ["ms_deform_attn"] * 2 + ["ms_deform_attn_backward"] * 2
    with OurOps() as ops:
        assert_same(run(model), before)
    assert ops.names == []


def test_levels_are_joined_once_per_forward_not_once_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make("dfine"), []
    tokens = rtdetr._tokens
    monkeypatch.setattr(rtdetr, "_tokens", lambda value: seen.append(type(value).__name__) or tokens(value))
    with rtdetr.patch(model):
        run(model)
    assert seen == ["tuple", "Tensor", "Tensor"]


def test_lists_are_taken_without_a_decoder_that_makes_them() -> None:
    model = make("dfine")
    layer, (query, boxes, memory) = model.layers[0], inputs()
    levels = list(model.value_op(memory, None, None, None, SHAPES))
    expected = layer(query, boxes.unsqueeze(2), levels, SHAPES)
    with rtdetr.patch(layer) as patched:
        assert patched.places == ("ms_deformable_attn_core",)
        torch.testing.assert_close(layer(query, boxes.unsqueeze(2), levels, SHAPES), expected, **CLOSE)


def test_square_clamp_is_the_originals_and_can_be_switched_off() -> None:
    model = make("rtdetr v2", "discrete")
    expected = run(model)[0]
    with rtdetr.patch(model, upstream_square_clamp=False):
        assert not torch.allclose(run(model)[0], expected)
    core = model.layers[0].ms_deformable_attn_core
    value = torch.arange(8.0).view(1, 8, 1, 1)  # 2 x 4
    locations = torch.tensor([[0.5, 0.5], [1, 1], [-0.3, 0.1], [0.37, 0.74], [0.375, 0.75]]).view(1, 5, 1, 1, 2)
    arguments = value, [[2, 4]], locations, torch.ones(1, 5, 1, 1), [1]
    assert core(*arguments).flatten().tolist() == [5, 5, 0, 5, 5]  # (1, 1) (1, 1) (0, 0) (1, 1) (1, 1)
    with rtdetr.patch(model):
        assert model.layers[0].ms_deformable_attn_core(*arguments).flatten().tolist() == [5, 5, 0, 5, 5]
    with rtdetr.patch(model, upstream_square_clamp=False):
        assert model.layers[0].ms_deformable_attn_core(*arguments).flatten().tolist() == [6, 7, 0, 5, 6]


def test_maps_higher_than_wide_where_the_original_fails() -> None:
    model = make("rtdetr v2", "discrete")
    with pytest.raises(IndexError):
        run(model, TALL)
    with rtdetr.patch(model):
        clamped = run(model, TALL)
    with rtdetr.patch(model, upstream_square_clamp=False):
        assert_same(run(model, TALL), clamped)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_waits_for_the_device(device: str) -> None:
    for repository, method in (("rtdetr v2", "discrete"), ("dfine", "default")):
        model, (query, boxes, memory) = make(repository, method).to(device), (t.detach().to(device) for t in inputs())
        with rtdetr.patch(model), no_sync():
            model(query, boxes, memory, SHAPES).sum().backward()


def test_copies_and_pickles_keep_the_patch_and_their_own_parameters() -> None:
    model, (query, boxes, memory) = make("dfine"), inputs()
    rtdetr.patch(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for clone in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        nn.init.zeros_(clone.project.weight)
        nn.init.zeros_(clone.project.bias)
        with OurOps() as ops:
            torch.testing.assert_close(clone(query, boxes, memory, SHAPES), query, atol=0, rtol=0)
        assert ops.names == ["ms_deform_attn"] * 2
        assert rtdetr.unpatch(clone) == 3
        assert isinstance(clone.value_op(memory, None, None, None, SHAPES), tuple)
    assert rtdetr.unpatch(model) == 3
    assert rtdetr.unpatch(model) == 0


def test_patching_twice_changes_nothing() -> None:
    model = make("deim dfine")
    first = rtdetr.patch(model)
    cores = [layer.ms_deformable_attn_core for layer in model.layers]
    assert rtdetr.patch(model).places == first.places
    for options in ({"deterministic": True}, {"upstream_square_clamp": False}):
        with pytest.raises(ValueError, match=rf"is patched with {next(iter(options))}=.* does not change: call unpatch first"):
            rtdetr.patch(model, **options)
    assert [layer.ms_deformable_attn_core for layer in model.layers] == cores
    first.undo()
    first.undo()
    assert "value_op" not in vars(model)


@pytest.mark.parametrize("given", [False, True])
def test_deterministic_reaches_the_op(given: bool) -> None:
    model = make("rtdetr v1")
    with rtdetr.patch(model, deterministic=given), OurOps() as ops:
        run(model)
    assert ops.deterministic == [given, given]


@pytest.mark.parametrize(("repository", "method"), [("rtdetr v1", "default"), ("rtdetr v2", "discrete"), ("deim dfine", "default")])
def test_compile_has_no_graph_break_and_exports_hold_no_op_of_ours(repository: str, method: str) -> None:
    model, (query, boxes, memory) = make(repository, method), inputs()
    with rtdetr.patch(model):
        expected = run(model)
        torch._dynamo.reset()
        with OurOps() as ops:
            actual = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
        assert ops.names == ["ms_deform_attn"] * 2 + ["ms_deform_attn_backward"] * 2
        assert_same(actual, expected)
        exported = torch.export.export(model, (query.detach(), boxes, memory.detach(), SHAPES))
    assert "ssod_fast" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(query, boxes, memory, SHAPES), expected[0], **CLOSE)


def test_mixed_dtypes() -> None:
    core = make("rtdetr v2").layers[0].ms_deformable_attn_core
    value = torch.randn(2, 44, 4, 8)
    locations, weights = torch.rand(2, 5, 4, 9, 2), torch.randn(2, 5, 4, 9).softmax(-1)
    expected = core(value.bfloat16().float(), SHAPES, locations, weights, [3, 4, 2])
    model = make("rtdetr v2")
    with rtdetr.patch(model):
        actual = model.layers[0].ms_deformable_attn_core(value.bfloat16(), SHAPES, locations, weights, [3, 4, 2])
    assert actual.dtype is torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=1e-2, rtol=2**-7)


def test_refusals_leave_everything_alone() -> None:
    with pytest.raises(NothingPatched, match="Linear has no module with ms_deformable_attn_core: not a model of RT-DETR, D-FINE or DEIM"):
        rtdetr.patch(nn.Linear(2, 2))
    for call in (rtdetr.patch, rtdetr.unpatch):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got SimpleNamespace"):
            call(SimpleNamespace())  # type: ignore[arg-type]

    def unknown(value: Tensor) -> Tensor:
        return value

    def deformable_attention_core_func_v2(value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor) -> Tensor:
        return value

    known = importlib.import_module("standin_rtdetr").RTDETRv2.deformable_attention_core_func_v2
    cases = {
        unknown: r"layers\.1\.ms_deformable_attn_core is unknown, expected deformable_attention_core_func or deform.*_v2",
        deformable_attention_core_func_v2: r"takes \(value, value_spatial_shapes, sampling_locations\), expected \(value, value_spatial_sh",
        functools.partial(known, method="cubic"): r"expected method default or discrete and nothing else",
        functools.partial(known, num_points_list=[1]): r"expected method default or discrete and nothing else",
    }
    for core, message in cases.items():
        model = make("rtdetr v2")
        first, model.layers[1].ms_deformable_attn_core = model.layers[0].ms_deformable_attn_core, core
        with pytest.raises(UnknownSurface, match=message):
            rtdetr.patch(model)
        assert model.layers[0].ms_deformable_attn_core is first


def test_models_of_transformers_are_pointed_to_their_own_drop_in() -> None:
    d_fine = pytest.importorskip("transformers.models.d_fine.modeling_d_fine")
    model = make("rtdetr v2")
    model.layers[0].ms_deformable_attn_core = d_fine.multi_scale_deformable_attention_v2
    with pytest.raises(UnknownSurface, match=r"is multi_scale_deformable_attention_v2, .*there is ssod_fast\.dropin\.transformers\.patch"):
        rtdetr.patch(model)
