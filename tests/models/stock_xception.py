"""Modified aligned Xception and DeepLab v3+ on it in stock torch.nn, without a line of fastseg.models."""

import torch
from torch import nn

from tests.models.stock_deeplab_resnet import StockASPPv3Plus, atrous_rates, resized

# (depths, stride) of the blocks of the entry flow; the block whose second convolution the decoder uses
ENTRY = {
    41: ([((128,) * 3, 2), ((256,) * 3, 2), ((728,) * 3, 2)], 2),
    65: ([((128,) * 3, 2), ((256,) * 3, 2), ((728,) * 3, 2)], 2),
    71: ([((128,) * 3, 2), ((256,) * 3, 1), ((256,) * 3, 2), ((728,) * 3, 1), ((728,) * 3, 2)], 3),
}
MIDDLE = {41: 8, 65: 16, 71: 16}


class StockSeparable(nn.Module):
    """Depthwise 3x3 (``conv1``), batch normalisation (``bn``), pointwise 1x1 (``pointwise``)."""

    def __init__(self, channels_in, channels_out, stride=1, rate=1, activated=False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_in, 3, stride, rate, rate, groups=channels_in, bias=False)
        self.bn = nn.BatchNorm2d(channels_in)
        self.pointwise = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.activated = activated

    def forward(self, image):
        image = self.bn(self.conv1(image))
        return self.pointwise(torch.relu(image) if self.activated else image)


class StockUnit(nn.Module):
    """Three separable convolutions, each after a ReLU, added to the input or its projection.

    ``rep`` is counted as in the port: ReLU, separable convolution, batch normalisation; without the first ReLU (which
    changes nothing after another ReLU) if first=True.
    """

    def __init__(self, channels_in, depths, stride, rate, projected, first=False):
        super().__init__()
        layers, entering = [], channels_in
        for place, depth in enumerate(depths):
            separable = StockSeparable(entering, depth, stride if place == 2 else 1, rate)
            layers += [nn.ReLU(), separable, nn.BatchNorm2d(depth)]
            entering = depth
        self.rep = nn.Sequential(*layers[first:])
        self.until_second = 6 - first
        self.projected = projected
        self.stride = stride
        if projected:
            self.skip = nn.Conv2d(channels_in, depths[2], 1, bias=False)
            self.skipbn = nn.BatchNorm2d(depths[2])

    def forward(self, image):
        """The output and what the second separable convolution gave, normalised and not activated."""
        second = self.rep[: self.until_second](image)
        last = self.rep[self.until_second :](second)
        # every stride-th pixel first: oneDNN's gradient of a strided 1x1 weight of few channels writes past its buffer
        every = image[:, :, :: self.stride, :: self.stride]
        return last + (self.skipbn(self.skip(every)) if self.projected else image), second


class StockXception(nn.Module):
    """The trunk: ``forward`` gives the decoder's low-level map at stride 4 and the last one.

    depth: 41, 65 or 71. output_stride: 32, 16 or 8. multi_grid: factors of the rates of the last three convolutions.
    """

    def __init__(
        self, depth=65, width=1.0, output_stride=32, in_channels=3, multi_grid=(1, 1, 1), eps=1e-3, momentum=3e-4
    ):
        super().__init__()

        def scaled(depths):
            return [int(count * width) for count in depths]

        entry, self.low_block = ENTRY[depth]
        blocks = [(*block, True) for block in entry] + [((728,) * 3, 1, False)] * MIDDLE[depth]
        blocks.append(((728, 1024, 1024), 2, True))
        narrow, channels = scaled((32, 64))
        self.conv1 = nn.Conv2d(in_channels, narrow, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = nn.Conv2d(narrow, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        reached, rate = 2, 1
        for place, (depths, stride, projected) in enumerate(blocks, 1):
            removed = stride if reached * stride > output_stride else 1
            stride = stride // removed
            self.add_module(f"block{place}", StockUnit(channels, scaled(depths), stride, rate, projected, place == 1))
            reached, rate, channels = reached * stride, rate * removed, scaled(depths)[2]
        self.blocks = len(blocks)
        for place, (leaving, factor) in enumerate(zip(scaled((1536, 1536, 2048)), multi_grid), 3):
            self.add_module(f"conv{place}", StockSeparable(channels, leaving, 1, rate * factor, activated=True))
            self.add_module(f"bn{place}", nn.BatchNorm2d(leaving))
            channels = leaving
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps, layer.momentum = eps, momentum

    def forward(self, image):
        image = torch.relu(self.bn1(self.conv1(image)))
        image, low = torch.relu(self.bn2(self.conv2(image))), None
        for place in range(1, self.blocks + 1):
            image, second = self.get_submodule(f"block{place}")(image)
            low = second if place == self.low_block else low
        for place in (3, 4, 5):
            image = self.get_submodule(f"bn{place}")(self.get_submodule(f"conv{place}")(image))
            image = torch.relu(image)
        return low, image


class StockSeparableBranch(nn.Module):
    """Depthwise 3x3 and pointwise 1x1, each with batch normalisation and ReLU."""

    def __init__(self, channels_in, channels_out, kernel=3, rate=1):
        super().__init__()
        self.depthwise = nn.Conv2d(channels_in, channels_in, kernel, 1, rate, rate, groups=channels_in, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(channels_in)
        self.pointwise = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.pointwise_bn = nn.BatchNorm2d(channels_out)

    def forward(self, image):
        image = torch.relu(self.depthwise_bn(self.depthwise(image)))
        return torch.relu(self.pointwise_bn(self.pointwise(image)))


class StockSeparableDecoder(nn.Module):
    """v3+'s decoder with separable convolutions; scores at stride 4."""

    def __init__(self, low_channels, channels, reduced, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(low_channels, reduced, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(reduced)
        self.first = StockSeparableBranch(channels + reduced, channels)
        self.second = StockSeparableBranch(channels, channels)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, image, low):
        low = torch.relu(self.bn1(self.conv1(low)))
        joined = torch.cat([resized(image, low.shape[2:]), low], dim=1)
        return self.classifier(self.second(self.first(joined)))


class StockDeepLabV3PlusXception(nn.Module):
    """DeepLab v3+ on Xception-65 or -71, with a separable pyramid and decoder and corners aligned.

    eps: of the trunk; the heads have 1e-5. momentum: of both. head_width: factor of the heads' widths, else ``width``.
    """

    def __init__(
        self, classes=21, width=1.0, depth=65, output_stride=16, in_channels=3, dropout=0.1, head_width=None,
        multi_grid=(1, 1, 1), eps=1e-3, momentum=3e-4,
    ):  # fmt: skip
        super().__init__()
        head = width if head_width is None else head_width
        channels = int(256 * head)
        self.backbone = StockXception(depth, width, output_stride, in_channels, multi_grid, eps, momentum)
        rates = atrous_rates(output_stride)
        self.aspp = StockASPPv3Plus(int(2048 * width), channels, rates, dropout, StockSeparableBranch)
        self.decoder = StockSeparableDecoder(int(256 * width), channels, int(48 * head), classes)
        for part in (self.aspp, self.decoder):
            for layer in part.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.momentum = momentum

    def forward(self, image):
        low, high = self.backbone(image)
        return resized(self.decoder(self.aspp(high), low), image.shape[2:])
