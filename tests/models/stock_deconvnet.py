"""DeconvNet in torch.nn alone, from the paper's table, without code of fastseg.models."""

import torch.nn.functional as F
from torch import nn

from tests.models.stock_segnet import SEGNET_ENCODER, unpooled

# channels (in, out) of every transposed convolution after `fc6-deconv`, one row per unpooling
DECODER = [
    [(512, 512), (512, 512), (512, 512)],
    [(512, 512), (512, 512), (512, 256)],
    [(256, 256), (256, 256), (256, 128)],
    [(128, 128), (128, 64)],
    [(64, 64), (64, 64)],
]


class StockDeconvNet(nn.Module):
    def __init__(self, classes, width):
        super().__init__()

        def normalised(layer):
            return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU())

        def scaled(channels):
            return 3 if channels is None else int(channels * width)

        self.encoder = nn.ModuleList(
            nn.Sequential(*(normalised(nn.Conv2d(scaled(a), scaled(b), 3, padding=1)) for a, b in stage))
            for stage in SEGNET_ENCODER
        )
        self.bottom = nn.Sequential(
            normalised(nn.Conv2d(scaled(512), scaled(4096), 7)),
            normalised(nn.Conv2d(scaled(4096), scaled(4096), 1)),
            normalised(nn.ConvTranspose2d(scaled(4096), scaled(512), 7)),
        )
        self.decoder = nn.ModuleList(
            nn.Sequential(*(normalised(nn.ConvTranspose2d(scaled(a), scaled(b), 3, padding=1)) for a, b in stage))
            for stage in DECODER
        )
        self.score = nn.Conv2d(scaled(64), classes, 1)

    def forward(self, image):
        places = []
        for stage in self.encoder:
            image = stage(image)
            size = image.shape[2:]
            image, indices = F.max_pool2d(image, 2, 2, ceil_mode=True, return_indices=True)
            places.append((indices, size))
        image = self.bottom(image)
        for stage in self.decoder:
            image = stage(unpooled(image, *places.pop()))
        return self.score(image)
