"""Pyramid pooling (Zhao et al. 2017: Pyramid scene parsing network)."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from fastseg import ops
from fastseg._dtypes import accumulator, is_autocast


class PyramidPooling(nn.Module):
    """(N, in_channels, H, W) and its means over ``b x b`` bins, reduced by a 1x1 convolution and upsampled.

    Keys as in semseg: ``features.{i}.{1,2}``. As semseg's module, ``forward`` concatenates the map and all upsampled
    maps to (N, in_channels + len(bins) reduction_channels, H, W). A convolution always follows: `convolved` computes
    both without the upsampled maps.

    Args:
        in_channels: of the map.
        reduction_channels: of each pooled map.
        bins: numbers of bins along an axis.
        align_corners: of the upsampling; PSPNet's is True.
        norm: makes the normalisation of so many channels.
    """

    def __init__(self, in_channels, reduction_channels, bins=(1, 2, 3, 6), *, align_corners=True, norm=nn.BatchNorm2d):
        super().__init__()
        self.in_channels = in_channels
        self.align_corners = align_corners
        self.features = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(count),
                nn.Conv2d(in_channels, reduction_channels, 1, bias=False),
                norm(reduction_channels),
                nn.ReLU(inplace=True),
            )
            for count in bins
        )

    def forward(self, input):
        size = input.shape[2:]
        upsampled = [
            ops.upsample_bilinear2d(feature(input), size, align_corners=self.align_corners) for feature in self.features
        ]
        return torch.cat([input, *upsampled], 1)

    def convolved(self, input, convolution):
        """``convolution(self(input))``, exactly, without the upsampled maps.

        Upsampling and convolution are linear: tap (r, s) of an upsampled map is the bins of the map, multiplied by the
        weights of the tap, interpolated to rows shifted by r and columns shifted by s. So the few bins are multiplied
        by the weights before the interpolation. Half of the work of PSPNet's 3x3 convolution remains: on ``input``.

        Args:
            input: (N, in_channels, H, W).
            convolution: ``nn.Conv2d`` with stride 1 and zero padding on all channels of ``self(input)``.

        Raises:
            ValueError: a convolution with a stride, groups, other padding modes or another number of channels.
        """
        channels = self.in_channels + sum(feature[1].out_channels for feature in self.features)
        _check_convolution(convolution, channels)
        sizes = [self.in_channels, *(feature[1].out_channels for feature in self.features)]
        weight, *of_bins = convolution.weight.split(sizes, 1)
        first, last = _paddings(convolution)
        size = [
            input.shape[2 + axis]
            + first[axis]
            + last[axis]
            - convolution.dilation[axis] * (convolution.kernel_size[axis] - 1)
            for axis in (0, 1)
        ]
        reduced = [feature(input) for feature in self.features]
        with torch.autocast(input.device.type, enabled=False) if is_autocast(input) else nullcontext():
            residual = sum(
                self._convolved_bins(bins, taps, input.shape[2:], size, first, convolution.dilation)
                for bins, taps in zip(reduced, of_bins)
            ).to(reduced[0].dtype)
        numbers = 1, convolution.padding, convolution.dilation
        return ops.dilated_conv2d(input, weight, convolution.bias, *numbers, residual=residual)

    def _convolved_bins(self, bins, weight, extents, size, padding, dilation):
        """The convolution of one upsampled map from its (N, C, b, b) bins and weight (K, C, R, S): (N, K, *size).

        In fp32 for half types: it is little work, and interpolation needs the precision.
        """
        bins, weight = bins.to(accumulator(bins.dtype)), weight.to(accumulator(bins.dtype))
        counts, taps = bins.shape[2:], weight.shape[2:]
        rows, columns = (
            self._interpolation(bins, counts[i], extents[i], size[i], padding[i], dilation[i], taps[i]) for i in (0, 1)
        )
        met = torch.einsum("ncij,kcrs->nkirjs", bins, weight)
        images, channels = met.shape[:2]
        tall = torch.einsum("nkirjs,yri->nkyjs", met, rows)
        return torch.einsum("nkyjs,xsj->nkyx", tall, columns).reshape(images, channels, *size)

    def _interpolation(self, like, count, extent, size, padding, dilation, taps):
        """[size, taps, count]: the weight of each bin in each tap of an output along an axis, 0 for taps outside."""
        identity = torch.eye(count, dtype=like.dtype, device=like.device).unsqueeze(0)  # (1, count, count)
        if count == 1:
            weights = identity.expand(1, 1, extent)
        else:
            weights = F.interpolate(identity, extent, mode="linear", align_corners=self.align_corners)
        end = size + dilation * (taps - 1) - padding - extent
        weights = F.pad(weights[0], (padding, max(0, end)))  # [count, padded extent]
        seen = torch.stack([weights[:, tap * dilation : tap * dilation + size] for tap in range(taps)])
        return seen.permute(2, 0, 1)


def _check_convolution(convolution, channels):
    name = "fastseg.nn.PyramidPooling: convolution"
    if convolution.in_channels != channels:
        raise ValueError(f"{name} has {convolution.in_channels} input channels; allowed: {channels}")
    if convolution.groups != 1 or set(convolution.stride) != {1} or convolution.padding_mode != "zeros":
        given = f"stride={convolution.stride}, groups={convolution.groups}, padding_mode={convolution.padding_mode!r}"
        raise ValueError(f"{name} has {given}; allowed: stride 1, groups 1 and zeros around the map")


def _paddings(convolution):
    """(top, left) and (bottom, right)."""
    left, right, top, bottom = convolution._reversed_padding_repeated_twice
    return (top, left), (bottom, right)
