"""The modified aligned Xception of DeepLab v3+ (Chollet 2017; Qi et al. 2017; Chen et al. 2018)."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastseg.models.blocks.convolution import initialise_all_he_, scaled_width
from fastseg.nn import Conv2d

STEM_WIDTHS = (32, 64)
# (width, stride) of the units of the entry flow; the number of units of the middle flow
_ENTRY, _LONG_ENTRY = (
    ((128, 2), (256, 2), (728, 2)),
    ((128, 2), (256, 1), (256, 2), (728, 1), (728, 2)),
)
FLOWS = {41: (_ENTRY, 8), 65: (_ENTRY, 16), 71: (_LONG_ENTRY, 16)}
LOW_LEVEL_WIDTH, LOW_LEVEL_STRIDE = 256, 4  # of the map for a decoder: inside of the unit that leaves stride 4
MIDDLE_WIDTH = 728
EXIT_WIDTHS, LAST_WIDTHS = (728, 1024, 1024), (1536, 1536, 2048)

Norm = Callable[[int], nn.Module]


class SeparableConv2d(nn.Module):
    """A depthwise 3x3 convolution, normalisation and a 1x1 convolution; keys ``conv1``, ``bn`` and ``pointwise``."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, dilation: int, relu: bool = False, norm: Norm
    ):
        """relu: whether a ReLU precedes the 1x1 convolution."""
        super().__init__()
        self.conv1 = Conv2d(
            in_channels, in_channels, 3, stride, padding=dilation, dilation=dilation, groups=in_channels, bias=False
        )
        self.bn = norm(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.relu = relu

    def forward(self, input: Tensor) -> Tensor:
        output = self.bn(self.conv1(input))
        return self.pointwise(F.relu(output, inplace=True) if self.relu else output)


class Unit(nn.Module):
    """Three separable convolutions, each after a ReLU, added to the input or to its projection.

    Args:
        in_channels: of the input.
        widths: of the three convolutions.
        stride: of the last convolution and of the projection.
        dilation: of all convolutions.
        project: whether the shortcut is a 1x1 convolution, ``skip`` and ``skipbn``.
        first_relu: whether ``rep`` begins with a ReLU. The first unit's input is the result of one.
        norm: makes the normalisation of so many channels.
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        *,
        stride: int = 1,
        dilation: int,
        project: bool,
        first_relu: bool = True,
        norm: Norm,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for place, width in enumerate(widths):
            last = place == len(widths) - 1
            convolution = SeparableConv2d(channels, width, stride=stride if last else 1, dilation=dilation, norm=norm)
            layers += [nn.ReLU(), convolution, norm(width)]
            channels = width
        self.rep = nn.Sequential(*layers if first_relu else layers[1:])
        self.project = project
        if project:
            self.skip = Conv2d(in_channels, channels, 1, stride, bias=False)
            self.skipbn = norm(channels)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The result, and that of the second convolution, normalised, for a decoder."""
        second = self.rep[:-3](input)
        output = self.rep[-3:](second)
        shortcut = self.skipbn(self.skip(input)) if self.project else input
        return output + shortcut, second


class Xception(nn.Module):
    """The convolutions of Xception-41, 65 or 71: (N, in_channels, H, W) to the maps of stride 4 and `output_stride`.

    Where `output_stride` is reached a unit has stride 1, and all later ones its dilation times the stride removed.
    Keys of jfzhang95's PyTorch version: ``conv1``, ``block1.rep.0.conv1`` ..., ``conv5``. Convolutions start from He's
    normal initialisation.

    Args:
        layers: 41, 65 or 71.
        in_channels: channels of the image.
        width_multiplier: every layer has ``round(width * width_multiplier)`` channels, at least 1.
        output_stride: 8, 16 or 32.
        multi_grid: factors of the dilations of the last three convolutions.
        norm: makes the normalisation of so many channels.

    Attributes:
        channels: of the two maps.
    """

    def __init__(
        self,
        layers: int,
        in_channels: int = 3,
        width_multiplier: float = 1.0,
        *,
        output_stride: int = 32,
        multi_grid: Sequence[int] = (1, 1, 1),
        norm: Norm = nn.BatchNorm2d,
    ):
        super().__init__()

        def scaled(widths):
            return [scaled_width(width, width_multiplier) for width in widths]

        narrow, channels = scaled(STEM_WIDTHS)
        self.conv1 = nn.Conv2d(in_channels, narrow, 3, 2, padding=1, bias=False)
        self.bn1 = norm(narrow)
        self.conv2 = nn.Conv2d(narrow, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)

        entry, middle = FLOWS[layers]
        units = [([width] * 3, stride, True) for width, stride in entry]
        units += [([MIDDLE_WIDTH] * 3, 1, False)] * middle
        units.append((list(EXIT_WIDTHS), 2, True))
        self.units, reached, dilation = len(units), 2, 1
        for place, (widths, stride, project) in enumerate(units, 1):
            if reached == LOW_LEVEL_STRIDE and stride > 1:
                self.low_level_unit = place
            removed = stride if reached * stride > output_stride else 1
            unit = Unit(
                channels,
                scaled(widths),
                stride=stride // removed,
                dilation=dilation,
                project=project,
                first_relu=place > 1,
                norm=norm,
            )
            self.add_module(f"block{place}", unit)
            channels = scaled(widths)[-1]
            reached, dilation = reached * stride // removed, dilation * removed
        for place, (width, factor) in enumerate(zip(scaled(LAST_WIDTHS), multi_grid, strict=True), 3):
            layer = SeparableConv2d(channels, width, dilation=dilation * factor, relu=True, norm=norm)
            self.add_module(f"conv{place}", layer)
            self.add_module(f"bn{place}", norm(width))
            channels = width
        self.channels = scaled_width(LOW_LEVEL_WIDTH, width_multiplier), channels
        initialise_all_he_(self)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """A map of stride 4 and the last one."""
        image = F.relu(self.bn1(self.conv1(image)), inplace=True)
        image = F.relu(self.bn2(self.conv2(image)), inplace=True)
        for place in range(1, self.units + 1):
            image, second = self.get_submodule(f"block{place}")(image)
            if place == self.low_level_unit:
                low_level = second
        for place in (3, 4, 5):
            convolution, norm = self.get_submodule(f"conv{place}"), self.get_submodule(f"bn{place}")
            image = F.relu(norm(convolution(image)), inplace=True)
        return low_level, image
