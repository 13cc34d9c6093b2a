from __future__ import annotations

import pytest
import torch
from criterion_cases import matches_of
from no_sync import SyncError, no_sync
from torch import Tensor

from ssod_fast.ops import pack_targets
from ssod_fast.ops._matches import Matches
from ssod_fast.structures import PaddedTargets


def targets(*sizes: int) -> list[dict[str, Tensor]]:
    return [{"labels": torch.zeros(n, dtype=torch.int64), "boxes": torch.rand(n, 4)} for n in sizes]


def as_lists(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[list[int], list[int]]]:
    assert all(x.dtype == torch.int64 for pair in pairs for x in pair)
    return [(i.tolist(), j.tolist()) for i, j in pairs]


def test_pairs_of_ragged_rows() -> None:
    query = torch.tensor([[[7, 2, 5, 0, 9, 3]], [[0, 1, 2, 3, 4, 5]]])
    matches = matches_of(query, pack_targets(targets(3, 0, 2, 1)), 10)
    assert as_lists(matches.pairs()) == [([2, 5, 7], [1, 2, 0]), ([], []), ([0, 9], [0, 1]), ([3], [0])]
    assert as_lists(matches.pairs(1)) == [([0, 1, 2], [0, 1, 2]), ([], []), ([3, 4], [0, 1]), ([5], [0])]
    assert (matches.layers, matches.matched.all().item()) == (2, True)


def test_pairs_of_padded_rows() -> None:
    packed = pack_targets(PaddedTargets.from_list(targets(2, 0, 1), nmax=3))
    query = torch.tensor([[[4, 1, -1, -1, -1, -1, 0, -1, -1]]])
    assert as_lists(matches_of(query, packed, 5).pairs()) == [([1, 4], [1, 0]), ([], []), ([0], [0])]


def test_pairs_leave_out_what_is_unmatched() -> None:
    query = torch.tensor([[[-1, 0, -1, 1, 2, -1]]])
    assert as_lists(matches_of(query, pack_targets(targets(4, 2)), 3).pairs()) == [([0, 1], [1, 3]), ([2], [0])]


def test_pairs_of_groups_and_repeats() -> None:
    query = torch.tensor([[[1, 0, 2], [5, 3, 4]]])  # E = 2
    pairs = matches_of(query, pack_targets(targets(2, 1)), 6, groups=2).pairs()
    assert as_lists(pairs) == [([0, 1, 3, 5], [1, 0, 1, 0]), ([2, 4], [0, 0])]


def test_problems_without_offsets_or_counts() -> None:
    query = torch.tensor([[[2, 0, 1, 2]]])
    image = torch.tensor([0, 0, 1, 1])
    matches = Matches(query, query.float(), torch.zeros(1, 1, 2, dtype=torch.uint8), image, 3, 2)
    assert as_lists(matches.pairs()) == [([0, 2], [1, 0]), ([1, 2], [0, 1])]


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0)], ids=str)
def test_no_targets(sizes: tuple[int, ...]) -> None:
    matches = matches_of(torch.zeros(1, 1, 0, dtype=torch.int64), pack_targets(targets(*sizes)), 4)
    assert as_lists(matches.pairs()) == [([], [])] * len(sizes)


def test_pairs_stay_on_the_device_where_the_host_knows_their_number() -> None:
    query = torch.tensor([[[7, 2, 5]]])
    packed = pack_targets(targets(2, 1))
    with no_sync():
        pairs = matches_of(query, packed, 10, pair_counts=(2, 1)).pairs(device=query.device)
    assert as_lists(pairs) == [([2, 7], [1, 0]), ([5], [0])]
    with no_sync(), pytest.raises(SyncError, match="tolist"):
        matches_of(query, packed, 10).pairs(device=query.device)


def test_layer_that_is_not_there() -> None:
    matches = matches_of(torch.tensor([[[0]]]), pack_targets(targets(1)), 4)
    with pytest.raises(IndexError, match=r"layer must lie in \[0, 1\), got 1"):
        matches.pairs(1)
