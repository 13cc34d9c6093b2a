"""Runs the branches of a step: mixed precision, loss scaling, accumulation, and one gradient reduction per optimizer step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainingDriver:
    """The backward driver of the trainer.

    Args:
        accelerator: knows precision and processes.
        wrapped: the student or its DDP wrapper.
        accumulate: steps of the method per optimizer step; gradients are divided by it.
    """

    def __init__(self, accelerator: Accelerator, wrapped: nn.Module, accumulate: int = 1) -> None:
        self.accelerator, self.wrapped, self.accumulate = accelerator, wrapped, accumulate
        self.last_micro_step = True

    @contextlib.contextmanager
    def branch(self, last: bool) -> Iterator[None]:
        """Forward and backward of one loss; DDP reduces gradients only in the last branch of the last accumulated step."""
        reduce = last and self.last_micro_step
        with contextlib.nullcontext() if reduce else self.accelerator.no_sync(self.wrapped):
            yield
        # The casts of weights belong to the graph that was just freed.
        torch.clear_autocast_cache()

    def backward(self, loss: Tensor) -> None:
        """Adds gradients; autocast is off, because backward runs in the types that forward has chosen."""
        with torch.autocast(loss.device.type, enabled=False):
            self.accelerator.backward(loss / self.accumulate)


def wrap_for_processes(student: nn.Module, accelerator: Accelerator) -> nn.Module:
    """DDP around the student where there are several processes."""
    if accelerator.num_processes == 1:
        return student
    device = accelerator.device
    return nn.parallel.DistributedDataParallel(student, device_ids=None if device.type == "cpu" else [device.index])


def broadcast_weights(module: nn.Module | None, processes: int) -> None:
    """Gives all ranks the parameters and buffers of rank 0, as DDP does for what it wraps."""
    if module is None or processes == 1:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.detach(), src=0)


def average_gradients(module: nn.Module | None, processes: int) -> None:
    """Replaces the gradients of a module outside of DDP by their means over the ranks, in one collective per dtype.

    Parameters without a gradient are left alone; they must be the same ones on every rank.
    """
    if module is None or processes == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in module.parameters():
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        _average(gradients, processes)


def _average(tensors: Sequence[Tensor], processes: int) -> None:
    joined = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(joined)
    joined /= processes
    parts = joined.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def make_accelerator(precision: str, device: str) -> Any:
    """An accelerator without its own accumulation (the driver has it).

    Args:
        precision: "bf16", "fp16" or "fp32".
        device: "cpu" insists on it.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        # A process may hold several runs, one after the other; accelerate keeps one precision per process unless told so.
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=device == "cpu")


def pick_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """The precision to use and why, in words.

    Args:
        wanted: "auto", "bf16", "fp16" or "fp32".
        device: where training runs.
    """
    if device.type == "cpu":
        if wanted == "fp16":
            return "fp32", "fp32 (fp16 needs a GPU)"
        return ("fp32", "fp32 (the CPU default: bf16 is slower on most CPUs)") if wanted == "auto" else (wanted, wanted)
    if wanted in ("auto", "bf16"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "bf16"
        return "fp32", "fp32 (this GPU has no bf16)"
    return wanted, wanted
