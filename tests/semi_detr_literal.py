"""The parts of Semi-DETR one image, one layer and one box at a time, as its released code defines them: slow, and easy to check."""

from __future__ import annotations

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, box_iou, generalized_box_iou, nms, roi_align

from ssod_fast.detectors.deformable_detr.denoising import Denoising
from ssod_fast.methods.semi_detr import SemiDETRConfig

Boxes = tuple[Tensor, Tensor]  # [N, 4] xyxy in pixels, [N] labels


def pixels(boxes: Tensor, hw: tuple[int, int]) -> Tensor:
    """Normalised cxcywh as xyxy in pixels of an image of the given size."""
    h, w = hw
    corners: Tensor = box_convert(boxes, "cxcywh", "xyxy")
    return corners * boxes.new_tensor([w, h, w, h])


def shares(boxes: Tensor, hw: tuple[int, int]) -> Tensor:
    """xyxy in pixels as normalised cxcywh."""
    h, w = hw
    centred: Tensor = box_convert(boxes, "xyxy", "cxcywh")
    return centred / boxes.new_tensor([w, h, w, h])


# Pseudo boxes


def detect(logits: Tensor, boxes: Tensor, hw: tuple[int, int], config: SemiDETRConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, labels and scores of one image: suppressed class by class, best first."""
    scores, where = logits.sigmoid(), pixels(boxes, hw)
    where = torch.stack([where[:, i].clamp(0, hw[1 - i % 2]) for i in range(4)], dim=1)
    found = []
    for label in range(scores.shape[1]):
        rows = [q for q in range(len(scores)) if scores[q, label] > config.teacher_score_thr]
        kept = nms(where[rows].reshape(-1, 4), scores[rows, label], config.teacher_nms_thr) if rows else []
        found += [(float(scores[rows[k], label]), rows[k], label) for k in kept]
    found = sorted(found, key=lambda f: -f[0])[: config.teacher_topk]
    index = torch.tensor([q for _, q, _ in found], dtype=torch.int64)
    return where[index], torch.tensor([c for *_, c in found], dtype=torch.int64), where.new_tensor([s for s, *_ in found])


def confident(boxes: Tensor, scores: Tensor) -> Tensor:
    """Rows at or above mean plus deviation of the scores, with an area."""
    threshold = scores.mean() + scores.std() if len(scores) > 1 else math.nan
    return (scores >= threshold) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def project(boxes: Tensor, matrix: Tensor, hw: tuple[int, int]) -> Tensor:
    """Hulls of the moved corners, clipped to the image."""
    moved = []
    for x1, y1, x2, y2 in boxes.double().tolist():
        corners = [matrix.double() @ torch.tensor([x, y, 1.0], dtype=torch.float64) for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2))]
        xs = [min(max(float(c[0] / c[2]), 0), hw[1]) for c in corners]
        ys = [min(max(float(c[1] / c[2]), 0), hw[0]) for c in corners]
        moved.append([min(xs), min(ys), max(xs), max(ys)])
    return boxes.new_tensor(moved).reshape(-1, 4)


def matching_cost(logits: Tensor, boxes: Tensor, targets: Boxes, hw: tuple[int, int]) -> Tensor:
    """[Q, G] cost of one-to-one matching."""
    p = logits.sigmoid()[:, targets[1]]
    focal = -0.25 * (1 - p) ** 2 * (p + 1e-12).log() + 0.75 * p**2 * (1 - p + 1e-12).log()
    distance = (boxes[:, None] - shares(targets[0].to(boxes.dtype), hw)).abs().sum(-1)
    overlap: Tensor = generalized_box_iou(pixels(boxes, hw), targets[0].to(boxes.dtype))
    return 2 * focal + 5 * distance - 2 * overlap


def assignment(logits: Tensor, boxes: Tensor, targets: Boxes, hw: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, targets and costs of the best one-to-one matching of an image."""
    cost = matching_cost(logits.detach(), boxes.detach(), targets, hw)
    rows, columns = (torch.from_numpy(i) for i in linear_sum_assignment(cost.cpu().numpy()))
    return rows, columns, cost[rows, columns]


def cost_threshold(costs: Tensor) -> float:
    """The cost of highest density among those of the good component of two normal distributions, fitted by expectation-maximisation."""
    if len(costs) < 2:
        return float(costs[0]) if len(costs) else 0.0
    x = costs.double()
    mean, variance, weight = torch.stack([x.min(), x.max()]), torch.ones(2).double(), torch.full((2,), 0.5).double()
    last = -math.inf
    for _ in range(100):
        joint = _log_joint(x, mean, variance, weight)
        bound = float(torch.logsumexp(joint, 1).mean())
        share = joint.softmax(1)
        total = share.sum(0) + 10 * torch.finfo(x.dtype).eps
        mean = (share * x[:, None]).sum(0) / total
        variance = (share * (x[:, None] - mean) ** 2).sum(0) / total + 1e-5
        weight = total / total.sum()
        if abs(bound - last) < 1e-3:
            break
        last = bound
    joint = _log_joint(x, mean, variance, weight)
    label, density = joint.argmax(1), torch.logsumexp(joint, 1)
    good = label == (0 if bool((label == 0).any()) else 1)
    return float(costs[good][density[good].argmax()])


def _log_joint(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor) -> Tensor:
    return weight.log() - 0.5 * ((x[:, None] - mean) ** 2 / variance + variance.log() + math.log(2 * math.pi))


# Losses


def one_to_many(scores: Tensor, boxes: Tensor, targets: Boxes, config: SemiDETRConfig) -> tuple[Tensor, Tensor]:
    """Target of each query (-1: none) and its weight. `scores` [Q, C] are probabilities, `boxes` [Q, 4] xyxy in pixels.

    In single precision, in which a metric of distant boxes is 0.
    """
    iou = box_iou(boxes.float(), targets[0].float())  # [Q, G]
    metric = scores.float()[:, targets[1]] ** config.o2m_alpha * iou**config.o2m_beta
    owner, weight = torch.full((len(boxes),), -1), scores.new_zeros(len(boxes))
    wanted: dict[int, list[int]] = {}
    for g in range(metric.shape[1]):
        for q in metric[:, g].argsort(descending=True, stable=True)[: config.o2m_topk].tolist():
            if metric[q, g] > 0:
                wanted.setdefault(q, []).append(g)
    for q, claims in wanted.items():
        owner[q] = max(claims, key=lambda g: float(iou[q, g]))
    for g in range(metric.shape[1]):
        mine = [q for q in range(len(boxes)) if owner[q] == g]
        for q in mine:
            weight[q] = metric[q, g] / (metric[mine, g].max() + 1e-7) * iou[mine, g].max()
    return owner, weight


def hybrid(
    logits: Tensor, boxes: Tensor, targets: list[Boxes], sizes: list[tuple[int, int]], stage: int, config: SemiDETRConfig
) -> dict[str, Tensor]:
    """Detection losses of all layers ([L, B, Q, C] and [L, B, Q, 4]), matched as the stage says."""
    totals = {name: logits.sum() * 0 for name in ("cls", "l1", "giou")}
    for layer in range(len(logits)):
        parts = [
            (_soft if stage == 1 else _hard)(logits[layer, b], boxes[layer, b], targets[b], sizes[b], config) for b in range(len(targets))
        ]
        norm = max(sum(float(part["norm"]) for part in parts), 1.0)
        for name in totals:
            totals[name] = totals[name] + torch.stack([part[name] for part in parts]).sum() / norm
    return {"loss_cls": config.cls_weight * totals["cls"], "loss_l1": totals["l1"], "loss_giou": config.giou_weight * totals["giou"]}


def denoising_losses(
    logits: Tensor, boxes: Tensor, denoising: Denoising, targets: list[Boxes], sizes: list[tuple[int, int]], config: SemiDETRConfig
) -> dict[str, Tensor]:
    """Losses of denoising queries: in each group, the first ones shall find the targets, the others nothing."""
    totals = {name: logits.sum() * 0 for name in ("cls", "l1", "giou")}
    norm = max(denoising.groups * sum(len(labels) for _, labels in targets), 1)
    for layer in range(len(logits)):
        for b, (gt, labels) in enumerate(targets):
            if not len(gt):
                continue  # its queries are made up
            for start in range(0, denoising.groups * denoising.size, denoising.size):
                group = slice(start, start + denoising.size)
                x, found = logits[layer, b, group], boxes[layer, b, group][: len(gt)]
                wanted = torch.zeros_like(x)
                wanted[range(len(gt)), labels] = 1
                terms = _box_terms(found, (gt, labels), torch.arange(len(gt)), x.new_ones(len(gt)), sizes[b], config)
                for name, term in {"cls": focal_loss(x, wanted), **terms}.items():
                    totals[name] = totals[name] + term / norm
    return {
        "dn_loss_cls": config.cls_weight * totals["cls"],
        "dn_loss_l1": totals["l1"],
        "dn_loss_giou": config.giou_weight * totals["giou"],
    }


def _soft(logits: Tensor, boxes: Tensor, targets: Boxes, hw: tuple[int, int], config: SemiDETRConfig) -> dict[str, Tensor]:
    owner, weight = one_to_many(logits.detach().sigmoid(), pixels(boxes.detach(), hw), targets, config)
    wanted = torch.zeros_like(logits)
    rows = [q for q in range(len(owner)) if owner[q] >= 0]
    for q in rows:
        wanted[q, targets[1][owner[q]]] = weight[q]
    cross = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    focal = (wanted - logits.sigmoid()).abs() ** 2 * cross
    return {"cls": focal.sum(), "norm": weight.sum(), **_box_terms(boxes[rows], targets, owner[rows], weight[rows], hw, config)}


def _hard(logits: Tensor, boxes: Tensor, targets: Boxes, hw: tuple[int, int], config: SemiDETRConfig) -> dict[str, Tensor]:
    rows, columns, _ = assignment(logits, boxes, targets, hw)
    wanted = torch.zeros_like(logits)
    wanted[rows, targets[1][columns]] = 1
    weight = logits.new_ones(len(rows))
    return {"cls": focal_loss(logits, wanted), "norm": weight.sum(), **_box_terms(boxes[rows], targets, columns, weight, hw, config)}


def focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Sum of the sigmoid focal loss."""
    p = logits.sigmoid()
    factor = torch.where(wanted > 0, 0.25 * (1 - p) ** 2, 0.75 * p**2)
    return (factor * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")).sum()


def _box_terms(
    boxes: Tensor, targets: Boxes, owner: Tensor, weight: Tensor, hw: tuple[int, int], config: SemiDETRConfig
) -> dict[str, Tensor]:
    """L1 as the three terms that the official code adds up: all coordinates, centres, sides."""
    gt = targets[0].to(boxes.dtype)[owner].reshape(-1, 4)
    distance = (boxes - shares(gt, hw)).abs() * weight[:, None] * config.l1_weight / 2
    overlap = generalized_box_iou(pixels(boxes, hw), gt).diagonal()
    return {"l1": distance.sum() + distance[:, :2].sum() + distance[:, 2:].sum(), "giou": ((1 - overlap) * weight).sum()}


# Consistency


def roi_features(maps: list[Tensor], boxes: list[Tensor]) -> Tensor:
    """[N, D, 7, 7] of boxes in pixels, image after image; the level follows from the size of a box."""
    found = []
    for image, rows in enumerate(boxes):
        for box in rows:
            side = math.sqrt(float(box[2] - box[0]) * float(box[3] - box[1]))
            level = min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), len(maps) - 1)
            found.append(roi_align(maps[level][image : image + 1], [box[None].to(maps[0].dtype)], 7, 1 / (8 << level), -1, aligned=True))
    return torch.cat(found)


def consistency(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Mean square error of unit vectors [N, D] with the broadcast [N, N, D] of the official code; `weights` [N]."""
    error = (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1).detach()) ** 2  # [N, D]
    return (error * weights[:, None, None]).mean()
