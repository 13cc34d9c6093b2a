from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from deform_cases import DEVICES
from no_sync import no_sync
from torch import Tensor

from ssod_fast.nn import MultiScaleDeformableAttention
from ssod_fast.ops import ms_deform_attn

SHAPES = [(5, 7), (3, 4), (2, 2)]
TOKENS = 51


def random_module(
    num_points: Any = 2, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any
) -> MultiScaleDeformableAttention:
    """Every parameter random: at the initial ones offsets and weights do not depend on the query."""
    torch.manual_seed(0)
    module = MultiScaleDeformableAttention(24, 3, 3, num_points, **options).to(device, dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return module


def inputs(boxes: bool = False, levels: int = 3, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, reference points and tokens."""
    generator = torch.Generator().manual_seed(1)
    query, tokens = (torch.randn(2, n, 24, generator=generator, dtype=torch.float64) for n in (6, TOKENS))
    points = torch.rand(2, 6, levels, 4 if boxes else 2, generator=generator, dtype=torch.float64)
    return [t.to(device, dtype) for t in (query, points, tokens)]


def straightforward(
    module: MultiScaleDeformableAttention, query: Tensor, points: Tensor, tokens: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Equations 2 and 3 of the paper step by step, locations and weights in memory."""
    value = module.value_proj(tokens)
    if mask is not None:
        value = torch.where(mask.unsqueeze(-1), torch.zeros_like(value), value)
    counts = module.num_points
    level = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)], device=query.device)
    heads, samples = module.num_heads, len(level)
    offsets = module.sampling_offsets(query).view(*query.shape[:2], heads, samples, 2)
    weights = module.attention_weights(query).view(*query.shape[:2], heads, samples).softmax(-1)
    reference = points.expand(-1, -1, len(counts), -1)[:, :, level].unsqueeze(2)
    if points.shape[-1] == 2:
        shift = offsets / torch.tensor([(w, h) for h, w in SHAPES], device=query.device, dtype=query.dtype)[level]
    else:
        number = torch.tensor(counts, device=query.device, dtype=query.dtype)[level].unsqueeze(-1)
        shift = offsets / number * reference[..., 2:] * module.offset_scale
    value = value.view(*value.shape[:2], heads, -1)
    out = ms_deform_attn(value, SHAPES, reference[..., :2] + shift, weights, num_points=counts)
    return module.output_proj(out), weights


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("num_points", [2, (3, 1, 2)], ids=str)
def test_equals_the_steps_of_the_paper(num_points: Any, boxes: bool, levels: int, masked: bool, device: str) -> None:
    module = random_module(num_points, device, torch.float64, offset_scale=0.7)
    query, points, tokens = inputs(boxes, levels, device, torch.float64)
    mask = (torch.arange(TOKENS, device=device) % 5 == 0).expand(2, TOKENS) if masked else None
    leaves = [t.requires_grad_() for t in (query, points, tokens)]
    out, weights = module(*leaves, SHAPES, padding_mask=mask, return_weights=True)
    expected, shares = straightforward(module, *leaves, mask)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(weights, shares.detach(), atol=1e-12, rtol=1e-12)
    wanted = [*leaves, *module.parameters()]
    grads = [torch.autograd.grad(o.square().sum(), wanted) for o in (out, expected)]
    for grad, target in zip(*grads, strict=True):
        torch.testing.assert_close(grad, target, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("boxes", [False, True])
def test_equals_the_module_of_transformers(boxes: bool, device: str) -> None:
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention

    config = DeformableDetrConfig(d_model=24, num_feature_levels=3)
    theirs = DeformableDetrMultiscaleDeformableAttention(config, num_heads=3, n_points=2).to(device)
    ours = random_module(device=device)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    query, points, tokens = inputs(boxes, device=device)
    padding = torch.arange(TOKENS, device=device).expand(2, TOKENS) % 7 == 0
    table = torch.tensor(SHAPES, device=device)
    expected, weights = theirs(
        query,
        attention_mask=~padding,
        encoder_hidden_states=tokens,
        reference_points=points,
        spatial_shapes=table,
        spatial_shapes_list=SHAPES,
        level_start_index=torch.tensor([0, 35, 47], device=device),
    )
    for shapes, start in ((SHAPES, None), (table, None), (table, torch.tensor([0, 35, 47], device=device))):
        out, shares = ours(query, points, tokens, shapes, start, padding, return_weights=True)
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(shares, weights.flatten(3), atol=1e-6, rtol=1e-5)
        assert not shares.requires_grad


def test_initial_offsets() -> None:
    module = MultiScaleDeformableAttention(64, 8, 3, (4, 2, 1))
    offsets = module.sampling_offsets.bias.detach().view(8, 7, 2)
    pattern = torch.tensor([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)], dtype=torch.float32)
    for sample, distance in enumerate((1, 2, 3, 4, 1, 2, 1)):
        torch.testing.assert_close(offsets[:, sample], pattern * distance, atol=1e-6, rtol=0)


def test_initial_projections() -> None:
    module = MultiScaleDeformableAttention(64, 8)
    for parameter in (
        module.sampling_offsets.weight,
        *module.attention_weights.parameters(),
        module.value_proj.bias,
        module.output_proj.bias,
    ):
        assert (parameter == 0).all()
    for projection in (module.value_proj, module.output_proj):
        limit = math.sqrt(6 / 128)
        assert 0.9 * limit < projection.weight.abs().max() <= limit
    out = module(torch.randn(1, 3, 64), torch.rand(1, 3, 1, 2), torch.randn(1, 30, 64), [(4, 5), (3, 2), (1, 3), (1, 1)])
    assert out.shape == (1, 3, 64)


def test_names_of_parameters() -> None:
    module = MultiScaleDeformableAttention(24, 3, 3, 2)
    shapes = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
    assert shapes == {
        "sampling_offsets.weight": [36, 24],
        "sampling_offsets.bias": [36],
        "attention_weights.weight": [18, 24],
        "attention_weights.bias": [18],
        "value_proj.weight": [24, 24],
        "value_proj.bias": [24],
        "output_proj.weight": [24, 24],
        "output_proj.bias": [24],
    }
    assert module.state_dict().keys() == shapes.keys()
    assert "24, num_heads=3, num_points=[2, 2, 2], offset_scale=0.5" in repr(module)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(*inputs(), SHAPES), module(*inputs(), SHAPES))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_device_of_parameters(dtype: torch.dtype) -> None:
    module = MultiScaleDeformableAttention(24, 3, 3, 2, dtype=dtype)
    query, points, tokens = inputs(dtype=dtype)
    out, weights = module(query, points.to(torch.float32), tokens, SHAPES, return_weights=True)
    assert out.dtype == dtype
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert next(MultiScaleDeformableAttention(24, 3, device="meta").parameters()).device.type == "meta"


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device: str) -> None:
    module = random_module(device=device)
    leaves = [t.requires_grad_() for t in inputs(boxes=True, device=device)]
    expected = module(*leaves, SHAPES)
    with torch.autocast(device, torch.bfloat16):
        out = module(*leaves, SHAPES)
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() < 0.05 * expected.norm()
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in (*leaves, *module.parameters()))


@pytest.mark.parametrize("device", DEVICES)
def test_no_sync(device: str) -> None:
    module = random_module(device=device)
    query, points, tokens = inputs(device=device)
    table, mask = torch.tensor(SHAPES, device=device), torch.zeros(2, TOKENS, dtype=torch.bool, device=device)
    with no_sync():
        for shapes in (SHAPES, table):
            module(query, points, tokens, shapes, None, mask, return_weights=True)[0].sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_compile(device: str) -> None:
    torch._dynamo.reset()
    module = random_module((3, 1, 2), device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    leaves = [t.requires_grad_() for t in inputs(device=device)]
    results = [f(*leaves, SHAPES) for f in (compiled, module)]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    for grad, target in zip(*(torch.autograd.grad(r.square().sum(), leaves) for r in results), strict=True):
        torch.testing.assert_close(grad, target, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((24, 5), "num_heads must divide embed_dim, got 5 and 24"),
        ((0, 1), "embed_dim must be at least 1, got 0"),
        ((24, 0), "num_heads must be at least 1, got 0"),
        ((24, 3, 0), "num_levels must be at least 1, got 0"),
        ((24, 3, 3, (2, 2)), r"num_points must be one number or 3, one per level, >= 0 and not all 0, got \[2, 2\]"),
        ((24, 3, 2, (3, -1)), r"num_points must be one number or 2, one per level, .* got \[3, -1\]"),
        ((24, 3, 2, 0), r"num_points must be one number .* not all 0, got \[0, 0\]"),
    ],
)
def test_bad_sizes(sizes: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiScaleDeformableAttention(*sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"embed_dim": 32.0}, r"embed_dim must be an integer, got 32\.0"),
        ({"num_levels": "4"}, "num_levels must be an integer, got '4'"),
        ({"num_heads": None}, "num_heads must be an integer, got None"),
        ({"num_points": 2.5}, r"num_points must be an integer or a sequence of integers, got 2\.5"),
        ({"num_points": torch.tensor([4, 4, 4, 4])}, r"num_points must be .* got tensor\(\[4, 4, 4, 4\]\)"),
        ({"offset_scale": "x"}, "offset_scale must be a number, got str"),
        ({"num_points": [1, 2, 1.5, 1]}, r"num_points must be an integer or a sequence of integers, got \[1, 2, 1\.5, 1\]"),
    ],
)
def test_sizes_of_other_types(sizes: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        MultiScaleDeformableAttention(**sizes)


def test_sizes_that_are_fine() -> None:
    with pytest.raises(ValueError, match="offset_scale must be finite, got nan"):
        MultiScaleDeformableAttention(offset_scale=math.nan)
    assert MultiScaleDeformableAttention(24, 3, 2, np.int64(2)).num_points == [2, 2]
    module = random_module((3, 0, 1))
    torch.testing.assert_close(module(*inputs(), SHAPES), straightforward(module, *inputs())[0])


@pytest.mark.parametrize("name", ["query", "input_flatten"])
def test_tokens_of_wrong_types(name: str) -> None:
    module = random_module()
    given = dict(zip(("query", "reference_points", "input_flatten"), inputs(), strict=True))
    wrong = [
        (given[name].long(), f"{name} must be float32, float16, bfloat16 or float64, got torch.int64"),
        (given[name].numpy(), f"{name} must be a tensor, got ndarray"),
        (given[name].tolist(), f"{name} must be a tensor, got list"),
        (given[name].double(), f"{name} must be torch.float32 as the parameters are, outside of autocast, got torch.float64"),
        (given[name].bfloat16(), f"{name} must be torch.float32 as the parameters are, .* got torch.bfloat16"),
    ]
    for tokens, message in wrong:
        with pytest.raises(TypeError, match=message):
            module(**(given | {name: tokens}), spatial_shapes=SHAPES)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(**(given | {name: given[name].bfloat16()}), spatial_shapes=SHAPES).isfinite().all()


class Casting(torch.nn.Linear):
    """A projection that takes every dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


def test_projections_of_other_kinds_choose_their_dtypes() -> None:
    module = random_module()
    query, points, tokens = inputs()
    expected = module(query, points, tokens.bfloat16().float(), SHAPES)
    casting = Casting(24, 24)
    casting.load_state_dict(module.value_proj.state_dict())
    module.value_proj = casting
    assert torch.equal(module(query, points, tokens.bfloat16(), SHAPES), expected)


def test_sequence_first() -> None:
    """Also of an encoder, whose queries are as many as its tokens, so that only the reference points tell."""
    module = random_module()
    query, points, tokens = inputs()
    message = "query, input_flatten and reference_points must have the images in dimension 0, as many in each, got "
    first = query.transpose(0, 1), tokens.transpose(0, 1)
    for given in ((first[0], points, tokens), (query, points, first[1]), (first[0], points, first[1])):
        with pytest.raises(ValueError, match=message):
            module(*given, SHAPES)
    with pytest.raises(ValueError, match=message + r"\[51, 2, 24\], \[51, 2, 24\], \[2, 51, 3, 2\]"):
        module(first[1], torch.rand(2, TOKENS, 3, 2), first[1], SHAPES)


def test_bad_input() -> None:
    module = random_module()
    query, points, tokens = inputs()
    with pytest.raises(ValueError, match=r"query must be \[B, tokens, 24\], got \[2, 6, 23\]"):
        module(query[..., 1:], points, tokens, SHAPES)
    with pytest.raises(ValueError, match=r"input_flatten must be \[B, tokens, 24\], got \[51, 24\]"):
        module(query, points, tokens[0], SHAPES)
    with pytest.raises(ValueError, match=r"padding_mask must be \[2, 51\], got \[2, 50\]"):
        module(query, points, tokens, SHAPES, padding_mask=torch.zeros(2, 50, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"padding_mask must be bool, got torch.float32"):
        module(query, points, tokens, SHAPES, padding_mask=torch.zeros(2, 51))
    with pytest.raises(ValueError, match=r"reference_points must be \[2, 6, 3 or 1, 2 or 4\], got \[2, 6, 2, 2\]"):
        module(query, points[:, :, 1:], tokens, SHAPES)
    with pytest.raises(TypeError, match=r"padding_mask must be a tensor, got list"):
        module(query, points, tokens, SHAPES, padding_mask=[[False] * 51] * 2)
    with pytest.raises(TypeError, match=r"reference_points must be a tensor, got list"):
        module(query, points.tolist(), tokens, SHAPES)
    for shapes in ([(51, 1)], torch.tensor([(51, 1)])):
        with pytest.raises(ValueError, match="spatial_shapes must have 3 levels, got 1"):
            module(query, points, tokens, shapes)
    with pytest.raises(ValueError, match=r"spatial_shapes must be pairs .* got None"):
        module(query, points, tokens, None)
    with pytest.raises(ValueError, match="spatial_shapes must cover the 51 tokens of value"):
        module(query, points, tokens, [(5, 7), (3, 4), (2, 3)])
