"""`reduction` as a number, for C++ and Triton: csrc/fastseg/reduction.h."""

from fastseg import _check

NONE, MEAN, SUM, MEAN_OF_COUNT = range(4)  # MEAN divides by the weights of the labels, MEAN_OF_COUNT does not

NUMBERS = {"none": NONE, "mean": MEAN, "sum": SUM}


def reduction_number(op: str, reduction: str) -> int:
    """NONE, MEAN or SUM; ValueError for any other value."""
    number = NUMBERS.get(reduction) if isinstance(reduction, str) else None
    if number is None:
        _check.one_of(op, "reduction", reduction, tuple(NUMBERS))
    return number
