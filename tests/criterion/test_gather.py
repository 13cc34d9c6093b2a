from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from criterion_cases import golden, golden_matches, matches_of, on_pairs, random_case, save_normalizer
from no_sync import no_sync
from torch import Tensor

from ssod_fast.criterion import class_targets, gather_matched, normalizer
from ssod_fast.criterion.gather import gather_logits
from ssod_fast.ops import pack_targets
from ssod_fast.structures import PaddedTargets


def test_gather_matched_by_hand() -> None:
    _, boxes, targets = golden()
    assert torch.equal(gather_matched(boxes, golden_matches(targets)), boxes[0, [2, 1]][None, None])


@pytest.mark.parametrize("entries", [1, 2])
def test_gather_matched_and_its_gradient(entries: int) -> None:
    _, boxes, targets, matches = random_case(queries=17, entries=entries)
    packed = pack_targets(targets)
    boxes.requires_grad_()
    rows = gather_matched(boxes, matches)
    assert rows.shape == (3, entries, 8, 4)
    expected, grad = torch.zeros_like(rows), torch.rand(rows.shape, dtype=torch.float64)
    wanted = torch.zeros_like(boxes)
    for layer, entry, row in matches.matched.nonzero().tolist():
        at = (layer, int(packed.image[row]), int(matches.query[layer, entry, row]))
        expected[layer, entry, row] = boxes[at].detach()
        wanted[at] = grad[layer, entry, row]
    assert torch.equal(rows, expected)
    assert torch.equal(torch.autograd.grad(rows, boxes, grad)[0], wanted)
    assert (rows[-1, -1, -1] == 0).all()  # unmatched


def test_gather_matched_gradcheck() -> None:
    _, boxes, _, matches = random_case(layers=2, queries=6, sizes=(2, 1))
    function = lambda x: gather_matched(x, matches)  # noqa: E731
    assert torch.autograd.gradcheck(function, boxes.requires_grad_())
    assert torch.autograd.gradgradcheck(function, boxes)


def test_gather_matched_takes_any_width_and_layout() -> None:
    logits, _, _, matches = random_case()
    turned = logits.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert torch.equal(gather_matched(turned, matches), gather_matched(logits, matches))
    assert gather_matched(logits[..., :0], matches).shape == (3, 1, 8, 0)
    assert gather_matched(logits.half(), matches).dtype == torch.float16


def test_unmatched_rows_do_not_read_a_nan() -> None:
    boxes = torch.full((1, 1, 3, 4), torch.nan).requires_grad_()
    packed = pack_targets([{"labels": torch.tensor([0]), "boxes": torch.rand(1, 4)}])
    rows = gather_matched(boxes, matches_of(torch.tensor([[[-1]]]), packed, 3))
    assert (rows == 0).all()
    assert (torch.autograd.grad(rows.sum(), boxes)[0] == 0).all()


def test_gather_logits() -> None:
    logits, _, targets, matches = random_case()
    packed = pack_targets(targets)
    values, found = gather_logits(logits, matches, packed.labels)
    for layer, image, query, row in on_pairs(matches, packed):
        assert values[layer, 0, row] == logits[layer, image, query, packed.labels[row]]
    assert torch.equal(found, matches.matched)
    outside = packed.labels.clone()
    outside[0], outside[1] = 4, -1
    values, found = gather_logits(logits, matches, outside)
    assert not found[..., :2].any()
    assert (values[..., :2] == 0).all()


def test_class_targets() -> None:
    _, _, targets, matches = random_case()
    packed = pack_targets(targets)
    expected = torch.full((3, 3, 9), 80)
    for layer, image, query, row in on_pairs(matches, packed):
        expected[layer, image, query] = packed.labels[row]
    assert torch.equal(class_targets(matches, packed.labels, background=80), expected)


def test_normalizer() -> None:
    _, _, targets, matches = random_case()
    assert normalizer(matches).item() == 8
    assert normalizer(matches).dtype == torch.float32
    assert normalizer(random_case(queries=17, entries=2)[3]).item() == 16
    padded = pack_targets(PaddedTargets.from_list([{**t, "boxes": t["boxes"].float()} for t in targets], nmax=7))
    assert normalizer(matches_of(torch.full((1, 1, 21), -1), padded, 9)).item() == 8
    none = pack_targets([{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}])
    assert normalizer(matches_of(torch.zeros(1, 1, 0, dtype=torch.int64), none, 9)).item() == 1
    with no_sync():
        normalizer(matches)


@pytest.mark.slow
def test_normalizer_is_the_mean_over_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(save_normalizer, (tmp_path,), nprocs=2)
    assert [torch.load(tmp_path / f"{rank}.pt").item() for rank in (0, 1)] == [4, 4]


def test_no_sync() -> None:
    logits, _, targets, matches = random_case()
    labels = pack_targets(targets).labels
    logits.requires_grad_()
    with no_sync():
        gather_matched(logits, matches).sum().backward()
        class_targets(matches, labels, 4)


def test_compile() -> None:
    logits, _, targets, matches = random_case()
    labels = pack_targets(targets).labels

    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gather_matched(x, matches), class_targets(matches, labels, 4), normalizer(matches)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), function(logits))


@pytest.mark.gpu
def test_deterministic_on_a_gpu(fill_uninitialised: None) -> None:
    logits, _, targets, _ = random_case()
    logits = logits.cuda().requires_grad_()
    packed = pack_targets(targets, "cuda")
    query = random_case()[3].query.cuda()
    matches = matches_of(query, packed, 9)
    gather_matched(logits, matches).sum().backward()
    assert logits.grad.sum() == logits.shape[-1] * (query >= 0).sum()


def test_bad_input() -> None:
    logits, _, _, matches = random_case()
    with pytest.raises(ValueError, match=r"predictions must be \[3, 3, 9, D\] as the matches are, got \[3, 9, 4\]"):
        gather_matched(logits[0], matches)
    with pytest.raises(TypeError, match=r"predictions must be a floating point tensor, got torch\.int64"):
        gather_matched(logits.long(), matches)
    with pytest.raises(TypeError, match="predictions must be a floating point tensor, got list"):
        gather_matched([1.0], matches)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="predictions and matches must be on one device, got meta and cpu"):
        gather_matched(logits.to("meta"), matches)
    with pytest.raises(ValueError, match=r"labels must be \[8\] as the matches are, got \[7\]"):
        class_targets(matches, torch.zeros(7, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="labels and matches must be on one device, got meta and cpu"):
        class_targets(matches, torch.zeros(8, dtype=torch.int64, device="meta"), 0)
    for labels, found in ((torch.zeros(8), r"torch\.float32"), (torch.zeros(8, dtype=torch.bool), r"torch\.bool"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"labels must be an integer tensor, got {found}"):
            class_targets(matches, labels, 0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"background must be an int, got 4\.5"):
        class_targets(matches, torch.zeros(8, dtype=torch.int64), 4.5)  # type: ignore[arg-type]


def test_matches_must_be_matches() -> None:
    logits, _, _, matches = random_case()
    pairs: Any = matches.pairs()
    calls = (
        lambda: gather_matched(logits, pairs),
        lambda: class_targets(pairs, torch.zeros(8, dtype=torch.int64), 0),
        lambda: normalizer(pairs),
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"matches must be the Matches that match\(\) or linear_assignment\(\) return, got list"):
            call()
