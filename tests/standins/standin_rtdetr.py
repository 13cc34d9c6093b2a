"""Decoders with the published surface of RT-DETR v1 and v2, D-FINE and DEIM around deformable attention."""

import functools

import torch
import torch.nn.functional as F
from standin_attention import compose
from torch import nn


def deformable_attention_core_func(value, value_spatial_shapes, sampling_locations, attention_weights):
    return compose(value, value_spatial_shapes, sampling_locations, attention_weights)


def sample_level(image, locations, method):
    """[B * M, C, H, W], [B, Q, M, P, 2] -> [B * M, C, Q, P]; x and y clamped to the height where pixels are read."""
    positions = locations.permute(0, 2, 1, 3, 4).flatten(0, 1)
    if method == "default":
        return F.grid_sample(image, 2 * positions - 1, mode="bilinear", padding_mode="zeros", align_corners=False)
    h, w = image.shape[-2:]
    pixel = (positions * torch.tensor([w, h]) + 0.5).to(torch.int64).clamp(0, h - 1)
    rows = torch.arange(len(image))[:, None, None]
    return image[rows, :, pixel[..., 1], pixel[..., 0]].permute(0, 3, 1, 2)


def attend_levels(levels, shapes, locations, weights, points, method):
    """One [B, M, C, H * W] per level, locations [B, Q, M, K, 2], weights [B, Q, M, K] -> [B, Q, M * C]."""
    batch, heads, channels, _ = levels[0].shape
    parts = [
        sample_level(level.reshape(batch * heads, channels, h, w), part, method)
        for level, (h, w), part in zip(levels, shapes, locations.split(points, 3), strict=True)
    ]
    sampled = torch.cat(parts, -1).unflatten(0, (batch, heads))
    return torch.einsum("bmcqk,bqmk->bmcq", sampled, weights).flatten(1, 2).transpose(1, 2)


def split_levels(value, shapes):
    return value.permute(0, 2, 3, 1).split([h * w for h, w in shapes], -1)


class RTDETRv2:
    @staticmethod
    def deformable_attention_core_func_v2(
        value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method="default"
    ):
        levels = split_levels(value, value_spatial_shapes)
        return attend_levels(levels, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method)


class DFINE:
    @staticmethod
    def deformable_attention_core_func_v2(
        value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method="default"
    ):
        return attend_levels(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method)


class DEIM:
    @staticmethod
    def deformable_attention_core_func_v2(
        value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method="default", value_shape="default"
    ):
        levels = split_levels(value, value_spatial_shapes) if value_shape == "reshape" else value
        return attend_levels(levels, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method)


class MSDeformableAttention(nn.Module):
    """A layer; `core` is what its repository puts into the attribute."""

    def __init__(self, embed_dim, num_heads, num_points_list, core):
        super().__init__()
        self.num_heads, self.num_points_list, self.offset_scale = num_heads, num_points_list, 0.5
        scale = [1 / n for n in num_points_list for _ in range(n)]
        self.register_buffer("num_points_scale", torch.tensor(scale))
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * sum(num_points_list) * 2)
        self.attention_weights = nn.Linear(embed_dim, num_heads * sum(num_points_list))
        self.ms_deformable_attn_core = core
        self.first_version = core is deformable_attention_core_func
        if getattr(core, "keywords", {}).get("method") == "discrete":
            self.sampling_offsets.requires_grad_(False)

    def forward(self, query, reference_points, value, value_spatial_shapes):
        offsets = self.sampling_offsets(query).unflatten(2, (self.num_heads, -1, 2))
        weights = self.attention_weights(query).unflatten(2, (self.num_heads, -1)).softmax(-1)
        boxes = reference_points[:, :, None]
        locations = boxes[..., :2] + offsets * self.num_points_scale[:, None] * boxes[..., 2:] * self.offset_scale
        if self.first_version:
            levels = len(self.num_points_list)
            locations, weights = locations.unflatten(3, (levels, -1)), weights.unflatten(3, (levels, -1))
            return self.ms_deformable_attn_core(value, value_spatial_shapes, locations, weights)
        return self.ms_deformable_attn_core(value, value_spatial_shapes, locations, weights, self.num_points_list)


class TokenDecoder(nn.Module):
    """Values stay tokens, as in RT-DETR."""

    def __init__(self, layers, embed_dim, num_heads):
        super().__init__()
        self.num_head = num_heads
        self.layers = nn.ModuleList(layers)
        self.project = nn.Linear(embed_dim, embed_dim)

    def forward(self, query, boxes, memory, shapes):
        value = self.project(memory).unflatten(2, (self.num_head, -1))
        for layer in self.layers:
            query = query + layer(query, boxes.unsqueeze(2), value, shapes)
        return query


class SplittingDecoder(TokenDecoder):
    """Values are split once, channels first, as in D-FINE and DEIM."""

    def value_op(self, memory, value_proj, value_scale, memory_mask, memory_spatial_shapes):
        value = memory if value_proj is None else value_proj(memory)
        if memory_mask is not None:
            value = value * memory_mask.to(value.dtype).unsqueeze(-1)
        return split_levels(value.unflatten(2, (self.num_head, -1)), memory_spatial_shapes)

    def forward(self, query, boxes, memory, shapes):
        value = self.value_op(memory, self.project, None, torch.ones_like(memory[..., 0]), shapes)
        for layer in self.layers:
            query = query + layer(query, boxes.unsqueeze(2), value, shapes)
        return query


def decoder(repository, method="default"):
    """Two layers of 32 channels and 4 heads on 3 levels."""
    points = [2, 2, 2] if repository == "rtdetr v1" else [3, 4, 2]
    core, kind = {
        "rtdetr v1": (deformable_attention_core_func, TokenDecoder),
        "rtdetr v2": (functools.partial(RTDETRv2.deformable_attention_core_func_v2, method=method), TokenDecoder),
        "dfine": (functools.partial(DFINE.deformable_attention_core_func_v2, method=method), SplittingDecoder),
        "deim dfine": (functools.partial(DEIM.deformable_attention_core_func_v2, method=method), SplittingDecoder),
        "deim rtdetr": (
            functools.partial(DEIM.deformable_attention_core_func_v2, method=method, value_shape="reshape"),
            TokenDecoder,
        ),
    }[repository]
    return kind([MSDeformableAttention(32, 4, points, core) for _ in range(2)], 32, 4)
