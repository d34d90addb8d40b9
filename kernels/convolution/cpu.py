"""The dense maps on the CPU by torch's GEMM and its channels_last convolution; for the reasons see README.md."""

import torch

from fastseg._dtypes import accumulator
from fastseg._layout import image_format
from fastseg.kernels.convolution import torch_calls

CHAIN = 128  # input channels of NCHW images that torch sums at a time


def dilated_conv2d(input, weight, bias, residual, stride, padding, dilation, groups, size, relu):
    numbers = stride, padding, dilation, groups, size, relu
    return _in_channels_last(torch_calls.dilated_conv2d, 1, input, weight, bias, residual, numbers)


def conv_transpose2d(input, weight, bias, residual, stride, padding, dilation, groups, size, relu):
    numbers = stride, padding, dilation, groups, size, relu
    return _in_channels_last(torch_calls.conv_transpose2d, 0, input, weight, bias, residual, numbers)


def _in_channels_last(convolve, axis, input, weight, bias, residual, numbers):
    """Computes in channels_last and the accumulator's dtype; the result has the dtype and format of `input`.

    axis: of the weight's input channels.

    torch's channels_last convolution adds all input channels in one chain, its NCHW convolution in parts, which rounds
    less. To round as little, NCHW images are summed in parts here, too.

    The bias is added separately: with one, torch's channels_last convolution crashes for, among others, kernels of 1x1
    on 5 columns with a stride of 8, a padding of 3 and a dilation of 12 (2.13).
    """
    dtype, layout, (*numbers, relu) = accumulator(input.dtype), image_format(input), numbers
    image = input.to(dtype).contiguous(memory_format=torch.channels_last)
    weight, groups = weight.to(dtype), numbers[3]
    parts = [(image, weight)]
    if image.shape[1] > CHAIN and layout is torch.contiguous_format and groups == 1 and input.dtype == dtype:
        parts = zip(image.split(CHAIN, 1), weight.split(CHAIN, axis))
    output = None
    for part in parts:
        product = convolve(*part, None, None, *numbers, False)
        output = product if output is None else output.add_(product)
    if bias is not None:
        output.add_(bias.to(dtype).view(-1, 1, 1))
    output = torch_calls.finish(output, residual, relu)
    output = output.to(input.dtype)
    return _contiguous(output) if layout is torch.contiguous_format else output.contiguous(memory_format=layout)


def _contiguous(image):
    """`image.contiguous()` of a channels_last image, as matrices, which torch transposes faster.

    The result is not a view: autograd refuses changes in place, such as those of ReLUs, of a view that an op returns.
    """
    if image.is_contiguous():
        return image
    result = image.new_empty(image.shape)
    for to, pixels in zip(result.flatten(2), image.permute(0, 2, 3, 1)):
        to.copy_(pixels.reshape(-1, image.shape[1]).t())
    return result


def conv2d_grad_weight(input, grad_output, stride, padding, dilation, groups, kernel_size, channels_last):
    """One GEMM per tap over the rectangle of outputs that it reaches, of all images."""
    dtype = input.dtype
    input, grad_output = input.to(accumulator(dtype)), grad_output.to(accumulator(dtype))
    if groups > 1:
        windows = stride, padding, dilation, groups
        return torch_calls.conv2d_grad_weight(input, grad_output, *windows, kernel_size, channels_last).to(dtype)
    taps = input.new_zeros((*kernel_size, grad_output.shape[1], input.shape[1]))  # [R, S, K, C]
    for s in range(kernel_size[1]):
        columns, seen_columns = _reach(input.shape[3], grad_output.shape[3], stride[1], padding[1], s * dilation[1])
        seen, grad = input[..., seen_columns], grad_output[..., columns]
        if len(input) == 1:  # one copy of these columns serves all taps of a column: each takes some of its rows
            layout = image_format(input)
            seen, grad = seen.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
        for r in range(kernel_size[0]):
            rows, seen_rows = _reach(input.shape[2], grad_output.shape[2], stride[0], padding[0], r * dilation[0])
            if rows.start < rows.stop and columns.start < columns.stop:  # else the tap is always in the padding
                torch.mm(_by_pixel(grad[:, :, rows]).t(), _by_pixel(seen[:, :, seen_rows]), out=taps[r, s])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return taps.permute(2, 3, 0, 1).to(dtype).contiguous(memory_format=layout)


def _by_pixel(image):
    """(N, C, H, W) as a matrix of pixels by channels; a copy, except for whole rows of one image."""
    if image.stride(1) == 1:
        return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])
    return image.permute(1, 0, 2, 3).reshape(image.shape[1], -1).t()


def _reach(extent, out_extent, stride, padding, offset):
    """Two slices: the outputs whose tap at `offset` lies inside of the input, and the inputs that it reads."""
    first = max(0, -(-(padding - offset) // stride))
    last = max(first, min(out_extent, (extent - 1 + padding - offset) // stride + 1))
    start = first * stride - padding + offset
    return slice(first, last), slice(start, start + (last - first - 1) * stride + 1, stride)
