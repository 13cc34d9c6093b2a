"""Every drop-in that README.md shows runs as it stands; what cannot be installed here is stood in for."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from dropin_cases import SHAPES, OurOps, gradients, level_tensors, samples
from torch import Tensor, nn

README = Path(__file__).resolve().parents[2] / "README.md"
SECTION = README.read_text().split("## Drop-ins\n")[1].split("\n## ")[0]
SURFACES = (
    "patch", "register", "patch_matchers", "set_loss", "torchvision", "mmcv", "detrex", "groundingdino", "deformable_detr", "rtdetr",
    "rfdetr", "ultralytics",
)  # fmt: skip
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, flags=re.S)


def run(surface: str, **names: Any) -> dict[str, Any]:
    """The names that the block of a surface leaves behind."""
    block = BLOCKS[SURFACES.index(surface)]
    exec(compile(block, f"{README}: {surface}", "exec"), names)
    return names


def ops_in(call: Callable[[], Any]) -> set[str]:
    """Which of our ops a call runs."""
    with OurOps() as ops:
        call()
    return set(ops.names)


def enter(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> ModuleType:
    """Makes a module importable that holds these attributes."""
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_one_block_per_surface_of_about_five_lines() -> None:
    assert len(BLOCKS) == len(SURFACES)
    assert max(len([line for line in block.splitlines() if line]) for block in BLOCKS) <= 5


class TestTransformers:
    @pytest.fixture(autouse=True)
    def _undone(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        transformers = pytest.importorskip("transformers")
        from tiny_transformers import build

        def from_pretrained(name: str) -> nn.Module:
            family = {"PekingU/rtdetr_r50vd": "rt_detr", "SenseTime/deformable-detr": "deformable_detr"}[name]
            return transformers.AutoModelForObjectDetection.from_config(build(family).config)

        monkeypatch.setattr(transformers.AutoModelForObjectDetection, "from_pretrained", from_pretrained)
        yield
        from ssod_fast.dropin import transformers as dropin

        dropin.unregister()
        dropin.unpatch_matchers()

    @pytest.mark.parametrize(("surface", "op"), [("patch", "ms_deform_attn_fused"), ("register", "ms_deform_attn")])
    def test_attention(self, surface: str, op: str) -> None:
        model = run(surface)["model"].eval()
        assert ops_in(lambda: model(pixel_values=torch.randn(1, 3, 64, 96))) == {op}

    def test_patch_says_what_it_replaced(self, capsys: pytest.CaptureFixture[str]) -> None:
        run("patch")
        assert "decoder.layers.1" in capsys.readouterr().out

    def test_losses(self) -> None:
        from tiny_transformers import build

        model = build("deformable_detr")
        names: dict[str, Any] = {}
        assert "match" in ops_in(lambda: names.update(run("patch_matchers", model=model)))
        first = next(model.parameters()).grad
        assert first is not None
        assert "match" not in ops_in(lambda: model(pixel_values=names["images"], labels=names["labels"]))  # the with block is over
        before = model(pixel_values=names["images"], labels=names["labels"]).loss
        assert "match" in ops_in(lambda: run("set_loss", **{key: names[key] for key in ("model", "images", "labels")}))
        assert not torch.equal(model(pixel_values=names["images"], labels=names["labels"]).loss, before)  # the second box counts less


def test_torchvision() -> None:
    from ssod_fast.dropin.torchvision import unpatch_box_iou

    detector = run("torchvision")["detector"]
    detector.transform.min_size, detector.transform.max_size = (64,), 96
    target = {"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([1])}
    try:
        assert "box_iou" in ops_in(lambda: detector([torch.rand(3, 64, 64)], [target]))
    finally:
        unpatch_box_iou(detector)


def kernel_function(module: ModuleType) -> Callable[[], Any]:
    """Forward and backward of the function that wants a compiled extension."""
    leaves = value, locations, weights = samples()
    function = next(vars(module)[name] for name in ("MultiScaleDeformableAttnFunction", "MSDeformAttnFunction") if name in vars(module))
    return lambda: gradients(lambda: function.apply(value, *level_tensors(), locations, weights, 64), *leaves)


@pytest.mark.parametrize("name", ["mmcv.ops.multi_scale_deform_attn", "detrex.layers.multi_scale_deform_attn"])
def test_without_an_extension(name: str, standins: None) -> None:
    package = importlib.import_module(f"ssod_fast.dropin.{name.split('.')[0]}")
    run(name.split(".")[0])
    try:
        assert ops_in(kernel_function(importlib.import_module(name))) == {"ms_deform_attn", "ms_deform_attn_backward"}
    finally:
        package.unpatch()


def test_groundingdino(standins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    package = importlib.import_module("ssod_fast.dropin.groundingdino")
    call = kernel_function(importlib.import_module("groundingdino.models.GroundingDINO.ms_deform_attn"))
    enter(monkeypatch, "groundingdino.util")
    enter(monkeypatch, "groundingdino.util.inference", load_model=lambda config, weights: call)
    try:
        assert ops_in(run("groundingdino")["model"]) == {"ms_deform_attn", "ms_deform_attn_backward"}
    finally:
        package.unpatch()


def test_deformable_detr(standins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssod_fast.dropin import install_as

    class Models(ModuleType):
        """Imports the extension when it is asked for something, as the repository does at once."""

        def __getattr__(self, name: str) -> Any:
            if name != "build_model":
                raise AttributeError(name)
            return kernel_function(importlib.import_module("standin_deformable_detr"))

    monkeypatch.setitem(sys.modules, "models", Models("models"))
    build_model = run("deformable_detr")["build_model"]
    with install_as("MultiScaleDeformableAttention"):
        assert ops_in(build_model) == {"ms_deform_attn", "ms_deform_attn_backward"}


def deformable_attention_core_func(
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    from standin_attention import compose

    return compose(value, value_spatial_shapes, sampling_locations, attention_weights)


class Layer(nn.Module):
    """The attribute by which RT-DETR finds its function."""

    def __init__(self) -> None:
        super().__init__()
        self.ms_deformable_attn_core = deformable_attention_core_func


def test_rtdetr(standins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, "src")
    enter(monkeypatch, "src.core", YAMLConfig=lambda path: SimpleNamespace(model=nn.Sequential(Layer(), Layer()), path=path))
    layer = run("rtdetr")["model"][1]
    value, locations, weights = samples()
    assert ops_in(lambda: layer.ms_deformable_attn_core(value, list(SHAPES), locations, weights)) == {"ms_deform_attn"}


def test_rfdetr(standins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = importlib.import_module("standin_ms_deform_attn").MSDeformAttn(32, 3, 4, 2)
    holder = SimpleNamespace(model=SimpleNamespace(model=nn.Sequential(attention)))
    enter(monkeypatch, "rfdetr", RFDETRBase=lambda: holder)
    assert run("rfdetr")["model"] is holder
    query, tokens = torch.randn(2, 6, 32), torch.randn(2, 51, 32)
    assert ops_in(lambda: attention(query, torch.rand(2, 6, 3, 4), tokens, *level_tensors())) == {"ms_deform_attn_fused"}


def test_ultralytics(standins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssod_fast.dropin import ultralytics

    def multi_scale_deformable_attn_pytorch(
        value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
    ) -> Tensor:
        return deformable_attention_core_func(value, value_spatial_shapes, sampling_locations, attention_weights)

    for name in ("ultralytics.nn", "ultralytics.nn.modules"):
        enter(monkeypatch, name)
    enter(monkeypatch, "ultralytics", RTDETR=lambda config: config)
    module = enter(
        monkeypatch, "ultralytics.nn.modules.transformer", multi_scale_deformable_attn_pytorch=multi_scale_deformable_attn_pytorch
    )
    value, locations, weights = samples()
    call = lambda: vars(module)["multi_scale_deformable_attn_pytorch"](value, list(SHAPES), locations, weights)  # noqa: E731
    try:
        assert run("ultralytics")["model"] == "rtdetr-l.yaml"
        assert ops_in(call) == {"ms_deform_attn"}
    finally:
        ultralytics.unpatch()
    assert ops_in(call) == set()
