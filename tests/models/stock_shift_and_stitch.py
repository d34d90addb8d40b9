"""Dense outputs of a strided network from shifted images, and the same from dilation, in stock torch.nn."""

import torch
import torch.nn.functional as F
from torch import nn


def shift_and_stitch(network, image, stride):
    """The outputs of ``network``, whose output has the given stride, at every pixel where its unpadded window fits.

    The image is moved right and down by each (dx, dy) below the stride; output (y, x) of that pass belongs to
    (y * stride - dy, x * stride - dx). Those before the image's first pixel saw the filling and are dropped.
    The network must not pad, and its pooling must round down.
    """
    found = {}
    for dy in range(stride):
        for dx in range(stride):
            outputs = network(F.pad(image, (dx, 0, dy, 0)))
            for y in range(outputs.shape[2]):
                for x in range(outputs.shape[3]):
                    place = (y * stride - dy, x * stride - dx)
                    if min(place) >= 0:
                        found[place] = outputs[:, :, y, x]
    height, width = (1 + max(place[axis] for place in found) for axis in (0, 1))
    return torch.stack([torch.stack([found[y, x] for x in range(width)], -1) for y in range(height)], -2)


def at_stride_one(stack):
    """The layers of a sequence of convolutions, max poolings and anything pointwise with every stride 1.

    Each layer after a removed stride has its taps that much further apart. The convolutions share their weights.
    """
    layers, apart = [], 1
    for layer in stack:
        if isinstance(layer, nn.Conv2d):
            side, step, rate = layer.kernel_size[0], layer.stride[0], layer.dilation[0]
            assert layer.padding == (0, 0)
            dense = nn.Conv2d(layer.in_channels, layer.out_channels, side, 1, 0, apart * rate, layer.groups)
            dense.weight, dense.bias = layer.weight, layer.bias
        elif isinstance(layer, nn.MaxPool2d):
            step = layer.stride
            assert layer.padding == 0 and not layer.ceil_mode
            dense = nn.MaxPool2d(layer.kernel_size, 1, 0, apart * layer.dilation)
        else:
            step, dense = 1, layer
        layers.append(dense)
        apart *= step
    return nn.Sequential(*layers)
