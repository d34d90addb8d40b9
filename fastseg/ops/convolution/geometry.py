"""The numbers that say where the windows of a convolution lie, from the arguments of torch's functions."""

from collections.abc import Sequence

from torch import Tensor

from fastseg import _check

_MOST_PIXELS = 2**50  # of a plane: no computer has more memory, and everything still fits 64 bits


def positive_pair(op: str, name: str, value: int | Sequence[int]) -> list[int]:
    pair = _check.pair(op, name, value)
    if pair[0] < 1 or pair[1] < 1:
        raise RuntimeError(f"fastseg.ops.{op}: {name}={value!r}; allowed: 1 or more")
    return pair


def pair_from_zero(op: str, name: str, value: int | Sequence[int]) -> list[int]:
    pair = _check.pair(op, name, value)
    if pair[0] < 0 or pair[1] < 0:
        raise RuntimeError(f"fastseg.ops.{op}: {name}={value!r}; allowed: 0 or more")
    return pair


def paddings(
    op: str,
    padding: int | Sequence[int] | str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[list[int], list[int]]:
    """(top, left) and (bottom, right) of the `padding` of torch.nn.functional.conv2d."""
    if not isinstance(padding, str):
        pair = pair_from_zero(op, "padding", padding)
        return pair, pair
    if padding == "valid":
        return [0, 0], [0, 0]
    if padding != "same":
        raise RuntimeError(f"fastseg.ops.{op}: padding={padding!r}; allowed: 'same', 'valid', int, or two of them")
    if stride != [1, 1]:
        raise RuntimeError(f"fastseg.ops.{op}: padding='same' with stride={tuple(stride)}; allowed: stride 1")
    total = [dilation[axis] * (kernel_size[axis] - 1) for axis in (0, 1)]
    first = [total[0] // 2, total[1] // 2]
    return first, [total[0] - first[0], total[1] - first[1]]


def convolved_size(op: str, input: Tensor, kernel_size, stride, first, last, dilation) -> list[int]:
    """(height, width) of the output of a convolution; first, last: paddings (top, left) and (bottom, right)."""
    size = [
        (input.shape[2 + axis] + first[axis] + last[axis] - dilation[axis] * (kernel_size[axis] - 1) - 1)
        // stride[axis] + 1
        for axis in (0, 1)
    ]  # fmt: skip
    if size[0] < 1 or size[1] < 1:
        window = tuple(dilation[axis] * (kernel_size[axis] - 1) + 1 for axis in (0, 1))
        padded = tuple(input.shape[2 + axis] + first[axis] + last[axis] for axis in (0, 1))
        raise RuntimeError(
            f"fastseg.ops.{op}: a window of {window} on an input of {tuple(input.shape[2:])}, padded {padded}; "
            "allowed: at most the padded input"
        )
    return checked_size(op, size)


def transposed_size(
    op: str, input: Tensor, kernel_size, stride, padding, output_padding, dilation
) -> list[int]:
    """(height, width) of the output of a transposed convolution."""
    for axis in (0, 1):
        if output_padding[axis] >= stride[axis] and output_padding[axis] >= dilation[axis]:
            raise RuntimeError(
                f"fastseg.ops.{op}: output_padding={tuple(output_padding)}; allowed: less than "
                f"stride={tuple(stride)} or dilation={tuple(dilation)}"
            )
    size = [
        (input.shape[2 + axis] - 1) * stride[axis] - 2 * padding[axis] + dilation[axis] * (kernel_size[axis] - 1)
        + output_padding[axis] + 1
        for axis in (0, 1)
    ]  # fmt: skip
    if size[0] < 1 or size[1] < 1:
        raise RuntimeError(
            f"fastseg.ops.{op}: input of {tuple(input.shape[2:])} gives an output of {tuple(size)}; "
            "allowed: at least (1, 1)"
        )
    return checked_size(op, size)


def checked_size(op: str, size: list[int]) -> list[int]:
    if type(size[0]) is type(size[1]) is int and size[0] * size[1] > _MOST_PIXELS:
        raise RuntimeError(f"fastseg.ops.{op}: the output would be {tuple(size)}; allowed: at most 2^50 pixels")
    return size
