"""Models of transformers before and after their attention is patched."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from no_sync import no_sync
from tiny_transformers import BUILD, build, convert, inputs
from torch import Tensor, nn

pytest.importorskip("transformers")

from ssod_fast.dropin import _patch
from ssod_fast.dropin import transformers as dropin
from ssod_fast.dropin.transformers import attention, models

PLACES = {
    "deformable_detr": 3, "rt_detr": 2, "rt_detr_v2": 2, "d_fine": 3, "deimv2": 3, "rf_detr": 2, "grounding_dino": 3, "mask2former": 1,
    "oneformer": 1,
}  # fmt: skip
DOUBLE = ("deformable_detr", "rt_detr", "rt_detr_v2", "rf_detr", "grounding_dino")  # the others mix in float32 of their own
SUFFIX = "MultiscaleDeformableAttention"


def run(model: nn.Module, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)  # denoising queries and sampled points
    return model(**convert(inputs(name, train=model.training), dtype), **options)


def outputs_and_gradients(model: nn.Module, name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model.zero_grad()
    outputs = run(model, name, dtype)
    outputs.loss.backward()
    found = {key: value.detach() for key, value in outputs.items() if isinstance(value, Tensor)}
    return found, {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def wrappers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith(SUFFIX)]


def flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for entry in value if isinstance(value, tuple | list) else ():
        yield from flat(entry)


def assert_gradients_agree(found: dict[str, Tensor], expected: dict[str, Tensor], own: float, overall: float) -> None:
    """Within a share of the parameter's largest gradient, and a smaller one of the model's, since rounding errors travel."""
    assert found.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for key, grad in expected.items():
        error = float((grad - found[key]).abs().max())
        assert error <= own * float(grad.abs().max()) + overall * largest, key


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", BUILD)
def test_outputs_losses_and_gradients_stay_the_same(name: str, fused: bool) -> None:
    dtype = torch.float64 if name in DOUBLE else torch.float32
    model = build(name).train().to(dtype)
    keys = list(model.state_dict())
    outputs, grads = outputs_and_gradients(model, name, dtype)
    with dropin.patch(model, fused) as patched:
        assert patched.count == PLACES[name]
        assert list(model.state_dict()) == keys
        again, again_grads = outputs_and_gradients(model, name, dtype)
    tolerance = {"atol": 1e-11, "rtol": 1e-11} if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(again, outputs, **tolerance)
    assert_gradients_agree(again_grads, grads, *((1e-9, 1e-13) if dtype == torch.float64 else (1e-5, 1e-6)))
    restored, _ = outputs_and_gradients(model, name, dtype)
    torch.testing.assert_close(restored, outputs, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("name", DOUBLE)
def test_float32_agrees_too(name: str) -> None:
    model = build(name).train()
    outputs, grads = outputs_and_gradients(model, name, torch.float32)
    dropin.patch(model)
    again, again_grads = outputs_and_gradients(model, name, torch.float32)
    torch.testing.assert_close(again, outputs, atol=1e-5, rtol=1e-5)
    assert_gradients_agree(again_grads, grads, 1e-5, 1e-6)


@pytest.mark.parametrize("name", BUILD)
def test_the_patched_attention_is_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also proves that these models would show a wrong attention."""
    model = build(name).train()
    dropin.patch(model)
    with torch.no_grad():
        right = list(flat(run(model, name).to_tuple()))
        fused = attention.ms_deform_attn_fused
        calls = []
        monkeypatch.setattr(attention, "ms_deform_attn_fused", lambda *a, **k: calls.append(a) or fused(*a[:3], a[3] * 1.1, *a[4:], **k))
        wrong = list(flat(run(model, name).to_tuple()))
    assert len(calls) == PLACES[name]
    assert max(float((a - b).abs().nan_to_num().max()) for a, b in zip(right, wrong, strict=True)) > 1e-3


@pytest.mark.parametrize("name", [name for name in BUILD if "former" not in name])
def test_recorded_attentions_stay_the_same(name: str) -> None:
    model = build(name).eval()
    with torch.no_grad():
        expected = run(model, name, output_attentions=True)
        dropin.patch(model)
        found = run(model, name, output_attentions=True)
    compared = 0
    for key in expected:
        if "attentions" in key:
            pairs = list(zip(flat(found[key]), flat(expected[key]), strict=True))
            compared += sum(a.shape[-1] in (4, 12) for a, _ in pairs)
            for pair in pairs:
                torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)
    assert compared >= PLACES[name]


def test_attentions_are_not_computed_unless_somebody_looks() -> None:
    model = build("rt_detr").eval()
    dropin.patch(model)
    seen: list[Any] = []
    wrapper = wrappers(model)[0]
    direct = []
    forward = vars(wrapper)["forward"]
    wrapper.forward = lambda *args, **kwargs: direct.append(forward(*args, **kwargs)) or direct[-1]
    with torch.no_grad():
        run(model, "rt_detr")
        handle = wrapper.register_forward_hook(lambda module, args, output: seen.append(output[1]))
        run(model, "rt_detr")
        handle.remove()
    assert direct[0][1] is None
    assert seen[0].shape == (2, 20, 4, 3, 4)
    torch.testing.assert_close(seen[0].sum((-1, -2)), torch.ones(2, 20, 4))


def test_recorded_attentions_have_their_gradient() -> None:
    model = build("rt_detr").eval()
    results = []
    for patched in (False, True):
        if patched:
            dropin.patch(model)
        model.zero_grad()
        run(model, "rt_detr", output_attentions=True).cross_attentions[0].square().sum().backward()
        results.append(wrappers(model)[0].attention_weights.weight.grad.clone())
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["deformable_detr", "d_fine"])
def test_patching_and_unpatching_twice_changes_nothing_more(name: str) -> None:
    model = build(name)
    first = dropin.patch(model)
    forwards = [vars(module)["forward"] for module in wrappers(model)]
    second = dropin.patch(model)
    assert (first.count, second.count) == (PLACES[name], PLACES[name])
    assert [vars(module)["forward"] for module in wrappers(model)] == forwards
    second.undo()
    assert all("forward" in vars(module) for module in wrappers(model))
    assert dropin.unpatch(model) == PLACES[name]
    assert dropin.unpatch(model) == 0
    assert not any({"forward", _patch._RECORD, _patch._REPLICATE} & vars(module).keys() for module in wrappers(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize(("name", "fused"), [("rt_detr", True), ("rt_detr", False), ("d_fine", False)])
def test_copies_are_patched_and_independent(name: str, fused: bool, duplicate: Any) -> None:
    model = build(name).eval()
    dropin.patch(model, fused)
    twin = duplicate(model)
    for parameter in model.parameters():
        parameter.data.zero_()  # a copy bound to the original would notice
    with torch.no_grad():
        found = run(twin, name).logits
        assert dropin.unpatch(twin) == PLACES[name]
        expected = run(twin, name).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert dropin.unpatch(model) == PLACES[name]


def test_a_patched_model_is_saved_and_loaded(tmp_path: Any) -> None:
    model = build("rt_detr").eval()
    dropin.patch(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert not any("forward" in vars(module) for module in wrappers(loaded))
    with torch.no_grad():
        torch.testing.assert_close(run(loaded, "rt_detr").logits, run(model, "rt_detr").logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["rt_detr_v2", "d_fine"])
def test_discrete_sampling(name: str) -> None:
    model = build(name, decoder_method="discrete").eval()
    with torch.no_grad():
        expected = run(model, name)
        dropin.patch(model)
        found = run(model, name)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)


def test_a_mask_of_d_fine_hides_tokens() -> None:
    """The wrapper of transformers fails on it."""
    wrapper = wrappers(build("d_fine").eval())[0]
    generator = torch.Generator().manual_seed(0)
    queries, tokens = torch.randn(2, 5, 32, generator=generator), torch.randn(2, 126, 32, generator=generator)
    mask = torch.rand(2, 126, generator=generator) > 0.5
    points, sizes = torch.rand(2, 5, 1, 4, generator=generator), [(8, 12), (4, 6), (2, 3)]
    options = {"reference_points": points, "spatial_shapes_list": sizes, "spatial_shapes": torch.tensor(sizes)}
    dropin.patch(wrapper)
    found = wrapper(queries, mask, encoder_hidden_states=tokens, **options)[0]
    expected = wrapper(queries, encoder_hidden_states=tokens * mask[..., None], **options)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("name", ["deformable_detr", "mask2former", "oneformer"])
def test_wrappers_with_points_boxes_and_masks(name: str, coordinates: int) -> None:
    """Both kinds of references on the wrapper itself, with what its model never passes at once."""
    wrapper = wrappers(build(name).eval())[0]
    levels, sizes = wrapper.n_levels, [(6, 9), (3, 5), (2, 3), (1, 2)]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, sum(h * w for h, w in sizes[:levels]), 32, generator=generator)
    queries, positions = torch.randn(2, 2, 7, 32, generator=generator)
    given = {
        "attention_mask": torch.rand(tokens.shape[:2], generator=generator) > 0.3,
        "encoder_hidden_states": tokens,
        "position_embeddings": positions,
        "reference_points": torch.rand(2, 7, levels, coordinates, generator=generator),
        "spatial_shapes": torch.tensor(sizes[:levels]),
        "spatial_shapes_list": sizes[:levels],
    }
    given = {key: value for key, value in given.items() if key in inspect.signature(type(wrapper).forward).parameters}
    given["output_attentions"] = True
    expected = wrapper(queries, **given)
    for fused in (True, False):
        with dropin.patch(wrapper, fused):
            torch.testing.assert_close(wrapper(queries, **given), expected, atol=1e-6, rtol=1e-5)


def attention_calls(name: str) -> tuple[nn.Module, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """A model in training mode, and the arguments of its wrappers."""
    model = build(name).train()
    calls: list[Any] = []
    record = [m.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True) for m in wrappers(model)]
    with torch.no_grad():
        run(model, name)
    for handle in record:
        handle.remove()
    return model, calls


@pytest.mark.parametrize("name", ["deformable_detr", "rt_detr_v2", "d_fine", "mask2former"])
def test_half_precision(name: str) -> None:
    """Under autocast, and with half tensors throughout, as close to float32 as transformers is."""
    model, calls = attention_calls(name)
    wrapper, args, kwargs = calls[0]
    exact = wrapper(*args, **kwargs)[0].detach()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = wrapper(*args, **kwargs)[0].detach()
    for fused in (True, False):
        with dropin.patch(model, fused), torch.autocast("cpu", torch.bfloat16):
            ours = wrapper(*args, **kwargs)[0]
            ours.float().sum().backward()
        assert float((ours.detach() - exact).abs().mean()) <= 1.5 * float((theirs - exact).abs().mean())
    dropin.patch(model.to(torch.bfloat16))
    args, kwargs = (convert(given, torch.bfloat16) for given in (list(args), kwargs))
    half = wrapper(*args, **kwargs)[0].detach()
    assert half.dtype == torch.bfloat16
    assert float((half - exact).abs().mean() / exact.abs().mean()) < 0.05


def decoder_layer(name: str, fused: bool = True, **options: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A patched layer and its arguments."""
    model = build(name, **options).eval()
    layer = model.get_submodule(next(key for key, m in model.named_modules() if m is wrappers(model)[-1]).rpartition(".")[0])
    calls: list[Any] = []
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        run(model, name)
    handle.remove()
    dropin.patch(model, fused)
    args, kwargs = calls[0]
    return layer, args, kwargs


@pytest.mark.parametrize("name", ["deformable_detr", "rt_detr_v2", "d_fine", "mask2former"])
def test_a_patched_layer_compiles_without_a_graph_break(name: str) -> None:
    layer, args, kwargs = decoder_layer(name)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append("".join(str(part.graph) for part in graph.modules() if isinstance(part, torch.fx.GraphModule)))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    torch.testing.assert_close(next(flat(compiled(*args, **kwargs))), next(flat(layer(*args, **kwargs))), atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1
    assert "ms_deform_attn_fused" in graphs[0]


def test_a_compiled_layer_learns() -> None:
    layer, args, kwargs = decoder_layer("rt_detr")
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    grads = []
    for call in (layer, compiled):
        layer.zero_grad()
        next(flat(call(*args, **kwargs))).square().sum().backward()
        grads.append({key: p.grad.clone() for key, p in layer.named_parameters()})
    assert_gradients_agree(grads[1], grads[0], 1e-5, 1e-6)


@pytest.mark.parametrize("name", ["rt_detr", "grounding_dino", "oneformer"])
def test_patched_attention_does_not_wait_for_the_device(name: str) -> None:
    model, calls = attention_calls(name)
    dropin.patch(model)
    wrapper, args, kwargs = calls[-1]
    with no_sync():
        wrapper(*args, **kwargs)[0].sum().backward()


@pytest.mark.parametrize(("name", "fused"), [("rt_detr", True), ("rt_detr", False), ("d_fine", True)])
def test_an_exported_model_knows_none_of_our_ops(name: str, fused: bool) -> None:
    layer, args, kwargs = decoder_layer(name, fused)
    program = torch.export.export(layer, args, kwargs, strict=False)
    text = str(program.graph)
    assert "grid_sampler" in text
    assert "ssod_fast" not in text
    torch.testing.assert_close(next(flat(program.module()(*args, **kwargs))), next(flat(layer(*args, **kwargs))), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["rt_detr_v2", "d_fine"])
def test_an_exported_model_with_discrete_sampling_knows_none_either(name: str) -> None:
    layer, args, kwargs = decoder_layer(name, decoder_method="discrete")
    program = torch.export.export(layer, args, kwargs, strict=False)
    assert "ssod_fast" not in str(program.graph)
    torch.testing.assert_close(next(flat(program.module()(*args, **kwargs))), next(flat(layer(*args, **kwargs))), atol=1e-5, rtol=1e-5)


def test_gradients_in_a_fixed_order_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fused = attention.ms_deform_attn_fused
    monkeypatch.setattr(attention, "ms_deform_attn_fused", lambda *a, **k: seen.append(k["deterministic"]) or fused(*a, **k))
    model = build("rt_detr").eval()
    dropin.patch(model, deterministic=True)
    with torch.no_grad():
        run(model, "rt_detr")
    assert seen == [True, True]


class Recorder(nn.Module):
    """Stands in for the core and keeps its arguments."""

    calls: list[Any] = []  # noqa: RUF012

    def forward(self, *args: Any) -> Tensor:
        self.calls.append(args)
        return attention.AttentionCore()(*args)


def test_what_the_core_receives() -> None:
    model = build("rt_detr").eval()
    for wrapper in wrappers(model):
        wrapper.attn = Recorder()
    Recorder.calls.clear()
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 96))
    value, shapes, sizes, start, locations, weights, step = Recorder.calls[0]
    assert value.shape == (1, 126, 4, 8)
    assert shapes.dtype == torch.int64
    assert sizes == [(8, 12), (4, 6), (2, 3)]
    assert start.tolist() == [0, 96, 120]
    assert locations.shape == (1, 20, 4, 3, 4, 2)
    assert weights.shape == (1, 20, 4, 3, 4)
    assert step == 64


@pytest.fixture
def clean_registry() -> Iterator[None]:
    yield
    dropin.unregister()


@pytest.mark.usefixtures("clean_registry")
def test_models_built_after_registration_use_our_core(tmp_path: Any) -> None:
    plain = build("rt_detr").eval()
    plain.save_pretrained(tmp_path)
    registered = dropin.register()
    assert registered.count == 6
    assert dropin.register().count == 6
    loaded = type(plain).from_pretrained(tmp_path).eval()
    assert [type(wrapper.attn) for wrapper in wrappers(loaded)] == [attention.AttentionCore] * 2
    with torch.no_grad():
        torch.testing.assert_close(run(loaded, "rt_detr").logits, run(plain, "rt_detr").logits, atol=1e-5, rtol=1e-5)
    assert dropin.patch(loaded).count == 2
    assert dropin.unregister() == 6
    assert dropin.unregister() == 0
    again = type(plain).from_pretrained(tmp_path)
    assert [type(wrapper.attn).__name__ for wrapper in wrappers(again)] == [models.CORE] * 2


@pytest.mark.usefixtures("clean_registry")
def test_a_name_that_somebody_else_has_registered_is_left_alone() -> None:
    from transformers import monkey_patching

    class Another(nn.Module):
        pass

    before = [getattr(module, name) for module, name, _ in models._functions()]
    monkey_patching.register_patch_mapping({models.CORE: Another})
    try:
        with pytest.raises(ValueError, match=models.CORE):
            dropin.register()
        assert [getattr(module, name) for module, name, _ in models._functions()] == before
        assert dropin.unregister() == 0
        assert monkey_patching.get_patch_mapping()[models.CORE] is Another
    finally:
        monkey_patching.unregister_patch_mapping([models.CORE])


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize("name", ["rt_detr_v2", "d_fine", "mask2former", "oneformer"])
def test_functions_are_replaced_by_registration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        expected = next(flat(run(build(name).eval(), name).to_tuple()))
        calls: list[Any] = []
        op = attention.ms_deform_attn
        monkeypatch.setattr(attention, "ms_deform_attn", lambda *a, **k: calls.append(a) or op(*a, **k))
        with dropin.register():
            found = next(flat(run(build(name).eval(), name).to_tuple()))
        assert len(calls) == PLACES[name]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        run(build(name).eval(), name)
    assert len(calls) == PLACES[name]


MODULES = (
    "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine", "deimv2", "grounding_dino", "mm_grounding_dino", "lw_detr", "rf_detr",
    "omdet_turbo", "pp_doclayout_v2", "pp_doclayout_v3", "pp_doclayout_v4", "mask2former", "oneformer",
)  # fmt: skip


def test_every_wrapper_of_this_version_is_known() -> None:
    """Also those whose models are not built here."""
    found = 0
    for name in MODULES:
        module = _patch.optional(f"transformers.models.{name}.modeling_{name}")
        for key, value in vars(module).items() if module else ():
            if key.endswith(SUFFIX):
                wrapper = attention.WRAPPERS[key]
                _patch.check_parameters(value.forward, key, *[("self", *names) for names in wrapper.parameters])
                accepted = inspect.signature(wrapper.forward).parameters
                assert all(part.lstrip("*") in accepted for part in _patch.parameters(value.forward)[1:])
                found += 1
            if key == models.CORE:
                _patch.check_parameters(value.forward, name, ("self", *models._CORE_PARAMETERS))
    assert found >= len(MODULES) - 1  # version 5.17 has one model less
