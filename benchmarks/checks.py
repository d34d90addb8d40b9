"""The check before every timing: our result against stock's and fp64's, by `fastseg.testing`'s policy."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Case, Inputs, differentiable
from fastseg.testing import allowed_error, assert_within_policy


def in_double(inputs: Inputs) -> Inputs:
    """The inputs with every floating tensor in fp64."""
    return tuple(
        value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
    )


def value_and_gradient(function: Callable, inputs: Inputs) -> tuple[Tensor, Tensor]:
    inputs = differentiable(inputs, backward=True)
    value = function(*inputs)
    value.backward()
    return value.detach(), inputs[0].grad


def differentiable_within_policy(stock: Callable) -> Callable[[Case, Inputs], str | None]:
    """A check of value and gradient; `stock` is the expression in PyTorch, run in the case's dtype and in fp64."""

    def verify(case: Case, inputs: Inputs) -> str | None:
        ours = value_and_gradient(case.ours, inputs)
        stock_result = value_and_gradient(stock, inputs)
        exact = value_and_gradient(stock, in_double(inputs))
        try:
            for what, mine, theirs, true in zip(("value", "gradient"), ours, stock_result, exact):
                assert_within_policy(mine, theirs, true, what)
        except AssertionError as error:
            return str(error)
        return None

    return verify


def labels_of_maximum(scores: Callable) -> Callable[[Case, Inputs], str | None]:
    """A check of an arg max over dim 1 of the (N, C, H, W) values that `scores(*inputs)` returns.

    The fp64 score of our label may be below the fp64 maximum only by stock's rounding: twice the error of its
    scores plus one rounding. If the maximum is unique by more than that, the label must be the right one.
    """

    def verify(case: Case, inputs: Inputs) -> str | None:
        with torch.no_grad():
            labels = case.ours(*inputs)
            stock_result, exact = scores(*inputs), scores(*in_double(inputs))
        if labels.shape != exact[:, 0].shape:
            return f"labels: shape {tuple(labels.shape)}, expected {tuple(exact[:, 0].shape)}"
        chosen = exact.gather(1, labels.long().unsqueeze(1)).squeeze(1)
        shortfall = (exact.amax(1) - chosen).max().item()
        allowed = allowed_error(stock_result, exact)
        if shortfall > allowed:
            return f"labels: a class falls {shortfall:.3e} short of the fp64 maximum; allowed {allowed:.3e}"
        return None

    return verify


def equal_to(stock: Callable) -> Callable[[Case, Inputs], str | None]:
    """A check for integer results: equal, element by element."""

    def verify(case: Case, inputs: Inputs) -> str | None:
        ours, expected = case.ours(*inputs), stock(*inputs)
        if ours.shape != expected.shape:
            return f"shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
        wrong = (ours.long() != expected.long()).sum().item()
        return f"{wrong} of {expected.numel()} elements differ" if wrong else None

    return verify
