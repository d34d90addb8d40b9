"""Heads that score classes, each on the map of a trunk."""

from collections.abc import Callable

from torch import nn

from fastseg.models.blocks.convolution import initialise_he_

SCORE_DEVIATION = 0.01  # of the initial weights of score layers


def score_layer(in_channels: int, num_classes: int, *, deviation: float = SCORE_DEVIATION) -> nn.Conv2d:
    """A 1x1 convolution from `initialise_scores_`."""
    return initialise_scores_(nn.Conv2d(in_channels, num_classes, 1), deviation=deviation)


def initialise_scores_(layer: nn.Conv2d, *, deviation: float = SCORE_DEVIATION) -> nn.Conv2d:
    """Weights start normal with this deviation, biases 0."""
    nn.init.normal_(layer.weight, std=deviation)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class FCNHead(nn.Sequential):
    """3x3 convolution, normalisation, ReLU, dropout, scores: the head of torchvision's FCN and the auxiliary head of
    PSPNet and others; keys ``0``, ``1`` and ``4``.

    Args:
        in_channels: of the map.
        channels: after the 3x3 convolution; torchvision takes a quarter of `in_channels`.
        num_classes: classes that are scored.
        norm: makes the normalisation of so many channels.
        dropout: the layer of this kind.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        *,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        dropout: nn.Module,
    ):
        super().__init__(
            initialise_he_(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)),
            norm(channels),
            nn.ReLU(inplace=True),
            dropout,
            score_layer(channels, num_classes),
        )
