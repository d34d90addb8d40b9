"""The convolutions of AlexNet in Caffe's form (Krizhevsky, Sutskever, Hinton 2012; CaffeNet normalises after pooling).

torchvision's ``alexnet`` is another network (other widths, no groups, no normalisation); its files do not fit.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fastseg.models.blocks.convolution import initialise_he_, scaled_width
from fastseg.models.blocks.normalisation import LocalResponseNorm
from fastseg.nn import MaxPool2d

CHANNELS = (96, 256, 384, 384, 256)
GROUPS = 2  # of the second, fourth and fifth convolution


class AlexNet(nn.Module):
    """``conv1`` to ``conv5`` and three poolings: an image to maps at stride 32.

    Args:
        in_channels: channels of the image.
        width_multiplier: every layer has about ``width * width_multiplier`` channels, an even number.
        first_padding: padding of ``conv1``.

    Attributes:
        channels: of the map.
    """

    def __init__(self, in_channels: int, width_multiplier: float, *, first_padding: int = 0):
        super().__init__()
        widths = [GROUPS * scaled_width(width // GROUPS, width_multiplier) for width in CHANNELS]
        self.conv1 = initialise_he_(nn.Conv2d(in_channels, widths[0], 11, 4, padding=first_padding))
        self.conv2 = initialise_he_(nn.Conv2d(widths[0], widths[1], 5, padding=2, groups=GROUPS))
        self.conv3 = initialise_he_(nn.Conv2d(widths[1], widths[2], 3, padding=1))
        self.conv4 = initialise_he_(nn.Conv2d(widths[2], widths[3], 3, padding=1, groups=GROUPS))
        self.conv5 = initialise_he_(nn.Conv2d(widths[3], widths[4], 3, padding=1, groups=GROUPS))
        self.pool = MaxPool2d(3, 2, ceil_mode=True)
        self.norm = LocalResponseNorm()
        self.channels = widths[-1]

    def forward(self, image: Tensor) -> Tensor:
        for layer in (self.conv1, self.conv2):
            image = self.norm(self.pool(F.relu(layer(image), inplace=True)))
        for layer in (self.conv3, self.conv4, self.conv5):
            image = F.relu(layer(image), inplace=True)
        return self.pool(image)
