from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from detr_networks import FULL, PADDED, WIDTH, Trunk, config, images, network
from no_sync import no_sync
from torch import Tensor, nn

from ssod_fast.detectors.deformable_detr import DeformableDETR, DETRBackbone, DETRConfig, DETRStages, Memory
from ssod_fast.detectors.deformable_detr.positions import Extents, box_embedding, inverse_sigmoid, sine_embedding, token_centres
from ssod_fast.detectors.deformable_detr.selection import token_anchors
from ssod_fast.detectors.protocol import ImageBatch
from ssod_fast.nn import MultiScaleDeformableAttention

KINDS = ("plain", "refine", "anchors", "two_stage", "dino")
TOKENS = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_from_what_the_network_says(kind: str) -> None:
    net = network(kind).train()
    assert isinstance(net, DETRStages)
    decoded, proposals = net(images())
    assert decoded.hidden.shape == (2, 2, 20, WIDTH)
    assert decoded.logits.shape == (2, 2, 20, 3)
    assert decoded.boxes.shape == (2, 2, 20, 4)
    assert ((decoded.boxes > 0) & (decoded.boxes < 1)).all()
    loss = decoded.boxes.square().sum() + decoded.logits.square().sum()
    if proposals is not None:
        assert proposals.logits.shape == (2, TOKENS if kind == "two_stage" else 20, 3)
        loss = loss + proposals.boxes.square().sum() + proposals.logits.square().sum()
    loss.backward()
    blind = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()}
    # A bias of keys shifts all scores of a query alike, and denoising has its own queries.
    assert {name for name in blind if not name.endswith("k_proj.bias")} == ({"label_embedding.weight"} if kind == "dino" else set())


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_networks_start_as_published(kind: str) -> None:
    torch.manual_seed(0)
    net = DeformableDETR(config(kind), Trunk()).eval()
    heads = [*net.decoder.heads.classes, *([net.queries.classes] if kind in ("two_stage", "dino") else [])]
    assert all(torch.equal(head.bias, torch.full((3,), -math.log(99))) for head in heads)
    decoded, _ = net(images())
    assert torch.allclose(decoded.logits.sigmoid(), torch.tensor(0.01), atol=0.05)
    if kind in ("plain", "refine"):
        assert torch.allclose(decoded.boxes[..., 2:], torch.tensor(-2.0).sigmoid())
        assert torch.allclose(decoded.boxes[0, ..., :2], decoded.boxes[1, ..., :2])
    else:
        # Untrained box heads change nothing, so that boxes stay where the queries started.
        start = net.select(net.encode(net.extract(images())))[0].reference.sigmoid()
        assert torch.allclose(decoded.boxes, start.expand_as(decoded.boxes), atol=1e-5)
    assert net.projections[0][1].num_groups == WIDTH // 8


@pytest.mark.parametrize("kind", ["plain", "two_stage", "dino"])
@torch.no_grad()
def test_images_that_fill_the_batch_need_no_masks(kind: str) -> None:
    net = network(kind)
    pyramid = net.extract(images(FULL))
    assert pyramid.padding is None
    assert all(p.shape[0] == 1 for p in pyramid.positions)
    assert torch.equal(pyramid.valid_ratios, torch.ones(2, 4, 2))
    masks = [torch.zeros(2, h, w, dtype=torch.bool) for h, w in pyramid.shapes]
    masked = dataclasses.replace(pyramid, padding=masks, positions=[p.expand(2, -1, -1) for p in pyramid.positions])
    outputs = []
    for given in (pyramid, masked):
        memory = net.encode(given)
        outputs.append(net.decode(memory, net.select(memory)[0]))
    torch.testing.assert_close(outputs[0].boxes, outputs[1].boxes, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_padding_is_never_looked_at() -> None:
    net = network("dino")
    pyramid = net.extract(images(PADDED))
    assert pyramid.padding is not None
    spoilt = [torch.where(p[:, None], m + 5, m) for m, p in zip(pyramid.maps, pyramid.padding, strict=True)]
    memories = [net.encode(given) for given in (pyramid, dataclasses.replace(pyramid, maps=spoilt))]
    inside = ~memories[0].padding
    assert torch.equal(memories[0].tokens[inside], memories[1].tokens[inside])
    boxes = [net.decode(memory, net.select(memory)[0]).boxes for memory in memories]
    assert torch.equal(boxes[0], boxes[1])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_others_of_a_batch_do_not_matter(kind: str) -> None:
    net = network(kind).eval()
    batch = images([(50, 70), (64, 96), (9, 96), (1, 1)])
    together = net(batch)[0]
    for i, size in enumerate(batch.sizes):
        alone = net(ImageBatch(batch.tensor[i : i + 1], [size]))[0]
        torch.testing.assert_close(alone.boxes[:, 0], together.boxes[:, i], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone.logits[:, 0], together.logits[:, i], rtol=1e-5, atol=1e-5)


def test_extents_by_hand() -> None:
    extents = Extents.of([(64, 96), (50, 70)], (64, 96), [(8, 12), (4, 6), (2, 3), (1, 2)])
    assert extents.cells[1] == [(7, 9), (4, 5), (2, 3), (1, 2)]
    assert not extents.full
    masks = extents.padding(torch.device("cpu"))
    assert not masks[0][0].any()
    assert masks[0][1].sum() == 8 * 12 - 7 * 9
    assert masks[1][1].tolist() == [[False] * 5 + [True]] * 4
    ratios = extents.valid_ratios(torch.device("cpu"), torch.float32)
    assert torch.allclose(ratios[1, 0], torch.tensor([9 / 12, 7 / 8]))


def test_positions_by_hand() -> None:
    x = torch.tensor([0.0, 0.25])
    embedded = sine_embedding(x, 4, 100.0)  # wavelengths 1 and 10
    angle = 0.25 * 2 * math.pi
    expected = torch.tensor([[0, 1, 0, 1], [1, 0, math.sin(angle / 10), math.cos(angle / 10)]])
    assert torch.allclose(embedded, expected, atol=1e-6)
    boxes = torch.rand(1, 2, 4)
    assert torch.equal(box_embedding(boxes, 8, (1, 0, 2, 3))[..., :4], sine_embedding(boxes[..., 1], 4, 10000.0))
    maps = Extents.of([(4, 4), (2, 4)], (4, 4), [(2, 2)]).map_positions(8, 20.0, torch.device("cpu"), torch.float32)
    y, x = maps[0].split(4, -1)
    assert torch.allclose(y[0, 2], sine_embedding(torch.tensor(0.75), 4, 20.0))
    assert torch.allclose(y[1, 0], sine_embedding(torch.tensor(0.5), 4, 20.0))
    assert torch.allclose(x[1, 1], sine_embedding(torch.tensor(0.75), 4, 20.0))
    ratios = torch.tensor([[[1.0, 0.5]]])
    assert token_centres([(2, 2)], ratios, ratios).tolist() == [[[0.25, 0.5], [0.75, 0.5], [0.25, 1.5], [0.75, 1.5]]]


def test_anchors_by_hand() -> None:
    shapes = [(1, 2), (1, 1)]
    memory = Memory(
        torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.bool), shapes, torch.tensor([[[0.5, 1.0], [1.0, 1.0]]]), torch.ones(1, 2)
    )
    anchors = token_anchors(memory)
    assert torch.allclose(anchors[0, 2].sigmoid(), torch.tensor([0.5, 0.5, 0.1, 0.1]))
    assert anchors[0, 1].isinf().all()  # in the padding
    assert torch.allclose(anchors[0, 0].sigmoid(), torch.tensor([0.5, 0.5, 0.05, 0.05]))
    limit = math.log(1e5)
    assert inverse_sigmoid(torch.tensor([0.0, 0.5, 1.0, 2.0])).tolist() == pytest.approx([-limit, 0, limit, limit], abs=1e-4)


def test_queries_at_boxes_start_there() -> None:
    net = network("two_stage")
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.0, 1.0, 0.3, 1.5]]])
    queries = net.box_queries(torch.randn(1, 2, WIDTH), boxes)
    assert torch.allclose(queries.reference.sigmoid(), boxes.clamp(1e-5, 1 - 1e-5), atol=1e-6)
    assert queries.position is not None
    # A proposal at the same box would get the same position.
    chosen = net.queries._queries(inverse_sigmoid(boxes), torch.float32)
    assert torch.allclose(chosen.position, net.box_queries(chosen.content, chosen.reference.sigmoid()).position, atol=1e-5)
    net = network("dino")
    labels = torch.tensor([[2, -1]])
    queries = net.label_queries(labels, boxes)
    assert queries.position is None
    assert torch.equal(queries.content[0, 0], net.label_embedding.weight[2])
    assert not queries.content[0, 1].any()


def test_small_images_have_fewer_queries_than_wanted() -> None:
    net = network("dino", queries=500)
    decoded, proposals = net(images())
    assert decoded.boxes.shape[2] == proposals.boxes.shape[1] == TOKENS


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_any_number_of_levels(levels: int) -> None:
    net = network("dino", levels=levels)
    strides = [8, 16, 32, 64, 128][max(3 - levels, 0) :][:levels]
    assert net.extract(images()).shapes == [(-(-64 // s), -(-96 // s)) for s in strides]
    assert net(images())[0].boxes.isfinite().all()


def test_look_forward_twice_trains_the_layer_before() -> None:
    for twice in (False, True):
        net = network("dino", look_forward_twice=twice)
        decoded, _ = net(images())
        first = list(net.decoder.heads.boxes[0].parameters())
        grads = torch.autograd.grad(decoded.boxes[1].sum(), first)
        assert all(bool(g.any()) == twice for g in grads)


@pytest.mark.parametrize("kind", ["plain", "two_stage", "dino"])
def test_autocast_keeps_coordinates_in_float32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(kind).train()
    dtypes: list[torch.dtype] = []
    attend = MultiScaleDeformableAttention._attend

    def spy(self: Any, query: Tensor, points: Tensor, *rest: Any) -> Any:
        dtypes.append(points.dtype)
        return attend(self, query, points, *rest)

    monkeypatch.setattr(MultiScaleDeformableAttention, "_attend", spy)
    exact = net(images())[0]
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        pyramid = net.extract(images())
        memory = net.encode(pyramid)
        queries, proposals = net.select(memory)
        decoded = net.decode(memory, queries)
    assert dtypes == [torch.float32] * 4
    assert {p.dtype for p in pyramid.positions} == {queries.reference.dtype, decoded.boxes.dtype} == {torch.float32}
    loss = decoded.boxes.square().sum() + decoded.logits.float().square().sum()
    if proposals is not None:
        assert proposals.boxes.dtype is torch.float32
        loss = loss + proposals.boxes.square().sum() + proposals.logits.float().sum()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    assert decoded.hidden.isfinite().all()
    if kind == "plain":  # elsewhere the queries may be others
        assert (decoded.boxes - exact.boxes).abs().max() < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind: str) -> None:
    net = network(kind).train()
    batch, labels, boxes = images(), torch.tensor([[0, -1]] * 2), torch.full((2, 2, 4), 0.4)
    with no_sync():
        memory = net.encode(net.extract(batch))
        queries, proposals = net.select(memory)
        first = net.decode(memory, queries, keep_inputs=True)
        loss = first.boxes.sum() + first.logits.sum()
        if kind == "dino":
            second = net.decode(memory, net.label_queries(labels, boxes), context=first.inputs)
            loss = loss + second.boxes.sum() + proposals.boxes.sum()
        loss.backward()


def test_dropout_acts_in_training_alone() -> None:
    net = network("dino", dropout=0.5)
    net.train()
    assert not torch.equal(net(images())[0].boxes, net(images())[0].boxes)
    net.eval()
    assert torch.equal(net(images())[0].boxes, net(images())[0].boxes)


def test_bad_input_is_named() -> None:
    plain = network("plain")
    with pytest.raises(ValueError, match='need selection "two_stage" or "mixed", or box_positions=True, got selection "none"'):
        plain.box_queries(torch.zeros(1, 2, WIDTH), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match=r"content and boxes must be \[B, N, 32\] and \[B, N, 4\], got \[1, 2, 32\] and \[1, 3, 4\]"):
        network("dino").box_queries(torch.zeros(1, 2, WIDTH), torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match=r"label_queries needs a network with config\.denoising of at least 1"):
        network("two_stage").label_queries(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, 4))
    net = network("two_stage")
    memory = net.encode(net.extract(images()))
    bare = dataclasses.replace(net.select(memory)[0], position=None)
    with pytest.raises(ValueError, match="queries must have positions for a network without box_positions, got None"):
        net.decode(memory, bare)
    with pytest.raises(TypeError, match="attribute channels, Identity has None"):
        DeformableDETR(config("dino"), nn.Identity())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "two_stage"}, "box_refine must be True for selection 'two_stage'"),
        ({"look_forward_twice": True}, "box_refine must be True for look_forward_twice"),
        ({"box_positions": True}, "box_refine must be True for box_positions"),
        ({"selection": "mixed", "box_refine": True}, 'box_positions must be True for selection "mixed"'),
        ({"norm_groups": 3}, "norm_groups must divide the width 256, got 3"),
        ({"norm_groups": 0}, "norm_groups must be at least 1, got 0"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"width": 100}, "width must be a multiple of 4 and of twice the heads"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DETRConfig(**options)


def test_switches_are_booleans() -> None:
    with pytest.raises(TypeError, match="box_refine must be True or False, got 'no'"):
        DETRConfig(box_refine="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tiny", "mobilenet_v2"])
@torch.no_grad()
def test_backbones_of_torchvision(name: str) -> None:
    backbone = DETRBackbone(name)
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 12), (4, 6), (2, 3)]
    assert [m.shape[1] for m in maps] == backbone.channels
    net = DeformableDETR(config("dino"), backbone)
    assert net(ImageBatch(torch.randn(1, 3, 64, 96), [(64, 96)]))[0].boxes.isfinite().all()


def test_bad_backbones_are_named() -> None:
    with pytest.raises(ValueError, match=r"trainable_layers must lie in 0\.\.5, got 6"):
        DETRBackbone("tiny", trainable_layers=6)
    with pytest.raises(ValueError, match=r"unknown backbone 'resnet19'.*resnet18"):
        DETRBackbone("resnet19")
