"""torchvision's FCN-ResNet50/101 in stock torch.nn, with its keys, without a line of fastseg.models."""

import torch.nn.functional as F
from torch import nn

from tests.models.stock_resnet import StockResNet


def chosen(dropout, usual):
    """A network's usual dropout, unless another was asked for."""
    return usual if dropout is None else dropout


class StockFCNHead(nn.Sequential):
    """3x3 convolution to a quarter of the channels, batch normalisation, ReLU, dropout, scores."""

    def __init__(self, channels_in, middle, classes, dropout=0.1, drop=nn.Dropout):
        super().__init__(
            nn.Conv2d(channels_in, middle, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            drop(dropout),
            nn.Conv2d(middle, classes, 1),
        )


class StockWithAuxiliary(nn.Module):
    """A trunk, scores from its last stage and, unless auxiliary=False, others from the one before, as a dict."""

    def __init__(self, backbone, classifier, aux_classifier=None):
        super().__init__()
        self.backbone, self.classifier = backbone, classifier
        if aux_classifier is not None:
            self.aux_classifier = aux_classifier

    def forward(self, image):
        stages, size = self.backbone(image), image.shape[2:]
        outputs = {"out": self.classifier(stages[3])}
        if hasattr(self, "aux_classifier"):
            outputs["aux"] = self.aux_classifier(stages[2])
        return {
            name: F.interpolate(scores, size, mode="bilinear", align_corners=False) for name, scores in outputs.items()
        }


class StockFCNResNet(StockWithAuxiliary):
    """``forward`` gives {"out": scores, "aux": scores}.

    head_width: factor of the widths of the heads, else ``width``. dropout: of every head instead of 0.1.
    """

    def __init__(
        self, classes=21, width=1.0, depth=50, auxiliary=True, in_channels=3, dropout=None, head_width=None,
        output_stride=8,
    ):  # fmt: skip
        head = width if head_width is None else head_width
        dropout = chosen(dropout, 0.1)
        super().__init__(
            StockResNet(depth, width, in_channels, output_stride=output_stride, first="previous"),
            StockFCNHead(int(2048 * width), int(512 * head), classes, dropout),
            StockFCNHead(int(1024 * width), int(256 * head), classes, dropout) if auxiliary else None,
        )
