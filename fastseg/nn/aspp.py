"""Atrous spatial pyramid pooling (Chen et al. 2017: Rethinking atrous convolution for semantic segmentation)."""

import torch
import torch.nn.functional as F
from torch import nn

from fastseg import ops
from fastseg._dtypes import is_autocast
from fastseg._layout import image_format
from fastseg.nn.convolution import Conv2d


class ASPP(nn.Module):
    """A 1x1 branch, dilated 3x3 branches and an image-pooling branch on (N, in_channels, H, W), then a projection.

    The same result and the same keys as ``torchvision.models.segmentation.deeplabv3.ASPP``: ``convs.0.{0,1}``,
    ``convs.1.{0,1}``, ..., pooling ``convs.4.{1,2}``, ``project.{0,1}``. Two steps are computed differently:

    * the pooled branch is the same at every pixel, so its part of the projection is a bias per image;
    * without gradients and with fixed statistics, normalisation is folded into the convolutions, and branches
      write the result of their ReLU directly into the channels of one buffer.

    Args:
        in_channels: of the input.
        atrous_rates: of the 3x3 branches.
        out_channels: of every branch and of the result.
        dropout: probability after the projection.
        separable: the 3x3 branches are a depthwise and a 1x1 convolution, each normalised and followed by a ReLU, as in
            DeepLab v3+ on Xception; keys ``convs.1.{0,1,3,4}``.
        norm: makes the normalisation of so many channels.

    Raises:
        ValueError: in training with one image, as in torch: a batch normalisation gets a single pooled value.
    """

    def __init__(
        self, in_channels, atrous_rates, out_channels=256, *, dropout=0.5, separable=False, norm=nn.BatchNorm2d
    ):
        super().__init__()
        make_branch = separable_block if separable else convolution_block
        branches = [convolution_block(in_channels, out_channels, kernel_size=1, norm=norm)]
        branches += [make_branch(in_channels, out_channels, rate=rate, norm=norm) for rate in atrous_rates]
        pooling = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            norm(out_channels),
            nn.ReLU(),
        )
        self.convs = nn.ModuleList([*branches, pooling])
        self.project = nn.Sequential(
            nn.Conv2d(len(self.convs) * out_channels, out_channels, 1, bias=False),
            norm(out_channels),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def forward(self, input):
        *branches, pooling = self.convs
        convolution, *layers_after = self.project
        channels = convolution.in_channels - convolution.out_channels
        weight, pooling_weight = convolution.weight.split([channels, convolution.out_channels], 1)
        per_image = F.conv2d(pooling(input), pooling_weight)  # (N, out_channels, 1, 1)
        if _may_fold(branches, input):
            joined = _joined(branches, input)
        else:
            joined = torch.cat([branch(input) for branch in branches], 1)
        output = ops.dilated_conv2d(joined, weight, residual=per_image)
        for module in layers_after:
            output = module(output)
        return output


def convolution_block(in_channels, out_channels, *, kernel_size=3, rate=1, groups=1, norm=nn.BatchNorm2d):
    """A dilated convolution that keeps the size, normalisation, ReLU; keys ``0`` and ``1``."""
    options = dict(padding=rate * (kernel_size // 2), dilation=rate, groups=groups, bias=False)
    return nn.Sequential(
        Conv2d(in_channels, out_channels, kernel_size, **options), norm(out_channels), nn.ReLU(inplace=True)
    )


def separable_block(in_channels, out_channels, *, rate=1, norm=nn.BatchNorm2d):
    """A depthwise 3x3 and a 1x1 convolution, each with normalisation and ReLU; keys ``0``, ``1``, ``3``, ``4``."""
    return nn.Sequential(
        *convolution_block(in_channels, in_channels, rate=rate, groups=in_channels, norm=norm),
        *convolution_block(in_channels, out_channels, kernel_size=1, norm=norm),
    )


def _steps(branch):
    """[(convolution, normalisation, ReLU), ...]"""
    layers = list(branch)
    return [layers[first : first + 3] for first in range(0, len(layers), 3)]


def _may_fold(branches, input):
    """True if no gradient, statistics or hook needs the values between a convolution and its ReLU."""
    if torch.is_grad_enabled() or is_autocast(input):
        return False
    for convolution, norm, relu in (step for branch in branches for step in _steps(branch)):
        computes_alike = type(norm).forward is nn.BatchNorm2d.forward  # true of frozen normalisation
        if not computes_alike or norm.training or norm.running_var is None or norm.weight is None:
            return False
        if any(module._forward_hooks or module._forward_pre_hooks for module in (convolution, norm, relu)):
            return False
    return True


def _joined(branches, input):
    """The results of the branches in consecutive channels of one buffer."""
    width = branches[0][0].out_channels
    shape = input.shape[0], len(branches) * width, *input.shape[2:]
    buffer = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=image_format(input))
    for place, branch in enumerate(branches):
        *steps, last = _steps(branch)
        image = input
        for step in steps:
            image = _folded(image, step)
        _folded(image, last, out=buffer[:, place * width : (place + 1) * width])
    return buffer


def _folded(input, step, out=None):
    """The convolution, normalisation by fixed statistics and ReLU of `step` as one convolution."""
    convolution, norm, _ = step
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    return ops.dilated_conv2d(
        input,
        (convolution.weight * scale.view(-1, 1, 1, 1)).to(input.dtype),
        shift.to(input.dtype),
        padding=convolution.padding,
        dilation=convolution.dilation,
        groups=convolution.groups,
        activation="relu",
        out=out,
    )
