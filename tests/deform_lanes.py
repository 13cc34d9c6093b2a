"""What tests share that run kernels of deformable attention with threads of the CPU: their arguments, and what they must return."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from deform_cases import Case
from torch import Tensor

plain = importlib.import_module("ssod_fast.ops.ms_deform_attn")
fused = importlib.import_module("ssod_fast.ops.ms_deform_attn_fused")

# Sizes (all but the last do not fit) and first tokens of three levels that only the device knows.
TABLES = (((5, 7), (3, 4), (200, 300)), ((-5, 7), (0, 4), (2**62, 4)), ((2**31, 2**31),) * 3, ((7, 5), (4, 3), (2, 2)))
STARTS = (None, (3, -9, 40), (30, 0, 0), (2**40, 0, -(2**63)))


def dtype_of(name: str) -> torch.dtype:
    return torch.float64 if "64" in name else torch.float32


def arguments_of(module: ModuleType, name: str, case: Case, inputs: tuple[Tensor, ...], **options: Any) -> Any:
    """Arguments as the module takes them; `inputs` are locations and weights, or reference, offsets and logits."""
    counts = case.num_points or [case.weights.shape[3] // len(case.shapes)] * len(case.shapes)
    hw = [n for size in case.shapes for n in size]
    tensors = [t.numpy() for t in inputs]
    reference = None if len(inputs) == 2 else tensors.pop(0)
    levels = hw, options.get("starts"), options.get("on_device", False), counts
    kind = module.Arguments64 if "64" in name else module.Arguments32
    return kind(case.value.numpy(), *levels, reference, *tensors, options.get("method", 0), options.get("scale", 0.5))


def check(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        limit = 1e-12 if theirs.dtype == torch.float64 else 2e-5
        torch.testing.assert_close(ours, theirs, atol=limit * max(1.0, theirs.nan_to_num().abs().max().item()), rtol=limit, equal_nan=True)


def expected_plain(case: Case, grad: Tensor, method: int = 0, shapes: Tensor | None = None, starts: Tensor | None = None) -> list[Tensor]:
    hw = None if shapes is not None else [n for size in case.shapes for n in size]
    inputs = (case.value, shapes, starts, case.locations, case.weights, hw, case.num_points, method)
    return [plain._reference(*inputs), *plain._reference_backward(grad, *inputs, False)]


def gradient_of(case: Case) -> Tensor:
    batch, queries = case.weights.shape[:2]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, queries, case.value.shape[2] * case.value.shape[3], generator=generator).to(case.value.dtype)
