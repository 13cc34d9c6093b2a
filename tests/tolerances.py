"""Tolerances per dtype against a float64 reference, in one place."""

import torch

ATOL = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
RTOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, *, equal_nan: bool = False) -> None:
    """Compares with the tolerance of `actual`'s dtype; exact for integers and booleans."""
    dtype = actual.dtype
    torch.testing.assert_close(
        actual.double() if dtype.is_floating_point else actual,
        expected.double() if dtype.is_floating_point else expected.to(dtype),
        atol=ATOL.get(dtype, 0),
        rtol=RTOL.get(dtype, 0),
        equal_nan=equal_nan,
    )
