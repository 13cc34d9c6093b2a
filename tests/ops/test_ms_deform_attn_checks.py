from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ssod_fast.ops import _ms_deform_checks, ms_deform_attn, ms_deform_attn_fused
from ssod_fast.ops.ms_deform_attn import ms_deform_attn_gradients

SHAPES = [(2, 3), (1, 2)]  # 8 tokens


def plain(**changes: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "value": torch.zeros(2, 8, 3, 4),
        "spatial_shapes": SHAPES,
        "sampling_locations": torch.zeros(2, 5, 3, 4, 2),
        "attention_weights": torch.zeros(2, 5, 3, 4),
    }
    return ms_deform_attn(**(arguments | changes))


def fused(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "value": torch.zeros(2, 8, 3, 4),
        "spatial_shapes": SHAPES,
        "reference_points": torch.zeros(2, 5, 2, 2),
        "sampling_offsets": torch.zeros(2, 5, 3, 4, 2),
        "attention_logits": torch.zeros(2, 5, 3, 4),
    }
    return ms_deform_attn_fused(**(arguments | changes))


SHARED = [
    ({"value": torch.zeros(2, 8, 12)}, ValueError, r"value must be \[B, S, M, C\], got \[2, 8, 12\]"),
    ({"value": torch.zeros(2, 8, 3, 4).int()}, TypeError, "value must be float32, float16, bfloat16 or float64, got torch.int32"),
    ({"value": torch.zeros(2, 8, 3, 4, dtype=torch.complex64)}, TypeError, "value must be float32, .* got torch.complex64"),
    ({"value": torch.zeros(2, 8, 3, 4).to(torch.float8_e5m2)}, TypeError, "value must be float32, .* got torch.float8_e5m2"),
    ({"value": np.zeros((2, 8, 3, 4))}, TypeError, "value must be a tensor, got ndarray"),
    (
        {"spatial_shapes": [(2, 3), (1, 3)]},
        ValueError,
        r"spatial_shapes must cover the 8 tokens of value, got \[\(2, 3\), \(1, 3\)\], which have 9",
    ),
    ({"spatial_shapes": [2, 3]}, ValueError, r"spatial_shapes must be pairs \(height, width\) or a tensor \[L, 2\], got \[2, 3\]"),
    ({"spatial_shapes": [(2, 3, 1), (1, 2, 1)]}, ValueError, "spatial_shapes must be pairs"),
    ({"spatial_shapes": None}, ValueError, "spatial_shapes must be pairs .* got None"),
    ({"spatial_shapes": [(-2, -3), (1, 2)]}, ValueError, r"spatial_shapes must hold integers >= 0, got \[\(-2, -3\), \(1, 2\)\]"),
    ({"spatial_shapes": [(2.0, 3.0), (1.0, 2.0)]}, ValueError, "spatial_shapes must hold integers >= 0"),
    ({"spatial_shapes": list(torch.tensor(SHAPES))}, ValueError, "spatial_shapes must hold integers >= 0"),
    ({"spatial_shapes": torch.tensor([2, 3])}, ValueError, r"spatial_shapes must be \[L, 2\], got \[2\]"),
    ({"spatial_shapes": torch.zeros(2, 3).long()}, ValueError, r"spatial_shapes must be \[L, 2\], got \[2, 3\]"),
    ({"spatial_shapes": torch.zeros(2, 2)}, TypeError, "spatial_shapes must be int64 or int32, got torch.float32"),
    (
        {"spatial_shapes": torch.zeros(2, 2, device="meta").long()},
        ValueError,
        "spatial_shapes must be on the device of value, cpu, got meta",
    ),
    ({"level_start_index": [0, 6]}, TypeError, "level_start_index must be a tensor, got list"),
    ({"level_start_index": torch.zeros(2)}, TypeError, "level_start_index must be int64 or int32, got torch.float32"),
    ({"level_start_index": torch.zeros(3).long()}, ValueError, r"level_start_index must be \[2\], one number per level, got \[3\]"),
    ({"level_start_index": torch.zeros(2, 1).long()}, ValueError, r"level_start_index must be \[2\]"),
    ({"level_start_index": torch.zeros(2, device="meta").long()}, ValueError, "level_start_index must be on the device of value"),
    (
        {"spatial_shapes": torch.tensor([(2, 3), (1, 3)])},
        ValueError,
        r"spatial_shapes must cover the 8 tokens of value, got \[\[2, 3\], \[1, 3\]\], which have 9",
    ),
    ({"spatial_shapes": torch.tensor([(2, 3), (1, 1)]).int()}, ValueError, r"spatial_shapes must cover the 8 tokens .* which have 7"),
    ({"spatial_shapes": torch.tensor([(-2, -3), (1, 2)])}, ValueError, r"spatial_shapes must hold integers >= 0, got \[\[-2, -3\]"),
    (
        {"level_start_index": torch.tensor([0, 7])},
        ValueError,
        r"level_start_index must leave room in the 8 tokens of value for a level of 1 x 2, got first tokens \[0, 7\]",
    ),
    ({"level_start_index": torch.tensor([-1, 6]), "spatial_shapes": torch.tensor(SHAPES)}, ValueError, r"level_start_index .* \[-1, 6\]"),
    ({"level_start_index": torch.tensor([0, 10**9]).int()}, ValueError, r"level_start_index .* \[0, 1000000000\]"),
    ({"num_points": [4]}, ValueError, r"num_points must be 2 numbers >= 0 that sum to the 4 samples of attention_\w+, got \[4\]"),
    ({"num_points": [1, 2]}, ValueError, "num_points must be 2 numbers >= 0 that sum to the 4 samples"),
    ({"num_points": [5, -1]}, ValueError, r"num_points must be 2 numbers >= 0 .* got \[5, -1\]"),
    ({"deterministic": "no"}, TypeError, "deterministic must be a bool or None, got 'no'"),
    ({"deterministic": 1}, TypeError, "deterministic must be a bool or None, got 1"),
    ({"num_points": 4}, TypeError, "num_points must be a sequence of integers, got 4"),
    ({"num_points": [2.0, 2.0]}, TypeError, r"num_points must be a sequence of integers, got \[2.0, 2.0\]"),
    ({"num_points": torch.tensor([2, 2])}, TypeError, r"num_points must be a sequence of integers, got tensor\(\[2, 2\]\)"),
    ({"spatial_shapes": [(2, 3), (1, 1), (1, 1)]}, ValueError, "num_points must be given where 3 levels do not share the 4 samples"),
    ({"spatial_shapes": [], "value": torch.zeros(2, 0, 3, 4)}, ValueError, "num_points must be given where 0 levels"),
]


@pytest.mark.parametrize(("changes", "error", "message"), SHARED)
@pytest.mark.parametrize("function", [plain, fused])
def test_what_both_refuse(function: Any, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    if "spatial_shapes" in changes and function is fused and "reference_points" not in changes:
        changes = changes | {"reference_points": torch.zeros(2, 5, 1, 2)}
    with pytest.raises(error, match=message):
        function(**changes)


SAMPLES = [
    ("positions", torch.zeros(2, 5, 3, 8), ValueError, r"{0} must be \[B, Q, M, K, 2\] or \[B, Q, M, L, P, 2\], got \[2, 5, 3, 8\]"),
    ("positions", torch.zeros(2, 5, 3, 3, 2, 2), ValueError, r"{0} must have 2 levels in dimension 3, got \[2, 5, 3, 3, 2, 2\]"),
    ("positions", torch.zeros(2, 5, 3, 4, 3), ValueError, r"{0} must be \[2, 5, 3, 4, 2\] to fit {1}, got \[2, 5, 3, 4, 3\]"),
    ("positions", torch.zeros(2, 6, 3, 4, 2), ValueError, r"{0} must be \[2, 5, 3, 4, 2\] to fit {1}, got \[2, 6, 3, 4, 2\]"),
    ("positions", torch.zeros(2, 5, 3, 4, 2).long(), TypeError, "{0} must be float32, .* got torch.int64"),
    ("positions", torch.zeros(2, 5, 3, 4, 2, device="meta"), ValueError, "{0} must be on the device of value, cpu, got meta"),
    ("positions", [0.0], TypeError, "{0} must be a tensor, got list"),
    ("weights", torch.zeros(2, 5, 12), ValueError, r"{1} must be \[B, Q, M, K\] or \[B, Q, M, L, P\], got \[2, 5, 12\]"),
    ("weights", torch.zeros(2, 5, 3, 4, 1), ValueError, r"{1} must have 2 levels in dimension 3, got \[2, 5, 3, 4, 1\]"),
    ("weights", torch.zeros(1, 5, 3, 4), ValueError, r"{1} must be \[2, Q, 3, K\] to fit value \[2, 8, 3, 4\], got \[1, 5, 3, 4\]"),
    ("weights", torch.zeros(2, 5, 4, 4), ValueError, r"{1} must be \[2, Q, 3, K\] to fit value \[2, 8, 3, 4\], got \[2, 5, 4, 4\]"),
    ("weights", torch.zeros(2, 5, 3, 6), ValueError, r"{0} must be \[2, 5, 3, 6, 2\] to fit {1}, got \[2, 5, 3, 4, 2\]"),
    ("weights", torch.ones(2, 5, 3, 4) > 0, TypeError, "{1} must be float32, .* got torch.bool"),
    ("weights", torch.zeros(2, 5, 3, 4, device="meta"), ValueError, "{1} must be on the device of value, cpu, got meta"),
]


@pytest.mark.parametrize(("which", "tensor", "error", "message"), SAMPLES)
@pytest.mark.parametrize(
    ("function", "names"),
    [(plain, ("sampling_locations", "attention_weights")), (fused, ("sampling_offsets", "attention_logits"))],
    ids=["plain", "fused"],
)
def test_samples(function: Any, names: tuple[str, str], which: str, tensor: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("{0}", names[0]).replace("{1}", names[1])):
        function(**{names[which == "weights"]: tensor})


@pytest.mark.parametrize(
    ("points", "error", "message"),
    [
        (torch.zeros(2, 5, 2), ValueError, r"reference_points must be \[2, 5, 2 or 1, 2 or 4\], got \[2, 5, 2\]"),
        (torch.zeros(2, 5, 3, 2), ValueError, r"reference_points must be \[2, 5, 2 or 1, 2 or 4\], got \[2, 5, 3, 2\]"),
        (torch.zeros(2, 5, 2, 3), ValueError, r"reference_points must be \[2, 5, 2 or 1, 2 or 4\], got \[2, 5, 2, 3\]"),
        (torch.zeros(1, 5, 2, 2), ValueError, r"reference_points must be .* got \[1, 5, 2, 2\]"),
        (torch.zeros(2, 5, 2, 2).int(), TypeError, "reference_points must be float32, .* got torch.int32"),
        (torch.zeros(2, 5, 2, 2, device="meta"), ValueError, "reference_points must be on the device of value, cpu, got meta"),
        ([(0.5, 0.5)], TypeError, "reference_points must be a tensor, got list"),
    ],
)
def test_reference_points(points: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused(reference_points=points)


def test_method() -> None:
    with pytest.raises(ValueError, match="method must be one of 'bilinear', 'discrete', got 'nearest'"):
        plain(method="nearest")
    with pytest.raises(ValueError, match="method must be one of 'bilinear', 'discrete', got 0"):
        plain(method=0)
    with pytest.raises(ValueError, match=r"method must be one of 'bilinear', 'discrete', got \['discrete'\]"):
        plain(method=["discrete"])


@pytest.mark.parametrize(("scale", "kind"), [("0.5", "str"), (torch.tensor(0.5), "Tensor"), (None, "NoneType")])
def test_offset_scale(scale: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=f"offset_scale must be a number, got {kind}"):
        fused(offset_scale=scale)
    assert torch.equal(fused(offset_scale=np.float32(0.5)), fused())


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_offset_scale_is_finite(scale: float) -> None:
    with pytest.raises(ValueError, match=f"offset_scale must be finite, got {scale}"):
        fused(offset_scale=scale)


@pytest.mark.parametrize(
    ("function", "positions", "weights"),
    [(plain, "sampling_locations", "attention_weights"), (fused, "sampling_offsets", "attention_logits")],
    ids=["plain", "fused"],
)
def test_num_points_next_to_a_dimension_of_points(function: Any, positions: str, weights: str) -> None:
    whole, split = torch.rand(2, 5, 3, 4, 2), torch.rand(2, 5, 3, 2, 2, 2)
    shares, split_shares = torch.rand(2, 5, 3, 4), torch.rand(2, 5, 3, 2, 2)
    for arguments in ({positions: split, weights: shares}, {positions: whole, weights: split_shares}):
        message = r"num_points must be \[2, 2\] for samples \[B, Q, M, L, P, ...\] of P 2, got \[1, 3\]"
        with pytest.raises(ValueError, match=message):
            function(**arguments, num_points=[1, 3])
        assert torch.equal(function(**arguments, num_points=(2, 2)), function(**arguments))
    function(**{positions: whole, weights: shares}, num_points=[1, 3])


def test_gradients_refuse_the_same() -> None:
    tensors = torch.zeros(2, 5, 12), torch.zeros(2, 8, 3, 4), torch.tensor([(2, 3), (1, 3)])
    with pytest.raises(ValueError, match="spatial_shapes must cover the 8 tokens of value"):
        ms_deform_attn_gradients(*tensors, torch.zeros(2, 5, 3, 4, 2), torch.zeros(2, 5, 3, 4))


def test_a_level_without_tokens_may_start_at_the_end() -> None:
    shapes, start = torch.tensor([(2, 4), (0, 3)]), torch.tensor([0, 8])
    assert torch.equal(plain(spatial_shapes=shapes, level_start_index=start), plain(spatial_shapes=[(2, 4), (0, 3)]))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_tables_are_not_read_in_a_trace(mode: str) -> None:
    def attend(table: Tensor) -> Tensor:
        return plain(spatial_shapes=table, sampling_locations=samples, value=value, attention_weights=torch.ones(2, 5, 3, 4))

    value, samples = torch.rand(2, 8, 3, 4), torch.rand(2, 5, 3, 4, 2)
    table = torch.tensor(SHAPES)
    expected = attend(table)
    assert torch.equal(torch.func.functionalize(attend)(table), expected)
    graph = make_fx(attend, tracing_mode=mode, _allow_non_fake_inputs=True)(table)
    assert torch.equal(graph(table), expected)


def test_integers_of_other_kinds_are_sizes() -> None:
    expected = plain()
    assert torch.equal(plain(spatial_shapes=np.array(SHAPES)), expected)
    assert torch.equal(plain(spatial_shapes=tuple(torch.zeros(s).shape for s in SHAPES)), expected)
    assert torch.equal(plain(num_points=(1, 3)), expected)
    assert torch.equal(plain(num_points=np.array([1, 3])), expected)


def as_kernels_read(samples: Tensor) -> Tensor:
    """[B, Q, ...] from its memory, with one stride for the rows (b, q) and dense rows."""
    batch, queries, *inner = samples.shape
    row = samples.stride(0 if queries == 1 else 1)
    dense = torch.empty(inner, device="meta").stride()
    return samples.as_strided((batch * queries, *inner), (row, *dense)).view(samples.shape)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("batch", [1, 2])
def test_layout_that_kernels_read(batch: int, queries: int) -> None:
    value = torch.randn(batch, 8, 3, 4)
    whole = torch.randn(batch, queries, 3, 4, 2)
    others = [
        whole,
        whole.unflatten(3, (2, 2)),
        torch.randn(batch, queries, 3, 2, 4, 2).transpose(3, 4)[:, :, :, :2, :2],
        torch.randn(queries, batch, 3, 4, 2).transpose(0, 1),
        torch.randn(batch, 3, queries, 4, 2).transpose(1, 2),
        torch.randn(batch, queries, 40)[..., 9:33].unflatten(2, (3, 4, 2)),
        torch.randn(batch, queries + 3, 3, 4, 2)[:, :queries],
        torch.randn(batch, queries, 3, 4, 1).expand(-1, -1, -1, -1, 2),
        torch.randn(1, 1, 3, 4, 2).expand(batch, queries, -1, -1, -1),
    ]
    for positions in others:
        for weights in (positions[..., 0], positions[..., 0].contiguous(), positions[..., 0].double()):
            flat = _ms_deform_checks.flat_samples(value, positions, weights)
            for given, laid in zip((positions, weights), flat, strict=True):
                assert laid.shape == (batch, queries, 3, 4, 2)[: laid.dim()]
                assert laid.dtype == torch.float32
                assert torch.equal(as_kernels_read(laid), given.reshape(laid.shape).float())


def test_views_that_kernels_can_read_are_not_copied() -> None:
    value = torch.randn(2, 8, 3, 4)
    packed = torch.randn(2, 5, 40)
    positions, weights = packed[..., :24].unflatten(2, (3, 4, 2)), packed[..., 24:36].unflatten(2, (3, 4))
    for given, laid in zip((positions, weights), _ms_deform_checks.flat_samples(value, positions, weights), strict=True):
        assert laid.data_ptr() == given.data_ptr()
    tokens = torch.randn(2, 9, 5, 4)[:, 1:, :3]
    assert _ms_deform_checks.dense_tokens(tokens) is tokens
    for scattered in (value[..., ::2], value.transpose(1, 2), value.transpose(2, 3)):
        assert _ms_deform_checks.dense_tokens(scattered).is_contiguous()
