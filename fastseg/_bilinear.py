"""Size and scale of a bilinear upsampling, from the arguments of torch.nn.functional.interpolate."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import _check

_MAX_PIXELS = 2**50  # of an image: no computer has more memory, and byte counts fit in 64 bits


def output_size_and_scales(
    op: str,
    input: Tensor,
    size: int | Sequence[int] | None,
    scale_factor: float | Sequence[float] | None,
) -> tuple[tuple[int, int] | None, list[float] | None]:
    """((height, width), the scales for torch's sampling rule) for `input` (N, C, h, w).

    The size is None if neither argument is given. The scales are None unless `scale_factor` is given: torch
    then samples at 1/scale_factor instead of source size / output size.
    """
    if size is not None and scale_factor is not None:
        raise ValueError(f"fastseg.ops.{op}: size and scale_factor are both given; allowed: one of them")
    if size is not None:
        height, width = _pair(op, "size", size, _check.integer, "an integer")
        if height < 1 or width < 1 or (type(height) is type(width) is int and height * width > _MAX_PIXELS):
            raise ValueError(f"fastseg.ops.{op}: size={size!r}; allowed: positive numbers, at most 2^50 pixels")
        return (height, width), None
    if scale_factor is None:
        return None, None
    scales = _pair(op, "scale_factor", scale_factor, float, "one number")
    allowed = "positive finite factors that leave at least one pixel"
    if not (0 < scales[0] < math.inf and 0 < scales[1] < math.inf):
        raise ValueError(f"fastseg.ops.{op}: scale_factor={scale_factor!r}; allowed: {allowed}")
    height, width = _scaled(input.shape[2], scales[0]), _scaled(input.shape[3], scales[1])
    if height < 1 or width < 1 or (type(height) is type(width) is int and height * width > _MAX_PIXELS):
        raise ValueError(
            f"fastseg.ops.{op}: scale_factor={scale_factor!r} makes {tuple(input.shape[-2:])} into {(height, width)}; "
            f"allowed: {allowed}, and at most 2^50"
        )
    return (height, width), scales


def _scaled(length, scale: float):
    """floor(length * scale); `length` may be symbolic, or a tensor while torch.jit.trace records."""
    if isinstance(length, Tensor):
        return (length.double() * scale).long()
    if scale.is_integer():  # exact; torch.compile and torch.export can simplify it
        return length * int(scale)
    return torch.sym_int(length * scale)


def bilinear_taps(size: int) -> Tensor:
    """The taps 1 - |i - c| / f along one axis of the bilinear kernel of `size`.

    f = (size + 1) // 2 is the upsampling factor the kernel is made for and c its centre: f - 1 for odd sizes, f - 1/2
    for even ones (Long, Shelhamer, Darrell: Fully convolutional networks, 2015).
    """
    factor = (size + 1) // 2
    centre = factor - 1 if size % 2 == 1 else factor - 0.5
    return 1 - (torch.arange(size) - centre).abs() / factor


def bilinear_kernel(size: int) -> Tensor:
    """The (size, size) bilinear taps."""
    taps = bilinear_taps(size)
    return taps[:, None] * taps[None, :]


def interpolate(input: Tensor, size: Sequence[int], scales: Sequence[float] | None, align_corners: bool) -> Tensor:
    """Stock PyTorch on the results of `output_size_and_scales`. All references use it."""
    if scales is None:
        return F.interpolate(input, size=tuple(size), mode="bilinear", align_corners=align_corners)
    return F.interpolate(input, scale_factor=tuple(scales), mode="bilinear", align_corners=align_corners)


def _pair(op: str, name: str, value, convert: Callable, one: str) -> list:
    """One number or a sequence of two as [height, width]; `one` describes the values that `convert` accepts."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value, value]
    if len(values) != 2:
        raise ValueError(_not_allowed(op, name, value, one))
    if isinstance(values[0], str) or isinstance(values[1], str):  # float() would accept them
        raise TypeError(_not_allowed(op, name, value, one))
    try:
        return [convert(values[0]), convert(values[1])]
    except TypeError as error:
        raise TypeError(_not_allowed(op, name, value, one)) from error


def _not_allowed(op: str, name: str, value, one: str) -> str:
    return f"fastseg.ops.{op}: {name}={value!r}; allowed: {one}, or one each for height and width"
