"""FCN on a dilated ResNet, as torchvision defines it."""

from torch import nn

from fastseg.models.blocks.heads import FCNHead
from fastseg.models.blocks.normalisation import batch_norm
from fastseg.models.blocks.resnet import ResNet
from fastseg.models.blocks.resnet_network import TorchvisionNetwork, check_resnet_arguments


class FCNResNet(TorchvisionNetwork):
    """torchvision's ``fcn_resnet50`` and ``fcn_resnet101``: their layers and keys, and their checkpoints load.

    Called on an image (N, in_channels, H, W) it returns class scores (N, num_classes, H, W), torchvision's ``"out"``.
    While training, `loss` adds half the loss of the auxiliary head on the third stage, as torchvision's recipe does.

    Args:
        num_classes: classes, background included.
        in_channels: channels of the image.
        layers: of the ResNet: 50, 101 or 152.
        auxiliary: whether there is an auxiliary head, ``aux_classifier``.
        width_multiplier: scales the width of every layer.
        dropout: probability of zeroing an element before the scores.
        norm: "batch", "sync" (statistics over all processes) or "frozen" (neither statistics nor scales are trained).

    Convolutions start from He's normal initialisation or, in the trunk, from `load_imagenet`; score layers from a
    normal distribution of deviation 0.01.

    Raises:
        ValueError: a constructor argument is out of its range.
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
        dropout: float = 0.1,
        norm: str = "batch",
    ):
        super().__init__(num_classes, in_channels)
        check_resnet_arguments(self, layers=layers, width_multiplier=width_multiplier, norm=norm)
        make_norm = batch_norm(norm)
        self.backbone = ResNet(
            layers, in_channels, width_multiplier, output_stride=8, keep_first_dilation=True, norm=make_norm
        )

        def head(channels):
            drop = nn.Dropout(dropout)
            return FCNHead(channels, max(1, channels // 4), num_classes, norm=make_norm, dropout=drop)

        _, _, stage3, stage4 = self.backbone.channels
        self.classifier = head(stage4)
        self.aux_classifier = head(stage3) if auxiliary else None
