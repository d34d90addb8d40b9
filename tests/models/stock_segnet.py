"""SegNet and SegNet-Basic in torch.nn alone, from the papers, without code of fastseg.models."""

import torch
import torch.nn.functional as F
from torch import nn

# channels (in, out) of every convolution of SegNet, in the order in which they run, one row per stage;
# None means the image or the classes
SEGNET_ENCODER = [
    [(None, 64), (64, 64)],
    [(64, 128), (128, 128)],
    [(128, 256), (256, 256), (256, 256)],
    [(256, 512), (512, 512), (512, 512)],
    [(512, 512), (512, 512), (512, 512)],
]
SEGNET_DECODER = [
    [(512, 512), (512, 512), (512, 512)],
    [(512, 512), (512, 512), (512, 256)],
    [(256, 256), (256, 256), (256, 128)],
    [(128, 128), (128, 64)],
    [(64, 64), (64, None)],
]


class StockSegNet(nn.Module):
    def __init__(self, classes, width):
        super().__init__()

        def stage(rows, ends):
            layers = nn.ModuleList()
            for channels_in, channels_out in rows:
                inputs = int(channels_in * width) if channels_in else ends
                outputs = int(channels_out * width) if channels_out else ends
                layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
                if channels_out:
                    layers.append(nn.BatchNorm2d(outputs))
                    layers.append(nn.ReLU())
            return layers

        self.encoder = nn.ModuleList(stage(rows, 3) for rows in SEGNET_ENCODER)
        self.decoder = nn.ModuleList(stage(rows, classes) for rows in SEGNET_DECODER)

    def forward(self, image):
        places = []
        for stage in self.encoder:
            for layer in stage:
                image = layer(image)
            size = image.shape[2:]
            image, indices = F.max_pool2d(image, 2, 2, ceil_mode=True, return_indices=True)
            places.append((indices, size))
        for stage in self.decoder:
            image = unpooled(image, *places.pop())
            for layer in stage:
                image = layer(image)
        return image


class StockSegNetBasic(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        channels = int(64 * width)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for channels_in in (3, channels, channels, channels):
            self.encoder.append(nn.Conv2d(channels_in, channels, 7, 1, 3))
            self.encoder.append(nn.BatchNorm2d(channels))
        for _ in range(4):
            self.decoder.append(nn.Conv2d(channels, channels, 7, 1, 3))
            self.decoder.append(nn.BatchNorm2d(channels))
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, image):
        image = image / (1 + 1e-4 / 5 * neighbours_summed(image**2, 5)) ** 0.75
        places = []
        for stage in range(4):
            image = torch.relu(self.encoder[2 * stage + 1](self.encoder[2 * stage](image)))
            size = image.shape[2:]
            image, indices = F.max_pool2d(image, 2, 2, ceil_mode=True, return_indices=True)
            places.append((indices, size))
        for stage in range(4):
            image = unpooled(image, *places.pop())
            image = self.decoder[2 * stage + 1](self.decoder[2 * stage](image))
        return self.classifier(image)


def neighbours_summed(image, count):
    """For every channel the sum over the ``count`` channels around it that exist."""
    reach, channels = count // 2, image.shape[1]
    return torch.stack([image[:, max(0, c - reach) : c + reach + 1].sum(1) for c in range(channels)], dim=1)


def unpooled(pooled, indices, size):
    return F.max_unpool2d(pooled, indices, 2, 2, output_size=size)
