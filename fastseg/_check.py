"""Argument checks. Their messages name the argument, the value given and the values allowed.

Every function takes `op` (the public name) and `name` (the argument) and raises as the stock function does:
TypeError for wrong types, ValueError for values, RuntimeError for dtype, device and shape mismatches.
"""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg._private_api import is_batched, is_traced


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor(op: str, name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"fastseg.ops.{op}: {name} is {type(value).__name__}; allowed: torch.Tensor")


def tensors(op: str, **values) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            tensor(op, name, value)


def booleans(op: str, **values) -> None:
    for name, value in values.items():
        if type(value) is not bool:
            raise TypeError(f"fastseg.ops.{op}: {name}={value!r}; allowed: True or False")


NO_LABEL = -(1 << 63)  # an ignore_index that no label has


def label(op: str, name: str, value) -> int:
    """An `ignore_index` as an int; None means that no label is ignored."""
    if type(value) is int:
        return value if NO_LABEL <= value < -NO_LABEL else NO_LABEL  # no label is larger than 64 bits
    if value is None:
        return NO_LABEL
    try:
        if isinstance(value, bool):
            raise TypeError("bool")
        return integer(value)
    except TypeError as error:
        raise TypeError(f"fastseg.ops.{op}: {name}={value!r}; allowed: an integer, or None for no label") from error


def integer(value) -> int:
    """`value` as an int or torch.SymInt. Accepts what torch accepts, also numpy integers and 0-d tensors; raises
    TypeError for anything else.

    While torch.jit.trace records, a size is a tensor; it is returned unchanged.
    """
    if isinstance(value, (int, torch.SymInt)):
        return value
    if isinstance(value, Tensor) and is_traced() and not value.is_floating_point():
        return value
    return operator.index(value)


def integers(op: str, name: str, value: int | Sequence[int], allowed: str) -> list[int]:
    """`value`, one int or several, as a list of ints; TypeError for bools and floats."""
    values = [*value] if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    try:
        for place, entry in enumerate(values):
            if type(entry) is not int:
                if isinstance(entry, bool):
                    raise TypeError("bool")
                values[place] = integer(entry)
    except TypeError as error:
        given = f"{name}={value!r}, {type(value).__name__}"
        raise TypeError(f"fastseg.ops.{op}: {given}; allowed: {allowed}") from error
    return values


_MAX_WINDOW = 2**31 - 1  # torch's limit for kernel_size, padding and dilation
_MAX_STRIDE = 2**63 - 1  # a single window may have any stride


def pair(op: str, name: str, value: int | Sequence[int]) -> list[int]:
    """One int, or a sequence of one or two ints, as [height, width]."""
    if type(value) is int and 0 <= value <= _MAX_WINDOW:
        return [value, value]
    values = integers(op, name, value, "int, or two of them")
    if len(values) not in (1, 2):
        raise RuntimeError(f"fastseg.ops.{op}: {name}={value!r}; allowed: one int, or one each for height and width")
    most = _MAX_STRIDE if name == "stride" else _MAX_WINDOW
    if max(values) > most or min(values) < -most:
        raise RuntimeError(f"fastseg.ops.{op}: {name}={value!r}; allowed: at most {most}")
    return [values[0], values[-1]]


def number(op: str, name: str, value) -> float:
    """`value`, any kind of number or a 0-d tensor, as a float."""
    if type(value) is float:
        return value
    if not isinstance(value, str):  # float() would accept it
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    raise TypeError(f"fastseg.ops.{op}: {name}={value!r}; allowed: a number")


def numbers(op: str, **values) -> list[float]:
    found = []
    for name, value in values.items():  # a loop: a list comprehension costs a call
        found.append(value if type(value) is float else number(op, name, value))
    return found


def may_look_at(value: Tensor) -> bool:
    """True if a reference may read data to raise an error; not on a GPU, where the host would have to wait."""
    return value.device.type == "cpu" and not is_batched(value)


def dtype(op: str, name: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if value.dtype not in allowed:
        names = ", ".join(dict.fromkeys(dtype_name(entry) for entry in allowed))
        raise RuntimeError(f"fastseg.ops.{op}: {name} has dtype {dtype_name(value.dtype)}; allowed: {names}")


def same_device(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise RuntimeError(
            f"fastseg.ops.{op}: {name} is on {value.device}; allowed: {other.device}, the device of {other_name}"
        )


def shape(op: str, name: str, value: Tensor, allowed: Sequence[int | str], what: str = "") -> None:
    """`allowed` has strings for sizes that may be anything, e.g. ("N", 3, "H", "W")."""
    given = tuple(value.shape)
    fits = len(given) == len(allowed)
    for want, have in zip(allowed, given):  # a loop: a generator costs a microsecond more
        fits = fits and (type(want) is str or want == have)
    if not fits:
        sizes = ", ".join(str(size) for size in allowed)
        note = f" ({what})" if what else ""
        raise RuntimeError(f"fastseg.ops.{op}: {name} has shape {given}; allowed: ({sizes}){note}")


def argument(
    op: str,
    name: str,
    value: Tensor,
    dtypes: Sequence[torch.dtype],
    allowed_shape: Sequence[int | str],
    what: str = "",
    *,
    like: tuple[str, Tensor] | None = None,
) -> None:
    """Type, dtype, device and shape of one tensor; `like`: name and value of the argument on the required device."""
    if not isinstance(value, Tensor):
        tensor(op, name, value)
    if value.dtype not in dtypes:
        dtype(op, name, value, dtypes)
    if like is not None and value.device != like[1].device:
        same_device(op, name, value, *like)
    sizes = value.shape
    if sizes == allowed_shape:
        return
    fits = len(sizes) == len(allowed_shape)
    for want, have in zip(allowed_shape, sizes):
        fits = fits and (type(want) is str or want == have)
    if not fits:
        shape(op, name, value, allowed_shape, what)


def constant(op: str, name: str, value: Tensor) -> None:
    """`value` must not require grad."""
    if value.requires_grad:
        raise RuntimeError(f"fastseg.ops.{op}: {name} requires grad; allowed: a constant")


def one_of(op: str, name: str, value, allowed: Sequence) -> None:
    if value not in allowed:
        raise ValueError(f"fastseg.ops.{op}: {name}={value!r}; allowed: {', '.join(repr(entry) for entry in allowed)}")


def in_range(op: str, name: str, value: float, low: float, high: float) -> None:
    if type(value) not in (float, int):
        value = number(op, name, value)
    if not low <= value <= high:
        raise ValueError(f"fastseg.ops.{op}: {name}={value!r}; allowed: {low} to {high}")


def max_output(op: str, value: int | None) -> int | None:
    """The static size of an op's result, an int or None."""
    if value is None:
        return None
    try:
        if isinstance(value, bool):
            raise TypeError("bool")
        found = integer(value)
    except TypeError as error:
        raise TypeError(f"fastseg.ops.{op}: max_output={value!r}; allowed: an int, or None") from error
    if not 0 <= found < 2**31:
        raise ValueError(f"fastseg.ops.{op}: max_output={value!r}; allowed: 0 or more, below 2^31, or None")
    return found


def positive(op: str, name: str, value) -> float:
    """`value` as a float; it must be finite and above 0."""
    found = number(op, name, value)
    if not 0 < found < float("inf"):
        raise ValueError(f"fastseg.ops.{op}: {name}={value!r}; allowed: a positive number")
    return found
