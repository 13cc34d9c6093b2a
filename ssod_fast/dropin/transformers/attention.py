"""The deformable attention of transformers in terms of our ops: its core, its functions, and the forward of each of its wrapper modules.

A wrapper projects queries and tokens and calls the core. The forwards here have the parameters of those they stand in for; each is bound to
a live module by `functools.partial`, which survives copying and pickling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...ops import ms_deform_attn, ms_deform_attn_fused
from ...ops._ms_deform_checks import Shapes
from .._attention import exporting
from .decomposed import decomposed_attention, decomposed_discrete, sampling_locations

Result = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Mode:
    """How a patched module samples.

    Attributes:
        fused: from offsets and logits directly, without locations and softmaxed weights.
        deterministic: see :func:`~ssod_fast.ops.ms_deform_attn`.
        always_weights: return attention weights whether or not somebody is known to look at them.
    """

    fused: bool = True
    deterministic: bool | None = None
    always_weights: bool = False


def core(
    value: Tensor,
    shapes: Shapes,
    locations: Tensor,
    weights: Tensor,
    num_points: Sequence[int] | None = None,
    method: str = "bilinear",
    deterministic: bool | None = None,
) -> Tensor:
    """:func:`~ssod_fast.ops.ms_deform_attn`, or plain PyTorch while a model is exported, since no runtime elsewhere knows our op."""
    if exporting():
        decomposed = decomposed_attention if method == "bilinear" else decomposed_discrete
        return decomposed(value, shapes, locations, weights, num_points)
    options: Any = {"num_points": num_points, "method": method, "deterministic": deterministic}
    return ms_deform_attn(value, shapes, locations, weights, **options)


class AttentionCore(nn.Module):
    """Stands in for transformers' `MultiScaleDeformableAttention`, which has no parameters either.

    Args:
        deterministic: see :func:`~ssod_fast.ops.ms_deform_attn`.
    """

    def __init__(self, deterministic: bool | None = None) -> None:
        super().__init__()
        self.deterministic = deterministic

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """Attention of sampled tokens.

        Args:
            value: [B, S, M, C].
            value_spatial_shapes: int64 [L, 2] (height, width); not read where the list is given.
            value_spatial_shapes_list: the same on the host.
            level_start_index: not needed, levels follow each other.
            sampling_locations: [B, Q, M, L, P, 2], normalised (x, y).
            attention_weights: [B, Q, M, L, P].
            im2col_step: not needed, any batch is one launch.

        Returns:
            [B, Q, M * C].
        """
        shapes = _known(value_spatial_shapes_list, value_spatial_shapes)
        return core(value, shapes, sampling_locations, attention_weights, deterministic=self.deterministic)


def attention(value: Tensor, value_spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    """Stands in for `multi_scale_deformable_attention` of Mask2Former and OneFormer, see :class:`AttentionCore`."""
    return core(value, value_spatial_shapes, sampling_locations, attention_weights)


def attention_v2(
    value: Tensor,
    value_spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: list[int],
    method: str = "default",
    *,
    deterministic: bool | None = None,
) -> Tensor:
    """Stands in for `multi_scale_deformable_attention_v2` of RT-DETRv2, D-FINE and DEIMv2.

    Args:
        value: [B, S, M, C].
        value_spatial_shapes: (height, width) of each level.
        sampling_locations: [B, Q, M, K, 2], normalised (x, y).
        attention_weights: [B, Q, M, K].
        num_points_list: samples of each level.
        method: "default" for bilinear, or "discrete".
        deterministic: see :func:`~ssod_fast.ops.ms_deform_attn`.

    Returns:
        [B, Q, M * C].
    """
    return core(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, _method(method), deterministic)


def _method(name: str) -> str:
    return "bilinear" if name == "default" else name


def _known(on_host: Any, on_device: Any) -> Any:
    """Sizes on the host where a model has them there: they cost nothing to read."""
    return on_device if on_host is None else on_host


def base_forward(
    module: Any,
    mode: Mode,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    position_embeddings: Tensor | None = None,
    reference_points: Any = None,
    spatial_shapes: Any = None,
    spatial_shapes_list: Any = None,
    level_start_index: Any = None,
    output_attentions: Any = None,
    **kwargs: Any,
) -> Result:
    """Forward of the wrappers of Deformable DETR, RT-DETR (both), LW-DETR, RF-DETR, Grounding DINO, OmDet-Turbo and PP-DocLayout.

    Args:
        module: the wrapper.
        mode: how to sample.
        hidden_states: [B, Q, E].
        attention_mask: bool [B, S], False for tokens that count as 0.
        encoder_hidden_states: [B, S, E].
        encoder_attention_mask: not used.
        position_embeddings: [B, Q, E], added to hidden_states.
        reference_points: [B, Q, L or 1, 2 or 4].
        spatial_shapes: int64 [L, 2].
        spatial_shapes_list: the same on the host.
        level_start_index: not needed.
        output_attentions: whether attention weights are wanted.
        kwargs: not used.

    Returns:
        [B, Q, E], and attention weights where somebody looks at them, else None.
    """
    hidden = None if attention_mask is None else ~attention_mask
    value = _project(module, encoder_hidden_states, hidden)
    queries = hidden_states if position_embeddings is None else hidden_states + position_embeddings
    shapes = _known(spatial_shapes_list, spatial_shapes)
    out, weights = _attend(module, mode, queries, value, reference_points, shapes, output_attentions)
    return module.output_proj(out), weights


def mask2former_forward(
    module: Any,
    mode: Mode,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    position_embeddings: Tensor | None = None,
    reference_points: Any = None,
    spatial_shapes_list: Any = None,
    level_start_index: Any = None,
    output_attentions: bool = False,
) -> Result:
    """As :func:`base_forward`, but `attention_mask` is True for tokens that count as 0."""
    hidden = None if attention_mask is None else ~attention_mask
    return base_forward(
        module,
        mode,
        hidden_states,
        hidden,
        encoder_hidden_states,
        position_embeddings=position_embeddings,
        reference_points=reference_points,
        spatial_shapes_list=spatial_shapes_list,
        output_attentions=output_attentions,
    )


def oneformer_forward(
    module: Any,
    mode: Mode,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    position_embeddings: Tensor | None = None,
    reference_points: Any = None,
    spatial_shapes: Any = None,
    level_start_index: Any = None,
    output_attentions: bool = False,
    spatial_shapes_list: Any = None,
) -> Result:
    """As :func:`mask2former_forward`, with sizes in both forms."""
    return mask2former_forward(
        module,
        mode,
        hidden_states,
        attention_mask,
        encoder_hidden_states,
        position_embeddings=position_embeddings,
        reference_points=reference_points,
        spatial_shapes_list=_known(spatial_shapes_list, spatial_shapes),
        output_attentions=output_attentions,
    )


def d_fine_forward(
    module: Any,
    mode: Mode,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    reference_points: Any = None,
    encoder_hidden_states: Any = None,
    spatial_shapes: Any = None,
    spatial_shapes_list: Any = None,
    **kwargs: Any,
) -> Result:
    """Forward of the wrappers of D-FINE and DEIMv2, which project neither tokens nor result; a mask hides whole tokens."""
    value = encoder_hidden_states
    if attention_mask is not None:
        value = value.masked_fill(~attention_mask[..., None], 0.0)
    value = value.unflatten(-1, (module.n_heads, -1))
    shapes = _known(spatial_shapes_list, spatial_shapes)
    return _attend(module, mode, hidden_states, value, reference_points, shapes, kwargs.get("output_attentions"))


def _project(module: Any, tokens: Tensor, hidden: Tensor | None) -> Tensor:
    """Projected tokens [B, S, M, C], 0 where `hidden` is True."""
    value = module.value_proj(tokens)
    if hidden is not None:
        value = value.masked_fill(hidden[..., None], 0.0)
    heads: Tensor = value.unflatten(-1, (module.n_heads, -1))
    return heads


@dataclass(frozen=True)
class _Options:
    """What differs between the wrappers' samples; attributes of a module that has them, else the paper's."""

    num_points: Sequence[int] | None
    scale: float
    method: str

    @classmethod
    def of(cls, module: Any) -> _Options:
        points = getattr(module, "num_points_list", getattr(module, "n_points_list", None))
        method = getattr(module, "decoder_method", getattr(module, "method", "default"))
        return cls(points, getattr(module, "offset_scale", 0.5), _method(method))


def _attend(module: Any, mode: Mode, queries: Tensor, value: Tensor, points: Tensor, shapes: Shapes, output_attentions: Any) -> Result:
    options = _Options.of(module)
    offsets = module.sampling_offsets(queries).unflatten(-1, (module.n_heads, -1, 2))  # [B, Q, M, K, 2]
    logits = module.attention_weights(queries).unflatten(-1, (module.n_heads, -1))  # [B, Q, M, K]
    if points.shape[0] != value.shape[0]:
        points = points.expand(value.shape[0], -1, -1, -1)
    out: Tensor
    if mode.fused and options.method == "bilinear" and not exporting():
        settings: Any = {"num_points": options.num_points, "offset_scale": options.scale, "deterministic": mode.deterministic}
        out = ms_deform_attn_fused(value, shapes, points, offsets, logits, **settings)
    else:
        locations = sampling_locations(points, offsets, shapes, options.num_points, options.scale)
        out = core(value, shapes, locations, logits.softmax(-1), options.num_points, options.method, mode.deterministic)
    observed = output_attentions or mode.always_weights or module._forward_hooks  # by hooks transformers records outputs
    return out, _weights(module, logits) if observed else None


def returns_weights_untold(class_name: str, path: str) -> bool:
    """Whether the layer around a wrapper passes attention weights on without telling the wrapper when they are wanted.

    Args:
        class_name: of the wrapper.
        path: of the wrapper in its model.

    Returns:
        True for OmDet-Turbo, and for the encoders of both Grounding DINOs, whose decoders do tell.
    """
    name = class_name.removesuffix(SUFFIX)
    return name == "OmDetTurbo" or (name in ("GroundingDino", "MMGroundingDino") and not path.endswith("encoder_attn"))


def _weights(module: Any, logits: Tensor) -> Tensor:
    """Attention weights, [B, Q, M, L, P] except where points differ between levels; a softmax, so that they have their gradient."""
    weights = logits.softmax(-1)
    if _Options.of(module).num_points is None:
        weights = weights.unflatten(-1, (module.n_levels, -1))
    return weights


@dataclass(frozen=True)
class Wrapper:
    """How a wrapper class is replaced."""

    forward: Callable[..., Result]
    parameters: tuple[tuple[str, ...], ...]  # accepted ones of the forward that is replaced
    members: tuple[str, ...]  # that the new forward reads


_MEMBERS = ("sampling_offsets", "attention_weights", "n_heads", "n_levels")
_BASE_PARAMETERS = (
    "hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "position_embeddings", "reference_points",
    "spatial_shapes", "spatial_shapes_list", "level_start_index",
)  # fmt: skip
_BASE = Wrapper(
    base_forward,
    ((*_BASE_PARAMETERS, "**kwargs"), (*_BASE_PARAMETERS, "output_attentions")),
    (*_MEMBERS, "value_proj", "output_proj"),
)
_V2 = Wrapper(base_forward, _BASE.parameters, (*_BASE.members, "offset_scale", "method", "n_points_list"))
_D_FINE = Wrapper(
    d_fine_forward,
    (
        (
            "hidden_states", "attention_mask", "reference_points", "encoder_hidden_states", "spatial_shapes", "spatial_shapes_list",
            "**kwargs",
        ),
    ),
    (*_MEMBERS, "offset_scale", "decoder_method", "num_points_list", "ms_deformable_attn_core"),
)  # fmt: skip
_MASK2FORMER = Wrapper(
    mask2former_forward,
    ((*_BASE_PARAMETERS[:6], "spatial_shapes_list", "level_start_index", "output_attentions"),),
    _BASE.members,
)
_ONEFORMER = Wrapper(
    oneformer_forward,
    (
        (*_BASE_PARAMETERS[:7], "level_start_index", "output_attentions", "spatial_shapes_list"),
        (*_BASE_PARAMETERS[:7], "level_start_index", "output_attentions"),  # 5.17
    ),
    _BASE.members,
)
_BASE_MODELS = (
    "DeformableDetr", "RTDetr", "GroundingDino", "MMGroundingDino", "LwDetr", "RfDetr", "OmDetTurbo", "PPDocLayoutV2", "PPDocLayoutV3",
    "PPDocLayoutV4",
)  # fmt: skip
SUFFIX = "MultiscaleDeformableAttention"
WRAPPERS = {
    **{name + SUFFIX: _BASE for name in _BASE_MODELS},
    "RTDetrV2" + SUFFIX: _V2,
    "DFine" + SUFFIX: _D_FINE,
    "Deimv2" + SUFFIX: _D_FINE,
    "Mask2FormerPixelDecoderEncoder" + SUFFIX: _MASK2FORMER,
    "OneFormerPixelDecoderEncoder" + SUFFIX: _ONEFORMER,
}
