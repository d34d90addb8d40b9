"""The dense maps on the CPU, from torch's GEMM and its channels_last convolution: README.md says why."""

import torch

from fastseg._layout import image_format
from fastseg.kernels.convolution import torch_calls


def dilated_conv2d(input, weight, bias, residual, stride, padding, dilation, groups, size, relu):
    layout = image_format(input)
    image = input.contiguous(memory_format=torch.channels_last)
    output = torch_calls.dilated_conv2d(image, weight, bias, residual, stride, padding, dilation, groups, size, relu)
    return output.contiguous(memory_format=layout)


def conv_transpose2d(input, weight, bias, residual, stride, padding, dilation, groups, size, relu):
    layout = image_format(input)
    image = input.contiguous(memory_format=torch.channels_last)
    output = torch_calls.conv_transpose2d(image, weight, bias, residual, stride, padding, dilation, groups, size, relu)
    return output.contiguous(memory_format=layout)


def conv2d_grad_weight(input, grad_output, stride, padding, dilation, groups, kernel_size, channels_last):
    """One GEMM per tap over the rectangle of outputs that it reaches, with pixels for rows."""
    if groups > 1:
        windows = stride, padding, dilation, groups
        return torch_calls.conv2d_grad_weight(input, grad_output, *windows, kernel_size, channels_last)
    images = input.permute(0, 2, 3, 1)  # [N, H, W, C], dense
    gradients = grad_output.permute(0, 2, 3, 1)  # [N, OH, OW, K]
    if image_format(input) is torch.contiguous_format:
        images, gradients = images.contiguous(), gradients.contiguous()
    channels, out_channels = images.shape[3], gradients.shape[3]
    taps = input.new_zeros((*kernel_size, out_channels, channels))
    for r in range(kernel_size[0]):
        top, bottom, first_row = _reach(images.shape[1], gradients.shape[1], stride[0], padding[0], r * dilation[0])
        for s in range(kernel_size[1]):
            left, right, first = _reach(images.shape[2], gradients.shape[2], stride[1], padding[1], s * dilation[1])
            if top >= bottom or left >= right:
                continue  # in the padding everywhere
            rows = slice(first_row, first_row + (bottom - top - 1) * stride[0] + 1, stride[0])
            columns = slice(first, first + (right - left - 1) * stride[1] + 1, stride[1])
            seen = images[:, rows, columns].reshape(-1, channels)
            grad = gradients[:, top:bottom, left:right].reshape(-1, out_channels)
            torch.mm(grad.t(), seen, out=taps[r, s])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return taps.permute(2, 3, 0, 1).contiguous(memory_format=layout)


def _reach(extent, out_extent, stride, padding, offset):
    """The outputs [first, last) whose tap at `offset` lies inside of the input, and where it lies for the first."""
    first = max(0, -(-(padding - offset) // stride))
    last = min(out_extent, (extent - 1 + padding - offset) // stride + 1)
    return first, last, first * stride - padding + offset
