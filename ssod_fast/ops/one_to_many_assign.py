"""Several queries for each target: the assignments of Semi-DETR, TaskAligned heads, SimOTA, RTMDet and ATSS, for a whole batch at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _boxes, _overlaps
from ._image_rows import as_int64, as_sizes
from ._one_to_many import (
    ANY_TARGET,
    ATSS,
    BY_METRIC,
    INSIDE_MARGIN,
    TAL,
    AssignRule,
    Conflict,
    Options,
    Pairs,
    Problem,
    inside,
    make_options,
    pair_values,
    query_centers,
)
from ._registry import launcher, register
from .box_iou import Format
from .matching_cost import FOCAL, NO_CLASS, _check_targets
from .packed_targets import AnyTargets, PackedTargets, pack_targets


class OneToMany(NamedTuple):
    """Which target each query takes, for all layers and images; without the dimension L where the input had none.

    Rows of targets count through all images: target j of image b is row `offsets[b] + j` of ragged targets (a list), and row `b * N + j` of
    :class:`~ssod_fast.structures.PaddedTargets` with room for N, padding included. So the labels that the queries shall learn are
    `pack_targets(targets).labels[assigned.target]` where `assigned.target >= 0`.

    Attributes:
        target: int64 [L, B, Q], row of the packed targets, -1 for background.
        metric: float32 [L, B, Q], value of the pair under the rule (a cost for "simota" and "soft_label"), 0 for background.
        iou: float32 [L, B, Q], overlap of the pair, 0 for background.
        weight: float32 [L, B, Q], the rule's weight of the pair, 0 for background.
        count: int32 [L, G], queries of each target row.
    """

    target: Tensor
    metric: Tensor
    iou: Tensor
    weight: Tensor
    count: Tensor  # type: ignore[assignment]  # nobody counts the items of this tuple


def one_to_many_assign(
    scores: Tensor | None,
    boxes: Tensor,
    targets: AnyTargets,
    *,
    rule: AssignRule = "tal",
    topk: int | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    priors: Tensor | None = None,
    levels: Sequence[int] | None = None,
    conflict: Conflict | None = None,
    eps: float | None = None,
    image_hw: Tensor | None = None,
    box_format: Format = "xyxy",
    from_logits: bool | None = None,
    min_side: float | None = None,
    dynamic_k: bool | None = None,
    final_topk: int | None = None,
    keep_one: bool = False,
) -> OneToMany:
    """Assigns several queries to each target. No gradient, no loop over targets, no wait for the device.

    With u the overlap of a query's box and a target, and s the query's probability of the target's label:

    - "tal" (Semi-DETR; with `priors` the TaskAligned assignment of TOOD): the `topk` queries with the largest m = s^alpha · u^beta, if
      m > 0 and, with priors, the prior lies in the target by more than .01. The `topk` are taken first, whether or not their priors lie in
      the target, so that fewer may remain; "tal_any" asks the priors first. u is the IoU. Weight: m / (largest m + eps) · largest u, both
      over the queries that the target ends up with.
    - "tal_any" (YOLOv8 and later): the same with u = CIoU raised to 0, of queries whose prior lies in the target, sides of which below
      `min_side` are enlarged to it first.
    - "simota" (YOLOX): the k queries of lowest cost Σ BCE(p, one-hot) - 3 ln(u + eps) + 1e5 · (prior not in box and centre region), where
      k is the sum of the `topk` largest u, rounded down, at least 1. Only priors in the box or the centre region (2.5 strides) of any
      target take part. Weight: u.
    - "soft_label" (RTMDet): as "simota", for priors in the box of any target, with the cost
      Σ BCE(x, u · one-hot) · (u · one-hot - p)² - 3 ln(u + eps) + 10^(distance / stride - 3).
    - "atss": the `topk` nearest centres per level; of these, where u reaches mean + standard deviation and the centre lies in the target by
      more than .01. Weight: u. One candidate alone has no deviation and is not taken.

    Equal values choose the lowest query, equal claims the lowest target. Values that are equal but for rounding are a matter of the
    implementation: the costs of "simota" and "soft_label" are sums over classes, which a CPU and a GPU add up in different orders, so that
    these ties are decided alike only where the sums are exact in float32. NaN boxes, scores and targets take part in no pair; probabilities
    are clamped to [0, 1]. Everything is computed in float32.

    Sources: Semi-DETR (arXiv 2307.08095), TOOD (2108.07755), YOLOX (2107.08430), RTMDet (2212.07784), ATSS (1912.02424).

    Args:
        scores: [L, B, Q, C] or [B, Q, C], any float dtype; probabilities, or logits with `from_logits`. May be None for "atss".
        boxes: [L, B, Q, 4] or [B, Q, 4]; predictions, or the anchors for "atss".
        targets: anything that :func:`~ssod_fast.ops.pack_targets` takes; boxes xyxy in pixels, labels in 0..C - 1. Rows with other labels
            on a device get no query. Their `weights` play no part: an assignment has none, so apply them to the loss.
        rule: see above.
        topk: candidates per target, more than Q means Q; by default 13 ("tal", "soft_label"), 10 ("tal_any", "simota") or 9 per level
            ("atss").
        alpha: exponent of s >= 0, default 1 ("tal") or .5 ("tal_any").
        beta: exponent of u > 0, default 6.
        priors: [Q, 2] centres (x, y) in pixels, or [Q, 4] (x, y, stride x, stride y), shared by all images. Needed by "tal_any", with
            strides by "simota" and "soft_label"; for "atss" the default is the centres of `boxes`.
        levels: sizes of the levels of "atss", which add up to Q; one level by default.
        conflict: which target gets a query that several want: of highest "iou" or best "metric" among those that want it, or of all that it
            may serve ("any_iou", "any_metric"). Default: "iou" ("tal", "atss"), "any_iou" ("tal_any"), "any_metric" (costs).
        eps: guard of the weight's denominator (default 1e-7 for "tal", 1e-9 for "tal_any") or of ln u (1e-7).
        image_hw: [B, 2] (height, width): `boxes` are normalised and multiplied by it; the targets stay as they are.
        box_format: of `boxes`: "xyxy", "xywh" or "cxcywh".
        from_logits: whether the scores are logits; default False, "soft_label" always reads logits.
        min_side: see "tal_any"; default 16.
        dynamic_k: whether k is the sum of the `topk` largest u; default True for the costs, False otherwise; "tal" with it is what
            Semi-DETR calls multiple_pos.
        final_topk: keep at most so many queries per target after conflicts, the best by the metric.
        keep_one: give a target that ends up without a query, in the order of the targets, its best one that is still background.

    Returns:
        :class:`OneToMany`.

    Raises:
        ValueError: for wrong shapes, devices, option names and values, missing priors, and labels on the host that are out of range.
        TypeError: for wrong dtypes and options of a wrong type.
    """
    packed = pack_targets(targets, boxes.device if isinstance(boxes, Tensor) else None)
    layered = _check_queries(scores, boxes, packed, rule)
    scores, boxes = (None if scores is None else _float(scores, layered)), _float(boxes, layered)
    queries = boxes.shape[2]
    options = make_options(
        rule,
        packed.batch,
        queries,
        topk=topk,
        final_topk=final_topk,
        alpha=alpha,
        beta=beta,
        eps=eps,
        min_side=min_side,
        levels=levels,
        box_format=box_format,
        from_logits=from_logits,
        dynamic_k=dynamic_k,
        conflict=conflict,
        keep_one=keep_one,
    )
    result = _op(
        scores,
        boxes if boxes.stride(-1) == 1 else boxes.contiguous(),
        packed.labels.contiguous(),
        packed.boxes.detach().float().contiguous(),
        None if packed.offsets is None else as_int64(packed.offsets),
        None if packed.counts is None else as_int64(packed.counts),
        _check_priors(priors, rule, queries, boxes.device),
        _check_sizes(image_hw, packed.batch, boxes.device),
        *options,
    )
    return OneToMany(*result) if layered else OneToMany(*(t[0] for t in result))


def _float(t: Tensor, layered: bool) -> Tensor:
    t = t.detach().float()
    return t if layered else t[None]


def _check_queries(scores: Tensor | None, boxes: Tensor, targets: PackedTargets, rule: str) -> bool:
    """Refuses queries of wrong form; says whether they have the dimension L."""
    for name, value in (("scores", scores), ("boxes", boxes)):
        if value is None and rule == "atss" and name == "scores":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {value.dtype}")
        if value.dim() not in (3, 4):
            raise ValueError(f"{name} must have 3 or 4 dimensions, [B, Q, .] or [L, B, Q, .], got shape {list(value.shape)}")
    if boxes.shape[-1] != 4:
        raise ValueError(f"boxes must have shape [L, B, Q, 4] or [B, Q, 4], got {list(boxes.shape)}")
    if scores is not None and scores.shape[:-1] != boxes.shape[:-1]:
        raise ValueError(f"scores and boxes must agree but for the last dimension, got {list(scores.shape)} and {list(boxes.shape)}")
    if scores is not None and scores.device != boxes.device:
        raise ValueError(f"scores and boxes must be on one device, got {scores.device} and {boxes.device}")
    by_class = scores is not None and rule != "atss"
    _check_targets(targets, boxes, scores.shape[-1] if scores is not None else 0, FOCAL if by_class else NO_CLASS)
    return boxes.dim() == 4


def _check_priors(priors: Tensor | None, rule: str, queries: int, device: torch.device) -> Tensor | None:
    strides = rule in ("simota", "soft_label")
    if priors is None:
        if strides or rule == "tal_any":
            raise ValueError(f"priors must be given for rule {rule!r}, [Q, {4 if strides else 2}], got None")
        return None
    if not isinstance(priors, Tensor) or not priors.is_floating_point():
        raise TypeError(
            f"priors must be a floating point tensor, got {priors.dtype if isinstance(priors, Tensor) else type(priors).__name__}"
        )
    widths = (4,) if strides else (2, 4)
    if priors.dim() != 2 or priors.shape[0] != queries or priors.shape[1] not in widths:
        expected = " or ".join(f"[{queries}, {width}]" for width in widths)
        raise ValueError(f"priors must have shape {expected} for rule {rule!r}, got {list(priors.shape)}")
    if priors.device != device:
        raise ValueError(f"priors and boxes must be on one device, got {priors.device} and {device}")
    return priors.detach().float().contiguous()


def _check_sizes(image_hw: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
    if image_hw is None:
        return None
    sizes = as_sizes(image_hw).float().contiguous()
    if sizes.shape[0] != batch:
        raise ValueError(f"image_hw must have shape [{batch}, 2], got {list(image_hw.shape)}")
    if sizes.device != device:
        raise ValueError(f"image_hw and boxes must be on one device, got {sizes.device} and {device}")
    return sizes


def _owners(offsets: Tensor | None, counts: Tensor | None, batch: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The image of each row, clamped into range, and whether that image owns it."""
    row = torch.arange(rows, device=device)
    if offsets is not None:
        image = torch.searchsorted(offsets.clamp(0, rows), row, right=True) - 1
        return image.clamp(0, max(batch - 1, 0)), (image >= 0) & (image < batch)
    width = max(rows // max(batch, 1), 1)
    image = (row // width).clamp(max=max(batch - 1, 0))
    return image, torch.ones_like(row, dtype=torch.bool) if counts is None else row - image * width < counts[image]


def _resolve(
    scores: Tensor | None,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    priors: Tensor | None,
    image_hw: Tensor | None,
    o: Options,
) -> Problem:
    """Boxes as xyxy in the frame of the targets, and each row's image."""
    image, real = _owners(offsets, counts, o.batch, labels.shape[0], boxes.device)
    if o.rule != ATSS:
        assert scores is not None
        classes = scores.shape[-1]
        real = real & (labels >= 0) & (labels < classes)
        labels = labels.clamp(0, max(classes - 1, 0))
    if image_hw is not None:
        boxes = boxes * image_hw.flip(-1).repeat(1, 2)[:, None]
    planes = _overlaps.corners(boxes, _boxes.Rule(_boxes.IOU, o.fmt, _boxes.MAX, 0.0))
    corners = torch.stack(planes[:4], -1).where(boxes.isfinite().all(-1, keepdim=True), math.nan)
    return Problem(scores, corners, labels, target_boxes, image, real, priors)


def _best(merit: Tensor, k: int, most: Tensor | int) -> Tensor:
    """The `most` <= k best of each row of merit [..., Q] above -inf, the lowest index among equals: bool [..., Q]."""
    order = merit.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    chosen = (merit.gather(-1, order) > -math.inf) & (torch.arange(order.shape[-1], device=merit.device) < most)
    return torch.zeros_like(merit, dtype=torch.bool).scatter(-1, order, chosen)


def _dynamic_k(iou: Tensor, k: int) -> Tensor:
    """The sum of the k largest overlaps, rounded down, at least 1: [..., Q] -> [..., 1]."""
    total = torch.zeros_like(iou[..., 0])
    for value in iou.topk(min(k, iou.shape[-1]), dim=-1).values.unbind(-1):  # from the largest down: the order of all implementations
        total = total + value
    return total.to(torch.int64).clamp(min=1).unsqueeze(-1)


def _nearest(p: Problem, pairs: Pairs, o: Options) -> Tensor:
    """ATSS: candidates [L, G, Q] near the target whose overlap stands out among them."""
    points = query_centers(p)
    offset = points - ((p.targets[:, :2] + p.targets[:, 2:]) / 2)[:, None]
    distance = offset.square().sum(-1).expand_as(pairs.iou)  # squared: the root would make ties
    distance = distance.where(distance < math.inf, math.inf)
    candidate = torch.cat([_best(-level, o.topk, o.topk) for level in distance.split(o.levels or [distance.shape[-1]], -1)], -1)
    iou, count = pairs.iou.nan_to_num(0.0).double(), candidate.sum(-1, keepdim=True)
    mean = (iou * candidate).sum(-1, keepdim=True) / count
    deviation = (((iou - mean) * candidate).square().sum(-1, keepdim=True) / (count - 1)).sqrt()
    within = inside(points, p.targets, INSIDE_MARGIN) if p.priors is not None else _inside_rows(points, p.targets)
    return candidate & (pairs.iou >= mean + deviation) & within & p.real[:, None]


def _inside_rows(points: Tensor, targets: Tensor) -> Tensor:
    """`inside` for points [L, G, Q, 2] of which each row faces its own target."""
    offsets = torch.cat([points - targets[:, None, :2], targets[:, None, 2:] - points], -1)
    return (offsets > INSIDE_MARGIN).all(-1)


def _claims(p: Problem, pairs: Pairs, o: Options) -> Tensor:
    """Which queries each target wants: bool [L, G, Q]."""
    if o.rule == ATSS:
        return _nearest(p, pairs, o)
    selectable = pairs.merit if o.by_cost else pairs.merit.where(pairs.merit > 0, -math.inf)
    most = _dynamic_k(pairs.iou.where(pairs.near & (pairs.iou > 0), 0), o.topk) if o.dynamic_k else o.topk
    claims = _best(selectable, o.topk, most)
    if o.rule == TAL and p.priors is not None:
        claims = claims & inside(p.priors[:, :2], p.targets, INSIDE_MARGIN)
    return claims


def _settle(p: Problem, pairs: Pairs, claims: Tensor, o: Options) -> Tensor:
    """Gives each query that somebody claims to one target: bool [L, G, Q]."""
    layers, rows, queries = claims.shape
    shape, image = (layers, o.batch, queries), p.image[:, None].expand(claims.shape)
    if o.conflict & ANY_TARGET:
        wanted = torch.zeros(shape, dtype=torch.int32, device=claims.device).scatter_add(1, image, claims.int())
        claims = ((wanted[:, p.image] > 1) & (pairs.merit > -math.inf)) | claims
    contest = (pairs.merit if o.conflict & BY_METRIC else pairs.iou).where(claims, -math.inf)
    best = torch.full(shape, -math.inf, device=claims.device).scatter_reduce(1, image, contest, "amax")
    row = torch.arange(rows, device=claims.device)[:, None].expand(claims.shape)
    first = torch.full(shape, rows, device=claims.device).scatter_reduce(
        1, image, row.where(claims & (contest == best[:, p.image]), rows), "amin"
    )
    return claims & (first[:, p.image] == row)


def _rescue(p: Problem, pairs: Pairs, taken: Tensor, o: Options) -> Tensor:
    """Gives targets without a query, from the first to the last, their best one that is still background."""
    rows = torch.arange(taken.shape[1], device=taken.device)
    for row in range(len(rows)):
        busy = (taken & (p.image == p.image[row])[:, None]).any(1)
        merit = pairs.merit[:, row].where(~busy & ~taken[:, row].any(-1, keepdim=True), -math.inf)
        taken = taken | (_best(merit, 1, 1)[:, None] & (rows == row)[:, None])
    return taken


def _weights(pairs: Pairs, taken: Tensor, o: Options) -> Tensor:
    """Weight of every pair that is taken: [L, G, Q]."""
    if o.by_cost or o.rule == ATSS:
        return pairs.iou
    metric, iou = (t.where(taken, 0).amax(-1, keepdim=True) for t in (pairs.metric, pairs.iou))
    return pairs.metric / (metric + o.eps) * iou


def _reference(
    scores: Tensor | None,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
    priors: Tensor | None,
    image_hw: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    o = Options(*options)
    target, metric, iou, weight, count = (t.zero_() for t in _fake(scores, boxes, labels))
    if labels.shape[0] == 0 or boxes[..., 0].numel() == 0:
        return target - 1, metric, iou, weight, count
    p = _resolve(scores, boxes, labels, target_boxes, offsets, counts, priors, image_hw, o)
    pairs = pair_values(p, o)
    taken = _settle(p, pairs, _claims(p, pairs, o), o)
    if o.final_topk:
        taken = _best(pairs.merit.where(taken, -math.inf), o.final_topk, o.final_topk)
    if o.keep_one:
        taken = _rescue(p, pairs, taken, o)
    row = torch.arange(len(labels), device=labels.device)[:, None] + 1
    target = target.scatter_add(1, p.image[:, None].expand(taken.shape), row * taken) - 1
    at, background = target.clamp(min=0), target < 0
    metric, iou, weight = (t.gather(1, at).where(~background, 0) for t in (pairs.metric, pairs.iou, _weights(pairs, taken, o)))
    return target, metric, iou, weight, taken.sum(-1, dtype=torch.int32)


def _fake(scores: Tensor | None, boxes: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = boxes.shape[:-1]
    target = labels.new_empty(shape)
    metric, iou, weight = (boxes.new_empty(shape) for _ in range(3))
    return target, metric, iou, weight, labels.new_empty((shape[0], labels.shape[0]), dtype=torch.int32)


register(
    "one_to_many_assign(Tensor? scores, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor? offsets, Tensor? counts, Tensor? priors, "
    "Tensor? image_hw, int[] levels, SymInt batch, int rule, bool from_logits, int fmt, int topk, int final_topk, float alpha, float beta, "
    "float eps, float min_side, bool dynamic_k, int conflict, bool keep_one) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    triton=launcher("one_to_many_assign", "one_to_many_assign"),
)
_op = torch.ops.ssod_fast.one_to_many_assign.default
