"""Extensions that nobody has to compile."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from dropin_cases import OurOps, assert_same, gradients, level_tensors, samples

from ssod_fast.dropin import UnknownSurface, groundingdino, install_as

NAMES = ["MultiScaleDeformableAttention", "detrex._C", "groundingdino._C", "mmcv._ext"]
GROUNDING = "groundingdino.models.GroundingDINO.ms_deform_attn"

pytestmark = pytest.mark.usefixtures("standins")


def check_autograd_function(function: Any, batch: int = 2, device: str = "cpu") -> None:
    """Output and three gradients equal the composition, with our ops at work."""
    from standin_attention import compose

    sizes, start = level_tensors(device)
    torch.manual_seed(0)
    value, locations, weights = leaves = samples(batch, device)
    with OurOps() as ops:
        actual = gradients(lambda: function.apply(value, sizes, start, locations, weights, 64), *leaves)
    assert ops.names == ["ms_deform_attn", "ms_deform_attn_backward"]
    assert_same(actual, gradients(lambda: compose(value, sizes, locations, weights), *leaves))


def test_code_of_the_deformable_detr_family_runs_unchanged() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("standin_deformable_detr")
    with install_as("MultiScaleDeformableAttention") as patched:
        assert patched.places == ("sys.modules['MultiScaleDeformableAttention']",)
        function = importlib.import_module("standin_deformable_detr").MSDeformAttnFunction
        check_autograd_function(function)
        check_autograd_function(function, batch=65)  # which no im2col_step of 64 divides
    assert "MultiScaleDeformableAttention" not in sys.modules
    check_autograd_function(function)  # who holds the shim keeps it


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    with install_as("MultiScaleDeformableAttention"):
        check_autograd_function(importlib.import_module("standin_deformable_detr").MSDeformAttnFunction, device="cuda")


def test_import_needs_none_of_the_packages_it_patches() -> None:
    packages = "{'transformers', 'torchvision', 'mmcv', 'detrex', 'groundingdino', 'ultralytics', 'rfdetr', 'scipy'}"
    code = f"import ssod_fast.dropin, sys; sys.exit(str(sorted({packages} & set(sys.modules)) or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_mixed_dtypes_get_gradients_in_their_own() -> None:
    with install_as("MultiScaleDeformableAttention"):
        function = importlib.import_module("standin_deformable_detr").MSDeformAttnFunction
    value, locations, weights = samples()
    out = function.apply(value.bfloat16(), *level_tensors(), locations, weights, 64)
    assert out.dtype is torch.bfloat16
    forward, backward = sys.modules["standin_deformable_detr"].MSDA.__dict__, "ms_deform_attn_backward"
    grads = forward[backward](value.bfloat16(), *level_tensors(), locations.double(), weights, torch.ones_like(out), 64)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float64, torch.float32]
    assert [g.shape for g in grads] == [value.shape, locations.shape, weights.shape]


@pytest.mark.parametrize("name", NAMES)
def test_installing_twice_changes_nothing_and_undo_restores(name: str) -> None:
    before = dict(sys.modules)
    first = install_as(name)
    module = sys.modules[name]
    assert importlib.util.find_spec(name) is module.__spec__
    second = install_as(name)
    with pytest.raises(ValueError, match=r"is patched with deterministic=None, .*=True does not change: call \.undo\(\) of what the first"):
        install_as(name, deterministic=True)
    assert sys.modules[name] is module
    assert second.places == first.places
    second.undo()
    assert sys.modules[name] is module
    first.undo()
    assert name not in sys.modules
    first.undo()
    assert {key: value for key, value in sys.modules.items() if key in before} == before


def test_a_shim_that_somebody_removed_comes_back() -> None:
    with install_as("detrex._C"):
        del sys.modules["detrex._C"]
        with install_as("detrex._C"):
            assert callable(sys.modules["detrex._C"].ms_deform_attn_forward)


def test_loaded_extension_gets_our_functions() -> None:
    theirs = ModuleType("MultiScaleDeformableAttention")
    theirs.ms_deform_attn_forward = theirs.ms_deform_attn_backward = forward = lambda *_: pytest.fail("the compiled one ran")
    sys.modules["MultiScaleDeformableAttention"] = theirs
    function = importlib.import_module("standin_deformable_detr").MSDeformAttnFunction
    with install_as("MultiScaleDeformableAttention") as patched:
        assert patched.places == tuple(f"MultiScaleDeformableAttention.ms_deform_attn_{way}" for way in ("forward", "backward"))
        check_autograd_function(function)
    assert theirs.ms_deform_attn_forward is theirs.ms_deform_attn_backward is forward


def test_refusals_name_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"name must be one of 'MultiScaleDeformableAttention', .*'mmcv\._ext', got 'MSDA'"):
        install_as("MSDA")
    sys.modules["MultiScaleDeformableAttention"] = ModuleType("MultiScaleDeformableAttention")
    with pytest.raises(UnknownSurface, match=r"is loaded \(no file\) and has no ms_deform_attn_forward and no ms_deform_attn_backward"):
        install_as("MultiScaleDeformableAttention")


def test_bad_tensors_are_refused_by_name() -> None:
    value, locations, weights = samples()
    with install_as("MultiScaleDeformableAttention"):
        forward = sys.modules["MultiScaleDeformableAttention"].ms_deform_attn_forward
        with pytest.raises(ValueError, match=r"attention_weights must be \[2, Q, 4, K\]"):
            forward(value, *level_tensors(), locations, weights[:1], 64)


def test_groundingdino_before_its_import() -> None:
    with install_as("groundingdino._C"):
        check_autograd_function(importlib.import_module(GROUNDING).MultiScaleDeformableAttnFunction)


def test_groundingdino_after_an_import_that_missed_its_extension() -> None:
    with pytest.warns(UserWarning, match="CPU mode only"):
        module = importlib.import_module(GROUNDING)
    with pytest.raises(NameError, match="_C"):
        check_autograd_function(module.MultiScaleDeformableAttnFunction)
    with install_as("groundingdino._C") as patched:
        assert patched.places == ("sys.modules['groundingdino._C']", "groundingdino._C", f"{GROUNDING}._C")
        assert install_as("groundingdino._C").places == patched.places
        check_autograd_function(module.MultiScaleDeformableAttnFunction)
    assert not hasattr(module, "_C")
    assert not hasattr(sys.modules["groundingdino"], "_C")


def test_groundingdino_patch_needs_no_extension() -> None:
    with pytest.warns(UserWarning, match="CPU mode only"):
        module = importlib.import_module(GROUNDING)
    with groundingdino.patch() as patched:
        assert patched.count == 3
        check_autograd_function(module.MultiScaleDeformableAttnFunction)
    assert groundingdino.patch().count == 3
    assert groundingdino.unpatch() == 3
    assert groundingdino.unpatch() == 0
    with pytest.raises(NameError, match="_C"):
        check_autograd_function(module.MultiScaleDeformableAttnFunction)


def test_groundingdino_missing() -> None:
    sys.path.pop(0)
    with pytest.raises(ImportError, match="install groundingdino from its repository"):
        groundingdino.patch()
