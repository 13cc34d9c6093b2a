from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_transformers
import torch
from detr_networks import FULL, PADDED, config, images
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models._utils import IntermediateLayerGetter

from ssod_fast.detectors.deformable_detr import DeformableDETR, DETRBackbone
from ssod_fast.detectors.deformable_detr.convert import config_from_transformers, from_transformers, to_transformers
from ssod_fast.detectors.protocol import ImageBatch
from ssod_fast.detectors.weights import WeightsFile

REFINE = {"with_box_refine": True}
TWO_STAGE = {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 15}
KINDS = pytest.mark.parametrize("options", [{}, REFINE, TWO_STAGE], ids=["plain", "refine", "two_stage"])


class _TheirBackbone(nn.Module):
    """A backbone of transformers, for networks too small for torchvision."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self.channels = list(body.channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.body(x).feature_maps)


def _theirs(options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return _randomised(tiny_transformers.deformable_detr(**options))


def _randomised(model: Any) -> Any:
    """Random also where the initialisation is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for statistic in model.buffers():
            statistic.add_(torch.rand_like(statistic) * 0.1)
    return model.eval()


def _ours(model: Any) -> DeformableDETR:
    options = config_from_transformers(model.config)
    network = DeformableDETR(options, _TheirBackbone(model.model.backbone.model))
    weights = from_transformers(model.state_dict(), options)
    loaded = network.load_state_dict({n: v for n, v in weights.items() if not n.startswith("backbone.")}, strict=False)
    assert not loaded.unexpected_keys
    assert all(name.startswith("backbone.") for name in loaded.missing_keys)
    return network.eval()


def _mask(batch: ImageBatch) -> Tensor:
    mask = torch.zeros(len(batch), *batch.tensor.shape[-2:], dtype=torch.int64)
    for image, (h, w) in zip(mask, batch.sizes, strict=True):
        image[:h, :w] = 1
    return mask


@KINDS
@pytest.mark.parametrize("sizes", [FULL, PADDED], ids=["full", "padded"])
@torch.no_grad()
def test_outputs_are_those_of_transformers(options: dict[str, Any], sizes: list[tuple[int, int]]) -> None:
    model = _theirs(options)
    batch = images(sizes)
    expected = model(pixel_values=batch.tensor, pixel_mask=_mask(batch))
    decoded, _ = _ours(model)(batch)
    assert (decoded.logits[-1] - expected.logits).abs().max() < 1e-4
    assert (decoded.boxes[-1] - expected.pred_boxes).abs().max() < 1e-4
    assert (decoded.hidden - expected.intermediate_hidden_states.transpose(0, 1)).abs().max() < 1e-4
    assert expected.pred_boxes.std() > 0.01  # boxes differ from each other, so that equality says something


@torch.no_grad()
def test_queries_from_the_border_of_the_image_start_where_those_of_transformers_do() -> None:
    model = _theirs({**TWO_STAGE, "two_stage_num_proposals": 110})
    batch, network = images(PADDED), _ours(model)
    assert network.select(network.encode(network.extract(batch)))[0].reference.isinf().any()
    expected = model(pixel_values=batch.tensor, pixel_mask=_mask(batch))
    decoded, _ = network(batch)
    # A start that is pulled in to 1 - 1e-5 moves the hidden states by 5e-5.
    assert (decoded.hidden - expected.intermediate_hidden_states.transpose(0, 1)).abs().max() < 1e-5


@torch.no_grad()
def test_encoder_proposals_are_those_of_transformers() -> None:
    model = _theirs(TWO_STAGE)
    batch = images()
    expected = model(pixel_values=batch.tensor, pixel_mask=_mask(batch))
    network = _ours(model)
    chosen = network(batch)[1]
    network.train()
    every = network(batch)[1]
    assert (every.logits - expected.enc_outputs_class).abs().max() < 1e-4
    assert (every.boxes - expected.enc_outputs_coord_logits.sigmoid()).abs().max() < 1e-4
    assert chosen.logits.shape == (2, 15, 3)
    best = expected.enc_outputs_class[..., 0].topk(15, 1).values
    assert (chosen.logits[..., 0] - best).abs().max() < 1e-4


@KINDS
def test_weights_return_bit_for_bit(options: dict[str, Any]) -> None:
    model = _theirs(options)
    original = model.state_dict()
    network = config_from_transformers(model.config)
    ours = from_transformers(original, network)
    back = to_transformers(ours, network)
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)
    again = from_transformers(back, network)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


@torch.no_grad()
def test_a_whole_resnet_model_converts() -> None:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        hidden_sizes=[64, 128, 256, 512], depths=[2] * 4, layer_type="basic", out_features=["stage2", "stage3", "stage4"]
    )
    theirs = DeformableDetrConfig(
        backbone_config=backbone, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_labels=3, with_box_refine=True, two_stage=True, two_stage_num_proposals=15,
    )  # fmt: skip
    torch.manual_seed(0)
    model = _randomised(DeformableDetrForObjectDetection(theirs))
    options = config_from_transformers(model.config)
    network = DeformableDETR(options, DETRBackbone("resnet18")).eval()
    network.load_state_dict(from_transformers(model.state_dict(), options))
    batch = images()
    expected, (decoded, _) = model(pixel_values=batch.tensor, pixel_mask=_mask(batch)), network(batch)
    assert (decoded.logits[-1] - expected.logits).abs().max() < 1e-4
    assert (decoded.boxes[-1] - expected.pred_boxes).abs().max() < 1e-4
    for names in ("transformers", "torchvision"):
        again = from_transformers(to_transformers(network.state_dict(), options, names), options)
        assert all(torch.equal(again[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("options", [{}, REFINE], ids=["plain", "refine"])
def test_names_of_transformers_4_and_heads_that_are_there_once_load(options: dict[str, Any]) -> None:
    model = _theirs(options)
    network = config_from_transformers(model.config)
    weights = model.state_dict()
    once = "bbox_embed" if options else "bbox_embed.1"
    old = {
        name.replace("backbone.model", "backbone.conv_encoder.model").replace("mlp.fc", "fc").replace("o_proj", "out_proj"): value
        for name, value in weights.items()
        if not name.startswith(once)
    }
    expected, got = from_transformers(weights, network), from_transformers(old, network)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@torch.no_grad()
def test_one_class_head_of_transformers_gets_the_weights_of_the_last_layer() -> None:
    model = _theirs(REFINE)
    network = _ours(model)
    for parameter in network.decoder.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    converted = to_transformers(network.state_dict(), network.config, "torchvision")
    assert not torch.equal(converted["class_embed.0.weight"], converted["class_embed.1.weight"])
    model.load_state_dict({n: v for n, v in converted.items() if "backbone" not in n}, strict=False)
    batch = images()
    expected, (decoded, _) = model(pixel_values=batch.tensor, pixel_mask=_mask(batch)), network(batch)
    assert model.class_embed[0].weight is model.class_embed[1].weight
    assert (decoded.logits[-1] - expected.logits).abs().max() < 1e-4
    assert (decoded.boxes[-1] - expected.pred_boxes).abs().max() < 1e-4


def test_what_does_not_convert_is_named() -> None:
    model = tiny_transformers.deformable_detr()
    options = config_from_transformers(model.config)
    weights = model.state_dict()
    with pytest.raises(ValueError, match=r"names that do not belong to such a network: mask_head\.weight"):
        from_transformers({**weights, "mask_head.weight": torch.zeros(1)}, options)
    with pytest.raises(ValueError, match=r"state_dict must hold class_embed\.0"):
        from_transformers({n: v for n, v in weights.items() if not n.startswith("class_embed")}, options)
    with pytest.raises(ValueError, match="bbox_embed must be the same for all layers where own_heads is False"):
        from_transformers({**weights, "bbox_embed.1.layers.0.bias": torch.ones(32)}, options)
    with pytest.raises(ValueError, match="look_forward_twice must be off"):
        from_transformers(weights, config("dino"))
    with pytest.raises(ValueError, match=r'backbone must be "torchvision" or "transformers", got .timm.'):
        to_transformers(from_transformers(weights, options), options, "timm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'backbone "transformers" needs a ResNet, got features\.0\.weight'):
        to_transformers({**from_transformers(weights, options), "backbone.body.features.0.weight": torch.zeros(1)}, options)


def test_configs_that_have_no_counterpart_are_refused() -> None:
    theirs = tiny_transformers.deformable_detr().config
    theirs.decoder_ffn_dim = 64
    with pytest.raises(ValueError, match="encoder_ffn_dim and decoder_ffn_dim must be equal, got 32 and 64"):
        config_from_transformers(theirs)
    theirs.decoder_ffn_dim, theirs.position_embedding_type = 32, "learned"
    with pytest.raises(ValueError, match="position_embedding_type must be 'sine', got 'learned'"):
        config_from_transformers(theirs)


@torch.no_grad()
def test_state_dicts_of_torchvision_resnets_load() -> None:
    torch.manual_seed(0)
    classifier = resnet18(weights=None).eval()
    for name, value in classifier.named_buffers():
        if "running" in name:
            value.add_(torch.rand_like(value))
    weights = WeightsFile(Path("resnet18.pth"), classifier.state_dict(), {})
    backbone = DETRBackbone("resnet18", weights).eval()
    x = torch.randn(1, 3, 64, 96)
    expected = IntermediateLayerGetter(classifier, {"layer2": "8", "layer3": "16", "layer4": "32"})(x).values()
    maps = backbone(x)
    assert [m.shape[1] for m in maps] == backbone.channels == [128, 256, 512]
    for got, want in zip(maps, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    trained = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    names = set(DETRBackbone("resnet18", frozen_bn=False).body.state_dict())
    assert names == {n for n in classifier.state_dict() if not n.startswith("fc.")}
