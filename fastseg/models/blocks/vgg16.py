"""The convolutions of VGG16: configuration D of Simonyan and Zisserman (2015)."""

from collections.abc import Callable, Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from fastseg.models.blocks.convolution import initialise_he_, layer_block, scaled_width
from fastseg.nn import MaxPool2d

STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # 3x3 convolutions, output channels at width 1
FULLY_CONNECTED_CHANNELS = 4096


def vgg16_stages(
    in_channels: int, width_multiplier: float, *, first_padding: int = 1, norm: Callable[[int], nn.Module] | None = None
) -> nn.ModuleList:
    """Five stages of `layer_block`s, without the pooling after each: 3x3 convolutions that keep the size.

    Convolutions start from He's normal initialisation and zero biases.

    Args:
        in_channels: channels of the image.
        width_multiplier: every layer has ``round(width * width_multiplier)`` channels, at least 1.
        first_padding: padding of the first convolution.
        norm: takes the number of channels and returns the normalisation after a convolution; None for none.
    """
    stages, channels, padding = nn.ModuleList(), in_channels, first_padding
    for layers, width in STAGES:
        width, stage = scaled_width(width, width_multiplier), nn.Sequential()
        for _ in range(layers):
            layer = initialise_he_(nn.Conv2d(channels, width, 3, padding=padding))
            stage.append(layer_block(layer, norm=norm and norm(width)))
            channels, padding = width, 1
        stages.append(stage)
    return stages


class FullyConvolutionalVGG16(nn.Module):
    """VGG16 whose fully connected layers are convolutions: ``fc6`` of 7x7 and ``fc7`` of 1x1.

    Pooling is 2x2 with ``ceil_mode=True`` as in Caffe.

    Args:
        in_channels, width_multiplier, first_padding: as in `vgg16_stages`.
        fc6_padding: padding of ``fc6``.
        dropout: probability of zeroing an element after ``fc6`` and ``fc7``.
    """

    def __init__(
        self, in_channels: int, width_multiplier: float, *, first_padding: int, fc6_padding: int, dropout: float
    ):
        super().__init__()
        self.stages = vgg16_stages(in_channels, width_multiplier, first_padding=first_padding)
        self.pool = MaxPool2d(2, 2, ceil_mode=True)
        widths = [scaled_width(width, width_multiplier) for _, width in STAGES]
        hidden = scaled_width(FULLY_CONNECTED_CHANNELS, width_multiplier)
        self.channels = widths[2], widths[3], hidden
        self.fc6 = initialise_he_(nn.Conv2d(widths[-1], hidden, 7, padding=fc6_padding))
        self.fc7 = initialise_he_(nn.Conv2d(hidden, hidden, 1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The maps after poolings 3 (stride 8) and 4 (16) and after ``fc7`` (32); their channels: `channels`."""
        pooled = []
        for stage in self.stages:
            image = self.pool(stage(image))
            pooled.append(image)
        fc6 = self.dropout(F.relu(self.fc6(image), inplace=True))
        return pooled[2], pooled[3], self.dropout(F.relu(self.fc7(fc6), inplace=True))


def numbered() -> Iterator[tuple[int, int]]:
    """(stage, layer) of every convolution, counted from 1: conv1_1, conv1_2, conv2_1, ..."""
    return ((stage, layer) for stage, (layers, _) in enumerate(STAGES, 1) for layer in range(1, layers + 1))


def torchvision_keys(batch_norm: bool = False) -> dict[str, str]:
    """torchvision's name of each layer: ``{"conv1_1": "features.0", ..., "fc6": "classifier.0", ...}``.

    Each convolution is followed by a ReLU, in ``vgg16_bn`` by a batch normalisation (at the next index) and a ReLU, a
    stage by a pooling. ``classifier.6``, the 1000-way output of ImageNet, has no counterpart here.
    """
    keys, index, last = {}, 0, 1
    for stage, layer in numbered():
        index += stage - last  # the pooling
        keys[f"conv{stage}_{layer}"], last = f"features.{index}", stage
        index += 3 if batch_norm else 2
    return keys | {"fc6": "classifier.0", "fc7": "classifier.3"}


def torchvision_sources(state_dict: dict[str, Tensor], layers: Mapping[str, str | None]) -> dict[str, str]:
    """{own key: key of torchvision's vgg16 or vgg16_bn}, for `Network.copy_tensors`.

    layers: {layer: own name of the normalisation after it, or None} for conv1_1, ... and perhaps fc6 and fc7. vgg16 has
        no normalisation: those of the network then do not change.
    """
    batch_norm = "features.1.weight" in state_dict  # in vgg16 layer 1 is a ReLU, which has no weight
    keys = torchvision_keys(batch_norm)
    sources: dict[str, str] = {}
    for layer, norm in layers.items():
        sources |= {f"{layer}.{kind}": f"{keys[layer]}.{kind}" for kind in ("weight", "bias")}
        if batch_norm and norm is not None:
            index = int(keys[layer].removeprefix("features.")) + 1
            for kind in ("weight", "bias", "running_mean", "running_var"):
                sources[f"{norm}.{kind}"] = f"features.{index}.{kind}"
    return sources
