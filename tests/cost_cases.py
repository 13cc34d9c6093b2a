"""Random predictions and targets, worked examples, and the float64 oracle that the tests of the matching cost share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from box_cases import FORMATS
from torch import Tensor

from ssod_fast.ops import box_iou

CLASS_MODES = ("focal", "focal_logits", "softmax", "prob", "none")
EPS_OF = {"zero": None, "none": None, "max": 1e-6, "add": 1e-7}
Targets = list[dict[str, Tensor]]

# Probabilities and cxcywh boxes of three queries, two targets, and their costs [Q, T] with the weights 2, 5, 2.
PROBABILITIES = torch.tensor([(0.5, 0.5), (0.9, 0.1), (0.1, 0.9)], dtype=torch.float64)
QUERIES = torch.tensor([(0.3, 0.3, 0.4, 0.4), (0.35, 0.3, 0.4, 0.4), (0.7, 0.7, 0.2, 0.2)], dtype=torch.float64)
TARGETS = torch.tensor([(0.3, 0.3, 0.4, 0.4), (0.7, 0.7, 0.2, 0.2)], dtype=torch.float64)
FOCAL_COSTS = [[-2.173287, 7.010387], [-4.102670, 7.801846], [8.114640, -4.797114]]
SOFTMAX_COSTS = [[-2.5, 6.683673], [-2.205556, 6.770879], [7.083673, -2.9]]  # weights 1, 5, 2
L1_TERMS = [[0, 6], [0.25, 5.75], [6, 0]]
GIOU_TERMS = [[-2, 1.183674], [-1.555556, 1.120879], [1.183674, -2]]


def to_format(boxes: Tensor, fmt: str) -> Tensor:
    """cxcywh boxes in another format."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    if fmt == "cxcywh":
        return boxes
    corner = centre - size / 2
    return torch.cat([corner, size if fmt == "xywh" else corner + size], -1)


def worked_example(fmt: str = "cxcywh", dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Targets]:
    """Logits [1, 3, 2], boxes [1, 3, 4] and targets of the example above."""
    logits = (PROBABILITIES / (1 - PROBABILITIES)).log()
    targets = [{"labels": torch.tensor([0, 1], device=device), "boxes": to_format(TARGETS, fmt).to(device, dtype)}]
    return logits[None].to(device, dtype), to_format(QUERIES, fmt)[None].to(device, dtype), targets


def random_case(
    sizes: Sequence[int] = (5, 0, 9, 1),
    queries: int = 37,
    layers: int | None = 2,
    classes: int = 6,
    seed: int = 0,
    fmt: str = "cxcywh",
    dtype: torch.dtype = torch.float32,
    spread: float = 3.0,
) -> tuple[Tensor, Tensor, Targets]:
    """Logits [L, B, Q, C], boxes [L, B, Q, 4] near the targets, and targets of the given sizes; without L for layers None."""
    rng = torch.Generator().manual_seed(seed)
    lead = (len(sizes), queries) if layers is None else (layers, len(sizes), queries)
    logits = torch.randn(*lead, classes, generator=rng, dtype=torch.float64) * spread
    boxes = torch.rand(*lead, 4, generator=rng, dtype=torch.float64) * 0.4 + 0.1
    targets = [
        {
            "labels": torch.randint(0, max(classes, 1), (n,), generator=rng),
            "boxes": to_format(torch.rand(n, 4, generator=rng, dtype=torch.float64) * 0.4 + 0.1, fmt).to(dtype),
        }
        for n in sizes
    ]
    return logits.clamp(-12, 12).to(dtype), to_format(boxes, fmt).to(dtype), targets


def class_oracle(x: Tensor, labels: Tensor, mode: str, alpha: float, gamma: float, eps: float, p: Tensor | None = None) -> Tensor:
    """Class terms [T, Q] in float64 of logits x [Q, C]; `p` are the probabilities where they are rounded already."""
    if mode == "none":
        return x.new_zeros(len(labels), len(x))
    if mode in ("softmax", "prob"):
        return -(x.softmax(-1) if mode == "softmax" else x)[:, labels].T
    p = x.sigmoid() if p is None else p
    if mode == "focal":
        minus_log_p, minus_log_q = -(p + eps).log(), -(1 - p + eps).log()
    else:
        minus_log_p, minus_log_q = -torch.nn.functional.logsigmoid(x), -torch.nn.functional.logsigmoid(-x)
    terms = alpha * (1 - p) ** gamma * minus_log_p - (1 - alpha) * p**gamma * minus_log_q
    return terms[:, labels].T


def oracle(
    x: Tensor,
    boxes: Tensor,
    target: dict[str, Tensor],
    p: Tensor | None = None,
    hw: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Cost [T, Q] in float64 of one image and layer, composed of the public parts."""
    o: dict[str, Any] = {
        "class_mode": "focal",
        "alpha": 0.25,
        "gamma": 2.0,
        "eps": 1e-8,
        "w_class": 2.0,
        "w_box": 5.0,
        "w_giou": 2.0,
    } | options
    fmt, eps_mode = o.get("box_format", "cxcywh"), o.get("giou_eps_mode", "zero")
    theirs, ours = target["boxes"].double(), boxes.double()
    giou = box_iou(theirs, ours, mode="giou", fmt=fmt, eps_mode=eps_mode, eps=EPS_OF[eps_mode])
    scale = torch.ones(4) if hw is None else hw.double().flip(-1).repeat(2)
    l1 = (theirs[:, None] / scale - ours[None] / scale).abs().sum(-1)
    cls = class_oracle(x.double(), target["labels"], o["class_mode"], o["alpha"], o["gamma"], o["eps"], p)
    cost: Tensor = o["w_box"] * l1 + o["w_class"] * cls - o["w_giou"] * giou
    return cost


def rounded_probabilities(x: Tensor) -> list[Tensor]:
    """sigmoid(x) rounded to float32 and its two neighbours, in float64: what a correct float32 implementation may use."""
    exact = x.double().sigmoid().float()
    infinity = torch.tensor(torch.inf)
    return [p.double().clamp(max=1) for p in (exact, torch.nextafter(exact, infinity), torch.nextafter(exact, -infinity))]


def option_grid() -> list[dict[str, Any]]:
    """Every class mode with every format, and the eps modes and exponents one by one."""
    grid: list[dict[str, Any]] = [{"class_mode": m, "box_format": f} for m, f in itertools.product(CLASS_MODES, FORMATS)]
    grid += [{"giou_eps_mode": e} for e in EPS_OF]
    grid += [{"class_mode": m, "gamma": g, "alpha": 0.4} for m in ("focal", "focal_logits") for g in (0.0, 1.5, 3.0)]
    return [*grid, {"eps": 1e-12}, {"w_class": 1.0, "w_box": 0.0, "w_giou": 0.0}]
