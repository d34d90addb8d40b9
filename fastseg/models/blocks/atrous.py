"""Heads of DeepLab that look at a map through convolutions of several dilations."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastseg.models.blocks.convolution import initialise_all_he_
from fastseg.models.blocks.heads import initialise_scores_
from fastseg.nn import ASPP, Conv2d

SCORE_RATES = (6, 12, 18, 24)  # of DeepLab v2 and DUC
ASPP_RATES = {8: (12, 24, 36), 16: (6, 12, 18)}  # of DeepLab v3 and v3+, by output stride
DEPTHWISE_DEVIATION, POINTWISE_DEVIATION = 0.33, 0.06  # of the initial weights of separable convolutions


class AtrousScores(nn.Module):
    """The sum of 3x3 convolutions of several dilations, each of which scores classes: the head of DeepLab v2.

    Keys ``conv2d_list.{0,1,...}``. Weights start normal with deviation 0.01, biases 0.
    """

    def __init__(self, in_channels: int, out_channels: int, rates: Sequence[int] = SCORE_RATES):
        super().__init__()
        self.conv2d_list = nn.ModuleList(
            initialise_scores_(Conv2d(in_channels, out_channels, 3, padding=rate, dilation=rate)) for rate in rates
        )

    def forward(self, input: Tensor) -> Tensor:
        first, *others = self.conv2d_list
        scores = first(input)
        for layer in others:
            scores = layer(input, residual=scores)
        return scores


def deeplab_aspp(
    in_channels: int,
    channels: int,
    output_stride: int,
    *,
    dropout: float,
    norm: Callable[[int], nn.Module],
    separable: bool = False,
) -> ASPP:
    """`fastseg.nn.ASPP` with DeepLab's rates and initialisation: that of `initialise_separable_`, else He's."""
    rates = ASPP_RATES[output_stride]
    aspp = ASPP(in_channels, rates, channels, dropout=dropout, separable=separable, norm=norm)
    initialise_all_he_(aspp)
    if separable:
        for branch in aspp.convs[1:-1]:
            initialise_separable_(branch)
    return aspp


def initialise_separable_(block: nn.Sequential) -> nn.Sequential:
    """DeepLab's initialisation of a `fastseg.nn.aspp.separable_block`: normal, cut off at two deviations."""
    convolutions = (layer for layer in block if isinstance(layer, nn.Conv2d))
    for layer, deviation in zip(convolutions, (DEPTHWISE_DEVIATION, POINTWISE_DEVIATION), strict=True):
        nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    return block
