from __future__ import annotations

import dataclasses

import pytest
import torch
from detr_networks import PADDED, WIDTH, images, network
from torch import Tensor

from ssod_fast.detectors.deformable_detr import Decoded, DeformableDETR, LayerInput, Memory, Queries

DOUBLE = torch.float64
GROUPS = (4, 3)
EXTRA = sum(GROUPS)


def _blocked(extra: tuple[int, ...], matching: int) -> Tensor:
    """A query attends to its own group and to the matching queries, a matching query to these alone."""
    group = torch.tensor([g for g, size in enumerate(extra) for _ in range(size)] + [-1] * matching)
    return (group[:, None] != group) & (group != -1)


def _join(*parts: Queries) -> Queries:
    positions = [part.position for part in parts]
    position = None if positions[0] is None else torch.cat(positions, 1)
    return Queries(torch.cat([part.content for part in parts], 1), torch.cat([part.reference for part in parts], 1), position)


class _Case:
    """Memory, matching queries and extra queries of one network in float64, with gradients down to the images."""

    def __init__(self, kind: str) -> None:
        self.net = network(kind).double().train()
        generator = torch.Generator().manual_seed(2)
        self.content = torch.randn(2, EXTRA, WIDTH, generator=generator, dtype=DOUBLE).requires_grad_()
        self.boxes = torch.rand(2, EXTRA, 4, generator=generator, dtype=DOUBLE) * 0.6 + 0.2
        self.weights = torch.randn(200, generator=generator, dtype=DOUBLE)

    def start(self) -> tuple[Memory, Queries, Queries]:
        memory = self.net.encode(self.net.extract(images(PADDED, DOUBLE)))
        matching, _ = self.net.select(memory)
        return memory, matching, self.net.box_queries(self.content, self.boxes)

    def gradients(self, memory: Memory, decoded: list[Tensor]) -> list[Tensor]:
        """Of a loss that looks at everything."""
        loss = sum((value * self.weights[: value.shape[2], None]).sum() for value in decoded)
        inputs = [memory.tokens, self.content, *self.net.parameters()]
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]


def _parts(decoded: Decoded) -> list[Tensor]:
    return [decoded.hidden, decoded.logits, decoded.boxes]


def _joint(case: _Case) -> tuple[list[Tensor], list[Tensor]]:
    memory, matching, extra = case.start()
    parts = _parts(case.net.decode(memory, _join(extra, matching), blocked=_blocked(GROUPS, matching.content.shape[1])))
    return parts, case.gradients(memory, parts)


def _split(case: _Case, detach: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    memory, matching, extra = case.start()
    first = case.net.decode(memory, matching, keep_inputs=True)
    context = first.inputs
    if detach:
        context = tuple(LayerInput(i.state.detach(), i.position.detach(), i.value) for i in context)
    second = case.net.decode(memory, extra, blocked=_blocked(GROUPS, 0), context=context)
    parts = [torch.cat(pair, 2) for pair in zip(_parts(second), _parts(first), strict=True)]
    return parts, case.gradients(memory, parts)


def _largest(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference, relative where values are large."""
    return max(((x - y).abs() / y.abs().clamp(min=1)).max().item() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["two_stage", "dino"])
def test_extra_queries_decoded_after_the_matching_ones_equal_joint_decoding(kind: str) -> None:
    case = _Case(kind)
    outputs, gradients = _joint(case)
    later, later_gradients = _split(case)
    assert _largest(later, outputs) < 1e-12
    assert _largest(later_gradients, gradients) < 1e-10


def test_without_gradients_into_the_context_they_differ() -> None:
    case = _Case("dino")
    outputs, gradients = _joint(case)
    later, later_gradients = _split(case, detach=True)
    assert _largest(later, outputs) < 1e-12
    assert _largest(later_gradients, gradients) > 1e-4


@torch.no_grad()
def test_matching_outputs_do_not_depend_on_extra_queries_by_a_single_bit() -> None:
    case = _Case("dino")
    memory, matching, extra = case.start()
    number = matching.content.shape[1]
    blocked = _blocked(GROUPS, number)
    other = dataclasses.replace(extra, content=extra.content * 3 + 1, reference=-extra.reference)
    outputs = [_parts(case.net.decode(memory, _join(queries, matching), blocked=blocked)) for queries in (extra, other)]
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a[:, :, EXTRA:], b[:, :, EXTRA:])
        assert not torch.equal(a[:, :, :EXTRA], b[:, :, :EXTRA])


@torch.no_grad()
def test_context_brings_the_projected_memory_along() -> None:
    case = _Case("dino")
    memory, matching, extra = case.start()
    inputs = case.net.decode(memory, matching, keep_inputs=True).inputs
    calls: list[int] = []
    for layer in case.net.decoder.layers:
        layer.cross_attention.value_proj.register_forward_hook(lambda *_: calls.append(1))
    expected = case.net.decode(memory, extra, context=tuple(dataclasses.replace(i, value=None) for i in inputs))
    assert len(calls) == 2
    got = case.net.decode(memory, extra, context=inputs)
    assert len(calls) == 2
    assert torch.equal(got.boxes, expected.boxes)


@torch.no_grad()
def test_context_equals_rows_that_nobody_blocks() -> None:
    """Without a mask of their own, extra queries attend to each other and to the whole context."""
    case = _Case("dino")
    memory, matching, extra = case.start()
    inputs = case.net.decode(memory, matching, keep_inputs=True).inputs
    unmasked = case.net.decode(memory, extra, context=inputs)
    masked = case.net.decode(memory, extra, context=inputs, blocked=torch.zeros(2, EXTRA, EXTRA, dtype=torch.bool))
    assert (unmasked.hidden - masked.hidden).abs().max() < 1e-12


def test_bad_masks_and_contexts_are_named() -> None:
    case = _Case("dino")
    memory, matching, _ = case.start()
    net: DeformableDETR = case.net
    inputs = net.decode(memory, matching, keep_inputs=True).inputs
    with pytest.raises(ValueError, match=r"context must hold one entry for each of the 2 layers, got 1"):
        net.decode(memory, matching, context=inputs[:1])
    with pytest.raises(ValueError, match=r"blocked must be \[20, 20\] or \[2, 20, 20\], got \[20, 3\]"):
        net.decode(memory, matching, blocked=torch.zeros(20, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"blocked must be a bool tensor, got torch\.float32"):
        net.decode(memory, matching, blocked=torch.zeros(20, 20))
    with pytest.raises(TypeError, match="blocked must be a bool tensor, got list"):
        net.decode(memory, matching, blocked=[[False]])
