"""Replicas that torch.nn.DataParallel makes of patched models, each of which must use parameters of its own.

Without several GPUs the tensors of a replica are copies on the CPU; all the rest is what PyTorch does.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from dropin_cases import OurOps, level_tensors
from torch import Tensor, nn

from ssod_fast.dropin import _patch, rfdetr

Replicate = Callable[[nn.Module], list[nn.Module]]


@pytest.fixture
def replicate(monkeypatch: pytest.MonkeyPatch) -> Replicate:
    module = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    return lambda model: module.replicate(model, [0, 1])


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x


def scaled(module: Any, factor: float, x: Tensor) -> Tensor:
    return factor * module.scale * x


def test_a_bound_forward_is_bound_to_the_replica(replicate: Replicate) -> None:
    model = nn.Sequential(Scaled())
    _patch.replace(model[0], "forward", partial(scaled, model[0], 3.0))
    first, second = replicate(copy.deepcopy(model))
    second[0].scale = torch.tensor(5.0)
    assert [float(replica(torch.tensor(1.0)).detach()) for replica in (first, second, model)] == [6.0, 15.0, 6.0]


def test_somebody_elses_forward_reaches_the_replica(replicate: Replicate) -> None:
    model = Scaled()
    _patch.replace(model, "forward", partial(scaled, model, 3.0))
    model.forward = torch.neg
    assert float(replicate(model)[1](torch.tensor(1.0))) == -1


def test_nothing_is_left_behind() -> None:
    model = Scaled()
    before = dict(vars(model))
    _patch.replace(model, "forward", partial(scaled, model, 3.0))
    assert _patch.restore(model, "forward")
    assert vars(model) == before


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["deformable_detr", "d_fine", "mask2former"])
def test_models_of_transformers(name: str, fused: bool, replicate: Replicate) -> None:
    pytest.importorskip("transformers")
    from tiny_transformers import build, inputs

    from ssod_fast.dropin import transformers as dropin

    model = build(name).eval()
    wrapper = next(module for module in model.modules() if type(module).__name__.endswith("MultiscaleDeformableAttention"))
    calls: list[Any] = []
    handle = wrapper.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(**inputs(name, train=False))
    handle.remove()
    args, kwargs = calls[0]
    dropin.patch(wrapper, fused)
    expected = wrapper(*args, **kwargs)[0].detach()
    replicas = replicate(wrapper)
    for parameter in wrapper.parameters():
        parameter.data.zero_()
    for replica in replicas:
        with OurOps() as ops:
            found = replica(*args, **kwargs)[0]
        assert ops.names == ["ms_deform_attn_fused" if fused else "ms_deform_attn"]
        torch.testing.assert_close(found, expected)
        found.sum().backward()
    assert all(parameter.grad is not None for parameter in wrapper.parameters())


def test_rf_detr(replicate: Replicate, standins: None) -> None:
    attention = importlib.import_module("standin_ms_deform_attn").MSDeformAttn(32, 3, 4, 2)
    rfdetr.patch(attention)
    given = torch.randn(2, 6, 32), torch.rand(2, 6, 3, 4), torch.randn(2, 51, 32), *level_tensors()
    expected = attention(*given).detach()
    _, replica = replicate(attention)
    for parameter in attention.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(replica(*given), expected)
