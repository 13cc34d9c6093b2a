"""What patches of transformers' models refuse, and what they leave undone then."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from tiny_transformers import build, inputs
from torch import nn

pytest.importorskip("transformers")

from ssod_fast.dropin import _patch
from ssod_fast.dropin import transformers as dropin
from ssod_fast.dropin._patch import NothingPatched, UnknownSurface

SUFFIX = "MultiscaleDeformableAttention"


def wrappers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith(SUFFIX)]


def test_a_model_without_such_attention_is_refused() -> None:
    with pytest.raises(NothingPatched, match="Linear has no multi-scale deformable attention of transformers"):
        dropin.patch(nn.Linear(2, 2))
    assert dropin.unpatch(nn.Linear(2, 2)) == 0
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        dropin.patch("rt_detr")  # type: ignore[arg-type]


def test_another_signature_is_refused_and_nothing_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("rt_detr")
    monkeypatch.setattr(type(wrappers(model)[0]), "forward", lambda self, hidden_states, masks: None)
    with pytest.raises(
        UnknownSurface, match=r"encoder_attn takes \(self, hidden_states, masks\), expected \(self, hidden_states, attention_mask"
    ):
        dropin.patch(model)
    assert dropin.unpatch(model) == 0


def test_a_missing_member_is_refused() -> None:
    model = build("rt_detr_v2")
    del wrappers(model)[1].n_points_list
    with pytest.raises(UnknownSurface, match="has no n_points_list"):
        dropin.patch(model)
    assert dropin.unpatch(model) == 0


def test_an_unknown_wrapper_is_refused() -> None:
    unknown = type("NewDetr" + SUFFIX, (nn.Module,), {"__module__": "transformers.models.new_detr.modeling_new_detr"})
    with pytest.raises(UnknownSurface, match=f"0 is a NewDetr{SUFFIX}, which ssod_fast does not know"):
        dropin.patch(nn.Sequential(unknown()))


def test_a_forward_that_accelerate_has_wrapped_is_not_lost() -> None:
    model = build("rt_detr")
    wrapper = wrappers(model)[0]
    wrapper.forward = wrapper.forward
    with pytest.raises(UnknownSurface, match=r"has a forward of its own.*device_map=.*call register\(\) before from_pretrained"):
        dropin.patch(model)


def test_unpatching_restores_all_or_nothing() -> None:
    model = build("rt_detr")
    places = dropin.patch(model).places
    second = wrappers(model)[1]
    ours = second.forward
    second.forward = lambda *args: ours(*args)
    name = re.escape(places[1])
    assert name.startswith(r"model\.decoder\.layers\.1\.encoder_attn\.")
    with pytest.raises(RuntimeError, match=f"^{name} has been replaced again since ssod_fast patched it"):
        dropin.unpatch(model)
    assert _patch.is_replaced(wrappers(model)[0], "forward")
    second.forward = ours
    assert dropin.unpatch(model) == 2


@pytest.mark.parametrize("fused", [True, False])
def test_which_hooks_fire(fused: bool) -> None:
    """As the documentation of `patch` says."""
    model = build("rt_detr").eval()
    fired = []
    for wrapper in wrappers(model):
        wrapper.register_forward_hook(lambda *_: fired.append("wrapper"))
        wrapper.attn.register_forward_hook(lambda *_: fired.append("attn"))
    dropin.patch(model, fused)
    with torch.no_grad():
        model(**inputs("rt_detr", train=False))
    assert fired == ["wrapper"] * 2


@pytest.mark.parametrize("fused", [True, False])
def test_other_options_are_refused(fused: bool) -> None:
    model = build("rt_detr")
    places = dropin.patch(model, fused, deterministic=True).places
    assert dropin.patch(model, fused, deterministic=True).places == places
    clone = copy.deepcopy(model)
    for found in (model, clone):
        with pytest.raises(ValueError, match=f"{re.escape(places[0])} is patched with fused={fused}, .*fused={not fused} "):
            dropin.patch(found, not fused, deterministic=True)
        with pytest.raises(ValueError, match=r"is patched with deterministic=True, .*=None does not change: call unpatch first"):
            dropin.patch(found, fused)
    dropin.unpatch(model)
    assert dropin.patch(model, not fused).count == 2


def test_what_is_no_switch_is_refused() -> None:
    model = build("rt_detr")
    with pytest.raises(TypeError, match="fused must be True or False, got None"):
        dropin.patch(model, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="deterministic must be True or False or None, got 1"):
        dropin.patch(model, deterministic=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["4.57.1", "5.16.2", "6.0.0"])
def test_unknown_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("rt_detr")
    monkeypatch.setattr("transformers.__version__", version)
    for call in (lambda: dropin.patch(model), dropin.register, dropin.patch_matchers, lambda: dropin.set_loss(model)):
        with pytest.raises(ImportError, match=rf"transformers {version} is not known to ssod_fast: install transformers>=5\.17,<6"):
            call()
