"""Padding, stride, dilation and output size of a convolution, from the arguments of torch's functions."""

from collections.abc import Sequence

from torch import Tensor

from fastseg import _check

_MAX_PIXELS = 2**50  # of a plane: no computer has more memory, and byte counts fit in 64 bits


def window(op: str, name: str, value: int | Sequence[int], least: int) -> list[int]:
    """One int or two as [height, width], each at least `least`."""
    if type(value) is int and least <= value < 1 << 31:
        return [value, value]
    pair = _check.pair(op, name, value)
    if pair[0] < least or pair[1] < least:
        raise RuntimeError(f"fastseg.ops.{op}: {name}={value!r}; allowed: {least} or more")
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
        pair = window(op, "padding", padding, 0)
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
    (rows, columns), shape = kernel_size, input.shape
    high = shape[2] + first[0] + last[0] - dilation[0] * (rows - 1) - 1
    wide = shape[3] + first[1] + last[1] - dilation[1] * (columns - 1) - 1
    if type(high) is type(wide) is int and high * wide > _MAX_PIXELS:
        raise RuntimeError(f"fastseg.ops.{op}: the padded input would be {high}x{wide}; allowed: at most 2^50 pixels")
    if high < 0 or wide < 0:
        window = dilation[0] * (rows - 1) + 1, dilation[1] * (columns - 1) + 1
        padded = shape[2] + first[0] + last[0], shape[3] + first[1] + last[1]
        raise RuntimeError(
            f"fastseg.ops.{op}: a window of {window} on an input of {tuple(shape[2:])}, padded {padded}; "
            "allowed: at most the padded input"
        )
    return [high // stride[0] + 1, wide // stride[1] + 1]


def transposed_size(op: str, input: Tensor, kernel_size, stride, padding, output_padding, dilation) -> list[int]:
    """(height, width) of the output of a transposed convolution."""
    (rows, columns), shape = kernel_size, input.shape
    for axis in (0, 1):
        if output_padding[axis] >= stride[axis] and output_padding[axis] >= dilation[axis]:
            raise RuntimeError(
                f"fastseg.ops.{op}: output_padding={tuple(output_padding)}; allowed: less than "
                f"stride={tuple(stride)} or dilation={tuple(dilation)}"
            )
    high = (shape[2] - 1) * stride[0] - 2 * padding[0] + dilation[0] * (rows - 1) + output_padding[0] + 1
    wide = (shape[3] - 1) * stride[1] - 2 * padding[1] + dilation[1] * (columns - 1) + output_padding[1] + 1
    if high < 1 or wide < 1:
        raise RuntimeError(
            f"fastseg.ops.{op}: input of {tuple(shape[2:])} gives an output of {(high, wide)}; allowed: at least (1, 1)"
        )
    if type(high) is type(wide) is int and high * wide > _MAX_PIXELS:
        raise RuntimeError(f"fastseg.ops.{op}: the output would be {high}x{wide}; allowed: at most 2^50 pixels")
    return [high, wide]
