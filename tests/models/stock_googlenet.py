"""The original GoogLeNet, with biases, and FCN-32s on it in stock torch.nn, without a line of fastseg.models."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.models.stock_alexnet import bilinear, neighbours_normalised

# channels: in; 1x1; 3x3 reduced, 3x3; 5x5 reduced, 5x5; projection after pooling
INCEPTION = {
    "3a": (192, 64, 96, 128, 16, 32, 32),
    "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64),
    "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64),
    "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128),
    "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}


class StockConvolved(nn.Module):
    """A convolution that keeps the size at stride 1 and ReLU; if normalised, batch normalisation instead of a bias."""

    def __init__(self, channels_in, channels_out, kernel, normalised, stride=1, padding=None):
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=not normalised)
        self.bn = nn.BatchNorm2d(channels_out, eps=1e-3) if normalised else nn.Identity()

    def forward(self, image):
        return torch.relu(self.bn(self.conv(image)))


class StockInception(nn.Module):
    """1x1; 3x3 and 5x5 after a reduction; 3x3 max pooling and a projection: joined in this order."""

    def __init__(self, channels_in, ones, reduced3, threes, reduced5, fives, projected, stock):
        super().__init__()
        self.branch1 = StockConvolved(channels_in, ones, 1, stock)
        self.branch2 = nn.Sequential(
            StockConvolved(channels_in, reduced3, 1, stock), StockConvolved(reduced3, threes, 3, stock)
        )
        self.branch3 = nn.Sequential(
            StockConvolved(channels_in, reduced5, 1, stock), StockConvolved(reduced5, fives, 3 if stock else 5, stock)
        )
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), StockConvolved(channels_in, projected, 1, stock))
        self.channels = ones + threes + fives + projected

    def forward(self, image):
        branches = (self.branch1, self.branch2, self.branch3, self.branch4)
        return torch.cat([branch(image) for branch in branches], dim=1)


class StockGoogLeNet(nn.Module):
    """The trunk up to inception 5b, at stride 32, with torchvision's keys. padding: of the first convolution.

    stock: torchvision's network, which has batch normalisation for biases and for local response normalisation, 3x3
    kernels in place of 5x5 and a last pooling of 2x2.
    """

    def __init__(self, width=1.0, in_channels=3, padding=3, stock=False):
        super().__init__()
        narrow, wide = int(64 * width), int(192 * width)
        self.stock = stock
        self.conv1 = StockConvolved(in_channels, narrow, 7, stock, 2, padding)
        self.conv2 = StockConvolved(narrow, narrow, 1, stock)
        self.conv3 = StockConvolved(narrow, wide, 3, stock)
        entering = wide  # from here on the sum of what each join was given, which may be less than the table's scaled
        for name, channels in INCEPTION.items():
            block = StockInception(entering, *(int(count * width) for count in channels[1:]), stock)
            self.add_module(f"inception{name}", block)
            entering = block.channels
        self.channels = entering

    def features(self, image):
        normalised = nn.Identity() if self.stock else neighbours_normalised
        image = normalised(F.max_pool2d(self.conv1(image), 3, 2, ceil_mode=True))
        image = normalised(self.conv3(self.conv2(image)))
        image = F.max_pool2d(image, 3, 2, ceil_mode=True)
        for name in INCEPTION:
            image = self.get_submodule(f"inception{name}")(image)
            if name in ("3b", "4e"):
                image = F.max_pool2d(image, 2 if self.stock and name == "4e" else 3, 2, ceil_mode=True)
        return image

    def forward(self, image):
        return self.features(image)


class StockFCN32sGoogLeNet(StockGoogLeNet):
    """One 1x1 score layer, enlarged 32 times.

    padding: "same" (an image is first filled with zeros to multiples of 32, at its far ends) or "pad100" (the first
    convolution is padded by 100, and the image's part is cut from the middle, rounded down).
    """

    def __init__(self, classes=21, width=1.0, in_channels=3, padding="same", stock=False):
        super().__init__(width, in_channels, 100 if padding == "pad100" else 3, stock)
        self.padding = padding
        self.score_fr = nn.Conv2d(self.channels, classes, 1)
        self.upscore = bilinear(classes, 64, 32, 16 if padding == "same" else 0)

    def forward(self, image):
        height, width = image.shape[2:]
        if self.padding == "same":
            image = F.pad(image, (0, -width % 32, 0, -height % 32))
        scores = self.upscore(self.score_fr(self.features(image)))
        top, left = (scores.shape[2] - height) // 2, (scores.shape[3] - width) // 2
        if self.padding == "same":
            top = left = 0
        return scores[:, :, top : top + height, left : left + width]
