"""SSD-Det written out box by box with loops, to compare the batched refiner with."""

from __future__ import annotations

import math

import torch
from ssd_det_cases import SIZES, STRIDES
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, roi_align

from ssod_fast.methods.ssd_det import Refiner
from ssod_fast.structures import Target

STD = torch.tensor([0.1, 0.1, 0.2, 0.2], dtype=torch.float64)


def bag(box: Tensor, hw: tuple[int, int], ratios: tuple[float, ...], shakes: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Proposals [P, 4] around one box and whether they count."""
    x1, y1, x2, y2 = box.tolist()
    cx, cy, w, h = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
    rows, valid = [], []
    for rw in ratios:
        for rh in ratios:
            shifts = [(0.0, 0.0), *((dx * o, dy * o) for o in shakes for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)))]
            for ox, oy in shifts:
                mx, my, mw, mh = cx + ox * w * rw, cy + oy * h * rh, w * rw, h * rh
                row = [mx - mw / 2, my - mh / 2, mx + mw / 2, my + mh / 2]
                inside = max(min(row[2], hw[1]) - max(row[0], 0), 0) * max(min(row[3], hw[0]) - max(row[1], 0), 0)
                rows.append(row)
                valid.append(inside / max(mw * mh, 1e-6) > 0.7)
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(valid)


def encode(p: Tensor, g: Tensor) -> Tensor:
    pw, ph, gw, gh = p[:, 2] - p[:, 0], p[:, 3] - p[:, 1], g[2] - g[0], g[3] - g[1]
    dx = ((g[0] + g[2]) / 2 - (p[:, 0] + p[:, 2]) / 2) / pw
    dy = ((g[1] + g[3]) / 2 - (p[:, 1] + p[:, 3]) / 2) / ph
    return torch.stack([dx, dy, (gw / pw).log(), (gh / ph).log()], 1) / STD


def decode(p: Tensor, d: Tensor) -> Tensor:
    limit = abs(math.log(16 / 1000))
    d = d.detach() * STD
    pw, ph = p[:, 2] - p[:, 0], p[:, 3] - p[:, 1]
    cx, cy = (p[:, 0] + p[:, 2]) / 2 + d[:, 0] * pw, (p[:, 1] + p[:, 3]) / 2 + d[:, 1] * ph
    w, h = pw * d[:, 2].clamp(-limit, limit).exp(), ph * d[:, 3].clamp(-limit, limit).exp()
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1)


def features(maps: list[Tensor], image: int, boxes: Tensor) -> Tensor:
    """Pooled features [n, D * 49], box by box."""
    rows = []
    for box in boxes:
        side = ((box[2] - box[0]) * (box[3] - box[1])).clamp(min=0).sqrt().item()
        level = min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), 3)
        one = maps[level][image : image + 1]
        roi = torch.cat([torch.zeros(1, dtype=one.dtype), box])[None]
        rows.append(roi_align(one, roi, 7, 1 / STRIDES[level], sampling_ratio=0, aligned=True).flatten())
    return torch.stack(rows)


def layers(modules: torch.nn.ModuleList, x: Tensor) -> Tensor:
    for module in modules:
        x = F.relu(module(x))
    return x


def instance(ins: Tensor, valid: Tensor) -> Tensor:
    return F.normalize(ins.softmax(0) * valid[:, None], p=1, dim=0)


def focal(p: Tensor, q: Tensor) -> Tensor:
    return -((p - q) ** 2) * (q * (p + 1e-6).log() + (1 - q) * (1 - p + 1e-6).log())


def merge(boxes: Tensor, s: Tensor, k: int) -> Tensor:
    best, index = s.topk(min(k, len(s)))
    return (boxes[index] * (best / best.sum() + 1e-8)[:, None]).sum(0)


def clip(box: Tensor, hw: tuple[int, int]) -> Tensor:
    return torch.stack([box[0].clamp(0, hw[1]), box[1].clamp(0, hw[0]), box[2].clamp(0, hw[1]), box[3].clamp(0, hw[0])])


def refine(refiner: Refiner, maps: list[Tensor], targets: list[Target], uniforms: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Refined boxes and weighted losses, for boxes whose bags have a valid proposal each."""
    c = refiner.config
    total = {name: torch.zeros((), dtype=torch.float64) for name in ("spsd1", "mil1", "spsd2", "mil2", "sisd", "negative")}
    count = sum(len(t["labels"]) for t in targets)
    boxes_out, weights, negatives = [], [], torch.zeros((), dtype=torch.float64)
    for image, (target, hw) in enumerate(zip(targets, SIZES, strict=True)):
        bags2 = []
        for box, label in zip(target["boxes"], target["labels"].tolist(), strict=True):
            b0, valid = bag(box, hw, c.ratios, c.shakes)
            d0 = refiner.fc_distill_reg_ori(layers(refiner.shared_fcs, features(maps, image, b0)))
            total["spsd1"] += 0.25 * (d0 - encode(b0, box)).abs().sum() / (count * len(b0))
            b1 = decode(b0, d0)
            f1 = layers(refiner.shared_fcs, features(maps, image, b1))
            s1 = refiner.fc_cls[0](f1).softmax(1) * instance(refiner.fc_ins[0](f1), valid)
            onehot = F.one_hot(torch.tensor(label), s1.shape[1]).double()
            total["mil1"] += 0.25 * F.binary_cross_entropy(s1.sum(0).clamp(0, 1), onehot, reduction="sum") / count
            sure = s1[:, label].sum().detach()
            first = clip(merge(b1, s1[:, label].detach(), c.topk), hw)
            if c.stage2_bag == "regress":
                assert refiner.fc_reg is not None
                d1, b, valid2 = refiner.fc_reg[0](f1), b1, torch.ones_like(valid)
                scale = sure if c.spsd2_weighted else 1.0
            else:
                assert refiner.fc_distill_reg_re is not None
                b, valid2 = bag(first, hw, c.ratios, c.shakes)
                d1, scale = refiner.fc_distill_reg_re(layers(refiner.shared_fcs, features(maps, image, b))), 1.0
            total["spsd2"] += 0.25 * scale * (d1 - encode(b, first)).abs().sum() / (count * len(b))
            b2 = decode(b, d1)
            pooled = features(maps, image, b2)
            f2 = layers(refiner.shared_fcs, pooled)
            p, ins = refiner.fc_cls[1](f2).sigmoid(), instance(refiner.fc_ins[1](f2), valid2)
            total["mil2"] += 0.25 * sure * focal((p * ins).sum(0), onehot[:-1]).sum() / count
            s = (p * ins)[:, label]
            if c.sisd:
                assert refiner.objness_2fcs is not None
                assert refiner.fc_iou is not None
                apart = layers(refiner.objness_2fcs, pooled)
                u = refiner.fc_iou(apart + apart.mean(0))[:, 0]
                wanted = (box_iou(b2, first[None])[:, 0] - 0.5) / 0.5
                total["sisd"] += c.sisd_weight * F.smooth_l1_loss(u, wanted, reduction="sum") / (count * len(b2))
                t = 0.5 * u + 0.5
                t = (t - t[valid2].min()) / (t[valid2].max() - t[valid2].min())
                s = (p[:, label] if c.sisd_score == "cls" else s) * t * valid2
            boxes_out.append(clip(merge(b2, s.detach(), c.topk), hw))
            weights.append(sure)
            bags2.append(b2)
        for u in uniforms[image]:
            x1, y1 = -0.2 * hw[1] + 1.2 * hw[1] * u[0], -0.2 * hw[0] + 1.2 * hw[0] * u[1]
            negative = torch.stack([x1, y1, x1 + (1.2 * hw[1] - x1) * u[2], y1 + (1.2 * hw[0] - y1) * u[3]])[None]
            if all(float(box_iou(negative, b2).max()) < 0.3 for b2 in bags2):
                p = refiner.fc_cls[1](layers(refiner.shared_fcs, features(maps, image, negative))).sigmoid()
                negatives = negatives + focal(p, torch.zeros_like(p)).sum()
    total["negative"] = 0.75 * torch.stack(weights).mean() * negatives / count
    if not c.sisd:
        del total["sisd"]
    return torch.stack(boxes_out), {f"loss_{name}": value for name, value in total.items()}
