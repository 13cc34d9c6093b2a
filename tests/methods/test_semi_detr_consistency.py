"""Query consistency: one group against the official five, features of boxes against a plain loop, the loss against its tensor."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from no_sync import no_sync
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import roi_align

from ssod_fast.methods.semi_detr import (
    CrossViewQueryConsistency,
    Projector,
    QueryRows,
    consistency_loss,
    query_rows,
    roi_features,
)
from ssod_fast.nn.pyramid import box_levels
from ssod_fast.structures import PaddedTargets

WIDTH = 8
GROUPS = 5


def projector(dtype: torch.dtype = torch.float64, *, width: int = WIDTH, size: int = 3, hidden: int = 16) -> Projector:
    """Training mode, with the parameters of norms away from where they begin."""
    torch.manual_seed(0)
    module = Projector(width, size, hidden).to(dtype)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, 0.2, 1.0)
    for linear in (module.linears[0], module.linears[3]):
        nn.init.uniform_(linear.bias, 0.1, 0.5)
    return module


class ToyDecoder(nn.Module):
    """Two layers of masked self-attention in which all rows of all groups, and what the groups may see of others, take part."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, batch_first=True, dtype=dtype) for _ in range(2))
        self.matching = nn.Parameter(torch.randn(4, WIDTH, dtype=dtype))

    def forward(self, content: Tensor, reference: Tensor, groups: int) -> Tensor:
        """content: [B, G * N, D], reference: [B, G * N, 4]; [L, B, G * N, D]."""
        position = torch.cat([reference, reference.square()], -1)[..., :WIDTH]
        rows = content.shape[1]
        group = torch.cat([torch.arange(groups).repeat_interleave(rows // groups), torch.full((4,), groups)])
        blocked = (group[:, None] != group) & (group != groups)
        x = torch.cat([content, self.matching.expand(len(content), -1, -1)], 1)
        added = F.pad(position, (0, 0, 0, 4))
        states = []
        for layer in self.layers:
            x = x + layer(x + added, x + added, x, attn_mask=blocked, need_weights=False)[0]
            states.append(x[:, :rows])
        return torch.stack(states)


def loss_and_gradients(
    counts: list[int], groups: int, dtype: torch.dtype = torch.float64, reduction: Any = "mean_product"
) -> tuple[Tensor, list[Tensor]]:
    """The consistency of a student and a teacher with one group of queries per image, or with several equal ones, as the official code."""
    rows, module = query_rows(counts), projector(dtype)
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(len(rows.image), WIDTH, 3, 3, generator=generator, dtype=torch.float64).to(dtype)
    references = torch.rand(2, len(counts), rows.size, 4, generator=generator, dtype=torch.float64).to(dtype)
    student, teacher = ToyDecoder(dtype), ToyDecoder(dtype)
    with torch.no_grad():
        teacher.matching.add_(0.3)
    # Copies: all rows of the batch, `groups` times; then [B, G * N, ...] with the groups of an image one after the other.
    content = module(features.repeat(groups, 1, 1, 1))
    spread = torch.cat([rows.pad(part) for part in content.chunk(groups)], 1)
    student_ref, teacher_ref = (part.repeat(1, groups, 1) for part in references)
    states = [net(spread, ref, groups) for net, ref in ((student, student_ref), (teacher, teacher_ref))]
    taken = [torch.cat([rows.take(part) for part in state.chunk(groups, 2)], 1) for state in states]
    loss = consistency_loss(*taken, rows.weight.to(dtype).repeat(groups), reduction=reduction).sum()
    return loss, list(torch.autograd.grad(loss, [*module.parameters(), *student.parameters()]))


@pytest.mark.parametrize("counts", [[2], [7], [2, 0], [4, 3], [0, 5, 0]])
@pytest.mark.parametrize("reduction", ["mean_product", "weighted"])
def test_one_group_equals_five(counts: list[int], reduction: Any) -> None:
    one, five = (loss_and_gradients(counts, groups, reduction=reduction) for groups in (1, GROUPS))
    assert one[0] > 1e-3
    torch.testing.assert_close(one[0], five[0], rtol=1e-10, atol=1e-14)
    for ours, theirs in zip(one[1], five[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("counts", [[2], [7], [2, 0], [4, 3]])
def test_one_group_equals_five_in_float32(counts: list[int]) -> None:
    one, five = (loss_and_gradients(counts, groups, torch.float32) for groups in (1, GROUPS))
    torch.testing.assert_close(one[0], five[0], rtol=1e-5, atol=0)
    for ours, theirs in zip(one[1], five[1], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7


def test_single_row_equals_five_copies() -> None:
    """A batch norm refuses one row; five copies of it it takes. Biases are away from 0, where the next ReLU has its kink."""
    one, five = (loss_and_gradients([1], groups) for groups in (1, GROUPS))
    assert one[0] > 1e-3
    torch.testing.assert_close(one[0], five[0], rtol=1e-10, atol=1e-14)
    for ours, theirs in zip(one[1], five[1], strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_single_row_in_eval_mode_is_not_taken_twice() -> None:
    module = projector().eval()
    features = torch.randn(3, WIDTH, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(module(features[:1]), module(features)[:1])


def test_golden_batch_norm_of_one_group() -> None:
    """Equal outputs; running variances grow in the ratio (3/2) / (15/14), the only difference."""
    rows = torch.randn(3, 6, dtype=torch.float64)
    one, five = (nn.BatchNorm1d(6).double() for _ in range(2))
    torch.testing.assert_close(one(rows).repeat(5, 1), five(rows.repeat(5, 1)), rtol=0, atol=1e-14)
    increments = [norm.running_var - 0.9 for norm in (one, five)]
    torch.testing.assert_close(increments[0] / increments[1], torch.full((6,), 1.4, dtype=torch.float64))


def test_projector_shape_is_the_published_one() -> None:
    module = Projector()
    assert module.linears[0].in_features == 12544
    assert [tuple(p.shape) for p in module.linears[3].parameters()] == [(256, 1024), (256,)]
    assert sum(1 for _ in module.parameters()) == 2 * 3 + 4 + 2
    assert module.convs[0].bias is None


# Rows.


def test_rows_of_a_ragged_batch() -> None:
    rows = query_rows([2, 0, 3])
    assert rows.image.tolist() == [0, 0, 1, 2, 2, 2]
    assert rows.weight.tolist() == [1, 1, 0, 1, 1, 1]
    assert (rows.batch, rows.size) == (3, 3)
    assert rows.padding.tolist() == [[False, False, True], [False, True, True], [False] * 3]
    values = torch.randn(6, 4, requires_grad=True)
    padded = rows.pad(values)
    assert torch.equal(rows.take(padded), values)
    assert torch.equal(rows.take(padded.expand(2, -1, -1, -1))[1], values)
    assert (padded[rows.padding] == 0).all()


def views() -> tuple[PaddedTargets, Tensor]:
    boxes = torch.tensor([[[10.0, 20, 30, 60], [5, 5, 15, 25]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    plain = torch.zeros(2, 2, dtype=torch.int64)
    targets = PaddedTargets(boxes, plain, plain.float(), plain.float(), torch.tensor([2, 0], dtype=torch.int32))
    return targets, torch.tensor([[100.0, 200.0], [40.0, 80.0]])


def test_boxes_and_references() -> None:
    targets, image_hw = views()
    rows = query_rows([2, 0])
    boxes = rows.boxes(targets, image_hw)
    assert boxes.tolist() == [[10, 20, 30, 60], [5, 5, 15, 25], [20, 10, 60, 30]]  # the last one is the dummy
    references = rows.references(boxes, image_hw)
    expected = torch.tensor([[[0.1, 0.4, 0.1, 0.4], [0.05, 0.15, 0.05, 0.2]], [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]])
    torch.testing.assert_close(references, expected)
    beyond = rows.references(torch.tensor([[-80.0, 20, 60, 60], [0, -10, 300, 130], [20, 10, 60, 30]]), image_hw)[0]
    torch.testing.assert_close(beyond, torch.tensor([[0, 0.4, 0.7, 0.4], [0.75, 0.6, 1, 1]]))


def test_boxes_of_a_batch_without_any() -> None:
    rows = query_rows([0, 0])
    boxes = rows.boxes(PaddedTargets.empty(2), torch.tensor([[100.0, 200.0], [40.0, 80.0]]))
    assert boxes.tolist() == [[50, 25, 150, 75], [20, 10, 60, 30]]
    assert rows.references(boxes, torch.tensor([[100.0, 200.0], [40.0, 80.0]])).tolist() == [[[0.5] * 4]] * 2


@pytest.mark.parametrize("counts", [[], [2, -1]])
def test_bad_counts(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="counts must hold a number >= 0 for each of at least one image, got"):
        query_rows(counts)


# Features.


def pyramid(batch: int = 2, side: int = 512, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, 3, side // s, side // s, generator=generator, dtype=torch.float64).to(dtype) for s in (8, 16, 32, 64)]


def test_levels_of_boxes() -> None:
    sides = torch.tensor([0.0, 20, 55, 111, 112, 223, 224, 447, 448, 2000])
    square = torch.stack([torch.zeros_like(sides), torch.zeros_like(sides), sides, sides], 1)
    assert box_levels(square).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert box_levels(torch.tensor([[0.0, 0, 56, 224]])).tolist() == [1]


def test_features_equal_a_loop() -> None:
    maps = pyramid()
    boxes = torch.tensor(
        [[3.0, 4, 40, 50], [0, 0, 500, 480], [100, 20, 260, 300], [5, 5, 305, 265], [7, 7, 7, 90], [-20, 300, 60, 700]], dtype=torch.float64
    )
    image = torch.tensor([0, 1, 0, 1, 0, 1])
    found = roi_features(maps, boxes, image)
    levels = box_levels(boxes).tolist()
    assert set(levels) == {0, 1, 2, 3}
    for row, (level, box) in enumerate(zip(levels, boxes, strict=True)):
        own = maps[level][image[row], None]
        expected = roi_align(own, [box[None]], 7, spatial_scale=1 / (8 * 2**level), sampling_ratio=0, aligned=True)[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-12, atol=1e-13)
    assert (found[4] == 0).all()  # no width


def test_features_of_half_precision_maps() -> None:
    maps = [m.bfloat16() for m in pyramid(dtype=torch.float32)]
    boxes, image = torch.tensor([[3.0, 4, 40, 50]]), torch.tensor([1])
    with torch.autocast("cpu", torch.bfloat16):
        found = roi_features(maps, boxes, image)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, roi_features([m.float() for m in maps], boxes, image))


def test_features_need_a_stride_each() -> None:
    with pytest.raises(ValueError, match="maps must be as many as strides, 4, got 3"):
        roi_features(pyramid()[:3], torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))


# Loss.


def literal_loss(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """The official tensor: weights [R, 1, 1] against errors [R, D]."""
    error = (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)) ** 2
    product = error * weight[:, None, None]
    assert product.shape == (len(weight), *student.shape)
    return product.mean()


def test_product_of_means_equals_the_official_tensor() -> None:
    student, teacher = torch.randn(2, 4, 256, requires_grad=True), torch.randn(2, 4, 256)
    weight = torch.tensor([1.0, 1, 0, 1])
    ours = consistency_loss(student, teacher, weight)
    literal = torch.stack([literal_loss(*pair, weight) for pair in zip(student, teacher, strict=True)])
    torch.testing.assert_close(ours, literal, rtol=0, atol=1e-7)
    gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in (ours, literal)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)


def test_golden_orthogonal_states() -> None:
    student, teacher = torch.eye(256)[:2], torch.eye(256)[2:4]
    loss = consistency_loss(student, teacher, torch.ones(2))
    assert loss.item() == pytest.approx(0.0078125, abs=1e-9)
    assert 10 * 4 * loss.item() == pytest.approx(0.3125, abs=1e-7)
    assert consistency_loss(student, teacher, torch.tensor([1.0, 0])).item() == pytest.approx(0.0078125 / 2, abs=1e-9)
    assert consistency_loss(student, teacher, torch.tensor([1.0, 0]), reduction="weighted").item() == pytest.approx(0.0078125, abs=1e-9)


def test_weighted_leaves_dummies_out() -> None:
    student, teacher = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    weight = torch.tensor([1.0, 0, 1, 1, 0])
    kept = [0, 2, 3]
    expected = consistency_loss(student[:, kept], teacher[:, kept], torch.ones(3))
    torch.testing.assert_close(consistency_loss(student, teacher, weight, reduction="weighted"), expected)


@pytest.mark.parametrize("reduction", ["mean_product", "weighted"])
def test_only_dummies_give_exactly_zero(reduction: Any) -> None:
    student = torch.randn(2, 3, 16, requires_grad=True)
    loss = consistency_loss(student, torch.zeros(2, 3, 16), torch.zeros(3), reduction=reduction)
    assert loss.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert (gradient == 0).all()


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = torch.randn(2, 3, 16, requires_grad=True), torch.randn(2, 3, 16, requires_grad=True)
    consistency_loss(student, teacher, torch.ones(3)).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest result."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.most = max(self.most, tensor.numel())
        return result


@pytest.mark.parametrize("reduction", ["mean_product", "weighted"])
def test_memory_is_linear_in_rows(reduction: Any) -> None:
    for rows in (50, 400):
        student = torch.randn(2, rows, 16, requires_grad=True)
        with LargestTensor() as seen:
            consistency_loss(student, torch.randn(2, rows, 16), torch.ones(rows), reduction=reduction).sum().backward()
        assert seen.most == 2 * rows * 16


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((3, 8), (2, 8), (3,)), {}, r"student and teacher must be \[..., R, D\] and weight \[R\] with R >= 1, got \[3, 8\], \[2, 8\]"),
        (((3, 8), (3, 8), (3, 1)), {}, r"weight \[R\]"),
        (((0, 8), (0, 8), (0,)), {}, r"with R >= 1"),
        (((3, 8), (3, 8), (3,)), {"reduction": "mean"}, 'reduction must be "mean_product" or "weighted", got \'mean\''),
    ],
)
def test_bad_loss_input(shapes: tuple[tuple[int, ...], ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        consistency_loss(*(torch.zeros(shape) for shape in shapes), **options)


def test_unknown_reduction_of_the_module() -> None:
    with pytest.raises(ValueError, match="reduction must be"):
        CrossViewQueryConsistency(WIDTH, reduction="sum")  # type: ignore[arg-type]


# All of it.


def run(module: CrossViewQueryConsistency, rows: QueryRows, targets: PaddedTargets, image_hw: Tensor) -> tuple[Tensor, Tensor]:
    """Content of the queries, and the consistency of two made-up decoders."""
    maps = [m[:, :1].expand(-1, WIDTH, -1, -1) * torch.arange(1, WIDTH + 1)[:, None, None] for m in pyramid(dtype=torch.float32)]
    content = module.content(maps, rows.boxes(targets, image_hw), rows)
    references = rows.references(rows.boxes(targets, image_hw), image_hw)
    student = torch.stack([content + references.repeat(1, 1, 2), content * 2])
    return content, module.loss(student, content.detach().flip(-1).expand(2, -1, -1, -1), rows)


@pytest.mark.parametrize("autocast", [False, True])
def test_module_without_sync(autocast: bool) -> None:
    targets, image_hw = views()
    module, rows = CrossViewQueryConsistency(WIDTH, size=3, hidden=16), query_rows([2, 0])
    with no_sync(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        content, loss = run(module, rows, targets, image_hw)
        loss.sum().backward()
    assert content.shape == (2, 2, WIDTH)
    assert (content[1, 1] == 0).all()
    assert loss.shape == (2,)
    assert loss.dtype == torch.float32
    gradients = [p.grad for p in module.projector.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert sum(g.abs().sum() for g in gradients if g is not None) > 0


def test_module_without_any_box() -> None:
    module, rows = CrossViewQueryConsistency(WIDTH, size=3, hidden=16), query_rows([0, 0])
    _, loss = run(module, rows, PaddedTargets.empty(2), torch.tensor([[100.0, 200.0], [40.0, 80.0]]))
    assert loss.tolist() == [0, 0]
    loss.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in module.projector.parameters())


def test_rows_of_other_images_do_not_move() -> None:
    """The layout of one image is independent of how many rows its batch mates have."""
    targets, image_hw = views()
    module = CrossViewQueryConsistency(WIDTH, size=3, hidden=16).eval()
    alone, together = (run(copy.deepcopy(module), query_rows(counts), targets, image_hw)[0] for counts in ([1, 0], [2, 0]))
    torch.testing.assert_close(alone[:, :1], together[:, :1])
    for counts in itertools.product((0, 1, 2), repeat=2):
        assert query_rows(counts).size == max(*counts, 1)
