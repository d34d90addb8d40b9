"""FCN-32s on AlexNet as Caffe has it, in stock torch.nn, without a line of fastseg.models."""

import torch
import torch.nn.functional as F
from torch import nn


def neighbours_normalised(image):
    """Local response normalisation over 5 channels: divided by (1 + 1e-4 / 5 * sum of squares) ** 0.75."""
    squares = F.pad(image**2, (0, 0, 0, 0, 2, 2))
    channels = image.shape[1]
    return image / (1 + 1e-4 / 5 * sum(squares[:, shift : shift + channels] for shift in range(5))) ** 0.75


class StockCaffeNet(nn.Module):
    """The five convolutions and three poolings of CaffeNet, normalised after pooling. padding: of the first."""

    def __init__(self, width=1.0, in_channels=3, padding=0):
        super().__init__()
        first, second, third = (int(channels * width) for channels in (96, 256, 384))
        self.conv1 = nn.Conv2d(in_channels, first, 11, 4, padding)
        self.conv2 = nn.Conv2d(first, second, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1)
        self.conv4 = nn.Conv2d(third, third, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(third, second, 3, padding=1, groups=2)

    def features(self, image):
        image = F.max_pool2d(torch.relu(self.conv1(image)), 3, 2, ceil_mode=True)
        image = torch.relu(self.conv2(neighbours_normalised(image)))
        image = F.max_pool2d(image, 3, 2, ceil_mode=True)
        image = torch.relu(self.conv3(neighbours_normalised(image)))
        image = torch.relu(self.conv5(torch.relu(self.conv4(image))))
        return F.max_pool2d(image, 3, 2, ceil_mode=True)

    def forward(self, image):
        return self.features(image)


def bilinear(channels, kernel, stride, padding=0):
    """A transposed convolution that interpolates each channel by itself; its weights are not trained."""
    layer = nn.ConvTranspose2d(channels, channels, kernel, stride, padding, bias=False)
    reach = (kernel + 1) // 2
    centre = reach - 1 if kernel % 2 else reach - 0.5
    taps = 1 - (torch.arange(kernel) - centre).abs() / reach
    with torch.no_grad():
        layer.weight.zero_()
        for channel in range(channels):
            layer.weight[channel, channel] = taps[:, None] * taps
    layer.weight.requires_grad_(False)
    return layer


class StockFCN32sAlexNet(StockCaffeNet):
    """The image is padded by 100, the scores are enlarged 32 times and cut out 18 pixels from the near ends."""

    def __init__(self, classes=21, width=1.0, in_channels=3, dropout=0.5):
        super().__init__(width, in_channels, padding=100)
        hidden = int(4096 * width)
        self.fc6 = nn.Conv2d(int(256 * width), hidden, 6)
        self.fc7 = nn.Conv2d(hidden, hidden, 1)
        self.score_fr = nn.Conv2d(hidden, classes, 1)
        self.upscore = bilinear(classes, 63, 32)
        self.dropout = nn.Dropout(dropout)

    def forward(self, image):
        scores = self.dropout(torch.relu(self.fc6(self.features(image))))
        scores = self.dropout(torch.relu(self.fc7(scores)))
        scores = self.upscore(self.score_fr(scores))
        return scores[:, :, 18 : 18 + image.shape[2], 18 : 18 + image.shape[3]]
