"""Compiles Triton kernels for GPUs on a machine that has none: the launchers run on CPU tensors, and what they would launch is compiled.

    python tests/gpu_compile.py

compiles every kernel for sm_90 in float32 and, where it knows float64, for sm_80 in float64, and prints a line for each. It runs in a
process of its own, because the tests' process has the interpreter switched on.
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

# Their logarithms and exponentials are library code, which is made of fused products.
TRANSCENDENTAL = {
    "encode_boxes_fwd_kernel",
    "decode_boxes_fwd_kernel",
    "decode_boxes_bwd_kernel",
    "neighborhood_boxes_kernel",
    "matching_cost_kernel",
    "gmm_threshold_kernel",
}


class Compiler:
    """Stands in for a kernel: `[grid](...)` compiles it for the arguments of the launch and runs nothing."""

    def __init__(self, kernel: Any, capability: int, seen: Callable[[str, str], None]) -> None:
        self.kernel, self.target, self.seen = kernel, GPUTarget("cuda", capability, 32), seen

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._compile

    def _compile(self, *args: Any, **options: Any) -> None:
        names = [parameter.name for parameter in self.kernel.params]
        values = dict(zip(names, args, strict=False)) | {name: options.pop(name) for name in names if name in options}
        signature, constants, hints = {}, {}, {}
        for parameter in self.kernel.params:
            value = values[parameter.name]
            kind = "constexpr" if parameter.is_constexpr else _type(value, parameter.do_not_specialize)
            signature[parameter.name] = kind
            if _is_aligned(value, parameter.do_not_specialize) and kind != "constexpr":
                hints[(parameter.num,)] = [["tt.divisibility", 16]]
            if kind == "constexpr":
                constants[(parameter.num,)] = value
            elif isinstance(kind, tuple):
                constants |= {(parameter.num, i): value[i] for i, part in enumerate(kind) if part == "constexpr"}
        compiled = triton.compile(ASTSource(self.kernel, signature, constants, hints), target=self.target, options=options)
        self.seen(self.kernel.__name__, compiled.asm["ptx"])


def _is_aligned(value: Any, plain: bool) -> bool:
    """Whether a launch tells the compiler that an address or an integer is a multiple of 16."""
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return type(value) is int and value % 16 == 0 and not plain


def _type(value: Any, plain: bool) -> Any:
    """Triton's type of an argument; a launch bakes an integer 1 into the kernel, so it is a constant here too, unless it is `plain`.

    A named tuple has a tuple of types.
    """
    if isinstance(value, tuple):
        parts = [_type(part, plain) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, int):
        return "constexpr" if value == 1 and not plain else "i32" if abs(value) < 2**31 else "i64"
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


def launch_compose(interp: int, dtype: torch.dtype) -> None:
    """Calls every launcher of compose, with a list of sources and with dense blocks."""
    from ssod_fast.kernels import compose, compose_boxes
    from ssod_fast.ops.compose_plan import ComposePlan, Placement

    plan = ComposePlan.from_placements([(40, 50)], [[Placement(0, (8, 9), erase=[(1, 1, 3, 3)]), Placement(1, (8, 9))]]).to("cpu")
    tables = (plan.canvas, plan.place_i, plan.place_f, plan.erase, plan.erase_canvas)
    colours = ([1.0] * 3, [2.0] * 3, [0.0] * 3)
    images = [torch.zeros(3, 8, 9, dtype=torch.uint8)] * 2
    compose.compose_images(images, None, *tables, 64, 64, *colours, interp, False, dtype, 0.0, False, False)
    blocks, sizes = [torch.zeros(1, 3, 8, 9)] * 2, torch.tensor([[8, 9]] * 2, dtype=torch.int32)
    compose.compose_images(blocks, sizes, *tables, 64, 64, *colours, interp, True, torch.uint8, 0.0, True, True)
    compose.cache_write(torch.zeros(3, 300, dtype=torch.uint8), images, [0, 2])
    rows, count = torch.rand(2, 5), torch.tensor([5, 3], dtype=torch.int32)
    for over in (False, True):
        boxes = (torch.rand(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64), rows, rows, count)
        compose_boxes.compose_boxes(*boxes, *tables[1:4], 8, 0.7, False, 0.1, None, over, over)


def launch_bags(dtype: torch.dtype) -> None:
    """Calls every launcher that builds boxes, with all outputs and with none."""
    from ssod_fast.kernels import box_deltas, neighborhood_boxes, point_boxes, random_negative_boxes

    boxes, std, image = torch.rand(9, 4, dtype=dtype), (0.1, 0.1, 0.2, 0.2), torch.zeros(9, dtype=torch.int64)
    size, ends = torch.rand(2, 2, dtype=dtype), torch.tensor([0, 4, 9])
    for every in (False, True):
        extras = (every, every, every, list(std) if every else [], every)
        neighborhood_boxes.neighborhood_boxes(boxes, image, None, size, [1, 1.2], [0.2] if every else [], 0.7, *extras)
        random_negative_boxes.random_negative_boxes(torch.rand(2, 5, 4, dtype=dtype), size, boxes[:, None], ends, 0.3, every)
    for cut in range(3):
        point_boxes.point_boxes(boxes[:, :2], None, ends, size, [4, 8], [1, 2], cut, 0.7)
    box_deltas.encode_boxes(boxes, boxes, *std)
    box_deltas.encode_boxes_backward(boxes, boxes, boxes, *std, True, True)
    box_deltas.decode_boxes(boxes, boxes, *std, 4.0)
    box_deltas.decode_boxes_backward(boxes, boxes, boxes, *std, 4.0, True, True)


def launch_matching(dtype: torch.dtype) -> None:
    """Calls every launcher of the matching ops, ragged and padded, in every class mode."""
    from ssod_fast.kernels import batched_nms, gmm_threshold, linear_assignment, matching_cost

    ragged, padded = (torch.tensor([0, 4, 6]), None), (None, torch.tensor([2, 3]))
    cost, boxes, labels = torch.rand(2, 6, 300, dtype=dtype), torch.rand(2, 2, 300, 4, dtype=dtype), torch.zeros(6, dtype=torch.int64)
    for mode, gamma in ((0, 2.0), (1, 1.0), (2, 2.0), (3, 0.0), (4, 2.0), (0, 1.5)):
        rows, hw, extra = (ragged, None, None) if mode % 2 else (padded, torch.ones(2, 2), cost)
        options = (2, mode, 0.25, gamma, 1e-8, 2.0, 5.0, 2.0, mode % 3, 0 if hw is None else 2, 1e-6, mode != 1)
        logits = torch.rand(2, 2, 300, 7, dtype=torch.bfloat16 if mode else dtype)
        matching_cost.matching_cost(logits, boxes, labels, boxes[0, 0, :6], *rows, hw, extra, *options)
    for i, rows in enumerate((ragged, padded, (None, None))):
        linear_assignment.linear_assignment(cost, *rows, None, 2, 2, 1 + i, bool(i), bool(i), False)
        gmm_threshold.gmm_threshold(cost[0, 0, :6], *rows, 2, 1e-5, 1e-3, 100, bool(i), i % 2)
    for counts in (None, torch.tensor([9, 4])):
        batched_nms.batched_nms(boxes[0], cost[0, :2], torch.zeros(2, 300, dtype=torch.int64), counts, 0.5, 0.1, 100)


def launch_one_to_many(rule: str, every: bool) -> None:
    """Calls the launcher under one rule, with every step that an option adds, or with none of them."""
    from ssod_fast.kernels import one_to_many_assign
    from ssod_fast.ops._one_to_many import CONFLICTS, RULES

    options = RULES[rule], every, 2 * every, 13, 3 * every, 0.5, 6.0, 1e-7, 16.0, every and rule != "atss", CONFLICTS["any_metric"] * every
    boxes, targets = torch.rand(2, 2, 700, 4), torch.rand(6, 4)
    arguments = (boxes, torch.zeros(6, dtype=torch.int64), targets, torch.tensor([0, 2, 6]), None)
    priors = None if rule in ("tal", "atss") and not every else torch.rand(700, 4)
    levels = [600, 100] if every and rule == "atss" else []
    one_to_many_assign.one_to_many_assign(torch.rand(2, 2, 700, 9), *arguments, priors, torch.rand(2, 2), levels, 2, *options, every)


def launch_attention(dtype: torch.dtype) -> None:
    """Calls every launcher of deformable attention, with queries that are pixels and with few; 16 bytes of channels per lane."""
    from ssod_fast.kernels import ms_deform_attn

    for queries, hw in ((80, None), (9, [8, 8, 4, 4])):
        value, samples = torch.rand(2, 80, 2, 32, dtype=dtype), torch.rand(2, queries, 2, 4, 3, dtype=dtype)
        xy, weights = samples[..., :2].contiguous(), samples[..., 2].contiguous()
        tables = None if hw else torch.tensor([[8, 8], [4, 4]]), None
        plain = (value, *tables, xy, weights, hw, None, int(hw is None))
        out = ms_deform_attn.ms_deform_attn(*plain)
        ms_deform_attn.ms_deform_attn_backward(out, *plain, False)
        reference = torch.rand(2, queries, 2, 4 if hw else 2, dtype=torch.promote_types(dtype, torch.float32))
        fused = (value, *tables, reference, xy, weights, hw, None, 0.5)
        out, lse = ms_deform_attn.ms_deform_attn_fused(*fused)
        ms_deform_attn.ms_deform_attn_fused_backward(out, *fused, lse, True, False)


def main() -> None:
    """Compiles and checks that every division is exact and no product is contracted."""
    from ssod_fast.kernels import (
        batched_nms,
        box_deltas,
        box_iou,
        box_iou_below,
        box_iou_max,
        compose,
        compose_boxes,
        gmm_threshold,
        linear_assignment,
        matching_cost,
        ms_deform_attn,
        neighborhood_boxes,
        one_to_many_assign,
        paired_box_iou,
        point_boxes,
        random_negative_boxes,
    )

    bags = (box_deltas, neighborhood_boxes, point_boxes, random_negative_boxes)
    matching = (batched_nms, gmm_threshold, linear_assignment, matching_cost)

    def check_division(name: str, ptx: str) -> None:
        assert "div.full" not in ptx, f"{name} divides approximately"
        assert "div.approx" not in ptx, f"{name} divides approximately"
        print(name)

    def check(name: str, ptx: str) -> None:
        assert "fma." not in ptx or name in TRANSCENDENTAL, f"{name} contracts a product into a sum"
        check_division(name, ptx)

    def check_attention(name: str, ptx: str) -> None:
        wide = "ld.global.v4.b32" in ptx or "ld.global.v2.b64" in ptx
        # A lane adds 16 bytes of floats at once, which are 8 bytes of a half-precision value.
        assert wide or ("bwd" in name and "ld.global.v2.b32" in ptx), f"{name} does not read 16 bytes at once"
        assert ".cas" not in ptx, f"{name} adds by compare and swap"
        assert "atom.global.gpu.relaxed.add.v4.f32" in ptx or "fwd" in name or ".target sm_90" not in ptx, f"{name} adds single floats"
        check_division(name, ptx)

    cases = {90: ("giou", "zero", torch.float32), 80: ("ciou", "add", torch.float64)}
    for capability, case in cases.items():
        for module in (box_iou, box_iou_below, box_iou_max, compose, compose_boxes, paired_box_iou, *bags, *matching):
            compiling(module, capability, check)
        launch_boxes(*case)
        launch_bags(case[2])
        launch_matching(case[2])
        for rules, seen in ((("tal", "tal_any", "atss"), check), (("simota", "soft_label"), check_division)):  # costs hold logarithms
            compiling(one_to_many_assign, capability, seen)
            for i, rule in enumerate(rules):
                launch_one_to_many(rule, every=i % 2 == (capability == 90))
        compiling(ms_deform_attn, capability, check_attention)
        launch_attention(torch.bfloat16 if capability == 80 else torch.float32)
        launch_compose(*((2, torch.float32) if capability == 90 else (1, torch.bfloat16)))


if __name__ == "__main__":
    main()
