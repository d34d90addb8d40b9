"""DeepLab v1, DeepLab-MSc and DeepLab v2 on VGG16 in stock torch.nn, without a line of fastseg.models.

An image of 8k + 1 pixels has k + 1 scores, with corners aligned: score i lies on pixel 8i.
"""

import torch
import torch.nn.functional as F
from torch import nn

# layers and channels of every block of VGG16
VGG16 = [(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)]
# kernel, rate, padding and channels of fc6
FC6 = {"largefov": (3, 12, 12, 1024), "4x4": (4, 4, 6, 4096), "7x7": (7, 4, 12, 4096)}


def add_vgg16(model, width, in_channels, padding, conv5_padding):
    """Adds the convolutions ``conv1_1`` ... ``conv5_3``, those of the last block at rate 2."""
    for block, (layers, channels) in enumerate(VGG16, 1):
        rate, inset = (2, conv5_padding) if block == 5 else (1, padding)
        for layer in range(1, layers + 1):
            convolution = nn.Conv2d(in_channels, int(channels * width), 3, 1, inset, rate)
            model.add_module(f"conv{block}_{layer}", convolution)
            in_channels = int(channels * width)


def through_block(model, block, image):
    for layer in range(1, VGG16[block - 1][0] + 1):
        image = torch.relu(model.get_submodule(f"conv{block}_{layer}")(image))
    return image


def to_image(scores, size, cropped):
    """Scores stretched to the image or, if ``cropped``, enlarged to 8 * (n - 1) + 1 and cut off; corners aligned."""
    enlarged = [8 * (side - 1) + 1 for side in scores.shape[2:]] if cropped else size
    scores = F.interpolate(scores, enlarged, mode="bilinear", align_corners=True)
    return scores[:, :, : size[0], : size[1]]


class StockAtrousVGG16(nn.Module):
    """VGG16 with overlapping pooling, of which the last two have stride 1; ``scores`` are left to the networks."""

    def __init__(self, width, in_channels, cropped):
        super().__init__()
        self.cropped = cropped
        add_vgg16(self, width, in_channels, padding=1, conv5_padding=2)

    def pools(self, image):
        """The outputs of the five poolings."""
        outputs = []
        for block in range(1, 6):
            image = through_block(self, block, image)
            image = F.max_pool2d(image, 3, 2 if block < 4 else 1, 1, ceil_mode=True)
            outputs.append(image)
        return outputs

    def forward(self, image):
        return to_image(self.scores(image), image.shape[2:], self.cropped)


class StockSideBranch(nn.Sequential):
    """Scores at stride 8 straight from the image or a pooling.

    A map of any size gives as many scores as the trunk does, which rounds up: zeros are added at its far ends.
    """

    def __init__(self, channels_in, middle, classes, stride, dropout):
        super().__init__(
            nn.Conv2d(channels_in, middle, 3, stride, 1), nn.ReLU(), nn.Dropout(dropout),
            nn.Conv2d(middle, middle, 1), nn.ReLU(), nn.Dropout(dropout),
            nn.Conv2d(middle, classes, 1),
        )  # fmt: skip

    def forward(self, image):
        stride = self[0].stride[0]
        missing_below, missing_right = ((1 - side) % stride for side in image.shape[2:])
        return super().forward(F.pad(image, (0, missing_right, 0, missing_below)))


class StockDeepLabV1(StockAtrousVGG16):
    """``scores`` gives them at stride 8, ``forward`` at image size.

    network: "largefov" (the only one with the average pooling after pool5), "4x4" or "7x7".
    multi_scale: DeepLab-MSc, to whose scores the image and the first four poolings add theirs.
    cropped: how scores get the size of an image that is not 8k + 1, see ``to_image``.
    """

    def __init__(
        self, classes=21, width=1.0, network="largefov", multi_scale=False, in_channels=3, dropout=0.5, cropped=False
    ):
        super().__init__(width, in_channels, cropped)
        kernel, rate, padding, channels = FC6[network]
        self.averages = network == "largefov"
        hidden = int(channels * width)
        self.fc6 = nn.Conv2d(int(512 * width), hidden, kernel, 1, padding, rate)
        self.fc7 = nn.Conv2d(hidden, hidden, 1)
        self.fc8 = nn.Conv2d(hidden, classes, 1)
        self.dropout = nn.Dropout(dropout)
        sources = [(in_channels, 8), (64, 4), (128, 2), (256, 1), (512, 1)] if multi_scale else []
        self.sides = nn.ModuleList()
        for place, (channels, stride) in enumerate(sources):
            entering = int(channels * width) if place else channels
            self.sides.append(StockSideBranch(entering, int(128 * width), classes, stride, dropout))

    def paths(self, image):
        """The scores whose sum is the output: of the trunk, then of the image and the poolings."""
        pools = self.pools(image)
        maps = F.avg_pool2d(pools[4], 3, 1, 1, count_include_pad=True) if self.averages else pools[4]
        maps = self.dropout(torch.relu(self.fc6(maps)))
        maps = self.dropout(torch.relu(self.fc7(maps)))
        return [self.fc8(maps), *(side(source) for side, source in zip(self.sides, [image, *pools]))]

    def scores(self, image):
        return sum(self.paths(image))


class StockDeepLabV2VGG(StockAtrousVGG16):
    """Four branches ``fc6_i``, ``fc7_i``, ``fc8_i`` at several rates, summed.

    ``scores`` gives them at stride 8, ``forward`` at image size. cropped: see ``to_image``.
    """

    def __init__(self, classes=21, width=1.0, rates=(6, 12, 18, 24), in_channels=3, dropout=0.5, cropped=False):
        super().__init__(width, in_channels, cropped)
        hidden = int(1024 * width)
        self.branches = len(rates)
        for branch, rate in enumerate(rates, 1):
            self.add_module(f"fc6_{branch}", nn.Conv2d(int(512 * width), hidden, 3, 1, rate, rate))
            self.add_module(f"fc7_{branch}", nn.Conv2d(hidden, hidden, 1))
            self.add_module(f"fc8_{branch}", nn.Conv2d(hidden, classes, 1))
        self.dropout = nn.Dropout(dropout)

    def scores(self, image):
        image, total = self.pools(image)[4], 0
        for branch in range(1, self.branches + 1):
            maps = self.dropout(torch.relu(self.get_submodule(f"fc6_{branch}")(image)))
            maps = self.dropout(torch.relu(self.get_submodule(f"fc7_{branch}")(maps)))
            total = total + self.get_submodule(f"fc8_{branch}")(maps)
        return total
