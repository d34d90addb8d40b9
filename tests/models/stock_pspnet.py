"""PSPNet on the deep-stem ResNet in stock torch.nn, without a line of fastseg.models."""

import torch
from torch import nn

from tests.models.stock_deeplab_resnet import resized
from tests.models.stock_fcn_resnet import StockFCNHead
from tests.models.stock_resnet import StockResNet, convolved


class StockPyramidPooling(nn.Module):
    """The map joined to its means over 1x1, 2x2, 3x3 and 6x6 bins, each convolved and enlarged again."""

    def __init__(self, channels_in, channels_each, bins=(1, 2, 3, 6)):
        super().__init__()
        self.features = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(count), *convolved(channels_in, channels_each)) for count in bins
        )

    def forward(self, image):
        return torch.cat([image, *(resized(branch(image), image.shape[2:]) for branch in self.features)], dim=1)


class StockPSPNet(StockResNet):
    """``forward`` gives scores at image size; while training, with an auxiliary head, (scores, auxiliary scores).

    ``maps`` gives both at stride 8: k + 1 scores for 8k + 1 pixels. For other sizes the scores are stretched a little.
    dropout: of whole channels, in both heads. head_width: factor of the widths of the heads, else ``width``.
    """

    def __init__(
        self, classes=150, width=1.0, depth=50, auxiliary=True, in_channels=3, dropout=0.1, head_width=None,
        stride_in="3x3",
    ):  # fmt: skip
        super().__init__(depth, width, in_channels, deep_stem=True, stride_in=stride_in, output_stride=8, first="own")
        head = width if head_width is None else head_width
        self.auxiliary = auxiliary
        trunk, branch = int(2048 * width), int(512 * head)
        self.ppm = StockPyramidPooling(trunk, branch)
        self.cls = StockFCNHead(trunk + 4 * branch, int(512 * head), classes, dropout, nn.Dropout2d)
        if auxiliary:
            self.aux = StockFCNHead(int(1024 * width), int(256 * head), classes, dropout, nn.Dropout2d)

    def maps(self, image):
        stages = self.stages(image)
        return self.cls(self.ppm(stages[3])), self.aux(stages[2]) if self.auxiliary else None

    def forward(self, image):
        scores, auxiliary = self.maps(image)
        scores = resized(scores, image.shape[2:])
        if not self.training or auxiliary is None:
            return scores
        return scores, resized(auxiliary, image.shape[2:])
