"""ResNet-50/101/152 and their dilated forms in stock torch.nn, without a line of fastseg.models.

Keys are torchvision's (``conv1``, ``bn1``, ``layer1`` ... ``layer4``); a deep stem is ``layer0`` with the indices
0, 1, 3, 4, 6, 7.
"""

from functools import partial

import torch
from torch import nn

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch normalisation that always uses its running statistics and never updates them."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.eval()

    def train(self, mode=True):
        return super().train(False)


def frozen(model):
    """``model``, with the scales and shifts of its batch normalisations excluded from training."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.requires_grad_(False)
    return model


def hdc_rates(blocks, released=True):
    """The rates of hybrid dilated convolution: 1, 2, 5, 9 over and over; in the release the very first is 2."""
    rates = [(1, 2, 5, 9)[block % 4] for block in range(blocks)]
    return [2, *rates[1:]] if released else rates


def stage_plan(blocks, output_stride=32, first="own", multi_grid=(1, 1, 1), hdc=None):
    """``[(stride, [rate of each block]), ...]`` of the four stages.

    first: the rate of the first block of a stage whose stride was removed: the stage's "own" or the "previous" one.
    hdc: None, "released" (2, 2, 5, 9, 1, 2, ...) or "cycle" (1, 2, 5, 9, ...), with 5, 9, 17 in the last stage.
    """
    plan, reached, rate = [], 4, 1
    for stage, count in enumerate(blocks):
        stride, before = (1 if stage == 0 else 2), rate
        if stride * reached > output_stride:
            stride, rate = 1, rate * stride
        reached *= stride
        rates = [rate] * count
        if stage == 3:
            rates = [rate * multi_grid[min(block, len(multi_grid) - 1)] for block in range(count)]
        if first == "previous":
            rates[0] = rates[0] // rate * before
        plan.append((stride, rates))
    if hdc:
        plan[2] = (1, hdc_rates(blocks[2], hdc == "released"))
        plan[3] = (1, [5, 9, 17])
    return plan


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, each with batch normalisation, added to the input or its projection."""

    def __init__(self, channels_in, middle, channels_out, stride, rate, stride_in, norm):
        super().__init__()
        first, second = (stride, 1) if stride_in == "1x1" else (1, stride)
        self.conv1 = nn.Conv2d(channels_in, middle, 1, first, bias=False)
        self.bn1 = norm(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, second, rate, rate, bias=False)
        self.bn2 = norm(middle)
        self.conv3 = nn.Conv2d(middle, channels_out, 1, bias=False)
        self.bn3 = norm(channels_out)
        self.downsample = None
        if stride != 1 or channels_in != channels_out:
            projection = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, norm(channels_out))

    def forward(self, image):
        residual = torch.relu(self.bn1(self.conv1(image)))
        residual = torch.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return torch.relu(residual + (image if self.downsample is None else self.downsample(image)))


class StockResNet(nn.Module):
    """The trunk; ``forward`` and ``stages`` give the outputs of the four stages, at strides 4, 8, 16 and 32 or less.

    depth: 50, 101, 152, or the number of blocks of each stage.
    deep_stem: three 3x3 convolutions instead of one 7x7. stride_in: "3x3" (torchvision) or "1x1" (Caffe).
    ceil_mode: of the max pooling (Caffe). output_stride, first, multi_grid, hdc: see ``stage_plan``.
    """

    def __init__(
        self, depth=50, width=1.0, in_channels=3, deep_stem=False, stride_in="3x3", ceil_mode=False, output_stride=32,
        first="own", multi_grid=(1, 1, 1), hdc=None, norm=nn.BatchNorm2d, eps=1e-5, momentum=0.1,
    ):  # fmt: skip
        super().__init__()
        norm = partial(norm, eps=eps, momentum=momentum)
        channels = int(64 * width)
        pool = nn.MaxPool2d(3, 2, 1, ceil_mode=ceil_mode)
        self.deep_stem = deep_stem
        if deep_stem:
            layers, entering = [], in_channels
            for leaving, stride in ((channels, 2), (channels, 1), (int(128 * width), 1)):
                convolution = nn.Conv2d(entering, leaving, 3, stride, 1, bias=False)
                layers += [convolution, norm(leaving), nn.ReLU()]
                entering = leaving
            self.layer0 = nn.Sequential(*layers, pool)
            channels = entering
        else:
            self.conv1 = nn.Conv2d(in_channels, channels, 7, 2, 3, bias=False)
            self.bn1 = norm(channels)
            self.pool = pool
        blocks = BLOCKS.get(depth, depth)
        for stage, (stride, rates) in enumerate(stage_plan(blocks, output_stride, first, multi_grid, hdc)):
            middle, leaving = int(64 * 2**stage * width), int(256 * 2**stage * width)
            layers = []
            for rate in rates:
                layers.append(Bottleneck(channels, middle, leaving, stride, rate, stride_in, norm))
                channels, stride = leaving, 1
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))

    def stages(self, image):
        image = self.layer0(image) if self.deep_stem else self.pool(torch.relu(self.bn1(self.conv1(image))))
        outputs = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            image = stage(image)
            outputs.append(image)
        return outputs

    def forward(self, image):
        return self.stages(image)


def convolved(channels_in, channels_out, kernel=1, rate=1, norm=nn.BatchNorm2d):
    """Convolution without bias that keeps the size, batch normalisation, ReLU."""
    convolution = nn.Conv2d(channels_in, channels_out, kernel, 1, (kernel // 2) * rate, rate, bias=False)
    return nn.Sequential(convolution, norm(channels_out), nn.ReLU())
