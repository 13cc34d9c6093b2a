"""The ops of compose as operators: opcheck, torch.compile, no host sync, side streams and CUDA graphs."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compose_cases import noise, random_plan, use
from no_sync import no_sync
from torch import Tensor

from ssod_fast.ops.compose import cache_write, compose, compose_boxes, compose_images
from ssod_fast.ops.compose_plan import ComposePlan, PlanTables
from ssod_fast.structures import PaddedTargets, Target

SIZES = [(20, 31), (17, 40), (33, 25)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def images(device: str = "cpu") -> list[Tensor]:
    rng = random.Random(0)
    return [noise(rng, *hw).to(device) for hw in SIZES]


def block(device: str = "cpu") -> Tensor:
    padded = [torch.nn.functional.pad(i, (0, 40 - i.shape[2], 0, 33 - i.shape[1])) for i in images(device)]
    return torch.stack(padded)


def plan(seed: int = 1) -> ComposePlan:
    rng = random.Random(seed)
    while True:
        candidate = random_plan(rng, SIZES)
        if candidate.places == 3:
            return candidate


def targets(device: str = "cpu") -> PaddedTargets:
    boxes = torch.tensor([[2.0, 3, 14, 15], [5, 5, 20, 16]])
    return PaddedTargets.from_list([Target(boxes=boxes, labels=torch.tensor([0, 1]))] * len(SIZES), device=device)


def image_args(sources: list[Tensor], sizes: Tensor | None) -> tuple[Any, ...]:
    t = plan().to(sources[0].device)
    colours = ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [1.0, 2.0, 3.0])
    return (
        sources,
        sizes,
        t.canvas,
        t.place_i,
        t.place_f,
        t.erase,
        t.erase_canvas,
        64,
        64,
        *colours,
        2,
        False,
        torch.float32,
        0.0,
        True,
        False,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_images(device: str) -> None:
    sizes = torch.tensor(SIZES, dtype=torch.int32, device=device)
    for args in (image_args(images(device), None), image_args([block(device)], sizes)):
        torch.library.opcheck(torch.ops.ssod_fast.compose_images.default, args)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_boxes(device: str) -> None:
    t, p = targets(device), plan().to(device)
    args = (t.boxes, t.labels, t.scores, t.weights, t.count, p.place_i, p.place_f, p.erase, 7, 0.7, False, 0.1, 1.0, True, False)
    torch.library.opcheck(torch.ops.ssod_fast.compose_boxes.default, args)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_cache_write(device: str) -> None:
    ring = torch.zeros(4, 3 * 1400, dtype=torch.uint8, device=device)
    torch.library.opcheck(torch.ops.ssod_fast.cache_write.default, (ring, images(device), [2, 0, 1]))


def list_form(sources: list[Tensor], tables: PlanTables) -> Tensor:
    return compose_images(sources, tables, mean=(1, 2, 3), std=(4, 5, 6)) * 2


def dense_form(sources: list[Tensor], tables: PlanTables) -> Tensor:
    padded = torch.stack([torch.nn.functional.pad(s, (0, 40 - s.shape[2], 0, 33 - s.shape[1])) for s in sources])
    return compose_images(padded, tables, sizes=torch.tensor(SIZES, dtype=torch.int32)) * 2


@pytest.mark.parametrize("form", [list_form, dense_form])
def test_images_compile_without_graph_breaks(form: Callable[..., Tensor]) -> None:
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        tables = plan(seed).to("cpu")
        torch.testing.assert_close(compiled(images(), tables), form(images(), tables))


def test_boxes_and_cache_compile_without_graph_breaks() -> None:
    def step(t: PaddedTargets, tables: PlanTables, ring: Tensor, sources: list[Tensor]) -> tuple[Tensor, Tensor]:
        cache_write(ring, sources, [1, 2, 0])
        mixed = compose_boxes(t, tables, nmax=6)
        return mixed.boxes + 1, mixed.count

    tables, rings = plan().to("cpu"), [torch.zeros(3, 4200, dtype=torch.uint8) for _ in range(2)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(targets(), tables, rings[0], images()), step(targets(), tables, rings[1], images()), strict=True):
        assert torch.equal(ours, eager)
    assert torch.equal(*rings)


@pytest.mark.parametrize("device", DEVICES)
def test_a_mix_does_not_sync(device: str) -> None:
    sources, boxes = images(device), targets(device)
    ring = torch.zeros(3, 4200, dtype=torch.uint8, device=device)
    with no_sync():
        mixed, new = compose(sources, boxes, plan(), nmax=8)
        new = new.select(new.scores > 0.5)
        cache_write(ring, sources, [0, 1, 2])
    assert mixed.shape[0] == len(new)


def test_references_do_not_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    use("reference", monkeypatch)
    test_a_mix_does_not_sync("cpu")


@pytest.mark.gpu
def test_side_stream() -> None:
    stream = torch.cuda.Stream()
    expected = compose_images(images("cuda"), plan())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        mixed = compose_images(images("cuda"), plan())
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(mixed, expected)


@pytest.mark.gpu
def test_cuda_graph_replays_a_changed_plan() -> None:
    tables, dense = plan().to("cuda"), block("cuda")
    sizes = torch.tensor(SIZES, dtype=torch.int32, device="cuda")
    compose_images(dense, tables, sizes=sizes, out_hw=(64, 64))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compose_images(dense, tables, sizes=sizes, out_hw=(64, 64))
    dense.bitwise_not_()
    tables.place_f[..., -1] *= 0.5
    graph.replay()
    assert torch.equal(out, compose_images(dense, tables, sizes=sizes, out_hw=(64, 64)))


@pytest.mark.gpu
def test_a_list_cannot_be_captured() -> None:
    tables, sources = plan().to("cuda"), images("cuda")
    compose_images(sources, tables)
    with pytest.raises(RuntimeError, match="pass dense blocks and sizes"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        compose_images(sources, tables)


@pytest.mark.gpu
def test_mixed_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="plan must be on cuda:0 like the sources, got cpu"):
        compose_images(images("cuda"), plan().to("cpu"))
    with pytest.raises(ValueError, match="sources must be on one device"):
        compose_images([images("cuda")[0], *images()[1:]], plan())
    with pytest.raises(ValueError, match="plan must be on cpu like the targets"):
        compose_boxes(targets(), plan().to("cuda"))
