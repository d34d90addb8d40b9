"""DeepLab on VGG16: DeepLab v1, DeepLab-MSc and DeepLab v2.

Chen, Papandreou, Kokkinos, Murphy, Yuille: Semantic image segmentation with deep convolutional nets and fully connected
CRFs (2015), and DeepLab (2018). The last two poolings have stride 1 and the layers after them are dilated, so that
scores lie at every 8th pixel. Parameter names are those of the Caffe releases (where the last layers are called
``fc8_voc12``).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastseg.models.blocks.convolution import initialise_he_, scaled_width
from fastseg.models.blocks.heads import score_layer
from fastseg.models.blocks.vgg16 import FC6, DilatedVGG16, convolution_names, decimated, numbered, torchvision_sources
from fastseg.models.coarse import SubsampledNetwork
from fastseg.nn import MaxPool2d

FULLY_CONNECTED = {
    "largefov": FC6(1024, 3, padding=12, dilation=12),
    "4x4": FC6(4096, 4, padding=6, dilation=4),
    "7x7": FC6(4096, 7, padding=12, dilation=4),
}
ASPP_L, ASPP_S = (6, 12, 18, 24), (2, 4, 8, 12)  # rates of DeepLab v2
SIDE_CHANNELS = 128
SIDE_STRIDES = (8, 4, 2, 1, 1)  # of the branches on the image and on pool1 to pool4


class DeepLabVGG(SubsampledNetwork):
    """The base class of the networks of this module."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        *,
        width_multiplier: float,
        dropout: float,
        fully_connected: Sequence[FC6],
        average: bool = False,
    ):
        super().__init__(num_classes, in_channels)
        self.check_positive(width_multiplier=width_multiplier)
        pools: list[nn.Module] = [MaxPool2d(3, 2, 1, ceil_mode=True) for _ in range(3)]
        last = MaxPool2d(3, 1, 1)
        pools += [MaxPool2d(3, 1, 1), nn.Sequential(last, nn.AvgPool2d(3, 1, 1)) if average else last]
        self.backbone = DilatedVGG16(
            in_channels, width_multiplier, pools=pools, fully_connected=fully_connected, dropout=dropout
        )
        self.fc8 = nn.ModuleList(score_layer(self.backbone.channels, num_classes) for _ in fully_connected)

    def release_names(self) -> dict[str, str]:
        names = convolution_names("backbone.stages")
        branches = len(self.fc8)
        for branch in range(branches):
            number = f"_{branch + 1}" if branches > 1 else ""
            names |= {f"backbone.branches.{branch}.{layer}": f"{layer}{number}" for layer in ("fc6", "fc7")}
            names[f"fc8.{branch}"] = f"fc8{number}"
        return names

    def score_maps(self, image: Tensor) -> tuple[Tensor, ...]:
        first, *others = self.scores_to_sum(image)
        for scores in others:
            first = first + scores
        return (first,)

    def scores_to_sum(self, image: Tensor) -> list[Tensor]:
        """The scores of all branches."""
        _, branches = self.backbone(image)
        return [layer(features) for layer, features in zip(self.fc8, branches)]


class DeepLabV1(DeepLabVGG):
    """DeepLab v1, called on an image (N, in_channels, H, W): class scores (N, num_classes, H, W).

    Images of 8k + 1 pixels have k + 1 scores, on every 8th pixel; those of other sizes have one more row or column
    than labels. `loss` takes every 8th label, as the release does.

    Args:
        num_classes: classes, background included.
        in_channels: channels of the image.
        network: "largefov" (``fc6`` of 3x3 with dilation 12 and 1024 channels), "4x4" or "7x7" (dilation 4, 4096
            channels).
        width_multiplier: scales the width of every layer; 1 is VGG16.
        dropout: probability of zeroing an element after ``fc6`` and ``fc7``.

    Convolutions start from He's normal initialisation or from `load_imagenet`, ``fc8`` from a normal distribution of
    deviation 0.01.

    Raises:
        ValueError: a constructor argument is out of its range.
        RuntimeError: the image does not have shape (N, in_channels, H, W).
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        network: str = "largefov",
        width_multiplier: float = 1.0,
        dropout: float = 0.5,
    ):
        self.check_one_of(tuple(FULLY_CONNECTED), network=network)
        super().__init__(
            num_classes,
            in_channels,
            width_multiplier=width_multiplier,
            dropout=dropout,
            fully_connected=[FULLY_CONNECTED[network]],
            average=network == "largefov",
        )
        self.network = network

    def load_imagenet(self, state_dict: dict[str, Tensor]) -> "DeepLabV1":
        """Copies the weights of torchvision's ``vgg16``; ``fc6`` and ``fc7`` get every n-th filter and tap.

        ImageNet's output layer, ``classifier.6``, is ignored. torchvision's weights expect RGB images in [0, 1],
        normalised by the ImageNet mean and deviation.

        Raises:
            RuntimeError: a key is missing or a tensor has the wrong shape; nothing is copied then.
        """
        state_dict = decimated(state_dict, self.backbone.channels, FULLY_CONNECTED[self.network].kernel_size)
        layers = [*(f"conv{stage}_{layer}" for stage, layer in numbered()), "fc6", "fc7"]
        self.copy_tensors("load_imagenet", state_dict, torchvision_sources(state_dict, dict.fromkeys(layers)))
        return self


class SideBranch(nn.Sequential):
    """Scores at stride 8 from the image or from a pooled map, to be added to those of the trunk.

    A map whose size is not a multiple of the stride plus 1 is filled with zeros at its far ends, as the trunk rounds
    up.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, stride: int, dropout: float):
        super().__init__(
            initialise_he_(nn.Conv2d(in_channels, channels, 3, stride, padding=1)),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            initialise_he_(nn.Conv2d(channels, channels, 1)),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            score_layer(channels, num_classes),
        )
        self.stride = stride

    def forward(self, image: Tensor) -> Tensor:
        below, right = ((1 - size) % self.stride for size in image.shape[2:])
        return super().forward(F.pad(image, (0, right, 0, below)))


class DeepLabMSc(DeepLabV1):
    """DeepLab-MSc: the scores of DeepLab v1 plus those of branches on the image and on the first four poolings.

    Arguments, initialisation and errors are those of `DeepLabV1`; dropout acts in the branches, too. The release first
    trains `DeepLabV1`, whose state dict fits with ``strict=False``. The branches are ``branches.0``, of the image, to
    ``branches.4``, of pool4.
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        network: str = "largefov",
        width_multiplier: float = 1.0,
        dropout: float = 0.5,
    ):
        super().__init__(num_classes, in_channels, network=network, width_multiplier=width_multiplier, dropout=dropout)
        channels = scaled_width(SIDE_CHANNELS, width_multiplier)
        sources = [in_channels, *self.backbone.pool_channels[:4]]
        self.branches = nn.ModuleList(
            SideBranch(source, channels, num_classes, stride, dropout) for source, stride in zip(sources, SIDE_STRIDES)
        )

    def scores_to_sum(self, image: Tensor) -> list[Tensor]:
        pooled, (features,) = self.backbone(image)
        sides = [branch(source) for branch, source in zip(self.branches, [image, *pooled])]
        return [self.fc8[0](features), *sides]


class DeepLabV2VGG(DeepLabVGG):
    """DeepLab v2 on VGG16, called on an image (N, in_channels, H, W): class scores (N, num_classes, H, W).

    The scores of branches at several rates are summed (atrous spatial pyramid pooling). Sizes and loss are those of
    `DeepLabV1`.

    Args:
        num_classes: classes, background included.
        in_channels: channels of the image.
        rates: dilation of ``fc6_1``, ``fc6_2``, ...: ASPP-L, (6, 12, 18, 24), or ASPP-S, (2, 4, 8, 12).
        width_multiplier: scales the width of every layer; 1 is VGG16.
        dropout: probability of zeroing an element after each ``fc6`` and ``fc7``.

    Convolutions start from He's normal initialisation or, before the branches, from `load_imagenet`; ``fc8_1``, ...
    from a normal distribution of deviation 0.01.

    Raises:
        ValueError: a constructor argument is out of its range.
        RuntimeError: the image does not have shape (N, in_channels, H, W).
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        rates: Sequence[int] = ASPP_L,
        width_multiplier: float = 1.0,
        dropout: float = 0.5,
    ):
        if len(rates) < 2 or min(rates) < 1:
            raise ValueError(f"{self.name}: rates is {tuple(rates)}; allowed: two or more rates of 1 or more")
        super().__init__(
            num_classes,
            in_channels,
            width_multiplier=width_multiplier,
            dropout=dropout,
            fully_connected=[FC6(1024, 3, padding=rate, dilation=rate) for rate in rates],
        )

    def load_imagenet(self, state_dict: dict[str, Tensor]) -> "DeepLabV2VGG":
        """Copies the convolutions of torchvision's ``vgg16``; ``classifier`` is ignored.

        torchvision's weights expect RGB images in [0, 1], normalised by the ImageNet mean and deviation.

        Raises:
            RuntimeError: a key is missing or a tensor has the wrong shape; nothing is copied then.
        """
        layers = dict.fromkeys(f"conv{stage}_{layer}" for stage, layer in numbered())
        self.copy_tensors("load_imagenet", state_dict, torchvision_sources(state_dict, layers))
        return self
