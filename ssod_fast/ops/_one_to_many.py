"""Options of one-to-many assignment, and what a pair of a query and a target is worth under each rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from . import _boxes, _overlaps
from ._image_rows import brief

AssignRule = Literal["tal", "tal_any", "simota", "soft_label", "atss"]
Conflict = Literal["iou", "metric", "any_iou", "any_metric"]

RULES = {"tal": 0, "tal_any": 1, "simota": 2, "soft_label": 3, "atss": 4}
CONFLICTS = {"iou": 0, "metric": 1, "any_iou": 2, "any_metric": 3}
TAL, TAL_ANY, SIMOTA, SOFT_LABEL, ATSS = range(5)
BY_METRIC, ANY_TARGET = 1, 2  # bits of a conflict

MAX_LEVELS = 16  # kernels take them by value
INSIDE_MARGIN = 0.01  # pixels: how far a centre must be inside for `tal` with priors and `atss`
POINT_MARGIN = 1e-9  # the same for `tal_any`
CENTER_RADIUS = 2.5  # strides: the central region of `simota`
IOU_WEIGHT = 3.0  # of -ln(IoU) in the costs of `simota` and `soft_label`
OFF_CENTER = 1e5  # what `simota` adds outside of box and central region
SOFT_CENTER = 3.0  # strides at which the centre cost 10^(d - 3) of `soft_label` reaches 1
MIN_LOG = -100.0  # logarithms of probabilities are raised to it

_IOU = _boxes.make_rule("iou", "xyxy", "max", 1e-6)
_CIOU = _boxes.make_rule("ciou", "xyxy", "add", 1e-7)


class _Defaults(NamedTuple):
    """What a rule does unless it is told otherwise. None: the option has no meaning for the rule."""

    topk: int
    alpha: float | None = None
    beta: float | None = None
    eps: float | None = None
    min_side: float | None = None
    dynamic_k: bool = False
    conflict: str = "iou"


_DEFAULTS = {
    "tal": _Defaults(13, 1.0, 6.0, eps=1e-7),
    "tal_any": _Defaults(10, 0.5, 6.0, eps=1e-9, min_side=16.0, conflict="any_iou"),
    "simota": _Defaults(10, eps=1e-7, dynamic_k=True, conflict="any_metric"),
    "soft_label": _Defaults(13, eps=1e-7, dynamic_k=True, conflict="any_metric"),
    "atss": _Defaults(9),
}


class Options(NamedTuple):
    """The options in the order and form of the op's schema."""

    levels: list[int]
    batch: int
    rule: int
    from_logits: bool
    fmt: int
    topk: int
    final_topk: int
    alpha: float
    beta: float
    eps: float
    min_side: float
    dynamic_k: bool
    conflict: int
    keep_one: bool

    @property
    def by_cost(self) -> bool:
        """Whether the metric is a cost: the lower the better."""
        return self.rule in (SIMOTA, SOFT_LABEL)


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _number(name: str, value: Any, default: float | None, rule: str, *, positive: bool) -> float:
    """A finite number >= 0 (> 0 if `positive`), or the rule's default."""
    if default is None:
        if value is not None:
            raise ValueError(f"{name} has no meaning for rule {rule!r}, got {value!r}")
        return 0.0
    if value is None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (0 <= value < math.inf) or (positive and value == 0):
        raise ValueError(f"{name} must be a finite number {'> 0' if positive else '>= 0'}, got {value!r}")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value


def _levels(levels: Sequence[int] | None, rule: str, queries: int) -> list[int]:
    if rule != "atss":
        if levels is not None:
            raise ValueError(f"levels has no meaning for rule {rule!r}, got {_shown(levels)}")
        return []
    if levels is None:
        return []  # one level
    if not isinstance(levels, Sequence) or isinstance(levels, str) or not all(isinstance(n, int) for n in levels):
        raise TypeError(f"levels must be a sequence of ints, got {_shown(levels)}")
    sizes = [*levels]
    if len(sizes) > MAX_LEVELS or not all(n >= 0 for n in sizes) or sum(sizes) != queries:
        raise ValueError(f"levels must be at most {MAX_LEVELS} sizes that add up to the {queries} queries, got {_shown(levels)}")
    return sizes


def _shown(levels: Any) -> str:
    return brief(levels) if isinstance(levels, list | tuple) else repr(levels)


def _logits(from_logits: bool | None, rule: str) -> bool:
    if from_logits is not None:
        _flag("from_logits", from_logits)
    if rule == "soft_label":
        if from_logits is False:
            raise ValueError("from_logits must be True or None for rule 'soft_label', which is defined on logits, got False")
        return True
    return bool(from_logits)


def make_options(
    rule: str,
    batch: int,
    queries: int,
    *,
    topk: int | None,
    final_topk: int | None,
    alpha: float | None,
    beta: float | None,
    eps: float | None,
    min_side: float | None,
    levels: Sequence[int] | None,
    box_format: str,
    from_logits: bool | None,
    dynamic_k: bool | None,
    conflict: str | None,
    keep_one: bool,
) -> Options:
    """Checks the options and fills in the defaults of the rule."""
    _boxes._choice("rule", rule, RULES)
    defaults = _DEFAULTS[rule]
    dynamic_k = defaults.dynamic_k if dynamic_k is None else _flag("dynamic_k", dynamic_k)
    if rule == "atss" and dynamic_k:
        raise ValueError("dynamic_k has no meaning for rule 'atss', got True")
    return Options(
        levels=_levels(levels, rule, queries),
        batch=batch,
        rule=RULES[rule],
        from_logits=_logits(from_logits, rule),
        fmt=_boxes._choice("box_format", box_format, _boxes.FORMATS),
        topk=defaults.topk if topk is None else _count("topk", topk),
        final_topk=0 if final_topk is None else _count("final_topk", final_topk),
        alpha=_number("alpha", alpha, defaults.alpha, rule, positive=False),
        beta=_number("beta", beta, defaults.beta, rule, positive=True),
        eps=_number("eps", eps, defaults.eps, rule, positive=False),
        min_side=_number("min_side", min_side, defaults.min_side, rule, positive=False),
        dynamic_k=dynamic_k,
        conflict=_boxes._choice("conflict", defaults.conflict if conflict is None else conflict, CONFLICTS),
        keep_one=_flag("keep_one", keep_one),
    )


class Pairs(NamedTuple):
    """All pairs of G target rows and Q queries of their image, on L layers: each [L, G, Q]."""

    iou: Tensor  # NaN for boxes that are not finite
    metric: Tensor  # what the rule reports: m, the cost, or the overlap
    merit: Tensor  # what it maximises: the metric or minus the cost; -inf where a pair is impossible
    near: Tensor  # whether the prior is where the rule wants it to be


class Problem(NamedTuple):
    """Input of the op with every target row's image resolved; float32 throughout."""

    scores: Tensor | None  # [L, B, Q, C]
    boxes: Tensor  # [L, B, Q, 4] xyxy, in the frame of the targets
    labels: Tensor  # [G], clamped into range
    targets: Tensor  # [G, 4] xyxy
    image: Tensor  # [G], clamped into range
    real: Tensor  # bool [G]: rows that an image owns and that can be scored
    priors: Tensor | None  # [Q, 2] or [Q, 4]


def power(x: Tensor, exponent: float) -> Tensor:
    """x ** exponent for x >= 0; whole exponents by squaring and .5 as a root, so that every implementation rounds alike."""
    if exponent == 0.5:
        return x.sqrt()
    if exponent != int(exponent) or exponent > 64:
        return x.pow(exponent)
    result, bits = torch.ones_like(x), int(exponent)
    while bits:
        if bits & 1:
            result = result * x
        bits >>= 1
        x = x * x
    return result


def _label_scores(scores: Tensor, p: Problem) -> Tensor:
    """[L, B, Q, C] at the label of each target: [L, G, Q]."""
    return scores[:, p.image, :, p.labels].transpose(0, 1)


def _probabilities(p: Problem, from_logits: bool) -> Tensor:
    assert p.scores is not None
    s = _label_scores(p.scores, p)
    return s.sigmoid() if from_logits else s.clamp(0, 1)


def pair_overlaps(p: Problem, rule: int) -> Tensor:
    """Overlap of every pair [L, G, Q]: IoU with the union raised to 1e-6, or CIoU raised to 0. NaN for boxes that are not finite."""
    how = _CIOU if rule == TAL_ANY else _IOU
    boxes = _overlaps.corners(p.boxes, how)
    queries = _overlaps.Corners(*(plane[:, p.image] for plane in boxes))
    return _overlaps.overlaps(_overlaps.corners(p.targets, how).unsqueeze(-1), queries, how, nan_zero=False).clamp(min=0)


def box_centers(boxes: Tensor) -> Tensor:
    """Centres [..., 2] of boxes [..., 4] xyxy."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def query_centers(p: Problem) -> Tensor:
    """Centres of the priors, or of the boxes where there are none, as they face each target: [L or 1, G or 1, Q, 2]."""
    return p.priors[None, None, :, :2] if p.priors is not None else box_centers(p.boxes)[:, p.image]


def inside(points: Tensor, boxes: Tensor, margin: float) -> Tensor:
    """Whether points [..., Q, 2] lie in boxes [G, 4] by more than `margin`: [..., G, Q]."""
    x, y = points.unbind(-1)
    x1, y1, x2, y2 = (v.unsqueeze(-1) for v in boxes.unbind(-1))
    return (x - x1 > margin) & (y - y1 > margin) & (x2 - x > margin) & (y2 - y > margin)


def _grown(boxes: Tensor, min_side: float) -> Tensor:
    """Boxes whose sides below `min_side` are enlarged to it about their centre."""
    size = boxes[..., 2:] - boxes[..., :2]
    small, center = size < min_side, box_centers(boxes)
    return torch.cat([boxes[..., :2].where(~small, center - min_side / 2), boxes[..., 2:].where(~small, center + min_side / 2)], -1)


def _same_image(p: Problem, per_row: Tensor, batch: int) -> Tensor:
    """Whether any target of the image says yes: bool [G, Q] -> [G, Q], the same for all targets of an image."""
    images = torch.zeros(batch, per_row.shape[1], dtype=torch.int32, device=per_row.device)
    images = images.index_add(0, p.image, (per_row & p.real[:, None]).int())
    return images[p.image] > 0


def _simota_cost(p: Problem, iou: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """Sum over classes of BCE + 3 · (-ln(u + eps)) + 1e5 off the centre, and which priors count at all."""
    assert p.scores is not None
    assert p.priors is not None
    if o.from_logits:
        log_p, log_q = -softplus(-p.scores), -softplus(p.scores)
    else:
        bounded = p.scores.clamp(0, 1)
        log_p, log_q = bounded.log(), (-bounded).log1p()
    log_p, log_q = log_p.clamp(min=MIN_LOG), log_q.clamp(min=MIN_LOG)
    classes = -(log_q.sum(-1)[:, p.image] - _label_scores(log_q, p) + _label_scores(log_p, p))
    center, reach = box_centers(p.targets), CENTER_RADIUS * p.priors[:, 2:]
    offset = p.priors[:, :2] - center[:, None]
    central = (reach + offset > 0).all(-1) & (reach - offset > 0).all(-1)
    within = inside(p.priors[:, :2], p.targets, 0.0)
    cost = classes + IOU_WEIGHT * -(iou + o.eps).log() + OFF_CENTER * (~(within & central))
    return cost, _same_image(p, within | central, o.batch)


def _soft_label_cost(p: Problem, iou: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """Quality focal loss against the soft label u + 3 · (-ln(u + eps)) + 10^(distance in strides - 3), and which priors count at all."""
    assert p.scores is not None
    assert p.priors is not None
    background = softplus(p.scores) * p.scores.sigmoid().square()
    x = _label_scores(p.scores, p)
    own = (softplus(x) - x * iou) * (iou - x.sigmoid()).square()
    classes = background.sum(-1)[:, p.image] - _label_scores(background, p) + own
    offset = p.priors[:, :2] - box_centers(p.targets)[:, None]
    distance = offset.square().sum(-1).sqrt() / p.priors[:, 2]
    cost = classes + IOU_WEIGHT * -(iou + o.eps).log() + torch.pow(10.0, distance - SOFT_CENTER)
    return cost, _same_image(p, inside(p.priors[:, :2], p.targets, 0.0), o.batch)


def pair_values(p: Problem, o: Options) -> Pairs:
    """What every pair is worth under the rule."""
    iou = pair_overlaps(p, o.rule)
    near = torch.ones_like(iou, dtype=torch.bool)
    if o.rule == ATSS:
        metric, possible = iou, iou > 0
    elif o.by_cost:
        metric, valid = (_simota_cost if o.rule == SIMOTA else _soft_label_cost)(p, iou, o)
        near = near & valid
        possible = metric.abs() < math.inf
    else:
        metric = power(_probabilities(p, o.from_logits), o.alpha) * power(iou, o.beta)
        possible = (iou > 0) & (metric >= 0)
    if o.rule == TAL_ANY:
        assert p.priors is not None
        near = near & inside(p.priors[:, :2], _grown(p.targets, o.min_side), POINT_MARGIN)
    possible = possible & near & p.real[:, None]
    return Pairs(iou, metric, (-metric if o.by_cost else metric).where(possible, -math.inf), near)
