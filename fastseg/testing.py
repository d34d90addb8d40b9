"""The tolerance policy, public so that users can check their own models with it.

An implementation is correct if its error against an fp64 reference is at most twice the error of stock
PyTorch in the same dtype, plus one rounding of the output dtype, both in the maximum norm (FlashAttention's
rule). There are no other tolerances.
"""

import torch
from torch import Tensor


def max_error(value: Tensor, exact: Tensor) -> float:
    """Largest |value - exact|: 0 where both are NaN or the same infinity, infinite for any other NaN."""
    value, exact = value.detach().double(), exact.detach().double()
    same = (value == exact) | (value.isnan() & exact.isnan())
    error = torch.where(same, torch.zeros_like(exact), (value - exact).abs())
    if error.numel() == 0:
        return 0.0
    return float("inf") if error.isnan().any() else error.max().item()


def allowed_error(stock: Tensor, exact: Tensor, dtype: torch.dtype | None = None) -> float:
    """Twice stock's error plus one rounding of `dtype` (default: stock's) at the largest finite |exact|."""
    exact = exact.detach().double()
    finite = exact[exact.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    precision = torch.finfo(dtype or stock.dtype)
    return 2 * max_error(stock, exact) + max(precision.eps * largest, precision.smallest_normal)


def assert_within_policy(ours: Tensor, stock: Tensor, exact: Tensor, what: str = "output") -> None:
    """Raises AssertionError unless the error of `ours` against `exact` (fp64) is allowed, given that of `stock`."""
    if ours.shape != exact.shape:
        raise AssertionError(f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}")
    if ours.dtype != stock.dtype:
        raise AssertionError(f"{what}: dtype {ours.dtype}, expected {stock.dtype}")
    error, allowed = max_error(ours, exact), allowed_error(stock, exact)
    if not error <= allowed:
        raise AssertionError(
            f"{what}: error {error:.3e} against the fp64 reference; allowed {allowed:.3e} "
            f"(stock PyTorch's own error is {max_error(stock, exact):.3e})"
        )
