"""TuSimple's DUC on a ResNet with HDC: dense upsampling and hybrid dilated convolution.

Wang, Chen, Yuan, Liu, Huang, Hou, Cottrell: Understanding convolution for semantic segmentation (2018).
"""

import torch.nn.functional as F
from torch import Tensor

from fastseg.models.blocks.atrous import SCORE_RATES, AtrousScores
from fastseg.models.blocks.normalisation import batch_norm
from fastseg.models.blocks.resnet import BLOCKS, ResNet
from fastseg.models.blocks.resnet_network import check_resnet_arguments
from fastseg.models.coarse import SubsampledNetwork

TRUNK_STRIDE = 8
HDC_RATES = (1, 2, 5, 9)  # over and over in the third stage
LAST_STAGE_RATES = (5, 9, 17)
BATCH_NORM = dict(eps=1e-6, momentum=5e-4)  # MXNet's momentum of 0.9995
CELLS = (1, 4, 16, 64)


class DUC(SubsampledNetwork):
    """DUC with HDC on the ResNet with a deep stem, as TuSimple released it.

    Called on an image (N, in_channels, H, W) it returns class scores (N, num_classes, H, W). Each place of the trunk,
    8 x 8 pixels, gives a square of `cells` scores of each class; what is missing to 8 x 8 is interpolated with
    half-pixel centres. `loss` compares the scores before that with every second label (`cells` = 16), as in the
    release. Keys: ``backbone.*``, ``classifier.conv2d_list.{0..3}``. The release's files are MXNet's.

    Args:
        num_classes: classes to score; 19 for Cityscapes.
        in_channels: channels of the image.
        layers: of the ResNet: 50, 101 or 152.
        cells: scores of a class per place of the trunk: 1, 4, 16 (the released network) or 64 (no interpolation).
        width_multiplier: scales the width of every layer.
        norm: "frozen", as in the release (fixed statistics; scales are trained), "batch" or "sync".

    Convolutions of the trunk start from He's normal initialisation, score layers from a normal distribution of
    deviation 0.01. torchvision has no ResNet with this stem.

    Raises:
        ValueError: a constructor argument is out of its range.
        RuntimeError: the image does not have shape (N, in_channels, H, W).
    """

    align_corners = False

    def __init__(
        self,
        num_classes: int = 19,
        in_channels: int = 3,
        *,
        layers: int = 101,
        cells: int = 16,
        width_multiplier: float = 1.0,
        norm: str = "frozen",
    ):
        super().__init__(num_classes, in_channels)
        check_resnet_arguments(self, layers=layers, width_multiplier=width_multiplier, norm=norm)
        self.check_one_of(CELLS, cells=cells)
        self.upscale = round(cells**0.5)
        self.label_stride = TRUNK_STRIDE // self.upscale
        self.backbone = ResNet(
            layers,
            in_channels,
            width_multiplier,
            deep_stem=True,
            stride_in_1x1=True,
            output_stride=TRUNK_STRIDE,
            dilations=(hybrid_rates(BLOCKS[layers][2]), LAST_STAGE_RATES),
            norm=batch_norm(norm, **BATCH_NORM),
        ).requires_grad_(True)  # the release trains the scales of frozen normalisation, too
        self.classifier = AtrousScores(self.backbone.channels[-1], num_classes * cells, SCORE_RATES)

    def score_maps(self, image: Tensor) -> tuple[Tensor, ...]:
        """The scores of all cells: (N, num_classes, h, w), where h cells cover ceil(H / 8) * 8 rows."""
        return (F.pixel_shuffle(self.classifier(self.backbone(image)[-1]), self.upscale),)

    def covering_scores(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        scores = self.coarse_scores(image)
        return scores, (self.label_stride * scores.shape[2], self.label_stride * scores.shape[3])


def hybrid_rates(blocks: int) -> list[int]:
    """The dilations of the third stage: 1, 2, 5, 9 over and over, but the very first is 2 in the release."""
    rates = [HDC_RATES[block % len(HDC_RATES)] for block in range(blocks)]
    return [HDC_RATES[1], *rates[1:]]
