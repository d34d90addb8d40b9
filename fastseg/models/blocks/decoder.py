"""The decoder of DeepLab v3+, and the keys of the pyramid and the decoder."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastseg import ops
from fastseg.models.blocks.atrous import initialise_separable_
from fastseg.models.blocks.convolution import initialise_all_he_, scaled_width
from fastseg.models.blocks.heads import score_layer
from fastseg.nn.aspp import convolution_block, separable_block

LOW_LEVEL_CHANNELS = 48

# {place of a layer in a block: its name in the keys}
CONVOLUTION = {0: "atrous_conv", 1: "bn"}
SEPARABLE = {0: "depthwise", 1: "depthwise_bn", 3: "pointwise", 4: "pointwise_bn"}


class Decoder(nn.Module):
    """Scores classes from the enlarged map of an encoder joined to a reduced low-level map: two blocks of 3x3.

    Args:
        low_level_channels: of the low-level map.
        channels: of the encoder's map and of the blocks.
        num_classes: classes that are scored.
        width_multiplier: scales the 48 channels to which the low-level map is reduced.
        norm: makes the normalisation of so many channels.
        separable: the blocks are depthwise and 1x1 convolutions.
    """

    def __init__(
        self,
        low_level_channels: int,
        channels: int,
        num_classes: int,
        width_multiplier: float,
        *,
        norm: Callable[[int], nn.Module],
        separable: bool = False,
    ):
        super().__init__()
        reduced = scaled_width(LOW_LEVEL_CHANNELS, width_multiplier)
        self.reduction = initialise_all_he_(convolution_block(low_level_channels, reduced, kernel_size=1, norm=norm))

        def block(in_channels):
            if separable:
                return initialise_separable_(separable_block(in_channels, channels, norm=norm))
            return initialise_all_he_(convolution_block(in_channels, channels, norm=norm))

        self.first, self.second = block(channels + reduced), block(channels)
        self.classifier = score_layer(channels, num_classes)

    def forward(self, encoded: Tensor, low_level: Tensor) -> Tensor:
        """The scores (N, num_classes, h, w) for a low-level map (N, low_level_channels, h, w)."""
        enlarged = ops.upsample_bilinear2d(encoded, tuple(low_level.shape[2:]), align_corners=True)
        joined = torch.cat([enlarged, self.reduction(low_level)], 1)
        return self.classifier(self.second(self.first(joined)))


def head_names(separable: bool) -> dict[str, str]:
    """`Network.release_names` of ``aspp`` and ``decoder``: jfzhang95's names; of separable blocks, SEPARABLE's."""
    names = {"aspp.convs.4.1": "aspp.global_avg_pool.1", "aspp.convs.4.2": "aspp.global_avg_pool.2"}
    for number in range(4):
        layers = SEPARABLE if separable and number > 0 else CONVOLUTION
        names |= {f"aspp.convs.{number}.{place}": f"aspp.aspp{number + 1}.{name}" for place, name in layers.items()}
    for path, part in (("aspp.project", "aspp"), ("decoder.reduction", "decoder")):
        names |= {f"{path}.0": f"{part}.conv1", f"{path}.1": f"{part}.bn1"}
    if separable:
        for block in ("decoder.first", "decoder.second"):
            names |= {f"{block}.{place}": f"{block}.{name}" for place, name in SEPARABLE.items()}
        return names
    for block, first in (("decoder.first", 0), ("decoder.second", 4)):
        names |= {f"{block}.{place}": f"decoder.last_conv.{first + place}" for place in (0, 1)}
    return names | {"decoder.classifier": "decoder.last_conv.8"}
