"""DeepLab v2, v3 and v3+ on ResNet in stock torch.nn, without a line of fastseg.models."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.models.stock_fcn_resnet import StockFCNHead, StockWithAuxiliary, chosen
from tests.models.stock_resnet import FrozenBatchNorm, StockResNet, convolved, frozen


def resized(maps, size, align_corners=True):
    """With corners aligned, n scores at stride 8 become 8 * (n - 1) + 1 without stretching."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=align_corners)


class StockASPPv2(nn.Module):
    """The sum of 3x3 convolutions at several rates that give scores at once."""

    def __init__(self, channels_in, channels_out, rates=(6, 12, 18, 24)):
        super().__init__()
        self.conv2d_list = nn.ModuleList(
            nn.Conv2d(channels_in, channels_out, 3, padding=rate, dilation=rate) for rate in rates
        )

    def forward(self, image):
        return sum(branch(image) for branch in self.conv2d_list)


class StockDeepLabV2ResNet(StockResNet):
    """DeepLab v2 on ResNet-101. ``scores`` gives them at stride 8, ``forward`` at image size.

    freeze: batch normalisation keeps its statistics, and its scales and shifts are not trained.
    """

    def __init__(self, classes=21, width=1.0, depth=101, in_channels=3, rates=(6, 12, 18, 24), freeze=True):
        norm = FrozenBatchNorm if freeze else nn.BatchNorm2d
        super().__init__(
            depth, width, in_channels, stride_in="1x1", ceil_mode=True, output_stride=8, first="own", norm=norm
        )
        self.layer5 = StockASPPv2(int(2048 * width), classes, rates)
        if freeze:
            frozen(self)

    def scores(self, image):
        return self.layer5(self.stages(image)[3])

    def forward(self, image):
        return resized(self.scores(image), image.shape[2:])


class StockMultiScale(nn.Module):
    """A network at scales 1, 0.75 and 0.5 and the pixel-wise maximum of its scores.

    network: has ``scores``. plus_one: the sides of a small image are floor(scale * side) + 1, which keeps 8k + 1; else
    floor(scale * side).
    """

    def __init__(self, network, plus_one=True):
        super().__init__()
        self.Scale = network
        self.plus_one = plus_one

    def maps(self, image):
        """The scores at scales 1, 0.75 and 0.5, each at its own size, and the fused ones."""
        maps = [self.Scale.scores(image)]
        for scale in (0.75, 0.5):
            size = [int(side * scale) + self.plus_one for side in image.shape[2:]]
            maps.append(self.Scale.scores(resized(image, size)))
        full = maps[0].shape[2:]
        return [*maps, torch.maximum(torch.maximum(maps[0], resized(maps[1], full)), resized(maps[2], full))]

    def forward(self, image):
        return resized(self.maps(image)[3], image.shape[2:])


class StockImagePooling(nn.Sequential):
    """The mean of the whole map, convolved and spread over the map again."""

    def __init__(self, channels_in, channels_out, align_corners, norm=nn.BatchNorm2d):
        super().__init__(nn.AdaptiveAvgPool2d(1), *convolved(channels_in, channels_out, norm=norm))
        self.align_corners = align_corners

    def forward(self, image):
        return resized(super().forward(image), image.shape[2:], self.align_corners)


class StockASPP(nn.Module):
    """v3's atrous spatial pyramid pooling with torchvision's keys ``convs.{0..4}`` and ``project``."""

    def __init__(self, channels_in, channels, rates, dropout, align_corners, norm=nn.BatchNorm2d):
        super().__init__()
        self.convs = nn.ModuleList([convolved(channels_in, channels, norm=norm)])
        for rate in rates:
            self.convs.append(convolved(channels_in, channels, 3, rate, norm))
        self.convs.append(StockImagePooling(channels_in, channels, align_corners, norm))
        fusion = convolved(channels * len(self.convs), channels, norm=norm)
        self.project = nn.Sequential(*fusion, nn.Dropout(dropout))

    def forward(self, image):
        return self.project(torch.cat([branch(image) for branch in self.convs], dim=1))


class StockDeepLabV3(StockWithAuxiliary):
    """torchvision's DeepLabV3 on ResNet; ``forward`` gives {"out": scores, "aux": scores}.

    dropout: everywhere instead of 0.5 after the pyramid and 0.1 in the auxiliary head.
    """

    def __init__(
        self, classes=21, width=1.0, depth=101, auxiliary=True, in_channels=3, dropout=None, head_width=None,
        rates=(12, 24, 36),
    ):  # fmt: skip
        head = width if head_width is None else head_width
        channels = int(256 * head)
        aspp = StockASPP(int(2048 * width), channels, rates, chosen(dropout, 0.5), align_corners=False)
        aux = StockFCNHead(int(1024 * width), channels, classes, chosen(dropout, 0.1)) if auxiliary else None
        super().__init__(
            StockResNet(depth, width, in_channels, output_stride=8, first="previous"),
            nn.Sequential(aspp, *convolved(channels, channels, 3), nn.Conv2d(channels, classes, 1)),
            aux,
        )


def atrous_rates(output_stride):
    """The rates of v3's pyramid: doubled at output stride 8."""
    return {16: (6, 12, 18), 8: (12, 24, 36)}[output_stride]


class StockDeepLabV3Paper(nn.Module):
    """DeepLab v3 as in the paper: multi-grid, output stride 16 or 8, no further convolution, no auxiliary head."""

    def __init__(
        self, classes=21, width=1.0, depth=101, output_stride=16, in_channels=3, dropout=0.1, head_width=None,
        multi_grid=(1, 2, 4), momentum=3e-4, stride_in="3x3",
    ):  # fmt: skip
        super().__init__()
        channels = int(256 * (width if head_width is None else head_width))
        self.backbone = StockResNet(
            depth, width, in_channels, stride_in=stride_in, output_stride=output_stride, multi_grid=multi_grid
        )
        self.aspp = StockASPP(int(2048 * width), channels, atrous_rates(output_stride), dropout, True)
        self.classifier = nn.Conv2d(channels, classes, 1)
        set_momentum(self, momentum)

    def forward(self, image):
        return resized(self.classifier(self.aspp(self.backbone(image)[3])), image.shape[2:])


def set_momentum(model, momentum):
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = momentum


class StockAtrousBranch(nn.Module):
    """One branch of the pyramid, with the keys ``atrous_conv`` and ``bn``."""

    def __init__(self, channels_in, channels_out, kernel, rate):
        super().__init__()
        padding = rate * (kernel // 2)
        self.atrous_conv = nn.Conv2d(channels_in, channels_out, kernel, 1, padding, rate, bias=False)
        self.bn = nn.BatchNorm2d(channels_out)

    def forward(self, image):
        return torch.relu(self.bn(self.atrous_conv(image)))


class StockASPPv3Plus(nn.Module):
    """The pyramid of v3 with the keys ``aspp{1..4}``, ``global_avg_pool.{1,2}``, ``conv1``, ``bn1``.

    branch(channels_in, channels_out, kernel, rate): what the four convolutions are made with.
    """

    def __init__(self, channels_in, channels, rates, dropout, branch=StockAtrousBranch):
        super().__init__()
        self.aspp1 = StockAtrousBranch(channels_in, channels, 1, 1)
        self.aspp2, self.aspp3, self.aspp4 = (branch(channels_in, channels, 3, rate) for rate in rates)
        self.global_avg_pool = StockImagePooling(channels_in, channels, align_corners=True)
        self.conv1 = nn.Conv2d(5 * channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, image):
        branches = (self.aspp1, self.aspp2, self.aspp3, self.aspp4, self.global_avg_pool)
        together = torch.cat([branch(image) for branch in branches], dim=1)
        return self.dropout(torch.relu(self.bn1(self.conv1(together))))


class StockDecoder(nn.Module):
    """Low-level features to 48 channels, joined to the enlarged pyramid output; two convolutions, scores at stride 4.

    Keys ``conv1``, ``bn1``, ``last_conv.{0,1,4,5,8}``. The indices between are ReLUs and nothing.
    """

    def __init__(self, low_channels, channels, reduced, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(low_channels, reduced, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(reduced)
        self.last_conv = nn.Sequential(
            *convolved(channels + reduced, channels, 3),
            nn.Identity(),
            *convolved(channels, channels, 3),
            nn.Identity(),
            nn.Conv2d(channels, classes, 1),
        )

    def forward(self, image, low):
        low = torch.relu(self.bn1(self.conv1(low)))
        return self.last_conv(torch.cat([resized(image, low.shape[2:]), low], dim=1))


class StockDeepLabV3PlusResNet(nn.Module):
    """DeepLab v3+ on ResNet: v3's encoder and a decoder at stride 4 of two 3x3 convolutions; aligned corners."""

    def __init__(
        self, classes=21, width=1.0, depth=101, output_stride=16, in_channels=3, dropout=0.1, head_width=None,
        multi_grid=(1, 2, 4), momentum=3e-4, stride_in="3x3",
    ):  # fmt: skip
        super().__init__()
        head = width if head_width is None else head_width
        channels = int(256 * head)
        self.backbone = StockResNet(
            depth, width, in_channels, stride_in=stride_in, output_stride=output_stride, multi_grid=multi_grid
        )
        self.aspp = StockASPPv3Plus(int(2048 * width), channels, atrous_rates(output_stride), dropout)
        self.decoder = StockDecoder(int(256 * width), channels, int(48 * head), classes)
        set_momentum(self, momentum)

    def forward(self, image):
        stages = self.backbone(image)
        return resized(self.decoder(self.aspp(stages[3]), stages[0]), image.shape[2:])


class StockDeepLabV3PlusOneConvolution(nn.Module):
    """The port with one 3x3 convolution in the decoder, low-level features first and half-pixel centres.

    Keys ``classifier.project``, ``classifier.aspp``, ``classifier.classifier.{0,1,3}``; no multi-grid.
    """

    def __init__(self, classes=21, width=1.0, depth=101, output_stride=16, in_channels=3, dropout=0.1, head_width=None):
        super().__init__()
        head = width if head_width is None else head_width
        channels, reduced = int(256 * head), int(48 * head)
        self.backbone = StockResNet(depth, width, in_channels, output_stride=output_stride, first="previous")
        aspp = StockASPP(int(2048 * width), channels, atrous_rates(output_stride), dropout, align_corners=False)
        last = nn.Sequential(*convolved(channels + reduced, channels, 3), nn.Conv2d(channels, classes, 1))
        parts = {"project": convolved(int(256 * width), reduced), "aspp": aspp, "classifier": last}
        self.classifier = nn.ModuleDict(parts)

    def forward(self, image):
        stages, parts = self.backbone(image), self.classifier
        low = parts["project"](stages[0])
        high = resized(parts["aspp"](stages[3]), low.shape[2:], align_corners=False)
        scores = parts["classifier"](torch.cat([low, high], dim=1))
        return resized(scores, image.shape[2:], align_corners=False)
