"""TuSimple's DUC on ResNet-101 with HDC in stock torch.nn, without a line of fastseg.models."""

import torch.nn.functional as F
from torch import nn

from tests.models.stock_deeplab_resnet import StockASPPv2
from tests.models.stock_resnet import FrozenBatchNorm, StockResNet


def shuffled(scores, classes):
    """Channel c * r * r + dy * r + dx of a cell becomes pixel (dy, dx) of the r x r pixels of class c."""
    images, channels, height, width = scores.shape
    side = round((channels // classes) ** 0.5)
    cells = scores.reshape(images, classes, side, side, height, width)
    return cells.permute(0, 1, 4, 2, 5, 3).reshape(images, classes, height * side, width * side)


class StockDUC(StockResNet):
    """``scores`` gives them at the size of the cells, ``forward`` at image size.

    cells: scores of a class per place of the trunk, which has stride 8: 16 (half the resolution) or 64 (all of it).
    head: "sum" of four 3x3 convolutions at rates 6, 12, 18, 24, or "single", one with batch normalisation, at rate 1,
    with ReLU on the scores unless final_relu=False. hdc: "released" or "cycle". The rest of the way is interpolated
    with half-pixel centres, and what lies beyond the image is cut off.
    freeze: batch normalisation keeps its statistics; its scales and shifts are trained.
    """

    def __init__(
        self, classes=19, width=1.0, depth=101, cells=16, in_channels=3, rates=(6, 12, 18, 24), head="sum",
        final_relu=True, hdc="released", stride_in="1x1", deep_stem=True, freeze=True, eps=1e-6, momentum=5e-4,
    ):  # fmt: skip
        norm = FrozenBatchNorm if freeze else nn.BatchNorm2d
        super().__init__(
            depth, width, in_channels, deep_stem, stride_in, output_stride=8, hdc=hdc, norm=norm, eps=eps,
            momentum=momentum,
        )  # fmt: skip
        self.classes, self.final = classes, nn.Identity()
        entering, leaving = int(2048 * width), classes * cells
        if head == "sum":
            self.layer5 = StockASPPv2(entering, leaving, rates)
        else:
            self.layer5 = nn.Conv2d(entering, leaving, 3, padding=1)
            self.final = nn.Sequential(norm(leaving, eps, momentum), *([nn.ReLU()] if final_relu else []))

    def cell_scores(self, image):
        return self.final(self.layer5(self.stages(image)[3]))

    def scores(self, image):
        return shuffled(self.cell_scores(image), self.classes)

    def forward(self, image):
        cells = self.cell_scores(image)
        scores = shuffled(cells, self.classes)
        size = [8 * side for side in cells.shape[2:]]
        if list(scores.shape[2:]) != size:
            scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
        return scores[:, :, : image.shape[2], : image.shape[3]]
