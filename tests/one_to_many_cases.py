"""Cases of one-to-many assignment, and the rules spelt out target by target in float64: slow, plain, and without a line of the package."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits, one_hot
from torchvision.ops import box_iou, complete_box_iou

Target = dict[str, Tensor]

# Five predictions and two targets, small enough to check by hand.
BOXES = torch.tensor([[10.0, 10, 50, 50], [12, 10, 52, 50], [21, 10, 61, 50], [30, 10, 70, 50], [80, 80, 90, 90]])[None]
PROBABILITIES = torch.tensor([[0.9, 0.1], [0.5, 0.2], [0.9, 0.1], [0.1, 0.8], [0.3, 0.3]])[None]
TARGETS = [{"boxes": torch.tensor([[10.0, 10, 50, 50], [30, 10, 70, 50]]), "labels": torch.tensor([0, 1])}]
CENTRAL = torch.tensor([[40.0, 30, 16, 16]]).repeat(5, 1)  # in the box and the central region of both targets

# Options that between them take every branch of every rule. "priors" and "levels" are flags here, see `arguments`.
RULE_CASES: dict[str, dict[str, Any]] = {
    "tal": {"rule": "tal"},
    "tal-logits": {"rule": "tal", "from_logits": True},
    "tal-priors": {"rule": "tal", "priors": True},
    "tal-multiple-pos": {"rule": "tal", "dynamic_k": True},
    "tal-other-exponents": {"rule": "tal", "alpha": 0.5, "beta": 2.5},
    "tal-metric-keep-one": {"rule": "tal", "conflict": "metric", "keep_one": True, "topk": 2},
    "tal-any-metric-trimmed": {"rule": "tal", "conflict": "any_metric", "topk": 30, "final_topk": 2},
    "tal_any": {"rule": "tal_any", "priors": True},
    "tal_any-trimmed-keep-one": {"rule": "tal_any", "priors": True, "final_topk": 1, "keep_one": True},
    "tal_any-dynamic": {"rule": "tal_any", "priors": True, "dynamic_k": True, "beta": 1.0, "min_side": 40.0},
    "simota": {"rule": "simota", "priors": True},
    "simota-logits": {"rule": "simota", "priors": True, "from_logits": True},
    "simota-fixed-k": {"rule": "simota", "priors": True, "dynamic_k": False, "topk": 40},
    "simota-by-iou-keep-one": {"rule": "simota", "priors": True, "conflict": "iou", "keep_one": True, "final_topk": 3},
    "soft_label": {"rule": "soft_label", "priors": True, "from_logits": True},
    "soft_label-keep-one": {"rule": "soft_label", "priors": True, "from_logits": True, "keep_one": True, "conflict": "any_iou"},
    "atss": {"rule": "atss"},
    "atss-levels": {"rule": "atss", "levels": True, "topk": 5},
    "atss-priors-keep-one": {"rule": "atss", "priors": True, "levels": True, "keep_one": True, "conflict": "any_metric"},
}


def random_case(
    sizes: tuple[int, ...], queries: int, *, layers: int = 2, classes: int = 6, seed: int = 0, side: float = 200.0
) -> tuple[Tensor, Tensor, list[Target], Tensor]:
    """Logits [L, B, Q, C], boxes [L, B, Q, 4], targets and priors [Q, 4]. Half of the boxes are noisy copies of targets."""
    generator = torch.Generator().manual_seed(seed)

    def boxes(*shape: int) -> Tensor:
        center = torch.rand(*shape, 2, generator=generator) * side
        half = torch.rand(*shape, 2, generator=generator) * side / 5 + 1
        return torch.cat([center - half, center + half], -1)

    targets = [{"boxes": boxes(n), "labels": torch.randint(0, classes, (n,), generator=generator)} for n in sizes]
    logits, predictions = torch.randn(layers, len(sizes), queries, classes, generator=generator) * 2 - 2, boxes(layers, len(sizes), queries)
    near = queries // 2
    for image, target in enumerate(targets):
        if sizes[image]:
            of = torch.randint(0, sizes[image], (layers, near), generator=generator)
            predictions[:, image, :near] = target["boxes"][of] + torch.randn(layers, near, 4, generator=generator) * 4
    stride = torch.tensor([4.0, 8.0, 16.0])[torch.randint(0, 3, (queries,), generator=generator)]
    points = torch.rand(queries, 2, generator=generator) * side
    return logits, predictions, targets, torch.cat([points, stride[:, None], stride[:, None]], 1)


def levels_of(queries: int) -> list[int]:
    """Three levels, one of them small."""
    return [queries - queries // 3 - queries // 10, queries // 3, queries // 10]


def arguments(case: tuple[Tensor, Tensor, list[Target], Tensor], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the public function for an entry of RULE_CASES."""
    logits, boxes, targets, priors = case
    options = dict(options)
    if options.pop("priors", False):
        options["priors"] = priors
    if options.pop("levels", False):
        options["levels"] = levels_of(boxes.shape[-2])
    scores = None if options["rule"] == "atss" else logits if options.get("from_logits") else logits.sigmoid()
    return (scores, boxes, targets), options


def _pairs(rule: str, s: Tensor, boxes: Tensor, t: Target, priors: Tensor | None, o: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Overlap, value (the larger the better) and possibility of every query and target of an image: [Q, G]."""
    gts, labels = t["boxes"].double(), t["labels"]
    u = (complete_box_iou if rule == "tal_any" else box_iou)(boxes, gts).clamp(min=0)
    if rule == "atss":
        return u, u, u > 0
    if rule in ("tal", "tal_any"):
        p = s.sigmoid() if o.get("from_logits") else s
        alpha, beta = o.get("alpha", 0.5 if rule == "tal_any" else 1.0), o.get("beta", 6.0)
        possible = u > 0
        if rule == "tal_any":
            assert priors is not None
            possible &= _inside(priors[:, :2], _enlarged(gts, o.get("min_side", 16.0)), 1e-9)
        return u, p[:, labels] ** alpha * u**beta, possible
    assert priors is not None
    hot = one_hot(labels, s.shape[1]).double()
    wide, center = s[:, None].expand(-1, len(labels), -1), (gts[:, :2] + gts[:, 2:]) / 2
    inside = _inside(priors[:, :2], gts, 0.0)
    if rule == "simota":
        p = wide.sigmoid() if o.get("from_logits") else wide
        classes = binary_cross_entropy(p, hot.expand_as(p), reduction="none").sum(-1)
        reach = 2.5 * priors[:, None, 2:]
        central = ((priors[:, None, :2] - center).abs() < reach).all(-1)
        cost = classes - 3 * (u + 1e-7).log() + 1e5 * (~(inside & central))
        return u, -cost, (inside | central).any(1, keepdim=True).expand_as(cost)
    soft = hot * u[..., None]
    classes = (binary_cross_entropy_with_logits(wide, soft, reduction="none") * (soft - wide.sigmoid()).abs() ** 2).sum(-1)
    distance = (priors[:, None, :2] - center).norm(dim=-1) / priors[:, 2:3]
    return u, -(classes - 3 * (u + 1e-7).log() + 10 ** (distance - 3)), inside.any(1, keepdim=True).expand_as(u)


def _inside(points: Tensor, boxes: Tensor, margin: float) -> Tensor:
    return torch.cat([points[:, None] - boxes[:, :2], boxes[:, 2:] - points[:, None]], -1).amin(-1) > margin


def _enlarged(boxes: Tensor, least: float) -> Tensor:
    center, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    size = size.clamp(min=least)
    return torch.cat([center - size / 2, center + size / 2], -1)


def _best(values: Tensor, k: int) -> list[int]:
    """The k largest of [Q] above -inf, the lowest index first among equals."""
    order = sorted(range(len(values)), key=lambda q: (-values[q].item(), q))
    return [q for q in order[:k] if values[q] > -math.inf]


def _wanted(
    rule: str, g: int, u: Tensor, value: Tensor, possible: Tensor, boxes: Tensor, t: Target, priors: Tensor | None, o: dict[str, Any]
) -> list[int]:
    """Queries that target g wants."""
    gt = t["boxes"][g : g + 1].double()
    points = (boxes[:, :2] + boxes[:, 2:]) / 2 if priors is None else priors[:, :2]
    if rule == "atss":
        distance = (points - (gt[:, :2] + gt[:, 2:]) / 2).norm(dim=-1)
        chosen, begin = [], 0
        for size in o.get("levels", [len(boxes)]):
            chosen += [begin + q for q in _best(-distance[begin : begin + size], o.get("topk", 9))]
            begin += size
        near = u[chosen, g]
        standing_out = near.mean() + near.std()
        return [q for q in chosen if u[q, g] >= standing_out and _inside(points[q : q + 1], gt, 0.01)]
    topk = o.get("topk", 10 if rule in ("tal_any", "simota") else 13)
    k, costs = topk, rule in ("simota", "soft_label")
    if o.get("dynamic_k", costs):
        counted = u[:, g].where(possible[:, g], 0)
        k = max(1, int(counted.topk(min(topk, len(counted))).values.sum()))
    limit = -math.inf if costs else 0.0
    chosen = _best(value[:, g].where(possible[:, g] & (value[:, g] > limit), -math.inf), k)
    if rule == "tal" and priors is not None:
        chosen = [q for q in chosen if _inside(priors[q : q + 1, :2], gt, 0.01)]
    return chosen


def literal_assign(scores: Tensor | None, boxes: Tensor, t: Target, **o: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Target (within the image), metric, overlap and weight [Q] of one image on one layer."""
    rule, targets, queries = o["rule"], len(t["labels"]), len(boxes)
    target = torch.full((queries,), -1)
    metric, iou, weight = (torch.zeros(queries, dtype=torch.float64) for _ in range(3))
    if targets == 0:
        return target, metric, iou, weight
    boxes = boxes.double()
    priors = o["priors"].double() if o.get("priors") is not None else None
    s = boxes if scores is None else scores.double()
    u, value, possible = _pairs(rule, s, boxes, t, priors, o)
    costs = rule in ("simota", "soft_label")
    claims: dict[int, list[int]] = {}
    for g in range(targets):
        for q in _wanted(rule, g, u, value, possible, boxes, t, priors, o):
            claims.setdefault(q, []).append(g)
    conflict = o.get("conflict") or ("any_iou" if rule == "tal_any" else "any_metric" if costs else "iou")
    contest = value if conflict.endswith("metric") else u
    for q, wanting in claims.items():
        if conflict.startswith("any") and len(wanting) > 1:
            wanting = [g for g in range(targets) if possible[q, g] or g in wanting]
        target[q] = max(wanting, key=lambda g: (contest[q, g].item(), -g))
    for g in range(targets):
        own = (target == g).nonzero()[:, 0].tolist()
        if o.get("final_topk"):
            for q in sorted(own, key=lambda q: -value[q, g].item())[o["final_topk"] :]:
                target[q] = -1
    for g in range(targets):
        if o.get("keep_one") and not (target == g).any():
            for q in _best(value[:, g].where(possible[:, g] & (target < 0), -math.inf), 1):
                target[q] = g
    for g in range(targets):
        mine = target == g
        if mine.any():
            iou[mine], metric[mine] = u[mine, g], -value[mine, g] if costs else value[mine, g]
            aligned = metric[mine] / (metric[mine].max() + (1e-9 if rule == "tal_any" else 1e-7)) * iou[mine].max()
            weight[mine] = aligned if rule in ("tal", "tal_any") else iou[mine]
    return target, metric, iou, weight
