"""DeepLab v3: atrous spatial pyramid pooling on a dilated ResNet.

Chen, Papandreou, Schroff, Adam: Rethinking atrous convolution for semantic image segmentation (2017).
"""

from torch import Tensor, nn

from fastseg.models.blocks.atrous import ASPP_RATES, deeplab_aspp
from fastseg.models.blocks.convolution import initialise_all_he_, scaled_width
from fastseg.models.blocks.heads import FCNHead, score_layer
from fastseg.models.blocks.normalisation import batch_norm
from fastseg.models.blocks.resnet import ResNet
from fastseg.models.blocks.resnet_network import (
    ResNetNetwork,
    TorchvisionNetwork,
    check_multi_grid,
    check_resnet_arguments,
)
from fastseg.nn.aspp import convolution_block

ASPP_CHANNELS = 256
BATCH_NORM_MOMENTUM = 3e-4  # TensorFlow's decay of 0.9997
TORCHVISION_OUTPUT_STRIDE = 8


class DeepLabV3(ResNetNetwork):
    """DeepLab v3 as in the paper; torchvision's network, which differs from it, is `DeepLabV3Torchvision`.

    Called on an image (N, in_channels, H, W) it returns class scores (N, num_classes, H, W). The scores of the grid of
    `output_stride` are interpolated with aligned corners: sizes of ``output_stride k + 1``, such as 513, fit exactly.
    Keys ``backbone.*`` (torchvision's ResNet), ``aspp.*`` (torchvision's ASPP) and ``classifier``.

    Args:
        num_classes: classes, background included.
        in_channels: channels of the image.
        layers: of the ResNet: 50, 101 or 152.
        output_stride: 16 or 8; the dilations of the pyramid are 6, 12, 18 or twice as much.
        multi_grid: factors of the dilations of the three blocks of the last stage.
        width_multiplier: scales the width of every layer.
        dropout: probability of zeroing an element before the scores.
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
        channels = scaled_width(ASPP_CHANNELS, width_multiplier)
        self.aspp = deeplab_aspp(self.backbone.channels[-1], channels, output_stride, dropout=dropout, norm=make_norm)
        self.classifier = score_layer(channels, num_classes)

    def score_maps(self, image: Tensor) -> tuple[Tensor, ...]:
        return (self.classifier(self.aspp(self.backbone(image)[-1])),)


class DeepLabV3Torchvision(TorchvisionNetwork):
    """torchvision's ``deeplabv3_resnet50`` and ``deeplabv3_resnet101``: their layers and keys; their checkpoints load.

    It differs from the paper's network (`DeepLabV3`): output stride 8 without multi-grid, a 3x3 convolution after the
    pyramid, an auxiliary head, no aligned corners. Called on an image (N, in_channels, H, W) it returns class scores
    (N, num_classes, H, W), torchvision's ``"out"``. While training, `loss` adds half the loss of the auxiliary head on
    the third stage, as torchvision's recipe does.

    Args:
        num_classes: classes, background included.
        in_channels: channels of the image.
        layers: of the ResNet: 50, 101 or 152.
        auxiliary: whether there is an auxiliary head, ``aux_classifier``.
        width_multiplier: scales the width of every layer.
        dropout: probability of zeroing an element after the pyramid.
        auxiliary_dropout: the same before the auxiliary scores.
        norm: "batch", "sync" (statistics over all processes) or "frozen" (neither statistics nor scales are trained).

    Convolutions start from He's normal initialisation or, in the trunk, from `load_imagenet`; score layers from a
    normal distribution of deviation 0.01.

    Raises:
        ValueError: a constructor argument is out of its range; training on one image, of which the image pooling
            gives batch normalisation a single value.
        RuntimeError: the image does not have shape (N, in_channels, H, W).
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        layers: int = 50,
        auxiliary: bool = True,
        width_multiplier: float = 1.0,
        dropout: float = 0.5,
        auxiliary_dropout: float = 0.1,
        norm: str = "batch",
    ):
        super().__init__(num_classes, in_channels)
        check_resnet_arguments(self, layers=layers, width_multiplier=width_multiplier, norm=norm)
        stride, make_norm = TORCHVISION_OUTPUT_STRIDE, batch_norm(norm)
        self.backbone = ResNet(
            layers, in_channels, width_multiplier, output_stride=stride, keep_first_dilation=True, norm=make_norm
        )
        _, _, stage3, stage4 = self.backbone.channels
        channels = scaled_width(ASPP_CHANNELS, width_multiplier)
        self.classifier = nn.Sequential(
            deeplab_aspp(stage4, channels, stride, dropout=dropout, norm=make_norm),
            *initialise_all_he_(convolution_block(channels, channels, norm=make_norm)),
            score_layer(channels, num_classes),
        )
        drop = nn.Dropout(auxiliary_dropout)
        self.aux_classifier = (
            FCNHead(stage3, channels, num_classes, norm=make_norm, dropout=drop) if auxiliary else None
        )
