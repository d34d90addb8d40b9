"""Argument checks whose messages name the argument, what came and what is allowed.

Every function takes `op` (the public name) and `name` (the argument) and raises what the stock function would
raise: TypeError for wrong types, ValueError for values, RuntimeError for dtype, device and shape mismatches.
"""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor(op: str, name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"fastseg.ops.{op}: {name} is {type(value).__name__}; allowed: torch.Tensor")


def tensors(op: str, **values) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            tensor(op, name, value)


NO_LABEL = -(1 << 63)  # an ignore_index that no label has


def label(op: str, name: str, value) -> int:
    """`value` as the int that an `ignore_index` is; None means that no label is ignored."""
    if type(value) is int:
        return value
    if value is None:
        return NO_LABEL
    try:
        return integer(value)
    except TypeError as error:
        raise TypeError(f"fastseg.ops.{op}: {name}={value!r}; allowed: an integer, or None for no label") from error


def integer(value) -> int | torch.SymInt:
    """`value` as an int, as torch takes it: of any kind, numpy's and 0-d tensors included; else TypeError."""
    return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)


def dtype(op: str, name: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if value.dtype not in allowed:
        names = ", ".join(dtype_name(entry) for entry in allowed)
        raise RuntimeError(f"fastseg.ops.{op}: {name} has dtype {dtype_name(value.dtype)}; allowed: {names}")


def same_device(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise RuntimeError(
            f"fastseg.ops.{op}: {name} is on {value.device}; allowed: {other.device}, the device of {other_name}"
        )


def shape(op: str, name: str, value: Tensor, allowed: Sequence[int | str], what: str = "") -> None:
    """`allowed` may hold strings for sizes that are free, e.g. ("N", 3, "H", "W")."""
    given = tuple(value.shape)
    fits = len(given) == len(allowed)
    for want, have in zip(allowed, given):  # a loop: a generator costs a microsecond more
        fits = fits and (type(want) is str or want == have)
    if not fits:
        sizes = ", ".join(str(size) for size in allowed)
        note = f" ({what})" if what else ""
        raise RuntimeError(f"fastseg.ops.{op}: {name} has shape {given}; allowed: ({sizes}){note}")


def one_of(op: str, name: str, value, allowed: Sequence) -> None:
    if value not in allowed:
        raise ValueError(f"fastseg.ops.{op}: {name}={value!r}; allowed: {', '.join(repr(entry) for entry in allowed)}")


def in_range(op: str, name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"fastseg.ops.{op}: {name}={value!r}; allowed: {low} to {high}")
