"""Building detectors by name, and weights from files."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from detectors.models import images, random_target
from no_sync import no_sync
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from ssod_fast.detectors import build_detector, preprocess, require
from ssod_fast.detectors.backbones import BackboneOptions, backbone_names, build_backbone, find_stages
from ssod_fast.detectors.surgery import FoldedConv2d, SameConv2d, freeze_batch_norm, same_padding
from ssod_fast.detectors.weights import read_weights
from ssod_fast.structures import PaddedTargets

SMALL: dict[str, Any] = {"fpn_channels": 64, "head_convs": 1, "levels": (3, 6)}
HW = (96, 128)


@pytest.mark.parametrize("family", ["fcos", "retinanet", "fasterrcnn"])
def test_resnet50_is_torchvisions_own(family: str) -> None:
    """COCO weights of torchvision fit: same names, shapes and anchors."""
    detector: Any = build_detector(f"torchvision:{family}_resnet50_fpn", 20)
    outputs = 20 + (family == "fasterrcnn")
    official = getattr(torchvision.models.detection, f"{family}_resnet50_fpn")(weights=None, weights_backbone=None, num_classes=outputs)
    ours = {name: value.shape for name, value in detector.model.state_dict().items()}
    assert ours == {name: value.shape for name, value in official.state_dict().items()}
    part = (lambda m: m.rpn.anchor_generator) if family == "fasterrcnn" else (lambda m: m.anchor_generator)
    for mine, theirs in zip(part(detector.model).cell_anchors, part(official).cell_anchors, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "resnet18", "regnet_y_400mf", "shufflenet_v2_x0_5", "mnasnet0_5", "efficientnet_b0", "tiny"]
)
def test_backbones_give_a_pyramid(name: str) -> None:
    backbone = build_backbone(name, BackboneOptions(levels=(3, 6), fpn_channels=32)).eval()
    maps = backbone(torch.zeros(1, 3, 64, 128))
    assert [tuple(m.shape) for m in maps.values()] == [(1, 32, 8, 16), (1, 32, 4, 8), (1, 32, 2, 4), (1, 32, 1, 2)]


def test_stages_of_mobilenet_v2() -> None:
    stages = find_stages(torchvision.models.mobilenet_v2().features)
    assert {level: (stage.name, stage.channels) for level, stage in stages.items()} == {
        1: ("1", 16),
        2: ("3", 24),
        3: ("6", 32),
        4: ("13", 96),
        5: ("18", 1280),
    }


def test_trainable_layers_count_from_the_deepest() -> None:
    backbone = build_backbone("mobilenet_v2", BackboneOptions(levels=(3, 5), fpn_channels=32, trainable_layers=3))
    trained = {name.split(".")[0] for name, p in backbone.body.named_parameters() if p.requires_grad}
    assert trained == {str(i) for i in range(4, 19)}
    assert all(p.requires_grad for p in backbone.fpn.parameters())
    none = build_backbone("resnet18", BackboneOptions(levels=(3, 5), fpn_channels=32, trainable_layers=0))
    assert not any(p.requires_grad for p in none.body.parameters())


@pytest.mark.parametrize("family", ["fcos", "retinanet", "fasterrcnn"])
def test_tiny_detectors_train_and_predict(family: str) -> None:
    detector: Any = build_detector(f"torchvision:{family}_tiny_fpn", 4)
    require(detector, for_method="this test")
    losses = detector(images(HW, HW), [random_target(HW, 3, 4), random_target(HW, 2, 4)])
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in detector.parameters())
    assert len(detector.predict(images(HW))) == 1


@pytest.mark.parametrize(("norm", "kind", "other"), [("group", nn.GroupNorm, nn.BatchNorm2d), ("batch", nn.BatchNorm2d, nn.GroupNorm)])
def test_the_norm_of_the_tiny_network_is_chosen(norm: str, kind: type[nn.Module], other: type[nn.Module]) -> None:
    backbone: Any = build_detector("torchvision:fcos_tiny_fpn", 4, tiny_norm=norm).model.backbone
    assert sum(isinstance(m, kind) for m in backbone.body.modules()) == 8
    assert not any(isinstance(m, other) for m in backbone.body.modules())


@pytest.mark.parametrize("family", ["fcos", "retinanet"])
def test_tiny_detectors_do_not_sync(family: str) -> None:
    detector: Any = build_detector(f"torchvision:{family}_tiny_fpn", 4)
    batch = preprocess(images(HW, HW), detector.pixel_stats)
    targets = PaddedTargets.from_list([random_target(HW, 3, 4), random_target(HW, 2, 4)])
    detector.losses(batch, targets)
    with no_sync():
        sum(detector.losses(batch, targets).values()).backward()


def test_frozen_and_folded_batch_norm_does_not_sync(backbone_weights: Path) -> None:
    detector: Any = build_detector("torchvision:fcos_mobilenet_v2_fpn", 4, backbone_weights=backbone_weights, **SMALL)
    batch = preprocess(images((64, 64)), detector.pixel_stats)
    targets = PaddedTargets.from_list([random_target((64, 64), 3, 4)])
    detector.losses(batch, targets)
    with no_sync():
        sum(detector.losses(batch, targets).values()).backward()


@pytest.mark.parametrize("same", [True, False])
def test_backbone_file_gives_the_features_of_a_direct_load(backbone_weights: Path, same: bool) -> None:
    from safetensors.torch import load_file

    reference = torchvision.models.mobilenet_v2().features
    stored = load_file(backbone_weights)
    reference.load_state_dict({name.removeprefix("features."): value.float() for name, value in stored.items()})
    if same:
        _pad_right_and_bottom(reference)
    options = {} if same else {"same_padding": False}
    detector: Any = build_detector("torchvision:fcos_mobilenet_v2_fpn", 3, backbone_weights=backbone_weights, **SMALL, **options)
    assert detector.build_options["same_padding"] is same
    batch = preprocess(images((64, 96)), detector.pixel_stats)
    body = detector.model.backbone.body.eval()
    with torch.no_grad():
        expected = {str(i): x for i, x in enumerate(_maps(reference.eval(), batch.tensor, (6, 13, 18)))}
        found = body(batch.tensor)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-3, rtol=2e-3)


def _maps(features: nn.Sequential, x: torch.Tensor, wanted: tuple[int, ...]) -> list[torch.Tensor]:
    found = []
    for i, module in enumerate(features):
        x = module(x)
        if i in wanted:
            found.append(x)
    return found


def _pad_right_and_bottom(features: nn.Sequential) -> None:
    for module in list(features.modules()):
        for i, child in enumerate(module) if isinstance(module, nn.Sequential) else ():
            if isinstance(child, nn.Conv2d) and child.stride == (2, 2):
                child.padding = (0, 0)
                module[i] = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), child)


def test_defaults_with_backbone_weights(backbone_weights: Path) -> None:
    detector: Any = build_detector("torchvision:retinanet_mobilenet_v2_fpn", 3, backbone_weights=backbone_weights, **SMALL)
    body = detector.model.backbone.body
    assert not any(isinstance(m, nn.BatchNorm2d) for m in body.modules())
    assert not any(p.requires_grad for p in body["3"].parameters())
    assert all(p.requires_grad for p in body["4"].parameters())
    assert sum(isinstance(m, FoldedConv2d) and m._same for m in body.modules()) == 5


def test_build_options_rebuild_the_structure_without_files(backbone_weights: Path) -> None:
    name = "torchvision:fcos_mobilenet_v2_fpn"
    first: Any = build_detector(name, 3, backbone_weights=backbone_weights, **SMALL)
    import json

    second: Any = build_detector(name, 3, **json.loads(json.dumps(first.build_options)))
    second.load_state_dict(first.state_dict())
    batch = preprocess(images((64, 96)), first.pixel_stats)
    torch.testing.assert_close(second.predict(batch), first.predict(batch), rtol=0, atol=0)


def test_weights_of_a_whole_detector(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    name = "torchvision:fcos_tiny_fpn"
    first: Any = build_detector(name, 3)
    save_file({k: v.contiguous() for k, v in first.state_dict().items()}, tmp_path / "a.safetensors")
    torch.save(first.model.state_dict(), tmp_path / "b.pt")
    for file in ("a.safetensors", "b.pt"):
        second: Any = build_detector(name, 3, weights=tmp_path / file)
        torch.testing.assert_close(second.predict(images(HW)), first.predict(images(HW)), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"(?s)b.pt does not fit the detector: .*cls_logits.weight"):
        build_detector(name, 4, weights=tmp_path / "b.pt")


def test_backbone_files_that_do_not_fit(tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, tmp_path / "good.pth")
    build_detector("torchvision:fcos_resnet18_fpn", 3, backbone_weights=tmp_path / "good.pth", fpn_channels=32)
    state["conv1.weight"] = state["conv1.weight"][:8]
    state["layer9.weight"] = state.pop("layer1.0.conv1.weight")
    torch.save(state, tmp_path / "bad.pth")
    message = (
        r"bad.pth does not fit ResNet: 1 missing \(layer1.0.conv1.weight\); 1 unknown \(layer9.weight\); "
        r"1 other shape \(conv1.weight \[8, 3, 7, 7\] instead of \[64, 3, 7, 7\]\)"
    )
    with pytest.raises(ValueError, match=message):
        build_detector("torchvision:fcos_resnet18_fpn", 3, backbone_weights=tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"does not fit MobileNetV2: 260 missing \(features.0.0.weight, .* and 252 more\); 100 unknown"):
        build_detector("torchvision:fcos_mobilenet_v2_fpn", 3, backbone_weights=tmp_path / "good.pth")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist"):
        read_weights(tmp_path / "none.pt")
    (tmp_path / "a.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must end in .safetensors, .pt or .pth, got a.onnx"):
        read_weights(tmp_path / "a.onnx")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"must hold a dict of tensors \(a state_dict\), got list"):
        read_weights(tmp_path / "list.pt")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(40)])
def test_damaged_weights_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"weights file .*{name} cannot be read: \w"):
        read_weights(tmp_path / name)


def test_missing_safetensors_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"needs the package safetensors: pip install 'ssod_fast\[train\]'"):
        read_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:fcos_mobilnet_v2_fpn", r"'mobilnet_v2' is no convolutional network .*did you mean mobilenet_v2"),
        ("torchvision:fcs_resnet50_fpn", r"unknown detector 'fcs_resnet50_fpn': expected .*did you mean fcos_resnet50_fpn"),
        ("torchvision:fcos_vit_b_16_fpn", "'vit_b_16' is no convolutional network"),
        (
            "fcos_tiny_fpn",
            r"expected torchvision:NAME, own:NAME, hf:NAME, hf:FOLDER or package.module:callable.*did you mean fcos_tiny_fpn",
        ),
        ("hf:some/model", "unknown detector 'hf:some/model': expected hf:NAME with one of .* or hf:FOLDER"),
        ("no.such.module:build", "detector 'no.such.module:build' cannot be imported: No module named 'no'"),
        ("torch.nn:Nothing", "detector 'torch.nn:Nothing' cannot be imported"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_detector(name, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fpn_chanels": 64}, r"fcos_tiny_fpn has no option 'fpn_chanels' \(did you mean fpn_channels\?\); known: "),
        ({"min_size": 800}, "has no option 'min_size'"),
        ({"fpn_channels": 60}, "fpn_channels must be a positive multiple of 8, got 60"),
        ({"levels": (3, 8)}, r"levels must be \(first, last\) .* got \(3, 8\)"),
        ({"levels": (6, 7)}, r"levels must be \(first, last\)"),
        ({"head_convs": 5}, r"head_convs must lie in 1..4, got 5"),
        ({"tiny_norm": "layer"}, 'tiny_norm must be "group" or "batch", got \'layer\''),
        ({"trainable_layers": 6}, r"trainable_layers must lie in 0..5, got 6"),
        ({"prior_distance": -1.0}, "prior_distance must not be negative"),
        ({"aspect_ratios": ()}, "aspect_ratios must be positive numbers"),
        ({"anchor_scale": 0}, "anchor_scale must be positive, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_detector("torchvision:fcos_tiny_fpn", 3, **options)


def test_other_bad_requests() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        build_detector("torchvision:fcos_tiny_fpn", 0)
    with pytest.raises(ValueError, match=r"levels \(5, 5\) need strides \[32\], which alexnet does not have"):
        build_detector("torchvision:fcos_alexnet_fpn", 3, levels=(5, 5))


def test_options_of_the_torchvision_model_arrive() -> None:
    detector: Any = build_detector("torchvision:retinanet_tiny_fpn", 3, nms_thresh=0.33, topk_candidates=7, fg_iou_thresh=0.6)
    assert (detector.nms_thr, detector.topk_candidates, detector.settings.high) == (0.33, 7, 0.6)
    official: Any = build_detector("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", 3, box_nms_thresh=0.4)
    assert official.nms_thr == 0.4
    with pytest.raises(ValueError, match="has no option 'fpn_channels'"):
        build_detector("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", 3, fpn_channels=64)


def test_a_function_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    from detectors.models import build

    module = types.ModuleType("user_models")
    module.make = lambda num_classes, width=1: build("fcos", num_classes)  # type: ignore[attr-defined]
    module.wrong = lambda num_classes: nn.Linear(2, 2)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "user_models", module)
    detector: Any = build_detector("user_models:make", 6, width=3)
    assert detector.num_classes == 6
    assert detector.build_options == {"width": 3}
    with pytest.raises(TypeError, match=r"training with 'user_models:wrong' needs a detector .* got Linear"):
        build_detector("user_models:wrong", 6)


def test_backbone_names_are_torchvisions() -> None:
    names = backbone_names()
    assert {"tiny", "mobilenet_v2", "resnet18", "convnext_tiny"} <= set(names)
    assert not any(name.startswith(("vit", "swin")) for name in names)


def test_folding_frozen_batch_norm_changes_nothing() -> None:
    torch.manual_seed(0)
    for build in (torchvision.models.resnet18, torchvision.models.shufflenet_v2_x0_5):
        network = build().eval()
        for m in network.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean = torch.randn_like(m.running_mean) * 0.1
                m.running_var = 0.5 + torch.rand_like(m.running_var)
                m.weight.data = 0.5 + torch.rand_like(m.weight)
        x = torch.randn(2, 3, 64, 64)
        expected = network(x)
        names = {name for name in network.state_dict() if not name.endswith("num_batches_tracked")}
        frozen = copy.deepcopy(network).train()
        freeze_batch_norm(frozen)
        assert set(frozen.state_dict()) == names
        assert any(isinstance(m, FoldedConv2d) for m in frozen.modules())
        torch.testing.assert_close(frozen.eval()(x), expected, atol=1e-4, rtol=1e-3)


def test_a_copy_of_a_folded_network_follows_its_own_norm() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    freeze_batch_norm(network)
    twin = copy.deepcopy(network)
    assert isinstance(twin[1], FrozenBatchNorm2d)
    twin[1].weight.zero_()
    x = torch.randn(1, 3, 8, 8)
    assert twin(x).abs().max() == 0
    assert network(x).abs().max() > 0


@pytest.mark.parametrize("size", [7, 8, 9, 32])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (7, 2), (3, 3)])
def test_same_padding(size: int, kernel: int, stride: int) -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, kernel, stride, kernel // 2, bias=False))
    same_padding(network)
    assert isinstance(network[0], SameConv2d)
    network[0].weight.data.fill_(1.0)
    ones = torch.ones(1, 1, size, size)
    out = network(ones)
    cells = -(-size // stride)
    total = max((cells - 1) * stride + kernel - size, 0)
    assert out.shape == (1, 1, cells, cells)
    assert out[0, 0, 0, 0] == min(kernel - total // 2, size) ** 2  # the smaller half of the padding lies in front
