"""ResNet with bottlenecks (He et al. 2016), and its dilated forms; key names are torchvision's."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastseg.models.blocks.convolution import initialise_he_, scaled_width
from fastseg.nn import Conv2d, MaxPool2d

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # of each stage, by the number of layers
EXPANSION = 4  # output channels of a bottleneck per channel of its 3x3 convolution
OUTPUT_STRIDES = (8, 16, 32)

Norm = Callable[[int], nn.Module]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, each normalised, added to the input or to its projection.

    Args:
        in_channels: of the input.
        channels: of the 3x3 convolution; the output has four times as many.
        stride: of the 3x3 convolution, or of the first one.
        dilation: of the 3x3 convolution.
        stride_in_1x1: the stride is that of the first 1x1 convolution, as in the Caffe release.
        project: whether the shortcut is a 1x1 convolution.
        norm: makes the normalisation of so many channels.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        stride: int,
        dilation: int,
        stride_in_1x1: bool,
        project: bool,
        norm: Norm,
    ):
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        out_channels = EXPANSION * channels
        self.conv1 = _convolution(in_channels, channels, 1, stride=first)
        self.bn1 = norm(channels)
        self.conv2 = _convolution(channels, channels, 3, stride=second, dilation=dilation)
        self.bn2 = norm(channels)
        self.conv3 = _convolution(channels, out_channels, 1)
        self.bn3 = norm(out_channels)
        self.downsample = None
        if project:
            self.downsample = nn.Sequential(
                _convolution(in_channels, out_channels, 1, stride=stride), norm(out_channels)
            )

    def forward(self, input: Tensor) -> Tensor:
        output = F.relu(self.bn1(self.conv1(input)), inplace=True)
        output = F.relu(self.bn2(self.conv2(output)), inplace=True)
        output = self.bn3(self.conv3(output))
        shortcut = input if self.downsample is None else self.downsample(input)
        return F.relu(output + shortcut, inplace=True)


class ResNet(nn.Module):
    """The convolutions of ResNet-50, 101 or 152: (N, in_channels, H, W) to the maps of its four stages.

    Of an image of H x W pixels, stage 1 has ceil(H / 4) rows; the stride doubles up to `output_stride`, and from there
    on dilation doubles instead.

    Args:
        layers: 50, 101 or 152.
        in_channels: channels of the image.
        width_multiplier: every layer has ``round(width * width_multiplier)`` channels, at least 1.
        deep_stem: three 3x3 convolutions (to 64, 64 and 128 channels) instead of one of 7x7; ``layer0.{0,1,3,4,6,7}``.
        stride_in_1x1: see `Bottleneck`.
        ceil_mode: of the pooling, as in Caffe.
        output_stride: 8, 16 or 32.
        keep_first_dilation: the first block of a dilated stage keeps the dilation of the stage before (torchvision).
        multi_grid: factors of the dilations of the three blocks of the last stage.
        dilations: those of all blocks of the third and of the fourth stage, which then have stride 1; else as above.
        norm: makes the normalisation of so many channels.

    Attributes:
        channels: of the four maps.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        layers: int,
        in_channels: int = 3,
        width_multiplier: float = 1.0,
        *,
        deep_stem: bool = False,
        stride_in_1x1: bool = False,
        ceil_mode: bool = False,
        output_stride: int = 32,
        keep_first_dilation: bool = False,
        multi_grid: Sequence[int] = (1, 1, 1),
        dilations: tuple[Sequence[int], Sequence[int]] | None = None,
        norm: Norm = nn.BatchNorm2d,
    ):
        super().__init__()
        width = scaled_width(64, width_multiplier)
        pool = MaxPool2d(3, 2, 1, ceil_mode=ceil_mode)
        self.deep_stem = deep_stem
        if deep_stem:
            stem, channels = [], in_channels
            for stride, out_channels in ((2, width), (1, width), (1, scaled_width(128, width_multiplier))):
                stem += [
                    _convolution(channels, out_channels, 3, stride=stride),
                    norm(out_channels),
                    nn.ReLU(inplace=True),
                ]
                channels = out_channels
            self.layer0 = nn.Sequential(*stem, pool)
        else:
            channels = width
            self.conv1 = initialise_he_(nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False))
            self.bn1 = norm(width)
            self.maxpool = pool
        strides_and_dilations = _strides_and_dilations(BLOCKS[layers], output_stride, keep_first_dilation, multi_grid)
        if dilations is not None:
            strides_and_dilations[2:] = [(1, list(rates)) for rates in dilations]
        self.channels: tuple[int, ...] = ()
        stages = []
        for stage, (stride, rates) in enumerate(strides_and_dilations):
            width, blocks = scaled_width(64 * 2**stage, width_multiplier), nn.Sequential()
            for place, dilation in enumerate(rates):
                first = place == 0
                block = Bottleneck(
                    channels,
                    width,
                    stride=stride if first else 1,
                    dilation=dilation,
                    stride_in_1x1=stride_in_1x1,
                    project=first,
                    norm=norm,
                )
                blocks.append(block)
                channels = EXPANSION * width
            stages.append(blocks)
            self.channels += (channels,)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages

    def torchvision_sources(self, prefix: str) -> dict[str, str]:
        """What `Network.copy_tensors` copies from torchvision's ResNet: {own key below `prefix`: its key}."""
        return {f"{prefix}{key}": key for key in self.state_dict()}

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The maps of the four stages."""
        if self.deep_stem:
            image = self.layer0(image)
        else:
            image = self.maxpool(F.relu(self.bn1(self.conv1(image)), inplace=True))
        stage1 = self.layer1(image)
        stage2 = self.layer2(stage1)
        stage3 = self.layer3(stage2)
        return stage1, stage2, stage3, self.layer4(stage3)


def _convolution(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """Without bias, from He's initialisation, with the padding that keeps ceil(size / stride).

    Without dilation torch's own module: `fastseg.nn.Conv2d` would do the same with more work in Python.
    """
    kind, padding = Conv2d if dilation > 1 else nn.Conv2d, dilation * (kernel_size // 2)
    layer = kind(in_channels, out_channels, kernel_size, stride, padding=padding, dilation=dilation, bias=False)
    initialise_he_(layer)
    return layer


def _strides_and_dilations(
    blocks: Sequence[int], output_stride: int, keep_first_dilation: bool, multi_grid: Sequence[int]
) -> list[tuple[int, list[int]]]:
    """Of each stage: the stride of its first block and the dilation of every block."""
    found, reached, dilation = [(1, [1] * blocks[0])], 4, 1
    for count in blocks[1:]:
        before, stride = dilation, 2
        if reached == output_stride:
            stride, dilation = 1, 2 * dilation
        else:
            reached *= 2
        rates = [dilation] * count
        if keep_first_dilation:
            rates[0] = before
        found.append((stride, rates))
    stride, rates = found[-1]
    found[-1] = stride, [rate * factor for rate, factor in zip(rates, multi_grid, strict=True)]
    return found
