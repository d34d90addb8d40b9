"""The convolutions of VGG16: configuration D of Simonyan and Zisserman (2015)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastseg.models.blocks.convolution import initialise_he_, layer_block, scaled_width
from fastseg.nn import Conv2d, MaxPool2d

STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # 3x3 convolutions, output channels at width 1
FULLY_CONNECTED_CHANNELS = 4096


def vgg16_stages(
    in_channels: int,
    width_multiplier: float,
    *,
    first_padding: int = 1,
    padding: int = 1,
    last_dilation: int = 1,
    norm: Callable[[int], nn.Module] | None = None,
) -> nn.ModuleList:
    """Five stages of `layer_block`s, without the pooling after each: 3x3 convolutions.

    Convolutions start from He's normal initialisation and zero biases.

    Args:
        in_channels: channels of the image.
        width_multiplier: every layer has ``round(width * width_multiplier)`` channels, at least 1.
        first_padding: padding of the first convolution.
        padding: of the others, times their dilation: 1 keeps the size, 0 is none.
        last_dilation: dilation in the last stage.
        norm: takes the number of channels and returns the normalisation after a convolution; None for none.
    """
    stages, channels = nn.ModuleList(), in_channels
    for number, (layers, width) in enumerate(STAGES, 1):
        width, stage = scaled_width(width, width_multiplier), nn.Sequential()
        dilation = last_dilation if number == len(STAGES) else 1
        for place in range(layers):
            inset = first_padding if number == 1 and place == 0 else padding * dilation
            layer = _convolution(channels, width, 3, inset, dilation)
            stage.append(layer_block(layer, norm=norm and norm(width)))
            channels = width
        stages.append(stage)
    return stages


def _convolution(
    in_channels: int, out_channels: int, kernel_size: int, padding: int = 0, dilation: int = 1
) -> nn.Conv2d:
    """From He's initialisation; ours if dilated, else stock's."""
    kind = Conv2d if dilation > 1 else nn.Conv2d
    layer = kind(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation)
    initialise_he_(layer)
    return layer


class FC6(NamedTuple):
    """``fc6`` as a convolution."""

    channels: int
    kernel_size: int
    padding: int
    dilation: int = 1


class FullyConnected(nn.Module):
    """``fc6`` and ``fc7`` as convolutions (``fc7`` of 1x1), each with ReLU and dropout.

    Args:
        in_channels: of the map.
        width_multiplier: see `vgg16_stages`.
        fc6: the first convolution; ``fc7`` has as many channels.
        dropout: probability of zeroing an element.
    """

    def __init__(self, in_channels: int, width_multiplier: float, fc6: FC6, dropout: float):
        super().__init__()
        self.channels = scaled_width(fc6.channels, width_multiplier)
        self.fc6 = _convolution(in_channels, self.channels, *fc6[1:])
        self.fc7 = _convolution(self.channels, self.channels, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, image: Tensor) -> Tensor:
        fc6 = self.dropout(F.relu(self.fc6(image), inplace=True))
        return self.dropout(F.relu(self.fc7(fc6), inplace=True))


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
        fc6 = FC6(FULLY_CONNECTED_CHANNELS, 7, fc6_padding)
        self.fully_connected = FullyConnected(widths[-1], width_multiplier, fc6, dropout)
        self.channels = widths[2], widths[3], self.fully_connected.channels

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The maps after poolings 3 (stride 8) and 4 (16) and after ``fc7`` (32); their channels: `channels`."""
        pooled = []
        for stage in self.stages:
            image = self.pool(stage(image))
            pooled.append(image)
        return pooled[2], pooled[3], self.fully_connected(image)


class DilatedVGG16(nn.Module):
    """VGG16 at stride 8: instead of the last two poolings, the convolutions after them are dilated.

    Args:
        in_channels, width_multiplier: as in `vgg16_stages`.
        pools: what follows each of the five stages; three of them have stride 2.
        padded: whether the convolutions of the stages are padded, so that they keep the size.
        fully_connected: ``fc6`` of each of the branches, each with an ``fc7``, on the last map.
        dropout: probability of zeroing an element after each ``fc6`` and ``fc7``.

    Attributes:
        pool_channels: channels of the five maps.
        channels: those of each branch.
    """

    def __init__(
        self,
        in_channels: int,
        width_multiplier: float,
        *,
        pools: Sequence[nn.Module],
        padded: bool = True,
        fully_connected: Sequence[FC6],
        dropout: float,
    ):
        super().__init__()
        padding = int(padded)
        self.stages = vgg16_stages(
            in_channels, width_multiplier, first_padding=padding, padding=padding, last_dilation=2
        )
        self.pools = nn.ModuleList(pools)
        self.pool_channels = [scaled_width(width, width_multiplier) for _, width in STAGES]
        self.branches = nn.ModuleList(
            FullyConnected(self.pool_channels[-1], width_multiplier, fc6, dropout) for fc6 in fully_connected
        )
        self.channels = scaled_width(fully_connected[0].channels, width_multiplier)

    def forward(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The maps after the five poolings, and those of the branches."""
        pooled = []
        for stage, pool in zip(self.stages, self.pools):
            image = pool(stage(image))
            pooled.append(image)
        return pooled, [branch(image) for branch in self.branches]


def numbered() -> Iterator[tuple[int, int]]:
    """(stage, layer) of every convolution, counted from 1: conv1_1, conv1_2, conv2_1, ..."""
    return ((stage, layer) for stage, (layers, _) in enumerate(STAGES, 1) for layer in range(1, layers + 1))


def convolution_names(stages: str) -> dict[str, str]:
    """{path of a convolution: conv1_1, ...}; `stages` is the path of `vgg16_stages`."""
    return {f"{stages}.{stage - 1}.{layer - 1}.layer": f"conv{stage}_{layer}" for stage, layer in numbered()}


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


def decimated(state_dict: dict[str, Tensor], channels: int, kernel_size: int) -> dict[str, Tensor]:
    """A copy of torchvision's `state_dict` whose ``fc6`` and ``fc7`` are thinned out, as DeepLab initialises its own.

    Every n-th filter is kept, so that `channels` are left, and every n-th tap of the 7x7 kernel of ``fc6``. Layers
    that are absent or of another shape stay as they are.
    """
    found = dict(state_dict)
    fc6, fc7 = (found.get(f"classifier.{layer}.weight") for layer in (0, 3))
    if fc6 is None or fc7 is None or fc6[0].numel() % 49 or len(fc6) < channels or len(fc7) < channels:
        return found
    kept, apart = slice(0, None, len(fc6) // channels), 6 // (kernel_size - 1)
    found["classifier.0.weight"] = fc6.reshape(len(fc6), -1, 7, 7)[kept, :, ::apart, ::apart]
    found["classifier.3.weight"] = fc7.reshape(len(fc7), -1)[kept, kept]
    for layer in (0, 3):
        bias = f"classifier.{layer}.bias"
        if bias in found:
            found[bias] = found[bias][kept]
    return found
