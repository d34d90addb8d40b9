"""The convolutions of GoogLeNet (Szegedy et al. 2015) in the original form: biases, no batch normalisation.

The names of the layers are torchvision's, but its files do not fit: torchvision's ``googlenet`` has batch normalisation
instead of biases and 3x3 kernels instead of 5x5.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastseg.models.blocks.convolution import initialise_he_, layer_block, scaled_width
from fastseg.models.blocks.normalisation import LocalResponseNorm
from fastseg.nn import MaxPool2d


class Widths(NamedTuple):
    """Output channels of the convolutions of an inception block."""

    one: int
    three_reduced: int
    three: int
    five_reduced: int
    five: int
    projected: int


INCEPTION = {
    "inception3a": Widths(64, 96, 128, 16, 32, 32),
    "inception3b": Widths(128, 128, 192, 32, 96, 64),
    "inception4a": Widths(192, 96, 208, 16, 48, 64),
    "inception4b": Widths(160, 112, 224, 24, 64, 64),
    "inception4c": Widths(128, 128, 256, 24, 64, 64),
    "inception4d": Widths(112, 144, 288, 32, 64, 64),
    "inception4e": Widths(256, 160, 320, 32, 128, 128),
    "inception5a": Widths(256, 160, 320, 32, 128, 128),
    "inception5b": Widths(384, 192, 384, 48, 128, 128),
}
POOLED_AFTER = ("inception3b", "inception4e")


class Inception(nn.Module):
    """1x1; 1x1 and 3x3; 1x1 and 5x5; 3x3 max pooling and 1x1: the results joined, `channels` in all."""

    def __init__(self, in_channels: int, widths: Widths):
        super().__init__()
        self.branch1 = _convolution(in_channels, widths.one, 1)
        self.branch2 = nn.Sequential(
            _convolution(in_channels, widths.three_reduced, 1), _convolution(widths.three_reduced, widths.three, 3)
        )
        self.branch3 = nn.Sequential(
            _convolution(in_channels, widths.five_reduced, 1), _convolution(widths.five_reduced, widths.five, 5)
        )
        self.branch4 = nn.Sequential(MaxPool2d(3, 1, 1), _convolution(in_channels, widths.projected, 1))
        self.channels = widths.one + widths.three + widths.five + widths.projected

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([self.branch1(image), self.branch2(image), self.branch3(image), self.branch4(image)], 1)


class GoogLeNet(nn.Module):
    """The layers up to inception 5b: an image to maps at stride 32.

    Args:
        in_channels: channels of the image.
        width_multiplier: every convolution has ``round(width * width_multiplier)`` channels, at least 1.
        first_padding: padding of ``conv1``.

    Attributes:
        channels: of the map.
    """

    def __init__(self, in_channels: int, width_multiplier: float, *, first_padding: int = 3):
        super().__init__()
        narrow, channels = (scaled_width(width, width_multiplier) for width in (64, 192))
        self.conv1 = _convolution(in_channels, narrow, 7, stride=2, padding=first_padding)
        self.conv2 = _convolution(narrow, narrow, 1)
        self.conv3 = _convolution(narrow, channels, 3)
        for name, widths in INCEPTION.items():
            block = Inception(channels, Widths(*(scaled_width(width, width_multiplier) for width in widths)))
            self.add_module(name, block)
            channels = block.channels
        self.pool = MaxPool2d(3, 2, ceil_mode=True)
        self.norm = LocalResponseNorm()
        self.channels = channels

    def torchvision_names(self, prefix: str) -> dict[str, str]:
        """{path of a convolution, which begins with `prefix`: its name in torchvision's GoogLeNet}."""
        paths = [path for path, layer in self.named_modules() if isinstance(layer, nn.Conv2d)]
        return {f"{prefix}{path}": f"{path.removesuffix('layer')}conv" for path in paths}

    def forward(self, image: Tensor) -> Tensor:
        image = self.norm(self.pool(self.conv1(image)))
        image = self.pool(self.norm(self.conv3(self.conv2(image))))
        for name in INCEPTION:
            image = self.get_submodule(name)(image)
            if name in POOLED_AFTER:
                image = self.pool(image)
        return image


def _convolution(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding: int | None = None
) -> nn.Sequential:
    """With bias and ReLU; by default with the padding that keeps the size at stride 1."""
    padding = kernel_size // 2 if padding is None else padding
    return layer_block(initialise_he_(nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)))
