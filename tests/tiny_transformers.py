"""Detectors of transformers with random weights, small enough for a CPU, built from configs alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Labels = list[dict[str, Tensor]]
SIZE = (64, 96)
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
SWIN = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "drop_path_rate": 0.0}


def resnet(config: Any, **options: Any) -> Any:
    return config(**RESNET, out_features=["stage2", "stage3", "stage4"], **options)


def deformable_detr(**options: Any) -> nn.Module:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    config = DeformableDetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=resnet(ResNetConfig), d_model=32,
        encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
        num_queries=12, num_labels=3, dropout=0.0, auxiliary_loss=True, **options,
    )  # fmt: skip
    return DeformableDetrForObjectDetection(config)


def rt_detr_options() -> dict[str, Any]:
    return {
        "d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": [8, 16, 16], "decoder_in_channels": [32, 32, 32],
        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_layers": 2,
        "num_queries": 20, "num_denoising": 10, "num_labels": 3, "use_pretrained_backbone": False, "backbone": None,
        "anchor_image_size": None,
    }  # fmt: skip


def rt_detr(**options: Any) -> nn.Module:
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=resnet(RTDetrResNetConfig), **{**rt_detr_options(), **options}))


def rt_detr_v2(**options: Any) -> nn.Module:
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    return RTDetrV2ForObjectDetection(RTDetrV2Config(backbone_config=resnet(RTDetrResNetConfig), **{**rt_detr_options(), **options}))


def d_fine(**options: Any) -> nn.Module:
    from transformers import DFineConfig, DFineForObjectDetection, RTDetrResNetConfig

    settings = {**rt_detr_options(), "decoder_n_points": [3, 6, 3], "hidden_expansion": 0.5, "depth_mult": 0.34, "decoder_layers": 3}
    return DFineForObjectDetection(DFineConfig(backbone_config=resnet(RTDetrResNetConfig), **{**settings, **options}))


def deimv2(**options: Any) -> nn.Module:
    from transformers import Deimv2Config, Deimv2ForObjectDetection, RTDetrResNetConfig

    settings = {**rt_detr_options(), "decoder_n_points": [3, 6, 3], "hidden_expansion": 0.5, "depth_mult": 0.34, "decoder_layers": 3}
    return Deimv2ForObjectDetection(Deimv2Config(backbone_config=resnet(RTDetrResNetConfig), **{**settings, **options}))


def rf_detr(**options: Any) -> nn.Module:
    from transformers import RfDetrConfig, RfDetrForObjectDetection
    from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

    backbone = RfDetrDinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=64, patch_size=8, num_windows=2,
        out_features=["stage1", "stage2"], drop_path_rate=0.0, layerscale_value=1.0,
    )  # fmt: skip
    config = RfDetrConfig(
        backbone_config=backbone, d_model=32, decoder_layers=2, decoder_self_attention_heads=2, decoder_cross_attention_heads=4,
        decoder_ffn_dim=32, num_queries=13, group_detr=3, num_labels=3, projector_scale_factors=[1.0], hidden_expansion=0.5,
        dropout=0.0, attention_dropout=0.0, auxiliary_loss=True, **options,
    )  # fmt: skip
    return RfDetrForObjectDetection(config)


def grounding_dino(**options: Any) -> nn.Module:
    from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection, ResNetConfig

    text = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=1200)
    config = GroundingDinoConfig(
        backbone_config=resnet(ResNetConfig), text_config=text, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32,
        decoder_ffn_dim=32, num_queries=12, max_text_len=16, num_feature_levels=4, dropout=0.0, auxiliary_loss=True,
        fusion_dropout=0.0, fusion_droppath=0.0, text_enhancer_dropout=0.0, **options,
    )  # fmt: skip
    return GroundingDinoForObjectDetection(config)


def mask2former(**options: Any) -> nn.Module:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    config = Mask2FormerConfig(
        backbone_config=SwinConfig(**SWIN, out_features=["stage1", "stage2", "stage3", "stage4"]), feature_size=32, mask_feature_size=32,
        hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16,
        num_queries=6, num_labels=3, train_num_points=64, backbone=None, use_pretrained_backbone=False, **options,
    )  # fmt: skip
    return Mask2FormerForUniversalSegmentation(config)


def oneformer(**options: Any) -> nn.Module:
    from transformers import OneFormerConfig, OneFormerForUniversalSegmentation, SwinConfig

    config = OneFormerConfig(
        backbone_config=SwinConfig(**SWIN, out_features=["stage1", "stage2", "stage3", "stage4"]), conv_dim=32, mask_dim=32, hidden_dim=32,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6,
        num_labels=3, train_num_points=64, backbone=None, use_pretrained_backbone=False, text_encoder_width=64,
        text_encoder_context_length=7, text_encoder_num_layers=1, text_encoder_vocab_size=50, text_encoder_n_ctx=0, query_dec_layers=1,
        task_seq_len=7, is_training=True, dropout=0.0, **options,
    )  # fmt: skip
    return OneFormerForUniversalSegmentation(config)


BUILD: dict[str, Callable[..., nn.Module]] = {
    "deformable_detr": deformable_detr,
    "rt_detr": rt_detr,
    "rt_detr_v2": rt_detr_v2,
    "d_fine": d_fine,
    "deimv2": deimv2,
    "rf_detr": rf_detr,
    "grounding_dino": grounding_dino,
    "mask2former": mask2former,
    "oneformer": oneformer,
}


PERTURBED = {
    "sampling_offsets": 0.05,
    "attention_weights": 0.1,
    "value_proj": 0.2,
    "output_proj": 0.2,
    "bbox_embed": 0.05,
    "class_embed": 0.05,
}


def build(name: str, **options: Any) -> nn.Module:
    """A model that is not fresh: then samples lie on kinks of the gradient, and attention changes next to nothing."""
    torch.manual_seed(0)
    model = BUILD[name](**options)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        scale = next((scale for part, scale in PERTURBED.items() if part in key), 0.0)
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def labels(sizes: tuple[int, ...] = (3, 2), seed: int = 2, weights: bool = False) -> Labels:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n in sizes:
        boxes = torch.cat([0.2 + 0.6 * torch.rand(n, 2, generator=generator), 0.1 + 0.3 * torch.rand(n, 2, generator=generator)], -1)
        entry = {"class_labels": torch.randint(0, 3, (n,), generator=generator), "boxes": boxes}
        if weights:
            entry["weights"] = torch.rand(n, generator=generator)
        found.append(entry)
    return found


def inputs(name: str, sizes: tuple[int, ...] = (3, 2), *, padded: bool = True, train: bool = True, seed: int = 3) -> dict[str, Any]:
    """Arguments of a forward pass with labels; the second image is padded on two sides."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (64, 64) if name == "rf_detr" else SIZE
    given: dict[str, Any] = {"pixel_values": torch.randn(len(sizes), 3, height, width, generator=generator)}
    if padded:
        given["pixel_mask"] = torch.ones(len(sizes), height, width, dtype=torch.long)
        if name not in ("rf_detr",):
            given["pixel_mask"][-1, 48:], given["pixel_mask"][-1, :, 64:] = 0, 0
    if name in ("mask2former", "oneformer"):
        if train:
            given["mask_labels"] = [(torch.rand(n, height, width, generator=generator) > 0.5).float() for n in sizes]
            given["class_labels"] = [torch.randint(0, 3, (n,), generator=generator) for n in sizes]
        if name == "oneformer":
            given["task_inputs"] = torch.randint(0, 50, (len(sizes), 7), generator=generator)
            given["text_inputs"] = torch.randint(0, 50, (len(sizes), 6, 7), generator=generator)
    elif train:
        given["labels"] = labels(sizes)
    if name == "grounding_dino":
        # [CLS] cat . dog . bird . [SEP] with the separators that the model splits phrases at
        given["input_ids"] = torch.tensor([[101, 500, 1012, 501, 1012, 502, 1012, 102]] * len(sizes))
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    return given


def convert(value: Any, dtype: torch.dtype) -> Any:
    """Floating point tensors of nested inputs in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: convert(entry, dtype) for key, entry in value.items()}
    return [convert(entry, dtype) for entry in value] if isinstance(value, list) else value
