"""Bilinear upsampling by a whole factor: transposed convolution (fixed or learned) or interpolation."""

import torch
from torch import nn

MODES = ("fixed", "learned", "interp")


def bilinear_kernel(size):
    """The ``(size, size)`` bilinear taps ``(1 - |i - c| / f) (1 - |j - c| / f)``.

    ``f = (size + 1) // 2`` is the upsampling factor the kernel is made for and ``c`` its centre: ``f - 1``
    for odd sizes, ``f - 1/2`` for even ones (Long, Shelhamer, Darrell: Fully convolutional networks, 2015).
    """
    factor = (size + 1) // 2
    centre = factor - 1 if size % 2 == 1 else factor - 0.5
    taps = 1 - (torch.arange(size) - centre).abs() / factor
    return taps[:, None] * taps[None, :]


@torch.no_grad()
def initialise_bilinear_(deconvolution):
    """Make a ``ConvTranspose2d`` with equal input and output channels upsample each channel by itself."""
    weight = deconvolution.weight  # [C, C, k, k]
    channels = torch.arange(weight.shape[0], device=weight.device)
    weight.zero_()
    weight[channels, channels] = bilinear_kernel(weight.shape[-1]).to(weight)
    return deconvolution


def upsampling_layer(channels, stride, padding, mode):
    """A layer that upsamples ``(N, channels, h, w)`` by ``stride``.

    ``mode``: ``"learned"`` is a bias-free transposed convolution with kernel ``2 stride``, started from
    bilinear taps; ``"fixed"`` is the same layer with ``requires_grad=False``, so optimisers leave it alone
    while checkpoints keep it; ``"interp"`` is bilinear interpolation with half-pixel centres
    (``align_corners=False``), which has no parameters. With ``padding = stride / 2`` all three start on the
    same sampling grid and differ only within ``stride / 2`` pixels of the border, where a transposed
    convolution fades to zero.
    """
    if mode == "interp":
        return nn.Upsample(scale_factor=stride, mode="bilinear", align_corners=False)
    layer = nn.ConvTranspose2d(channels, channels, 2 * stride, stride, padding, bias=False)
    initialise_bilinear_(layer)
    layer.weight.requires_grad_(mode == "learned")
    return layer
