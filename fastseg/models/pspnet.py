"""PSPNet: pyramid pooling on a dilated ResNet.

Zhao, Shi, Qi, Wang, Jia: Pyramid scene parsing network (2017).
"""

from torch import Tensor, nn

from fastseg.models.blocks.convolution import initialise_all_he_, scaled_width
from fastseg.models.blocks.heads import FCNHead
from fastseg.models.blocks.normalisation import batch_norm
from fastseg.models.blocks.resnet import ResNet
from fastseg.models.blocks.resnet_network import check_resnet_arguments, names_below
from fastseg.models.coarse import CoarseNetwork
from fastseg.nn import PyramidPooling

HEAD_CHANNELS, AUXILIARY_CHANNELS = 512, 256
BINS = (1, 2, 3, 6)


class PSPNet(CoarseNetwork):
    """PSPNet on the ResNet with a deep stem, as the authors' semseg defines it; its keys.

    Called on an image (N, in_channels, H, W) it returns class scores (N, num_classes, H, W). Scores of the grid of
    stride 8 are interpolated with aligned corners: sizes of 8k + 1, such as 473 and 713, fit exactly. While training,
    `loss` adds 0.4 times the loss of the auxiliary head on the third stage.

    Args:
        num_classes: classes to score; 150 for ADE20K.
        in_channels: channels of the image.
        layers: of the ResNet: 50, 101 or 152.
        auxiliary: whether there is an auxiliary head, ``aux``.
        width_multiplier: scales the width of every layer.
        dropout: probability of zeroing a channel before the scores, in both heads.
        norm: "batch", "sync" (statistics over all processes) or "frozen" (neither statistics nor scales are trained).

    Convolutions start from He's normal initialisation, score layers from a normal distribution of deviation 0.01.
    torchvision has no ResNet with this stem.

    Raises:
        ValueError: a constructor argument is out of its range; training on one image, of which the coarsest pooling
            gives batch normalisation a single value.
        RuntimeError: the image does not have shape (N, in_channels, H, W).
    """

    align_corners = True
    auxiliary_weights = (0.4,)

    def __init__(
        self,
        num_classes: int = 150,
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
        self.backbone = ResNet(layers, in_channels, width_multiplier, deep_stem=True, output_stride=8, norm=make_norm)
        _, _, stage3, stage4 = self.backbone.channels
        channels = scaled_width(HEAD_CHANNELS, width_multiplier)

        def head(in_channels, channels):
            drop = nn.Dropout2d(dropout)
            return FCNHead(in_channels, channels, num_classes, norm=make_norm, dropout=drop)

        self.ppm = PyramidPooling(stage4, channels, BINS, norm=make_norm)
        initialise_all_he_(self.ppm)
        self.cls = head(stage4 + len(BINS) * channels, channels)
        self.aux = head(stage3, scaled_width(AUXILIARY_CHANNELS, width_multiplier)) if auxiliary else None

    def release_names(self) -> dict[str, str]:
        return names_below(self.backbone, "backbone.", "")

    def score_maps(self, image: Tensor) -> tuple[Tensor, ...]:
        _, _, stage3, stage4 = self.backbone(image)
        convolution, *layers_after = self.cls
        scores = self.ppm.convolved(stage4, convolution)
        for layer in layers_after:
            scores = layer(scores)
        if self.training and self.aux is not None:
            return scores, self.aux(stage3)
        return (scores,)
