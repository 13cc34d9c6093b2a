"""The form of scipy's function, with scipy's pairs and scipy's errors."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assignment_cases import KINDS, cost_matrix
from scipy.optimize import linear_sum_assignment as scipy_assignment

from ssod_fast.ops import linear_assignment, linear_sum_assignment

N, INF = math.nan, math.inf


def test_golden() -> None:
    row, column = linear_sum_assignment(torch.tensor([[4.0, 1, 3], [2, 0, 5], [3, 2, 2]]))
    assert row.tolist() == [0, 1, 2]
    assert column.tolist() == [1, 0, 2]
    assert linear_sum_assignment([[INF, 1], [2, INF]])[1].tolist() == [1, 0]
    assert (
        linear_sum_assignment(np.array([[1, 5], [2, 4], [9, 9]]), maximize=True)[0].tolist()
        == scipy_assignment([[1, 5], [2, 4], [9, 9]], maximize=True)[0].tolist()
    )


def test_equals_scipy() -> None:
    for seed in range(300):
        rng = np.random.default_rng(seed)
        matrix = cost_matrix(KINDS[seed % len(KINDS)], int(rng.integers(9)), int(rng.integers(9)), seed, torch.float64).numpy()
        for maximize in (False, True):
            row, column = linear_sum_assignment(torch.from_numpy(matrix), maximize)
            expected = scipy_assignment(matrix, maximize)
            assert row.tolist() == expected[0].tolist()
            assert column.tolist() == expected[1].tolist()
        blocked = matrix.copy()
        blocked[rng.random(matrix.shape) < 0.3] = np.inf
        assert outcome(linear_sum_assignment, blocked) == outcome(scipy_assignment, blocked)


def outcome(solve: Callable[..., Any], matrix: Any) -> Any:
    """The columns, or the message of the ValueError."""
    try:
        return solve(matrix)[1].tolist()
    except ValueError as error:
        return str(error)


def test_batch() -> None:
    for shape in ((4, 3, 7), (4, 7, 3), (4, 5, 5), (4, 0, 3), (4, 3, 0), (0, 3, 4)):
        matrix = torch.randn(shape)
        row, column = linear_sum_assignment(matrix)
        assert row.shape == column.shape == (shape[0], min(shape[1:]))
        for b in range(shape[0]):
            alone = linear_sum_assignment(matrix[b])
            assert torch.equal(row[b], alone[0])
            assert torch.equal(column[b], alone[1])


def test_refuses_what_scipy_refuses() -> None:
    for bad in (N, -INF):
        with pytest.raises(ValueError, match="matrix contains invalid numeric entries"):
            linear_sum_assignment(torch.tensor([[1.0, bad], [0, 0]]))
    with pytest.raises(ValueError, match="matrix contains invalid numeric entries"):
        linear_sum_assignment(torch.tensor([[1.0, INF], [0, 0]]), maximize=True)
    with pytest.raises(ValueError, match="cost matrix is infeasible"):
        linear_sum_assignment(torch.tensor([[INF, INF], [0, 0]]))
    with pytest.raises(ValueError, match=r"matrix must have shape \[R, C\] or \[B, R, C\], got \[3\]"):
        linear_sum_assignment(torch.zeros(3))
    with pytest.raises(TypeError, match=r"matrix must have a real number dtype, got torch\.complex64"):
        linear_sum_assignment(torch.zeros(2, 2, dtype=torch.complex64))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "uint32", "uint64", "int16", "float16", "float32", ">f8", ">i4"])
def test_dtypes_of_numpy(dtype: str) -> None:
    for shape in ((4, 6), (6, 4), (5, 5)):
        matrix = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 9, shape).astype(dtype)
        assert outcome(linear_sum_assignment, matrix) == outcome(scipy_assignment, matrix)
        if dtype in ("bool", "uint16", "uint32", "uint64"):
            assert outcome(linear_sum_assignment, torch.from_numpy(matrix)) == outcome(scipy_assignment, matrix)
    big = np.array([[2**63 + 2**12, 2**63], [2**63, 2**63]], dtype=np.uint64)
    assert outcome(linear_sum_assignment, big) == outcome(scipy_assignment, big)


@pytest.mark.filterwarnings("error")
def test_views_of_numpy() -> None:
    matrix = np.random.default_rng(1).random((5, 7))
    frozen = matrix.copy()
    frozen.flags.writeable = False
    for view in (matrix[::-1], matrix[:, ::-1], matrix[::-2, ::-1], matrix.T, matrix[1:, ::2], frozen):
        assert outcome(linear_sum_assignment, view) == outcome(scipy_assignment, view)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (None, "matrix must hold real numbers, got NoneType of dtype object"),
        ("abc", "matrix must hold real numbers, got str of dtype <U3"),
        ([["a", "b"]], "matrix must hold real numbers, got list of dtype <U1"),
        (np.array([[object()]]), "matrix must hold real numbers, got ndarray of dtype object"),
        (np.array([[1j]]), "matrix must hold real numbers, got ndarray of dtype complex128"),
    ],
)
def test_what_is_no_matrix_of_numbers(matrix: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        linear_sum_assignment(matrix)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_of_a_large_problem_is_given_back() -> None:
    """100 MB for the transposed matrix: threads would hold it for as long as they live."""
    matrix = 1 - torch.eye(5000)
    before = resident()
    assert torch.equal(linear_assignment(matrix).query.flatten(), torch.arange(5000))
    assert resident() - before < 50e6


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
