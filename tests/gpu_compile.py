"""Compiles Triton kernels for GPUs on a machine that has none: the launchers run on CPU tensors, and what they would launch is compiled.

    python tests/gpu_compile.py

compiles every kernel of the IoU family for sm_90 in float32 and for sm_80 in float64 and prints a line for each. It runs in a process of
its own, because the tests' process has the interpreter switched on.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


class Compiler:
    """Stands in for a kernel: `[grid](...)` compiles it for the arguments of the launch and runs nothing."""

    def __init__(self, kernel: Any, capability: int, seen: Callable[[str, str], None]) -> None:
        self.kernel, self.target, self.seen = kernel, GPUTarget("cuda", capability, 32), seen

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._compile

    def _compile(self, *args: Any, **options: Any) -> None:
        signature, constants = {}, {}
        for parameter, value in zip(self.kernel.params, args, strict=True):
            kind = "constexpr" if parameter.is_constexpr else _type(value)
            signature[parameter.name] = kind
            if kind == "constexpr":
                constants[(parameter.num,)] = value
        compiled = triton.compile(ASTSource(self.kernel, signature, constants), target=self.target, options=options)
        self.seen(self.kernel.__name__, compiled.asm["ptx"])


def _type(value: object) -> str:
    """Triton's type of an argument; a launch bakes an integer 1 into the kernel, so it is a constant here too."""
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, int):
        return "constexpr" if value == 1 else "i32" if abs(value) < 2**31 else "i64"
    return "fp32"


def compiling(module: ModuleType, capability: int, seen: Callable[[str, str], None]) -> None:
    """Replaces every kernel of a module; `seen(name, ptx)` is called for each launch."""
    for name, kernel in list(vars(module).items()):
        if name.endswith("_kernel"):
            setattr(module, name, Compiler(kernel.kernel if isinstance(kernel, Compiler) else kernel, capability, seen))


def launch_boxes(mode: str, eps_mode: str, dtype: torch.dtype) -> None:
    """Calls every launcher of the IoU family, dense and ragged."""
    from ssod_fast.kernels import box_iou, box_iou_below, box_iou_max, paired_box_iou
    from ssod_fast.ops._boxes import make_rule

    rule = make_rule(mode, "cxcywh" if mode == "giou" else "xyxy", eps_mode, None)
    boxes1, boxes2 = torch.rand(2, 9, 4, dtype=dtype), torch.rand(2, 11, 4, dtype=dtype)
    bags, ends = torch.rand(9, 1, 4, dtype=dtype), torch.tensor([0, 4, 9])
    box_iou.box_iou(boxes1, boxes2, *rule, True, torch.float16)
    box_iou.box_iou_backward(torch.rand(2, 9, 11), boxes1, boxes2, *rule, True, True, True)
    box_iou.ragged_box_iou(boxes1[0], ends, boxes2[0], ends, 5, 0.0, *rule, False, dtype)
    paired_box_iou.paired_box_iou(boxes1, boxes1, *rule, False)
    paired_box_iou.paired_box_iou_backward(torch.rand(9, 1, dtype=dtype), bags, bags, *rule, False, True, True)
    for offsets in (None, ends):
        first, second = (boxes1, boxes2) if offsets is None else (boxes1[0], boxes2[0])
        box_iou_max.box_iou_max(first, second, offsets, offsets, *rule, True, True)
        box_iou_below.box_iou_below(first, second, offsets, offsets, 0.3, *rule, offsets is None)


def main() -> None:
    """Compiles and checks that every division is exact and no product is contracted."""
    from ssod_fast.kernels import box_iou, box_iou_below, box_iou_max, paired_box_iou

    def check(name: str, ptx: str) -> None:
        assert "fma." not in ptx, f"{name} contracts a product into a sum"
        assert "div.full" not in ptx, f"{name} divides approximately"
        assert "div.approx" not in ptx, f"{name} divides approximately"
        print(name)

    cases = {90: ("giou", "zero", torch.float32), 80: ("ciou", "add", torch.float64)}
    for capability, case in cases.items():
        for module in (box_iou, box_iou_below, box_iou_max, paired_box_iou):
            compiling(module, capability, check)
        launch_boxes(*case)


if __name__ == "__main__":
    main()
