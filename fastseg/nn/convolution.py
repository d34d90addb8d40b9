"""`Conv2d` and `ConvTranspose2d`, drop-ins for torch's, and `BilinearUpsample2d`."""

import torch
from torch import fx, nn

from fastseg import ops
from fastseg._bilinear import bilinear_kernel
from fastseg.nn._drop_in import drop_in


def _is_dilated_or_depthwise(module):
    return max(module.dilation) > 1 or 1 < module.groups == module.in_channels == module.out_channels


def _why_not(module):
    if module.weight.dtype.is_complex or not module.weight.dtype.is_floating_point:
        return f"weights of {module.weight.dtype}"
    return None


@drop_in(nn.Conv2d, concerns=_is_dilated_or_depthwise, why_not=_why_not)
class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` through `fastseg.ops.dilated_conv2d`, where shapes and errors are documented.

    `fastseg.accelerate` uses it for dilated and for depthwise convolutions; others always run stock's code. Besides
    the input, ``forward`` takes ``residual``, ``activation`` and ``out`` of that function.
    """

    def forward(self, input, *, residual=None, activation=None, out=None):
        """The keywords are those of `fastseg.ops.dilated_conv2d`."""
        padding = self.padding
        if self.padding_mode != "zeros":
            input = nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return ops.dilated_conv2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            activation=activation,
            residual=residual,
            out=out,
        )


@drop_in(nn.ConvTranspose2d, why_not=_why_not)
class ConvTranspose2d(nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` through `fastseg.ops.conv_transpose2d`, where shapes and errors are documented.

    Besides the input and ``output_size``, ``forward`` takes ``skip``, ``skip_offset``, ``crop``, ``activation`` and
    ``out`` of that function.
    """

    def forward(self, input, output_size=None, *, skip=None, skip_offset=0, crop=None, activation=None, out=None):
        """The keywords are those of `fastseg.ops.conv_transpose2d`."""
        if isinstance(input, fx.Proxy):
            output = nn.ConvTranspose2d.forward(self, input, output_size)
            return _in_stock_calls(output, skip, skip_offset, crop, activation)
        dimensions = 2
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dimensions, self.dilation
        )
        return ops.conv_transpose2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
            skip=skip,
            skip_offset=skip_offset,
            crop=crop,
            activation=activation,
            out=out,
        )


def _in_stock_calls(output, skip, offset, crop, activation):
    """The operations after a transposed convolution, in stock calls, for torch.fx to record."""
    if crop is not None:
        top, left, height, width = crop
        output = output[..., top : top + height, left : left + width]
    if skip is not None:
        skip = skip[..., offset : offset + output.shape[-2], offset : offset + output.shape[-1]]
        output = output[..., : skip.shape[-2], : skip.shape[-1]] + skip
    return output.relu() if activation == "relu" else output


class BilinearUpsample2d(ConvTranspose2d):
    """Bilinear upsampling of (N, channels, h, w) as the transposed convolution of FCN; its key is ``weight``.

    Weights (channels, channels, k, k), or (channels, 1, k, k) per channel, start bilinear, for each channel separately.
    While they stay so, rows and columns are interpolated one after the other and the zeros between channels are not
    multiplied. With ``kernel_size = 2 scale_factor`` and ``padding = scale_factor / 2`` the result equals bilinear
    interpolation with ``align_corners=False`` except at a border of ``scale_factor / 2`` pixels, where it fades to
    zero; with ``kernel_size = 2 scale_factor - 1`` and ``padding = scale_factor - 1`` it equals that with
    ``align_corners=True``.

    Args:
        channels: of input and output.
        scale_factor: the stride.
        padding: rows and columns removed at each border.
        kernel_size: by default ``2 scale_factor``.
        learned: whether the weights are trained (the general kernel then runs, as they do not stay bilinear).
        per_channel: one kernel for each channel, ``groups=channels``, instead of the release's dense weights.
    """

    def __init__(self, channels, scale_factor, padding=0, *, kernel_size=None, learned=False, per_channel=False):
        kernel_size = 2 * scale_factor if kernel_size is None else kernel_size
        groups = channels if per_channel else 1
        super().__init__(channels, channels, kernel_size, scale_factor, padding, groups=groups, bias=False)
        self.weight.requires_grad_(learned)

    @torch.no_grad()
    def reset_parameters(self):
        taps = bilinear_kernel(self.kernel_size[0]).to(self.weight)
        self.weight.zero_()
        channels = torch.arange(self.in_channels, device=self.weight.device)
        self.weight[channels, channels if self.groups == 1 else 0] = taps
