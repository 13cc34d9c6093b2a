"""Boxes of mixed images: each source's boxes scaled, flipped, filtered, shifted and clipped as its pixels are."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ssod_fast.structures import PAD_LABEL, PaddedTargets

from ._registry import launcher, register
from .compose_plan import FLIP_X, FLIP_Y, BoxRule, ComposePlan, PlaceF, PlaceI, PlanTables, host_plan

AREA_EPS = 1e-7  # added to areas that divide, as in MixPL's erase filter
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def compose_boxes(
    targets: PaddedTargets,
    plan: ComposePlan | PlanTables,
    *,
    rule: BoxRule | None = None,
    nmax: int | None = None,
    blend: Literal["sum", "over"] = "sum",
) -> PaddedTargets:
    """The boxes of every canvas of a plan. Per placement, in float32, a box is

    1. scaled by the placement's box scale and clamped to the resized source,
    2. flipped,
    3. dropped if at least `rule.erase_thr` of its area is erased,
    4. shifted by the offset and clipped to the visible rectangle,
    5. dropped if less than `rule.min_visibility` of it is left; with blend "over", later placements hide what lies below them,
    6. dropped unless width and height exceed `rule.min_wh`; dropped anyway if it is not finite or its label is negative,
    7. given its weight, times that of the placement if `rule.propagate_weight`.

    Boxes come out by placement and within a placement in source order, so that the same plan twice gives the same rows. Nothing syncs.

    Args:
        targets: boxes of the S sources of the plan, xyxy in the pixels of each source.
        plan: geometry of the mix.
        rule: which boxes survive, by default `BoxRule()`.
        nmax: rows per canvas, by default K * N, which always suffices; boxes beyond it are counted in `overflow`.
        blend: as in :func:`compose_images`.

    Returns:
        Targets of the B canvases with `placement`, `index` and `overflow`.

    Raises:
        ValueError: for a plan that does not fit the targets, or a negative nmax.
    """
    rule = BoxRule() if rule is None else rule
    host = host_plan(plan)
    host.check_sources(len(targets))
    if blend not in ("sum", "over"):
        raise ValueError(f"blend must be one of sum, over, got {blend!r}")
    if nmax is not None and nmax < 0:
        raise ValueError(f"nmax must not be negative, got {nmax}")
    if targets.boxes.requires_grad:
        raise ValueError("targets.boxes requires grad, but targets are data here: detach them")
    tables = plan if isinstance(plan, PlanTables) else plan.to(targets.device)
    if tables.canvas.device != targets.device:
        raise ValueError(f"plan must be on {targets.device} like the targets, got {tables.canvas.device}")
    fields = _boxes(
        *(targets.boxes.float(), targets.labels, targets.scores.float(), targets.weights.float(), targets.count),
        *(tables.place_i, tables.place_f, tables.erase),
        host.places * targets.nmax if nmax is None else nmax,
        rule.erase_thr,
        rule.erase_overlap == "union",
        rule.min_visibility,
        rule.min_wh,
        rule.propagate_weight,
        blend == "over",
    )
    boxes, labels, scores, weights, placement, index, count, overflow = fields
    return PaddedTargets(boxes, labels, scores, weights, count, placement, index, overflow)


def _boxes(*args: Any) -> Outputs:
    result: Outputs = torch.ops.ssod_fast.compose_boxes(*args)
    return result


def reference(
    boxes: Tensor,  # [S, P, 4] xyxy, source pixels
    labels: Tensor,  # [S, P]
    scores: Tensor,  # [S, P]
    weights: Tensor,  # [S, P]
    count: Tensor,  # [S]
    place_i: Tensor,  # [B, K, 11]
    place_f: Tensor,  # [B, K, 5]
    erase: Tensor,  # [B, K, E, 4]
    nmax: int,
    erase_thr: float,
    union: bool,
    min_visibility: float,
    min_wh: float | None,
    propagate_weight: bool,
    over: bool,
) -> Outputs:
    """The specification, for all boxes of all placements at once."""
    batch, places, per_source = place_i.shape[0], place_i.shape[1], boxes.shape[1]
    if boxes.shape[0] == 0 or places * per_source == 0:
        return _empty(boxes, labels, batch, nmax)
    src = place_i[..., PlaceI.SRC].clamp(min=0).long()  # [B, K]
    rect = place_i[..., None, PlaceI.X0 : PlaceI.Y1 + 1]  # [B, K, 1, 4]
    used = (place_i[..., PlaceI.SRC] >= 0)[..., None] & (rect[..., 2] > rect[..., 0]) & (rect[..., 3] > rect[..., 1])
    real = torch.arange(per_source, device=boxes.device) < count[src][..., None]
    keep = used & real & (labels[src] >= 0) & boxes[src].isfinite().all(-1)  # [B, K, P]

    moved = _resize_and_flip(boxes[src], place_i[:, :, None], place_f[:, :, None])
    keep &= ~(_erased_area(moved, place_i, erase, union) / (_area(moved) + AREA_EPS) >= erase_thr)
    offset = place_i[..., None, PlaceI.OFF_X : PlaceI.OFF_Y + 1]
    shifted = moved + torch.cat([offset, offset], -1)
    clipped = _clamp(shifted, rect)
    visible = _area(clipped) - (_hidden_area(clipped, rect, used) if over else 0)
    keep &= ~(visible.clamp(min=0) / (_area(shifted) + AREA_EPS) < min_visibility)
    if min_wh is not None:
        keep &= ((clipped[..., 2:] - clipped[..., :2]) > min_wh).all(-1)
    weight = weights[src] * place_f[..., PlaceF.WEIGHT, None] if propagate_weight else weights[src]
    return _compact(keep, clipped, labels[src], scores[src], weight, nmax)


def _resize_and_flip(boxes: Tensor, place_i: Tensor, place_f: Tensor) -> Tensor:
    """Steps 1 and 2: boxes [B, K, P, 4] in the frame of the resized and flipped source."""
    size = place_i[..., PlaceI.OUT_W : PlaceI.OUT_H + 1].float()
    scale = place_f[..., PlaceF.BOX_SX : PlaceF.BOX_SY + 1]
    scaled = _clamp(boxes * torch.cat([scale, scale], -1), torch.cat([torch.zeros_like(size), size], -1))
    mirrored = torch.cat([size - scaled[..., 2:], size - scaled[..., :2]], -1)
    x = torch.where((place_i[..., PlaceI.FLIP, None] & FLIP_X) > 0, mirrored[..., 0::2], scaled[..., 0::2])
    y = torch.where((place_i[..., PlaceI.FLIP, None] & FLIP_Y) > 0, mirrored[..., 1::2], scaled[..., 1::2])
    return torch.stack([x, y], -1).flatten(-2)  # x1, y1, x2, y2


def _clamp(boxes: Tensor, rect: Tensor) -> Tensor:
    """Both corners of the boxes into the rectangles."""
    low, high = rect[..., :2].float(), rect[..., 2:].float()
    return torch.minimum(torch.maximum(boxes, torch.cat([low, low], -1)), torch.cat([high, high], -1))


def _area(boxes: Tensor) -> Tensor:
    side = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return side[..., 0] * side[..., 1]


def _overlap(boxes: Tensor, rects: Tensor) -> Tensor:
    """Area of the intersections."""
    low, high = torch.maximum(boxes[..., :2], rects[..., :2].float()), torch.minimum(boxes[..., 2:], rects[..., 2:].float())
    return _area(torch.cat([low, high], -1))


def _erased_area(boxes: Tensor, place_i: Tensor, erase: Tensor, union: bool) -> Tensor:
    """Step 3: [B, K, P] area of each box under the first `n_erase` patches; one patch after the other, as the kernels sum."""
    active = torch.arange(erase.shape[2], device=boxes.device) < place_i[..., PlaceI.N_ERASE, None]  # [B, K, E]
    patches = torch.where(active[..., None], erase, 0)
    if union:
        return _union_area(boxes, patches)
    total = torch.zeros_like(boxes[..., 0])
    for e in range(erase.shape[2]):
        total = total + _overlap(boxes, patches[:, :, None, e])
    return total


def _union_area(boxes: Tensor, patches: Tensor) -> Tensor:
    """Area of a box under any patch: the edges of the patches cut it into cells, each covered or not as a whole."""
    edge = patches[:, :, None].float()  # [B, K, 1, E, 4]
    box = boxes[..., None, :]  # [B, K, P, 1, 4]
    xs = edge[..., 0::2].flatten(-2).clamp(box[..., 0], box[..., 2]).sort(-1).values  # [B, K, P, 2E]
    ys = edge[..., 1::2].flatten(-2).clamp(box[..., 1], box[..., 3]).sort(-1).values
    covered = torch.zeros(*boxes.shape[:-1], max(xs.shape[-1] - 1, 0), max(ys.shape[-1] - 1, 0), dtype=torch.bool, device=boxes.device)
    for e in range(patches.shape[2]):
        x0, y0, x1, y1 = edge[..., e, :].unbind(-1)
        in_x = (xs[..., :-1] >= x0[..., None]) & (xs[..., 1:] <= x1[..., None])
        in_y = (ys[..., :-1] >= y0[..., None]) & (ys[..., 1:] <= y1[..., None])
        covered |= in_x[..., :, None] & in_y[..., None, :]
    cells = xs.diff(dim=-1)[..., :, None] * ys.diff(dim=-1)[..., None, :]
    return torch.where(covered, cells, 0).sum((-2, -1))


def _hidden_area(boxes: Tensor, rect: Tensor, used: Tensor) -> Tensor:
    """Step 5 of blend "over": [B, K, P] area of each box under the visible rectangles of later placements."""
    places = boxes.shape[1]
    hidden = torch.zeros_like(boxes[..., 0])
    for later in range(1, places):
        below = torch.where(used[:, None, later], _overlap(boxes[:, :later], rect[:, None, later]), 0)  # [B, later, P]
        hidden[:, :later] += below
    return hidden


def _compact(keep: Tensor, boxes: Tensor, labels: Tensor, scores: Tensor, weights: Tensor, nmax: int) -> Outputs:
    """Moves the kept rows of [B, K, P] to the front of [B, nmax], in order; the rest is padding."""
    batch, places, per_source = keep.shape
    keep = keep.flatten(1)
    rank = keep.cumsum(1) - 1  # row of each kept box
    total = keep.sum(1, dtype=torch.int32)
    target = torch.where(keep & (rank < nmax), rank, nmax)  # whatever is not kept goes to row nmax, which is cut off
    origin = torch.full((batch, nmax + 1), places * per_source, device=keep.device)  # past the end: the padding row
    origin = origin.scatter(1, target, torch.arange(places * per_source, device=keep.device).expand_as(target))[:, :nmax]

    def rows(field: Tensor, padding: float) -> Tensor:
        flat = field.flatten(1, 2)
        flat = torch.cat([flat, flat.new_full((batch, 1, *flat.shape[2:]), padding)], 1)
        return flat.gather(1, origin.view(*origin.shape, *[1] * (flat.dim() - 2)).expand(-1, -1, *flat.shape[2:]))

    shape = (batch, places, per_source)
    placement = torch.arange(places, dtype=torch.int32, device=keep.device)[:, None].expand(shape)
    index = torch.arange(per_source, dtype=torch.int32, device=keep.device).expand(shape)
    count = total.clamp(max=nmax)
    columns = (rows(boxes, 0), rows(labels, PAD_LABEL), rows(scores, 0), rows(weights, 0), rows(placement, 0), rows(index, 0))
    return (*columns, count, total - count)


def _empty(boxes: Tensor, labels: Tensor, batch: int, nmax: int) -> Outputs:
    """The result where there are no boxes at all."""
    rows, ints = boxes.new_zeros(batch, nmax), _int_zeros(boxes, batch, nmax)
    none = _int_zeros(boxes, batch)
    return (
        boxes.new_zeros(batch, nmax, 4),
        labels.new_full((batch, nmax), PAD_LABEL),
        rows,
        rows.clone(),
        ints,
        ints.clone(),
        none,
        none.clone(),
    )


def _int_zeros(boxes: Tensor, *shape: int) -> Tensor:
    """int32 zeros beside `boxes`."""
    return boxes.new_zeros(shape, dtype=torch.int32)


def _fake(boxes: Tensor, labels: Tensor, scores: Tensor, weights: Tensor, count: Tensor, place_i: Tensor, *rest: Any) -> Outputs:
    return _empty(boxes, labels, place_i.shape[0], rest[2])


register(
    "compose_boxes(Tensor boxes, Tensor labels, Tensor scores, Tensor weights, Tensor count, Tensor place_i, Tensor place_f, Tensor erase, "
    "SymInt nmax, float erase_thr, bool union, float min_visibility, float? min_wh, bool propagate_weight, bool over) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    triton=launcher("compose_boxes", "compose_boxes"),
)
