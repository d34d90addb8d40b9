"""DeepLab v3+: the encoder of DeepLab v3 and a decoder of stride 4, on ResNet and on Xception.

Chen, Zhu, Papandreou, Schroff, Adam: Encoder-decoder with atrous separable convolution for semantic image segmentation
(2018).
"""

from torch import Tensor

from fastseg.models.blocks.atrous import ASPP_RATES, deeplab_aspp
from fastseg.models.blocks.convolution import scaled_width
from fastseg.models.blocks.decoder import Decoder, head_names
from fastseg.models.blocks.normalisation import NORMS, batch_norm
from fastseg.models.blocks.resnet import ResNet
from fastseg.models.blocks.resnet_network import ResNetNetwork, check_multi_grid, check_resnet_arguments
from fastseg.models.blocks.xception import FLOWS, Xception
from fastseg.models.coarse import CoarseNetwork
from fastseg.models.deeplab_v3 import ASPP_CHANNELS, BATCH_NORM_MOMENTUM

XCEPTION_EPS = 1e-3


class DeepLabV3Plus(ResNetNetwork):
    """DeepLab v3+ on ResNet.

    Called on an image (N, in_channels, H, W) it returns class scores (N, num_classes, H, W). Maps are enlarged with
    aligned corners: sizes of ``output_stride k + 1``, such as 513, fit exactly. `coarse_scores` has stride 4.
    Keys of jfzhang95's PyTorch version: ``backbone.*``, ``aspp.aspp1.atrous_conv`` ..., ``decoder.last_conv.0`` ...

    Args:
        num_classes: classes, background included.
        in_channels: channels of the image.
        layers: of the ResNet: 50, 101 or 152.
        output_stride: of the encoder, 16 or 8; the dilations of its pyramid are 6, 12, 18 or twice as much.
        multi_grid: factors of the dilations of the three blocks of the last stage.
        width_multiplier: scales the width of every layer.
        dropout: probability of zeroing an element after the pyramid.
        norm: "batch", "sync" (statistics over all processes) or "frozen" (neither statistics nor scales are trained).

    Convolutions start from He's normal initialisation or, in the trunk, from `load_imagenet`; the score layer from a
    normal distribution of deviation 0.01. The momentum of the running statistics is 0.0003, as in TensorFlow's release.

    Raises:
        ValueError: a constructor argument is out of its range; training on one image, of which the image pooling
            gives batch normalisation a single value.
        RuntimeError: the image does not have shape (N, in_channels, H, W).
    """

    align_corners = True

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        layers: int = 101,
        output_stride: int = 16,
        multi_grid: tuple[int, int, int] = (1, 2, 4),
        width_multiplier: float = 1.0,
        dropout: float = 0.1,
        norm: str = "batch",
    ):
        super().__init__(num_classes, in_channels)
        check_resnet_arguments(self, layers=layers, width_multiplier=width_multiplier, norm=norm)
        check_multi_grid(self, multi_grid)
        self.check_one_of(tuple(ASPP_RATES), output_stride=output_stride)
        make_norm = batch_norm(norm, momentum=BATCH_NORM_MOMENTUM)
        self.backbone = ResNet(
            layers, in_channels, width_multiplier, output_stride=output_stride, multi_grid=multi_grid, norm=make_norm
        )
        stage1, _, _, stage4 = self.backbone.channels
        channels = scaled_width(ASPP_CHANNELS, width_multiplier)
        self.aspp = deeplab_aspp(stage4, channels, output_stride, dropout=dropout, norm=make_norm)
        self.decoder = Decoder(stage1, channels, num_classes, width_multiplier, norm=make_norm)

    def release_names(self) -> dict[str, str]:
        return head_names(separable=False)

    def score_maps(self, image: Tensor) -> tuple[Tensor, ...]:
        stage1, _, _, stage4 = self.backbone(image)
        return (self.decoder(self.aspp(stage4), stage1),)


class DeepLabV3PlusXception(CoarseNetwork):
    """DeepLab v3+ on the modified aligned Xception, with separable convolutions in the pyramid and the decoder.

    Called on an image (N, in_channels, H, W) it returns class scores (N, num_classes, H, W). Maps are enlarged with
    aligned corners: sizes of ``output_stride k + 1``, such as 513, fit exactly. `coarse_scores` has stride 4. Keys of
    the trunk are those of jfzhang95's PyTorch version, whose pyramid and decoder are not separable.

    Args:
        num_classes: classes, background included.
        in_channels: channels of the image.
        layers: of Xception: 41, 65 or 71.
        output_stride: of the encoder, 16 or 8; the dilations of its pyramid are 6, 12, 18 or twice as much.
        multi_grid: factors of the dilations of the last three convolutions of the trunk.
        width_multiplier: scales the width of every layer.
        dropout: probability of zeroing an element after the pyramid.
        norm: "batch", "sync" (statistics over all processes) or "frozen" (neither statistics nor scales are trained).

    As in TensorFlow's release, depthwise convolutions of the pyramid and the decoder start normal with deviation 0.33,
    the 1x1 convolutions after them 0.06, both cut off at two deviations; all others from He's normal initialisation,
    the score layer from a normal distribution of deviation 0.01. Normalisation has an epsilon of 0.001 in the trunk and
    a momentum of 0.0003. The release has no weight decay on depthwise convolutions.

    Raises:
        ValueError: a constructor argument is out of its range; training on one image, of which the image pooling
            gives batch normalisation a single value.
        RuntimeError: the image does not have shape (N, in_channels, H, W).
    """

    align_corners = True

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        layers: int = 65,
        output_stride: int = 16,
        multi_grid: tuple[int, int, int] = (1, 1, 1),
        width_multiplier: float = 1.0,
        dropout: float = 0.1,
        norm: str = "batch",
    ):
        super().__init__(num_classes, in_channels)
        self.check_positive(width_multiplier=width_multiplier)
        self.check_one_of(tuple(FLOWS), layers=layers)
        self.check_one_of(NORMS, norm=norm)
        self.check_one_of(tuple(ASPP_RATES), output_stride=output_stride)
        check_multi_grid(self, multi_grid)
        self.backbone = Xception(
            layers,
            in_channels,
            width_multiplier,
            output_stride=output_stride,
            multi_grid=multi_grid,
            norm=batch_norm(norm, eps=XCEPTION_EPS, momentum=BATCH_NORM_MOMENTUM),
        )
        low_level, last = self.backbone.channels
        channels = scaled_width(ASPP_CHANNELS, width_multiplier)
        make_norm = batch_norm(norm, momentum=BATCH_NORM_MOMENTUM)
        self.aspp = deeplab_aspp(last, channels, output_stride, dropout=dropout, norm=make_norm, separable=True)
        self.decoder = Decoder(low_level, channels, num_classes, width_multiplier, norm=make_norm, separable=True)

    def release_names(self) -> dict[str, str]:
        return head_names(separable=True)

    def score_maps(self, image: Tensor) -> tuple[Tensor, ...]:
        low_level, last = self.backbone(image)
        return (self.decoder(self.aspp(last), low_level),)
