"""Dilated and transposed 2-D convolution; drop-ins for torch.nn.functional.conv2d and conv_transpose2d.

    dilated_conv2d    output[y, x] = sum over taps (r, s) of weight[r, s] input[y sh - ph + r dh, x sw - pw + s dw]
    conv_transpose2d  output[y sh - ph + r dh, x sw - pw + s dw] += weight[r, s] input[y, x]

Only taps inside the image are visited. The same pass can add a bias and a residual and apply a relu. Both are linear
maps of maps.py, which defines their derivatives.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg import _check
from fastseg._dtypes import is_autocast
from fastseg.ops.convolution.bilinear import is_bilinear, separable
from fastseg.ops.convolution.geometry import convolved_size, paddings, transposed_size, window
from fastseg.ops.convolution.maps import maps_of

_CONV, _TRANSPOSED = "dilated_conv2d", "conv_transpose2d"


def dilated_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Drop-in for torch.nn.functional.conv2d, with an epilogue: activation(conv2d(...) + residual).

    Args:
        input: (N, C, H, W) or (C, H, W), in fp32, fp16, bf16 or fp64; channels_last is kept. N may be 0.
        weight: (K, C / groups, R, S) of the dtype of `input`.
        bias: (K,) or None.
        stride, dilation: one positive int, or one each for height and width.
        padding: zeros around the image, one int or one each for height and width, "valid" for none, or "same" for
            an output of the size of the input, with the odd row or column at the bottom or right (stride 1 only).
        groups: as in torch; groups == C == K is the depthwise convolution.
        activation: None or "relu".
        residual: added before the activation. Its shape is that of the output or broadcasts to it, for instance
            (N, K, 1, 1) for a bias per image.
        out: a tensor of the output's shape to write to, such as some channels of a larger buffer. Autograd treats
            it as any tensor that is written in place.
        backend: "auto", "stock", "cpu", "triton" or "reference".

    Returns:
        (N, K, OH, OW) with OH = (H + top + bottom - dilation (R - 1) - 1) // stride + 1, or `out`. Half types are
        summed in fp32; fp32 is multiplied in tf32 on a GPU if `torch.backends.cudnn.conv.fp32_precision` says so.
        Under autocast input, weight and bias are cast as for conv2d. Differentiable any number of times. Deterministic,
        except in calls left to stock.

    Raises:
        TypeError: arguments of other types.
        RuntimeError: shapes that do not fit together, a window larger than the padded input, numbers, dtypes or
            devices other than those above, "same" with a stride.
    """
    _check.tensors(_CONV, input=input, weight=weight)
    groups = groups if type(groups) is int else _check.integers(_CONV, "groups", groups, "int")[0]
    single = input.dim() == 3
    image = input.unsqueeze(0) if single else input
    kernel_size = _kernel_size(_CONV, weight, image)
    stride, dilation = window(_CONV, "stride", stride, 1), window(_CONV, "dilation", dilation, 1)
    first, last = paddings(_CONV, padding, kernel_size, stride, dilation)
    size = convolved_size(_CONV, image, kernel_size, stride, first, last, dilation)
    maps = maps_of(image, weight, weight.shape[0], weight.shape[1] * groups, stride, dilation, groups)
    return _run(
        _CONV,
        "residual",
        maps.forward,
        image,
        weight,
        bias,
        residual,
        stride,
        first,
        dilation,
        groups,
        size,
        weight.shape[0],
        activation,
        out,
        single,
        backend,
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
    skip: Tensor | None = None,
    skip_offset: int | Sequence[int] = 0,
    crop: Sequence[int] | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Drop-in for torch.nn.functional.conv_transpose2d, with an epilogue: activation(cropped output + cropped skip).

    Every output is written once and no zero is inserted: outputs with equal remainder modulo the stride have the same
    taps. If `weight` is the bilinear kernel on the diagonal and does not require grad, rows and columns are
    interpolated one after the other. This test reads a new `weight` on the CPU: for a GPU the host waits once.

    Args:
        input: (N, C, H, W) or (C, H, W), in fp32, fp16, bf16 or fp64; channels_last is kept. N may be 0.
        weight: (C, K / groups, R, S) of the dtype of `input`.
        bias: (K,) or None.
        stride, dilation: one positive int, or one each for height and width.
        padding: rows and columns to remove at each border of the output, one int or one each.
        output_padding: rows and columns to add at the bottom and right, less than stride or dilation.
        groups: as in torch; groups == C == K is the depthwise one.
        activation: None or "relu".
        skip: (N, K, SH, SW), added from (top, left) = `skip_offset` on; the output is as large as both allow, unless
            `crop` gives its size.
        skip_offset: position of the output in `skip`, one int or one each.
        crop: (top, left, height, width), the part of the output to return; nothing else is computed.
        out: a tensor of the output's shape to write to, such as some channels of a larger buffer. Autograd treats
            it as any tensor that is written in place.
        backend: "auto", "stock", "cpu", "triton" or "reference".

    Returns:
        (N, K, OH, OW) with OH = (H - 1) stride - 2 padding + dilation (R - 1) + output_padding + 1, or the part that
        `crop` and `skip` select, or `out`. Numerics as in `dilated_conv2d`.

    Raises:
        TypeError: arguments of other types.
        RuntimeError: shapes that do not fit together, an output without pixels, a crop outside of it, numbers, dtypes
            or devices other than those above.
    """
    _check.tensors(_TRANSPOSED, input=input, weight=weight)
    groups = groups if type(groups) is int else _check.integers(_TRANSPOSED, "groups", groups, "int")[0]
    single = input.dim() == 3
    image = input.unsqueeze(0) if single else input
    kernel_size = _kernel_size(_TRANSPOSED, weight, image)
    stride, dilation = window(_TRANSPOSED, "stride", stride, 1), window(_TRANSPOSED, "dilation", dilation, 1)
    padding = window(_TRANSPOSED, "padding", padding, 0)
    output_padding = window(_TRANSPOSED, "output_padding", output_padding, 0)
    size = transposed_size(_TRANSPOSED, image, kernel_size, stride, padding, output_padding, dilation)
    if crop is not None:
        padding, size = _cropped(crop, padding, size)
    if skip is not None:
        skip, size = _cropped_skip(skip, skip_offset, size, crop is None)
    channels = weight.shape[1] * groups
    if backend != "stock" and is_bilinear(image, weight, bias, stride, dilation, groups):
        run = separable
    else:
        run = maps_of(image, weight, weight.shape[0], channels, stride, dilation, groups).transposed
    return _run(
        _TRANSPOSED,
        "skip",
        run,
        image,
        weight,
        bias,
        skip,
        stride,
        padding,
        dilation,
        groups,
        size,
        channels,
        activation,
        out,
        single,
        backend,
    )


def _kernel_size(op: str, weight: Tensor, image: Tensor) -> Sequence[int]:
    if weight.dim() != 4 or 0 in weight.shape:
        allowed = "four dimensions, none of them 0"
        raise RuntimeError(f"fastseg.ops.{op}: weight has shape {tuple(weight.shape)}; allowed: {allowed}")
    if image.dim() != 4 or 0 in image.shape[1:]:
        allowed = "(N, C, H, W) or (C, H, W), empty in N only"
        raise RuntimeError(f"fastseg.ops.{op}: input has shape {tuple(image.shape)}; allowed: {allowed}")
    return weight.shape[2:]


def _cropped(crop: Sequence[int], padding: list[int], size: list[int]) -> tuple[list[int], list[int]]:
    """(padding, size) that give the part `crop` of an output of `size`."""
    numbers = _check.integers(_TRANSPOSED, "crop", crop, "four ints, (top, left, height, width)")
    if len(numbers) != 4:
        raise RuntimeError(f"fastseg.ops.{_TRANSPOSED}: crop={crop!r}; allowed: (top, left, height, width)")
    top, left, height, width = numbers
    if top < 0 or left < 0 or height < 1 or width < 1 or top + height > size[0] or left + width > size[1]:
        raise RuntimeError(
            f"fastseg.ops.{_TRANSPOSED}: crop={tuple(crop)}; allowed: a part of the output of {tuple(size)}"
        )
    return [padding[0] + top, padding[1] + left], [height, width]


def _cropped_skip(skip: Tensor, offset, size: list[int], shrinks: bool) -> tuple[Tensor, list[int]]:
    """The part of `skip` (..., SH, SW) to add, and the size of the output; shrinks: the size may be reduced."""
    _check.tensors(_TRANSPOSED, skip=skip)
    top, left = window(_TRANSPOSED, "skip_offset", offset, 0)
    height, width = size
    if shrinks and skip.dim() > 1:
        height, width = torch.sym_min(height, skip.shape[-2] - top), torch.sym_min(width, skip.shape[-1] - left)
    if skip.dim() < 3 or height < 1 or width < 1 or top + height > skip.shape[-2] or left + width > skip.shape[-1]:
        raise RuntimeError(
            f"fastseg.ops.{_TRANSPOSED}: skip has shape {tuple(skip.shape)}, skip_offset={(top, left)} for an output "
            f"of {tuple(size)}; allowed: a skip that contains the output from there on"
        )
    return skip[..., top : top + height, left : left + width], [height, width]


def _run(
    op: str,
    name: str,
    map_op,
    image,
    weight,
    bias,
    residual,
    stride,
    padding,
    dilation,
    groups,
    size,
    channels,
    activation,
    out,
    single,
    backend,
) -> Tensor:
    """The common part of both functions: casts for autocast, shapes of residual and `out`, and the call."""
    if activation is not None and activation != "relu":
        raise ValueError(f"fastseg.ops.{op}: activation={activation!r}; allowed: None, 'relu'")
    for what, value in (("bias", bias), (name, residual)):
        if value is not None and not isinstance(value, Tensor):
            _check.tensor(op, what, value)
    if is_autocast(image):
        dtype = torch.get_autocast_dtype(image.device.type)
        image, weight, bias, residual = (
            value.to(dtype) if value is not None and value.dtype != torch.float64 else value
            for value in (image, weight, bias, residual)
        )
    if residual is not None:
        residual = _expanded(op, name, residual, (image.shape[0], channels, *size), single)
    numbers = stride, padding, dilation, groups, size, activation is not None
    if out is None:
        output = map_op(image, weight, bias, residual, *numbers, backend=backend)
        return output.squeeze(0) if single else output
    shape = image.shape[0], channels, *size
    _check.argument(
        op, "out", out, (image.dtype,), shape[1:] if single else shape, "as the output", like=("input", image)
    )
    target = out.unsqueeze(0) if single else out
    fillable = None if target.requires_grad else target
    output = map_op(image, weight, bias, residual, *numbers, backend=backend, out=fillable)
    if output is not target:
        return out.copy_(output.squeeze(0) if single else output)
    torch.autograd.graph.increment_version(out)  # as for any tensor that is written in place
    return out


def _expanded(op: str, name: str, residual: Tensor, shape: Sequence[int], single: bool) -> Tensor:
    if single and residual.dim() == 3:
        residual = residual.unsqueeze(0)
    if residual.dim() == 4 and all(have == want or have == 1 for have, want in zip(residual.shape, shape)):
        return residual.expand(shape)
    raise RuntimeError(
        f"fastseg.ops.{op}: {name} has shape {tuple(residual.shape)}; allowed: {tuple(shape)}, with 1 where it repeats"
    )
