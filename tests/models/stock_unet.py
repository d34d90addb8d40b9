"""U-Net in three forms in stock torch.nn, without a line of fastseg.models."""

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS = (64, 128, 256, 512, 1024)


def convolved_twice(channels_in, channels_out):
    """Two unpadded 3x3 convolutions with ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3), nn.ReLU(), nn.Conv2d(channels_out, channels_out, 3), nn.ReLU()
    )


class StockUNetValid(nn.Module):
    """The original: no padding; n pixels, n = 12 mod 16, give n - 184. The skip comes first in every join.

    dropout: of the two deepest levels of the encoder.
    """

    def __init__(self, classes=2, width=1.0, in_channels=1, dropout=0.5):
        super().__init__()
        channels = [int(count * width) for count in CHANNELS]
        self.encoder, self.ups, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for entering, leaving in zip([in_channels, *channels], channels):
            self.encoder.append(convolved_twice(entering, leaving))
        for deep, shallow in zip(channels[:0:-1], channels[-2::-1]):
            self.ups.append(nn.ConvTranspose2d(deep, shallow, 2, 2))
            self.decoder.append(convolved_twice(2 * shallow, shallow))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(channels[0], classes, 1)

    def forward(self, image):
        skips = []
        for level, block in enumerate(self.encoder):
            image = block(F.max_pool2d(image, 2) if level else image)
            image = self.dropout(image) if level >= 3 else image
            skips.append(image)
        skips.pop()
        for up, block in zip(self.ups, self.decoder):
            image, skip = up(image), skips.pop()
            height, width = image.shape[2:]
            top, left = (skip.shape[2] - height) // 2, (skip.shape[3] - width) // 2
            image = block(torch.cat([skip[:, :, top : top + height, left : left + width], image], dim=1))
        return self.classifier(image)


def normalised_twice(channels_in, middle, channels_out, bias=False):
    """Two padded 3x3 convolutions with batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, middle, 3, padding=1, bias=bias), nn.BatchNorm2d(middle), nn.ReLU(),
        nn.Conv2d(middle, channels_out, 3, padding=1, bias=bias), nn.BatchNorm2d(channels_out), nn.ReLU(),
    )  # fmt: skip


class StockUNetSame(nn.Module):
    """The padded port with batch normalisation and its keys: ``inc``, ``down{1..4}``, ``up{1..4}``, ``outc``.

    interpolated: enlarged with corners aligned, half as deep a bottom and a decoder half as wide.
    """

    def __init__(self, classes=2, width=1.0, in_channels=3, interpolated=False):
        super().__init__()
        channels = [int(count * width) for count in CHANNELS]
        if interpolated:
            channels[4] = channels[3]
        self.interpolated = interpolated
        self.inc = nn.ModuleDict({"double_conv": normalised_twice(in_channels, channels[0], channels[0])})
        for level in range(1, 5):
            block = nn.ModuleDict({"double_conv": normalised_twice(channels[level - 1], *[channels[level]] * 2)})
            self.add_module(f"down{level}", nn.ModuleDict({"maxpool_conv": nn.ModuleList([nn.MaxPool2d(2), block])}))
        for level in range(1, 5):
            deep, skip, parts = channels[5 - level], channels[4 - level], {}
            leaving = channels[max(0, 3 - level)] if interpolated else skip
            if not interpolated:
                parts["up"] = nn.ConvTranspose2d(deep, skip, 2, 2)
            parts["conv"] = nn.ModuleDict({"double_conv": normalised_twice(2 * skip, skip, leaving)})
            self.add_module(f"up{level}", nn.ModuleDict(parts))
        self.outc = nn.ModuleDict({"conv": nn.Conv2d(channels[0], classes, 1)})

    def forward(self, image):
        skips = [self.inc["double_conv"](image)]
        for level in range(1, 5):
            pool, block = self.get_submodule(f"down{level}")["maxpool_conv"]
            skips.append(block["double_conv"](pool(skips[-1])))
        image = skips.pop()
        for level in range(1, 5):
            parts, skip = self.get_submodule(f"up{level}"), skips.pop()
            if self.interpolated:
                image = F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=True)
            else:
                image = parts["up"](image)
            below, right = skip.shape[2] - image.shape[2], skip.shape[3] - image.shape[3]
            image = F.pad(image, (right // 2, right - right // 2, below // 2, below - below // 2))
            image = parts["conv"]["double_conv"](torch.cat([skip, image], dim=1))
        return self.outc["conv"](image)


class StockUNetAarhus(nn.Module):
    """The lecture's net for 128x128 images: base width 16, probabilities of one class.

    Its transposed convolutions of kernel 3 and stride 2 give 2n + 1 rows and columns, of which the first 2n are kept
    (all where the skip has 2n + 1); with keep_last=True the last 2n. batch_norm, sigmoid: whether they are there.
    """

    def __init__(
        self, classes=1, width=1.0, in_channels=3, batch_norm=True, sigmoid=True, keep_last=False, dropout=0.0
    ):
        super().__init__()
        channels = [int(count * width) for count in (16, 32, 64, 128, 256)]
        self.keep_last, self.sigmoid = keep_last, sigmoid

        def double(entering, leaving):
            block = normalised_twice(entering, leaving, leaving, bias=True)
            return block if batch_norm else nn.Sequential(*(x for x in block if not isinstance(x, nn.BatchNorm2d)))

        for level, (entering, leaving) in enumerate(zip([in_channels, *channels], channels), 1):
            self.add_module(f"c{level}", double(entering, leaving))
        for level, (deep, shallow) in enumerate(zip(channels[:0:-1], channels[-2::-1]), 6):
            self.add_module(f"u{level}", nn.ConvTranspose2d(deep, shallow, 3, 2))
            self.add_module(f"c{level}", double(2 * shallow, shallow))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Conv2d(channels[0], classes, 1)

    def forward(self, image):
        skips = []
        for level in range(1, 6):
            image = self.get_submodule(f"c{level}")(image)
            if level < 5:
                skips.append(image)
                image = self.dropout(F.max_pool2d(image, 2))
        for level in range(6, 10):
            skip, image = skips.pop(), self.get_submodule(f"u{level}")(image)
            if self.keep_last:
                image = image[:, :, -skip.shape[2] :, -skip.shape[3] :]
            image = torch.cat([image[:, :, : skip.shape[2], : skip.shape[3]], skip], dim=1)
            image = self.get_submodule(f"c{level}")(self.dropout(image))
        scores = self.out(image)
        return torch.sigmoid(scores) if self.sigmoid else scores
