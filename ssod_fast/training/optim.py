"""Optimizer, learning rate and the step that refuses non-finite gradients without asking the host."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

MAX_SKIPPED = 20


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer of the student and of what the method trains beside it.

    Weight decay is applied to everything that is trained, as in the published recipes.
    """

    # SGD for convolutional detectors, AdamW for transformers.
    name: Literal["sgd", "adamw"] = "sgd"
    # Of SGD.
    momentum: float = 0.9
    # Of everything that is trained.
    weight_decay: float = 1e-4
    # Gradients are scaled down to this L2 norm (MixPL: 20 for SGD, 0.1 for DINO); 0 switches it off.
    clip_norm: float = 20.0
    # Factor on the learning rate of parameters whose name contains "backbone" (DETR-like detectors: 0.1).
    backbone_lr_scale: float = 1.0
    # Labelled images per step that the published learning rate belongs to (MixPL: 8 GPUs, each with 1 labelled and 4 unlabelled images).
    # Labelled ones, so that a supervised run of the same settings has the same rate.
    reference_batch: int = 8
    # How the learning rate follows the batch: "linear", or with its square root, which suits AdamW better (arXiv 2205.10287).
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    # The published learning rates (SGD 0.01, AdamW 1e-4) at the reference batch; None picks by name.
    reference_lr: float | None = None

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adamw"):
            raise ValueError(f'optimizer.name must be "sgd" or "adamw", got {self.name!r}')
        if self.lr_scaling not in ("linear", "sqrt"):
            raise ValueError(f'optimizer.lr_scaling must be "linear" or "sqrt", got {self.lr_scaling!r}')
        for name in ("weight_decay", "clip_norm", "backbone_lr_scale", "momentum"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} must not be negative, got {getattr(self, name)}")
        if self.reference_batch < 1:
            raise ValueError(f"optimizer.reference_batch must be at least 1, got {self.reference_batch}")

    def learning_rate(self, labeled: int, scale: bool) -> float:
        """The recipe's learning rate, scaled with the labelled images per step if wanted."""
        base = self.reference_lr if self.reference_lr is not None else {"sgd": 0.01, "adamw": 1e-4}[self.name]
        ratio = labeled / self.reference_batch if scale else 1.0
        return base * (math.sqrt(ratio) if self.lr_scaling == "sqrt" else ratio)


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then constant, with optional drops."""

    # Iterations of the warm-up; shortened to a tenth of the run where the run is short.
    warmup: int = 500
    # Share of the learning rate at iteration 0.
    warmup_start: float = 1e-3
    # Shares of the run after which the learning rate is multiplied by gamma, for example 0.67 0.89.
    milestones: tuple[float, ...] = ()
    # Factor of a milestone.
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ValueError(f"schedule.warmup must not be negative, got {self.warmup}")
        if any(not 0 < m < 1 for m in self.milestones):
            raise ValueError(f"schedule.milestones must be shares of the run in (0, 1), got {self.milestones}")

    def factor(self, it: int, iters: int) -> float:
        """What the learning rate is multiplied with at iteration `it` (0-based) of `iters`."""
        warmup = min(self.warmup, iters // 10)
        ramp = 1.0 if it >= warmup else self.warmup_start + (1.0 - self.warmup_start) * it / warmup
        drops = sum(it >= round(m * iters) for m in self.milestones)
        return float(ramp * self.gamma**drops)


def build_optimizer(modules: Sequence[nn.Module], config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """A fused optimizer over the parameters that take gradients; `initial_lr` of each group is what the schedule scales.

    Args:
        modules: what is trained, the student first.
        config: the settings.
        lr: of everything but the backbone.

    Raises:
        ValueError: the student has nothing to train.
    """
    named = [(n, p) for module in modules for n, p in module.named_parameters() if p.requires_grad]
    if not any(p.requires_grad for p in modules[0].parameters()):
        raise ValueError("the student has no parameter that takes a gradient")
    groups = _groups(named, config.backbone_lr_scale, lr)
    # Fused implementations honour `found_inf`, which is how a bad step is skipped on the device.
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=config.weight_decay, fused=True)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)
    if config.momentum > 0:
        # Else the first step leaves fresh memory behind as momentum when it is the one that is skipped.
        for _, parameter in named:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _groups(named: Iterable[tuple[str, nn.Parameter]], backbone_scale: float, lr: float) -> list[dict[str, Any]]:
    """One group per learning rate."""
    by_scale: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named:
        by_scale.setdefault(backbone_scale if "backbone" in name else 1.0, []).append(parameter)
    return [{"params": parameters, "lr": lr * scale, "initial_lr": lr * scale} for scale, parameters in by_scale.items()]


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group to its own rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


class StepGuard:
    """Skips optimizer steps whose gradients are not finite, and counts them, without a host sync.

    Gradients are the same on all ranks, so all ranks skip the same steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.found = torch.zeros((), device=device)
        # total skipped, skipped in a row, most in a row since the last read
        self.counts = torch.zeros(3, device=device)

    def observe(self, norm: Tensor) -> Tensor:
        """Takes the gradient norm of this step; returns the flag (1 = skip) that a fused optimizer reads as `found_inf`."""
        self.found.copy_((~torch.isfinite(norm)).float())
        total, row, most = self.counts.unbind()
        row = (row + 1) * self.found
        self.counts.copy_(torch.stack([total + self.found, row, torch.maximum(most, row)]))
        return self.found

    def read(self) -> tuple[int, int]:
        """Skipped steps so far, and the most in a row since the last read. Waits for the device."""
        total, _, most = (int(v) for v in self.counts.tolist())
        self.counts[2] = self.counts[1]
        return total, most

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        return {"counts": self.counts.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.counts.copy_(state["counts"])


class BufferGuard:
    """Puts running statistics of batch norm back when a step is skipped: the forward pass that broke has already updated them.

    Frozen batch norm has nothing to guard and costs nothing.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        norms = [m for module in modules for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.buffers = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
        self._saved = [b.clone() for b in self.buffers]

    def save(self) -> None:
        """Remembers the statistics before a step."""
        if self.buffers:
            torch._foreach_copy_(self._saved, self.buffers)

    def restore_if(self, skipped: Tensor) -> None:
        """Goes back to them where the device scalar `skipped` is 1."""
        for buffer, saved in zip(self.buffers, self._saved, strict=True):
            buffer.copy_(torch.where(skipped > 0, saved, buffer))


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients to at most `max_norm` (0: not at all) and returns the norm before that, a device scalar."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
