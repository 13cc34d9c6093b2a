"""What it costs to match each target with each prediction: class, L1 and GIoU terms of DETR and its descendants."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor

from . import _boxes, _overlaps
from ._boxes import Rule
from ._image_rows import readable
from ._registry import launcher, register
from .box_iou import EpsMode, Format
from .packed_targets import AnyTargets, PackedTargets, host_label_range, pack_targets

ClassMode = Literal["focal", "focal_logits", "softmax", "prob", "none"]
CLASS_MODES = {name: i for i, name in enumerate(get_args(ClassMode))}
FOCAL, FOCAL_LOGITS, SOFTMAX, PROB, NO_CLASS = range(5)
UNKNOWN_KEY = torch.iinfo(torch.int64).min
_EPS_RANGE = (1e-37, 0.01)  # normal in float32, so that no logarithm meets 0, and small beside 1


class _Options(NamedTuple):
    """The end of :class:`CostArguments`: what does not depend on tensors."""

    class_mode: int
    alpha: float
    gamma: float
    eps: float
    w_class: float
    w_box: float
    w_giou: float
    fmt: int
    eps_mode: int
    giou_eps: float


class CostArguments(NamedTuple):
    """A checked call in the order of the op's schema, without `row_min`; :func:`match` takes the same."""

    logits: Tensor  # [L, B, Q, C]
    boxes: Tensor  # [L, B, Q, 4]
    labels: Tensor  # int64 [G]
    target_boxes: Tensor  # [G, 4]
    offsets: Tensor | None  # int64 [B + 1]
    counts: Tensor | None  # int64 [B]
    image_hw: Tensor | None  # [B, 2]
    extra_cost: Tensor | None  # [L, G, Q]
    batch: int
    class_mode: int
    alpha: float
    gamma: float
    eps: float
    w_class: float
    w_box: float
    w_giou: float
    fmt: int
    eps_mode: int
    giou_eps: float


@overload
def matching_cost(
    logits: Tensor | None,
    boxes: Tensor,
    targets: AnyTargets,
    *,
    class_mode: ClassMode = ...,
    alpha: float = ...,
    gamma: float = ...,
    eps: float = ...,
    w_class: float = ...,
    w_box: float = ...,
    w_giou: float = ...,
    box_format: Format = ...,
    image_hw: Tensor | None = ...,
    giou_eps_mode: EpsMode = ...,
    extra_cost: Tensor | None = ...,
    row_min: Literal[False] = ...,
) -> Tensor: ...
@overload
def matching_cost(
    logits: Tensor | None,
    boxes: Tensor,
    targets: AnyTargets,
    *,
    class_mode: ClassMode = ...,
    alpha: float = ...,
    gamma: float = ...,
    eps: float = ...,
    w_class: float = ...,
    w_box: float = ...,
    w_giou: float = ...,
    box_format: Format = ...,
    image_hw: Tensor | None = ...,
    giou_eps_mode: EpsMode = ...,
    extra_cost: Tensor | None = ...,
    row_min: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def matching_cost(
    logits: Tensor | None,
    boxes: Tensor,
    targets: AnyTargets,
    *,
    class_mode: ClassMode = "focal",
    alpha: float = 0.25,
    gamma: float = 2.0,
    eps: float = 1e-8,
    w_class: float = 2.0,
    w_box: float = 5.0,
    w_giou: float = 2.0,
    box_format: Format = "cxcywh",
    image_hw: Tensor | None = None,
    giou_eps_mode: EpsMode = "zero",
    extra_cost: Tensor | None = None,
    row_min: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cost w_box·L1 + w_class·class - w_giou·GIoU of each target with each query of its own image, for all decoder layers at once.

    The class term for label y, logit x, p = sigmoid(x) and q = 1 - p, both rounded to the compute dtype:

    - `"focal"`: alpha·q^gamma·(-ln(p + eps)) - (1 - alpha)·p^gamma·(-ln(q + eps)) (Deformable DETR, DINO, RT-DETR; mmdet: eps 1e-12)
    - `"focal_logits"`: the same with softplus(-x) and softplus(x) for the logarithms (LW-DETR, RF-DETR)
    - `"softmax"`: -softmax(x)[y] over all C columns (DETR)
    - `"prob"`: -x[y], the logits being probabilities already
    - `"none"`: 0

    The result carries no gradient. Half inputs are converted first: the maths is float32, or float64 where logits or boxes are.

    Args:
        logits: [L, B, Q, C] or [B, Q, C], floating point; may be None for class_mode "none".
        boxes: [L, B, Q, 4] or [B, Q, 4], floating point, in `box_format`.
        targets: anything :func:`pack_targets` takes, boxes in the frame and format of `boxes`.
        class_mode: see above.
        alpha: weight of the positive part of the focal terms.
        gamma: exponent of the focal terms, >= 0.
        eps: summand under the logarithms of "focal", in 1e-37 .. 0.01.
        w_class: weight of the class term.
        w_box: weight of the L1 distance, the sum of four absolute differences in `box_format`.
        w_giou: weight of the generalised IoU.
        box_format: "xyxy", "xywh" or "cxcywh".
        image_hw: [B, 2] height and width, for boxes in pixels: the L1 term divides coordinates by them, GIoU stays in pixels.
        giou_eps_mode: how GIoU guards its denominators, see :func:`box_iou`; mmdet and its descendants use "max".
        extra_cost: of the shape of the result, added last; for mask terms or another class term.
        row_min: also return the keys below.

    Returns:
        Cost, float32 or float64, contiguous in queries: [L, G, Q], or [L, B, N, Q] for padded targets of N rows per image; without L if the
        inputs have none. Rows of padding hold +inf, rows whose label is outside 0 .. C - 1 hold NaN. With `row_min` the pair of it and
        keys, int64 of the same shape without Q: in the high half the row's smallest cost, as a float32 whose bits rise with the value (-0
        counts as 0), in the low half the lowest query that has it; the smallest int64 for a row that is empty or not finite throughout.

    Raises:
        ValueError: for wrong shapes, devices, option values, all weights 0, and labels out of range where they lie on the host.
        TypeError: for wrong types and dtypes.
    """
    arguments, packed = cost_arguments(
        logits,
        boxes,
        targets,
        class_mode=class_mode,
        alpha=alpha,
        gamma=gamma,
        eps=eps,
        w_class=w_class,
        w_box=w_box,
        w_giou=w_giou,
        box_format=box_format,
        image_hw=image_hw,
        giou_eps_mode=giou_eps_mode,
        extra_cost=extra_cost,
    )
    cost, keys = _op(*arguments, row_min)
    lead = _lead_shape(packed, boxes)
    cost = cost.view(*lead, cost.shape[-1])
    return (cost, keys.view(lead)) if row_min else cost


def _lead_shape(packed: PackedTargets, boxes: Tensor) -> tuple[int, ...]:
    """Shape of the result without Q."""
    rows = (packed.batch, packed.rows // max(packed.batch, 1)) if packed.padded else (packed.rows,)
    return rows if boxes.dim() == 3 else (boxes.shape[0], *rows)


def cost_arguments(
    logits: Tensor | None,
    boxes: Tensor,
    targets: AnyTargets,
    *,
    class_mode: str = "focal",
    alpha: float = 0.25,
    gamma: float = 2.0,
    eps: float = 1e-8,
    w_class: float = 2.0,
    w_box: float = 5.0,
    w_giou: float = 2.0,
    box_format: str = "cxcywh",
    image_hw: Tensor | None = None,
    giou_eps_mode: str = "zero",
    extra_cost: Tensor | None = None,
) -> tuple[CostArguments, PackedTargets]:
    """Checks the arguments of :func:`matching_cost` and brings them to the form the op takes.

    Returns:
        The op's arguments, all in one compute dtype but for half logits, and the targets as flat rows.

    Raises:
        ValueError: as :func:`matching_cost`.
        TypeError: as :func:`matching_cost`.
    """
    options = _options(class_mode, alpha, gamma, eps, w_class, w_box, w_giou, box_format, giou_eps_mode)
    if not (w_box or w_giou or (w_class and options.class_mode != NO_CLASS)) and extra_cost is None:
        raise ValueError("w_class, w_box and w_giou must not all be 0 (w_class counts as 0 for class_mode 'none'), got no term at all")
    logits, boxes = _check_predictions(logits, boxes, options.class_mode)
    packed = pack_targets(targets, boxes.device)
    _check_targets(packed, boxes, logits.shape[-1], options.class_mode)
    dtype = torch.float64 if boxes.dtype is torch.float64 or logits.dtype is torch.float64 else torch.float32
    extra = _check_extra(extra_cost, boxes, packed, dtype)
    if boxes.dim() == 3:
        logits, boxes = logits.unsqueeze(0), boxes.unsqueeze(0)
    return CostArguments(
        _computable(logits, dtype if dtype is torch.float64 else logits.dtype),
        _computable(boxes, dtype),
        packed.labels.contiguous(),
        _computable(packed.boxes, dtype).contiguous(),
        None if packed.offsets is None else packed.offsets.to(torch.int64).contiguous(),
        None if packed.counts is None else packed.counts.to(torch.int64).contiguous(),
        _check_image_hw(image_hw, boxes, dtype),
        extra,
        packed.batch,
        *options,
    ), packed


def _parse_options(
    class_mode: str,
    alpha: float,
    gamma: float,
    eps: float,
    w_class: float,
    w_box: float,
    w_giou: float,
    box_format: str,
    giou_eps_mode: str,
) -> _Options:
    mode = _boxes._choice("class_mode", class_mode, CLASS_MODES)
    _boxes._choice("giou_eps_mode", giou_eps_mode, _boxes.EPS_MODES)
    rule = _boxes.make_rule("giou", "xyxy", giou_eps_mode, None)
    fmt = _boxes._choice("box_format", box_format, _boxes.FORMATS)
    numbers = {"alpha": alpha, "gamma": gamma, "eps": eps, "w_class": w_class, "w_box": w_box, "w_giou": w_giou}
    _check_numbers(numbers)
    return _Options(mode, float(alpha), float(gamma), float(eps), float(w_class), float(w_box), float(w_giou), fmt, rule.eps_mode, rule.eps)


_known_options = functools.lru_cache(maxsize=64)(_parse_options)  # a training step asks for the same ones each time


def _options(*given: Any) -> _Options:
    if torch.compiler.is_compiling():
        return _parse_options(*given)
    try:
        return _known_options(*given)
    except TypeError:  # a list, which has no hash: the message shall name it
        return _parse_options(*given)


def _computable(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Without gradient, in `dtype`, with the last dimension contiguous; no copy if it is so already."""
    tensor = tensor.detach()
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def check_number(name: str, value: float) -> None:
    """Refuses what is no finite number."""
    if not isinstance(value, (int, float)) or not -math.inf < value < math.inf:  # a compiled graph cannot ask math.isfinite
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def _check_numbers(numbers: dict[str, float]) -> None:
    for name, value in numbers.items():
        check_number(name, value)
    if numbers["gamma"] < 0:
        raise ValueError(f"gamma must be a finite number >= 0, got {numbers['gamma']!r}")
    low, high = _EPS_RANGE
    if not low <= numbers["eps"] <= high:
        raise ValueError(f"eps must lie in {low:g} .. {high:g}, got {numbers['eps']!r}")


def _check_predictions(logits: Tensor | None, boxes: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    if logits is None and mode == NO_CLASS and isinstance(boxes, Tensor):
        logits = boxes.new_empty((*boxes.shape[:-1], 0))
    for name, tensor in (("logits", logits), ("boxes", boxes)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.dim() not in (3, 4):
            raise ValueError(f"{name} must be [L, B, Q, ...] or [B, Q, ...], got {list(tensor.shape)}")
    assert logits is not None
    if boxes.shape[-1] != 4:
        raise ValueError(f"boxes must be [L, B, Q, 4] or [B, Q, 4], got {list(boxes.shape)}")
    if logits.shape[:-1] != boxes.shape[:-1]:
        raise ValueError(f"logits and boxes must have equal leading dimensions, got {list(logits.shape)} and {list(boxes.shape)}")
    if logits.device != boxes.device:
        raise ValueError(f"logits and boxes must be on one device, got {logits.device} and {boxes.device}")
    return logits, boxes


def _check_targets(packed: PackedTargets, boxes: Tensor, classes: int, mode: int) -> None:
    if packed.batch != boxes.shape[-3]:
        raise ValueError(f"targets must be of as many images as boxes, {boxes.shape[-3]}, got {packed.batch}")
    for name, tensor in (("labels", packed.labels), ("boxes", packed.boxes), ("offsets", packed.offsets), ("counts", packed.counts)):
        if tensor is not None and tensor.device != boxes.device:
            raise ValueError(f"{name} of targets must be on the device of boxes, {boxes.device}, got {tensor.device}")
    _check_host_bounds(packed)
    if mode != NO_CLASS:
        check_labels(packed, classes)


def check_labels(packed: PackedTargets, classes: int, note: str = "") -> None:
    """Refuses labels of real rows outside of 0 .. classes - 1 where the host can read them without waiting; `note` says more about why."""
    found = host_label_range(packed)
    if found is not None and (found[0] < 0 or found[1] >= classes):
        raise ValueError(f"labels of targets must lie in 0 .. {classes - 1}{note}, got {found[0]} .. {found[1]}")


def _check_host_bounds(packed: PackedTargets) -> None:
    """Checks offsets and counts that lie on the host, where reading them waits for nobody."""
    if packed.offsets is not None and readable(packed.offsets):
        _boxes._check_host_offsets("offsets of targets", packed.offsets, packed.rows)
    elif packed.counts is not None and readable(packed.counts):
        counts, width = packed.counts.numpy(), packed.rows // max(packed.batch, 1)
        if counts.size and (counts.min() < 0 or counts.max() > width):
            raise ValueError(f"counts of targets must lie in 0 .. {width}, got {counts.tolist()}")


def _check_image_hw(image_hw: Tensor | None, boxes: Tensor, dtype: torch.dtype) -> Tensor | None:
    if image_hw is None:
        return None
    if not isinstance(image_hw, Tensor):
        raise TypeError(f"image_hw must be a tensor, got {type(image_hw).__name__}")
    if image_hw.shape != (boxes.shape[1], 2):
        raise ValueError(f"image_hw must be [{boxes.shape[1]}, 2], got {list(image_hw.shape)}")
    if image_hw.device != boxes.device:
        raise ValueError(f"image_hw must be on the device of boxes, {boxes.device}, got {image_hw.device}")
    return image_hw.to(dtype).contiguous()


def _check_extra(extra: Tensor | None, boxes: Tensor, packed: PackedTargets, dtype: torch.dtype) -> Tensor | None:
    if extra is None:
        return None
    if not isinstance(extra, Tensor):
        raise TypeError(f"extra_cost must be a tensor, got {type(extra).__name__}")
    shape = (*_lead_shape(packed, boxes), boxes.shape[-2])
    if extra.shape != shape:
        raise ValueError(f"extra_cost must have the shape of the result, {list(shape)}, got {list(extra.shape)}")
    if extra.device != boxes.device:
        raise ValueError(f"extra_cost must be on the device of boxes, {boxes.device}, got {extra.device}")
    layers = 1 if boxes.dim() == 3 else boxes.shape[0]
    return _computable(extra, dtype).reshape(layers, packed.rows, boxes.shape[-2])


def _image_of_rows(rows: int, batch: int, offsets: Tensor | None, counts: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Image of each row, within range also for rows of no image, and whether the row has one; [G] each."""
    if offsets is not None:
        image, _, owned = _overlaps.image_of_row(offsets, rows)
        return image, owned
    row = torch.arange(rows, device=like.device)
    width = max(rows // max(batch, 1), 1)
    image = row // width
    return image, torch.ones_like(row, dtype=torch.bool) if counts is None else row % width < counts[image]


def sigmoid_pair(logits: Tensor) -> tuple[Tensor, Tensor]:
    """p = sigmoid(x) and q = 1 - p, both rounded: the smaller of the two is computed and the larger is its complement.

    Rounded once, p is as good as exact; 1 / (1 + exp(-x)) rounds twice, and near 1 that changes ln(1 - p) by far more than the rounding of
    anything else.
    """
    e = (-logits.abs()).exp()
    small = e / (1 + e)
    large = 1 - small
    positive = logits >= 0
    return torch.where(positive, large, small), torch.where(positive, 1 - large, large)


def _power(x: Tensor, gamma: float) -> Tensor:
    return x * x if gamma == 2 else x**gamma


def _focal_terms(x: Tensor, mode: int, gamma: float, alpha: float, eps: float) -> Tensor:
    p, q = sigmoid_pair(x)
    if mode == FOCAL:
        minus_log_p, minus_log_q = -(p + eps).log(), -(q + eps).log()
    else:
        minus_log_p, minus_log_q = torch.nn.functional.softplus(-x), torch.nn.functional.softplus(x)
    return alpha * (_power(q, gamma) * minus_log_p) - (1 - alpha) * (_power(p, gamma) * minus_log_q)


def _class_terms(logits: Tensor, labels: Tensor, image: Tensor, mode: int, alpha: float, gamma: float, eps: float) -> Tensor:
    """[L, G, Q]; NaN for labels out of range."""
    classes = logits.shape[-1]
    if classes == 0:
        return logits.new_full((logits.shape[0], labels.shape[0], logits.shape[2]), math.nan)
    values = logits.softmax(-1) if mode == SOFTMAX else logits
    x = values.movedim(-1, 2)[:, image, labels.clamp(0, classes - 1)]
    terms = -x if mode in (SOFTMAX, PROB) else _focal_terms(x, mode, gamma, alpha, eps)
    inside = (labels >= 0) & (labels < classes)
    return terms.where(inside[:, None], math.nan)


def _box_terms(boxes: Tensor, target_boxes: Tensor, image: Tensor, image_hw: Tensor | None, fmt: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """L1 distance and GIoU, [L, G, Q] each."""
    ours, theirs = boxes[:, image], target_boxes[:, None]  # [L, G, Q, 4], [G, 1, 4]
    giou = _overlaps.overlaps(_overlaps.corners(ours, rule), _overlaps.corners(theirs, rule), rule, nan_zero=False)
    if image_hw is not None:
        scale = image_hw[image].flip(-1).repeat(1, 2)[:, None]  # [G, 1, 4]
        ours, theirs = ours / scale, theirs / scale
    d = (ours - theirs).abs()
    return d[..., 0] + d[..., 1] + d[..., 2] + d[..., 3], giou


def row_keys(cost: Tensor) -> Tensor:
    """Keys [...] of the rows of a cost [..., Q], see :func:`matching_cost`."""
    if cost.shape[-1] == 0:
        return cost.new_full(cost.shape[:-1], UNKNOWN_KEY, dtype=torch.int64)
    least = cost.amin(-1)
    query = (cost == least.unsqueeze(-1)).to(torch.uint8).argmax(-1)
    bits = (least.to(torch.float32) + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    return ((order << 32) | query).where(cost.isfinite().all(-1), UNKNOWN_KEY)


def _reference(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    image_hw: Tensor | None,
    extra_cost: Tensor | None,
    batch: int,
    class_mode: int,
    alpha: float,
    gamma: float,
    eps: float,
    w_class: float,
    w_box: float,
    w_giou: float,
    fmt: int,
    eps_mode: int,
    giou_eps: float,
    row_min: bool,
) -> tuple[Tensor, Tensor]:
    cost, keys = _fake(logits, boxes, labels, *[None] * 16, row_min)
    if cost.numel() == 0 or batch == 0:
        return cost.fill_(math.inf), keys.fill_(UNKNOWN_KEY)
    image, owned = _image_of_rows(labels.shape[0], batch, offsets, counts, labels)
    l1, giou = _box_terms(boxes, target_boxes, image, image_hw, fmt, Rule(_boxes.GIOU, fmt, eps_mode, giou_eps))
    cost = w_box * l1
    if class_mode != NO_CLASS:
        cost = cost + w_class * _class_terms(logits.to(cost.dtype), labels, image, class_mode, alpha, gamma, eps)
    cost = cost - w_giou * giou
    if extra_cost is not None:
        cost = cost + extra_cost
    cost = cost.where(owned[:, None], math.inf)
    return cost, row_keys(cost) if row_min else keys


def _fake(logits: Tensor, boxes: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    layers, _, queries, _ = boxes.shape
    rows, row_min = labels.shape[0], rest[-1]
    dtype = torch.float64 if torch.float64 in (logits.dtype, boxes.dtype) else torch.float32
    keys = labels.new_empty((layers, rows) if row_min else (0,))
    return boxes.new_empty((layers, rows, queries), dtype=dtype), keys


register(
    "matching_cost(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor? offsets, Tensor? counts, Tensor? image_hw, "
    "Tensor? extra_cost, int batch, int class_mode, float alpha, float gamma, float eps, float w_class, float w_box, float w_giou, "
    "int fmt, int eps_mode, float giou_eps, bool row_min) -> (Tensor cost, Tensor keys)",
    reference=_reference,
    fake=_fake,
    triton=launcher("matching_cost", "matching_cost"),
)
_op = torch.ops.ssod_fast.matching_cost.default
