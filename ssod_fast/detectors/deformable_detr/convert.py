"""Weights of transformers' DeformableDetrForObjectDetection, to and fro, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .config import DETRConfig

Naming = Literal["torchvision", "transformers"]

# Ours: theirs. Prefixes of names, and what is inside of a layer.
_ENCODER_LAYER = {
    "attention.": "self_attn.",
    "attention_norm.": "self_attn_layer_norm.",
    "ffn.linear1.": "mlp.fc1.",
    "ffn.linear2.": "mlp.fc2.",
    "ffn_norm.": "final_layer_norm.",
}
_DECODER_LAYER = {
    "self_attention.q_proj.": "self_attn.q_proj.",
    "self_attention.k_proj.": "self_attn.k_proj.",
    "self_attention.v_proj.": "self_attn.v_proj.",
    "self_attention.out_proj.": "self_attn.o_proj.",
    "self_norm.": "self_attn_layer_norm.",
    "cross_attention.": "encoder_attn.",
    "cross_norm.": "encoder_attn_layer_norm.",
    "ffn.linear1.": "mlp.fc1.",
    "ffn.linear2.": "mlp.fc2.",
    "ffn_norm.": "final_layer_norm.",
}
_LEARNED = {"queries.centre.": "model.reference_points."}
_TWO_STAGE = {
    "queries.output.": "model.enc_output.",
    "queries.output_norm.": "model.enc_output_norm.",
    "queries.from_box.": "model.pos_trans.",
    "queries.from_box_norm.": "model.pos_trans_norm.",
}
_LEARNED_PAIR = "queries.positions.weight", "queries.content.weight"
_LEARNED_BOTH = "model.query_position_embeddings.weight"
_BODY, _THEIR_BODY = "backbone.body.", "model.backbone.model."

# Names in checkpoints of transformers 4, and the copies of heads in the decoder.
_OLD = (
    (re.compile(r"^model\.backbone\.conv_encoder\.model\."), _THEIR_BODY),
    (re.compile(r"(layers\.\d+\.)(fc[12]\.)"), r"\1mlp.\2"),
    (re.compile(r"^(model\.decoder\.layers\.\d+\.self_attn\.)out_proj\."), r"\1o_proj."),
    (re.compile(r"^model\.decoder\.((?:class|bbox)_embed\.)"), r"\1"),
)
# ResNets in transformers: theirs to torchvision's. Counting starts at 0 there and at 1 here.
_STEM = {"embedder.embedder.convolution.": "conv1.", "embedder.embedder.normalization.": "bn1."}
_STAGE = re.compile(r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)\.|shortcut\.)(convolution|normalization)\.")
_LAYER = re.compile(r"^layer(\d+)\.(\d+)\.(conv|bn|downsample\.)(\d+)\.")


def config_from_transformers(config: Any) -> DETRConfig:
    """The options of a network that takes the weights of a model with this `DeformableDetrConfig`.

    `dropout` counts for attention and hidden units as well, as in the published network; transformers has options of their own for these.

    Raises:
        ValueError: for options that this network does not have.
    """
    _check_equal(config, "encoder_attention_heads", "decoder_attention_heads")
    _check_equal(config, "encoder_ffn_dim", "decoder_ffn_dim")
    _check_equal(config, "encoder_n_points", "decoder_n_points")
    for name, expected in (("position_embedding_type", "sine"), ("activation_function", "relu")):
        if getattr(config, name) != expected:
            raise ValueError(f"{name} must be {expected!r}, got {getattr(config, name)!r}")
    return DETRConfig(
        num_classes=config.num_labels,
        queries=config.two_stage_num_proposals if config.two_stage else config.num_queries,
        width=config.d_model,
        heads=config.encoder_attention_heads,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        ffn=config.encoder_ffn_dim,
        levels=config.num_feature_levels,
        points=config.encoder_n_points,
        dropout=float(config.dropout),
        selection="two_stage" if config.two_stage else "none",
        box_refine=bool(config.with_box_refine),
        own_heads=bool(config.with_box_refine),
        norm_groups=32,
    )


def from_transformers(state_dict: Mapping[str, Tensor], config: DETRConfig) -> dict[str, Tensor]:
    """Weights of a :class:`DeformableDETR` whose backbone is a :class:`DETRBackbone`.

    Args:
        state_dict: of a `DeformableDetrForObjectDetection`, with a ResNet of transformers or of timm (which has torchvision's names). What
            several heads share may be there once, as `save_pretrained` leaves it.
        config: see :func:`config_from_transformers`.

    Raises:
        ValueError: options that transformers does not have, names that it does not know, or heads that are missing or, where the network
            has one for all layers, differ.
    """
    _check_config(config)
    theirs = _canonical(state_dict)
    converted: dict[str, Tensor] = {}
    for ours, their in _prefixes(config):
        converted.update(_take(theirs, their, ours))
    for kind, our_kind in (("class_embed", "classes"), ("bbox_embed", "boxes")):
        converted.update(_take_heads(theirs, kind, our_kind, config))
    if _LEARNED_BOTH in theirs and config.selection == "none":
        position, content = theirs.pop(_LEARNED_BOTH).chunk(2, 1)
        converted.update(zip(_LEARNED_PAIR, (position, content), strict=True))
    for name in [name for name in theirs if name.startswith(_THEIR_BODY)]:
        converted[_BODY + _to_torchvision(name.removeprefix(_THEIR_BODY))] = theirs.pop(name)
    if theirs:
        raise ValueError(f"state_dict holds names that do not belong to such a network: {', '.join(sorted(theirs)[:8])}")
    return converted


def to_transformers(state_dict: Mapping[str, Tensor], config: DETRConfig, backbone: Naming = "transformers") -> dict[str, Tensor]:
    """Weights of a `DeformableDetrForObjectDetection`, all copies of heads included.

    With refinement but without two stages, a model that transformers 5 makes from a config has one class head for all layers. Its
    `load_state_dict` gives it the weights of the last layer, from which detections are read; `from_pretrained` keeps the heads apart.

    Args:
        state_dict: of a :class:`DeformableDETR` whose backbone is a :class:`DETRBackbone` of a ResNet.
        config: of the network.
        backbone: whose names the ResNet gets; timm's are torchvision's.

    Raises:
        ValueError: options that transformers does not have, or another backbone than a ResNet for transformers.
    """
    _check_config(config)
    if backbone not in ("torchvision", "transformers"):
        raise ValueError(f'backbone must be "torchvision" or "transformers", got {backbone!r}')
    ours = {name: value for name, value in state_dict.items() if not name.endswith("num_batches_tracked")}
    converted: dict[str, Tensor] = {}
    for our, their in _prefixes(config):
        converted.update(_take(ours, our, their))
    for kind, our_kind in (("class_embed", "classes"), ("bbox_embed", "boxes")):
        converted.update(_give_heads(ours, kind, our_kind, config))
    if config.selection == "none":
        converted[_LEARNED_BOTH] = torch.cat([ours.pop(name) for name in _LEARNED_PAIR], 1)
    for name in [name for name in ours if name.startswith(_BODY)]:
        inner = name.removeprefix(_BODY)
        converted[_THEIR_BODY + (_to_theirs(inner) if backbone == "transformers" else inner)] = ours.pop(name)
    if ours:
        raise ValueError(f"state_dict holds names that do not belong to such a network: {', '.join(sorted(ours)[:8])}")
    return converted


def _prefixes(config: DETRConfig) -> list[tuple[str, str]]:
    """Prefixes of our names and of theirs, for everything but heads and backbone."""
    pairs = [("level_embedding", "model.level_embed")]
    pairs += [(f"projections.{i}.", f"model.input_proj.{i}.") for i in range(config.levels)]
    for part, layers, names in (("encoder", config.encoder_layers, _ENCODER_LAYER), ("decoder", config.decoder_layers, _DECODER_LAYER)):
        for i in range(layers):
            pairs += [(f"{part}.layers.{i}.{ours}", f"model.{part}.layers.{i}.{theirs}") for ours, theirs in names.items()]
    return pairs + list((_LEARNED if config.selection == "none" else _TWO_STAGE).items())


def _take(source: dict[str, Tensor], prefix: str, new: str) -> dict[str, Tensor]:
    """Moves what starts with `prefix` out of `source`, under a new prefix."""
    return {new + name.removeprefix(prefix): source.pop(name) for name in [n for n in source if n.startswith(prefix)]}


def _canonical(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once, under the names of transformers 5; counters of batch norm, which is frozen, are left out."""
    renamed: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if name.endswith("num_batches_tracked"):
            continue
        for pattern, replacement in _OLD:
            name = pattern.sub(replacement, name)
        renamed.setdefault(name, value)
    return renamed


def _take_heads(theirs: dict[str, Tensor], kind: str, ours: str, config: DETRConfig) -> dict[str, Tensor]:
    """Heads of all layers and, last in theirs, of the encoder."""
    count = config.decoder_layers + (config.selection == "two_stage")
    heads = [_take(theirs, f"{kind}.{i}.", "") for i in range(count)]
    if not heads[0]:
        raise ValueError(f"state_dict must hold {kind}.0")
    heads = [head or heads[0] for head in heads]
    decoder = heads[: config.decoder_layers]
    if not config.own_heads and not all(_same(head, decoder[0]) for head in decoder):
        raise ValueError(f"{kind} must be the same for all layers where own_heads is False")
    names = [f"decoder.heads.{ours}.{i}." for i in range(config.decoder_layers if config.own_heads else 1)]
    pairs = [*zip(names, decoder, strict=False), *zip([f"queries.{ours}."], heads[config.decoder_layers :], strict=False)]
    return {prefix + name: value for prefix, head in pairs for name, value in head.items()}


def _give_heads(ours: dict[str, Tensor], kind: str, our_kind: str, config: DETRConfig) -> dict[str, Tensor]:
    """Heads of all layers and of the encoder, and their copies in the decoder."""
    own = [_take(ours, f"decoder.heads.{our_kind}.{i}.", "") for i in range(config.decoder_layers if config.own_heads else 1)]
    heads = own if config.own_heads else own * config.decoder_layers
    if config.selection == "two_stage":
        heads = [*heads, _take(ours, f"queries.{our_kind}.", "")]
    copied = config.selection == "two_stage" if kind == "class_embed" else config.box_refine
    places: Sequence[str] = (kind, f"model.decoder.{kind}") if copied else (kind,)
    return {f"{place}.{i}.{name}": value for place in places for i, head in enumerate(heads) for name, value in head.items()}


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _to_torchvision(name: str) -> str:
    """A name inside of transformers' ResNet as torchvision has it; others stay."""
    for theirs, ours in _STEM.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    match = _STAGE.match(name)
    if match is None:
        return name
    stage, block, layer, kind = match.groups()
    if layer is None:
        inner = f"downsample.{int(kind == 'normalization')}"
    else:
        inner = f"{'conv' if kind == 'convolution' else 'bn'}{int(layer) + 1}"
    return f"layer{int(stage) + 1}.{block}.{inner}.{name[match.end() :]}"


def _to_theirs(name: str) -> str:
    """A name inside of torchvision's ResNet as transformers has it."""
    for theirs, ours in _STEM.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    match = _LAYER.match(name)
    if match is None:
        raise ValueError(f'backbone "transformers" needs a ResNet, got {name}')
    stage, block, kind, number = match.groups()
    if kind == "downsample.":
        inner = f"shortcut.{('convolution', 'normalization')[int(number)]}"
    else:
        inner = f"layer.{int(number) - 1}.{'convolution' if kind == 'conv' else 'normalization'}"
    return f"encoder.stages.{int(stage) - 1}.layers.{block}.{inner}.{name[match.end() :]}"


def _check_config(config: DETRConfig) -> None:
    for name in ("look_forward_twice", "box_positions", "denoising"):
        if getattr(config, name):
            raise ValueError(f"{name} must be off for weights of transformers' Deformable DETR, got {getattr(config, name)}")


def _check_equal(config: Any, first: str, second: str) -> None:
    if getattr(config, first) != getattr(config, second):
        raise ValueError(f"{first} and {second} must be equal, got {getattr(config, first)} and {getattr(config, second)}")
