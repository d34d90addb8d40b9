"""The three maps by PyTorch's own convolution: what `auto` runs where stock is fastest."""

import torch
import torch.nn.functional as F


def _ends(input, kernel_size, stride, padding, dilation, size):
    """The padding (bottom, right) that makes the output `size`, or None if `padding` at both ends does."""
    ends = [
        (size[axis] - 1) * stride[axis]
        + dilation[axis] * (kernel_size[axis] - 1)
        + 1
        - input.shape[2 + axis]
        - padding[axis]
        for axis in (0, 1)
    ]
    if 0 <= padding[0] - ends[0] < stride[0] and 0 <= padding[1] - ends[1] < stride[1]:
        return None
    return ends


def padded(input, kernel_size, stride, padding, dilation, size):
    """(input, padding) with which torch's convolution gives `size`."""
    ends = _ends(input, kernel_size, stride, padding, dilation, size)
    if ends is None:
        return input, padding
    return F.pad(input, (padding[1], ends[1], padding[0], ends[0])), (0, 0)


def dilated_conv2d(input, weight, bias, residual, stride, padding, dilation, groups, size, relu):
    input, padding = padded(input, weight.shape[2:], stride, padding, dilation, size)
    return finish(torch.conv2d(input, weight, bias, stride, padding, dilation, groups), residual, relu)


def conv_transpose2d(input, weight, bias, residual, stride, padding, dilation, groups, size, relu):
    spans = [(input.shape[2 + i] - 1) * stride[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1 for i in (0, 1)]
    most = [max(pair) - 1 for pair in zip(stride, dilation)]  # that torch accepts as output_padding
    missing = [size[i] - spans[i] + 2 * padding[i] for i in (0, 1)]
    first = (0, 0)
    if missing[0] > most[0] or missing[1] > most[1]:  # compute the uncropped map, then cut out `size`
        first, padding = padding, (0, 0)
        missing = [first[i] + size[i] - spans[i] for i in (0, 1)]
    output_padding = [max(0, missing[0]), max(0, missing[1])]
    output = torch.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    if first != (0, 0) or min(missing) < 0:
        output = output[:, :, first[0] : first[0] + size[0], first[1] : first[1] + size[1]]
    return finish(output, residual, relu)


def conv2d_grad_weight(input, grad_output, stride, padding, dilation, groups, kernel_size, channels_last):
    input, padding = padded(input, kernel_size, stride, padding, dilation, grad_output.shape[2:])
    shape = grad_output.shape[1], input.shape[1] // groups, *kernel_size
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.ops.aten.convolution_backward(
        grad_output, input, input.new_empty(shape), None, stride, padding, dilation, False, (0, 0), groups,
        (False, True, False),
    )[1].contiguous(memory_format=layout)  # fmt: skip


def finish(output, residual, relu):
    if residual is not None:
        output = output + residual
    return output.relu_() if relu else output
