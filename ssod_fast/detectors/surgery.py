"""Changes to the modules of a finished network: padding of its convolutions, frozen batch norm."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


def same_padding(root: nn.Module) -> None:
    """Pads the strided convolutions below `root` as TensorFlow's "SAME" does."""
    replace_modules(root, nn.Conv2d, _same_padded)


def freeze_batch_norm(root: nn.Module) -> None:
    """Replaces batch norm below `root` by fixed factors, folded into the convolution in front where there is one.

    As passes of their own the multiplication and addition of a frozen batch norm take over a third of the forward time of a MobileNet on a
    CPU. Names in the `state_dict` are those of `FrozenBatchNorm2d`, and convolutions can still be trained.
    """
    replace_modules(root, nn.BatchNorm2d, _frozen)
    for parent, conv_name, norm_name in list(_pairs(root)):
        conv, norm = getattr(parent, conv_name), getattr(parent, norm_name)
        if type(conv) in (nn.Conv2d, SameConv2d) and isinstance(norm, FrozenBatchNorm2d) and conv.bias is None:
            folded = FoldedNorm2d(norm.weight.numel(), eps=norm.eps)
            folded.load_state_dict(norm.state_dict())
            setattr(parent, conv_name, FoldedConv2d(conv, folded))
            setattr(parent, norm_name, folded)


def _pairs(root: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Places where a convolution's output goes to a norm and nowhere else: neighbours in a Sequential, and ResNet's convN and bnN."""
    for parent in root.modules():
        names = [name for name, _ in parent.named_children()]
        if isinstance(parent, nn.Sequential):
            yield from ((parent, a, b) for a, b in itertools.pairwise(names))
        else:
            yield from ((parent, f"conv{n}", f"bn{n}") for n in (1, 2, 3) if {f"conv{n}", f"bn{n}"} <= set(names))


class FoldedNorm2d(FrozenBatchNorm2d):  # type: ignore[misc]
    """Holds the factors of a frozen batch norm that the convolution in front applies."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Scale and shift per channel, [C] each."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] as it is."""
        return x


class FoldedConv2d(nn.Conv2d):
    """A convolution without bias that applies the factors of the frozen batch norm behind it to its weights."""

    _norm: FoldedNorm2d

    def __init__(self, conv: nn.Conv2d, norm: FoldedNorm2d) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(conv.__dict__)
        self._same = isinstance(conv, SameConv2d)
        # The norm stays a child of the parent, under its old name.
        object.__setattr__(self, "_norm", norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, h, w], normalised."""
        scale, shift = self._norm.factors()
        weight = self.weight * scale[:, None, None, None]
        return cast(Tensor, self._conv_forward(_pad_same(x, self) if self._same else x, weight, shift))


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "SAME" padding: as much as needed, the odd pixel at the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, ceil(H / stride), ceil(W / stride)]."""
        return super().forward(_pad_same(x, self))


def _pad_same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    top, bottom = _margins(conv, 0, x.shape[-2])
    left, right = _margins(conv, 1, x.shape[-1])
    return F.pad(x, (left, right, top, bottom))


def _margins(conv: nn.Conv2d, axis: int, size: int) -> tuple[int, int]:
    stride, extent = conv.stride[axis], conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
    total = max((-(-size // stride) - 1) * stride + extent - size, 0)
    return total // 2, total - total // 2


def replace_modules(root: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module | None]) -> None:
    """Exchanges each submodule of class `kind` for `make(submodule)`, or leaves it where that is None."""
    for name, module in list(root.named_modules()):
        if isinstance(module, kind):
            new = make(module)
            if new is not None:
                root.set_submodule(name, new)


def _same_padded(conv: nn.Conv2d) -> nn.Module | None:
    if max(_pair(conv.stride)) == 1 or max(_pair(conv.padding)) == 0:
        return None
    kernel, stride, dilation = _pair(conv.kernel_size), _pair(conv.stride), _pair(conv.dilation)
    new = SameConv2d(conv.in_channels, conv.out_channels, kernel, stride, 0, dilation, conv.groups, conv.bias is not None)
    new.weight, new.bias = conv.weight, conv.bias
    return new


def _pair(value: Sequence[int] | str) -> tuple[int, int]:
    if isinstance(value, str):
        raise ValueError(f"same_padding needs convolutions with numeric padding, got {value!r}")
    return int(value[0]), int(value[1])


def _frozen(norm: nn.BatchNorm2d) -> nn.Module:
    frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
    frozen.load_state_dict(norm.state_dict())
    return cast(nn.Module, frozen)
