from __future__ import annotations

from typing import Any

import pytest
import torch
from detr_networks import images, network


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_encoder_and_decoder_compile_without_graph_breaks() -> None:
    """A graph break raises; masks, denoising-like extra queries with context and gradients are part of it."""
    net = network("dino", encoder_layers=1)
    plain = _run(net)
    net.encoder.compile(fullgraph=True, backend="eager")
    net.decoder.compile(fullgraph=True, backend="eager")
    compiled = _run(net)
    for got, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def _run(net: Any) -> list[torch.Tensor]:
    """Outputs, and the gradients of a few parameters at both ends."""
    memory = net.encode(net.extract(images()))
    queries, _ = net.select(memory)
    first = net.decode(memory, queries, keep_inputs=True)
    extra = net.label_queries(torch.tensor([[0, 1, 2]] * 2), torch.full((2, 3, 4), 0.4))
    blocked = torch.eye(3, dtype=torch.bool).logical_not()
    second = net.decode(memory, extra, blocked=blocked, context=first.inputs)
    loss = first.boxes.square().sum() + second.boxes.square().sum() + second.logits.mean()
    ends = [net.backbone.convolutions[0].weight, net.label_embedding.weight, net.decoder.layers[0].cross_attention.value_proj.weight]
    return [first.logits, second.logits, second.boxes, *torch.autograd.grad(loss, ends)]
