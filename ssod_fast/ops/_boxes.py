"""What the IoU family shares in Python: the names of its options, input checks, and how gradients are refused."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

MODES = {"iou": 0, "iof": 1, "giou": 2, "diou": 3, "ciou": 4}
FORMATS = {"xyxy": 0, "xywh": 1, "cxcywh": 2}
EPS_MODES = {"zero": 0, "none": 1, "max": 2, "add": 3}
IOU, IOF, GIOU, DIOU, CIOU = range(5)
XYXY, XYWH, CXCYWH = range(3)
ZERO, NONE, MAX, ADD = range(4)

_DEFAULT_EPS = (0.0, 1e-7, 1e-6, 1e-7)  # by eps_mode; "none" adds it to the denominators of DIoU and CIoU only, as torchvision does


_REAL = frozenset(
    (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
)


class Rule(NamedTuple):
    """How a pair is scored, as the integers and the float that the op schemas take."""

    mode: int
    fmt: int
    eps_mode: int
    eps: float


def _choice(name: str, value: object, choices: dict[str, int]) -> int:
    index = choices.get(value) if isinstance(value, str) else None
    if index is None:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return index


def _is_finite(eps: object) -> bool:
    try:
        return 0 <= eps < math.inf  # type: ignore[operator]
    except TypeError:  # a string, for example
        return False


def make_rule(mode: str, fmt: str, eps_mode: str, eps: float | None) -> Rule:
    """Checks the four options that every function of the family takes and fills in the default eps."""
    eps_id = _choice("eps_mode", eps_mode, EPS_MODES)
    if eps is None:
        eps = _DEFAULT_EPS[eps_id]
    elif not _is_finite(eps):
        raise ValueError(f"eps must be a finite number >= 0, got {eps!r}")
    return Rule(_choice("mode", mode, MODES), _choice("fmt", fmt, FORMATS), eps_id, eps)


def nan_is_zero(nan: str) -> bool:
    """Checks the option `nan`."""
    if nan == "propagate":
        return False
    if nan == "zero":
        return True
    raise ValueError(f"nan must be 'propagate' or 'zero', got {nan!r}")


def check_dtype(dtype: object) -> None:
    """Refuses what is no floating dtype as the dtype of a result."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype, got {dtype!r}")


def _refuse_sparse(name: str, boxes: Tensor) -> None:
    if boxes.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {boxes.layout}")


def _computable(boxes: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`boxes` in the compute dtype with the four numbers of a box side by side; no copy if they already are."""
    _refuse_sparse(name, boxes)
    boxes = boxes.to(dtype)
    return boxes if boxes.stride(-1) == 1 else boxes.contiguous()


def as_computable(boxes1: Tensor, boxes2: Tensor, name1: str = "boxes1", name2: str = "boxes2") -> tuple[Tensor, Tensor]:
    """Checks two sets of boxes and brings them to the compute dtype: float64 if either is float64, else float32."""
    for name, boxes in ((name1, boxes1), (name2, boxes2)):
        if not isinstance(boxes, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(boxes).__name__}")
        if boxes.dtype not in _REAL:
            raise TypeError(f"{name} must have a real number dtype, got {boxes.dtype}")
        if boxes.dim() < 1 or boxes.shape[-1] != 4:
            raise ValueError(f"{name} must have shape [..., 4], got {list(boxes.shape)}")
    if boxes1.device != boxes2.device:
        raise ValueError(f"{name1} and {name2} must be on one device, got {boxes1.device} and {boxes2.device}")
    wide = boxes1.dtype is torch.float64 or boxes2.dtype is torch.float64
    dtype = torch.float64 if wide else torch.float32
    try:  # costs nothing, unlike a look at the layouts
        if boxes1.dtype is not dtype or boxes1.stride(-1) != 1:
            boxes1 = _computable(boxes1, dtype, name1)
        if boxes2.dtype is not dtype or boxes2.stride(-1) != 1:
            boxes2 = _computable(boxes2, dtype, name2)
    except RuntimeError:  # compressed sparse tensors have no strides
        _refuse_sparse(name1, boxes1)
        _refuse_sparse(name2, boxes2)
        raise
    return boxes1, boxes2


def check_pairwise(boxes1: Tensor, boxes2: Tensor, name1: str = "boxes1", name2: str = "boxes2") -> None:
    """Refuses sets that are not [..., N, 4] and [..., M, 4] with equal leading dimensions."""
    for name, boxes in ((name1, boxes1), (name2, boxes2)):
        if boxes.dim() < 2:
            raise ValueError(f"{name} must have shape [..., N, 4], got {list(boxes.shape)}")
    if boxes1.shape[:-2] != boxes2.shape[:-2]:
        raise ValueError(
            f"{name1} and {name2} must have equal leading dimensions, got {list(boxes1.shape[:-2])} and {list(boxes2.shape[:-2])}"
        )


def _check_offsets(name: str, offsets: Any, boxes: Tensor, boxes_name: str) -> None:
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(offsets).__name__}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name} must have shape [B + 1], got {list(offsets.shape)}")
    if offsets.device != boxes.device:
        raise ValueError(f"{name} and {boxes_name} must be on one device, got {offsets.device} and {boxes.device}")


def _check_host_offsets(name: str, offsets: Tensor, rows: int) -> list[int]:
    """Checks the values of offsets that lie on the host; reading them there costs no synchronisation."""
    values: list[int] = offsets.numpy().tolist()
    if values[0] != 0 or values[-1] != rows or any(a > b for a, b in pairwise(values)):
        raise ValueError(f"{name} must rise from 0 to the number of boxes ({rows}), got {values}")
    return values


def check_ragged(
    boxes1: Tensor, offsets1: Tensor, boxes2: Tensor, offsets2: Tensor, name1: str = "boxes1", name2: str = "boxes2"
) -> tuple[Tensor, Tensor, int | None]:
    """Checks ragged input; returns the offsets as int64 and, where they lie on the host, the largest count of the second set.

    Values of offsets on a device are not read: the kernels clamp them into range.
    """
    _check_offsets("offsets1", offsets1, boxes1, name1)
    _check_offsets("offsets2", offsets2, boxes2, name2)
    for name, boxes in ((name1, boxes1), (name2, boxes2)):
        if boxes.dim() != 2:
            raise ValueError(f"{name} must have shape [N, 4] when offsets are given, got {list(boxes.shape)}")
    if offsets1.shape != offsets2.shape:
        raise ValueError(f"offsets1 and offsets2 must have equal lengths, got {offsets1.shape[0]} and {offsets2.shape[0]}")
    largest = None
    if type(offsets1) is Tensor and offsets1.device.type == "cpu" and not torch.compiler.is_compiling():  # not a fake tensor either
        _check_host_offsets("offsets1", offsets1, boxes1.shape[0])
        ends = _check_host_offsets("offsets2", offsets2, boxes2.shape[0])
        largest = max((b - a for a, b in pairwise(ends)), default=0)
    return offsets1.to(torch.int64).contiguous(), offsets2.to(torch.int64).contiguous(), largest


def check_batching(
    boxes1: Tensor, boxes2: Tensor, offsets1: Tensor | None, offsets2: Tensor | None, name1: str = "boxes1", name2: str = "boxes2"
) -> tuple[Tensor | None, Tensor | None]:
    """Checks input that is dense where both offsets are None and ragged where both are given."""
    if offsets1 is None and offsets2 is None:
        check_pairwise(boxes1, boxes2, name1, name2)
        return None, None
    if offsets1 is None or offsets2 is None:
        raise ValueError("offsets1 and offsets2 must be given together, got one of them")
    return check_ragged(boxes1, offsets1, boxes2, offsets2, name1, name2)[:2]


def refuse_grad(name: str, *boxes: Tensor) -> None:
    """Refuses input that requires grad for a function that has none, rather than dropping the gradient in silence."""
    if torch.is_grad_enabled() and any(b.requires_grad for b in boxes):
        raise ValueError(f"{name} carries no gradient: detach the boxes or call it under torch.no_grad()")


class _NoDoubleBackward(torch.autograd.Function):
    """Hands gradients through and raises when they are differentiated again."""

    @staticmethod
    def forward(ctx: Any, name: str, sources: int, *tensors: Any) -> Any:
        """Passes on what follows the `sources` tensors that tie the result to the graph."""
        ctx.name = name
        return tuple(None if t is None else t.view_as(t) for t in tensors[sources:])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """Raises."""
        raise RuntimeError(f"{ctx.name}: double backward is not implemented")


GradsT = TypeVar("GradsT", bound=tuple[Tensor | None, ...])


def once(name: str, sources: tuple[Tensor, ...], grads: GradsT) -> GradsT:
    """`grads` of a backward, arranged so that differentiating them again raises an error that names the op."""
    guarded: GradsT = _NoDoubleBackward.apply(name, len(sources), *sources, *grads)  # type: ignore[no-untyped-call]
    return guarded
